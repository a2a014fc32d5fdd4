"""Latents as a trained prior draws them, for a decoder that is to read them (`configs/variants/redrawn_latents.yaml`).

    true latents z_1 ... z_p, then for every later position one draw of p(z_i | caption, true z_1 ... z_{i-1})

Every draw sees the true past, so that all of a line come from one run of the transformer and the picture that belongs
to them is known. What cannot be foreseen from caption and prefix is then chance, as it is when the prior draws alone,
and the decoder learns which latents it may trust. p is uniform over 0 ... K-1: lines are true up to anywhere. l-DeTok
(Yang et al. 2025) asks the same of a decoder with plain noise.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.redraw import Redraw
from stage2_prior.latent_space import PriorError
from stage2_prior.prior import CausalPrior


class PriorDraws(Redraw):
    """Draws of a frozen `CausalPrior` in the place of true latents.

    Args:
        prior_dir: the exported prior, trained on the latents of the tokenizer whose decoder learns.
        share: of the pictures of a batch whose latents are drawn; the others keep theirs.
    Raises PriorError for a share outside (0, 1], for a prior that is not causal (before training, `prepare`) and for
    one of another tokenizer.
    """

    def __init__(self, prior_dir: str, share: float = 0.5):
        if not 0 < share <= 1:
            raise PriorError(f"got share {share}, wanted a share of the pictures within (0, 1].")
        self.prior_dir, self.share = prior_dir, share
        self.prior: CausalPrior | None = None

    def prepare(self, tokenizer: Tokenizer) -> None:
        prior = CausalPrior.from_pretrained(Path(self.prior_dir))
        if not isinstance(prior, CausalPrior):
            raise PriorError(f"{self.prior_dir} holds a {type(prior).__name__}, wanted a CausalPrior, which draws on.")
        prior.check(tokenizer)
        self.prior = prior.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, z: Tensor, batch: dict[str, Any]) -> Tensor:
        if self.prior is None:
            raise PriorError("got a step before `prepare`, wanted the prior loaded first.")
        self.prior = prior = self.prior.to(z.device)
        rows = max(1, round(self.share * len(z)))
        line = z[:rows, : prior.num_latents]
        b, k, c = line.shape
        choice = torch.rand(b).tolist()
        captions = [
            said[int(u * len(said))] if said else "" for said, u in zip(batch["captions"][:b], choice, strict=True)
        ]
        text = prior.encode_samples(captions, batch["labels"][:b])
        with prior.autocast():
            drawn = prior.head.sample(prior.conditions(line, text).flatten(0, 1)).view(b, k, c)
        kept = torch.randint(k, (b, 1), device=z.device)  # p of every picture
        true = torch.arange(k, device=z.device) < kept  # (b,k)
        drawn = torch.where(true[..., None], line, drawn.to(z.dtype))
        return torch.cat([torch.cat([drawn, z[:rows, k:]], dim=1), z[rows:]])
