"""The text side of a pretrained open_clip model as the text tower of the prefix losses.

A tower that has read hundreds of millions of captions knows words that a small set of pictures never teaches. It comes
with its whole vocabulary and, as a rule, frozen: then it is a fixed space that prefixes learn to point into, costs no
gradient and no optimiser state, and what remains per step is one forward pass of text.
"""

from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.vocabulary import BPE_SIZE, END, SPECIAL, START, CaptionVocabulary

CLIP_START, CLIP_END = BPE_SIZE - 2, BPE_SIZE - 1


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


class OpenClipTower(Spec, nn.Module):
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
        super().__init__()
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise FileNotFoundError(f"{checkpoint} does not exist; wanted open_clip weights of {model}.")
        if model not in open_clip.list_models():
            raise ValueError(f"got the model {model!r}, wanted one of open_clip.list_models(), such as ViT-B-32.")
        whole = open_clip.create_model(model, force_custom_text=True, load_weights=False)
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

    @property
    def token_width(self) -> int:
        width: int = self.transformer.width
        return width

    def clip_ids(self, ids: Tensor) -> Tensor:
        """ids (B,L) -> the model's own ids, padded to its length: open_clip's mask has one size."""
        return F.pad(self.clip_id[ids], (0, self.transformer.context_length - ids.shape[1]))


def token_features(transformer: nn.Module, ids: Tensor, skip: int = 0) -> Tensor:
    """What an open_clip text transformer computes for every token, (B,L) -> (B,L,W), normalised; it is left as it was.

    skip: last blocks to leave out. What the last one answers for a token that is not pooled no loss has ever seen.
    """
    text: Any = transformer
    if skip:
        found: list[Tensor] = []
        block = text.transformer.resblocks[-1 - skip]
        hook = block.register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            text(ids)
        finally:
            hook.remove()
        x = found[0] if text.transformer.batch_first else found[0].transpose(0, 1)  # (B,L,W)
        return F.layer_norm(x, x.shape[-1:])
    before, text.output_tokens = text.output_tokens, True
    try:
        features: Tensor = text(ids)[1]
    finally:
        text.output_tokens = before
    return features
