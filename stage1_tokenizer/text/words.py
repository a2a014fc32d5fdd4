"""A bag of words as text tower: which words a caption has, and not in which order.

Some thousand captioned photographs teach what a word looks like and little about syntax. Here a caption is the mean of
its words' vectors, each word with a weight of its own, and in training some words are left out at random, so that no
single one is relied on. On a classifier's features such a bag finds .07 of pictures first among 1,000 (LOG,
2026-11-27); against `TextTower` it has not been compared.

Letters: B batch, L text tokens, E embedding width, W token width.
"""

import torch
import torch.nn.functional as F
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
    Raises ValueError for a share outside [0, 1).
    """

    num_blocks = 0

    def __init__(self, vocabulary: CaptionVocabulary, width: int = 256, embed_dim: int = 128, drop: float = 0.2):
        super().__init__()
        training_only(self, "drop")
        if not 0 <= drop < 1:
            raise ValueError(f"got drop {drop}, wanted a share of the words from 0 to below 1.")
        self.vocabulary, self.width, self.embed_dim, self.drop = vocabulary, width, embed_dim, drop
        self.word = nn.Embedding(vocabulary.rows, width)
        self.importance = nn.Embedding(vocabulary.rows, 1)  # log of a word's weight
        nn.init.normal_(self.word.weight, std=0.7)
        nn.init.zeros_(self.importance.weight)
        self.out = decayed(nn.Linear(width, embed_dim))

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
