"""The causal prior: caption -> a line of latents, drawn one after another; and how likely a given line is.

    caption --condition--> words (bidirectional) | start, z_1, ..., z_{K-1} (causal) --backbone--> cond_1 ... cond_K
    cond_i --head--> z_i          training: head.loss(cond_i, z_i)          sampling: head.sample(cond_i), with a cache

The caption's words are a prefix of the same sequence instead of one pooled vector: attributes then find their object.
What the words are (an embedding of the prior's own, a text tower's features, a class, nothing) is up to `conditions`.
Words see all words, latents see all words and earlier latents, padding is seen by none.

Guided and unguided rows are two rows of one batch that share every sampled latent (a test asserts it); where no scale
differs from 1 only the conditional rows exist, so that w = 1 *is* conditional sampling, bit for bit.

An order may put latents into sets (`orders.SetOrder`): those of a set are drawn at once, by one run of the transformer.

Letters: B batch, K latents, C latent channels, L caption tokens, D width, R rows of a batch with unconditional twins.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed, embedding
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.backbone import Backbone, Cache, recorded
from stage2_prior.base import Prior
from stage2_prior.conditions import WORD_STD, Condition, TrainingData, WordSum, words_of
from stage2_prior.heads.base import Head
from stage2_prior.heads.solvers import Solver
from stage2_prior.latent_space import PriorError
from stage2_prior.orders import LearnedOrder, gather_line, scatter_line
from stage2_prior.request import Request, States, Text

__all__ = ["CausalPrior", "Prior", "PriorError", "Text"]


class CausalPrior(Prior):
    """One latent, or one set of the order, after another.

    Args:
        num_latents, latent_dim, vocabulary, caption_dropout: as `Prior`.
        condition: what captions become, in place of a vocabulary.
        backbone: transformer with room for the caption's and the line's tokens.
        head: distribution of one latent given its condition row.
        order: which position is modelled when, and which together (None: the tokenizer's order, one by one).
        context_noise: in training, the latents that later ones see carry noise of a standard deviation drawn up to this
            (the model is told how much), so that its own small errors are nothing new to it when it samples.
        word_sum: also add the sum of the caption's words to every token of the line (see `WordSum`): for captions with
            words that are rare and yet decide.
    """

    def __init__(
        self,
        num_latents: int,
        latent_dim: int,
        vocabulary: CaptionVocabulary | None,
        backbone: Backbone,
        head: Head,
        caption_dropout: float = 0.1,
        order: LearnedOrder | None = None,
        context_noise: float = 0.0,
        condition: Condition | None = None,
        word_sum: bool = False,
    ):
        super().__init__(num_latents, latent_dim, vocabulary, caption_dropout)
        words = words_of(vocabulary, condition, backbone.width)
        check_parts(head, backbone, latent_dim, words.context_length + num_latents)
        if not 0 <= context_noise < float("inf"):
            raise PriorError(f"got context_noise={context_noise}, wanted a standard deviation of at least 0.")
        self.backbone, self.head, self.context_noise = backbone, head, context_noise
        self.order = LearnedOrder() if order is None else order
        self.order.positions(num_latents)  # raises if the order is for another line
        self.sets = self.order.sets(num_latents)
        self.words = words
        self.start = embedding(backbone.width, std=WORD_STD)
        self.latent_in = decayed(nn.Linear(latent_dim, backbone.width))
        # Where the order varies, a token must be told which position comes next; where it is fixed, its place says so.
        self.target = embedding(num_latents, backbone.width, std=WORD_STD) if self.order.varies else None
        self.noise_level = embedding(backbone.width) if context_noise else None
        self.word_sum = WordSum(words) if word_sum else None

    # -- training -----------------------------------------------------------------------------------------------------

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        z = self.check_latents(z)
        order = self.order.permutation(len(z), self.num_latents, z.device, generator)  # (B,K)
        line = gather_line(z, order)
        text = self.drop_captions(text, generator)
        cond = self.line_conditions(line, text, order, generator, noisy=self.training)  # (B,K,D)
        loss = self.head.loss(cond.flatten(0, 1), line.flatten(0, 1), generator).unflatten(0, z.shape[:2])
        return scatter_line(loss, order)  # (B,K)

    def conditions(self, z: Tensor, text: Text) -> Tensor:
        """Condition rows of a whole line in a fixed order, by position: row i sees caption and sets before its own."""
        order = self.order.permutation(len(z), self.num_latents, z.device)
        return scatter_line(self.line_conditions(gather_line(z, order), text, order), order)  # (B,K,D)

    @torch.no_grad()
    def states(self, z: Tensor) -> States:
        order = self.order.permutation(len(z), self.num_latents, z.device)
        line = gather_line(self.check_latents(z), order)
        with self.autocast(), recorded(self.backbone) as stream:
            self.line_conditions(line, self.nothing(len(z)), order)
        starts = [end - size for end, size in zip(accumulate(self.sets), self.sets, strict=True)]
        read = [start for start, size in zip(starts, self.sets, strict=True) for _ in range(size)]
        return States(torch.stack(stream)[:, :, 1:], line, read)

    def line_conditions(
        self, line: Tensor, text: Text, order: Tensor, generator: torch.Generator | None = None, noisy: bool = False
    ) -> Tensor:
        """Condition rows in the order of modelling, of a line (B,K,C) in that order -> (B,K,D).

        noisy: with the context noise of training, if there is any.
        """
        context = line[:, : -self.sets[-1]].float()
        sigma: Tensor | None = None
        if noisy and self.noise_level is not None:
            sigma = self.context_noise * torch.rand(len(line), 1, 1, generator=generator, device=line.device)
            context = context + sigma * torch.randn(context.shape, generator=generator, device=line.device)
        tokens = self.latent_in(context)
        if sigma is not None and self.noise_level is not None:
            tokens = tokens + sigma * self.noise_level
        tokens = self.line_tokens(tokens)  # (B,K,D)
        if self.target is not None:
            tokens = tokens + self.target[order]
        if self.word_sum is not None:
            tokens = tokens + self.word_sum(text.ids, text.text_mask)
        x = torch.cat([self.words(text.ids), tokens], dim=1)  # (B,L+K,D)
        n_words = text.ids.shape[1]
        mask = self.order.mask(text.text_mask, self.num_latents)
        return self.backbone(x, self.token_positions(n_words), mask)[:, n_words:]  # (B,K,D)

    def line_tokens(self, latents: Tensor) -> Tensor:
        """Embedded latents (B,n,D) of whole sets -> the tokens of these sets and of the one behind them."""
        start = self.start.expand(len(latents), self.sets[0], -1)
        return torch.cat([start, self.order.carry(latents).to(start.dtype)], dim=1)

    def token_positions(self, n_words: int) -> Tensor:
        """(L+K,) positions: words from 0, latents from `context_length`, however long the caption is."""
        return token_positions(n_words, self.words.context_length, self.num_latents, self.start.device)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def draw(self, request: Request) -> Tensor:
        m, n_words, device = request.captions, request.text.ids.shape[1], request.text.ids.device
        p, n, ends = request.prefix.shape[1], request.num_latents, list(accumulate(self.sets))
        plan = self.head.plan(request.steps, request.solver)
        order = self.order.permutation(m, self.num_latents, device, request.generator, cuts=(p, n))
        mask, positions = self.order.mask(request.text.text_mask, self.num_latents), self.token_positions(n_words)
        cache = self.read_words(request.text, m + 1 if request.twins_alike else 2 * m, mask, positions)
        words = None if self.word_sum is None else self.word_sum(request.text.ids, request.text.text_mask)  # (R,1,D)
        guided_until = max((i + 1 for i in range(p, n) if request.scales[i] != 1), default=p)
        given = gather_line(request.prefix, order[:, :p])  # (B,p,C)
        line, first = [given], bisect_right(ends, p)  # the first set that is not wholly given
        tokens = self.line_tokens(self.latent_in(given[:, : sum(self.sets[:first])]))  # of the sets up to it
        for index in range(first, bisect_left(ends, n) + 1 if p < n else first):
            end, begin = ends[index], ends[index] - self.sets[index]
            start, stop = max(begin, p), min(end, n)  # what is drawn of this set
            if begin >= guided_until:  # nothing from here on asks for the unconditional twins
                cache, mask = cache.keep_rows(m), mask[:m]
            if self.target is not None:
                tokens = tokens + self.target[order[:, end - tokens.shape[1] : end]]
            x = tokens.repeat(len(mask) // m, 1, 1)  # (R,.,D), twins share what is drawn
            if words is not None:
                x = x + words[: len(x)]
            seen, known = cache.length, n_words + end
            rows = self.backbone(x, positions[seen:known], mask[:, :, seen:known, :known], cache)
            cond = rows[:, x.shape[1] - (end - start) :][:, : stop - start]  # (R,s,D)
            drawn = self.head.sample(
                cond[:m].flatten(0, 1),
                cond[m:].flatten(0, 1) if len(cond) > m else None,
                sum(request.scales[start:stop]) / (stop - start),
                interval=request.interval,
                plan=plan,
                temperature=request.temperature,
                generator=request.generator,
            ).unflatten(0, (m, stop - start))  # (B,s,C)
            line.append(drawn)
            if end < n:
                latents = torch.cat([given[:, begin:], drawn], dim=1)  # (B,.,C) the whole set
                tokens = self.order.carry_on(self.latent_in(latents).to(self.start.dtype), index + 1)
        return scatter_line(torch.cat(line, dim=1), order[:, :n])  # (B,n,C)

    def read_words(self, text: Text, distinct: int, mask: Tensor, positions: Tensor) -> Cache:
        """A cache with room for the line, filled with the words of every row (words see nothing else).

        Rows from the `distinct`-th on are all alike (unconditional twins): one of them is computed.
        """
        rows, n_words = text.ids.shape
        distinct = min(rows, distinct)
        cache = self.backbone.new_cache(distinct, n_words + self.num_latents)
        words = self.words(text.ids[:distinct])  # (distinct,L,D)
        self.backbone(words, positions[:n_words], mask[:distinct, :, :n_words, :n_words], cache)
        return cache if rows == distinct else cache.repeat_last(rows - distinct)

    def num_evaluations(self, steps: int | None = None, solver: Solver | None = None) -> int:
        return self.head.plan(steps, solver).num_evaluations

    def score(self, z: Tensor, text: Text, steps: int) -> Tensor:
        """With an order that varies, the chain rule holds for any order; the tokenizer's is taken."""
        check_density(self.head)
        fixed = LearnedOrder() if self.order.varies else self.order
        order = fixed.permutation(len(z), self.num_latents, z.device)
        line = gather_line(z, order)
        cond = self.line_conditions(line, text, order).flatten(0, 1)  # (B K,D)
        nats = self.head.log_prob(cond, line.flatten(0, 1).float(), steps).unflatten(0, z.shape[:2])
        return scatter_line(nats, order)  # (B,K)

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        self.head.prepare(data, tokenizer)
        return super().prepare(data, tokenizer)


def token_positions(n_words: int, context_length: int, n_line: int, device: torch.device) -> Tensor:
    """(n_words + n_line,) positions: words from 0, line tokens from `context_length`, however long the caption is."""
    line = torch.arange(n_line, device=device) + context_length
    return torch.cat([torch.arange(n_words, device=device), line])


def check_density(head: Head) -> None:
    """Raises PriorError unless `head` has a density."""
    if not head.has_density:
        raise PriorError(f"got a {type(head).__name__} for log_prob, wanted a head with a density, such as FlowHead.")


def check_parts(head: Head, backbone: Backbone, latent_dim: int, tokens: int) -> None:
    """Raises PriorError unless head and backbone fit each other, the latents, and a sequence of `tokens`."""
    if (head.latent_dim, head.cond_dim) != (latent_dim, backbone.width):
        raise PriorError(
            f"head takes latents of {head.latent_dim} and conditions of {head.cond_dim}, but latent_dim is"
            f" {latent_dim} and backbone.width is {backbone.width}; make them equal."
        )
    if backbone.max_tokens < tokens:
        raise PriorError(
            f"backbone.max_tokens is {backbone.max_tokens}, but caption and line can have {tokens} tokens; raise it."
        )
