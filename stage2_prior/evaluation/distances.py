"""Frechet distances of a generation report, each beside the figure that it may fairly be compared with.

All are to held-out pictures, in one set of features. Which pictures they are taken of makes more of a difference than
one expects, since held-out captions fix most of a picture:

* `reconstruction_real`: the held-out pictures themselves, encoded and decoded. Paired, picture by picture: what the
  tokenizer loses, and nothing else.
* `generated_real`: pictures drawn from the held-out captions. Unpaired: each differs from the held-out picture of its
  caption as two real pictures of one caption differ.
* `same_captions`: all unpaired, on those held-out captions that training pictures have word by word: `real_real` of
  such training pictures, `reconstruction_real` of their reconstructions, `generated_real` of drawn ones. One n, one
  list of captions, one reference, so that generated over reconstruction (`generated_over_reconstruction`) compares like
  with like, and real_real is what a perfect sampler with a perfect tokenizer is left with.
* `real_real`: training pictures drawn at random, whatever their captions.

A distance at finite n is too large by about c / n. `at_infinity` extrapolates as Chong & Forsyth 2020 ("Effectively
unbiased FID", section 4) do: distances at several n, a straight line in 1 / n, its intercept; here with subsets of both
sides. It may fall a little below 0 where there is no difference.

Distances are of all pictures, from moments of their features; what compares pictures one by one, or subsets, is of a
sample of at most 10,000 (`held_out.SAMPLE`).

Letters: N pictures, D features.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, Moments, frechet_distance, precision_recall
from stage1_tokenizer.evaluation.picture_data import batches
from stage1_tokenizer.evaluation.picture_set import PictureSet
from stage2_prior.captions import longest
from stage2_prior.evaluation.sampling import space_device
from stage2_prior.latent_space import LatentSpace

MANY = 200  # pictures below which a distance between two sets says little
POINTS = 10  # sizes from half of the pictures to all of them, at which the line in 1 / n is fitted


@dataclass(frozen=True)
class Twins:
    """Training pictures that have the captions of held-out ones.

    rows: of the held-out sample. others: the training pictures, and reconstructed: through the tokenizer.
    """

    rows: list[int]
    others: PictureSet
    reconstructed: PictureSet

    @classmethod
    def of(
        cls,
        images: ImageDataModule,
        captions: Sequence[list[str]],
        tokenizer: LatentSpace,
        extractors: Sequence[FeatureExtractor],
        batch_size: int,
    ) -> "Twins | None":
        """None below 200 of them. captions: of the held-out sample."""
        rows, numbers = same_caption_pairs(images, captions)
        if len(rows) <= MANY:
            return None
        device, every = space_device(tokenizer), range(len(rows))
        others, reconstructed = PictureSet(extractors, every), PictureSet(extractors, every)
        for batch in batches(images, "train", numbers, batch_size):
            pictures = batch["images"].to(device)
            others.add(pictures)
            reconstructed.add(tokenizer.decode(tokenizer.posterior(pictures)[0]))
        return cls(rows, others, reconstructed)


def distance_report(
    name: str,
    real: PictureSet,
    recon: PictureSet,
    generated: dict[str, PictureSet],
    training: Tensor | Moments,
    twins: Twins | None,
    seed: int = 0,
) -> dict[str, Any]:
    """Every distance of the module's docstring, by name, and precision and recall of a sample, by guidance.

    name: of the features. generated: by guidance; it, recon and real: pictures of the same captions, the same ones in
    the sample. training: features of as many training pictures, or their moments.
    """
    reference, sample = real.moments[name], real.rows(name)
    out: dict[str, Any] = {
        "n": real.n,
        "real_real": frechet_distance(reference, training),
        "reconstruction_real": frechet_distance(reference, recon.moments[name]),
        "generated_real": {w: frechet_distance(reference, x.moments[name]) for w, x in generated.items()},
        "precision_recall": {w: precision_recall(sample, x.rows(name)) for w, x in generated.items()},
    }
    if twins is not None:
        sets = {"real_real": twins.others.rows(name), "reconstruction_real": twins.reconstructed.rows(name)}
        drawn = {w: x.rows(name)[twins.rows] for w, x in generated.items()}
        out["same_captions"] = _unpaired(sample[twins.rows], sets, drawn, seed)
    return out


def _unpaired(reference: Tensor, sets: dict[str, Tensor], generated: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """Distances to `reference` (N,D) of other real pictures, of their reconstructions, and of generated ones."""

    def by_set(distance: Callable[[Tensor, Tensor], float]) -> dict[str, Any]:
        real: dict[str, Any] = {name: distance(reference, x) for name, x in sets.items()}
        return real | {"generated_real": {w: distance(reference, x) for w, x in generated.items()}}

    same = by_set(frechet_distance)
    ratio = {w: distance / same["reconstruction_real"] for w, distance in same["generated_real"].items()}
    out = {"n": len(reference), **same, "generated_over_reconstruction": ratio}
    if len(reference) >= 2 * reference.shape[1]:  # below, half of them do not span the features: no straight line
        out["at_infinity"] = by_set(lambda a, b: frechet_at_infinity(a, b, seed))
    return out


def frechet_at_infinity(a: Tensor, b: Tensor, seed: int = 0) -> float:
    """Frechet distance of features (N,D) and (N,D) extrapolated to infinite N, by a straight line in 1 / n.

    Each n takes the same rows of both, so that sets with one list of captions keep having one.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(len(a) / 2, len(a), POINTS).round().long().tolist()
    distances = []
    for n in sizes:
        rows = torch.randperm(len(a), generator=generator)[:n]
        distances.append(frechet_distance(a[rows], b[rows]))
    line = torch.stack([torch.ones(POINTS), 1 / torch.tensor(sizes)], dim=1).double()  # (points, 2)
    return torch.linalg.lstsq(line, torch.tensor(distances).double()[:, None]).solution[0].item()


def same_caption_pairs(images: ImageDataModule, held_out: Sequence[list[str]]) -> tuple[list[int], list[int]]:
    """Held-out pictures whose caption a training picture has word by word: their rows, and such a picture of each.

    held_out: their captions. No training picture is taken twice: a held-out caption that has no other left is left out.
    """
    free: dict[str, list[int]] = defaultdict(list)
    for i, captions in reversed(list(enumerate(images.captions("train")))):
        if captions:
            free[longest(captions)].append(i)
    rows, twins = [], []
    for row, captions in enumerate(held_out):
        if captions and free.get(longest(captions)):
            rows.append(row)
            twins.append(free[longest(captions)].pop())
    return rows, twins
