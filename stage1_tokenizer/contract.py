"""What the parts of a tokenizer promise each other. A variant is a class that keeps one of these, named in a config.

Letters: B batch, N patches, K latents, k <= K, D width, C latent channels.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import Linears
from stage1_tokenizer.spec import Spec


class Trunk(Spec, nn.Module):
    """images -> patches, for an encoder to read. A patch is told from the others by its place and by nothing else."""

    image_size: int
    num_patches: int
    width: int

    def forward(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) -> patches (B,N,D)."""
        raise NotImplementedError

    def check(self, images: Tensor) -> None:
        """Raises ValueError for images of another size."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, wanted (B, 3, {self.image_size}, {self.image_size}): make "
                "the data's image_size and the model's equal."
            )


class Encoder(Spec, nn.Module):
    """images -> ordered features. The first k outputs must not depend on how many there are."""

    num_latents: int
    width: int

    def forward(self, images: Tensor, k: int | None = None) -> Tensor:
        """images (B,3,H,W), k (None: K) -> h (B,k,D)."""
        raise NotImplementedError


class Bottleneck(Spec, nn.Module):
    """Features -> latents, position by position; `shift` is added to the latents' mean (a linear path).

    `project` maps features to the means, its first C columns, and to what else the class needs.

    What decoders and text readers see of a latent has `read_dim` channels, C unless a class says so: `forward` gives it
    in training, `read` makes it of the latents that `posterior` gives. A shift has `read_dim` channels, too.
    """

    num_latents: int
    latent_dim: int
    project: Linears
    rounds = False  # True: a mean jumps at borders, so that it must be computed from all latents alike for any prefix

    @property
    def read_dim(self) -> int:
        return self.latent_dim

    def read(self, z: Tensor) -> Tensor:
        """Latents (B,k,C) before standardisation -> what is read of them (B,k,read_dim)."""
        return z

    @torch.no_grad()
    def start_silent(self) -> None:
        """Begin with means that are `shift` alone: the noise of an untrained encoder would bury it for long."""
        self.project.weight[..., : self.latent_dim] = 0

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """h (B,k,D) -> (z (B,k,read_dim) as the decoder sees it in training, losses and figures)."""
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


class PixelDecoder(Decoder):
    """A decoder whose one picture is the answer: `forward(z, keep_mask, base)`, trained by squared error."""

    def losses(self, z: Tensor, keep_mask: Tensor, images: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(reconstruction (B,3,H,W), squared error per image (B,))."""
        out = self(z, keep_mask, base)
        return out, (out - images).square().mean((1, 2, 3))

    def decode(
        self, z: Tensor, keep_mask: Tensor, base: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self(z, keep_mask, base)
