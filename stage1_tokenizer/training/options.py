"""Options of the Lightning modules in groups: one dataclass per subject.

    model:
      optimizer: {lr: 4.0e-4, matrix_lr: 5.0e-3}
      schedule: {warmup_steps: 2000, flat_fraction: 0.1}

Each group is a frozen dataclass whose defaults are those of a small run; a value that cannot work is refused here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine


class OptionError(ValueError):
    """An option out of its range, or two that contradict each other."""


@dataclass(frozen=True)
class OptimizerOptions:
    """Rates of the optimiser.

    Args:
        lr: AdamW's rate, for everything that is not a block matrix.
        matrix_lr: Muon's rate, for block matrices.
        weight_decay: AdamW's, on the parameters marked for it: linear maps and convolutions outside the blocks.
        matrix_weight_decay: Muon's. It bounds a matrix's largest singular value by about its inverse, which residual
            convolutions without normalisation need: those of `configs/stage1/cifar10.yaml` die without, after some
            3,000 steps.
    """

    lr: float = 2.5e-3
    matrix_lr: float = 0.012
    weight_decay: float = 0.0
    matrix_weight_decay: float = 0.0

    def build(self, networks: nn.Module) -> MuonAdamW:
        """The optimiser of `networks`, without a schedule."""
        return MuonAdamW(
            parameter_groups(networks),
            lr=self.lr,
            matrix_lr=self.matrix_lr,
            weight_decay=self.weight_decay,
            matrix_weight_decay=self.matrix_weight_decay,
        )


@dataclass(frozen=True)
class ScheduleOptions:
    """Linear warm-up over `warmup_steps`, full rate for `flat_fraction` of all steps, then a cosine to nothing."""

    warmup_steps: int = 30
    flat_fraction: float = 0.3

    def factor(self, total: int | None) -> Callable[[int], float]:
        """Factor on the rates by step, in a fit of `total` steps (None: only time ends it)."""
        return lambda step: warmup_flat_cosine(step, total, self.warmup_steps, self.flat_fraction)

    def build(self, optimizer: torch.optim.Optimizer, total: int | None) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor(total))


@dataclass(frozen=True)
class StartOptions:
    """Where a fit begins.

    Args:
        init_from: exported tokenizer to start from (same encoder, bottleneck and text; a decoder of the same class
            too); None starts from random weights.
        freeze_encoder: train the decoder only, with `init_from`; latents, text and statistics stay as they are.
    Raises OptionError for freeze_encoder without init_from.
    """

    init_from: str | None = None
    freeze_encoder: bool = False

    def __post_init__(self) -> None:
        if self.freeze_encoder and self.init_from is None:
            raise OptionError("freeze_encoder without init_from would freeze random weights; give init_from a folder.")


@dataclass(frozen=True)
class PassOptions:
    """Training images that are read before and after the steps: for the linear path, and for the latent statistics."""

    linear_path_images: int = 20_000
    statistics_images: int = 20_000


@dataclass(frozen=True)
class ReportOptions:
    """What `test` measures.

    Args:
        images: held-out images that are reconstructed.
        lpips_trunk: "alex", "vgg" or "squeeze".
        lpips_weights: path of the trunk's weights as torchvision has them; None looks in torch's cache.
        inception_weights: path of FID's Inception weights; None leaves that distance out, by name.
        imagenet_weights: path of EfficientNet-Lite0's weights, or "installed": those of `unspool[features]`.
    """

    images: int = 2_000
    lpips_trunk: str = "alex"
    lpips_weights: str | None = None
    inception_weights: str | None = None
    imagenet_weights: str | None = None
