"""A bag of words as text tower: which words a caption has, and not in which order.

Some thousand captioned photographs teach what a word looks like and little about syntax. Here a caption is the mean of
its words' vectors, each word with a weight of its own, and in training some words are left out at random, so that no
single one is relied on. On a classifier's features such a bag finds .07 of pictures first among 1,000 (LOG,
2026-11-27); against `TextTower` it has not been compared.

A judge (`python -m stage1_tokenizer judge`) learns such a bag on features that are computed once, in a minute; a tower
may start from it, and be kept as it is.

Letters: B batch, L text tokens, E embedding width, W token width.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed, training_only
from stage1_tokenizer.text.towers import Tower
from stage1_tokenizer.text.vocabulary import PAD, SPECIAL, CaptionVocabulary


class WordTower(Tower):
    """Weighted mean of word vectors, and a linear map: ids (B,L) -> unit vectors (B,E).

    Args:
        vocabulary: of the captions.
        width: W.
        embed_dim: E.
        drop: share of the words that training leaves out of a caption; start and end always stay.
        judge: folder of a judge whose words these are, vocabulary included; None starts from random ones.
        frozen: keep the words as they are.
    Raises ValueError for a share outside [0, 1), or a judge with words of another size; FileNotFoundError for none.
    """

    num_blocks = 0

    def __init__(
        self,
        vocabulary: CaptionVocabulary,
        width: int = 256,
        embed_dim: int = 128,
        drop: float = 0.2,
        judge: str | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        training_only(self, "drop", "judge", "frozen")
        if not 0 <= drop < 1:
            raise ValueError(f"got drop {drop}, wanted a share of the words from 0 to below 1.")
        self.vocabulary, self.width, self.embed_dim, self.drop = vocabulary, width, embed_dim, drop
        self.word = nn.Embedding(vocabulary.rows, width)
        self.importance = nn.Embedding(vocabulary.rows, 1)  # log of a word's weight
        nn.init.normal_(self.word.weight, std=0.7)
        nn.init.zeros_(self.importance.weight)
        self.out = decayed(nn.Linear(width, embed_dim))
        self.known, self.frozen = judge is not None, frozen
        if judge is not None:
            load_part(self, judge, "tower.")
        self.requires_grad_(not frozen)

    def check_weights(self) -> None:
        """Raises ValueError for a frozen tower with random words: it would teach noise."""
        if self.frozen and not self.known:
            raise ValueError("the words are frozen and random; set judge to a judge's folder, or frozen: false.")

    def fit_vocabulary(self, captions: Iterable[str]) -> int:
        """As `Tower`; a judge's words keep the rows that it chose."""
        return 0 if self.known else super().fit_vocabulary(captions)

    @property
    def token_width(self) -> int:
        return self.width

    def forward(self, ids: Tensor) -> Tensor:
        hidden = ids == PAD  # (B,L)
        if self.training and self.drop > 0:
            hidden = hidden | ((torch.rand(ids.shape, device=ids.device) < self.drop) & (ids >= SPECIAL))
        weight = self.importance(ids)[..., 0].masked_fill(hidden, -torch.inf).softmax(-1)  # (B,L)
        mean = (weight[..., None] * self.word(ids)).sum(1)  # (B,W)
        return F.normalize(self.out(mean).float(), dim=-1)  # (B,E)

    def tokens(self, ids: Tensor, skip: int = 0) -> Tensor:
        """ids (B,L) -> vectors of every token (B,L,W), normalised. There are no blocks to skip."""
        return F.layer_norm(self.word(ids), (self.width,))


def load_part(module: nn.Module, judge: str, prefix: str) -> None:
    """Fill `module` with the tensors of a judge's export whose names begin with `prefix`.

    Raises FileNotFoundError where there is no export, ValueError where a tensor is missing or of another size.
    """
    path = Path(judge) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; wanted a judge's folder (stage1_tokenizer judge).")
    stored = {name.removeprefix(prefix): x for name, x in load_file(path).items() if name.startswith(prefix)}
    for name, tensor in module.state_dict().items():
        if name not in stored or stored[name].shape != tensor.shape:
            got = tuple(stored[name].shape) if name in stored else "nothing"
            raise ValueError(
                f"{path} has {got} where {prefix}{name} of {tuple(tensor.shape)} is wanted; make the sizes the judge's."
            )
    module.load_state_dict({name: stored[name] for name in module.state_dict()})
