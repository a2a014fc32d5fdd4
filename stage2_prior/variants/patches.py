"""Raw pixel patches as latents: the lossless input, a picture cut on a grid and nothing else.

The line has no order of its own: choose raster, spiral or zigzag (stage2_prior.orders). Command: see `fixed_latents`.

Letters: B batch, K patches = (S / p)^2 row by row, C = 3 p^2 channels, S side of the picture, p side of a patch.
"""

import torch.nn.functional as F
from torch import Tensor

from stage2_prior.latent_space import PriorError
from stage2_prior.variants.fixed_latents import FixedLatents, arguments, run


class PatchLatents(FixedLatents):
    """Patches of `patch_size` pixels of pictures of `image_size`, standardised per patch and channel."""

    def __init__(self, image_size: int = 32, patch_size: int = 8):
        if patch_size < 1 or image_size % patch_size:
            raise PriorError(f"got patch_size={patch_size} for pictures of {image_size}, wanted a divisor of the side.")
        self.side = image_size // patch_size
        super().__init__(image_size, self.side**2, 3 * patch_size**2, f"patches {image_size} {patch_size}")
        self.patch_size = patch_size

    def cut(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.patch_size).flatten(2).transpose(1, 2)

    def join(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch_size)


def main(words: list[str] | None = None) -> int:
    parser = arguments("patches", "Raw pixel patches as latents.")
    parser.add_argument("--patch_size", type=int, default=8)
    return run(parser, words, lambda options: PatchLatents(options.image_size, options.patch_size))
