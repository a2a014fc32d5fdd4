"""A softmax over symbols as a head, for the latents of a discrete bottleneck: the autoregressive model of VQ-GAN and
its followers, behind the contract of the continuous heads, so that the two can be compared.

A latent is a few symbols, each out of an alphabet of its own: the channels of an FSQ bottleneck (C symbols of a handful
of levels, modelled as independent given the condition: a joint softmax over 5^16 codes does not fit), or one code of a
VQ bottleneck. Latents z stay what passes between the stages: the head reads symbols off them by the nearest value, and
puts out values that exist, so that a decoder never sees anything else.

The alphabets are those of the tokenizer, in the units of standardised latents; `prepare` copies them before the first
step and exports carry them. That a symbol has the same value at every position is what the tokenizer's statistics see
to (they are pooled over positions where a bottleneck rounds).

Loss: cross-entropy, nats per symbol. Density: none, but an exact probability: `log_prob` is the log of a mass, and not
to be compared with the nats of a continuous head. Guidance extrapolates logits, u + w (c - u). Temperature t divides
them (0: the likeliest symbol), and then `top_k` or `top_p` leave out what is unlikely.

Letters: M rows, C latent channels, D condition width, G symbols of a latent, V of the largest alphabet, W = C / G.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.conditions import TrainingData
from stage2_prior.guidance import ALWAYS
from stage2_prior.heads.base import Head, HeadError, Plan, guided_rows, one_evaluation
from stage2_prior.heads.solvers import Solver


def draw_ids(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """logits (..., V) -> ids (...) from softmax(logits / temperature); at temperature 0 the likeliest.

    By the largest of logits / temperature plus Gumbel noise (Gumbel 1954), which one generator draws on any device.
    """
    u = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_min(1e-20)
    gumbel = -(-u.log()).clamp_min(1e-20).log()
    return (logits + temperature * gumbel).argmax(-1)


def keep_likely(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """logits (..., V), -inf where a symbol is neither among the `top_k` likeliest nor needed to reach mass `top_p`."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -math.inf)
    if top_p < 1:
        ranked, order = logits.softmax(-1).sort(dim=-1, descending=True)
        unneeded = ranked.cumsum(-1) - ranked >= top_p  # what comes before already has that mass
        logits = logits.masked_fill(torch.zeros_like(unneeded).scatter(-1, order, unneeded), -math.inf)
    return logits


def standardised_alphabets(tokenizer: nn.Module) -> list[Tensor]:
    """Values of a tokenizer's discrete latents in the units of its z, (V,W) by group of channels; none where it has
    continuous ones. Statistics of a bottleneck that rounds are pooled over positions (`Tokenizer.fit_statistics`)."""
    if not isinstance(tokenizer, Tokenizer):
        return []
    groups, start = [], 0
    for values in tokenizer.bottleneck.alphabets():
        there = slice(start, start := start + values.shape[1])
        groups.append((values - tokenizer.latent_mean[0, there]) / tokenizer.latent_scale[0, there])
    return groups


class CategoricalHead(Head):
    """Symbols of a discrete bottleneck.

    Args:
        latent_dim, cond_dim: C and D.
        sizes: how many symbols each alphabet has: the levels of an FSQ bottleneck, channel by channel, or the one
            number of codes of a VQ bottleneck. Their number G divides C.
        width: of the hidden layer.
        top_k: of `sample`; draw among so many likeliest symbols (None: all).
        top_p: of `sample`; draw among the likeliest symbols that have this mass together, in (0, 1].
    """

    has_density = True
    values: Tensor
    used: Tensor

    def __init__(
        self,
        latent_dim: int,
        cond_dim: int,
        sizes: Sequence[int],
        width: int = 320,
        top_k: int | None = None,
        top_p: float = 1.0,
    ):
        super().__init__()
        if not sizes or min(sizes) < 2 or latent_dim % len(sizes):
            raise HeadError(
                f"got sizes={list(sizes)} for {latent_dim} channels, wanted 2 symbols or more in each alphabet, and a"
                " number of alphabets that divides the channels: FSQ's levels, or [codes] of VQ."
            )
        if (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
            raise HeadError(f"got top_k={top_k}, top_p={top_p}; wanted at least 1 symbol, and a mass above 0 up to 1.")
        self.latent_dim, self.cond_dim, self.sizes = latent_dim, cond_dim, tuple(sizes)
        self.top_k, self.top_p = top_k, top_p
        groups, largest = len(sizes), max(sizes)
        self.hidden = decayed(nn.Linear(cond_dim, width))
        self.out = decayed(nn.Linear(width, groups * largest))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("values", torch.full((groups, largest, latent_dim // groups), math.nan))  # (G,V,W)
        used = torch.arange(largest) < torch.tensor(sizes)[:, None]  # (G,V)
        self.register_buffer("used", used, persistent=False)

    # -- symbols ------------------------------------------------------------------------------------------------------

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> None:
        """Copy the tokenizer's alphabets. Raises HeadError for a tokenizer without, or with others."""
        self.learn(tokenizer())

    def learn(self, tokenizer: nn.Module) -> None:
        """`prepare` from a loaded tokenizer."""
        alphabets = standardised_alphabets(tokenizer)
        sizes = [len(alphabet) for alphabet in alphabets]
        if sizes != list(self.sizes):
            got = f"symbols of {sizes}" if sizes else "continuous latents"
            raise HeadError(
                f"got {got} of the tokenizer for a CategoricalHead with sizes={list(self.sizes)}; set sizes to the"
                " levels of its FSQ bottleneck or [codes] of its VQ one; continuous latents want a FlowHead."
            )
        for values, alphabet in zip(self.values, alphabets, strict=True):
            values[: len(alphabet)] = alphabet

    def ids(self, z: Tensor) -> Tensor:
        """z (M, C) standardised -> the nearest symbols (M, G) long. Raises HeadError before `prepare`."""
        if self.values.device.type == "cpu" and bool(self.values[0, 0].isnan().any()):
            raise HeadError("this head has no alphabet yet; train it, which copies the tokenizer's, or call `learn`.")
        parts = z.float().unflatten(-1, (len(self.sizes), -1)).transpose(0, 1)  # (G,M,W)
        known = self.values.nan_to_num(0.0)
        distance = known.square().sum(-1)[:, None] - 2 * parts @ known.transpose(1, 2)  # (G,M,V), up to |z|^2
        return distance.masked_fill(~self.used[:, None], math.inf).argmin(-1).T

    def from_ids(self, ids: Tensor) -> Tensor:
        """Symbols (M, G) -> z (M, C) float32. Raises HeadError for a symbol that its alphabet does not have."""
        sizes = torch.tensor(self.sizes, device=ids.device)
        if ids.device.type == "cpu" and bool(((ids < 0) | (ids >= sizes)).any()):
            raise HeadError(f"got symbols from {int(ids.min())} to {int(ids.max())}, wanted 0 to below {self.sizes}.")
        return self.values[torch.arange(len(self.sizes), device=ids.device), ids].flatten(-2)

    # -- the contract -------------------------------------------------------------------------------------------------

    def logits(self, cond: Tensor) -> Tensor:
        """(M, D) -> (M, G, V) float32; those of symbols that an alphabet lacks have no meaning."""
        return self.out(F.silu(self.hidden(cond))).float().unflatten(-1, (len(self.sizes), -1))

    def log_masses(self, cond: Tensor, x: Tensor) -> Tensor:
        """(M, G) nats: log-probability of each symbol of x (M, C)."""
        scores = self.logits(cond).masked_fill(~self.used, -math.inf).log_softmax(-1)
        return scores.gather(-1, self.ids(x)[..., None])[..., 0]

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return -self.log_masses(cond, target).mean(-1)  # (M,)

    def plan(self, steps: int | None = None, solver: Solver | None = None) -> Plan:
        return one_evaluation(self, steps, solver)

    def sample(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        *,
        interval: tuple[float, float] = ALWAYS,
        plan: Plan | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `Head.sample`. There is no time here, so that `interval` has no say."""
        rows = guided_rows(cond, uncond, guidance)
        logits = self.logits(rows)
        if len(rows) > len(cond):
            logits_c, logits_u = (part.log_softmax(-1) for part in logits.masked_fill(~self.used, -1e4).chunk(2))
            logits = torch.lerp(logits_u, logits_c, guidance)
        logits = logits.masked_fill(~self.used, -math.inf)
        if temperature > 0:
            logits = keep_likely(logits / temperature, self.top_k, self.top_p)
        return self.from_ids(draw_ids(logits, float(temperature > 0), generator))

    @torch.no_grad()
    def log_prob(self, cond: Tensor, x: Tensor, steps: int = 32) -> Tensor:
        """As `Head.log_prob`, exact: `steps` has no say."""
        return self.log_masses(cond, x).sum(-1)
