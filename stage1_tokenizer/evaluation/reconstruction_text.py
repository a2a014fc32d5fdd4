"""The part of the reconstruction report that needs words: what a prefix of latents holds of the picture's caption.

Retrieval among held-out captions and zero-shot classes use the space that pictures and captions share. A tokenizer that
was also trained to write captions (`PrefixCaptioner`) is asked for the likelihood of the true one, and for its own.
Every kind of caption is measured by itself: a short one names less, and is shared by more pictures.

Letters: N pictures, K latents, C channels, k prefix length, P vectors of a prefix, E width of an embedding.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.reading.order import spread_rows
from stage1_tokenizer.evaluation.probes import (
    class_prompts,
    embed_captions,
    embed_prefixes,
    nearest_captions,
    zero_shot,
)
from stage1_tokenizer.evaluation.retrieval import retrieval
from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.supervision import Supervision
from stage1_tokenizer.tokenizer import Tokenizer

NUM_CAPTIONS = 1000
NUM_EXAMPLES = 8  # pictures whose captions are shown
BATCH = 250


def text_metrics(
    tokenizer: Tokenizer,
    z: Tensor,
    held_out: Mapping[str, Any],
    train: Mapping[str, Any],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """Entries `retrieval`, `captions_read`, `zero_shot` (labelled pictures), `caption_bits` (with a captioner).

    Under `MaxOverQueries` the best of the first k latents counts, elsewhere what the tokenizer makes of all k; which
    lengths it is trained to read is in `text_lengths`, and how it reads others in `Tokenizer.embed_latents`.

    Args:
        tokenizer: with a text part.
        z: (N, K, C) latents of the held-out pictures.
        held_out: captions, attributes and labels of the held-out pictures.
        train: captions and labels of training pictures, which name the classes.
        lengths: prefix lengths.
    """
    chosen = spread_rows(len(held_out["captions"]), NUM_CAPTIONS)
    captions = [held_out["captions"][i] for i in chosen]
    kinds = {
        name: [texts[index] for texts in captions]
        for index, name in enumerate(_kinds(captions, is_scene=any(held_out["attributes"])))
    }
    z, text = z.to(tokenizer.latent_mean.device), tokenizer.text_part()
    prefixes = _prefix_vectors(tokenizer, z, lengths)
    few = {k: vectors[chosen] for k, vectors in prefixes.items()}
    embedded = {name: embed_captions(tokenizer, texts) for name, texts in kinds.items()}
    metrics: dict[str, Any] = {"retrieval": {"n": len(captions)}, "text_lengths": text.lengths}
    for name, texts in kinds.items():
        metrics["retrieval"][name] = _retrieval(few, embedded[name], texts)
    last = list(kinds)[-1]  # of scenes the long caption, which names everything
    nearest = nearest_captions(few, embedded[last], kinds[last], NUM_EXAMPLES)
    metrics["captions_read"] = [
        {"caption": caption, "nearest": by_k} for caption, by_k in zip(kinds[last], nearest, strict=False)
    ]
    if int(train["labels"].min()) >= 0:
        prompts = class_prompts(train["captions"], train["labels"].tolist())
        metrics["zero_shot"] = zero_shot(tokenizer, prefixes, held_out["labels"], prompts)
    if text.captioner is not None:
        raw = tokenizer.unstandardised(z[chosen])  # (N, K, C)
        metrics["caption_bits"] = {name: caption_bits(text, raw, texts, lengths) for name, texts in kinds.items()}
        for item, written in zip(
            metrics["captions_read"], write_captions(text, raw[:NUM_EXAMPLES], lengths), strict=True
        ):
            item["written"] = written
    return metrics


def _prefix_vectors(tokenizer: Tokenizer, z: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
    """k -> (N, P, E): the P vectors that compete for the caption where the first k latents are given."""
    competing = {k: tokenizer.text_part().competing(k) for k in lengths}
    single = embed_prefixes(tokenizer, z, sorted({n for together in competing.values() for n in together}))
    return {k: torch.stack([single[n] for n in together], dim=1) for k, together in competing.items()}


def _retrieval(prefixes: Mapping[int, Tensor], embedded: Tensor, texts: Sequence[str]) -> dict[str, Any]:
    """Recall and bits by k of one kind of caption, embedded as (N, E), with what chance gives and what there is."""
    by_k = {k: retrieval(vectors, embedded, texts, texts) for k, vectors in prefixes.items()}
    any_length = next(iter(by_k.values()))
    return {
        "distinct": len(set(texts)),
        "chance": any_length.chance,
        "recall": {k: result.recall for k, result in by_k.items()},
        "recall_of_pictures": {k: result.reverse for k, result in by_k.items()},
        "bits": {k: result.bits for k, result in by_k.items()},
        "most_bits": any_length.most_bits,
    }


@torch.inference_mode()
def caption_bits(text: Supervision, raw: Tensor, captions: Sequence[str], lengths: Sequence[int]) -> dict[int, float]:
    """Mean -log2 p(caption | first k latents) for each length k, and for k = 0: what captions cost without a picture.

    raw: latents (N, K, C) before standardisation, of the pictures that `captions` belong to.
    """
    captioner = text.captioner
    assert captioner is not None, "the caller looked"
    ids = text.vocabulary.encode(list(captions))[0].to(raw.device)  # (N, L)
    bits = {}
    for k in (0, *lengths):
        keep = keep_mask(torch.full((len(raw),), k, device=raw.device), raw.shape[1])
        parts = zip(raw.split(BATCH), keep.split(BATCH), ids.split(BATCH), strict=True)
        nats = torch.cat([captioner.log_likelihood(*part) for part in parts])
        bits[k] = -nats.mean().item() / math.log(2)
    return bits


@torch.inference_mode()
def write_captions(text: Supervision, raw: Tensor, lengths: Sequence[int]) -> list[dict[int, str]]:
    """The captions that the captioner itself writes for the first k latents of each of raw (N, K, C), by k."""
    captioner = text.captioner
    assert captioner is not None, "the caller looked"
    written = {}
    for k in lengths:
        keep = keep_mask(torch.full((len(raw),), k, device=raw.device), raw.shape[1])
        written[k] = text.vocabulary.decode(captioner.generate(raw, keep))
    return [{k: lines[i] for k, lines in written.items()} for i in range(len(raw))]


def _kinds(captions: Sequence[Sequence[str]], is_scene: bool) -> list[str]:
    """Names of the captions that every picture has, in stored order."""
    number = min(len(texts) for texts in captions)
    if is_scene and number == 3:
        return ["short", "medium", "long"]
    return ["caption"] if number == 1 else [f"caption {i}" for i in range(1, number + 1)]
