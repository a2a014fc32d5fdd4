"""A prior and its tokenizer together: captions -> pictures in one call.

    pictures = Pipeline.from_pretrained("runs/demo").generate(["a large red circle"], guidance=2.0)   # (1, 3, H, W)

The order of the line is there so that one may stop: what a prior cannot place is noise in the picture, and a decoder
knows what a prefix usually looks like. So as many latents are drawn as the generation report found best, and k / K of
the time is spent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage2_prior.base import Prior
from stage2_prior.latent_space import LatentSpace, load_space


class Pipeline:
    """Draws pictures for captions. Raises PriorError for a prior of another tokenizer's latents."""

    def __init__(self, prior: Prior, tokenizer: LatentSpace) -> None:
        prior.check(tokenizer)
        self.prior, self.tokenizer = prior, tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        trust: Sequence[str] = (),
    ) -> "Pipeline":
        """path: a run folder, which holds prior/ and tokenizer/; or, with `tokenizer`, the folder or Hub id of a prior.

        dtype: of the prior's weights (None: float32). trust: packages of yours whose classes the prior may name.
        Raises FileNotFoundError for a missing folder and ValueError for one of another kind.
        """
        prior = path if tokenizer is not None else Path(path) / "prior"
        space = load_space(tokenizer if tokenizer is not None else Path(path) / "tokenizer", device)
        return cls(Prior.from_pretrained(prior, dtype=dtype, device=device, trust=trust), space)

    @torch.no_grad()
    def generate(
        self,
        captions: list[str],
        num_latents: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """B captions -> pictures (B,3,H,W) in [-1,1].

        num_latents: latents to draw; None: `prior.best_length`, which its report found, or all where there is none.
        generator: on the models' device, of the latents and of a decoder that draws. options: of `Prior.sample`.
        Raises PriorError for captions or options that `Prior.sample` refuses.
        """
        k = self.prior.best_length if num_latents is None else num_latents
        z = self.prior.sample(captions, num_latents=k, generator=generator, **options)
        return self.tokenizer.decode(z, generator)
