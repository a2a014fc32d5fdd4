"""The text transformer of CLIP (Radford et al. 2021) over a small vocabulary, bidirectional, pooled at the end token.

Names of weights, initialisation and arithmetic are those of open_clip's `TextTransformer` with `no_causal_mask`,
`use_pad_mask` and `pool_type="eos"`, so that exports of either load here and compute the same bits (a test asks both).
It is written out because importing open_clip takes as long as importing torch, and a tokenizer is loaded to encode
pictures more often than captions.

Letters: B batch, L text tokens, W token width, E embedding width, H heads.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextLayerNorm(nn.LayerNorm):
    """LayerNorm whose output has the dtype of its input under autocast, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class TextBlock(nn.Module):
    """Pre-norm self-attention and an MLP with GELU: x (B,L,W), additive mask (B H,L,L) -> (B,L,W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = TextLayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = TextLayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask.to(h.dtype))[0]
        return x + self.mlp(self.ln_2(x))


class TextBlocks(nn.Module):
    """The blocks one after another."""

    batch_first = True

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class TextTransformer(nn.Module):
    """ids (B,L) -> pooled features (B,E), or (pooled (B,E), every token's, normalised (B,L,W)) if `output_tokens`.

    pad_id, eos_id: rows of padding, which is seen by none, and of the end token, at which the sequence is pooled.
    """

    def __init__(
        self,
        context_length: int,
        rows: int,
        width: int,
        heads: int,
        layers: int,
        embed_dim: int,
        pad_id: int,
        eos_id: int,
    ):
        super().__init__()
        self.context_length, self.width, self.heads = context_length, width, heads
        self.pad_id, self.eos_id = pad_id, eos_id
        self.output_tokens = False
        self.token_embedding = nn.Embedding(rows, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = TextBlocks(width, heads, layers)
        self.ln_final = TextLayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, TextBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)  # type: ignore[union-attr, arg-type]
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]  # (B,L,W)
        hidden = (ids == self.pad_id)[:, None].expand(-1, ids.shape[1], -1)  # (B,L,L)
        mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, -torch.inf)
        x = self.ln_final(self.transformer(x, mask.repeat_interleave(self.heads, 0)))  # (B,L,W)
        end = (ids == self.eos_id).int().argmax(dim=-1)
        pooled = x[torch.arange(len(x), device=x.device), end] @ self.text_projection  # (B,E)
        return (pooled, x) if self.output_tokens else pooled
