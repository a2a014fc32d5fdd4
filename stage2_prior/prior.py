"""The causal prior: caption -> a line of latents, drawn one after another; and how likely a given line is.

    caption --condition--> words (bidirectional) | start, z_1, ..., z_{K-1} (causal) --backbone--> cond_1 ... cond_K
    cond_i --head--> z_i          training: head.loss(cond_i, z_i)          sampling: head.sample(cond_i), with a cache

The caption's words are a prefix of the same sequence instead of one pooled vector: attributes then find their object.
What the words are (an embedding of the prior's own, a text tower's features, a class, nothing) is up to `conditions`.
Words see all words, latents see all words and earlier latents, nobody sees padding.

Guided and unguided rows are two rows of one batch that share every sampled latent (a test asserts it); where no scale
differs from 1 only the conditional rows exist, so that w = 1 *is* conditional sampling, bit for bit.

Letters: B batch, K latents, C latent channels, L caption tokens, D width, R rows of a batch with unconditional twins.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed, embedding
from stage1_tokenizer.vocabulary import CaptionVocabulary
from stage2_prior.backbone import Backbone, Cache
from stage2_prior.cast_once import cast_once
from stage2_prior.conditions import WORD_STD, Condition, WordSum, words_of
from stage2_prior.contract import Prior, PriorError, Text
from stage2_prior.guidance import Guidance
from stage2_prior.heads import FlowHead, Head
from stage2_prior.likelihood import flow_log_prob
from stage2_prior.orders import LearnedOrder, causal_mask, gather_line, scatter_line

__all__ = ["CausalPrior", "Prior", "PriorError", "Text"]


class CausalPrior(Prior):
    """One latent after another.

    Args:
        num_latents, latent_dim, vocabulary, caption_dropout: as `Prior`.
        condition: what captions become, in place of a vocabulary.
        backbone: transformer with room for the caption's and the line's tokens.
        head: distribution of one latent given its condition row.
        order: which position is modelled when (None: the tokenizer's order).
        context_noise: in training, the latents that later ones see carry noise of a standard deviation drawn up to this
            (the model is told how much), so that its own small errors are nothing new to it when it samples.
        word_sum: also add the sum of the caption's words to every token of the line (see `WordSum`): for captions with
            words that are rare and yet decide.
        pause_tokens: learned tokens between the caption and the line that answer nothing (Goyal et al. 2024, "Think
            before you speak"). The first latent of an ordered line holds most of the picture and is asked for first:
            each gives it another row of every layer to work in.
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
        pause_tokens: int = 0,
    ):
        super().__init__(num_latents, latent_dim, vocabulary, caption_dropout)
        words = words_of(vocabulary, condition, backbone.width)
        if pause_tokens < 0:
            raise PriorError(f"got pause_tokens={pause_tokens}, wanted a number of tokens, 0 for none.")
        check_parts(head, backbone, latent_dim, words.context_length + pause_tokens + num_latents)
        if not 0 <= context_noise < float("inf"):
            raise PriorError(f"got context_noise={context_noise}, wanted a standard deviation of at least 0.")
        self.backbone, self.head, self.context_noise = backbone, head, context_noise
        self.order = LearnedOrder() if order is None else order
        self.order.positions(num_latents)  # raises if the order is for another line
        self.words = words
        self.start = embedding(backbone.width, std=WORD_STD)
        self.latent_in = decayed(nn.Linear(latent_dim, backbone.width))
        # Where the order varies, a token must be told which position comes next; where it is fixed, its place says so.
        self.target = embedding(num_latents, backbone.width, std=WORD_STD) if self.order.varies else None
        self.noise_level = embedding(backbone.width) if context_noise else None
        self.word_sum = WordSum(words) if word_sum else None
        self.pauses = embedding(pause_tokens, backbone.width, std=WORD_STD) if pause_tokens else None  # (P,D)

    # -- training -----------------------------------------------------------------------------------------------------

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        z = self.check_latents(z)
        order = self.order.permutation(len(z), self.num_latents, z.device, generator)  # (B,K)
        line = gather_line(z, order)
        said = self.drop_captions(text, generator)
        cond = self.line_conditions(line, said, order, generator, noisy=self.training)  # (B,K,D)
        loss = self.head.loss(cond.flatten(0, 1), line.flatten(0, 1), generator).unflatten(0, z.shape[:2])
        return scatter_line(loss, order)  # (B,K)

    def conditions(self, z: Tensor, text: Text) -> Tensor:
        """Condition rows of a whole line in a fixed order, by position: row i sees the caption and what precedes i."""
        order = self.order.permutation(len(z), self.num_latents, z.device)
        return scatter_line(self.line_conditions(gather_line(z, order), text, order), order)  # (B,K,D)

    def line_conditions(
        self, line: Tensor, text: Text, order: Tensor, generator: torch.Generator | None = None, noisy: bool = False
    ) -> Tensor:
        """Condition rows in the order of modelling, of a line (B,K,C) in that order -> (B,K,D).

        noisy: with the context noise of training, if there is any.
        """
        context = line[:, :-1].float()
        sigma: Tensor | None = None
        if noisy and self.noise_level is not None:
            sigma = self.context_noise * torch.rand(len(line), 1, 1, generator=generator, device=line.device)
            context = context + sigma * torch.randn(context.shape, generator=generator, device=line.device)
        tokens = self.latent_in(context)
        if sigma is not None and self.noise_level is not None:
            tokens = tokens + sigma * self.noise_level
        tokens = torch.cat([self.start.expand(len(line), 1, -1), tokens.to(self.start.dtype)], dim=1)  # (B,K,D)
        if self.target is not None:
            tokens = tokens + self.target[order]
        if self.word_sum is not None:
            tokens = tokens + self.word_sum(text.ids, text.text_mask)
        x = torch.cat([self.asked(text.ids), tokens], dim=1)  # (B,L+P+K,D)
        return self.backbone(x, *self.layout(text))[:, -self.num_latents :]  # (B,K,D)

    def asked(self, ids: Tensor) -> Tensor:
        """ids (B,L) -> (B,L+P,D): what stands before the line, words and pauses."""
        words = self.words(ids)
        return words if self.pauses is None else torch.cat([words, self.pauses.expand(len(ids), -1, -1)], dim=1)

    def layout(self, text: Text) -> tuple[Tensor, Tensor]:
        """(L+P+K,) positions and (B,1,L+P+K,L+P+K) mask. Words from 0, however long the caption is, the rest from
        `context_length`; a pause sees what a latent in its place would."""
        n_words, pauses = text.ids.shape[1], 0 if self.pauses is None else len(self.pauses)
        n_line = pauses + self.num_latents
        positions = token_positions(n_words, self.words.context_length, n_line, self.start.device)
        return positions, causal_mask(text.text_mask, n_line)

    # -- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @cast_once
    def sample(
        self,
        captions: list[str],
        guidance: float | Guidance = 2.0,
        steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        text, scales, interval = self.guided_text(captions, guidance, temperature)
        m, rows = len(captions), len(text.ids)
        guided_until = max((i + 1 for i, w in enumerate(scales) if w != 1), default=0)
        plan, order = self.head.plan(steps), self.order.permutation(m, self.num_latents, text.ids.device, generator)
        positions, mask = self.layout(text)
        cache = self.read_words(text, m, mask, positions)
        said = None if self.word_sum is None else self.word_sum(text.ids, text.text_mask)  # (R,1,D)
        x = self.start.detach().expand(rows, 1, -1)
        line: list[Tensor] = []
        for i in range(self.num_latents):
            if self.target is not None:
                x = x + self.target[order[:, i]].repeat(len(x) // m, 1)[:, None]
            if said is not None:
                x = x + said[: len(x)]
            seen, end = cache.length, cache.length + 1
            cond = self.backbone(x, positions[seen:end], mask[:, :, seen:end, :end], cache)[:, -1]  # (R,D)
            z_i = self.head.sample(
                cond[:m],
                cond[m:] if len(cond) > m else None,
                scales[i],
                interval=interval,
                plan=plan,
                temperature=temperature,
                generator=generator,
            )  # (B,C)
            line.append(z_i)
            if i + 1 == guided_until:  # nothing later asks for the unconditional twins
                cache, mask = cache.keep_rows(m), mask[:m]
            x = self.latent_in(z_i).to(self.start.dtype).repeat(len(mask) // m, 1)[:, None]  # (R,1,D), twins share z_i
        return scatter_line(torch.stack(line, dim=1), order)  # (B,K,C)

    def read_words(self, text: Text, captions: int, mask: Tensor, positions: Tensor) -> Cache:
        """A cache with room for the line, filled with the words and pauses of every row (they see nothing else).

        Unconditional twins, the rows behind the first `captions`, all say the same: one of them is computed.
        """
        rows, distinct = len(text.ids), min(len(text.ids), captions + 1)
        asked = self.asked(text.ids[:distinct])  # (captions + 1,L+P,D)
        n = asked.shape[1]
        cache = self.backbone.new_cache(distinct, n + self.num_latents)
        self.backbone(asked, positions[:n], mask[:distinct, :, :n, :n], cache)
        return cache if rows == distinct else cache.repeat_last(rows - distinct)

    def evaluations(self, steps: int | None = None) -> int:
        return self.head.plan(steps).evaluations

    @torch.no_grad()
    def log_prob(self, z: Tensor, captions: list[str], steps: int = 32) -> Tensor:
        """As `Prior.log_prob`, exact up to the solver.

        With an order that varies, the chain rule holds for any order; the tokenizer's is taken.
        """
        head = flow_head(self.head)
        z, text = self.check_pairs(z, captions)
        fixed = LearnedOrder() if self.order.varies else self.order
        order = fixed.permutation(len(z), self.num_latents, z.device)
        line = gather_line(z, order)
        cond = self.line_conditions(line, text, order).flatten(0, 1)  # (B K,D)
        found = flow_log_prob(head, cond, line.flatten(0, 1).float(), steps).unflatten(0, z.shape[:2])
        return scatter_line(found, order)  # (B,K)


def token_positions(n_words: int, context_length: int, n_line: int, device: torch.device) -> Tensor:
    """(n_words + n_line,) positions: words from 0, line tokens from `context_length`, however long the caption is."""
    line = torch.arange(n_line, device=device) + context_length
    return torch.cat([torch.arange(n_words, device=device), line])


def flow_head(head: Head) -> FlowHead:
    """`head`, whose density is asked for. Raises PriorError where it has none that is known here."""
    if not isinstance(head, FlowHead):
        raise PriorError(f"got a {type(head).__name__}, wanted a FlowHead: only its density is known here.")
    return head


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
