"""Exact log-density of a latent through the probability-flow ODE of a flow head.

Along dx/dt = v(x, t) a density changes by d log p / dt = -div v (Chen et al. 2018, "Neural ODEs", theorem 1), so from
the data (t = 0) to the noise (t = 1)

    log p(x_0) = log N(x_1; 0, I) + integral_0^1 div v(x_t, t) dt.

A latent has a dozen or so channels: the divergence is the exact trace, C forward-mode products that share one pass of
the network, and no random estimate. The only error is the solver's; `flow_log_prob` walks the classical Runge-Kutta
method, whose error falls 16-fold when `steps` doubles, so that the difference to half the steps bounds it.

Letters: M rows, C latent channels.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from stage2_prior.heads import FlowHead


def velocity_and_divergence(
    head: FlowHead, condition: Tensor, time: Tensor, x: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """v (M,C) and div v (M,) of the head's field at x (M,C) and t."""

    def field(x: Tensor) -> Tensor:
        return head.velocity(x, time, condition, t)

    def directional(direction: Tensor) -> tuple[Tensor, Tensor]:
        v, change = torch.func.jvp(field, (x,), (direction.expand_as(x),))[:2]
        return v, change

    channels = x.shape[-1]
    basis = torch.eye(channels, device=x.device, dtype=x.dtype)
    v, columns = torch.func.vmap(directional, out_dims=(None, 0))(basis)  # type: ignore[arg-type]  # (M,C), (C,M,C)
    return v, columns.diagonal(dim1=0, dim2=2).sum(-1)  # (M,)


@torch.no_grad()
def flow_log_prob(head: FlowHead, cond: Tensor, x: Tensor, steps: int = 32) -> Tensor:
    """cond (M,D), x (M,C) float32 -> (M,) nats: log density of x under the head, by `steps` Runge-Kutta steps.

    Raises ValueError for steps below 1.
    """
    if steps < 1:
        raise ValueError(f"got steps={steps}, wanted at least 1 Runge-Kutta step.")
    condition = head.net.condition(cond)
    h = 1 / steps
    times = [i * h / 2 for i in range(2 * steps + 1)]  # RK4 asks at the ends and the middle of each step
    table = head.net.time(torch.tensor(times, device=x.device))

    def slope(x: Tensor, half_steps: int) -> tuple[Tensor, Tensor]:
        return velocity_and_divergence(head, condition, table[half_steps], x, times[half_steps])

    log_det = x.new_zeros(len(x))
    for i in range(0, 2 * steps, 2):
        v1, d1 = slope(x, i)
        v2, d2 = slope(x + h / 2 * v1, i + 1)
        v3, d3 = slope(x + h / 2 * v2, i + 1)
        v4, d4 = slope(x + h * v3, i + 2)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        log_det = log_det + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    normal = -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)
    return normal + log_det


class Density(Protocol):
    """What classification by likelihood asks of a prior."""

    def log_prob(self, z: Tensor, captions: list[str], steps: int = 32) -> Tensor: ...


def caption_log_prob(prior: Density, z: Tensor, captions: list[str], steps: int = 16) -> Tensor:
    """log p(z | caption) of every line under every caption: z (B,K,C), N captions -> (B,N) nats.

    Its argmax over N names classifies by likelihood; the differences over positions say which latents decide.
    """
    return torch.stack([prior.log_prob(z, [caption] * len(z), steps).sum(1) for caption in captions], dim=1)
