"""Convolutional trunk and decoder: what photographs of few pixels learn fastest from.

A linear path gives a photograph its low frequencies; what is left to learn is local (edges, textures), and residual
3x3 convolutions on grids of 2x2 and 4x4 pixels learn it in a fraction of a vision transformer's time (after the
residual networks of super-resolution: EDSR, Lim et al. 2017, arXiv 1707.02921, which has no normalisation either).
Both classes are pyramids: level i works at 1 / 2^(i+1) of the picture's side, and the last level's cells are the
patches that latents are made from or placed on.

Convolution weights are marked for Muon, which takes each as a matrix (output channels, inputs x 9).

Letters: B batch, N = (H/p)(W/p) patches of p = 2^levels pixels, D width, K latents, C latent channels, c channels.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.decoder import PixelDecoder
from stage1_tokenizer.encoder import Trunk
from stage1_tokenizer.layers import MATRIX, decayed, embedding, mark


def convolution(n_in: int, n_out: int, zero: bool = False) -> nn.Conv2d:
    """3x3, size kept, weight in the Muon group; `zero` starts a residual branch at nothing."""
    layer = nn.Conv2d(n_in, n_out, 3, padding=1)
    assert isinstance(layer.weight, nn.Parameter) and layer.bias is not None, "a fresh layer's"
    mark(layer.weight, MATRIX)
    nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=1 / math.sqrt(9 * n_in))
    return layer


class ResidualConvs(nn.Module):
    """x + conv(gelu(conv(gelu(x)))): (B,c,H,W) -> (B,c,H,W), the identity at step 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = convolution(channels, channels), convolution(channels, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


def channels_last(x: Tensor) -> Tensor:
    """The layout in which convolutions are fastest, on CPUs and GPUs; what follows from it stays in it."""
    return x.contiguous(memory_format=torch.channels_last)


def check_pyramid(image_size: int, channels: tuple[int, ...], depths: tuple[int, ...]) -> int:
    """Pixels of a patch's side. Raises ValueError for levels that do not fit the image or each other."""
    if not channels or len(channels) != len(depths):
        raise ValueError(f"got channels {channels} and depths {depths}, wanted one number of each for every level.")
    if image_size % 2 ** len(channels):
        raise ValueError(f"got image_size {image_size} and {len(channels)} levels, wanted a multiple of 2^levels.")
    return 2 ** len(channels)


def residual_levels(channels: tuple[int, ...], depths: tuple[int, ...]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(*(ResidualConvs(c) for _ in range(depth))) for c, depth in zip(channels, depths, strict=True)
    )


class ConvTrunk(Trunk):
    """images (B,3,H,W) -> patches (B,N,D), positions added; a trunk for `QFormerEncoder` and `TiTokEncoder`.

    Args:
        image_size: side of the images.
        channels: of each level, the finest (half resolution) first; patches have a side of 2^levels pixels.
        depths: residual blocks of each level.
        width: D.
    Raises ValueError for levels that do not fit the image or each other, and for an image of another size.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: tuple[int, ...] = (64, 128),
        depths: tuple[int, ...] = (2, 2),
        width: int = 128,
    ):
        super().__init__()
        patch = check_pyramid(image_size, channels, depths)
        self.image_size, self.width, self.num_patches = image_size, width, (image_size // patch) ** 2
        self.enter = decayed(nn.Conv2d(12, channels[0], 3, padding=1))
        self.levels = residual_levels(channels, depths)
        self.down = nn.ModuleList(decayed(nn.Conv2d(a, b, 2, stride=2)) for a, b in pairwise(channels))
        self.out = decayed(nn.Linear(channels[-1], width))
        self.position = embedding(self.num_patches, width)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        x = self.levels[0](self.enter(channels_last(F.pixel_unshuffle(images, 2))))
        for down, level in zip(self.down, self.levels[1:], strict=True):
            x = level(down(x))
        return self.out(F.gelu(x).flatten(2).transpose(1, 2)) + self.position  # (B,N,D)


class ConvDecoder(PixelDecoder):
    """Pixel decoder: latents placed on the coarsest grid, then residual convolutions up to half resolution.

    forward(z (B,K,C), keep_mask (B,K), base (B,3,H,W) or None) -> images (B,3,H,W). One linear map places all latents
    on the grid, hidden ones as learned null vectors, and the coarsest level is told which they are. Every level also
    reads `base`, an image that the decoder starts from and corrects (a linear path's reconstruction).

    Args:
        image_size, channels, depths: as in `ConvTrunk`, the finest level first.
        num_latents: K. latent_dim: C.
        width: of a cell of the grid that the latents are placed on.
        base: whether there is one to read.
    Raises ValueError for levels that do not fit the image or each other, as `ConvTrunk` does.
    """

    def __init__(
        self,
        image_size: int = 32,
        num_latents: int = 16,
        latent_dim: int = 16,
        channels: tuple[int, ...] = (64, 128),
        depths: tuple[int, ...] = (3, 3),
        width: int = 64,
        base: bool = False,
    ):
        super().__init__()
        patch = check_pyramid(image_size, channels, depths)
        self.image_size, self.num_latents, self.side = image_size, num_latents, image_size // patch
        self.null = embedding(num_latents, latent_dim)
        self.latent = decayed(nn.Linear(num_latents * latent_dim, self.side**2 * width))
        self.place = decayed(nn.Conv2d(width, channels[-1], 1))
        self.kept = decayed(nn.Linear(num_latents, channels[-1]))
        self.base = nn.ModuleList(
            decayed(nn.Conv2d(3 * 4 ** (i + 1), c, 3, padding=1)) for i, c in enumerate(channels if base else [])
        )
        self.levels = residual_levels(channels, depths)
        self.up = nn.ModuleList(decayed(nn.Conv2d(b, 4 * a, 1)) for a, b in pairwise(channels))
        self.out = decayed(nn.Conv2d(channels[0], 12, 3, padding=1))
        with torch.no_grad():
            self.out.weight *= 0.1

    def forward(self, z: Tensor, keep_mask: Tensor, base: Tensor | None = None) -> Tensor:
        z = torch.where(keep_mask[..., None], z, self.null)  # (B,K,C)
        x = channels_last(self.latent(z.flatten(1)).unflatten(1, (-1, self.side, self.side)))  # (B,D,H/p,W/p)
        x = self.place(x) + self.kept(keep_mask.to(x.dtype))[..., None, None]  # (B,c,H/p,W/p)
        for i in reversed(range(len(self.levels))):
            if base is not None and self.base:
                x = x + self.base[i](channels_last(F.pixel_unshuffle(base, 2 ** (i + 1))))
            x = self.levels[i](x)
            if i > 0:
                x = channels_last(F.pixel_shuffle(self.up[i - 1](F.gelu(x)), 2))
        image = F.pixel_shuffle(self.out(F.gelu(x)), 2).float()  # (B,3,H,W)
        return image if base is None else image + base

    @property
    def last_weight(self) -> Tensor:
        return self.out.weight
