"""The masked prior of Li et al. 2024 ("MAR"): bidirectional, random order, several latents per step.

Training hides a random set of latents behind a mask token and asks for them; sampling starts with all hidden and fills
in a set per step, X_1, X_2, ..., in a random order: p(z) = prod_s p(X_s | X_<s). Latents of one set are drawn
independently of each other given the rest; what depends between them is lost, and the more so the fewer the sets. There
is no cache: every step runs the whole line.

Set sizes follow a cosine (Chang et al. 2022, "MaskGIT"): few latents while little is known, many at the end. The share
hidden in training is drawn from the same cosine, or as MAR does; one number for the batch, so that shapes are known
beforehand and only hidden latents reach the head.

Letters: B batch, K latents, C latent channels, L caption tokens, D width, n latents of a set.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed, embedding
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.backbone import Backbone
from stage2_prior.base import Prior
from stage2_prior.conditions import WORD_STD, Condition, TrainingData, WordSum, words_of
from stage2_prior.guidance import Guidance
from stage2_prior.heads.base import Head
from stage2_prior.heads.solvers import Solver
from stage2_prior.latent_space import PriorError
from stage2_prior.orders import LearnedOrder, RandomOrder, bidirectional_mask, gather_line
from stage2_prior.prior import check_density, check_parts, token_positions
from stage2_prior.request import Request, Text


class CosineShare(Spec, nn.Module):
    """The share of latents that training hides is cos(pi u / 2) of a uniform u, as the sets of sampling leave it."""

    def forward(self, u: float) -> float:
        """u in [0, 1) -> the share hidden, in [0, 1]."""
        return math.cos(u * math.pi / 2)


class TruncatedNormalShare(CosineShare):
    """MAR's: N(`mean`, `std`^2) between `low` and `high`; little is known in all of training."""

    def __init__(self, mean: float = 1.0, std: float = 0.25, low: float = 0.7, high: float = 1.0):
        super().__init__()
        if not (0 <= low < high <= 1 and std > 0):
            raise PriorError(f"got std={std}, low={low}, high={high}; wanted std above 0 and 0 <= low < high <= 1.")
        self.normal = NormalDist(mean, std)
        self.low, self.high = low, high

    def forward(self, u: float) -> float:
        below, above = self.normal.cdf(self.low), self.normal.cdf(self.high)
        inside = min(max(below + u * (above - below), 1e-12), 1 - 1e-12)
        return min(max(self.normal.inv_cdf(inside), self.low), self.high)


class MaskedPrior(Prior):
    """Sets of latents in random order.

    Args:
        num_latents, latent_dim, vocabulary, caption_dropout: as `Prior`.
        backbone, head, condition: as `CausalPrior`.
        sets: steps of sampling, 1 (all at once) to K (one by one).
        order: only the random one makes sense here; it is an argument so that a config says so.
        word_sum: as `CausalPrior`.
        share: which share of the latents a training step hides (None: the cosine of sampling).
    """

    def __init__(
        self,
        num_latents: int,
        latent_dim: int,
        vocabulary: CaptionVocabulary | None,
        backbone: Backbone,
        head: Head,
        caption_dropout: float = 0.1,
        sets: int = 8,
        order: LearnedOrder | None = None,
        condition: Condition | None = None,
        word_sum: bool = False,
        share: CosineShare | None = None,
    ):
        super().__init__(num_latents, latent_dim, vocabulary, caption_dropout)
        words = words_of(vocabulary, condition, backbone.width)
        check_parts(head, backbone, latent_dim, words.context_length + num_latents)
        if order is not None and not isinstance(order, RandomOrder):
            raise PriorError(
                f"got order {type(order).__name__} for a MaskedPrior, which is trained on random sets; use RandomOrder,"
                " or a CausalPrior for a fixed order."
            )
        if not 1 <= sets <= num_latents:
            raise PriorError(f"got sets={sets} for {num_latents} latents, wanted 1 (all at once) to {num_latents}.")
        self.backbone, self.head, self.sets = backbone, head, sets
        self.share = CosineShare() if share is None else share
        self.order = RandomOrder() if order is None else order
        self.words = words
        self.latent_in = decayed(nn.Linear(latent_dim, backbone.width))
        self.hidden = embedding(backbone.width, std=WORD_STD)  # the token of a latent that is not known yet
        self.word_sum = WordSum(words) if word_sum else None

    def conditions(self, z: Tensor, known: Tensor, text: Text) -> Tensor:
        """Condition rows (B,K,D) of a line z (B,K,C) of which only `known` (B,K) bool is shown."""
        line = torch.where(known[..., None], self.latent_in(z.float()).to(self.hidden.dtype), self.hidden)  # (B,K,D)
        if self.word_sum is not None:
            line = line + self.word_sum(text.ids, text.text_mask)
        x = torch.cat([self.words(text.ids), line], dim=1)  # (B,L+K,D)
        n_words = text.ids.shape[1]
        positions = token_positions(n_words, self.words.context_length, self.num_latents, z.device)
        return self.backbone(x, positions, bidirectional_mask(text.text_mask, self.num_latents))[:, n_words:]

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        """(B,K): the loss of hidden latents times K/n and 0 for shown ones: the mean is that of the hidden."""
        z, k = self.check_latents(z), self.num_latents
        u = torch.rand((), generator=generator, device=z.device if generator is not None else "cpu").item()
        n = max(1, math.ceil(k * self.share(u)))
        hidden = self.order.permutation(len(z), k, z.device, generator)[:, :n]  # (B,n)
        known = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device).scatter(1, hidden, False)
        cond = gather_line(self.conditions(z, known, self.drop_captions(text, generator)), hidden)  # (B,n,D)
        loss = self.head.loss(cond.flatten(0, 1), gather_line(z, hidden).flatten(0, 1), generator)  # (B n,)
        return loss.new_zeros(z.shape[:2]).scatter(1, hidden, loss.unflatten(0, hidden.shape) * k / n)

    def set_sizes(self) -> list[int]:
        """How many latents every step fills in; at least one, K in all."""
        k = self.num_latents
        sizes: list[int] = []
        for step in range(self.sets):
            left = k - sum(sizes)
            hidden_after = math.floor(k * math.cos(math.pi / 2 * (step + 1) / self.sets))
            sizes.append(max(1, min(left - (self.sets - step - 1), left - hidden_after)))
        return sizes

    @torch.no_grad()
    def sample(
        self,
        captions: list[str],
        guidance: float | Guidance = 2.0,
        steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
        prefix: Tensor | None = None,
        num_latents: int | None = None,
        negative: str | list[str] | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """As `Prior.sample`; of a guidance schedule, a set takes the mean over its places in the order.

        known: (B,p) bool, True where a latent of `prefix` is given; the others are drawn like those behind it, so that
        any part of a line can be filled in. None: all of the prefix is given.
        """
        request = self.request(captions, guidance, temperature, prefix, num_latents, known, negative)
        request.steps, request.solver, request.generator = steps, solver, generator
        with self.autocast():
            return self.draw(request)

    def draw(self, request: Request) -> Tensor:
        m, n, device, plan = (
            request.captions,
            request.num_latents,
            request.text.ids.device,
            self.head.plan(request.steps, request.solver),
        )
        left = self.num_latents - request.known.shape[1]
        known = F.pad(request.known, (0, left))  # (B,K)
        z = F.pad(request.prefix, (0, 0, 0, left)) * known[..., None]  # (B,K,C)
        order = self.order.permutation(m, self.num_latents, device, request.generator, cuts=(n,))
        order = gather_line(
            order, gather_line(~known, order).long().argsort(dim=1, stable=True)
        )  # the given ones first
        done, twins = int(known.sum(1).min()), len(request.text.ids) // m
        for end in self.set_ends():
            chosen = order[:, done : min(end, n)]  # (B,s)
            if not chosen.shape[1]:
                continue
            rows = self.conditions(z.repeat(twins, 1, 1), known.repeat(twins, 1), request.text)
            cond = gather_line(rows, chosen.repeat(twins, 1)).flatten(0, 1)  # (B s,D), then those of the twins
            size = chosen.shape[1]
            drawn = self.head.sample(
                cond[: m * size],
                cond[m * size :] if twins > 1 else None,
                sum(request.scales[done : done + size]) / size,
                interval=request.interval,
                plan=plan,
                temperature=request.temperature,
                generator=request.generator,
            ).unflatten(0, (m, size))
            drawn = torch.where(known.gather(1, chosen)[..., None], gather_line(z, chosen), drawn)  # more given here
            z = z.scatter(1, chosen[..., None].expand(-1, -1, self.latent_dim), drawn)
            known = known.scatter(1, chosen, True)
            done += size
        return z[:, :n]

    def set_ends(self) -> list[int]:
        """How many latents are known after every set."""
        return list(accumulate(self.set_sizes()))

    def score(self, z: Tensor, text: Text, steps: int) -> Tensor:
        """Of drawing one by one in the order of the line: K runs of the transformer.

        Other orders and larger sets are other factorisations, whose densities differ by what the network gets wrong.
        """
        check_density(self.head)
        at = torch.arange(self.num_latents, device=z.device)
        rows = [self.conditions(z, (at < i).expand(len(z), -1), text)[:, i] for i in range(self.num_latents)]
        cond = torch.stack(rows, dim=1).flatten(0, 1)  # (B K,D)
        return self.head.log_prob(cond, z.flatten(0, 1).float(), steps).unflatten(0, z.shape[:2])  # (B,K)

    def num_evaluations(self, steps: int | None = None, solver: Solver | None = None) -> int:
        return self.head.plan(steps, solver).num_evaluations

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        self.head.prepare(data, tokenizer)
        return super().prepare(data, tokenizer)
