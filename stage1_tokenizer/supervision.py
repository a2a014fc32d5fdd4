"""What orders the line besides pixels: a loss on prefixes, and a space in which prefixes and captions meet.

The contract that a tokenizer knows; `text.supervision.PrefixText` is its first member. A member of one's own gets the
latents of every training batch and the ids of its captions, and returns losses by name. What supervises prefixes by
pictures alone has the smaller contract `PictureSupervision`, beside captions or without.

Letters: B batch, K latents, C latent channels, E embedding width, L text tokens.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from stage1_tokenizer.spec import Spec


class Supervision(Spec, nn.Module):
    """Contract of everything that supervises prefixes.

    every: the losses are computed in every n-th step only. lengths: prefix lengths in use, ascending.
    vocabulary: captions (list[str]) to ids, fitted before training; balance: z twice, for pixels and for these losses.
    """

    every: int
    lengths: list[int]
    vocabulary: Any
    balance: nn.Module
    captioner: Any  # a part that writes captions of prefixes, None where there is none: see text.captioner

    def competing(self, k: int) -> list[int]:
        """Prefix lengths whose vectors compete for a caption once k latents are there."""
        return [k]

    def sized(self) -> dict[str, nn.Module]:
        """Parts by name whose num_latents and latent_dim must be the tokenizer's."""
        return {}

    def prepare(self, captions: Iterable[str]) -> int:
        """Learn from the training captions before the first step; returns how many tokens were left out.

        Raises ValueError where something that training needs is missing.
        """
        raise NotImplementedError

    def factor(self, step: int) -> float:
        """Factor at an optimiser step on what these losses may pull at the latents."""
        return 1.0

    def losses(self, z: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """z (B,K,C), ids (B,L) -> losses by name, and figures without a graph."""
        raise NotImplementedError

    def embed_text(self, captions: list[str]) -> Tensor:
        """list[str] -> unit vectors (B,E)."""
        raise NotImplementedError

    def embed(self, z: Tensor) -> Tensor:
        """z (B,k,C) before standardisation, any k -> unit vectors (B,E) in the space of `embed_text`."""
        raise NotImplementedError


class PictureSupervision(Spec, nn.Module):
    """Contract of what supervises prefixes by the pictures themselves, in training only: an export is without it.

    every: the losses are computed in every n-th step only. balance: z twice, for pixels and for these losses.
    """

    every: int
    balance: nn.Module

    def prepare(self) -> None:
        """Called before training: read what the losses need. Raises ValueError where it is missing."""

    def losses(self, z: Tensor, images: Tensor) -> dict[str, Tensor]:
        """z (B,K,C), images (B,3,H,W) in [-1,1] -> losses by name, and figures without a graph."""
        raise NotImplementedError
