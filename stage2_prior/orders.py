"""In which order a line is modelled, and who sees whom: one builder for the permutation and one for each mask.

A learned tokenizer's latents have an order of their own; latents of a grid (patches) have none, and raster, spiral and
zigzag are the customary inventions. `order.permutation(...)[i]` is the position modelled as the i-th. Reversed and
random orders of a learned line are controls: if its order means anything, they must do worse.

An order also says what is drawn at once. As a rule that is one latent, whose token carries the latent before it.
`SetOrder` has sets: the latents of one are independent of each other given the sets before; its tokens see each other
and all earlier ones, and carry the latents of the set before, so that a line of K latents stays one of K tokens. Scales
of a pyramid (Tian et al. 2024, "VAR") are such sets, and so are late latents of a learned line, which say little.

Masks are bool, True = visible, (B, 1, n, n) over the tokens [words | line], words being visible to everyone and seeing
each other, padding to nobody. Where a mask also exists for FlexAttention, both come from one rule over index pairs.

Letters: B batch, K latents, L caption tokens, S noisy copies of each latent.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from stage1_tokenizer.spec import Spec

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (sample, head, query, key) indices -> bool: visible


class OrderError(ValueError):
    """An order that does not fit the latents or the prior it is for."""


@lru_cache(maxsize=64)
def fixed_order(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """The positions as a tensor, made once: sending it to an accelerator in every step would wait for the step."""
    with torch.inference_mode(False):  # it may be asked for again where gradients are recorded
        return torch.tensor(positions, device=device, dtype=torch.long)


class LearnedOrder(Spec, nn.Module):
    """The order in which the tokenizer puts its latents; the base of the other orders."""

    varies = False  # True: another permutation for every sample

    def positions(self, num_latents: int) -> list[int]:
        """The positions in the order of modelling. Raises OrderError if the order does not fit K."""
        return list(range(num_latents))

    def permutation(
        self,
        batch: int,
        num_latents: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        cuts: tuple[int, ...] = (),
    ) -> Tensor:
        """(B,K) long: row b's i-th entry is the position modelled as the i-th.

        cuts: lengths n of prefixes of the line, each to be modelled before what is behind it. Raises OrderError for a
        fixed order that models another position earlier.
        """
        positions = self.positions(num_latents)
        for n in cuts:
            if any(position >= n for position in positions[:n]):
                raise OrderError(
                    f"got a prefix of {n} latents, but {type(self).__name__} models position"
                    f" {max(positions[:n])} before some of them; leave out prefix and num_latents, or use LearnedOrder."
                )
        return fixed_order(tuple(positions), device).expand(batch, -1)

    def sets(self, num_latents: int) -> list[int]:
        """Sizes of the sets that are drawn at once, in the order of modelling; their sum is K."""
        return [1] * num_latents

    def mask(self, text_mask: Tensor, num_latents: int) -> Tensor:
        """(B,1,L+K,L+K): line tokens see real words, their own set and earlier ones."""
        return causal_mask(text_mask, num_latents)

    def carry(self, latents: Tensor) -> Tensor:
        """What tokens behind the first set carry, given latents (B,n,...) of whole sets, in the order of modelling."""
        return latents

    def carry_on(self, latents: Tensor, index: int) -> Tensor:
        """What the tokens of set `index` (1 or more) carry of the latents (B,n,...) of the set before it."""
        return latents


class ReversedOrder(LearnedOrder):
    """Last first: detail before meaning, the control of a learned order."""

    def positions(self, num_latents: int) -> list[int]:
        return list(range(num_latents))[::-1]


class RandomOrder(LearnedOrder):
    """Another order for every sample."""

    varies = True

    def permutation(
        self,
        batch: int,
        num_latents: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        cuts: tuple[int, ...] = (),
    ) -> Tensor:
        keys = torch.rand(batch, num_latents, generator=generator, device=device)
        for n in cuts:
            keys[:, n:] += n > 0  # what is behind a cut comes later, in any order
        return keys.argsort(dim=1)


class RasterOrder(LearnedOrder):
    """Latents of a grid of `rows` x `columns`, stored row by row: left to right, top to bottom."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        if rows < 1 or columns < 1:
            raise OrderError(f"got a grid of {rows} x {columns}, wanted at least 1 x 1.")
        self.rows, self.columns = rows, columns

    def cells(self) -> list[tuple[int, int]]:
        """(row, column) of every cell in the order of modelling."""
        return [(r, c) for r in range(self.rows) for c in range(self.columns)]

    def positions(self, num_latents: int) -> list[int]:
        if self.rows * self.columns != num_latents:
            raise OrderError(
                f"{type(self).__name__} is for a grid of {self.rows} x {self.columns}, but num_latents is"
                f" {num_latents}; give the grid of the latents, or LearnedOrder for a line that has none."
            )
        return [r * self.columns + c for r, c in self.cells()]


class ZigzagOrder(RasterOrder):
    """Along anti-diagonals, turning at the edges, as JPEG does."""

    def cells(self) -> list[tuple[int, int]]:
        def key(cell: tuple[int, int]) -> tuple[int, int]:
            diagonal = sum(cell)
            return diagonal, cell[0] if diagonal % 2 else cell[1]

        return sorted(super().cells(), key=key)


class SpiralOrder(RasterOrder):
    """From the centre outwards: peel the grid clockwise from its corner, and read that backwards."""

    def cells(self) -> list[tuple[int, int]]:
        grid = [[(r, c) for c in range(self.columns)] for r in range(self.rows)]
        peeled: list[tuple[int, int]] = []
        while grid:
            peeled += grid.pop(0)
            grid = [list(column) for column in zip(*grid, strict=True)][::-1]
        return peeled[::-1]


class SetOrder(LearnedOrder):
    """The tokenizer's order in sets, each drawn at once.

    Args:
        sizes: of the sets, first to last; none is smaller than the one before, whose latents it has to carry.
    """

    def __init__(self, sizes: list[int]):
        super().__init__()
        if not sizes or sizes[0] < 1 or sizes != sorted(sizes):
            raise OrderError(
                f"got sets of {sizes} latents, wanted sizes of at least 1 that never shrink: the tokens of a set carry"
                " the latents of the one before it."
            )
        self.sizes = sizes
        starts = [0, *accumulate(sizes)]
        self.carried = [starts[i - 1] + at for i in range(1, len(sizes)) for at in self.parents(i)]
        self.set_of = [i for i, size in enumerate(sizes) for _ in range(size)]

    def parents(self, index: int) -> list[int]:
        """For each token of set `index`, the latent of the set before that it carries; each is carried."""
        before, size = self.sizes[index - 1], self.sizes[index]
        return [at * before // size for at in range(size)]

    def positions(self, num_latents: int) -> list[int]:
        if sum(self.sizes) != num_latents:
            raise OrderError(
                f"{type(self).__name__} is for {sum(self.sizes)} latents in sets of {self.sizes}, but num_latents is"
                f" {num_latents}; give sets that make up the line."
            )
        return super().positions(num_latents)

    def sets(self, num_latents: int) -> list[int]:
        return self.sizes

    def mask(self, text_mask: Tensor, num_latents: int) -> Tensor:
        own = fixed_order(tuple(self.set_of), text_mask.device)
        line = F.pad(own[:, None] >= own, (text_mask.shape[1], 0, text_mask.shape[1], 0))  # (n,n)
        return (seen_words(text_mask, num_latents) | line)[:, None]

    def carry(self, latents: Tensor) -> Tensor:
        return latents[:, fixed_order(tuple(i for i in self.carried if i < latents.shape[1]), latents.device)]

    def carry_on(self, latents: Tensor, index: int) -> Tensor:
        return latents[:, fixed_order(tuple(self.parents(index)), latents.device)]


class ScaleOrder(SetOrder):
    """Next-scale: the sets are grids of growing side, coarse to fine, each stored row by row (see `PyramidLatents`).

    A token carries the cell of the scale before that lies under it.

    Args:
        sides: of the grids, such as 1, 2, 4, 8.
    """

    def __init__(self, sides: list[int]):
        self.sides = sides
        super().__init__([side * side for side in sides])

    def parents(self, index: int) -> list[int]:
        coarse, fine = self.sides[index - 1], self.sides[index]
        return [r * coarse // fine * coarse + c * coarse // fine for r in range(fine) for c in range(fine)]


def gather_line(z: Tensor, order: Tensor) -> Tensor:
    """z (B,K,...) with its positions in the order (B,K) of modelling."""
    return z.gather(1, order.reshape(*order.shape, *[1] * (z.ndim - 2)).expand(-1, -1, *z.shape[2:]))


def scatter_line(z: Tensor, order: Tensor) -> Tensor:
    """The inverse of `gather_line`."""
    return gather_line(z, order.argsort(dim=1))


def seen_words(text_mask: Tensor, n_line: int) -> Tensor:
    """(B,1,L+n) columns: True for real words."""
    return torch.cat([text_mask, text_mask.new_zeros(len(text_mask), n_line)], dim=1)[:, None]


def causal_mask(text_mask: Tensor, num_latents: int) -> Tensor:
    """(B,1,L+K,L+K): line tokens see real words, themselves and earlier line tokens."""
    n_words = text_mask.shape[1]
    at = torch.arange(n_words + num_latents, device=text_mask.device)
    line = (at[:, None] >= at) & (at >= n_words)  # (n,n)
    return (seen_words(text_mask, num_latents) | line)[:, None]


def bidirectional_mask(text_mask: Tensor, num_latents: int) -> Tensor:
    """(B,1,L+K,L+K): line tokens see real words and the whole line; words see words."""
    n_words = text_mask.shape[1]
    at = torch.arange(n_words + num_latents, device=text_mask.device)
    line = (at[:, None] >= n_words) & (at >= n_words)
    return (seen_words(text_mask, num_latents) | line)[:, None]


def noise_extended_rule(text_mask: Tensor, num_latents: int) -> MaskRule:
    """Who sees whom among [words | clean 1..K | copies, any number of rows of 1..K].

    A clean token sees words and clean tokens up to itself. A noisy copy of latent i sees words, the clean tokens before
    i, and itself: no other copy, and not the clean latent that it is a copy of. Nobody else sees a copy.
    """
    n_words = text_mask.shape[1]
    copies_from = n_words + num_latents

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        word = (k < n_words) & text_mask[b, k.clamp(max=n_words - 1)]
        latent_q, latent_k = (q - n_words) % num_latents, (k - n_words) % num_latents  # also of what it is a copy of
        clean = (k >= n_words) & (k < copies_from) & (q >= n_words)
        own = (q == k) & (q >= n_words)
        return word | (clean & (latent_k < latent_q)) | own

    return visible


def dense_mask(rule: MaskRule, batch: int, n: int, device: torch.device) -> Tensor:
    """The rule for every pair of n tokens: (B,1,n,n) bool."""
    at = torch.arange(n, device=device)
    b = torch.arange(batch, device=device)[:, None, None, None]
    return rule(b, b.new_zeros(()), at[:, None], at)


def noise_extended_mask(text_mask: Tensor, num_latents: int, copies: int) -> Tensor:
    """`noise_extended_rule` as a dense mask (B,1,n,n), n = L + K + S K."""
    batch, n_words = text_mask.shape
    rule = noise_extended_rule(text_mask, num_latents)
    return dense_mask(rule, batch, n_words + num_latents * (1 + copies), text_mask.device)


def noise_extended_blocks(text_mask: Tensor, num_latents: int, copies: int) -> BlockMask:
    """`noise_extended_rule` for FlexAttention, which leaves out the blocks of pairs that nobody sees."""
    batch, n_words = text_mask.shape
    n = n_words + num_latents * (1 + copies)
    rule = noise_extended_rule(text_mask, num_latents)
    return create_block_mask(rule, batch, None, n, n, device=text_mask.device.type)
