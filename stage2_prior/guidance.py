"""How strongly a caption pulls, by position in the line and by time of the solver.

Guided velocity: v_u + w (v_c - v_u), w = 1 conditional, w = 0 unconditional. In an ordered line the first latent
carries the meaning: a scale that rises with position, the custom of raster-order models, leaves it unguided, so
constant, falling and interval schedules exist beside it. Outside `interval` the unconditional half is not computed.
"""

from torch import nn

from stage1_tokenizer.agreement import is_number
from stage1_tokenizer.spec import Spec

ALWAYS = (0.0, 1.0)  # an interval: at all times


class GuidanceError(ValueError):
    """A guidance scale or interval that makes no sense."""


class Guidance(Spec, nn.Module):
    """The same scale at every position.

    Args:
        scale: w >= 0; the largest value for schedules that vary.
        low, high: times (0 data, 1 noise) between which guidance acts; elsewhere the condition alone is asked.
    """

    def __init__(self, scale: float = 2.0, low: float = 0.0, high: float = 1.0):
        super().__init__()
        if not is_number(scale) or not 0 <= scale <= 100:  # also false for NaN
            raise GuidanceError(f"got guidance={scale!r:.40}, wanted a number from 0 to 100 (1: conditional only).")
        if not is_number(low) or not is_number(high) or not 0 <= low < high <= 1:
            raise GuidanceError(f"got the interval {low}..{high}, wanted 0 <= low < high <= 1 (0 is data, 1 is noise).")
        self.scale, self.interval = float(scale), (low, high)

    def at(self, position: int, num_latents: int) -> float:
        """w for the latent at `position` of `num_latents`."""
        return self.scale

    def scales(self, num_latents: int) -> list[float]:
        return [self.at(i, num_latents) for i in range(num_latents)]


class RisingGuidance(Guidance):
    """From 1 at the first latent to `scale` at the last."""

    def at(self, position: int, num_latents: int) -> float:
        return 1 + (self.scale - 1) * position / max(num_latents - 1, 1)


class FallingGuidance(Guidance):
    """From `scale` at the first latent to 1 at the last."""

    def at(self, position: int, num_latents: int) -> float:
        return self.scale + (1 - self.scale) * position / max(num_latents - 1, 1)
