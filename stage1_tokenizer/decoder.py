"""Latents -> pixels: queries on the pixel grid read the visible latents; dropped ones are replaced by null vectors.

    z (B,K,C), keep_mask (B,K) -> tokens (B,K,D), null vectors where hidden
    pixel queries (N,D) + static mix of the tokens; blocks: self-attention, cross-attention to the tokens, MLP
    -> patches (B,N,3pp) -> coarse image, refined by a convolutional tail at half resolution -> (B,3,H,W)

Cross-attention instead of one joint sequence: better at equal time, and the latents' cost does not grow with depth.
The tail removes patch seams; its last convolution starts at zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import Block, LayerNorm, Linears, StaticMix, decayed, embedding, training_only
from stage1_tokenizer.spec import Spec


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


class ConvTail(nn.Module):
    """Refines a coarse image at half resolution with the tokens' help: (B,3i,H,W), (B,N,D) -> correction (B,3,H,W).

    i = `inputs` images side by side in the channels.
    """

    def __init__(self, width: int, patch_size: int, channels: int, depth: int, inputs: int = 1):
        super().__init__()
        self.cell = patch_size // 2  # side of a patch at half resolution
        self.token = decayed(nn.Linear(width, channels * self.cell**2))
        self.pixels = decayed(nn.Conv2d(12 * inputs, channels, 3, padding=1))
        self.convs = nn.ModuleList(decayed(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(depth))
        self.out = decayed(nn.Conv2d(channels, 12, 3, padding=1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, coarse: Tensor, tokens: Tensor) -> Tensor:
        side = coarse.shape[-1] // 2 // self.cell
        t = self.token(tokens).transpose(1, 2).unflatten(2, (side, side))  # (B,c·cell²,side,side)
        x = self.pixels(F.pixel_unshuffle(coarse, 2)) + F.pixel_shuffle(t, self.cell)  # (B,c,H/2,W/2)
        for conv in self.convs:
            x = x + conv(F.gelu(x))
        return F.pixel_shuffle(self.out(F.gelu(x)), 2)  # (B,3,H,W)


class ViTDecoder(PixelDecoder):
    """Deterministic pixel decoder. forward(z (B,K,C), keep_mask (B,K), base (B,3,H,W) or None) -> images (B,3,H,W).

    `base` is an image that the decoder starts from and corrects (a linear path's reconstruction); it also enters the
    pixel queries, so that the blocks know what is already there. `checkpointing`: blocks are computed again in the
    backward pass instead of keeping their activations.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        num_latents: int = 16,
        latent_dim: int = 16,
        width: int = 128,
        depth: int = 3,
        heads: int = 2,
        tail_channels: int = 32,
        tail_depth: int = 2,
        base: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        training_only(self, "checkpointing")
        if image_size % patch_size or patch_size % 2:
            raise ValueError(f"got image_size {image_size}, patch_size {patch_size}; want an even divisor of the size.")
        self.image_size, self.patch_size, self.num_latents = image_size, patch_size, num_latents
        side = image_size // patch_size
        self.latent = Linears(num_latents, latent_dim, width)
        self.null = embedding(num_latents, width)
        self.position = embedding(num_latents, width)
        self.queries = embedding(side * side, width)
        self.mix = StaticMix(width, num_latents, side * side)
        self.base = decayed(nn.Conv2d(3, width, patch_size, stride=patch_size)) if base else None
        self.blocks = nn.ModuleList(Block(width, heads, cross=True, checkpointing=checkpointing) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.patch = decayed(nn.Linear(width, 3 * patch_size**2))
        with torch.no_grad():
            self.patch.weight *= 0.1
        self.tail = ConvTail(width, patch_size, tail_channels, tail_depth)

    def forward(self, z: Tensor, keep_mask: Tensor, base: Tensor | None = None) -> Tensor:
        tokens = torch.where(keep_mask[..., None], self.latent(z).to(self.null.dtype), self.null)  # (B,K,D)
        x = self.queries + self.mix(tokens)  # (B,N,D)
        if self.base is not None and base is not None:
            x = x + self.base(base).flatten(2).transpose(1, 2)
        tokens = tokens + self.position
        for block in self.blocks:
            x = block(x, tokens)
        x = self.norm(x)
        side = self.image_size // self.patch_size
        patches = self.patch(x).transpose(1, 2).unflatten(2, (side, side))  # (B,3pp,side,side)
        coarse = F.pixel_shuffle(patches, self.patch_size).float()  # (B,3,H,W)
        if base is not None:
            coarse = coarse + base
        return coarse + self.tail(coarse, x).float()  # (B,3,H,W)

    @property
    def last_weight(self) -> Tensor:
        return self.tail.out.weight
