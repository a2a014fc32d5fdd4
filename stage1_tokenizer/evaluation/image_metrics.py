"""Numbers about pictures, each a pure function of two sets of them.

Pictures are (N, 3, H, W) in [-1, 1], so the peak-to-peak range is 2 and every formula below says so once, through
PEAK. Picture metrics return one value per image: the caller averages, and so "the mean PSNR" is the mean over images
of each image's PSNR, not the PSNR of the mean error (which rewards a model that is very good on a few).

Metrics that need downloaded weights are built by a function that returns either the metric or a `Skipped` with the
reason and the way to fix it: a report lists what it left out, and never downloads.

Letters: N images.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer.lpips_network import LPIPS_TRUNKS, lpips_network, trunk_file

PEAK = 2.0  # pictures span [-1, 1]
SSIM_WINDOW = 11


@dataclass(frozen=True)
class Skipped:
    """A metric that was left out: why, and what would bring it back."""

    name: str
    reason: str
    how_to_fix: str


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"got pictures of shape {tuple(images.shape)} against {tuple(reference.shape)}, wanted two equal "
            "(N, 3, H, W); decode to the size of the reference first"
        )


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image: (N, 3, H, W) twice, in [-1, 1] -> (N,).

    10 log10(4 / mean squared error). Identical pictures give 100 dB rather than infinity, so that a mean survives one.
    """
    _check_pair(images, reference)
    squared_error = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / squared_error.clamp_min(PEAK**2 * 1e-10))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), one value per image: (N, 3, H, W) twice, in [-1, 1] -> (N,).

    Gaussian window of 11 pixels, sigma 1.5, per channel, averaged over the places where the whole window is inside the
    picture, as in the paper; sides of at least 11 pixels. The window is applied as two banded matrices, 20 times
    faster on a CPU than the depthwise convolution of torchmetrics, whose mean also counts a mirrored border. Always in
    float32: a variance is a small difference of large means, and bfloat16 leaves nothing of it.
    """
    _check_pair(images, reference)
    h, w = images.shape[-2:]
    if min(h, w) < SSIM_WINDOW:
        raise ValueError(f"got {h} x {w} pictures, wanted sides of {SSIM_WINDOW} or more for SSIM")
    x, y = images.float(), reference.float()
    rows, columns = _gaussian_band(h, x.device), _gaussian_band(w, x.device).T  # (H - 10, H), (W, W - 10)
    with torch.autocast(x.device.type, enabled=False):
        means = (rows @ part @ columns for part in (x, y, x * x, y * y, x * y))
        mu_x, mu_y, xx, yy, xy = means  # (N, 3, H - 10, W - 10)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x.square() + mu_y.square() + c1)
    structure = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x.square() + yy - mu_y.square() + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


@functools.lru_cache(maxsize=32)
def _gaussian_band(size: int, device: torch.device) -> Tensor:
    """Matrix (size - 10, size) that averages each run of 11 neighbours with Gaussian weights, sigma 1.5.

    Kept by size and device: a copy to a GPU in every step of a loss would make the step wait for it.
    """
    with torch.inference_mode(False):  # a report may be the first to ask, and a loss needs it for its gradient
        offset = torch.arange(size)[None] - torch.arange(size - SSIM_WINDOW + 1)[:, None]
        weights = torch.exp(-(((offset - SSIM_WINDOW // 2) / 1.5) ** 2) / 2)
        weights = weights * ((offset >= 0) & (offset < SSIM_WINDOW))
        return (weights / weights.sum(dim=1, keepdim=True)).to(device)


PairMetric = Callable[[Tensor, Tensor], Tensor]  # (images, reference), both (N, 3, H, W) -> (N,)


def lpips_metric(
    trunk: str = "alex", device: torch.device | str = "cpu", weights: str | Path | None = None
) -> PairMetric | Skipped:
    """LPIPS (Zhang et al. 2018) as a function (images, reference) -> (N,), or `Skipped` where its trunk is not found.

    The `lpips` package brings the linear heads and no trunk: its weights are torchvision's, read from the file
    `weights`, or from torch's cache without one. Fetching them is a choice of the user's, not of a report's.
    """
    if trunk not in LPIPS_TRUNKS:
        raise ValueError(f"got LPIPS trunk {trunk!r}, wanted one of {', '.join(LPIPS_TRUNKS)}")
    name, file = f"lpips[{trunk}]", LPIPS_TRUNKS[trunk]
    path = trunk_file(trunk, weights)
    if not path.is_file():
        if weights is not None:
            return Skipped(name, f"there is no file at {path}", f"give lpips_weights the path of torchvision's {file}")
        return Skipped(
            name,
            f"the weights of its trunk are not at {file} in torch's cache",
            f"put torchvision's {file} into $TORCH_HOME/hub/checkpoints, or give its path as lpips_weights",
        )
    network = lpips_network(trunk, path).to(device)

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        _check_pair(images, reference)
        return network(images.float(), reference.float()).flatten()

    return distance
