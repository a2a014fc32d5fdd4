"""Captions of earlier steps as negatives of this one (cross-batch memory: Wang et al. 2020, arXiv 1912.06798).

A small batch stops teaching early: one caption among 48 is soon retrieved, one among 1,000 is not. Embeddings of the
last captions cost nothing to keep, and a tower that moves slowly has hardly moved since. They have no gradient and no
picture: a picture is compared with them, they are not compared with other pictures.

Letters: B batch, Q size, E embedding width, L text tokens.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.vocabulary import PAD


class CaptionMemory(Spec, nn.Module):
    """The last Q captions: `embedded` (Q,E) and `ids` (Q,L), zeros and PAD where nothing is kept yet.

    It belongs to a training run: it is in checkpoints, so that a resumed run goes on exactly, and not in exports.

    Args:
        size: Q, best some twenty batches. embed_dim: E, the tower's. context_length: L, the vocabulary's.
    Raises ValueError for a size below 1.
    """

    embedded: Tensor
    ids: Tensor
    at: Tensor

    def __init__(self, size: int = 960, embed_dim: int = 128, context_length: int = 24):
        super().__init__()
        if size < 1:
            raise ValueError(f"got size {size}, wanted at least 1 caption; leave the memory out to have none.")
        self.size, self.embed_dim, self.context_length = size, embed_dim, context_length
        self.register_buffer("embedded", torch.zeros(size, embed_dim))
        self.register_buffer("ids", torch.full((size, context_length), PAD, dtype=torch.long))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def store(self, embedded: Tensor, ids: Tensor) -> None:
        """embedded (B,E), ids (B,L) in the place of the oldest; the last Q of them if B is above Q."""
        embedded, ids = embedded[-self.size :], ids[-self.size :]
        rows = (self.at + torch.arange(len(ids), device=ids.device)) % self.size
        self.embedded.index_copy_(0, rows, embedded.detach().to(self.embedded.dtype))
        self.ids.index_copy_(0, rows, ids)
        self.at.copy_((self.at + len(ids)) % self.size)
