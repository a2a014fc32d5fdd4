"""A small causal model of the line, trained along with the tokenizer: latents that are easy to read on from.

A prior will have to model what the encoder makes. Here it has a say while the encoder learns: the share of a latent's
variance that the latents before it leave open is a loss on both. It is a share, so that an encoder gains nothing by
shrinking its latents; what it can do is to let later latents follow from earlier ones, which costs pixels. With
`reconstruction` the predictions also go through the decoder, all at once, and are asked for the picture: predictor,
decoder and encoder then learn what of a latent is worth predicting. EOSTok (2026) trains tokenizer and prior together
over discrete tokens; this is a small continuous counterpart.

Letters: B batch, K latents, C latent channels, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import Block, LayerNorm, causal_mask, decayed, embedding
from stage1_tokenizer.spec import Spec

LEAST_VARIANCE = 1e-4  # of a position, so that one that has collapsed is not divided by nothing


class Predictor(Spec, nn.Module):
    """Contract of what reads a line on, in training only: its error is a loss on the encoder, an export is without it.

    num_latents, latent_dim: K and C of the tokenizer.
    """

    num_latents: int
    latent_dim: int

    def prepare(self) -> None:
        """Called before training: read what the losses need. Raises ValueError where it is missing or does not fit."""

    def losses(self, z: Tensor, pixels: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """z (B,K,C) before standardisation -> losses `predictor` and `predicted`, and figures without a graph.

        pixels: the decoder's loss on latents (B,K,C) of these pictures, a scalar.
        """
        raise NotImplementedError


class LatentPredictor(Predictor):
    """Predicts every latent but the first from those before it. It trains a tokenizer and is not exported with it.

    Args:
        num_latents, latent_dim: K and C of the tokenizer.
        width, depth, heads: of its transformer.
        weight: factor of the unexplained share of variance, beside a mean squared error of pixels in [-1, 1].
        reconstruction: factor of the decoder's loss on the first latent and the predictions of all others; 0 leaves it
            out, above it costs a second run of the decoder.
    """

    causal: Tensor

    def __init__(
        self,
        num_latents: int = 16,
        latent_dim: int = 16,
        width: int = 64,
        depth: int = 2,
        heads: int = 2,
        weight: float = 0.01,
        reconstruction: float = 0.0,
    ):
        super().__init__()
        if num_latents < 2 or not weight > 0 or reconstruction < 0:
            raise ValueError(
                f"got num_latents {num_latents}, weight {weight}, reconstruction {reconstruction}; want at least 2"
                " latents, a weight above 0 and a reconstruction of at least 0."
            )
        self.num_latents, self.latent_dim, self.weight = num_latents, latent_dim, weight
        self.reconstruction = reconstruction
        self.latent_in = decayed(nn.Linear(latent_dim, width))
        self.position = embedding(num_latents - 1, width, std=0.7)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.out = decayed(nn.Linear(width, latent_dim))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("causal", causal_mask(num_latents - 1), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """z (B,K,C) -> (B,K-1,C): what is expected of latents 2 to K, each from those before it."""
        x = self.latent_in(z[:, :-1]) + self.position  # (B,K-1,D)
        for block in self.blocks:
            x = block(x, self_mask=self.causal)
        return self.out(self.norm(x)).float()

    def losses(self, z: Tensor, pixels: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """z (B,K,C) -> `predictor` and, if asked for, `predicted`, both minimised; `unpredicted`: the share, to log."""
        guess, target = self(z), z[:, 1:].float()
        error = (guess - target).square().mean((0, 2))  # (K-1,)
        share = error / target.var(0, correction=0).mean(-1).clamp_min(LEAST_VARIANCE)
        parts = {"predictor": self.weight * share.mean(), "unpredicted": share.mean().detach()}
        if self.reconstruction:
            parts["predicted"] = self.reconstruction * pixels(torch.cat([z[:, :1], guess.to(z.dtype)], dim=1))
        return parts
