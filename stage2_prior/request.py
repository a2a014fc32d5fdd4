"""What passes between a prior's contract and its members: captions as tokens, and a sample as requested.

Letters: B captions, R rows (captions and their unconditional twins), K latents, C latent channels, L caption tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.heads.solvers import Solver


class Text(NamedTuple):
    """Captions as the prior reads them: ids (B,L) long of its condition, text_mask (B,L) bool, True = a real token."""

    ids: Tensor
    text_mask: Tensor


class States(NamedTuple):
    """What a transformer makes of lines that it reads, without captions, token by token in the order of modelling."""

    hidden: Tensor  # (depth + 1,B,K,D): the stream before the first block and behind each
    line: Tensor  # (B,K,C): the latents in that order
    read: list[int]  # K: how many of these the state at each place has seen


@dataclass
class Request:
    """Arguments of `draw`, checked."""

    text: Text  # R rows: B captions and, where guidance needs them, their B unconditional (or negative) twins behind
    prefix: Tensor  # (B,p,C) float32: the first latents, p may be 0; kept where `known`
    known: Tensor  # (B,p) bool
    num_latents: int  # n, p <= n <= K: the line ends there
    scales: list[float]  # K guidance scales, by position
    interval: tuple[float, float]  # times at which guidance acts
    temperature: float
    twins_alike: bool = True  # all twins are one row repeated, which is then computed once
    steps: int | None = None
    solver: Solver | None = None
    generator: torch.Generator | None = None

    @property
    def captions(self) -> int:
        """B."""
        return len(self.prefix)
