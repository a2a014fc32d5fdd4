"""A pyramid of scales as latents: next-scale prediction (Tian et al. 2024, "VAR") without its codebook.

The picture at a side of p pixels is the first latent; then, for each larger scale, what the enlarged picture so far
lacks, cut into patches of p x p pixels (Burt & Adelson 1983, "The Laplacian pyramid"). With `ScaleOrder` a prior draws
all patches of a scale at once. The line is not free of redundancy: a residual's local means follow from the scale
before, so that there are a third more floats than pixels, and scales are unequal in size, 1, 4, 16, 64 latents.
Command: see `fixed_latents`.

Letters: B batch, K latents, scale after scale, each row by row; C = 3 p^2 channels, m patches along a scale's side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.latent_space import PriorError
from stage2_prior.variants.fixed_latents import FixedLatents, arguments, run


class PyramidLatents(FixedLatents):
    """Residual patches of `patch_size` pixels at 1 x 1, 2 x 2, 4 x 4, ... patches, up to pictures of `image_size`."""

    def __init__(self, image_size: int = 32, patch_size: int = 4):
        self.sides = [2**i for i in range((image_size // max(patch_size, 1)).bit_length())]
        if patch_size < 1 or patch_size * self.sides[-1] != image_size:
            raise PriorError(
                f"got patch_size={patch_size} for pictures of {image_size}, wanted the side divided by a power of two."
            )
        num_latents = sum(m * m for m in self.sides)
        super().__init__(image_size, num_latents, 3 * patch_size**2, f"pyramid {image_size} {patch_size}")
        self.patch_size = patch_size

    def cut(self, images: Tensor) -> Tensor:
        so_far, parts = torch.zeros_like(images[..., :1, :1]), []
        for m in self.sides:
            small = F.adaptive_avg_pool2d(images, m * self.patch_size)
            residual = small - self.enlarge(so_far, m)
            parts.append(F.pixel_unshuffle(residual, self.patch_size).flatten(2).transpose(1, 2))  # (B,m m,C)
            so_far = small
        return torch.cat(parts, dim=1)

    def join(self, latents: Tensor) -> Tensor:
        so_far = latents.new_zeros(len(latents), 3, 1, 1)
        for m, part in zip(self.sides, latents.split([m * m for m in self.sides], dim=1), strict=True):
            residual = F.pixel_shuffle(part.transpose(1, 2).unflatten(2, (m, m)), self.patch_size)
            so_far = self.enlarge(so_far, m) + residual
        return so_far

    def enlarge(self, picture: Tensor, m: int) -> Tensor:
        """(B,3,s,s) -> (B,3,m p,m p), bilinear."""
        return F.interpolate(picture, size=m * self.patch_size, mode="bilinear", align_corners=False)


def main(words: list[str] | None = None) -> int:
    parser = arguments("pyramid", "A pyramid of scales as latents, coarse to fine.")
    parser.add_argument("--patch_size", type=int, default=4)
    return run(parser, words, lambda options: PyramidLatents(options.image_size, options.patch_size))
