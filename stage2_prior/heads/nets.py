"""The small networks inside a head: noisy latent, time and condition in, one latent-sized answer out.

All are residual MLPs whose normalised input is scaled, shifted and gated (adaLN, Peebles & Xie 2023; as a per-token
head: Li et al. 2024, "MAR"). They differ in what a call of the solver must recompute:

* `AdaLNNet` modulates with a matrix of silu(time + condition). All of it is new in every call, and it is more than half
  of the head's arithmetic.
* `HoistedNet` keeps the two apart. What depends on t is a function of one number: one table row per point of the
  solver's grid, the same for all rows, latents and pictures. What depends on the condition is projected once per
  latent. A call of the solver is left with two small matrices per block, about a third of the arithmetic.
* `AddedConditionNet` adds the condition once, to the embedded latent. Scale, shift and gate are time's alone: in
  sampling they are the gain and bias of a plain LayerNorm, and the condition costs one small matrix per latent.

Three verbs, so that a caller can do each as seldom as possible: `time(t)`, `condition(c)`, `forward(x, time,
condition)`. Leading dimensions broadcast: (S draws, M rows) in training, (M rows) against one time in sampling.

Gates and the output matrix start at zero: at step 0 the answer is 0, the best constant guess of a velocity.

Letters: M rows, C latent channels, D condition width, w network width, T times.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed, linear
from stage1_tokenizer.spec import Spec

TIME_FEATURES = 64


def time_features(t: Tensor, features: int = TIME_FEATURES, highest: float = 256.0) -> Tensor:
    """t (...) in [0, 1] -> (..., features): cosines and sines at `features`/2 rates from 1 to `highest` rad."""
    rates = torch.exp(torch.linspace(0, math.log(highest), features // 2, device=t.device))
    angles = t.unsqueeze(-1).float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Branch(nn.Module):
    """The two matrices of one residual block, w -> w -> w with SiLU between."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = linear(width, width), linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Modulation(NamedTuple):
    """Per block (scale, shift, gate), and the last layer's (scale, shift), each broadcastable to (..., w)."""

    blocks: list[tuple[Tensor, Tensor, Tensor]]
    last: tuple[Tensor, Tensor]


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalised x (..., w), scaled and shifted; one kernel where scale and shift (w,) are the same for all rows."""
    if scale.ndim == shift.ndim == 1:
        return F.layer_norm(x, scale.shape, scale, shift)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)


class HeadNet(Spec, nn.Module):
    """What all networks share: input and output matrices and the modulated residual blocks.

    Args:
        latent_dim, cond_dim, width, depth: C, D, w and the number of blocks.
    """

    retired: ClassVar[dict[str, Any]] = {"answers": 1}

    def __init__(self, latent_dim: int, cond_dim: int, width: int, depth: int):
        super().__init__()
        self.latent_dim, self.cond_dim, self.width, self.depth = latent_dim, cond_dim, width, depth
        self.embed = decayed(nn.Linear(latent_dim, width))
        self.blocks = nn.ModuleList(Branch(width) for _ in range(depth))
        self.out = decayed(nn.Linear(width, latent_dim))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def run(self, x: Tensor, modulation: Modulation) -> Tensor:
        for block, (scale, shift, gate) in zip(self.blocks, modulation.blocks, strict=True):
            x = torch.addcmul(x, gate, block(modulated(x, scale, shift)))  # (...,w)
        return self.out(modulated(x, *modulation.last))  # (...,C)

    def time(self, t: Tensor) -> Tensor:
        """All that depends on t alone: t (...) -> (..., features of this network)."""
        raise NotImplementedError

    def condition(self, c: Tensor) -> Tensor:
        """All that depends on the condition alone: c (..., D) -> (..., features of this network)."""
        raise NotImplementedError


class AdaLNNet(HeadNet):
    """Full adaLN of time and condition together."""

    def __init__(self, latent_dim: int, cond_dim: int, width: int = 160, depth: int = 3):
        super().__init__(latent_dim, cond_dim, width, depth)
        self.time_in, self.time_out = decayed(nn.Linear(TIME_FEATURES, width)), decayed(nn.Linear(width, width))
        self.cond_in = decayed(nn.Linear(cond_dim, width))
        self.modulate = nn.Linear(width, (3 * depth + 2) * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def time(self, t: Tensor) -> Tensor:
        return self.time_out(F.silu(self.time_in(time_features(t))))  # (...,w)

    def condition(self, c: Tensor) -> Tensor:
        return self.cond_in(c)  # (...,w)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulate(F.silu(time + condition)).chunk(3 * self.depth + 2, dim=-1)  # each (...,w)
        blocks = [(1 + parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]) for i in range(self.depth)]
        return self.run(self.embed(x), Modulation(blocks, (1 + parts[-2], parts[-1])))


class TabulatedNet(HeadNet):
    """Time as a table of every block's scale, shift and gate; the condition as `cond_parts` vectors of w, once.

    The base of the two networks below, which differ in where the condition goes.
    """

    def __init__(self, latent_dim: int, cond_dim: int, width: int, depth: int, cond_parts: int):
        super().__init__(latent_dim, cond_dim, width, depth)
        self.time_in = decayed(nn.Linear(TIME_FEATURES, width))
        self.time_out = nn.Linear(width, (3 * depth + 2) * width)
        self.cond_in = decayed(nn.Linear(cond_dim, cond_parts * width))
        for layer in (self.time_out, self.cond_in):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.time_out.weight)

    def time(self, t: Tensor) -> Tensor:
        return self.time_out(F.silu(self.time_in(time_features(t))))  # (...,(3 depth + 2) w)

    def condition(self, c: Tensor) -> Tensor:
        return self.cond_in(c)  # (...,cond_parts w)


class HoistedNet(TabulatedNet):
    """Condition in every block: scale and shift are sums of time's and its own, the gate is time's."""

    def __init__(self, latent_dim: int, cond_dim: int, width: int = 160, depth: int = 3):
        super().__init__(latent_dim, cond_dim, width, depth, cond_parts=2 * depth + 3)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        n = self.depth
        times = time.chunk(3 * n + 2, dim=-1)  # each (...,w)
        conds = condition.chunk(2 * n + 3, dim=-1)  # each (...,w)
        blocks = [
            (1 + times[3 * i] + conds[2 * i], times[3 * i + 1] + conds[2 * i + 1], times[3 * i + 2]) for i in range(n)
        ]
        last = (1 + times[-2] + conds[-3], times[-1] + conds[-2])
        return self.run(self.embed(x) + conds[-1], Modulation(blocks, last))


class AddedConditionNet(TabulatedNet):
    """Condition added to the embedded latent and nowhere else; scale, shift and gate are time's."""

    def __init__(self, latent_dim: int, cond_dim: int, width: int = 160, depth: int = 3):
        super().__init__(latent_dim, cond_dim, width, depth, cond_parts=1)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        parts = time.chunk(3 * self.depth + 2, dim=-1)  # each (...,w)
        blocks = [(1 + parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]) for i in range(self.depth)]
        return self.run(self.embed(x) + condition, Modulation(blocks, (1 + parts[-2], parts[-1])))
