"""AMED: a few-step solver with a learned mean direction, distilled on a trained head (Zhou et al. 2024).

By the mean value theorem some mean of the velocities between two times of a grid points along the chord of the true
trajectory; the theorem does not give it, so it is learned. A step evaluates the velocity v, walks with it to `where` of
the interval, asks again, v', and takes the whole interval with a v + b v', where a tiny network (`MeanDirection`) gives
a and b of every sample and channel. As constructed a = 0, b = 1 and where = 1/2, which is midpoint. The teacher is the
same head with many steps on the same noise, with and without guidance.

The paper's predictor chooses the place for every sample and scales one velocity. Here the place is learned once per
interval, so that the solver's times stay known beforehand and a head can tabulate them, and what differs by sample is
how the two velocities at hand are weighed; the predictor reads those instead of a network's bottleneck, so that it
fits any head, any latent width, and the guided field as well.

`python -m stage2_prior.training.distil` does it for the prior of a run.

Letters: M rows, C latent channels.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.heads.base import HeadError
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.solvers import Field, Midpoint, Solver


class MeanDirection(nn.Module):
    """Weights of the two velocities of an interval, from x, v and v' themselves; the same network for all channels.

    Reads of every channel its own three values and, pooled over channels, their six mean products (how long the three
    are and how far the velocity has turned), so that it treats all channels alike and works for any C. Its matrices are
    bare parameters, which `Prior.hold` leaves in float32 as the path is.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        self.own = nn.Parameter(torch.randn(width, 3) / 3**0.5)
        self.pooled = nn.Parameter(torch.randn(width, 6) / 6**0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Parameter(torch.zeros(2, width))
        self.weights = nn.Parameter(torch.tensor([0.0, 1.0]))  # midpoint: all of the way with the second velocity

    def forward(self, x: Tensor, v: Tensor, ahead: Tensor) -> Tensor:
        """x, v and v' (M,C) -> the mean direction (M,C)."""
        products = torch.stack([x * x, v * v, ahead * ahead, x * v, x * ahead, v * ahead], dim=-1)  # (M,C,6)
        pooled = F.linear(products.mean(1, keepdim=True), self.pooled, self.bias)  # (M,1,width)
        hidden = F.linear(torch.stack([x, v, ahead], dim=-1), self.own) + pooled  # (M,C,width)
        a, b = F.linear(F.silu(hidden), self.out, self.weights).unbind(-1)
        return a * v + b * ahead


class AMED(Solver):
    """Two evaluations a step, weighed by what was learned; as constructed it is midpoint. `fit_amed` teaches it."""

    per_step = 2

    def __init__(self, steps: int = 2, power: float = 1.5):
        super().__init__(steps, power)
        self.where = nn.Parameter(torch.full((steps,), 0.5))
        self.directions = nn.ModuleList(MeanDirection() for _ in range(steps))
        self.known: tuple[tuple[int, int], list[float]] = ((0, 0), [])

    def places(self) -> list[float]:
        """`where` of every interval as a number, read from the device again only after it changed."""
        version = (self.where.data_ptr(), self.where._version)
        if self.known[0] != version:
            self.known = (version, self.where.tolist())
        return self.known[1]

    def forward(
        self, field: Field, x: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        return self.walk(field, x, self.places())

    def walk(self, field: Callable[[Tensor, Any], Tensor], x: Tensor, places: Iterable[Any]) -> Tensor:
        """`forward` with given places; those may be `where` itself, if the field takes tensors of time."""
        for (t, s), where, direction in zip(pairwise(self.grid()), places, self.directions, strict=True):
            v = field(x, t)
            ahead = field(x - where * (t - s) * v, t - where * (t - s))
            with torch.autocast(x.device.type, enabled=False):  # the path is float32
                mean = direction(x.float(), v.float(), ahead.float())
            x = x - (t - s) * mean.to(x.dtype)
        return x

    def with_evaluations(self, evaluations: int) -> Solver:
        """This solver if it costs that much; what was learned for one grid is worth nothing on another."""
        if evaluations != self.num_evaluations:
            raise HeadError(f"got steps={evaluations}, wanted {self.num_evaluations}, which AMED was distilled for.")
        return self


class Pool(NamedTuple):
    """What a solver learns one guidance scale from; R rows."""

    guidance: float
    cond: Tensor  # (R,D)
    uncond: Tensor | None  # (R,D)
    noise: Tensor  # (R,C)
    ends: Tensor  # (R,C), where the teacher arrives
    error: Tensor  # (), mean squared distance between the teacher's end points and midpoint's at the solver's cost


def fit_amed(
    head: FlowHead,
    cond: Tensor,
    uncond: Tensor | None = None,
    guidances: Sequence[float] = (1.0,),
    steps: int = 2,
    iterations: int = 800,
    rows: int = 4096,
    batch: int = 512,
    generator: torch.Generator | None = None,
) -> AMED:
    """Distil an AMED solver of `steps` intervals on condition rows (M,D) that the head will meet.

    Minimises the squared distance of its end points to those of midpoint x 32 from the same noise, at every one of
    `guidances` alike: relative to midpoint's own distance at the same cost. Scales other than 1 need `uncond` (M,D).
    The teacher runs `rows` times for each scale, and batches are drawn from that. Raises HeadError without `uncond`.
    """
    solver, teacher, device = AMED(steps).to(cond.device), head.plan(solver=Midpoint(steps=32)), cond.device
    trained = [p for p in head.parameters() if p.requires_grad]
    head.requires_grad_(False)

    def draw(guidance: float) -> Pool:
        which = torch.randint(len(cond), (rows,), generator=generator, device=device)
        noise = torch.randn(rows, head.latent_dim, generator=generator, device=device)
        of_rows = cond[which], None if uncond is None else uncond[which]
        field = head.field_of(*of_rows, guidance, time_of=teacher.table.__getitem__)
        assert teacher.solver is not None
        ends = teacher.solver(field, noise)
        first = Midpoint(steps)(head.field_of(*of_rows, guidance), noise)
        return Pool(guidance, *of_rows, noise, ends, (first - ends).square().mean())

    with torch.no_grad():
        pools = [draw(guidance) for guidance in guidances]
    optimizer = torch.optim.Adam(solver.parameters(), lr=0.01)
    for step in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / iterations)
        pool = pools[step % len(pools)]
        of = torch.randint(rows, (min(batch, rows),), generator=generator, device=device)
        of_rows = pool.cond[of], None if pool.uncond is None else pool.uncond[of]
        field = head.field_of(*of_rows, pool.guidance)
        loss = (solver.walk(field, pool.noise[of], solver.where) - pool.ends[of]).square().mean() / pool.error
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            solver.where.clamp_(0.05, 0.95)
    for parameter in trained:
        parameter.requires_grad_(True)
    return solver.requires_grad_(False)
