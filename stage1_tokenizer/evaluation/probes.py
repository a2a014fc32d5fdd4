"""What can be read from a prefix of latents: linear probes, captions near to it, classes named by captions.

Each takes latents z (N, K, C) and prefix lengths and gives one value per length, so that a table by prefix shows where
in the line a piece of information sits. A linear probe needs no text; the other two use the tokenizer's text space.

Letters: N pictures, K latents, C channels, F floats, S slots (things to be read), E embedding width.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from stage1_tokenizer.evaluation.retrieval import similarities

TEXT_BATCH = 256
CAPTIONS_PER_CLASS = 50


class TextSpace(Protocol):
    """The two maps of a tokenizer into the space that pictures and captions share."""

    def embed_text(self, captions: list[str]) -> Tensor: ...

    def embed_latents(self, z: Tensor) -> Tensor: ...


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, classes: Sequence[int], decay: float = 3e-2
) -> Tensor:
    """Test accuracy of logistic regression: x (N, F), y (N, S) class indices -> (S + 1,), every slot, then all at once.

    Features are standardised on the training set; L2 `decay` on the weights; L-BFGS, so there is no rate to tune.
    A target of -1 is not trained on and never right.
    """
    mean, scale = train_x.mean(dim=0), train_x.std(dim=0).clamp_min(1e-6)
    x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    weight = torch.zeros(x.shape[1], sum(classes), device=x.device, requires_grad=True)
    bias = torch.zeros(sum(classes), device=x.device, requires_grad=True)
    y = train_y.to(x.device)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = (x @ weight + bias).split(list(classes), dim=1)
        loss = torch.stack([F.cross_entropy(slot, y[:, i], ignore_index=-1) for i, slot in enumerate(logits)]).sum()
        loss = loss + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        logits = (test_x @ weight + bias).split(list(classes), dim=1)
        right = torch.stack([slot.argmax(dim=1) for slot in logits], dim=1).cpu() == test_y.cpu()  # (N, S)
    return torch.cat([right.double().mean(dim=0), right.all(dim=1).double().mean()[None]])


@torch.inference_mode()
def embed_captions(space: TextSpace, captions: Sequence[str]) -> Tensor:
    """Unit vectors (N, E) of captions, embedded in batches."""
    parts = [space.embed_text(list(captions[i : i + TEXT_BATCH])) for i in range(0, len(captions), TEXT_BATCH)]
    return torch.cat(parts).float().cpu()


@torch.inference_mode()
def embed_prefixes(space: TextSpace, z: Tensor, lengths: Sequence[int], batch_size: int = 1000) -> dict[int, Tensor]:
    """Unit vectors (N, E) of the first k latents for each length k."""
    return {
        k: torch.cat([space.embed_latents(part[:, :k]) for part in z.split(batch_size)]).float().cpu() for k in lengths
    }


def nearest_captions(
    prefixes: Mapping[int, Tensor], text: Tensor, captions: Sequence[str], num: int
) -> list[dict[int, str]]:
    """For each of the first `num` pictures, the caption that the first k latents are nearest to, by k.

    Prefixes are vectors (N, E), or (N, P, E) of which the nearest counts, and so in `zero_shot`.
    """
    nearest = {k: similarities(vectors[:num], text).argmax(dim=1).tolist() for k, vectors in prefixes.items()}
    return [{k: captions[rows[i]] for k, rows in nearest.items()} for i in range(min(num, len(captions)))]


def class_prompts(captions: Sequence[Sequence[str]], labels: Sequence[int]) -> dict[int, list[str]]:
    """Up to fifty different training captions of each class: the words for it, without a list of names."""
    prompts: dict[int, dict[str, None]] = {}
    for texts, label in zip(captions, labels, strict=True):
        known = prompts.setdefault(int(label), {})
        if len(known) < CAPTIONS_PER_CLASS:
            known.update(dict.fromkeys(texts))
    return {label: list(known)[:CAPTIONS_PER_CLASS] for label, known in sorted(prompts.items())}


def zero_shot(
    space: TextSpace, prefixes: Mapping[int, Tensor], labels: Tensor, prompts: Mapping[int, Sequence[str]]
) -> dict[int, float]:
    """Share of pictures whose nearest class, by the mean embedding of its prompts, is their label (N,)."""
    means = torch.stack([F.normalize(embed_captions(space, texts).mean(dim=0), dim=0) for texts in prompts.values()])
    classes = torch.tensor(list(prompts))
    return {
        k: (classes[similarities(vectors, means).argmax(dim=1)] == labels.cpu()).double().mean().item()
        for k, vectors in prefixes.items()
    }
