"""Diffusion on the cosine schedule (Nichol & Dhariwal 2021, eq. 17), as pure functions, and its two samplers.

x_t = alpha_t x + sigma_t noise, alpha_t^2 = cos^2((t + s)/(1 + s) pi/2) / cos^2(s/(1 + s) pi/2), s = 0.008, and
sigma_t^2 = 1 - alpha_t^2; t = 0 data, t = 1 noise, continuous, and t here is 0.9936 times theirs: alpha ends at 0.01.
In their 1,000 steps it ends at 5e-5. A noise answer is then divided by 5e-5 in a sampler's first step, where a
network's error of 0.05, or the rounding of bfloat16, throws a sample out to 15 standard deviations, from which it never
returns (measured: samples of 250 to 450 standard deviations on the demo's latents). Starting from pure noise where x_t
still holds a hundredth of the data costs 1e-4 of the variance.

A *denoiser* is `x = denoise(x_t, t)`, the expected data; the samplers walk a grid of times down from 1 to 0 with it.
Targets describe one network answer: noise, data, v = alpha noise - sigma x (Salimans & Ho 2022), the next noise level.
The first divides by alpha: at t near 1 it blows an error up a hundredfold; ODE steps on a noise target are many.

Letters: M rows, C channels.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec
from stage2_prior.heads.chain import Step, level_below, step
from stage2_prior.heads.solvers import Field, Grid, SamplerError, Solver

OFFSET = 0.008
LAST = 0.99358  # of the time at which alpha vanishes: alpha = 0.01 there


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t) of the cosine schedule for times t in [0, 1], same shape."""
    angle = (LAST * t + OFFSET) / (1 + OFFSET) * (math.pi / 2)
    alpha = (angle.cos() / math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)).clamp(max=1.0)
    return alpha, (1 - alpha.square()).sqrt()


def alpha_sigma_at(t: float) -> tuple[float, float]:
    """`alpha_sigma` of one time, as floats."""
    alpha, sigma = alpha_sigma(torch.tensor(t, dtype=torch.float64))
    return float(alpha), float(sigma)


class NoiseTarget(Spec, nn.Module):
    """The network answers with the noise (MAR)."""

    def target(self, x: Tensor, noise: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the network predicts at x_t = alpha x + sigma noise; x, noise (...,C), t (...,1)."""
        return noise

    def data(self, x_t: Tensor, answer: Tensor, t: float) -> Tensor:
        """The data that the answer implies."""
        alpha, sigma = alpha_sigma_at(t)
        return (x_t - sigma * answer) / alpha


class DataTarget(Spec, nn.Module):
    """The network answers with the data."""

    def target(self, x: Tensor, noise: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x

    def data(self, x_t: Tensor, answer: Tensor, t: float) -> Tensor:
        return answer


class VelocityTarget(Spec, nn.Module):
    """The network answers with v = alpha noise - sigma x."""

    def target(self, x: Tensor, noise: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        return alpha * noise - sigma * x

    def data(self, x_t: Tensor, answer: Tensor, t: float) -> Tensor:
        alpha, sigma = alpha_sigma_at(t)
        return alpha * x_t - sigma * answer


class NextLevelTarget(Spec, nn.Module):
    """The network answers with the next cleaner of `levels` noise levels, as it was drawn: see `heads.chain`.

    Sample with `DDPM(levels)`, whose steps undo what the answer's way to the data blows up.
    """

    def __init__(self, levels: int = 100):
        super().__init__()
        if levels < 1:
            raise SamplerError(f"got levels={levels}, wanted at least 1 noise level.")
        self.levels = levels

    def step(self, t: Tensor) -> Step:
        return step(*alpha_sigma(t), *alpha_sigma(level_below(t, self.levels)))

    def target(self, x: Tensor, noise: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        return self.step(t).sample(x, alpha * x + sigma * noise, generator)

    def data(self, x_t: Tensor, answer: Tensor, t: float) -> Tensor:
        return self.step(torch.tensor(t, dtype=torch.float64, device=x_t.device)).data_from_mean(x_t, answer)


Target = NoiseTarget | DataTarget | VelocityTarget | NextLevelTarget


def ddim(denoise: Field, x: Tensor, grid: Grid) -> Tensor:
    """Deterministic steps: x_s = alpha_s x + sigma_s noise with both as estimated at t (Song et al. 2021, eq. 12)."""
    for t, s in pairwise(grid):
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma_at(t), alpha_sigma_at(s)
        data = denoise(x, t)
        x = alpha_s * data + sigma_s / sigma * (x - alpha * data) if s > 0 else data
    return x


def step_variances(t: float, s: float) -> tuple[float, float]:
    """Between times t > s > 0: beta, the variance of the forward step, and the smaller one of q(x_s | x_t, x)."""
    (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma_at(t), alpha_sigma_at(s)
    beta = 1 - (alpha / alpha_s) ** 2
    return beta, beta * sigma_s**2 / sigma**2


def ddpm(
    denoise: Field,
    x: Tensor,
    grid: Grid,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    variance: float = 0.0,
) -> Tensor:
    """Ancestral steps (Ho et al. 2020, algorithm 2) between any two times of the grid.

    The injected variance lies between the posterior's (`variance` 0, too small for a wide target) and the forward
    step's (1, too large for a narrow one), interpolated in its logarithm. The last step injects nothing.
    """
    for t, s in pairwise(grid):
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma_at(t), alpha_sigma_at(s)
        data = denoise(x, t)
        if s <= 0:
            return data
        beta, posterior = step_variances(t, s)
        x = alpha_s * beta / sigma**2 * data + alpha / alpha_s * sigma_s**2 / sigma**2 * x
        std = posterior**0.5 * (beta / posterior) ** (variance / 2)
        x = x + std * temperature * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x


class DDIM(Solver):
    """`ddim`: one evaluation a step."""

    asks = "data"
    method = staticmethod(ddim)

    def __init__(self, steps: int = 50, power: float = 1.0):
        super().__init__(steps, power)


class DDPM(Solver):
    """`ddpm`: one evaluation a step; `variance` from 0 (posterior) to 1 (forward step)."""

    asks = "data"

    def __init__(self, steps: int = 100, power: float = 1.0, variance: float = 0.0):
        super().__init__(steps, power)
        if not 0 <= variance <= 1:
            raise SamplerError(f"got variance={variance}, wanted 0 (the posterior's) to 1 (the forward step's).")
        self.variance = variance

    def options(self) -> dict[str, Any]:
        return {**super().options(), "variance": self.variance}

    def forward(
        self, field: Field, x: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        return ddpm(field, x, self.grid(), generator, temperature, self.variance)
