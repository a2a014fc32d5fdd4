"""How alike two pictures are: PSNR, SSIM, LPIPS. Each is a loss of training and a metric of reports.

Pictures are (N, 3, H, W) in [-1, 1], so the peak-to-peak range is 2 and every formula below says so once, through
PEAK. All return one value per picture: the caller averages, and so "the mean PSNR" is the mean over pictures of each
one's PSNR, not the PSNR of the mean error (which rewards a model that is very good on a few).

The `lpips` package brings the calibrated heads of LPIPS; the trunk's weights are torchvision's, read from a file and
never downloaded.

Letters: N pictures.
"""

import functools
import os
from pathlib import Path

import torch
from torch import Tensor, nn

PEAK = 2.0  # pictures span [-1, 1]
SSIM_WINDOW = 11
LPIPS_TRUNKS = {  # file names under which torchvision caches the trunks of the `lpips` package
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"got pictures of shape {tuple(images.shape)} against {tuple(reference.shape)}, wanted two equal "
            "(N, 3, H, W); decode to the size of the reference first"
        )


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image: (N, 3, H, W) twice, in [-1, 1] -> (N,).

    10 log10(4 / mean squared error). Identical pictures give 100 dB rather than infinity, so that a mean survives one.
    """
    check_pair(images, reference)
    squared_error = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / squared_error.clamp_min(PEAK**2 * 1e-10))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), one value per image: (N, 3, H, W) twice, in [-1, 1] -> (N,).

    Gaussian window of 11 pixels, sigma 1.5, per channel, averaged over the places where the whole window is inside the
    picture, as in the paper; sides of at least 11 pixels. The window is applied as two banded matrices, 20 times
    faster on a CPU than the depthwise convolution of torchmetrics, whose mean also counts a mirrored border. Always in
    float32: a variance is a small difference of large means, and bfloat16 leaves nothing of it.
    """
    check_pair(images, reference)
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


class WeightsError(ValueError):
    """Weights that a loss needs and that are not there, or are not its own."""


def trunk_file(trunk: str, weights: str | Path | None) -> Path:
    """Where the trunk's weights should lie: `weights`, or in torch's cache."""
    cache = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch")) / "hub" / "checkpoints"
    return cache / LPIPS_TRUNKS[trunk] if weights is None else Path(weights)


def lpips_network(trunk: str, path: Path) -> nn.Module:
    """The frozen LPIPS network with the trunk's weights from `path`. Raises WeightsError if they are another's."""
    import lpips  # it imports torchvision's model zoo, which only this loss needs

    network: nn.Module = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)  # with use_dropout=False the
    # calibrated heads have other names, and the package leaves them random without a word; eval() does the same
    stored = torch.load(path, map_location="cpu", weights_only=True)
    body: nn.Module = network.net  # type: ignore[assignment]
    # the package cuts torchvision's `features` into slices and keeps the index of each layer: slice2.3.weight
    names = {name: "features." + name.split(".", 1)[1] for name in body.state_dict()}
    missing = [stored_name for stored_name in names.values() if stored_name not in stored]
    if missing:
        raise WeightsError(f"{path} lacks {missing[0]}, which the {trunk} trunk has; give torchvision's weights of it.")
    try:
        body.load_state_dict({name: stored[stored_name] for name, stored_name in names.items()})
    except RuntimeError as error:
        raise WeightsError(f"{path} holds weights of other shapes than the {trunk} trunk's: {error}") from error
    return network.eval().requires_grad_(False)
