"""The linear path between data and noise: the algebra that flow heads and flow decoders share.

Time runs from t = 0 (data) to t = 1 (noise):  x_t = (1 - t) x + t noise,  v = dx_t/dt = noise - x
(Liu et al. 2022, "Flow straight and fast", eq. 1; Lipman et al. 2023, eq. 22, with time reversed).
Along that path x, noise and v say the same thing: any of them gives the other two from x_t and t, so a network may
emit whichever it finds easiest. Two of the conversions have a pole, v from x at t = 0 and v from noise at t = 1; there
the denominator is held at `floor`. A network that is trained through the same conversion learns what makes v right
beyond the floor, too; its error is then blown up 1 / floor times at most.

Everything here is a pure function in the dtype of its arguments; callers hold the path and the solver in float32,
because bfloat16 keeps only 3 digits of t. `t` broadcasts: pass (M, 1) against (M, C), (B, 1, 1, 1) against images.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Field = Callable[[Tensor, float], Tensor]  # (x (M,...), t shared by all rows) -> v, of x's shape
Grid = Sequence[float]  # times from 1 (noise) down to 0 (data)

T_FLOOR = 0.05  # smallest denominator of a conversion with a pole: an error is blown up 20 times at most


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point x_t = (1 - t) x + t noise; at t = 0 the data, at t = 1 the noise."""
    return (1 - t) * x + t * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """v = noise - x: the direction in which x_t moves as t grows, constant along the path."""
    return noise - x


def x_from_v(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The data end of the path through x_t with velocity v: x = x_t - t v."""
    return x_t - t * v


def noise_from_v(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The noise end of the path through x_t with velocity v: noise = x_t + (1 - t) v."""
    return x_t + (1 - t) * v


def v_from_x(x_t: Tensor, x: Tensor, t: Tensor | float, floor: float = T_FLOOR) -> Tensor:
    """v = (x_t - x) / t, with the denominator held at `floor` or above."""
    return (x_t - x) / _at_least(t, floor)


def v_from_noise(x_t: Tensor, noise: Tensor, t: Tensor | float, floor: float = T_FLOOR) -> Tensor:
    """v = (noise - x_t) / (1 - t), with the denominator held at `floor` or above."""
    return (noise - x_t) / _at_least(1 - t, floor)


def _at_least(value: Tensor | float, floor: float) -> Tensor | float:
    return value.clamp(min=floor) if isinstance(value, Tensor) else max(value, floor)


def stratified_uniform(rows: int, draws: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(draws, rows) numbers in (0, 1): each row's draws fall one into each of `draws` equal strata.

    Every single draw is uniform once the strata are shuffled away by the average, and the average over a row's draws
    has less variance than independent ones (k-diffusion's stratified sampling, here within one latent).
    """
    u = torch.rand(draws, rows, generator=generator, device=device)
    stratum = torch.arange(draws, device=device, dtype=u.dtype).unsqueeze(1)
    return ((stratum + u) / draws).clamp(1e-6, 1 - 1e-6)


def logit_normal_times(
    rows: int,
    draws: int,
    *,
    device: torch.device,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(draws, rows) times in (0, 1) with logit(t) ~ N(mean, std^2), stratified over the draws of one row.

    A larger `mean` moves training towards noise (Esser et al. 2024, section 3.1; there called rf/lognorm).
    """
    u = stratified_uniform(rows, draws, generator, device)
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def power_grid(steps: int, power: float = 1.5) -> list[float]:
    """steps + 1 times from 1 to 0, t = (1-u)^power for u = 0, 1/steps, ..., 1.

    In the notation of most papers (which integrate u upwards) this is t = 1 - (1-u)^p with data at t = 1; power 1 is
    uniform, larger powers refine the data end.
    """
    return [(1 - i / steps) ** power for i in range(steps + 1)]


def midpoint(field: Field, x: Tensor, grid: Grid) -> Tensor:
    """Half an Euler step to the middle, then a whole step with the velocity found there: second order, two calls."""
    for t, s in pairwise(grid):
        middle = x - (t - s) / 2 * field(x, t)
        x = x - (t - s) * field(middle, (t + s) / 2)
    return x
