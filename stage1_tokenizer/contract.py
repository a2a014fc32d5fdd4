"""What the parts of a tokenizer promise each other. A variant is a class that keeps one of these, named in a config.

Letters: B batch, K latents, k <= K, D width, C latent channels.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec


class Encoder(Spec, nn.Module):
    """images -> ordered features. The first k outputs must not depend on how many there are."""

    num_latents: int
    width: int

    def forward(self, images: Tensor, k: int | None = None) -> Tensor:
        """images (B,3,H,W), k (None: K) -> h (B,k,D)."""
        raise NotImplementedError


class Bottleneck(Spec, nn.Module):
    """Features -> latents, position by position; `shift` is added to the latents' mean (a linear path)."""

    num_latents: int
    latent_dim: int

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """h (B,k,D) -> (z (B,k,C) as the decoder sees it in training, losses and figures)."""
        raise NotImplementedError

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h (B,k,D) -> (mean, std), each (B,k,C); std is zero where encoding has no noise."""
        raise NotImplementedError


class Decoder(Spec, nn.Module):
    """Latents and a mask of the visible ones (True = visible) -> images; `base` is a linear path's reconstruction."""

    num_latents: int

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, where an adaptive loss weight is measured."""
        raise NotImplementedError

    def losses(self, z: Tensor, keep_mask: Tensor, images: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B,K,C), keep_mask (B,K), images (B,3,H,W) -> (reconstruction (B,3,H,W), loss per image (B,))."""
        raise NotImplementedError

    def decode(
        self, z: Tensor, keep_mask: Tensor, base: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """z (B,K,C), keep_mask (B,K) -> images (B,3,H,W)."""
        raise NotImplementedError
