"""From noise to data along a field: one pure function per method, and a small module per method that holds its grid.

Each is an argument of `Prior.sample` (`solver=AdamsBashforth(steps=4)`), of `predict` and of the sweep; a config may
also give a head another default. E is evaluations of the field per latent, as the class comes:

    class            order  E    when
    Midpoint           2     8   the default: few evaluations and no shrinkage
    AdamsBashforth     2    12   half of midpoint's cost a step: the best at 4 evaluations (README)
    Heun               2    12   where fields of EDM's kind are compared
    DPMSolver2M        2    12   linear in x between calls; for narrow targets
    AMED             learned 4   distilled on one head (`heads.amed`)
    MidTimeEuler       1    10   Euler without its shrinkage
    Euler              1    50   the plain reference; shrinks samples when steps are few
    EulerMaruyama      1    20   stochastic: temperature acts along the way
    DDIM, DDPM         1  50, 100  of a DiffusionHead, and only of one: they need predicted data (`heads.ddpm`)

A field is `v = field(x, t)`: x (M, C), t a plain float that all rows share, v the velocity of stage1_tokenizer.flow
(t = 0 data, t = 1 noise, so every method walks *down* a grid 1 = t_0 > t_1 > ... > t_n = 0). Since t is a float known
beforehand, a network can tabulate all that depends on t alone: `Solver.times` lists the queries in order.

Choices, with reasons:
* The default is midpoint x 4, eight evaluations, on t = 1 - (1-u)^1.5: near the data, where narrow dimensions are
  decided, steps are small, and the last interval ends on an evaluation at its middle instead of a jump to a mean.
  Few Euler steps shrink a sample; midpoint does not.
* `steps` counts intervals, `num_evaluations` counts calls of the field, which is what a sample costs.
* Temperature multiplies *every* normal draw, the first one included. On a Gaussian target each method here is linear
  in its draws, so the sample's spread is temperature times the target's, and its mean is untouched.

Letters: M rows, C channels, h = t_i - t_{i+1} > 0, v_i = field(x_i, t_i).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.flow import Field, Grid, midpoint, noise_from_v, power_grid, x_from_v
from stage1_tokenizer.spec import Spec


class SamplerError(ValueError):
    """A number of steps or a temperature that a sampler cannot use."""


def logit_grid(steps: int, spread: float = 4.0) -> list[float]:
    """steps + 1 times from 1 to 0, uniform in log((1-t)/t) between -spread and spread, the two ends put to 1 and 0."""
    inner = [1 / (1 + math.exp(spread * (2 * i / steps - 1))) for i in range(1, steps)]
    return [1.0, *inner, 0.0]


def euler(field: Field, x: Tensor, grid: Grid) -> Tensor:
    """x_{i+1} = x_i - h v_i: first order, one evaluation a step."""
    for t, s in pairwise(grid):
        x = x - (t - s) * field(x, t)
    return x


def mid_time_euler(field: Field, x: Tensor, grid: Grid) -> Tensor:
    """Euler with the field at the middle *time* of the interval: x_{i+1} = x_i - h field(x_i, (t_i + t_{i+1})/2).

    First order, but without Euler's shrinkage: the field is evaluated at less noise than x_i has, which overshoots by
    about what Euler falls short.
    """
    for t, s in pairwise(grid):
        x = x - (t - s) * field(x, (t + s) / 2)
    return x


def heun(field: Field, x: Tensor, grid: Grid) -> Tensor:
    """A step with the mean of the velocities at both ends: second order, two calls (Karras et al. 2022, alg. 1)."""
    for t, s in pairwise(grid):
        v = field(x, t)
        ahead = x - (t - s) * v
        x = x - (t - s) / 2 * (v + field(ahead, s))
    return x


def adams_bashforth(field: Field, x: Tensor, grid: Grid) -> Tensor:
    """AB2 with unequal steps: the velocity extrapolated from this call and the last one; second order, one call.

    The first step has no past: it asks at mid time instead of at the start.
    """
    past: Tensor | None = None
    h_past = 0.0
    for t, s in pairwise(grid):
        h = t - s
        if past is None:
            past, h_past = field(x, (t + s) / 2), h / 2  # a velocity that belongs to the middle of the first step
            x = x - h * past
            continue
        v = field(x, t)
        x = x - h * (v + h / (2 * h_past) * (v - past))
        past, h_past = v, h
    return x


def dpm_solver_2m(field: Field, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with alpha = 1-t, sigma = t, lambda = log(alpha/sigma).

    Linear in x between calls and second order in the predicted data; one call a step. The first and the last step,
    where lambda is infinite, are of first order.
    """
    past: Tensor | None = None
    h_past = math.inf
    for t, s in pairwise(grid):
        data = x_from_v(x, field(x, t), t)
        ratio = s / t  # sigma_s / sigma_t
        decay = ratio * (1 - t) / (1 - s)  # e^{-h} in lambda, 0 from pure noise and towards clean data
        h = math.inf if decay == 0 else -math.log(decay)
        estimate = data
        if past is not None and math.isfinite(h) and math.isfinite(h_past):
            r = h_past / h
            estimate = data + (data - past) / (2 * r)
        x = ratio * x + (1 - s) * (1 - decay) * estimate
        past, h_past = data, h
    return x


def euler_maruyama(
    field: Field,
    x: Tensor,
    grid: Grid,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The reverse SDE with diffusion w(t) = t (Ma et al. 2024, SiT, eq. 6): dx = v dt - w score / 2 dt + sqrt(w) dW.

    Drift and score come from one call: score = -noise / t, so w score = -noise and there is no pole at t = 0. The last
    interval injects nothing.
    """
    for t, s in pairwise(grid):
        h = t - s
        v = field(x, t)
        x = x - h * v - h / 2 * noise_from_v(x, v, t)
        if s > 0:
            draw = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + math.sqrt(t * h) * temperature * draw
    return x


class Solver(Spec, nn.Module):
    """A method with its grid. `solver(field, x, generator, temperature)` takes noise (M,C) to a sample (M,C).

    `steps` intervals on the grid t = (1-u)^`power`; `per_step` calls of the field in each.
    """

    method: Callable[[Field, Tensor, Grid], Tensor]
    per_step = 1
    asks = "velocity"  # what its field must answer with; "data" of the samplers of a diffusion

    def __init__(self, steps: int, power: float):
        super().__init__()
        if steps < 1:
            raise SamplerError(f"got steps={steps}, wanted at least 1; give a positive number of intervals.")
        if power <= 0:
            raise SamplerError(f"got power={power}, wanted a positive exponent; 1 is a uniform grid.")
        self.steps, self.power = steps, power

    def grid(self) -> list[float]:
        """The times 1 = t_0 > ... > t_steps = 0."""
        return power_grid(self.steps, self.power)

    @property
    def num_evaluations(self) -> int:
        """Calls of the field for one sample."""
        return self.steps * self.per_step

    def times(self) -> list[float]:
        """The times at which the field is evaluated, in order; recorded from the method itself."""
        times: list[float] = []

        def probe(x: Tensor, t: float) -> Tensor:
            times.append(t)
            return torch.zeros_like(x)

        self(probe, torch.zeros(1, 1), torch.Generator())
        return times

    def with_evaluations(self, evaluations: int) -> "Solver":
        """The same method with another cost. Raises SamplerError if it cannot have exactly that many calls."""
        if not isinstance(evaluations, int) or evaluations < self.per_step or evaluations % self.per_step:
            raise SamplerError(
                f"got steps={evaluations}, wanted a positive whole multiple of {self.per_step}:"
                f" {type(self).__name__} asks its network {self.per_step} times per interval."
            )
        return type(self)(**self.options() | {"steps": evaluations // self.per_step})

    def options(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"steps": self.steps, "power": self.power}

    def forward(
        self, field: Field, x: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        return type(self).method(field, x, self.grid())


def check_solver(solver: Solver, asks: str, whose: str) -> None:
    """Raises SamplerError unless `solver` asks its field for what the network of `whose` answers with."""
    if solver.asks != asks:
        raise SamplerError(
            f"got the solver {type(solver).__name__}, which asks for {solver.asks}, with a {whose}, which answers with"
            f" {asks}; choose a solver for {asks}: see the table in stage2_prior/heads/solvers.py."
        )


class Euler(Solver):
    """`euler`: one evaluation a step; shrinks samples when steps are few."""

    method = staticmethod(euler)

    def __init__(self, steps: int = 50, power: float = 1.0):
        super().__init__(steps, power)


class MidTimeEuler(Solver):
    """`mid_time_euler`: one evaluation a step."""

    method = staticmethod(mid_time_euler)

    def __init__(self, steps: int = 10, power: float = 1.0):
        super().__init__(steps, power)


class Midpoint(Solver):
    """`midpoint`, the default: four steps, eight evaluations, data end refined."""

    per_step = 2
    method = staticmethod(midpoint)

    def __init__(self, steps: int = 4, power: float = 1.5):
        super().__init__(steps, power)


class Heun(Solver):
    """`heun`: two evaluations a step, the last one at t = 0."""

    per_step = 2
    method = staticmethod(heun)

    def __init__(self, steps: int = 6, power: float = 2.0):
        super().__init__(steps, power)


class AdamsBashforth(Solver):
    """`adams_bashforth`: one evaluation a step."""

    method = staticmethod(adams_bashforth)

    def __init__(self, steps: int = 12, power: float = 1.5):
        super().__init__(steps, power)


class DPMSolver2M(Solver):
    """`dpm_solver_2m` on a grid uniform in log(alpha/sigma); `power` is half the width of that grid, in nats."""

    method = staticmethod(dpm_solver_2m)

    def __init__(self, steps: int = 12, power: float = 4.0):
        super().__init__(steps, power)

    def grid(self) -> list[float]:
        return logit_grid(self.steps, self.power)


class EulerMaruyama(Solver):
    """`euler_maruyama`: a stochastic sampler, so that temperature acts along the way and not only at the start."""

    def __init__(self, steps: int = 20, power: float = 1.5):
        super().__init__(steps, power)

    def forward(
        self, field: Field, x: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        return euler_maruyama(field, x, self.grid(), generator, temperature)
