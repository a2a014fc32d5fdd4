"""Priors: caption -> an ordered line of latents, drawn one after another; and how likely a given line is.

    caption --vocabulary--> words (bidirectional) | start, z_1, ..., z_{K-1} (causal) --backbone--> cond_1 ... cond_K
    cond_i --head--> z_i          training: head.loss(cond_i, z_i)          sampling: head.sample(cond_i), with a cache

The caption's words are a prefix of the same sequence instead of one pooled vector: attributes then find their object.
Words see all words, latents see all words and earlier latents, nobody sees padding. An unconditional row has one
learned null word in place of a caption; in training a share of the captions is replaced by it.

Guided and unguided rows are two rows of one batch that share every sampled latent (a test asserts it); where no scale
differs from 1 only the conditional rows exist, so that w = 1 *is* conditional sampling, bit for bit.

A prior belongs to one latent space. It keeps the tokenizer's fingerprint, and refuses latents or a tokenizer of another
shape or with other statistics.

Letters: B batch, K latents, C latent channels, L caption tokens, D width.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stage1_tokenizer.export import load_module, push_module, save_module
from stage1_tokenizer.layers import embedding
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.vocabulary import CaptionVocabulary
from stage2_prior.backbone import Backbone
from stage2_prior.guidance import Guidance
from stage2_prior.heads import FlowHead, Head
from stage2_prior.likelihood import flow_log_prob

WORD_STD = 0.7
FINGERPRINT_LENGTH = 16


class PriorError(ValueError):
    """Latents, captions or options that this prior cannot work with."""


class LatentSpace(Protocol):
    """What a prior asks of a tokenizer."""

    num_latents: int
    latent_dim: int

    @property
    def fingerprint(self) -> str: ...


class Text(NamedTuple):
    """Captions as the prior reads them: ids (B,L) long, text_mask (B,L) bool, True = a real token."""

    ids: Tensor
    text_mask: Tensor


class Prior(Spec, nn.Module):
    """Contract of all priors, and what they share: vocabulary, identity of the latent space, files, checks.

    Args:
        num_latents, latent_dim: K and C of the tokenizer.
        vocabulary: caption tokens; its rows are set by `fit_vocabulary` or taken from the tokenizer.
        caption_dropout: share of captions replaced by the null word in training (guidance needs it), in [0, 1].
    """

    fingerprint_bytes: Tensor

    def __init__(self, num_latents: int, latent_dim: int, vocabulary: CaptionVocabulary, caption_dropout: float):
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise PriorError(f"got caption_dropout={caption_dropout}, wanted a share from 0 to 1.")
        self.num_latents, self.latent_dim = num_latents, latent_dim
        self.vocabulary, self.caption_dropout = vocabulary, caption_dropout
        self.null = vocabulary.rows  # the id one past the vocabulary
        self.register_buffer("fingerprint_bytes", torch.zeros(FINGERPRINT_LENGTH, dtype=torch.uint8))

    # -- the contract -------------------------------------------------------------------------------------------------

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        """z (B,K,C) standardised, text of B captions -> (B,K) loss of each latent."""
        raise NotImplementedError

    def sample(
        self,
        captions: list[str],
        guidance: float | Guidance = 2.0,
        steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Captions -> z (B,K,C) float32, standardised.

        guidance: 1 is conditional, 0 unconditional, 1.5 to 3 usual; or a schedule over positions and times.
        steps: network evaluations of the head per latent (None: the head's default solver).
        temperature: factor on every normal draw, from 0 (no chance at all) upwards; 1 samples the model.
        generator: on the prior's device; the same state gives the same sample.
        Raises PriorError (a ValueError) for captions that are not strings, or options out of range.
        """
        raise NotImplementedError

    def evaluations(self, steps: int | None = None) -> int:
        """Network evaluations of the head per latent that `sample` would spend."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, captions: list[str], steps: int = 32) -> Tensor:
        """z (B,K,C), captions -> (B,K) nats per latent, log p(z_i | earlier latents, caption)."""
        raise NotImplementedError

    # -- the latent space ---------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer whose latents this prior models; empty before `bind`."""
        return bytes(self.fingerprint_bytes.tolist()).decode("ascii").strip("\0")

    def bind(self, num_latents: int, latent_dim: int, fingerprint: str) -> None:
        """Tie this prior to a latent space. Raises PriorError for another shape, no identity, or another space."""
        if not fingerprint:
            raise PriorError(
                "these latents carry no tokenizer fingerprint, so their statistics are unknown; write them with"
                " `python -m stage1_tokenizer predict`."
            )
        self.check_space(num_latents, latent_dim, fingerprint)
        code = fingerprint.encode("ascii")[:FINGERPRINT_LENGTH].ljust(FINGERPRINT_LENGTH, b"\0")
        self.fingerprint_bytes.copy_(torch.tensor(list(code), dtype=torch.uint8))

    def check(self, tokenizer: LatentSpace) -> None:
        """Raises PriorError unless `tokenizer` is the one whose latents this prior was trained on."""
        self.check_space(tokenizer.num_latents, tokenizer.latent_dim, tokenizer.fingerprint)

    def check_space(self, num_latents: int, latent_dim: int, fingerprint: str) -> None:
        if (num_latents, latent_dim) != (self.num_latents, self.latent_dim):
            raise PriorError(
                f"got latents of {num_latents} x {latent_dim}, wanted {self.num_latents} x {self.latent_dim};"
                " set num_latents and latent_dim of the prior to the tokenizer's."
            )
        if self.fingerprint and self.fingerprint != fingerprint[:FINGERPRINT_LENGTH]:
            raise PriorError(
                f"got latents of tokenizer {fingerprint}, wanted {self.fingerprint}: same shape, but other weights or"
                " statistics; encode with the tokenizer that this prior was trained on, or train a new prior."
            )

    def check_latents(self, z: Tensor) -> Tensor:
        if z.ndim != 3 or z.shape[1:] != (self.num_latents, self.latent_dim):
            wanted = f"(B, {self.num_latents}, {self.latent_dim})"
            raise PriorError(f"got latents of shape {tuple(z.shape)}, wanted {wanted}.")
        return z

    # -- captions -----------------------------------------------------------------------------------------------------

    def fit_vocabulary(self, captions: Iterable[str]) -> int:
        """Keep the most frequent tokens of `captions`; returns how many distinct tokens had no room."""
        return self.vocabulary.fit(captions)

    def encode_text(self, captions: list[str]) -> Text:
        """Captions -> ids and mask on the prior's device. Raises PriorError for what is no string or empty."""
        if isinstance(captions, str) or not captions:
            raise PriorError(f"got {captions!r:.40}, wanted a list of at least one caption.")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise PriorError(f"got the caption {caption!r:.40}, wanted a string with at least one word in it.")
        return self.trim(Text(*self.vocabulary.encode(captions)))

    @staticmethod
    def trim(text: Text) -> Text:
        """Cut columns that are padding in every row. On an accelerator, where that would wait for it, keep them."""
        if text.ids.device.type != "cpu":
            return text
        longest = int(text.text_mask.sum(1).max())
        return Text(text.ids[:, :longest], text.text_mask[:, :longest])

    def without_caption(self, text: Text, drop: Tensor) -> Text:
        """Replace the captions of rows where `drop` (B,) is True by the null word."""
        first = torch.zeros_like(text.text_mask)
        first[:, 0] = True
        ids = torch.where(drop[:, None], torch.full_like(text.ids, self.null), text.ids)
        return Text(ids, torch.where(drop[:, None], first, text.text_mask))

    def drop_captions(self, text: Text, generator: torch.Generator | None) -> Text:
        """In training, a random `caption_dropout` of the rows loses its caption."""
        if not self.training or self.caption_dropout == 0:
            return text
        u = torch.rand(len(text.ids), generator=generator, device=text.ids.device)
        return self.without_caption(text, u < self.caption_dropout)

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> Path:
        """Write config.json, model.safetensors and README.md to `folder`."""
        return save_module(self, folder, card)

    def push_to_hub(self, repo_id: str, card: str | None = None, **create: Any) -> str:
        """Export and upload to the Hub as `repo_id`; keyword arguments go to `HfApi.create_repo`."""
        return push_module(self, repo_id, card, **create)

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> "Prior":
        """Load an exported folder, or a Hub repository by id; in eval mode. Errors as `Tokenizer.from_pretrained`."""
        return load_module(cls, path, revision)


class CausalPrior(Prior):
    """One latent after another, in the tokenizer's order.

    Args:
        num_latents, latent_dim, vocabulary, caption_dropout: as `Prior`.
        backbone: transformer with room for the caption's and the line's tokens.
        head: distribution of one latent given its condition row.
    """

    def __init__(
        self,
        num_latents: int,
        latent_dim: int,
        vocabulary: CaptionVocabulary,
        backbone: Backbone,
        head: Head,
        caption_dropout: float = 0.1,
    ):
        super().__init__(num_latents, latent_dim, vocabulary, caption_dropout)
        if (head.latent_dim, head.cond_dim) != (latent_dim, backbone.width):
            raise PriorError(
                f"head takes latents of {head.latent_dim} and conditions of {head.cond_dim}, but latent_dim is"
                f" {latent_dim} and backbone.width is {backbone.width}; make them equal."
            )
        if backbone.max_tokens < vocabulary.context_length + num_latents:
            raise PriorError(
                f"backbone.max_tokens is {backbone.max_tokens}, wanted at least context_length + num_latents ="
                f" {vocabulary.context_length + num_latents}."
            )
        self.backbone, self.head = backbone, head
        self.words = nn.Embedding(vocabulary.rows + 1, backbone.width)  # the last row is the null word
        nn.init.normal_(self.words.weight, std=WORD_STD)
        self.start = embedding(backbone.width, std=WORD_STD)
        self.latent_in = nn.Linear(latent_dim, backbone.width)

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        z = self.check_latents(z)
        cond = self.conditions(z, self.drop_captions(text, generator))  # (B,K,D)
        return self.head.loss(cond.flatten(0, 1), z.flatten(0, 1), generator).unflatten(0, z.shape[:2])  # (B,K)

    def conditions(self, z: Tensor, text: Text) -> Tensor:
        """Condition rows of all latents at once: row i sees the caption and z[:, :i]. z (B,K,C) -> (B,K,D)."""
        line = torch.cat([self.start.expand(len(z), 1, -1), self.latent_in(z[:, :-1].float())], dim=1)  # (B,K,D)
        x = torch.cat([self.words(text.ids), line.to(self.start.dtype)], dim=1)  # (B,L+K,D)
        n_words = text.ids.shape[1]
        return self.backbone(x, self.token_positions(n_words), self.visible(text))[:, n_words:]  # (B,K,D)

    def token_positions(self, n_words: int) -> Tensor:
        """(L+K,) positions: words from 0, latents from `context_length`, however long the caption is."""
        device = self.start.device
        latents = torch.arange(self.num_latents, device=device) + self.vocabulary.context_length
        return torch.cat([torch.arange(n_words, device=device), latents])

    def visible(self, text: Text) -> Tensor:
        """(B,1,L+K,L+K) mask, True = visible: real words for everyone, latents for themselves and later ones."""
        batch, n_words = text.ids.shape
        n = n_words + self.num_latents
        rows = torch.arange(n, device=text.ids.device)
        latents = (rows[:, None] >= rows) & (rows >= n_words)  # (n,n)
        words = torch.cat([text.text_mask, text.text_mask.new_zeros(batch, self.num_latents)], dim=1)  # (B,n)
        return (words[:, None, :] | latents)[:, None]

    @torch.no_grad()
    def sample(
        self,
        captions: list[str],
        guidance: float | Guidance = 2.0,
        steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if not 0 <= temperature < float("inf"):
            raise PriorError(f"got temperature={temperature}, wanted a finite number of at least 0.")
        schedule = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        scales = schedule.scales(self.num_latents)
        plan = self.head.plan(steps)
        text, m = self.encode_text(captions), len(captions)
        nobody = self.without_caption(text, torch.ones(m, dtype=torch.bool, device=text.ids.device))
        if not any(scales):  # unconditional throughout: the null word takes the caption's place
            text, scales = self.trim(nobody), [1.0] * self.num_latents
        guided_until = max((i + 1 for i, w in enumerate(scales) if w != 1), default=0)
        if guided_until:  # rows m..2m are the same captions' unconditional twins
            text = Text(torch.cat([text.ids, nobody.ids]), torch.cat([text.text_mask, nobody.text_mask]))
        n_words, rows = text.ids.shape[1], len(text.ids)
        mask, positions = self.visible(text), self.token_positions(n_words)
        cache = self.backbone.new_cache(rows, n_words + self.num_latents)
        x = torch.cat([self.words(text.ids), self.start.expand(rows, 1, -1)], dim=1)  # (R,L+1,D)
        line: list[Tensor] = []
        for i in range(self.num_latents):
            end = n_words + i + 1
            cond = self.backbone(x, positions[cache.length : end], mask[:, :, cache.length : end, :end], cache)[:, -1]
            z_i = self.head.sample(
                cond[:m],
                cond[m:] if len(cond) > m else None,
                scales[i],
                interval=schedule.interval,
                plan=plan,
                temperature=temperature,
                generator=generator,
            )  # (B,C)
            line.append(z_i)
            if i + 1 == guided_until:  # nothing later asks for the unconditional twins
                cache, mask = cache.keep_rows(m), mask[:m]
            shared = z_i if len(mask) == m else torch.cat([z_i, z_i])
            x = self.latent_in(shared).to(self.start.dtype)[:, None]  # (R,1,D)
        return torch.stack(line, dim=1)  # (B,K,C)

    def evaluations(self, steps: int | None = None) -> int:
        return self.head.plan(steps).evaluations

    @torch.no_grad()
    def log_prob(self, z: Tensor, captions: list[str], steps: int = 32) -> Tensor:
        """As `Prior.log_prob`; exact up to the solver, whose error `likelihood.flow_log_prob` describes."""
        if not isinstance(self.head, FlowHead):
            raise PriorError(f"got a {type(self.head).__name__}, wanted a FlowHead: only its density is known here.")
        if len(z) != len(captions):
            raise PriorError(f"got {len(z)} lines of latents and {len(captions)} captions, wanted as many of each.")
        z = self.check_latents(z)
        cond = self.conditions(z, self.encode_text(captions)).flatten(0, 1)  # (B K,D)
        return flow_log_prob(self.head, cond, z.flatten(0, 1).float(), steps).unflatten(0, z.shape[:2])
