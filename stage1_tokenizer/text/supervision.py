"""Text supervision of prefixes: a small open_clip text tower, and losses that read the first k latents.

The order of the latents is decided by which of them a loss can see. A contrastive loss on *short prefixes*, weighted
down as k grows, asks the first latents for what a caption says; a loss on the full length (`lengths=[K]`) would let the
meaning sit anywhere. Captions are targets and never an input of the decoder: there they would unload meaning from the
latents.

`GradientBalance` bounds what this costs: the gradient that text sends into the latents is rescaled to a fixed share of
the gradient that pixels send, so that neither a loss weight nor the falling pixel error decides who rules.

Letters: B batch, K latents, C latent channels, E embedding width, L text tokens, P prefix lengths in use, N captions
compared with: the batch's, and what a memory adds.
"""

import functools
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stage1_tokenizer.layers import MATRIX, LayerNorm, Linears, linear, mark, training_only
from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.captioner import PrefixCaptioner
from stage1_tokenizer.text.memory import CaptionMemory
from stage1_tokenizer.text.open_clip_tower import OpenClipTower, token_features
from stage1_tokenizer.text.vocabulary import END, PAD, CaptionVocabulary


class TextTower(Spec, nn.Module):
    """open_clip's TextTransformer over a `CaptionVocabulary`, trained from scratch: ids (B,L) -> unit vectors (B,E)."""

    def __init__(
        self, vocabulary: CaptionVocabulary, width: int = 128, layers: int = 2, heads: int = 2, embed_dim: int = 128
    ):
        super().__init__()
        self.vocabulary, self.embed_dim = vocabulary, embed_dim
        self.transformer = TextTransformer(
            context_length=vocabulary.context_length,
            vocab_size=vocabulary.rows,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=embed_dim,
            no_causal_mask=True,
            use_pad_mask=True,
            pad_id=PAD,
            eos_id=END,
            pool_type="eos",
        )
        nn.init.normal_(self.transformer.token_embedding.weight, std=0.7)  # open_clip's 0.02 learns late: see layers.py
        nn.init.normal_(self.transformer.positional_embedding, std=0.7)
        for parameter in self.transformer.transformer.parameters():
            if parameter.ndim == 2:
                mark(parameter, MATRIX)

    def forward(self, ids: Tensor) -> Tensor:
        # the backward of fused attention on a CPU would take a third of a text step (see layers.attend)
        plain = ids.device.type == "cpu" and torch.is_grad_enabled()
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return F.normalize(self.transformer(ids).float(), dim=-1)  # (B,E)

    def tokens(self, ids: Tensor, skip: int = 0) -> Tensor:
        """ids (B,L) -> features of every token (B,L,W), as `token_features`; W is `token_width`."""
        return token_features(self.transformer, ids, skip)

    @property
    def token_width(self) -> int:
        width: int = self.transformer.width
        return width


def on_device(values: list[int], device: torch.device) -> Tensor:
    """`values` as a long tensor (n,), kept: copying a list to a GPU in every step would make the step wait for it."""
    if torch.compiler.is_compiling():  # a constant of the graph
        return torch.tensor(values, device=device)
    return kept_on_device(tuple(values), device)


@functools.lru_cache(maxsize=256)
def kept_on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a report may be the first to ask, and a loss indexes with it
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
        """The last latent of z (B,k,C) as a vector (B,E); says nothing if k < `row`, its map is not trained then."""
        return self(z, [z.shape[1]])[:, 0]


class SigmoidContrast(Spec, nn.Module):
    """Sigmoid contrastive loss (Zhai et al. 2023, "SigLIP", eq. 1) with repeated captions counted as pairs.

    forward as `SoftmaxContrast`.
    """

    def __init__(self, temperature: float = 10.0, bias: float = -4.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        logits = self.log_scale.exp() * torch.einsum("bpe,cpe->pbc", image, text) + self.bias  # (P,B,N)
        sign, (counted, pairs) = torch.where(same, 1.0, -1.0), counted_pairs(same, text)
        return mean_of(-(F.logsigmoid(sign * logits) * pairs).sum(-1), counted)  # (P,)


class SoftmaxContrast(Spec, nn.Module):
    """Symmetric InfoNCE (Radford et al. 2021, "CLIP"), with repeated captions sharing the target mass.

    forward(image (B,P,E), text (N,P,E), same (P,B,N) bool) -> (P,) loss per prefix. The first B captions are those of
    the pictures, more are negatives (`CaptionMemory`): pictures choose among all, captions among the pictures. A
    caption of zeros is none.
    """

    def __init__(self, temperature: float = 14.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        logits = self.log_scale.exp().clamp(max=100.0) * torch.einsum("bpe,cpe->pbc", image, text)  # (P,B,N)
        return symmetric_cross_entropy(logits, same, text)  # (P,)


class MaxOverQueries(Spec, nn.Module):
    """BLIP-2's image-text contrast: the similarity of a picture and a caption is the best one over all queries.

    forward as `SoftmaxContrast`, but all P entries of `image` compete for one caption, the first of `text` (N,P,E),
    and the result is (1,). A report has to let them compete as well: see `PrefixText.competing`.
    """

    def __init__(self, temperature: float = 14.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        best = torch.einsum("bpe,ce->bpc", image, text[:, 0]).amax(1)  # (B,N)
        logits = self.log_scale.exp().clamp(max=100.0) * best[None]
        return symmetric_cross_entropy(logits, same[:1], text[:, :1])  # (1,)


def symmetric_cross_entropy(logits: Tensor, same: Tensor, text: Tensor) -> Tensor:
    """logits, same (P,B,N), text (N,P,E) -> (P,): cross-entropy over rows and columns, true pairs share the target.

    The columns of captions beyond the first B are left out: their pictures are not there.
    """
    counted, pairs = counted_pairs(same, text)
    logits = torch.where(pairs, logits, -1e4)  # finite, since 0 times minus infinity is not a number
    own = same[..., : same.shape[-2]]  # (P,B,B)
    rows = -(shares(same) * logits.log_softmax(-1)).sum(-1)
    columns = -(shares(own) * logits[..., : own.shape[-1]].log_softmax(-2)).sum(-2)
    return 0.5 * mean_of(rows + columns, counted)


def shares(same: Tensor) -> Tensor:
    """(P,B,N) bool -> the share of each true pair in its row."""
    return same / same.sum(-1, keepdim=True).clamp(min=1)


def counted_pairs(same: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """same (P,B,N) bool, text (N,P,E) -> counted (P,B), pairs (P,B,N) bool.

    A picture that is no pair of itself has no caption. Of the captions beyond the first B, those of zeros are none.
    """
    counted = same.diagonal(dim1=-2, dim2=-1)  # (P,B)
    more = text[same.shape[-2] :].any(-1).T  # (P,N-B)
    return counted, counted[..., :, None] & torch.cat([counted, more], -1)[..., None, :]


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """(P,B), bool of the same -> (P,): mean over the counted ones, 0 where there is none."""
    return (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)


class GradientBalance(nn.Module):
    """Scale the gradient of a second loss at a shared tensor to `share` times the first one's norm.

    `first, second = balance(z)` returns two views of z; in the backward pass the running norms of both gradients are
    measured, and the second is multiplied by share * |first| / |second| (norms averaged over about 1 / (1 - momentum)
    steps). Both stay on the device: no host sync. Norms are buffers, so a resumed run goes on exactly.
    """

    norms: Tensor

    def __init__(self, share: float, momentum: float = 0.95):
        super().__init__()
        self.share, self.momentum = share, momentum
        self.register_buffer("norms", torch.zeros(2))

    def forward(self, z: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """z twice, for the first loss and for the second, whose share is `factor` times what was asked for."""
        if not (self.training and z.requires_grad):
            return z, z
        first, second = z.view_as(z), z.view_as(z)
        first.register_hook(lambda g: self.watch(g, 0))
        second.register_hook(lambda g: factor * self.scale(self.watch(g, 1)))
        return first, second

    @torch.no_grad()
    def watch(self, gradient: Tensor, which: int) -> Tensor:
        norm = gradient.float().norm()
        old = self.norms[which]
        new = torch.where(old == 0, norm, old.lerp(norm, 1 - self.momentum))
        self.norms[which] = torch.where(norm.isfinite(), new, old)  # float16 overflows now and then: no step is made
        return gradient

    def scale(self, gradient: Tensor) -> Tensor:
        factor = self.share * self.norms[0] / self.norms[1].clamp_min(1e-20)
        return gradient * factor.to(gradient.dtype)


class PrefixText(Spec, nn.Module):
    """Everything text does to a tokenizer: tower, prefix reader, contrastive loss and its schedule over prefixes.

    Args:
        tower: text tower, whose vocabulary encodes the captions; trained from scratch, or open_clip's pretrained one.
        reader: prefix reader, with the tower's embedding width.
        contrast: loss of image against text per prefix.
        lengths: prefix lengths in use; weights fall as 1 / (1 + log2 k).
        share: gradient that text sends into the latents, as a share of the pixels' (see `GradientBalance`).
        every: the loss is computed in every n-th step only, the cheapest way to spend less on it.
        captioner: also a caption loss, which reads one random prefix of `lengths` per picture; None for none.
        caption_weight: of the caption loss beside the contrastive one.
        warmup: steps over which `share` rises from 0; reader and tower learn from the first one on.
        memory: captions of earlier steps as further negatives; None for none.
    """

    def __init__(
        self,
        tower: TextTower | OpenClipTower,
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

    def losses(self, z: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """z (B,K,C), ids (B,L) or (B,M,L) -> {"text": weighted sum, "text_k<first length>": loss of the shortest}.

        Of M captions per picture, the first ones are for the shortest prefixes and the last ones for the longest. A
        picture whose caption is empty is left out.
        """
        ids = ids[:, None] if ids.ndim == 2 else ids  # (B,M,L)
        batch, count = ids.shape[:2]
        if count > 1 and isinstance(self.contrast, MaxOverQueries):
            raise ValueError(
                f"got {count} captions per picture, wanted one: MaxOverQueries compares all prefixes with the same "
                "caption; set captions_by_length to 1."
            )
        if count > 1 and self.memory is not None:
            raise ValueError(f"got {count} captions per picture and a memory of one; leave one of the two out.")
        which = [round(i * (count - 1) / max(1, len(self.lengths) - 1)) for i in range(len(self.lengths))]
        embedded = self.tower(ids.flatten(0, 1)).unflatten(0, (batch, count))  # (B,M,E)
        said = ids[..., 1] != END  # (B,M), False = an empty caption
        known, known_ids = embedded, ids
        if self.memory is not None:
            # copies: `store` writes in place, before the backward pass
            known = torch.cat([embedded, self.memory.embedded[:, None]])  # (N,1,E)
            known_ids = torch.cat([ids, self.memory.ids[:, None]])  # (N,1,L)
            if self.training:
                self.memory.store(embedded[:, 0] * said, ids[:, 0])
        equal = ((ids[:, None] == known_ids[None]).all(-1) & said[:, None]).permute(2, 0, 1)  # (M,B,N)
        image = self.reader(z, self.lengths)  # (B,P,E)
        shared = on_device(which, ids.device)  # (P,)
        each = self.contrast(image, known[:, shared], equal[shared])  # (P,), or (1,) of all together
        parts = {"text": (self.weights * each).sum(), f"text_k{self.lengths[0]}": each[0].detach()}
        if self.captioner is not None:
            drawn = torch.multinomial(self.weights, batch, replacement=True)  # (B,) short prefixes more often
            k = on_device(self.lengths, z.device)[drawn]
            target = ids[torch.arange(batch, device=z.device), shared[drawn]]  # (B,L)
            target = target.masked_fill(target[:, 1:2] == END, PAD)  # an empty caption says nothing: 0 nats
            nats = self.captioner(z, keep_mask(k, z.shape[1]), target)  # (B,L-1)
            parts["caption"] = self.caption_weight * nats.sum() / (target[:, 1:] != PAD).sum().clamp(min=1)
        return parts
