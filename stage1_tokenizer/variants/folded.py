"""Two learned values in one float: what a line of continuous latents can hold where its noise is small.

A float that is read without noise has no capacity that ends, so "equal floats" is no equal rate: one value a channel
uses a few of its bits. Here the encoder makes 2C values of a latent, and a strong one a and a weak one b share a
channel. a is rounded to steps, and b, mapped into (0, 1), says where inside the step z lies; every other step runs
backwards, so that z -> (a, b) has no jump in b (a hybrid scalar quantizer and linear coder: Kleiner & Rimoldi 2009,
"Asymptotically optimal joint source-channel with minimal delay", GLOBECOM; the snake is Shannon's of 1949):

    n = round(a / s),   v = F(b) for even n, 1 - F(b) for odd n,   z = s (n + v - 1/2),   F(b) = Phi(b / sqrt(3))

For a and b of unit variance F is the compander with the least mean squared error (its density goes with the cube root
of b's: Panter & Dite 1951), and z is a at the precision of a step, so that a reader who sees no finer than that still
reads a. Rounding errs by s^2 / 12 in a; noise of standard deviation nu on z errs by about 32.6 nu^2 / s^2 in b (the
mean of F's inverse squared slope). Where an error of b costs r^2 times one of a, the least sum is at
s = 391^(1/4) sqrt(nu r).

Training folds, adds the noise and unfolds, and the encoder learns what each of the two shall say: gradients pass both
errors straight through to a and b (van den Oord et al. 2017). Those that would drive b out of the range that can be
read stop there, else they do so for good; its true gradient, through F and back, has tails too heavy to learn from. The
step is learned with them: both errors are written as what they are of it, s times a rounding and 1 / s times a noise,
so that its gradient weighs one against the other.

What it costs: the code wants its precision. Noise far above nu makes it worse than one value a channel, and whoever
models the latents has to place them within a fraction of a step to say anything about b.

Letters: B batch, K latents, k <= K, D width, C latent channels, nu `noise`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.contract import Bottleneck
from stage1_tokenizer.layers import Linears

SPREAD = math.sqrt(3)  # of the compander, in standard deviations of b
STEP = (12 * 32.6) ** 0.25
LIMIT = 4.0  # of b, in the same: no gradient drives it further
EDGE = 1e-3  # v stays so far from 0 and 1: b within 5.3 standard deviations


class FoldedBottleneck(Bottleneck):
    """h -> z (B,k,C), of which decoders and text readers see the 2C values that are folded into it (`read`).

    Give them, and a linear path, `latent_dim` 2C. The strongest value of a latent, its first, shares a channel with
    the weakest, its last, the second with the last but one, and so on: the order of principal components.

    Args:
        width: D. num_latents: K. latent_dim: C.
        noise: standard deviation of the noise on z in training; what is asked of it decides how much can be folded.
        ratio: r at the start, for the first step; later it is learned.
        weight: factor of the latents' mean squared value, in nats per value as in `KLBottleneck`. It bounds their size,
            without which the noise would be none.
    Raises ValueError unless noise and ratio are above 0.
    """

    rounds = True

    def __init__(
        self,
        width: int = 128,
        num_latents: int = 16,
        latent_dim: int = 16,
        noise: float = 0.011,
        ratio: float = 0.3,
        weight: float = 5e-5,
    ):
        super().__init__()
        if not (noise > 0 and ratio > 0):
            raise ValueError(f"got noise {noise}, ratio {ratio}; wanted both above 0, else there is no best step.")
        self.num_latents, self.latent_dim = num_latents, latent_dim
        self.noise, self.weight = noise, weight
        self.project = Linears(num_latents, width, 2 * latent_dim)
        self.log_step = nn.Parameter(torch.full((num_latents, latent_dim), math.log(STEP * math.sqrt(noise * ratio))))

    @property
    def read_dim(self) -> int:
        return 2 * self.latent_dim

    @torch.no_grad()
    def start_silent(self) -> None:
        self.project.weight.zero_()

    def values(self, h: Tensor, shift: Tensor | None) -> Tensor:
        """h (B,k,D), shift (B,k,2C) or None -> the 2C values of each latent (B,k,2C), before they are folded."""
        y = self.project(h).float()
        return y if shift is None else y + shift

    def step(self, k: int) -> Tensor:
        """(k,C), in float32."""
        return self.log_step[:k].float().exp()

    def fold(self, y: Tensor) -> Tensor:
        """(B,k,2C) -> z (B,k,C)."""
        (a, b), s = pairs(y), self.step(y.shape[1])
        n = (a / s).round()
        return (n + snake(n, torch.special.ndtr(b / SPREAD)) - 0.5) * s

    def read(self, z: Tensor) -> Tensor:
        """z (B,k,C) -> (B,k,2C): a at the middle of its step, b from the place within it."""
        s = self.step(z.shape[1])
        z = z.float() / s
        n = z.round()
        v = snake(n, z - n + 0.5).clamp(EDGE, 1 - EDGE)
        return unpaired(n * s, SPREAD * torch.special.ndtri(v))

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean = self.fold(self.values(h, shift))
        return mean, torch.full_like(mean, self.noise)

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(what is read of the noisy z (B,k,2C), losses): for the decoder, as `read` gives it later."""
        y = self.values(h, shift)
        kl = 0.5 * y.square().mean()  # before b is bounded: it is what brings one back
        (a, b), s = pairs(y), self.step(y.shape[1])
        b = Inward.apply(b, LIMIT)
        with torch.no_grad():
            z = self.fold(y)
            seen_a, seen_b = pairs(self.read(z + self.noise * torch.randn_like(z)))
            rounding, blur = (seen_a - a) / s, (seen_b - b) * s  # neither depends on s, in the mean
        return unpaired(a + rounding * s, b + blur / s), {"kl": self.weight * kl, "kl_nats": kl.detach()}


class Inward(torch.autograd.Function):
    """The identity; gradients that would drive a value beyond +-`limit` are zero, those that bring it back pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.where((x.abs() < ctx.limit) | (gradient * x > 0), gradient, 0), None


def pairs(y: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2C) in order of strength -> strong (..., C), weak (..., C), partners at the same place."""
    strong, weak = y.chunk(2, -1)
    return strong, weak.flip(-1)


def unpaired(strong: Tensor, weak: Tensor) -> Tensor:
    """The inverse of `pairs`."""
    return torch.cat([strong, weak.flip(-1)], -1)


def snake(n: Tensor, v: Tensor) -> Tensor:
    """v in even steps, 1 - v in odd ones; its own inverse."""
    return torch.where(n.remainder(2) == 1, 1 - v, v)
