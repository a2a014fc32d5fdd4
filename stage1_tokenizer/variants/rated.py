"""A bottleneck of a given rate: how many bits a picture may cost, instead of how much a bit may cost.

The weight of a KL is a price; what a prior has to learn is the amount. `RateBottleneck` steers the price until the line
carries `bits` (dual ascent on the constraint, as in Rezende & Viola 2018, there on the reconstruction).

Beside a linear path it starts at the optimum for Gaussian data, reverse water-filling (Cover & Thomas, Elements of
Information Theory, theorem 10.3.3): a component of variance lambda keeps the share 1 - d of it, d = min(1, theta /
lambda), and costs -log(d) / 2 nats; theta is the water level at which all components together cost the rate. Components
under water are noise and nothing else: `linear` reads nothing from them, and a prior has nothing to learn there.

Letters: B pictures, K latents, C channels, D width of features.
"""

import math

import torch
from torch import Tensor

from stage1_tokenizer.bottleneck import KLBottleneck
from stage1_tokenizer.text.ranks import sum_over_ranks, world_size


class RateBottleneck(KLBottleneck):
    """Diagonal Gaussian posterior whose KL to N(0, 1) is steered to `bits` per picture.

    Args:
        width: D. num_latents: K. latent_dim: C.
        bits: the rate, summed over the line; the KL of the latents that the decoder sees in training.
        weight: factor of the KL at the start, without a linear path (with one it follows from the water level).
        logvar_bias: log-variance of the noise at the start, without a linear path.
        pace: change of the factor's logarithm per step, times the logarithm of (rate / bits).
    Raises ValueError for a rate, pace or weight that is not above 0.
    """

    log_factor: Tensor
    noise: Tensor

    def __init__(
        self,
        width: int = 128,
        num_latents: int = 16,
        latent_dim: int = 16,
        bits: float = 400.0,
        weight: float = 3e-4,
        logvar_bias: float = -5.0,
        pace: float = 0.01,
    ):
        super().__init__(width, num_latents, latent_dim, weight, logvar_bias)
        if not (bits > 0 and pace > 0 and weight > 0):
            raise ValueError(f"got bits {bits}, pace {pace} and weight {weight}, wanted all above 0.")
        self.bits, self.pace = bits, pace
        self.register_buffer("log_factor", torch.tensor(math.log(weight)))
        self.register_buffer("noise", torch.zeros(num_latents, latent_dim))  # d, the share of a component that is noise

    @torch.no_grad()
    def start_beside(self, variances: Tensor, pixels: int) -> None:
        level, noise = water_level(variances, self.bits * math.log(2))
        self.noise.copy_(noise)
        self.project.bias[..., self.latent_dim :] = noise.log()
        # The mean squared error falls by 2 theta / pixels per nat: at this factor of the mean KL a nat is worth it.
        self.log_factor.copy_((2 * level * noise.numel() / pixels).log())

    def price(self) -> Tensor:
        return self.log_factor.exp()

    def linear(self, z: Tensor) -> Tensor:
        """E[y | z] = sqrt(1 - d) z of unit normals y, z = sqrt(1 - d) y + sqrt(d) e."""
        return z * (1 - self.noise[: z.shape[1]]).sqrt()

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().posterior(h, None if shift is None else self.linear(shift))

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        z, parts = super().forward(h, shift)
        bits = parts["kl_nats"] * (z[0].numel() / math.log(2))
        if self.training:
            mean = sum_over_ranks(bits) / world_size()
            self.log_factor += self.pace * (mean / self.bits).clamp(0.5, 2.0).log()
        return z, parts | {"rate_bits": bits}


def water_level(variances: Tensor, nats: float) -> tuple[Tensor, Tensor]:
    """Variances (...) of components -> (theta (), d (...) = min(1, theta / variance)), sum -log(d) / 2 = nats.

    By bisection of log(theta), in float64.
    """
    log = variances.double().clamp_min(1e-30).log()
    low, high = log.min() - 2 * nats, log.max()
    for _ in range(100):
        middle = (low + high) / 2
        above = (log - middle).clamp_min(0).sum() / 2 > nats  # too many nats: raise the level
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high.exp().to(variances.dtype), (high - log).clamp_max(0).exp().to(variances.dtype)
