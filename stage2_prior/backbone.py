"""The transformer of the priors: tokens in, condition rows out, with a mask and a cache that the caller can see.

Pre-norm blocks, queries and keys normalised per head, no biases, output projections at zero (stage1_tokenizer.layers
says why). Two members:

* `Backbone`: learned positions at scale 0.7 added to the tokens, ReLU^2. The default at small scale.
* `RotaryBackbone`: rotary positions (Su et al. 2021) in every block, RMSNorm, SwiGLU (Shazeer 2020): the usual
  ingredients of large models.

One `forward` serves training and sampling. Without a cache it sees the tokens that it is given. With one, the new
tokens' keys and values are written behind those already there and attention covers all of them, so that asking token by
token gives what asking at once gives; a test holds the two together. Buffers of a cache are allocated once, at full
length, and are never grown.

Letters: B batch, n new tokens, m tokens visible in all, D width, H heads, d = D / H.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from stage1_tokenizer.layers import MLP, Attention, LayerNorm, attend, embedding, linear
from stage1_tokenizer.spec import Spec

POSITION_STD = 0.7


@dataclass
class Cache:
    """Keys and values of every block, (B, H, capacity, d) each; the first `length` tokens are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    def keep_rows(self, rows: int) -> "Cache":
        """The same cache for the first `rows` of the batch."""
        return Cache([k[:rows] for k in self.keys], [v[:rows] for v in self.values], self.length)

    def repeat_last(self, times: int) -> "Cache":
        """The same cache with `times` more rows, each a copy of the last one."""

        def longer(buffers: list[Tensor]) -> list[Tensor]:
            return [torch.cat([b, b[-1:].expand(times, -1, -1, -1)]) for b in buffers]

        return Cache(longer(self.keys), longer(self.values), self.length)


class SwiGLU(nn.Module):
    """silu(gate x) * up x, then down; hidden width 8/3 of the width, so that it costs what ReLU^2 at 4 does."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * (width // 3)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class CachedBlock(nn.Module):
    """Self-attention and MLP, each added to the stream; norms and MLP are handed in."""

    def __init__(self, width: int, heads: int, norms: tuple[nn.Module, nn.Module], mlp: nn.Module):
        super().__init__()
        self.attention_norm, self.mlp_norm = norms
        self.attention, self.mlp = Attention(width, heads), mlp

    def forward(
        self,
        x: Tensor,
        mask: Tensor | BlockMask | None,
        cache: Cache | None,
        layer: int,
        turn: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        a, h = self.attention, self.attention_norm(x)
        q, k, v = a.q_norm(a.split(a.q(h))), a.k_norm(a.split(a.k(h))), a.split(a.v(h))  # (B,H,n,d)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            start, end = cache.length, cache.length + x.shape[1]
            cache.keys[layer][:, :, start:end], cache.values[layer][:, :, start:end] = k, v
            k, v = cache.keys[layer][:, :, :end].to(q.dtype), cache.values[layer][:, :, :end].to(v.dtype)  # (B,H,m,d)
        if isinstance(mask, BlockMask):
            y = flex(q.device.type)(q, k, v, block_mask=mask)  # (B,H,n,d)
        else:
            y = attend_one(q, k, v, mask) if q.shape[2] == 1 else attend(q, k, v, mask)  # (B,H,n,d)
        x = x + a.out(y.transpose(1, 2).flatten(2))  # (B,n,D)
        return x + self.mlp(self.mlp_norm(x))


class Backbone(Spec, nn.Module):
    """Transformer with learned positions.

    Args:
        width, depth, heads: D, blocks, H.
        max_tokens: positions there are (caption tokens + latents).
        checkpointing: compute blocks again in the backward pass instead of keeping their activations: about a third
            more time, memory of one block.
    """

    def __init__(
        self, width: int = 128, depth: int = 4, heads: int = 2, max_tokens: int = 96, checkpointing: bool = False
    ):
        super().__init__()
        self.width, self.heads, self.max_tokens, self.checkpointing = width, heads, max_tokens, checkpointing
        self.blocks = nn.ModuleList(self.block() for _ in range(depth))
        self.norm: nn.Module = self.norm_layer()
        self.position: nn.Parameter | None = self.positions()

    def norm_layer(self) -> nn.Module:
        return LayerNorm(self.width)

    def block(self) -> CachedBlock:
        return CachedBlock(self.width, self.heads, (self.norm_layer(), self.norm_layer()), MLP(self.width))

    def positions(self) -> nn.Parameter | None:
        return embedding(self.max_tokens, self.width, std=POSITION_STD)

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of rotary positions, where the backbone uses them."""
        return None

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, on this module's device."""
        weight = next(self.parameters())
        kind = weight.device.type  # keys come in the dtype of matrix products; converting them in every step costs
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (batch, self.heads, length, self.width // self.heads)

        def buffers() -> list[Tensor]:
            return [torch.zeros(shape, device=weight.device, dtype=dtype) for _ in self.blocks]

        return Cache(buffers(), buffers())

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | BlockMask | None = None, cache: Cache | None = None
    ) -> Tensor:
        """x (B,n,D), positions (n,) long -> normalised (B,n,D). Mask: bool, broadcast to (B,1,n,m), True = visible; or
        one of FlexAttention."""
        if self.position is not None:
            x = x + self.position[positions]
        turn = self.turn(positions)
        for layer, block in enumerate(self.blocks):
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, None, layer, turn, use_reentrant=False)
            else:
                x = block(x, mask, cache, layer, turn)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)


class RotaryBackbone(Backbone):
    """Transformer with rotary positions, RMSNorm and SwiGLU. Arguments as `Backbone`; positions have no table."""

    def __init__(
        self, width: int = 128, depth: int = 4, heads: int = 2, max_tokens: int = 96, checkpointing: bool = False
    ):
        if width % (2 * heads):
            raise ValueError(f"got width {width} and {heads} heads, wanted heads of an even width, which is turned.")
        super().__init__(width, depth, heads, max_tokens, checkpointing)

    def norm_layer(self) -> nn.Module:
        return nn.RMSNorm(self.width)

    def block(self) -> CachedBlock:
        return CachedBlock(self.width, self.heads, (self.norm_layer(), self.norm_layer()), SwiGLU(self.width))

    def positions(self) -> nn.Parameter | None:
        return None

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        half = self.width // self.heads // 2
        rates = 1000.0 ** (-torch.arange(half, device=positions.device) / half)
        angles = positions[:, None] * rates  # (n,d/2)
        return angles.cos(), angles.sin()


@contextmanager
def recorded(backbone: Backbone) -> Iterator[list[Tensor]]:
    """A list that fills with the stream (B,n,D) of the next `forward`: before the first block and behind each."""
    stream: list[Tensor] = []
    hooks = [backbone.blocks[0].register_forward_pre_hook(lambda block, inputs: stream.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda block, inputs, x: stream.append(x)) for block in backbone.blocks]
    try:
        yield stream
    finally:
        for hook in hooks:
            hook.remove()


@lru_cache
def flex(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention (Dong et al. 2024): compiled on an accelerator; elsewhere unfused, without a backward."""
    plain: Callable[..., Tensor] = flex_attention
    return plain if device_type == "cpu" else torch.compile(plain, dynamic=False)


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of one token (B,H,1,d): two small products, which beat the fused kernel on a CPU by 1.7x."""
    if q.device.type != "cpu":
        return attend(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B,H,1,m)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v  # (B,H,1,d)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head vector (B,H,n,d) by the angles (n,d/2) of its position."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
