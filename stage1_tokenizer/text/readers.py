"""Readers: what a loss sees of the latents, as unit vectors in the text tower's space.

Letters: B batch, K latents, C latent channels, E embedding width, W width, P prefix lengths in use.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import LayerNorm, Linears, linear
from stage1_tokenizer.spec import Spec


def on_device(values: list[int], device: torch.device) -> Tensor:
    """`values` as a long tensor (n,), kept: copying a list to a GPU in every step would make the step wait for it."""
    if torch.compiler.is_compiling():  # a constant of the graph
        return torch.tensor(values, device=device)
    return kept_on_device(tuple(values), device)


@functools.lru_cache(maxsize=256)
def kept_on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the first call may come from a report, and a loss indexes with it
        return torch.tensor(values, device=device)


class PrefixReader(Spec, nn.Module):
    """All prefixes of a latent line to unit vectors at once: z (B,K,C) -> (B,P,E) for the given lengths.

    Each position has its own small map; their running sum over positions is the state after k latents, so that every
    prefix costs one row and the value for k cannot depend on later latents. Each length also has a row of its own,
    trained only if that length is: a prefix of any other length is read with the row of one that is (`prefix`).
    """

    def __init__(self, num_latents: int, latent_dim: int, width: int = 256, embed_dim: int = 128):
        super().__init__()
        self.num_latents, self.embed_dim = num_latents, embed_dim
        self.position = Linears(num_latents, latent_dim, width)
        self.length = nn.Parameter(torch.randn(num_latents, width) * 0.5)
        self.norm = LayerNorm(width)
        self.up, self.down = linear(width, 2 * width), linear(2 * width, width, zero=True)
        self.out = linear(width, embed_dim)

    def forward(self, z: Tensor, lengths: list[int], rows: list[int] | None = None) -> Tensor:
        """`rows`: the lengths whose rows are added, one for each of `lengths`; None: the same."""
        steps = self.position(z[:, : max(lengths)])  # (B,k,W)
        at = on_device([k - 1 for k in lengths], z.device)
        row = at if rows is None else on_device([k - 1 for k in rows], z.device)
        x = steps.float().cumsum(1)[:, at] / torch.sqrt(at + 1.0)[:, None] + self.length[row]  # (B,P,W)
        x = self.norm(x)
        x = x + self.down(F.relu(self.up(x)).square())
        return F.normalize(self.out(x).float(), dim=-1)  # (B,P,E)

    def prefix(self, z: Tensor, row: int) -> Tensor:
        """All latents of z (B,k,C) as one vector (B,E), with the row of length `row`."""
        return self(z, [z.shape[1]], [row])[:, 0]


class QueryReader(Spec, nn.Module):
    """Single latents to unit vectors: z (B,K,C) -> (B,P,E), entry p from latent `lengths[p]` alone, not its prefix.

    The reader of two baselines: `lengths: [K]` is SEED's last causal query (Ge et al. 2023), all lengths with
    `MaxOverQueries` is BLIP-2 (Li et al. 2023). Neither asks a short prefix for anything.
    """

    def __init__(self, num_latents: int, latent_dim: int, width: int = 256, embed_dim: int = 128):
        super().__init__()
        self.num_latents, self.embed_dim = num_latents, embed_dim
        self.position = Linears(num_latents, latent_dim, width)
        self.norm = LayerNorm(width)
        self.out = linear(width, embed_dim)

    def forward(self, z: Tensor, lengths: list[int]) -> Tensor:
        at = on_device([k - 1 for k in lengths], z.device)
        x = self.norm(F.relu(self.position(z[:, : max(lengths)])[:, at].float()))  # (B,P,W)
        return F.normalize(self.out(x).float(), dim=-1)  # (B,P,E)

    def prefix(self, z: Tensor, row: int) -> Tensor:
        """The last latent of z (B,k,C) as a vector (B,E); k < `row` has an untrained map."""
        return self(z, [z.shape[1]])[:, 0]
