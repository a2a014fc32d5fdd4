"""Nearest real pictures of generated ones, in named features: is it what its caption names, and is it learned by heart?

* *recognised*: the nearest real picture (of the training and the held-out split) has the same shortest caption as the
  one asked for: its class, or the name of an emoji. For captions of training pictures, and for held-out ones. Where no
  two pictures share a caption the figure can only say that a picture is a copy.
* *nearer to training*: the share of generated pictures that are nearer to a training picture than the median held-out
  picture is. Held-out pictures have 1/2 by this definition; more says that pictures are copied.

Distances are Euclidean between features of unit length. Letters: N pictures, M real pictures, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.picture_data import draw_training
from stage2_prior.evaluation.distances import Features

TRAINING = 20_000  # training pictures that are looked through, at most
TRAINING_BYTES = 2**30  # of pictures in memory


@dataclass(frozen=True)
class Bank:
    """Real pictures to look through.

    raw: features (M,D). names: the shortest caption of each. trained: (M,) bool, which were trained on; the others are
    held out. pictures: (M,3,H,W).
    """

    raw: Tensor
    names: list[str]
    trained: Tensor
    pictures: Tensor

    @cached_property
    def features(self) -> Tensor:
        """(M,D) of unit length."""
        return F.normalize(self.raw, dim=1)

    @property
    def features_of_held_out(self) -> Tensor:
        """As the extractor gives them, of the held-out pictures."""
        return self.raw[~self.trained]

    @classmethod
    def of(cls, features: Features, images: ImageDataModule, real: dict[str, Any], seed: int = 0) -> "Bank":
        """Training pictures (at most 20,000, and 1 GiB, drawn at random) and the held-out pictures `real`."""
        train = draw_training(images, min(TRAINING, TRAINING_BYTES // (4 * real["images"][0].numel())), seed)
        pictures = torch.cat([train["images"], real["images"]])
        trained = torch.arange(len(pictures)) < len(train["images"])
        names = [shortest(captions) for captions in (*train["captions"], *real["captions"])]
        return cls(features(pictures), names, trained, pictures)

    def nearest(self, features: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(row of the nearest real picture, its distance), each (N,), for features (N,D); among: (M,) bool."""
        distances = torch.cdist(F.normalize(features, dim=1), self.features)
        if among is not None:
            distances = distances.masked_fill(~among, float("inf"))
        distance, row = distances.min(dim=1)
        return row, distance

    def recognised(self, features: Tensor, names: Sequence[str]) -> float:
        """Share of (N,D) features whose nearest real picture has the name asked for."""
        rows, _ = self.nearest(features)
        return sum(self.names[row] == name for row, name in zip(rows.tolist(), names, strict=True)) / len(names)


def shortest(captions: Sequence[str]) -> str:
    """The shortest caption, of equally short ones the first; "" where there is none."""
    return min(captions, key=len, default="")


def neighbour_report(
    features: Features,
    bank: Bank,
    generated: dict[str, Tensor],
    real: dict[str, Any],
    seen: tuple[dict[str, Tensor], list[str]],
) -> tuple[dict[str, Any], Tensor]:
    """Figures by guidance, and the training picture (N,3,H,W) nearest to each generated one of the last guidance.

    generated: pictures (N,3,H,W) of the captions of `real`, a batch of the val split; seen: the same for captions of
    training pictures, and their shortest captions.
    """
    names = [shortest(captions) for captions in real["captions"]]
    held_out = bank.features[~bank.trained]
    threshold = bank.nearest(held_out, bank.trained)[1].median()
    figures: dict[str, Any] = {"n": len(names), "recognised": {}, "recognised_seen": {}, "nearer_to_training": {}}
    figures["n_seen"] = len(seen[1])
    rows = torch.zeros(0, dtype=torch.long)
    for guidance, pictures in generated.items():
        drawn = features(pictures)
        rows, distance = bank.nearest(drawn, bank.trained)
        figures["recognised"][guidance] = bank.recognised(drawn, names)
        figures["recognised_seen"][guidance] = bank.recognised(features(seen[0][guidance]), seen[1])
        figures["nearer_to_training"][guidance] = (distance < threshold).float().mean().item()
    return figures, bank.pictures[rows]
