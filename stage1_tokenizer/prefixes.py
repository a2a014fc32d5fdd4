"""Nested dropout: which prefix lengths a training step decodes (Rippel et al. 2014).

Nested dropout alone orders latents but costs quality at full length. Decoding two lengths per step repairs it: the full
length K for every image, which protects the tail, and one random shorter k for a share of them.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec


class PrefixLengths(Spec, nn.Module):
    """Random prefix lengths k in 1..K-1 with p(k) proportional to k^-exponent (1 = log-uniform, 0 = uniform).

    Args:
        num_latents: K.
        exponent: how much short prefixes are preferred.
        share: share of a batch that is decoded a second time, at a random length.
        weight: factor of the second decode's loss.
        start: steps before the second decode begins (0 = from the first).
    """

    def __init__(
        self, num_latents: int = 16, exponent: float = 1.0, share: float = 0.5, weight: float = 0.3, start: int = 0
    ):
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"got share {share}, wanted a share of the batch within (0, 1].")
        self.num_latents, self.share, self.weight, self.start = num_latents, share, weight, start
        p = torch.arange(1, max(num_latents, 2)).float() ** -exponent
        self.register_buffer("cumulative", (p / p.sum()).cumsum(0), persistent=False)
        self.cumulative: Tensor

    def sample(self, batch: int) -> Tensor:
        """(round(batch * share),) long lengths."""
        u = torch.rand(max(1, round(batch * self.share)), device=self.cumulative.device)
        return torch.searchsorted(self.cumulative, u).clamp(max=len(self.cumulative) - 1) + 1


def keep_mask(lengths: Tensor, num_latents: int) -> Tensor:
    """(B,) lengths -> (B, K) bool, True = visible."""
    return torch.arange(num_latents, device=lengths.device) < lengths[:, None]
