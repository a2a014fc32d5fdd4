"""Contrastive losses of prefixes against captions, with repeated captions counted as pairs.

Letters: B batch, P prefix lengths in use, E embedding width, N captions compared with: the batch's, and what a memory
adds.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec


class SigmoidContrast(Spec, nn.Module):
    """Sigmoid contrastive loss (Zhai et al. 2023, "SigLIP", eq. 1) with repeated captions counted as pairs.

    forward as `SoftmaxContrast`.
    """

    def __init__(self, temperature: float = 10.0, bias: float = -4.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        logits = self.log_scale.exp() * torch.einsum("bpe,cpe->pbc", image, text) + self.bias  # (P,B,N)
        sign, (counted, pairs) = torch.where(same, 1.0, -1.0), counted_pairs(same, text)
        return mean_of(-(F.logsigmoid(sign * logits) * pairs).sum(-1), counted)  # (P,)


class SoftmaxContrast(Spec, nn.Module):
    """Symmetric InfoNCE (Radford et al. 2021, "CLIP"), with repeated captions sharing the target mass.

    forward(image (B,P,E), text (N,P,E), same (P,B,N) bool) -> (P,) loss per prefix. The first B captions are those of
    the pictures, more are negatives (`CaptionMemory`): pictures choose among all, captions among the pictures. A
    caption of zeros is none.
    """

    def __init__(self, temperature: float = 14.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        logits = self.log_scale.exp().clamp(max=100.0) * torch.einsum("bpe,cpe->pbc", image, text)  # (P,B,N)
        return symmetric_cross_entropy(logits, same, text)  # (P,)


class MaxOverQueries(Spec, nn.Module):
    """BLIP-2's image-text contrast: the similarity of a picture and a caption is the best one over all queries.

    forward as `SoftmaxContrast`, but all P entries of `image` compete for one caption, the first of `text` (N,P,E),
    and the result is (1,). A report has to let them compete as well: see `PrefixText.competing`.
    """

    def __init__(self, temperature: float = 14.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, image: Tensor, text: Tensor, same: Tensor) -> Tensor:
        best = torch.einsum("bpe,ce->bpc", image, text[:, 0]).amax(1)  # (B,N)
        logits = self.log_scale.exp().clamp(max=100.0) * best[None]
        return symmetric_cross_entropy(logits, same[:1], text[:, :1])  # (1,)


def symmetric_cross_entropy(logits: Tensor, same: Tensor, text: Tensor) -> Tensor:
    """logits, same (P,B,N), text (N,P,E) -> (P,): cross-entropy over rows and columns, true pairs share the target.

    The columns of captions beyond the first B are left out: their pictures are not there.
    """
    counted, pairs = counted_pairs(same, text)
    logits = torch.where(pairs, logits, -1e4)  # finite, since 0 times minus infinity is not a number
    own = same[..., : same.shape[-2]]  # (P,B,B)
    rows = -(shares(same) * logits.log_softmax(-1)).sum(-1)
    columns = -(shares(own) * logits[..., : own.shape[-1]].log_softmax(-2)).sum(-2)
    return 0.5 * mean_of(rows + columns, counted)


def shares(same: Tensor) -> Tensor:
    """(P,B,N) bool -> the share of each true pair in its row."""
    return same / same.sum(-1, keepdim=True).clamp(min=1)


def counted_pairs(same: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """same (P,B,N) bool, text (N,P,E) -> counted (P,B), pairs (P,B,N) bool.

    A picture that is no pair of itself has no caption. Of the captions beyond the first B, those of zeros are none.
    """
    counted = same.diagonal(dim1=-2, dim2=-1)  # (P,B)
    more = text[same.shape[-2] :].any(-1).T  # (P,N-B)
    return counted, counted[..., :, None] & torch.cat([counted, more], -1)[..., None, :]


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """(P,B), bool of the same -> (P,): mean over the counted ones, 0 where there is none."""
    return (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)
