"""Features h (B,K,D) -> latents z (B,K,C): the one place where information is limited.

`forward(h) -> (z, losses)` draws what the decoder sees in training; `posterior(h) -> (mean, std)` is what encoding and
the prior use. Every map acts on each position alone, so prefixes stay exact.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import Linears
from stage1_tokenizer.spec import Spec


class Bottleneck(Spec, nn.Module):
    """Features -> latents, position by position; `shift` is added to the latents' mean (a linear path).

    `project` maps features to the means, its first C columns, and to what else the class needs.
    """

    num_latents: int
    latent_dim: int
    project: Linears
    rounds = False  # True: a mean jumps at borders, so that it must be computed from all latents alike for any prefix

    def linear(self, z: Tensor) -> Tensor:
        """Latents (B,k,C) before standardisation -> the coefficients (B,k,C) that a linear path reads them as.

        The expected mean given the latent, for coefficients of zero mean and unit variance: where `forward` adds noise
        or nothing, the latent itself.
        """
        return z

    @torch.no_grad()
    def start_silent(self) -> None:
        """Begin with means that are `shift` alone: the noise of an untrained encoder would bury it for long."""
        self.project.weight[..., : self.latent_dim] = 0

    def start_beside(self, variances: Tensor, pixels: int) -> None:
        """Called when the linear path is fitted: variances (K,C) of its components in pictures of so many values."""

    def snap(self, z: Tensor) -> Tensor:
        """Latents (B,k,C) before standardisation -> the nearest that this can put out: codes, or z itself."""
        return z

    def alphabets(self) -> list[Tensor]:
        """Values of a discrete latent, group by group of its channels: (V,W) each; none for a continuous one."""
        return []

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """h (B,k,D) -> (z (B,k,C) as the decoder sees it in training, losses and figures)."""
        raise NotImplementedError

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h (B,k,D) -> (mean, std), each (B,k,C); std is zero where encoding has no noise."""
        raise NotImplementedError


class KLBottleneck(Bottleneck):
    """Diagonal Gaussian posterior with a tiny KL to N(0, 1) (Kingma & Welling 2014).

    The log-variance starts near `logvar_bias` (noise std e^(bias/2)), so that pictures come through from the first
    step, and is clamped to [-9, 2]. Position i has its own map: positions have different jobs and scales.

    Args:
        width: D. num_latents: K. latent_dim: C.
        weight: factor of the KL, in nats per latent channel, against a mean squared error in [-1, 1].
        logvar_bias: log-variance of the noise at the start.
    """

    def __init__(
        self,
        width: int = 128,
        num_latents: int = 16,
        latent_dim: int = 16,
        weight: float = 3e-4,
        logvar_bias: float = -5.0,
    ):
        super().__init__()
        self.num_latents, self.latent_dim, self.weight = num_latents, latent_dim, weight
        self.project = Linears(num_latents, width, 2 * latent_dim)
        with torch.no_grad():
            self.project.weight[..., latent_dim:] *= 0.1
            self.project.bias[..., latent_dim:] = logvar_bias

    def price(self) -> float | Tensor:
        """The factor of the KL at this step."""
        return self.weight

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.project(h).float().chunk(2, -1)  # (B,k,C) each
        return mean, logvar.clamp(-9.0, 2.0)

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mean, std), each (B,k,C); `shift` (B,k,C) is added to the mean (a linear path beside the encoder)."""
        mean, logvar = self.moments(h)
        return (mean if shift is None else mean + shift), (0.5 * logvar).exp()

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std = self.posterior(h, shift)
        z = mean + std * torch.randn_like(mean)  # (B,K,C)
        kl = 0.5 * (mean.square() + std.square() - 1) - std.log()  # nats per channel
        return z, {"kl": self.price() * kl.mean(), "kl_nats": kl.mean().detach()}
