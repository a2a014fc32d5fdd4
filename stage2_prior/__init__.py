"""Stage 2: a prior over lines of continuous latents, conditioned on captions."""

from stage2_prior.contract import Prior
from stage2_prior.prior import CausalPrior

__all__ = ["CausalPrior", "Prior"]
