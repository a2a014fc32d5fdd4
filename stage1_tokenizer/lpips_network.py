"""The network of LPIPS (Zhang et al. 2018), a loss and a metric.

The `lpips` package brings the calibrated heads; the trunk's weights are torchvision's, read from a file and never
downloaded.
"""

import os
from pathlib import Path

import torch
from torch import nn

LPIPS_TRUNKS = {  # file names under which torchvision caches the trunks of the `lpips` package
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


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
