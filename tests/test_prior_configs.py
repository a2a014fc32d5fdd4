"""The demo's prior, plain and with every overlay, takes two steps and is exported as the overlay says."""

from pathlib import Path

import pytest
import torch
import yaml

from data.latents import LatentShardWriter, write_latent_manifest
from stage1_tokenizer.cli import run_cli
from stage2_prior import Prior
from stage2_prior.lit_prior import LitPrior
from stage2_prior.prior_data import PriorDataModule

CONFIGS = Path(__file__).parent.parent / "configs"
DEMO = CONFIGS / "stage2" / "demo.yaml"
OVERLAYS = [None, *sorted((CONFIGS / "variants").glob("prior_*.yaml"))]
SIZE = (16, 16)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few random latents of the demo's size."""
    folder = tmp_path_factory.mktemp("latents")
    for split, n in (("train", 12), ("val", 4)):
        with LatentShardWriter(folder, split) as writer:
            for i in range(n):
                writer.write(f"{i:03d}", torch.randn(SIZE), torch.rand(SIZE), ["a red circle", "a circle"], {})
    write_latent_manifest(folder, *SIZE, "0123456789abcdef")
    return folder


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem if p else "plain")
def test_demo_prior_takes_two_steps(overlay: Path | None, latents: Path, tmp_path: Path) -> None:
    files = ["--config", str(DEMO), *(["--config", str(overlay)] if overlay else [])]
    options = {
        "run_dir": tmp_path,
        "data.data_dir": latents,
        "data.batch_size": 4,
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    run_cli("stage2", LitPrior, PriorDataModule, "stage2", ["fit", *files, *(f"--{k}={v}" for k, v in options.items())])
    prior = Prior.from_pretrained(tmp_path / "prior")
    text = prior.encode_text(["a red circle"])
    assert prior.losses(torch.randn(1, prior.num_latents, prior.latent_dim), text).isfinite().all()
    if overlay is not None:
        wanted = yaml.safe_load(overlay.read_text())["model"]["prior"]
        assert wanted.get("class_path", prior.spec["class_path"]) == prior.spec["class_path"]
        assert subset(wanted.get("init_args", {}), prior.spec["init_args"])  # the overlay arrived


def subset(wanted: object, found: object) -> bool:
    """True if `found` holds all that `wanted` says."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(k in found and subset(v, found[k]) for k, v in wanted.items())
    return wanted == found
