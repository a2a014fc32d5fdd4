"""The encoder that the Q-Former is compared with: latents and patches in one self-attended sequence (TiTok's design).

    [patches (N), latents (K)] -> blocks of self-attention over all N + K tokens, MLP -> the last K

Yu et al. 2024 (arXiv 2406.07550) let every token see every other. Here a mask keeps prefixes exact: patches see
patches, latent i sees patches and latents j <= i, so the first k outputs do not depend on how many there are.
Everything else (stem, static mix into the queries, initialisation) is that of `QFormerEncoder`, so that a comparison
compares the attention. A block costs (N + K)^2 instead of N^2 + K^2 + N K, and patches are transformed in every block.

Letters: B batch, N patches, K latents, k prefix length, D width.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.encoder import Encoder, Trunk
from stage1_tokenizer.layers import Block, LayerNorm, StaticMix, embedding, training_only


class TiTokEncoder(Encoder):
    """Patches and K ordered latents through shared self-attention blocks.

    Args:
        trunk: images -> patches (B,N,D); usually a `PatchTrunk` with depth 0, since the blocks here transform patches.
        num_latents: K.
        depth: shared blocks, at least 1.
        heads: attention heads.
        checkpointing: compute the blocks again in the backward pass instead of keeping their activations.
    forward(images, k=None) -> h (B,k,D), by default k = K.
    """

    def __init__(
        self,
        trunk: Trunk,
        num_latents: int = 16,
        depth: int = 3,
        heads: int = 2,
        checkpointing: bool = False,
    ):
        super().__init__()
        training_only(self, "checkpointing")
        if depth < 1:
            raise ValueError(f"got depth {depth}; wanted at least one block, or the latents never see the patches.")
        self.trunk, self.num_latents, self.width = trunk, num_latents, trunk.width
        self.queries = embedding(num_latents, trunk.width)
        self.mix = StaticMix(trunk.width, trunk.num_patches, num_latents)
        self.blocks = nn.ModuleList(Block(trunk.width, heads, checkpointing=checkpointing) for _ in range(depth))
        self.norm = LayerNorm(trunk.width)
        self.register_buffer("visible", prefix_mask(trunk.num_patches, num_latents), persistent=False)
        self.visible: Tensor

    def forward(self, images: Tensor, k: int | None = None) -> Tensor:
        k = k or self.num_latents
        patches = self.trunk(images)  # (B,N,D)
        n = patches.shape[1]
        latents = self.queries[:k] + self.mix(patches, k)  # (B,k,D)
        x = torch.cat([patches, latents], 1)  # (B,N+k,D)
        for block in self.blocks:
            x = block(x, self_mask=self.visible[: n + k, : n + k])
        return self.norm(x[:, n:])  # (B,k,D)


def prefix_mask(num_patches: int, num_latents: int) -> Tensor:
    """(N+K, N+K) bool, True = visible: rows of patches see patches, row of latent i sees patches and latents j <= i."""
    size = num_patches + num_latents
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    mask[:, :num_patches] = True
    return mask
