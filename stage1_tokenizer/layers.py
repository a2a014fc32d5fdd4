"""Blocks that both stages are built from: attention, MLP, static token mixing, embeddings.

Choices, each with its reason:

* Position, query and word embeddings start at scale 1. At the usual 0.02 they are some 25 times smaller than the
  content they are added to, and a small resampler then stays at the mean image for good.
* Output projections of residual branches start at zero, so that every block is the identity at step 0.
* Queries and keys are normalised per head (QK-norm, Henry et al. 2020) with a learned gain per head.
* ReLU^2 (So et al. 2021, "Primer") in the MLP: one matrix less than SwiGLU.
* `attend` writes attention as two plain matmuls where autograd runs on a CPU: the backward of fused CPU attention is
  the largest single cost of a small model (1.7x of a whole step). Everywhere else it is fused.
* Linear layers of blocks have no bias; their weights are marked for Muon where they are born (`weight.group`). Other
  linear maps are marked for weight decay there; embeddings, biases, gains and gates are not marked and never decay.
* A block may compute its activations again in the backward pass instead of keeping them (`checkpointing`).

Letters: B batch, n query tokens, m key tokens, D width, H heads, d = D / H.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage1_tokenizer.spec import Spec

MATRIX = "matrix"  # parameter group of 2-D block matrices (Muon)
DECAY = "decay"  # AdamW with weight decay

Linear = TypeVar("Linear", nn.Linear, nn.Conv2d)


def mark(parameter: nn.Parameter, group: str) -> nn.Parameter:
    """Name the optimiser group of a parameter where it is born; an unmarked one gets AdamW without decay."""
    parameter.group = group  # type: ignore[attr-defined]
    return parameter


def linear(n_in: int, n_out: int, zero: bool = False) -> nn.Linear:
    """A bias-free matrix of a block, in the Muon group; `zero` starts a residual branch at nothing."""
    layer = nn.Linear(n_in, n_out, bias=False)
    assert isinstance(layer.weight, nn.Parameter), "a fresh layer's"
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.uniform_(layer.weight, -math.sqrt(3 / n_in), math.sqrt(3 / n_in))  # std 1/sqrt(n_in)
    mark(layer.weight, MATRIX)
    layer.group = MATRIX  # type: ignore[assignment]  # a copy keeps what stands on a module, and not what stands on a parameter
    return layer


def decayed(layer: Linear) -> Linear:
    """The same layer, its weight marked for weight decay; its bias is not."""
    assert isinstance(layer.weight, nn.Parameter), "a fresh layer's"
    mark(layer.weight, DECAY)
    return layer


def embedding(*shape: int, std: float = 1.0) -> nn.Parameter:
    """Learned vectors (positions, queries, null tokens) of the given shape at scale `std`."""
    return nn.Parameter(torch.randn(*shape) * std)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q (B,H,n,d), k and v (B,H,m,d), `mask` bool broadcastable to (B,H,n,m), True = visible."""
    if q.device.type != "cpu" or not (torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B,H,n,m)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v  # (B,H,n,d)


def causal_mask(n: int, device: torch.device | None = None) -> Tensor:
    """(n, n) bool, True where token i may see token j <= i."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def hidden_patches(batch: int, patches: int, ratio: float, device: torch.device) -> Tensor:
    """(B,N) bool, True = hidden: of every image a random share U(0, ratio) of its patches."""
    share = torch.rand(batch, 1, device=device) * ratio
    return torch.rand(batch, patches, device=device) < share


def training_only(module: Spec, *names: str) -> None:
    """Leave constructor arguments that say how `module` trains out of its description.

    They change nothing that it computes: an export that records them would have another fingerprint, and priors would
    refuse it.
    """
    for name in names:
        module.spec["init_args"].pop(name, None)


class QKNorm(nn.Module):
    """Per-head RMS normalisation of queries or keys, with one learned gain per head (start 1)."""

    def __init__(self, heads: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # CUDA's autocast normalises in float32; q, k and v must leave in one dtype, the cache's.
        return (F.rms_norm(x, x.shape[-1:]) * self.gain.to(x.dtype)).to(x.dtype)  # (B,H,n,d)


class Attention(nn.Module):
    """Multi-head attention of `x` (B,n,D) to `context` (B,m,D_c), or to itself. Raises ValueError if D % heads."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}; choose heads that divide the width.")
        self.heads = heads
        self.q = linear(width, width)
        self.k = linear(context_width or width, width)
        self.v = linear(context_width or width, width)
        self.out = linear(width, width, zero=True)
        self.q_norm, self.k_norm = QKNorm(heads), QKNorm(heads)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,n,D) -> (B,H,n,d)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.q_norm(self.split(self.q(x)))  # (B,H,n,d)
        k = self.k_norm(self.split(self.k(context)))  # (B,H,m,d)
        v = self.split(self.v(context))  # (B,H,m,d)
        y = attend(q, k, v, mask)  # (B,H,n,d)
        return self.out(y.transpose(1, 2).flatten(2))  # (B,n,D)


class MLP(nn.Module):
    """Two matrices with ReLU^2 between; hidden width `expansion` x `width`."""

    def __init__(self, width: int, expansion: int = 4):
        super().__init__()
        self.up = linear(width, expansion * width)
        self.down = linear(expansion * width, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if torch.is_grad_enabled() and hidden.requires_grad:
            return self.down(F.relu(hidden).square())
        return self.down(hidden.relu_().square_())  # in place: it is the largest tensor of a block


class LayerNorm(nn.LayerNorm):
    """LayerNorm with a gain and without a bias."""

    def __init__(self, width: int):
        super().__init__(width, bias=False)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then cross-attention to `context` if `cross`, then MLP.

    forward(x (B,n,D), context (B,m,D) or None, self_mask, cross_mask) -> (B,n,D). Masks: bool, True = visible.
    With `checkpointing`, training keeps only the inputs of the block and computes the rest again in the backward pass.
    """

    def __init__(self, width: int, heads: int, cross: bool = False, expansion: int = 4, checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        self.self_norm, self.self_attention = LayerNorm(width), Attention(width, heads)
        self.cross_norm = LayerNorm(width) if cross else None
        self.cross_attention = Attention(width, heads) if cross else None
        self.mlp_norm, self.mlp = LayerNorm(width), MLP(width, expansion)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        self_mask: Tensor | None = None,
        cross_mask: Tensor | None = None,
    ) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, context, self_mask, cross_mask, use_reentrant=False)
        return self.compute(x, context, self_mask, cross_mask)

    def compute(self, x: Tensor, context: Tensor | None, self_mask: Tensor | None, cross_mask: Tensor | None) -> Tensor:
        x = x + self.self_attention(self.self_norm(x), mask=self_mask)
        if self.cross_attention is not None and self.cross_norm is not None:
            x = x + self.cross_attention(self.cross_norm(x), context, cross_mask)
        return x + self.mlp(self.mlp_norm(x))


class StaticMix(nn.Module):
    """Input-independent mixing of tokens: (B,m,D) -> (B,n,D) by a learned (n,m) matrix per head.

    Attention must first learn where to look; a fixed map from place to place needs no such discovery and lets a
    resampler leave the mean image within seconds. There is no output matrix: with one it learned 1 dB less. Row i of
    the output may be truncated (`n` <= n_out) without touching the others, so prefixes stay exact.
    """

    def __init__(self, width: int, n_in: int, n_out: int, heads: int = 8):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}; choose heads that divide the width.")
        self.heads = heads
        self.value = linear(width, width)
        self.weight = mark(nn.Parameter(torch.randn(heads, n_out, n_in) * n_in**-0.5), DECAY)

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        v = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B,h,m,D/h)
        mixed = self.weight[:, :n, : x.shape[1]].to(v.dtype) @ v  # (B,h,n,D/h)
        return mixed.transpose(1, 2).flatten(2)  # (B,n,D)


class Linears(nn.Module):
    """One linear map per position: (B,n,C) -> (B,n,D), row i by its own matrix; `n` may be below `positions`."""

    def __init__(self, positions: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = mark(nn.Parameter(torch.randn(positions, n_in, n_out) * n_in**-0.5), DECAY)
        self.bias = nn.Parameter(torch.zeros(positions, n_out))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        y = torch.einsum("bnc,ncd->bnd", x, self.weight[:n].to(x.dtype))
        return y + self.bias[:n].to(y.dtype)  # (B,n,D)
