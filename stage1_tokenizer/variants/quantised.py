"""Discrete bottlenecks, as controls: what does the same tokenizer lose when its latents are symbols?

Both put out vectors (B,K,C) like every bottleneck, so encoder, decoder and reports stay the same; gradients pass the
rounding straight through (van den Oord et al. 2017). Both say how many bits they can hold (`bits_per_latent`) and how
many their latents use. Every map acts on each position alone, so prefixes stay exact. Written out here, since each is a
few lines, and since the codebook below needs no state that changes during a forward.

Letters: B batch, K latents, k prefix length, D width, C latent channels, L levels of a channel, V codes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.bottleneck import Bottleneck
from stage1_tokenizer.layers import Linears, decayed


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`hard` in the forward pass, the gradient of `soft` in the backward pass."""
    return soft + (hard - soft).detach()


def entropy_bits(counts: Tensor) -> Tensor:
    """Entropy in bits of each row of counts (..., n) -> (...)."""
    p = counts / counts.sum(-1, keepdim=True)
    return -(p * p.clamp_min(1e-12).log2()).sum(-1)


class FSQBottleneck(Bottleneck):
    """Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505): every channel is rounded to one of L levels.

    The values are levels divided by the half range, in [-1, 1]. There is no codebook, hence none that can collapse.

    Args:
        width: D. num_latents: K.
        levels: number of levels per channel, each at least 2; their count is C.
    forward(h (B,k,D), shift (B,k,C) or None) -> (z (B,k,C), losses); losses holds only figures to log: `bits_used`, the
    mean over positions of the sum of the channels' entropies in this batch (at most `bits_per_latent`).
    """

    rounds = True
    means: Tensor

    def __init__(self, width: int = 128, num_latents: int = 16, levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"got levels {list(levels)}, wanted at least one channel and 2 levels or more in each.")
        self.num_latents, self.latent_dim, self.most_levels = num_latents, len(levels), max(levels)
        self.bits_per_latent = sum(math.log2(level) for level in levels)
        self.project = Linears(num_latents, width, self.latent_dim)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.levels: Tensor
        self.register_buffer("means", self.symbol_means(), persistent=False)

    def symbol_means(self) -> Tensor:
        """(C,L) expected value of a unit normal that was rounded to each symbol; 0 where a channel has fewer levels.

        A symbol s is an interval [a, b] of what was squashed, in which a unit normal has the mean
        (phi(a) - phi(b)) / (Phi(b) - Phi(a)).
        """
        symbol = torch.arange(self.most_levels, dtype=torch.float64)[None] - (self.levels // 2)[:, None]  # (C,L)
        half = ((self.levels - 1) * (1 + 1e-3) / 2).double()[:, None]
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).double()[:, None]
        low, high = ((symbol + side + offset) / half for side in (-0.5, 0.5))
        a, b = (x.clamp(-1 + 1e-12, 1 - 1e-12).atanh() - (offset / half).atanh() for x in (low, high))
        density = [torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) for x in (a, b)]
        mass = torch.special.ndtr(b) - torch.special.ndtr(a)
        means = (density[0] - density[1]) / mass.clamp_min(1e-12)
        inside = symbol + self.levels[:, None] // 2 < self.levels[:, None]
        return torch.where(inside, means, 0.0).float()

    def symbols(self, z: Tensor) -> Tensor:
        """z (B,k,C) -> the nearest symbols (B,k,C) long, each within 0..L-1 of its channel."""
        index = (z.float() * (self.levels // 2) + self.levels // 2).round()
        return torch.minimum(index.clamp_min(0), self.levels - 1).long()

    def snap(self, z: Tensor) -> Tensor:
        return (self.symbols(z) - self.levels // 2) / (self.levels // 2)

    def ids(self, z: Tensor) -> Tensor:
        """z (B,k,C) -> one id per latent (B,k) long, below the product of the levels; the first channel counts most.

        Raises ValueError where there are more codes than an integer of 64 bits can count.
        """
        if self.bits_per_latent >= 63:
            raise ValueError(
                f"got {self.bits_per_latent:.0f} bits a latent, wanted below 63 to count codes; use symbols."
            )
        index = torch.zeros(z.shape[:-1], dtype=torch.long, device=z.device)
        for level, symbol in zip(self.levels.long(), self.symbols(z).unbind(-1), strict=True):
            index = index * level + symbol
        return index

    def from_ids(self, ids: Tensor) -> Tensor:
        """ids (B,k) -> z (B,k,C). Raises ValueError for an id outside of the codebook."""
        codes = int(self.levels.long().prod())
        if bool((ids < 0).any() or (ids >= codes).any()):
            raise ValueError(f"got ids from {int(ids.min())} to {int(ids.max())}, wanted 0 to {codes - 1}.")
        symbols = []
        for level in self.levels.long().flip(0):
            symbols.append(ids % level)
            ids = ids // level
        return (torch.stack(symbols[::-1], -1) - self.levels // 2) / (self.levels // 2)

    def alphabets(self) -> list[Tensor]:
        """One of L values for every channel, (L,1) each."""
        return [((torch.arange(n) - n // 2) / (n // 2))[:, None].to(self.levels) for n in self.levels.long().tolist()]

    def linear(self, z: Tensor) -> Tensor:
        """Every symbol read at its mean; the gradient passes as if it were read in proportion."""
        mean = self.means.expand(*z.shape, -1).gather(-1, self.symbols(z)[..., None])[..., 0]
        return straight_through(z * (self.levels // 2) / self.levels, mean)

    def bound(self, y: Tensor) -> Tensor:
        """Squash (..., C) so that rounding hits exactly L levels per channel (the paper's appendix A.1)."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)  # an even number of levels is not centred on zero
        return (y + (offset / half).atanh()).tanh() * half - offset

    def quantise(self, h: Tensor, shift: Tensor | None) -> Tensor:
        y = self.project(h).float()  # (B,k,C)
        soft = self.bound(y if shift is None else y + shift)
        return straight_through(soft, soft.round()) / (self.levels // 2)

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(quantised values, zeros), each (B,k,C): a symbol has no noise."""
        z = self.quantise(h, shift)
        return z, torch.zeros_like(z)

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.quantise(h, shift)
        return z, {"bits_used": self.bits_used(z.detach())}

    def bits_used(self, z: Tensor) -> Tensor:
        """Entropy of each position's symbols over the batch, channels taken as independent, mean over positions."""
        counts = F.one_hot(self.symbols(z), self.most_levels).sum(0).float()  # (k,C,L)
        return entropy_bits(counts).sum(-1).mean()


class VQBottleneck(Bottleneck):
    """Vector quantisation with a codebook that moves as a whole (SimVQ, Zhu et al. 2024, arXiv 2411.02038).

    A plain codebook moves only the codes that are chosen, and the rest dies. Here the codes are fixed random vectors
    seen through one learned linear map, so that a gradient on any code moves all of them. Nearest code by Euclidean
    distance; z is pulled to its code with weight `commitment`, the codes to z with weight 1.

    Args:
        width: D. num_latents: K. latent_dim: C.
        codes: V, the size of the codebook, shared by all positions.
        commitment: factor of the pull on the encoder. weight: factor of both pulls, against the pixel loss.
    forward(h (B,k,D), shift (B,k,C) or None) -> (z (B,k,C), losses); losses: `commit` (both pulls), and to log
    `bits_used` (entropy of the codes in this batch).
    """

    rounds = True

    def __init__(
        self,
        width: int = 128,
        num_latents: int = 16,
        latent_dim: int = 16,
        codes: int = 4096,
        commitment: float = 0.25,
        weight: float = 0.1,
    ):
        super().__init__()
        if codes < 2:
            raise ValueError(f"got {codes} codes, wanted at least 2.")
        self.num_latents, self.latent_dim, self.num_codes = num_latents, latent_dim, codes
        self.commitment, self.weight = commitment, weight
        self.bits_per_latent = math.log2(codes)
        self.project = Linears(num_latents, width, latent_dim)
        self.basis = decayed(nn.Linear(latent_dim, latent_dim, bias=False))
        nn.init.eye_(self.basis.weight)
        self.register_buffer("codes", torch.randn(codes, latent_dim))
        self.codes: Tensor

    def codebook(self) -> Tensor:
        """(V,C) float32."""
        return F.linear(self.codes, self.basis.weight.float())  # float32 also where weights are held rounded

    def nearest(self, y: Tensor, codebook: Tensor) -> Tensor:
        """Index (B,k) of the code nearest to each vector of y (B,k,C)."""
        distance = codebook.square().sum(-1) - 2 * y @ codebook.T  # (B,k,V), up to |y|^2
        return distance.argmin(-1)

    def ids(self, z: Tensor) -> Tensor:
        """z (B,k,C) -> the nearest codes (B,k) long."""
        with torch.autocast(z.device.type, enabled=False):
            return self.nearest(z.detach().float(), self.codebook().detach())

    def from_ids(self, ids: Tensor) -> Tensor:
        """ids (B,k) -> z (B,k,C). Raises ValueError for an id outside of the codebook."""
        if bool((ids < 0).any() or (ids >= self.num_codes).any()):
            raise ValueError(f"got ids from {int(ids.min())} to {int(ids.max())}, wanted 0 to {self.num_codes - 1}.")
        return F.embedding(ids, self.codebook())

    def snap(self, z: Tensor) -> Tensor:
        return F.embedding(self.ids(z), self.codebook())  # no look at the ids: it would wait for the device

    def alphabets(self) -> list[Tensor]:
        """The codebook (V,C)."""
        return [self.codebook().detach()]

    def quantise(self, h: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(before, code, index): (B,k,C), (B,k,C), (B,k)."""
        y = self.project(h).float()
        y = y if shift is None else y + shift
        with torch.autocast(y.device.type, enabled=False):  # in bfloat16 the nearest code would often be another
            codebook = self.codebook()
            index = self.nearest(y.detach(), codebook.detach())
        return y, F.embedding(index, codebook), index

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(codes, zeros), each (B,k,C): a symbol has no noise."""
        _, code, _ = self.quantise(h, shift)
        return code, torch.zeros_like(code)

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        y, code, index = self.quantise(h, shift)
        pull = self.commitment * (y - code.detach()).square().mean() + (code - y.detach()).square().mean()
        counts = y.new_zeros(self.num_codes).scatter_add_(0, index.flatten(), y.new_ones(index.numel()))
        return straight_through(y, code), {"commit": self.weight * pull, "bits_used": entropy_bits(counts)}
