"""Deterministic latents of fixed size, with or without noise in training: the alternatives to a KL.

`NormBottleneck` normalises every latent over its channels (Semanticist's way of bounding them). `NoiseBottleneck` adds
interpolative noise to the normalised latent, so that the decoder, and with it a prior, learns to live with errors
(l-DeTok): the noise is absolute, which is why the latents are normalised first: else an encoder would out-scale it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.bottleneck import Bottleneck
from stage1_tokenizer.layers import Linears


class NormBottleneck(Bottleneck):
    """h -> z of zero mean and unit variance over the channels of each latent."""

    def __init__(self, width: int = 128, num_latents: int = 16, latent_dim: int = 16):
        super().__init__()
        self.num_latents, self.latent_dim = num_latents, latent_dim
        self.project = Linears(num_latents, width, latent_dim)

    def normalised(self, h: Tensor, shift: Tensor | None) -> Tensor:
        z = self.project(h).float()
        return F.layer_norm(z if shift is None else z + shift, (self.latent_dim,))  # (B,k,C)

    def linear(self, z: Tensor) -> Tensor:
        """z times the expected norm of what it was: coefficients y = m + s z of C independent unit normals have
        E[y | z] = E[s] z, E[s] = sqrt(2 / C) Gamma(C / 2) / Gamma((C - 1) / 2)."""
        c = self.latent_dim
        return z * math.sqrt(2 / c) * math.exp(math.lgamma(c / 2) - math.lgamma((c - 1) / 2)) if c > 1 else z

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = self.normalised(h, shift)
        return z, torch.zeros_like(z)

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.normalised(h, shift), {}


class NoiseBottleneck(NormBottleneck):
    """Training sees (1 - u) z + u `strength` noise with u ~ U(0, `most`) per image (Yang et al. 2025, l-DeTok).

    Encoding stays deterministic; `strength` is l-DeTok's gamma.
    """

    def __init__(
        self,
        width: int = 128,
        num_latents: int = 16,
        latent_dim: int = 16,
        strength: float = 1.0,
        most: float = 0.5,
    ):
        super().__init__(width, num_latents, latent_dim)
        if not (strength > 0 and 0 < most <= 1):
            raise ValueError(f"got strength {strength}, most {most}; want strength > 0 and most within (0, 1].")
        self.strength, self.most = strength, most

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.normalised(h, shift)
        u = torch.rand(len(z), 1, 1, device=z.device) * self.most
        return (1 - u) * z + u * self.strength * torch.randn_like(z), {}
