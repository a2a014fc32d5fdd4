"""The two tokenizer designs that a benchmark compares, at equal numbers of parameters, without text.

TiTok's (Yu et al. 2024, arXiv 2406.07550; continuous latents as in Kim et al. 2025, TA-TiTok): encoder and decoder are
one self-attended sequence of patches and latents each, patches enter and leave by one linear map. Everything else, the
blocks themselves above all, is ours, so that a ratio is one of designs and not of kernels. There is no prefix mask, as
published: a mask would only cost it time.

Letters: B batch, N patches, K latents, C latent channels, D width, p patch size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.bottleneck import KLBottleneck
from stage1_tokenizer.decoder import PixelDecoder, ViTDecoder
from stage1_tokenizer.encoder import Encoder, PatchTrunk, QFormerEncoder
from stage1_tokenizer.layers import Block, LayerNorm, decayed, embedding
from stage1_tokenizer.prefixes import PrefixLengths
from stage1_tokenizer.tokenizer import Tokenizer


class Size(NamedTuple):
    """Blocks are (trunk, queries, decoder) of ours and (encoder, decoder) of TiTok's design."""

    image_size: int
    patch_size: int
    num_latents: int
    latent_dim: int
    width: int
    heads: int
    ours: tuple[int, int, int]
    titok: tuple[int, int]


SIZES = {
    "demo": Size(32, 8, 16, 16, 128, 2, (2, 1, 3), (4, 4)),
    "S": Size(256, 16, 128, 16, 512, 8, (4, 3, 6), (8, 8)),
    "B": Size(256, 16, 128, 16, 768, 12, (6, 4, 9), (12, 12)),
}


class JointEncoder(Encoder):
    """images (B,3,H,W) -> [patches, latents] -> blocks -> the last K (B,K,D)."""

    def __init__(self, image_size: int, patch_size: int, width: int, num_latents: int, depth: int, heads: int):
        super().__init__()
        self.num_latents, self.width = num_latents, width
        self.patch = decayed(nn.Conv2d(3, width, patch_size, stride=patch_size))
        self.tokens = embedding((image_size // patch_size) ** 2 + num_latents, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width)

    def forward(self, images: Tensor, k: int | None = None) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)  # (B,N,D)
        n = patches.shape[1]
        x = F.pad(patches, (0, 0, 0, self.num_latents)) + self.tokens  # (B,N+K,D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, n : n + (k or self.num_latents)])  # (B,k,D)


class JointDecoder(PixelDecoder):
    """z (B,K,C) -> [mask tokens, latents] -> blocks -> patches -> a convolution -> images (B,3,H,W)."""

    def __init__(
        self, image_size: int, patch_size: int, num_latents: int, latent_dim: int, width: int, depth: int, heads: int
    ):
        super().__init__()
        self.num_latents, self.patch_size, self.side = num_latents, patch_size, image_size // patch_size
        self.latent = decayed(nn.Linear(latent_dim, width))
        self.tokens = embedding(self.side**2 + num_latents, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.patch = decayed(nn.Linear(width, 3 * patch_size**2))
        self.smooth = decayed(nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, z: Tensor, keep_mask: Tensor, base: Tensor | None = None) -> Tensor:
        latents = self.latent(z * keep_mask[..., None])  # (B,K,D)
        n = self.side**2
        x = F.pad(latents, (0, 0, n, 0)) + self.tokens  # (B,N+K,D)
        for block in self.blocks:
            x = block(x)
        patches = self.patch(self.norm(x[:, :n])).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.smooth(F.pixel_shuffle(patches, self.patch_size)).float()  # (B,3,H,W)


def our_design(size: Size, two_lengths: bool = True) -> Tokenizer:
    """This package's tokenizer; `two_lengths`: trained on a second, shorter prefix as shipped configs are."""
    trunk, queries, decoder = size.ours
    patches = PatchTrunk(size.image_size, size.patch_size, size.width, trunk, size.heads)
    return Tokenizer(
        size.image_size,
        QFormerEncoder(patches, size.num_latents, queries, size.heads),
        KLBottleneck(size.width, size.num_latents, size.latent_dim),
        ViTDecoder(
            size.image_size, size.patch_size, size.num_latents, size.latent_dim, size.width, decoder, size.heads
        ),
        PrefixLengths(size.num_latents) if two_lengths else None,
    )


def titok_design(size: Size) -> Tokenizer:
    """TiTok's, trained on the full length only."""
    encoder, decoder = size.titok
    images, patch, k, c, width = size[:5]
    return Tokenizer(
        images,
        JointEncoder(images, patch, width, k, encoder, size.heads),
        KLBottleneck(width, k, c),
        JointDecoder(images, patch, k, c, width, decoder, size.heads),
    )


def millions(module: nn.Module) -> float:
    """Parameters of a module, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def pictures(n: int, side: int, device: torch.device) -> Tensor:
    """(n,3,side,side) noise in [-1, 1]: what a picture shows does not matter to a clock."""
    return torch.rand(n, 3, side, side, device=device) * 2 - 1
