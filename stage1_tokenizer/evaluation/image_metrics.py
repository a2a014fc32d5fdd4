"""Metrics of reports that are not losses: LPIPS where its weights are there, and what was left out.

Metrics that need downloaded weights are built by a function that returns either the metric or a `Skipped` with the
reason and the way to fix it: a report lists what it left out, and never downloads. PSNR, SSIM and the network of LPIPS
are in `similarity`, which training uses as well.

Letters: N pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer.similarity import LPIPS_TRUNKS, check_pair, lpips_network, trunk_file


@dataclass(frozen=True)
class Skipped:
    """A metric that was left out: why, and what would bring it back."""

    name: str
    reason: str
    how_to_fix: str


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
        check_pair(images, reference)
        return network(images.float(), reference.float()).flatten()

    return distance
