"""Image -> K ordered features: a patch trunk, then queries that read the patches by cross-attention.

    images (B,3,H,W) -> trunk -> patches (B,N,D)
    queries = learned vectors + static mix of the patches          (K,D)
    blocks: causal self-attention among queries, cross-attention queries -> patches, MLP
    -> h (B,K,D)

Patches never see queries, and query i sees queries j <= i only, so the first k outputs do not depend on how many
queries there are: `forward(images, k)` equals `forward(images)[:, :k]`. A prefix is exact, not approximate.

Letters: B batch, N patches, K queries, D width, p patch size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import (
    Block,
    LayerNorm,
    StaticMix,
    causal_mask,
    decayed,
    embedding,
    hidden_patches,
    training_only,
)
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


class PatchTrunk(Trunk):
    """Two-convolution stem and self-attention blocks: images (B,3,H,W) -> patches (B,N,D), N = (H/p)(W/p).

    The first convolution (3x3, stride 2) sees edges before the second folds the rest of the patch. With `mask_ratio`
    > 0, training replaces a random share U(0, mask_ratio) of the patches by a learned vector, which keeps latents from
    collapsing onto local texture (notes of MacTok and MAETok). `checkpointing`: blocks are computed again in the
    backward pass (see `layers.Block`). Raises ValueError for an image of another size.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        width: int = 128,
        depth: int = 2,
        heads: int = 2,
        stem_width: int = 48,
        mask_ratio: float = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        training_only(self, "checkpointing")
        if image_size % patch_size or patch_size % 2:
            raise ValueError(f"got image_size {image_size}, patch_size {patch_size}; want an even divisor of the size.")
        self.image_size, self.width, self.mask_ratio = image_size, width, mask_ratio
        self.num_patches = (image_size // patch_size) ** 2
        self.stem = decayed(nn.Conv2d(3, stem_width, 3, stride=2, padding=1))
        self.patch = decayed(nn.Conv2d(stem_width, width, patch_size // 2, stride=patch_size // 2))
        self.position = embedding(self.num_patches, width)
        self.null = embedding(width) if mask_ratio > 0 else None
        self.blocks = nn.ModuleList(Block(width, heads, checkpointing=checkpointing) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        x = self.patch(F.gelu(self.stem(images)))  # (B,D,H/p,W/p)
        x = x.flatten(2).transpose(1, 2)  # (B,N,D)
        if self.null is not None and self.training:
            drop = hidden_patches(x.shape[0], x.shape[1], self.mask_ratio, x.device)  # (B,N)
            x = torch.where(drop[..., None], self.null.to(x.dtype), x)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return x  # (B,N,D)


class QFormerEncoder(Encoder):
    """Patches by cross-attention into K ordered queries (after BLIP-2's Q-Former and GigaTok's 1-D encoder).

    Args:
        trunk: images -> patches (B,N,D); a `PatchTrunk`, a `ConvTrunk` or a `TimmTrunk`.
        num_latents: K.
        depth: blocks of self-attention + cross-attention + MLP.
        heads: attention heads.
        checkpointing: compute these blocks again in the backward pass instead of keeping their activations; the trunk
            has a switch of its own.
    forward(images, k=None) -> h (B,k,D), by default k = K.
    """

    def __init__(
        self,
        trunk: Trunk,
        num_latents: int = 16,
        depth: int = 1,
        heads: int = 2,
        checkpointing: bool = False,
    ):
        super().__init__()
        training_only(self, "checkpointing")
        self.trunk, self.num_latents, self.width = trunk, num_latents, trunk.width
        self.queries = embedding(num_latents, trunk.width)
        self.mix = StaticMix(trunk.width, trunk.num_patches, num_latents)
        self.patch_norm = LayerNorm(trunk.width)
        self.blocks = nn.ModuleList(
            Block(trunk.width, heads, cross=True, checkpointing=checkpointing) for _ in range(depth)
        )
        self.norm = LayerNorm(trunk.width)
        self.register_buffer("causal", causal_mask(num_latents), persistent=False)
        self.causal: Tensor

    def forward(self, images: Tensor, k: int | None = None) -> Tensor:
        k = k or self.num_latents
        patches = self.patch_norm(self.trunk(images))  # (B,N,D)
        x = self.queries[:k] + self.mix(patches, k)  # (B,k,D)
        for block in self.blocks:
            x = block(x, patches, self_mask=self.causal[:k, :k])
        return self.norm(x)  # (B,k,D)
