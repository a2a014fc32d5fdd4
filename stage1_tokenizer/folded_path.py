"""Two principal components in one float: what a line of continuous latents can hold where its noise is small.

A float that is read without noise has no capacity that ends, so "equal floats" is no equal rate: `LinearPath` puts one
component into each latent channel and uses a few of its bits. Here a strong component a and a weak one b share a
channel. a is rounded to steps, and b, mapped into (0, 1), says where inside the step z lies; every other step runs
backwards, so that z -> (a, b) has no jump in b (a hybrid scalar quantizer and linear coder: Kleiner & Rimoldi 2009,
"Asymptotically optimal joint source-channel with minimal delay", GLOBECOM; the snake is Shannon's of 1949):

    n = round(a / s),   v = F(b) for even n, 1 - F(b) for odd n,   z = s (n + v - 1/2),   F(b) = Phi(b / sqrt(3))

a and b are whitened, F is the compander with the least mean squared error for a Gaussian b (its density goes with the
cube root of b's: Panter & Dite 1951), and z is a at the precision of a step, so that a reader who sees no finer than
that still reads a. Uniform rounding errs by s^2 / 12 in a; noise of standard deviation nu on z errs by about
32.6 nu^2 / s^2 in b (the mean of F's inverse squared slope). For components of standard deviations sigma_a, sigma_b
the least sum is at s = 391^(1/4) sqrt(nu sigma_b / sigma_a), which is the step that `fit` takes.

What it costs: the code wants its precision. With noise of .03 on CIFAR-10's it is worse than one component a channel
from 8 latents on, and whoever models the latents has to place them within a fraction of a step to say anything about b.

Letters: B batch, K latents, C latent channels, F = K C floats, 2F components.
"""

import math

import torch
from torch import Tensor

from stage1_tokenizer.linear_path import LinearPath

SPREAD = math.sqrt(3)  # of the compander, in standard deviations of b
STEP = (12 * 32.6) ** 0.25
EDGE = 1e-3  # v stays so far from 0 and 1: b within 5.3 standard deviations


class FoldedPath(LinearPath):
    """`LinearPath` with 2F components in F floats: latent j holds components 2Cj to 2C(j+1) - 1.

    Within a latent the strongest component shares a channel with the weakest, the second with the last but one, and
    so on. Both methods keep the contract of `LinearPath`: a prefix of latents is a prefix of components.

    Args:
        image_size, num_latents, latent_dim: as in `LinearPath`.
        noise: standard deviation of the noise on z that the steps are made for.
    Raises ValueError unless noise is above 0.
    """

    step: Tensor

    def __init__(self, image_size: int = 32, num_latents: int = 16, latent_dim: int = 16, noise: float = 0.011):
        if not noise > 0:
            raise ValueError(f"got noise {noise}, wanted above 0: without noise there is no best step.")
        super().__init__(image_size, 2 * num_latents, latent_dim)
        self.num_latents, self.noise = num_latents, noise
        self.register_buffer("step", torch.ones(num_latents, latent_dim))

    def fit(self, images: Tensor) -> None:
        """As `LinearPath.fit`, for twice the components, then the steps."""
        super().fit(images)
        strong, weak = self.pairs(self.scale)  # (K,C) each
        self.step.copy_(STEP * (self.noise * weak / strong).sqrt())

    def pairs(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2kC) in order of strength -> strong (..., k, C), weak (..., k, C), partners at the same place."""
        strong, weak = components.unflatten(-1, (-1, 2, self.latent_dim)).unbind(-2)
        return strong, weak.flip(-1)

    def encode(self, images: Tensor, k: int) -> Tensor:
        # All components for any k: a shorter product may round otherwise, and at a border that is another step.
        a, b = self.pairs(super().encode(images, 2 * self.num_latents).flatten(1))  # (B,K,C) each
        n = (a / self.step).round()
        v = snake(n, torch.special.ndtr(b / SPREAD))
        return ((n + v - 0.5) * self.step)[:, :k]

    def decode(self, z: Tensor, keep_mask: Tensor) -> Tensor:
        z = z.float() / self.step  # (B,K,C)
        n = z.round()
        v = snake(n, z - n + 0.5).clamp(EDGE, 1 - EDGE)
        a, b = n * self.step, SPREAD * torch.special.ndtri(v)
        whitened = torch.stack([a, b.flip(-1)], 2).flatten(1, 2)  # (B,2K,C)
        return super().decode(whitened, keep_mask.repeat_interleave(2, 1))


def snake(n: Tensor, v: Tensor) -> Tensor:
    """v in even steps, 1 - v in odd ones; its own inverse."""
    return torch.where(n.remainder(2) == 1, 1 - v, v)
