"""Text in the same line: a causal prior that also reads a line of latents out as its caption.

    [null word | start, z_1, ..., z_K | start of text, word, word, ...]    each word is asked for from all before it

Trailing words see the whole line and the words before them; no latent sees a trailing word, so the distribution of
latents is untouched but for the shared weights. The leading caption is replaced by the null word in these rows:
otherwise reading out would be copying.

Letters: B batch, K latents, C latent channels, L caption tokens, D width, V rows of the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed, embedding
from stage1_tokenizer.text.vocabulary import END, PAD, START, CaptionVocabulary
from stage2_prior.backbone import Backbone
from stage2_prior.conditions import WORD_STD, CaptionWords, Condition
from stage2_prior.heads.base import Head
from stage2_prior.latent_space import PriorError
from stage2_prior.orders import LearnedOrder, causal_mask, gather_line
from stage2_prior.prior import CausalPrior
from stage2_prior.request import Text


class CaptioningPrior(CausalPrior):
    """A causal prior with a caption after the line.

    Args:
        num_latents, latent_dim, vocabulary, backbone, head, caption_dropout, order, context_noise: as `CausalPrior`;
            the backbone needs room for two captions and the line.
        caption_weight: factor of the cross-entropy (nats per token) beside the head's loss.
        caption_share: share of a batch that is read out in a training step.
        latent_weight: factor of the head's loss; 0 leaves it out, for the question what learning to draw does for
            learning to read.
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
        caption_weight: float = 0.1,
        caption_share: float = 0.25,
        latent_weight: float = 1.0,
        condition: Condition | None = None,
    ):
        if condition is not None or vocabulary is None:
            raise PriorError(
                f"got condition {type(condition).__name__} for a CaptioningPrior, which reads lines out in the words of"
                " its own vocabulary; give it a `vocabulary`, or use a CausalPrior for another `condition`."
            )
        super().__init__(num_latents, latent_dim, vocabulary, backbone, head, caption_dropout, order, context_noise)
        self.vocabulary: CaptionVocabulary
        self.words: CaptionWords
        need = 2 * vocabulary.context_length + num_latents + 1
        if backbone.max_tokens < need:
            raise PriorError(f"backbone.max_tokens is {backbone.max_tokens}, wanted {need} for a caption at both ends.")
        if min(caption_weight, latent_weight) < 0 or not caption_weight + latent_weight > 0:
            raise PriorError(
                f"got caption_weight={caption_weight}, latent_weight={latent_weight}; want at least 0, and not both 0."
            )
        if not 0 < caption_share <= 1:
            raise PriorError(f"got caption_share={caption_share}, wanted a share above 0 and up to 1.")
        self.caption_weight, self.caption_share, self.latent_weight = caption_weight, caption_share, latent_weight
        self.spoken = embedding(backbone.width, std=WORD_STD)  # says that a word is one of the trailing caption
        self.next_word = decayed(nn.Linear(backbone.width, vocabulary.rows))
        nn.init.zeros_(self.next_word.weight)

    def objective(
        self, z: Tensor, text: Text, generator: torch.Generator | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        parts = {}
        if self.latent_weight:
            parts = {"latents": self.latent_weight * super().objective(z, text, generator, weights)["latents"]}
        n = max(1, round(self.caption_share * len(z)))
        chosen = Text(text.ids[:n], text.text_mask[:n])
        return parts | {"caption": self.caption_weight * self.caption_losses(z[:n], chosen, generator).mean()}

    def caption_losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        """z (B,K,C), its captions -> (B,) cross-entropy in nats per token of the caption after the line."""
        hidden = self.backbone(*self.sequence(self.check_latents(z), text.ids[:, :-1], generator))
        logits = self.next_word(hidden[:, self.num_latents + 2 :]).float()  # (B,L-1,V)
        target = text.ids[:, 1:].masked_fill(text.ids[:, 1:] == self.null, PAD)  # a dropped caption has nothing to say
        each = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=PAD, reduction="none")  # (B,L-1)
        return each.sum(1) / (target != PAD).sum(1).clamp(min=1)

    def figures(self, z: Tensor, text: Text) -> dict[str, Tensor]:
        """`caption`: cross-entropy in nats per token."""
        return {"caption": self.caption_losses(z, text)}

    def sequence(
        self, z: Tensor, ids: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B,n,D), positions (n,) and mask of [null | start, line | ids], n = 2 + K + L."""
        order = self.order.permutation(len(z), self.num_latents, z.device, generator)
        line = self.latent_in(gather_line(z, order).float()).to(self.start.dtype)  # (B,K,D)
        if self.target is not None:
            line = line + self.target[order]  # which latent this is; as a context token it says which comes next
        words = self.words(ids) + self.spoken  # (B,L,D)
        null = self.words.weight[self.null].expand(len(z), 1, -1)
        x = torch.cat([null, self.start.expand(len(z), 1, -1), line, words], dim=1)
        tail = torch.arange(x.shape[1] - 1, device=z.device) + self.vocabulary.context_length
        positions = torch.cat([tail.new_zeros(1), tail])
        seen = torch.ones(len(z), 1, dtype=torch.bool, device=z.device)  # the null word
        return x, positions, causal_mask(seen, x.shape[1] - 1)

    @torch.no_grad()
    def caption(self, z: Tensor) -> list[str]:
        """z (B,K,C) standardised -> the most likely caption of each line, word by word."""
        with self.autocast():
            return self.read_out(self.check_latents(z))

    def read_out(self, z: Tensor) -> list[str]:
        length = self.vocabulary.context_length
        ids = torch.full((len(z), 1), START, device=z.device)
        generator = torch.Generator(device=z.device).manual_seed(0)  # of an order that varies
        x, positions, mask = self.sequence(z, ids, generator)
        cache = self.backbone.new_cache(len(z), x.shape[1] + length)
        hidden = self.backbone(x, positions, mask, cache)[:, -1]
        for at in range(length - 1):
            word = self.next_word(hidden).argmax(dim=-1, keepdim=True)  # (B,1)
            ids = torch.cat([ids, word], dim=1)
            if bool((ids == END).any(dim=1).all()):
                break
            token = self.words(word) + self.spoken
            hidden = self.backbone(token, positions[-1:] + at + 1, None, cache)[:, -1]
        return self.vocabulary.decode(ids)
