"""From one noise level to the next: the chain x_1 -> ... -> x_s -> x_t of noisier copies, as pure functions.

A diffusion is an autoregression over noise levels, and the plain way to learn one is to predict the next level from
this one. That level has noise of its own, which nothing can predict: the loss keeps a floor and its gradient has more
noise than that of the data, whose expectation says the same. `NextLevelTarget` and `NextLevelOutput` are the plain way.

x_t = alpha_t x + sigma_t noise at every level, of any schedule: the linear path (1 - t, t) or the cosine. A level s < t
leads to t by x_t = ratio x_s + sqrt(beta) fresh noise, ratio = alpha_t / alpha_s, beta = sigma_t^2 - ratio^2 sigma_s^2.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """q(x_s | x_t, x) = N(`data` x + `noisy` x_t, `variance`); tensors or floats of times."""

    data: Tensor
    noisy: Tensor
    variance: Tensor

    def sample(self, x: Tensor, x_t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        draw = torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
        return self.data * x + self.noisy * x_t + self.variance.sqrt() * draw

    def data_from_mean(self, x_t: Tensor, mean: Tensor) -> Tensor:
        """E[x | x_t] from E[x_s | x_t]; an error is blown up 1 / `data` times, the more the finer the levels are."""
        return (mean - self.noisy * x_t) / self.data


def step(alpha: Tensor, sigma: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Step:
    """The step from level t, (alpha, sigma) with sigma above 0, down to s, (alpha_s, sigma_s) with alpha_s above 0."""
    ratio = alpha / alpha_s
    beta = sigma.square() - (ratio * sigma_s).square()
    return Step(
        alpha_s * beta / sigma.square(),
        ratio * sigma_s.square() / sigma.square(),
        beta * sigma_s.square() / sigma.square(),
    )


def level_below(t: Tensor, levels: int) -> Tensor:
    """The time one of `levels` equal levels below t, at least 0."""
    return (t - 1 / levels).clamp(min=0.0)
