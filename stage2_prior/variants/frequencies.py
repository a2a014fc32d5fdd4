"""Frequencies as latents: the cosine transform of the whole picture, from low to high, as a line.

No blocks: every coefficient is a wave over all of the picture, so that any prefix is a low-passed picture. The line has
as many floats as the picture, and its own order is the one to model it in. Command: see `fixed_latents`.

Letters: B batch, K latents, n = S S / K coefficients of a latent, C = 3 n channels, S side of the picture.
"""

import math

import torch
from torch import Tensor

from stage2_prior.latent_space import PriorError
from stage2_prior.variants.fixed_latents import FixedLatents, arguments, run


def cosine_basis(size: int) -> Tensor:
    """(S,S) float64, orthonormal: row u is the u-th wave of the DCT-II, from the constant to the fastest."""
    at = torch.arange(size, dtype=torch.float64)
    basis = ((2 * at + 1) * at[:, None] * math.pi / (2 * size)).cos() * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


class FrequencyLatents(FixedLatents):
    """`num_latents` groups of equally many coefficients, by rising u^2 + v^2, of pictures of `image_size`."""

    basis: Tensor
    places: Tensor

    def __init__(self, image_size: int = 32, num_latents: int = 64):
        if num_latents < 1 or image_size**2 % num_latents:
            raise PriorError(
                f"got num_latents={num_latents} for the {image_size**2} frequencies of pictures of {image_size}, wanted"
                " a divisor of their number."
            )
        n = image_size**2 // num_latents
        super().__init__(image_size, num_latents, 3 * n, f"frequencies {image_size} {num_latents}")
        self.register_buffer("basis", cosine_basis(image_size).float(), persistent=False)
        u = torch.arange(image_size)
        order = (u[:, None].square() + u.square()).flatten().argsort(stable=True)
        self.register_buffer("places", order, persistent=False)  # (S S,) of the coefficients, low to high

    def cut(self, images: Tensor) -> Tensor:
        waves = self.basis @ images @ self.basis.T  # (B,3,S,S)
        low_to_high = waves.flatten(2)[..., self.places].unflatten(2, (self.num_latents, -1))  # (B,3,K,n)
        return low_to_high.transpose(1, 2).flatten(2)

    def join(self, latents: Tensor) -> Tensor:
        low_to_high = latents.unflatten(2, (3, -1)).transpose(1, 2).flatten(2)  # (B,3,S S)
        waves = torch.zeros_like(low_to_high).index_copy(2, self.places, low_to_high)
        return self.basis.T @ waves.unflatten(2, (self.image_size, -1)) @ self.basis


def main(words: list[str] | None = None) -> int:
    parser = arguments("frequencies", "Cosine coefficients of the whole picture as latents, low to high.")
    parser.add_argument("--num_latents", type=int, default=64)
    return run(parser, words, lambda options: FrequencyLatents(options.image_size, options.num_latents))
