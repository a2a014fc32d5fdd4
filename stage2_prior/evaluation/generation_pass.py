"""The passes of a generation report: held-out pictures, training pictures, and what is drawn at each guidance scale.

Of several ranks each goes through its share of the batches, and all end with all. Pictures go by, and none is kept that
is not shown: of all of them moments of features and what a classifier reads, of a sample of at most 10,000 features and
latents (`picture_set`, `held_out`).

Letters: N captions, M of them in the sample, K latents, C latent channels, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, Moments
from stage1_tokenizer.evaluation.inception import Reference, field_scores
from stage1_tokenizer.evaluation.picture_data import chosen, own_batches, training_rows
from stage1_tokenizer.evaluation.picture_set import PictureSet
from stage1_tokenizer.text.ranks import in_order, rank, world_size
from stage2_prior.base import Prior
from stage2_prior.evaluation import neighbours
from stage2_prior.evaluation.held_out import HeldOut, HeldOutData, Lines
from stage2_prior.evaluation.lengths import Lengths
from stage2_prior.evaluation.neighbours import Bank, Neighbours, shortest
from stage2_prior.evaluation.sampling import Sampler, space_device
from stage2_prior.latent_space import LatentSpace

SEEDS = 8  # pictures of one caption, and captions of which so many are drawn


@dataclass(frozen=True)
class Originals:
    """Held-out pictures, what the tokenizer makes of them, and latents of the sample."""

    real: PictureSet
    recon: PictureSet
    lines: Lines


def originals(
    held: HeldOut,
    data: HeldOutData,
    images: ImageDataModule,
    tokenizer: LatentSpace,
    extractors: Sequence[FeatureExtractor],
    shown: Sequence[int],
    num_latents: int,
    batch_size: int,
) -> Originals:
    """One pass over the held-out samples. num_latents: of a line that the prior models."""
    device, in_sample = space_device(tokenizer), set(held.sample)
    real, recon = (PictureSet(extractors, held.sample, shown) for _ in range(2))
    kept = {}
    for at, mean, std, pictures in held.batches(data, images, tokenizer, batch_size):
        own = [i for i in range(len(mean)) if at + i in in_sample]
        kept[at] = (mean[own, :num_latents], std[own, :num_latents])
        real.add(pictures.to(device), at)
        recon.add(tokenizer.decode(mean.to(device)), at)
    real.over_ranks()
    recon.over_ranks()
    mean, std = (torch.cat(x) for x in zip(*in_order(kept), strict=True))
    asked = [held.asked[i] for i in held.sample]
    return Originals(real, recon, Lines(mean, std, asked, chosen(held.samples, held.sample)))


@dataclass(frozen=True)
class Training:
    """Training pictures drawn at random: features (M,D) of up to 20,000 by extractor, and moments of all."""

    pictures: PictureSet
    numbers: list[int]
    names: list[str]  # the shortest caption of each

    @classmethod
    def of(
        cls,
        images: ImageDataModule,
        extractors: Sequence[FeatureExtractor],
        n: int,
        seed: int,
        batch_size: int,
        device: torch.device,
    ) -> "Training":
        """n pictures, or as many as are looked through, whichever is more; features are taken on `device`."""
        numbers = training_rows(images, max(n, neighbours.TRAINING), seed)
        pictures, names = PictureSet(extractors, range(neighbours.TRAINING)), {}
        for at, batch in own_batches(images, "train", numbers, batch_size):
            pictures.add(batch["images"].to(device), at)
            names[at] = [shortest(captions) for captions in batch["captions"]]
        pictures.over_ranks()
        return cls(pictures, numbers, [name for part in in_order(names) for name in part])

    def first(self, name: str, n: int) -> Tensor | Moments:
        """Features of the first n, or moments where these are all there are."""
        return self.pictures.rows(name)[:n] if n < self.pictures.n else self.pictures.moments[name]

    def bank(self, name: str, held: HeldOut, real: PictureSet) -> Bank:
        """These and the held-out sample, to look through."""
        trained, others = self.pictures.rows(name), real.rows(name)
        number, own = len(trained), chosen(held.samples, held.sample)["captions"]
        names = [*self.names[:number], *map(shortest, own)]
        numbers = [*self.numbers[:number], *(held.rows[i] for i in held.sample)]
        return Bank(torch.cat([trained, others]), names, torch.arange(number + len(others)) < number, numbers)


@dataclass(frozen=True)
class Drawn:
    """What was drawn from the held-out captions at one guidance scale."""

    pictures: PictureSet
    latents: Tensor  # (M,K,C) of the sample
    neighbours: Neighbours
    lengths: Lengths | None


def draw(
    sampler: Sampler,
    prior: Prior,
    tokenizer: LatentSpace,
    held: HeldOut,
    guidance: float,
    bank: Bank,
    extractors: Sequence[FeatureExtractor],
    shown: Sequence[int],
    by_length: bool,
) -> Drawn:
    """One pass over the captions; neighbours and lengths are looked at in the features of the last extractor.

    by_length: whether lines are also decoded from their first latents.
    """
    last, device, in_sample = extractors[-1], space_device(tokenizer), set(held.sample)
    pictures, near = PictureSet(extractors, held.sample, shown), Neighbours(bank, shown)
    lengths = Lengths(last, bank, tokenizer, prior.num_latents) if by_length else None
    names, latents = [shortest(captions) for captions in held.samples["captions"]], {}
    size = sampler.batch_size
    starts = range(rank() * size, len(held.asked), world_size() * size)
    for at, (z, images) in zip(starts, sampler.batches(prior, tokenizer, held.asked, guidance, starts), strict=True):
        asked = names[at : at + len(z)]
        near.add(pictures.add(images.to(device), at)[last.feature_name], asked, at)
        if lengths is not None:
            lengths.add(z, asked)
        latents[at] = z[[i for i in range(len(z)) if at + i in in_sample]]
    for each in (pictures, near, lengths):
        if each is not None:
            each.over_ranks()
    return Drawn(pictures, torch.cat(in_order(latents)), near, lengths)


def neighbour_figures(drawn: dict[str, Drawn], seen: dict[str, int], num_seen: int, features: str) -> dict[str, Any]:
    """Shares by guidance. seen: recognised pictures of `num_seen` captions of training pictures."""
    near = {w: each.neighbours for w, each in drawn.items()}
    return {
        "features": features,
        "n": next(iter(near.values())).n,
        "n_seen": num_seen,
        "recognised": {w: x.recognised / x.n for w, x in near.items()},
        "recognised_seen": {w: count / num_seen for w, count in seen.items()},
        "nearer_to_training": {w: x.nearer / x.n for w, x in near.items()},
    }


def scores(real: PictureSet, drawn: dict[str, Drawn], reference: Reference | None) -> dict[str, dict[str, Any]]:
    """FID, sFID and Inception score by guidance and of the held-out pictures, which are the reference where None is."""
    reference = reference or Reference("held-out pictures", real.inception.pooled, real.inception.spatial)
    sets = {**{w: each.pictures for w, each in drawn.items()}, "real": real}
    return {name: field_scores(pictures.inception, reference) for name, pictures in sets.items()}


def diversity(
    sampler: Sampler, prior: Prior, tokenizer: LatentSpace, captions: list[str], guidance: float
) -> tuple[dict[str, float], Tensor]:
    """8 pictures of each of 8 captions: how far two seeds are apart, and the pictures (8,8,3,H,W)."""
    chosen = list(dict.fromkeys(captions))[:SEEDS]
    drawn = sampler(prior, tokenizer, [c for c in chosen for _ in range(SEEDS)], guidance).images
    same = drawn.unflatten(0, (len(chosen), SEEDS))
    apart = (same[:, :1] - same[:, 1:]).square().mean(dim=(2, 3, 4)).sqrt()  # (8,7)
    figures = {
        "pixel_std_within_caption": same.std(dim=1).mean().item(),
        "rms_between_two_seeds": apart.mean().item(),
        "smallest_rms_between_two_seeds": apart.min().item(),
    }
    return figures, same
