"""Every configuration in configs/ is parsed, and its model and data module are built, at full size.

That they train, shrunk, is tested in test_end_to_end.py; overlays there and in stage2_prior/training/test_overlays.py.
Models are built on the meta device: shapes are real, memory and time are not, so a model of any size fits a test.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.export import ShapesOnly
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior
from tests.benchmarks.bench_tokenizers import Parsed

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STAGES: dict[str, tuple[type, type]] = {
    "stage1": (LitTokenizer, ImageDataModule),
    "stage2": (LitPrior, PriorDataModule),
}


class BuildOnly(Parsed):
    """Parses and builds as the command line does, on the meta device."""

    def instantiate_classes(self) -> None:
        with torch.device("meta"), ShapesOnly():  # as an export is looked at before it is loaded
            super().instantiate_classes()


def build(stage: str, file: Path) -> Any:
    """The command line object of `fit` with this config."""
    return BuildOnly(stage, *STAGES[stage], f"python -m {stage}", ["fit", f"--config={file}", "--run_dir=nowhere"])


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("stage[12]/*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_a_config_builds(file: Path) -> None:
    stage = file.parent.name
    cli = build(stage, file)
    assert sum(p.numel() for p in cli.model.networks.parameters()) > 1000
    assert file.read_text().startswith("#"), "a config opens with a line saying what it is"
    assert cli.config["fit"]["trainer"]["max_steps"] > 0, "a run has an end"


def test_mar_b_has_as_many_weights_as_the_paper() -> None:
    """208 M, the diffusion head with them (Li et al. 2024, table 4)."""
    prior = build("stage2", CONFIGS / "stage2" / "mar_b.yaml").model.prior
    total, head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (prior, prior.head))
    assert abs(total - 208) < 2 and abs(head - 36) < 3
