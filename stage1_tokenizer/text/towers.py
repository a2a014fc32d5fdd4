"""Text towers: captions to unit vectors, trained from scratch or open_clip's pretrained.

`TextTower` is CLIP's text transformer over a small vocabulary of its own. `OpenClipTower` is the text side of a
pretrained model: it has read hundreds of millions of captions, knows words that a small set of pictures never teaches,
and comes with its whole vocabulary. As a rule it is frozen: a fixed space that prefixes learn to point into, without
gradient or optimiser state; what remains per step is one forward pass of text.

open_clip is imported when a pretrained tower is built or a caption is read: it takes as long as torch.

Letters: B batch, L text tokens, E embedding width, W token width.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stage1_tokenizer.layers import MATRIX, mark
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.transformer import TextTransformer
from stage1_tokenizer.text.vocabulary import BPE_SIZE, END, PAD, SPECIAL, START, CaptionVocabulary

CLIP_START, CLIP_END = BPE_SIZE - 2, BPE_SIZE - 1


class Tower(Spec, nn.Module):
    """Contract of text towers: ids (B,L) of `vocabulary` -> unit vectors (B,E)."""

    vocabulary: CaptionVocabulary
    embed_dim: int
    transformer: Any  # `TextTransformer`, or open_clip's

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B,L) -> unit vectors (B,E)."""
        raise NotImplementedError

    def tokens(self, ids: Tensor, skip: int = 0) -> Tensor:
        """ids (B,L) -> features of every token (B,L,W), as `token_features`; W is `token_width`."""
        raise NotImplementedError

    def check_weights(self) -> None:
        """Raises ValueError for a tower that cannot be trained with as it is."""

    @property
    def token_width(self) -> int:
        width: int = self.transformer.width
        return width

    @property
    def num_blocks(self) -> int:
        """Blocks of which `tokens` can skip the last ones."""
        return len(self.transformer.transformer.resblocks)


class TextTower(Tower):
    """CLIP's text transformer over a `CaptionVocabulary`, trained from scratch: ids (B,L) -> unit vectors (B,E)."""

    def __init__(
        self, vocabulary: CaptionVocabulary, width: int = 128, layers: int = 2, heads: int = 2, embed_dim: int = 128
    ):
        super().__init__()
        self.vocabulary, self.embed_dim = vocabulary, embed_dim
        self.transformer = TextTransformer(
            vocabulary.context_length, vocabulary.rows, width, heads, layers, embed_dim, PAD, END
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


class WholeVocabulary(CaptionVocabulary):
    """All of open_clip's byte pairs, whatever the captions use: row = byte-pair id + 4, behind the special rows."""

    def __init__(self, context_length: int = 77):
        super().__init__(SPECIAL + CLIP_START, context_length)
        ids = torch.arange(CLIP_START, dtype=torch.int32)
        self.id_of[SPECIAL:] = ids
        self.row_of[:CLIP_START] = ids + SPECIAL

    def fit(self, captions: object) -> int:
        """Nothing to choose; returns 0, no token is left out."""
        return 0


class OpenClipTower(Tower):
    """open_clip's text transformer of a named model: ids (B,L) -> unit vectors (B,E).

    Args:
        vocabulary: the whole one, with at most the model's context length.
        model: open_clip model name, such as `ViT-B-32`; its text side must read CLIP's byte pairs.
        checkpoint: file with weights of the whole model, as open_clip saves or reads them. Needed to train with; an
            exported tokenizer holds the weights itself, and its config no path.
        frozen: keep the tower as it is.
    Raises FileNotFoundError for a missing checkpoint, ValueError for a model that this cannot hold.
    """

    unrecorded: ClassVar[dict[str, Any]] = {"checkpoint": None}
    loaded: Tensor

    def __init__(
        self,
        vocabulary: WholeVocabulary,
        model: str = "ViT-B-32",
        checkpoint: str | None = None,
        frozen: bool = True,
    ):
        import open_clip

        super().__init__()
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise FileNotFoundError(f"{checkpoint} does not exist; wanted open_clip weights of {model}.")
        if model not in open_clip.list_models():
            raise ValueError(f"got the model {model!r}, wanted one of open_clip.list_models(), such as ViT-B-32.")
        here = torch.empty(0).device  # where modules are being made: open_clip would put its own on the CPU
        whole = open_clip.create_model(model, force_custom_text=True, load_weights=False, device=here)
        if checkpoint is not None:
            open_clip.load_checkpoint(whole, checkpoint)  # plain tensors only: open_clip passes weights_only
        text = whole.text
        if getattr(text, "vocab_size", None) != BPE_SIZE or text.context_length < vocabulary.context_length:
            raise ValueError(
                f"the text side of {model} reads {getattr(text, 'vocab_size', '?')} tokens in"
                f" {text.context_length} places, wanted CLIP's {BPE_SIZE} in {vocabulary.context_length} or more;"
                " choose a CLIP model, or a shorter context_length."
            )
        self.vocabulary, self.transformer, self.frozen = vocabulary, text, frozen
        self.embed_dim: int = text.output_dim
        self.transformer.requires_grad_(not frozen)
        clip_id = torch.zeros(vocabulary.rows, dtype=torch.long)  # padding is 0 there, too
        clip_id[SPECIAL:] = torch.arange(CLIP_START)
        clip_id[[START, END]] = torch.tensor([CLIP_START, CLIP_END])
        self.register_buffer("clip_id", clip_id, persistent=False)
        self.register_buffer("loaded", torch.tensor(checkpoint is not None))
        self.clip_id: Tensor

    def check_weights(self) -> None:
        """Raises ValueError for a frozen tower with random weights: it would teach noise."""
        if self.frozen and not bool(self.loaded):
            raise ValueError(
                "the open_clip tower is frozen and has no weights; set its checkpoint to a file with weights of the "
                "model, or frozen: false to train it from scratch."
            )

    def forward(self, ids: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return F.normalize(self.transformer(self.clip_ids(ids)).float(), dim=-1)  # (B,E)

    def tokens(self, ids: Tensor, skip: int = 0) -> Tensor:
        """ids (B,L) -> features of every token (B,L,W), as `token_features`; W is `token_width`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return token_features(self.transformer, self.clip_ids(ids), skip)[:, : ids.shape[1]]

    def clip_ids(self, ids: Tensor) -> Tensor:
        """ids (B,L) -> the model's own ids, padded to its length: open_clip's mask has one size."""
        return F.pad(self.clip_id[ids], (0, self.transformer.context_length - ids.shape[1]))


def token_features(transformer: nn.Module, ids: Tensor, skip: int = 0) -> Tensor:
    """What a text transformer computes for every token, (B,L) -> (B,L,W), normalised; it is left as it was.

    skip: last blocks to leave out. What the last one answers for a token that is not pooled no loss has ever seen.
    """
    text: Any = transformer
    if skip:
        outputs: list[Tensor] = []
        block = text.transformer.resblocks[-1 - skip]
        hook = block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            text(ids)
        finally:
            hook.remove()
        x = outputs[0] if text.transformer.batch_first else outputs[0].transpose(0, 1)  # (B,L,W)
        return F.layer_norm(x, x.shape[-1:])
    before, text.output_tokens = text.output_tokens, True
    try:
        features: Tensor = text(ids)[1]
    finally:
        text.output_tokens = before
    return features
