"""Text supervision of prefixes: a small open_clip text tower, and losses that read the first k latents.

The order of the latents is decided by which of them a loss can see. A contrastive loss on *short prefixes*, weighted
down as k grows, puts what a caption describes into the first latents; on the full length (`lengths=[K]`) the meaning
could sit anywhere. Captions are targets and never an input of the decoder: there they would unload meaning from the
latents.

`GradientBalance` bounds what this costs: the gradient that text sends into the latents is rescaled to a fixed share of
the gradient that pixels send, so that neither a loss weight nor the falling pixel error decides who rules.

Letters: B batch, K latents, C latent channels, E embedding width, L text tokens, P prefix lengths in use, N captions
compared with: the batch's, and what a memory adds.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import training_only
from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.supervision import Supervision
from stage1_tokenizer.text.captioner import PrefixCaptioner
from stage1_tokenizer.text.contrast import MaxOverQueries, SigmoidContrast, SoftmaxContrast
from stage1_tokenizer.text.memory import CaptionMemory
from stage1_tokenizer.text.ranks import Rows, sum_over_ranks, world_size
from stage1_tokenizer.text.readers import PrefixReader, QueryReader, on_device
from stage1_tokenizer.text.towers import Tower
from stage1_tokenizer.text.vocabulary import END, PAD, CaptionVocabulary


class GradientBalance(nn.Module):
    """Scale the gradient of a second loss at a shared tensor to `share` times the first one's norm.

    `first, second = balance(z)` returns two views of z; in the backward pass the running norms of both gradients are
    measured, and the second is multiplied by share * |first| / |second| (norms averaged over about 1 / (1 - momentum)
    steps). Both stay on the device: no host sync. Norms are buffers, so a resumed run goes on exactly; they are those
    of the global batch, whatever the number of ranks. A step whose gradient is zero, for want of captions, is left out.
    """

    norms: Tensor

    def __init__(self, share: float, momentum: float = 0.95):
        super().__init__()
        self.share, self.momentum = share, momentum
        self.register_buffer("norms", torch.zeros(2))

    def forward(self, z: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """z twice, for the first loss and for the second, whose share is `factor` times `share`."""
        if not (self.training and z.requires_grad):
            return z, z
        first, second = z.view_as(z), z.view_as(z)
        first.register_hook(lambda g: self.watch(g, 0))
        second.register_hook(lambda g: factor * self.scale(self.watch(g, 1)))
        return first, second

    @torch.no_grad()
    def watch(self, gradient: Tensor, which: int) -> Tensor:
        norm, world = gradient.float().norm(), world_size()
        if world > 1:  # of a loss that is the mean over ranks, a rank sees W times the gradient of its rows
            norm = sum_over_ranks(norm.square()).sqrt() / world
        old = self.norms[which]
        new = torch.where(old == 0, norm, old.lerp(norm, 1 - self.momentum))
        self.norms[which] = torch.where(norm.isfinite() & (norm > 0), new, old)  # float16 overflows: no step is made
        return gradient

    def scale(self, gradient: Tensor) -> Tensor:
        factor = self.share * self.norms[0] / self.norms[1].clamp_min(1e-20)
        return gradient * factor.to(gradient.dtype)


class PrefixText(Supervision):
    """Everything text does to a tokenizer: tower, prefix reader, contrastive loss and its schedule over prefixes.

    Args:
        tower: text tower, whose vocabulary encodes the captions; trained from scratch, or open_clip's pretrained one.
        reader: prefix reader, with the tower's embedding width.
        contrast: loss of image against text per prefix.
        lengths: prefix lengths in use; weights fall as 1 / (1 + log2 k).
        share: gradient that text sends into the latents, as a share of the pixels' (see `GradientBalance`).
        every: the loss is computed in every n-th step only, the cheapest way to spend less on it.
        captioner: also a caption loss, which reads one random prefix of `lengths` per picture; None for none.
        caption_weight: of the caption loss; the contrastive one has 1.
        warmup: steps over which `share` rises from 0; reader and tower learn from the first one on.
        memory: captions of earlier steps as further negatives; None for none.
    """

    def __init__(
        self,
        tower: Tower,
        reader: PrefixReader | QueryReader,
        contrast: SoftmaxContrast | SigmoidContrast | MaxOverQueries,
        lengths: list[int],
        share: float = 0.1,
        every: int = 1,
        captioner: PrefixCaptioner | None = None,
        caption_weight: float = 0.5,
        warmup: int = 0,
        memory: CaptionMemory | None = None,
    ):
        super().__init__()
        if warmup < 0 or every < 1:
            raise ValueError(f"got warmup {warmup}, every {every}; wanted at least 0 and 1 steps.")
        if not lengths or min(lengths) < 1 or max(lengths) > reader.num_latents:
            raise ValueError(f"got lengths {lengths}, wanted prefix lengths within 1..{reader.num_latents}.")
        if reader.embed_dim != tower.embed_dim:
            raise ValueError(
                f"reader.embed_dim is {reader.embed_dim} but the tower's is {tower.embed_dim}; make them equal."
            )
        for name in ("rows", "context_length"):
            if captioner is not None and getattr(captioner, name) != getattr(tower.vocabulary, name):
                raise ValueError(
                    f"captioner.{name} is {getattr(captioner, name)} but the tower's vocabulary has "
                    f"{getattr(tower.vocabulary, name)}; make them equal."
                )
        wanted = tower.embed_dim, tower.vocabulary.context_length
        if memory is not None and (memory.embed_dim, memory.context_length) != wanted:
            raise ValueError(
                f"memory has embed_dim {memory.embed_dim} and context_length {memory.context_length} but the tower "
                f"{wanted[0]} and {wanted[1]}; make them equal."
            )
        training_only(self, "memory")
        self.memory = memory
        self.tower, self.reader, self.contrast = tower, reader, contrast
        self.lengths, self.every, self.warmup = sorted(lengths), every, warmup
        self.captioner, self.caption_weight = captioner, caption_weight
        self.balance = GradientBalance(share)
        weights = torch.tensor([1 / (1 + math.log2(k)) for k in self.lengths])
        self.register_buffer("weights", weights / weights.sum(), persistent=False)
        self.weights: Tensor

    @property
    def vocabulary(self) -> CaptionVocabulary:
        return self.tower.vocabulary

    def factor(self, step: int) -> float:
        """What `share` is multiplied by at an optimiser step."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    def embed(self, z: Tensor) -> Tensor:
        """z (B,k,C) before standardisation, any k -> unit vectors (B,E), read at a length that is trained.

        That is the longest of `lengths` within k. Fewer latents than the shortest of them are read with its row, all
        the same: the map of each of these positions is trained, as a part of its sum.
        """
        row = max((n for n in self.lengths if n <= z.shape[1]), default=self.lengths[0])
        return self.reader.prefix(z[:, :row], row)

    def competing(self, k: int) -> list[int]:
        """Prefixes whose vectors compete for a caption once k latents are there: k alone, except in `MaxOverQueries`.

        There a picture is as near to a caption as the nearest of its first k latents, as in training.
        """
        return [n for n in self.lengths if n <= k] or [k] if isinstance(self.contrast, MaxOverQueries) else [k]

    def embed_text(self, captions: list[str]) -> Tensor:
        """list[str] -> unit vectors (B,E)."""
        return self.tower(self.vocabulary.encode(captions)[0])

    def sized(self) -> dict[str, nn.Module]:
        return {"reader": self.reader} | ({"captioner": self.captioner} if self.captioner is not None else {})

    def prepare(self, captions: Iterable[str]) -> int:
        self.tower.check_weights()
        return self.vocabulary.fit(captions)

    def losses(self, z: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """z (B,K,C), ids (B,L) -> {"text": weighted sum, "text_k<first length>": loss of the shortest, "caption"}.

        A picture whose caption is empty is left out. Of several ranks all call it in the same steps: pictures and
        captions of all are compared (`ranks`).
        """
        rows = Rows(len(ids), ids.device)
        embedded, all_ids = rows.of_all(self.tower(ids)), rows.of_all(ids)  # (B,E), (B,L); B of all ranks from here on
        has_caption = all_ids[:, 1] != END  # (B,)
        known, known_ids = embedded, all_ids
        if self.memory is not None:
            # copies: `store` writes in place, before the backward pass
            known = torch.cat([embedded, self.memory.embedded])  # (N,E)
            known_ids = torch.cat([all_ids, self.memory.ids])  # (N,L)
            if self.training:
                self.memory.store(embedded * has_caption[:, None], all_ids)
        same = (all_ids[:, None] == known_ids).all(-1) & has_caption[:, None]  # (B,N)
        image = rows.of_all(self.reader(z, self.lengths))  # (B,P,E)
        count = len(self.lengths)
        each = self.contrast(image, known[:, None].expand(-1, count, -1), same.expand(count, -1, -1))  # (P,) or (1,)
        parts = {"text": (self.weights * each).sum(), f"text_k{self.lengths[0]}": each[0].detach()}
        if self.captioner is not None:
            parts["caption"] = self.caption_weight * self.caption_loss(self.captioner, z, ids)
        return parts

    def caption_loss(self, captioner: PrefixCaptioner, z: Tensor, ids: Tensor) -> Tensor:
        """Nats per token of the captions ids (B,L), each read from one random prefix of z (B,K,C), short ones more."""
        drawn = torch.multinomial(self.weights, len(z), replacement=True)  # (B,)
        k = on_device(self.lengths, z.device)[drawn]
        target = ids.masked_fill(ids[:, 1:2] == END, PAD)  # an empty caption asks for nothing: 0 nats
        nats = captioner(z, keep_mask(k, z.shape[1]), target)  # (B,L-1)
        tokens = sum_over_ranks((target[:, 1:] != PAD).sum())
        return world_size() * nats.sum() / tokens.clamp(min=1)  # of which ranks take the mean
