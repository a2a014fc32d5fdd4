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

import torch
from torch import Tensor
from torch.nn import functional as F

from stage1_tokenizer.text.ranks import of_others

TRAINING = 20_000  # training pictures that are looked through, at most
ROWS = 500  # pictures whose distances to all others are held at once


@dataclass(frozen=True)
class Bank:
    """Real pictures to look through.

    raw: features (M,D). names: the shortest caption of each. trained: (M,) bool, which were trained on; the others are
    held out. numbers: of each in its split.
    """

    raw: Tensor
    names: list[str]
    trained: Tensor
    numbers: list[int]

    @cached_property
    def features(self) -> Tensor:
        """(M,D) of unit length."""
        return F.normalize(self.raw, dim=1)

    @cached_property
    def usual_distance(self) -> float:
        """The median distance of a held-out picture to its nearest training picture."""
        return self.nearest(self.raw[~self.trained], self.trained)[1].median().item()

    def nearest(self, features: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(row of the nearest real picture, its distance), each (N,), for features (N,D); among: (M,) bool."""
        found = []
        for part in F.normalize(features, dim=1).split(ROWS):
            distances = torch.cdist(part, self.features)
            if among is not None:
                distances = distances.masked_fill(~among, float("inf"))
            found.append(distances.min(dim=1))
        return torch.cat([x.indices for x in found]), torch.cat([x.values for x in found])

    def recognised(self, features: Tensor, names: Sequence[str]) -> int:
        """How many of (N,D) features have a nearest real picture with the name asked for."""
        rows, _ = self.nearest(features)
        return sum(self.names[row] == name for row, name in zip(rows.tolist(), names, strict=True))


class Neighbours:
    """Counts, over batches of drawn pictures, what their nearest real pictures say. shown: numbers to remember."""

    def __init__(self, bank: Bank, shown: Sequence[int] = ()) -> None:
        self.bank, self.shown = bank, set(shown)
        self.n = self.recognised = self.nearer = 0
        self.nearest: dict[int, int] = {}  # number of a drawn picture that is shown -> row of the training picture

    def add(self, features: Tensor, names: Sequence[str], at: int) -> None:
        """features (B,D) of drawn pictures, the shortest caption of each that was asked for, the first's number."""
        rows, distances = self.bank.nearest(features, self.bank.trained)
        self.nearer += int((distances < self.bank.usual_distance).sum())
        self.recognised += self.bank.recognised(features, names)
        self.nearest |= {at + i: int(rows[i]) for i in range(len(rows)) if at + i in self.shown}
        self.n += len(rows)

    def over_ranks(self) -> None:
        """Take in what the other ranks have counted; all of them have to call it."""
        for n, recognised, nearer, nearest in of_others((self.n, self.recognised, self.nearer, self.nearest)):
            self.n, self.recognised, self.nearer = self.n + n, self.recognised + recognised, self.nearer + nearer
            self.nearest |= nearest


def shortest(captions: Sequence[str]) -> str:
    """The shortest caption, of equally short ones the first; "" where there is none."""
    return min(captions, key=len, default="")
