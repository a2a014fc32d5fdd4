"""What a decoder may be tuned on besides the encoder's own latents: the contract that `LitTokenizer.redraw` asks for.

A decoder that has only seen an encoder's latents shows every error of a prior as if it were meant. Whoever knows how
the latents will really come (a trained prior, `stage2_prior.PriorDraws`) puts its own in their place while the decoder
learns; the picture that is asked for stays the same.
"""

from typing import Any

from torch import Tensor

from stage1_tokenizer.tokenizer import Tokenizer


class Redraw:
    """Latents of training pictures -> as a reader of them would have drawn them."""

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Called once before the first step. Raises ValueError for a tokenizer whose latents it does not know."""
        raise NotImplementedError

    def __call__(self, z: Tensor, batch: dict[str, Any]) -> Tensor:
        """z (B,K,C) standardised, of the pictures of `batch` (captions, labels) -> (B,K,C) likewise; no gradient."""
        raise NotImplementedError
