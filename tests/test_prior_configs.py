"""Every config of stage 2, and the demo with every overlay, is parsed, built, and takes two steps."""

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
CASES: list[tuple[Path, Path | None]] = [(c, None) for c in sorted((CONFIGS / "stage2").glob("*.yaml"))]
CASES += [(CONFIGS / "stage2" / "demo.yaml", v) for v in sorted((CONFIGS / "variants").glob("prior_*.yaml"))]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Folders of a few random latents, one for every size that a config asks for."""
    folders = {}
    for config in {c for c, _ in CASES}:
        arguments = yaml.safe_load(config.read_text())["model"]["prior"]["init_args"]
        size = (arguments["num_latents"], arguments["latent_dim"])
        if size in folders:
            continue
        folder = folders[size] = tmp_path_factory.mktemp("latents")
        for split, n in (("train", 12), ("val", 4)):
            with LatentShardWriter(folder, split) as writer:
                for i in range(n):
                    writer.write(f"{i:03d}", torch.randn(size), torch.rand(size), ["a red circle", "a circle"], {})
        write_latent_manifest(folder, *size, "0123456789abcdef")
    return folders


@pytest.mark.parametrize(("config", "variant"), CASES, ids=lambda p: p.stem if p else "")
def test_config_takes_two_steps(
    config: Path, variant: Path | None, latents: dict[tuple[int, int], Path], tmp_path: Path
) -> None:
    arguments = yaml.safe_load(config.read_text())["model"]["prior"]["init_args"]
    folder = latents[arguments["num_latents"], arguments["latent_dim"]]
    files = ["--config", str(config), *(["--config", str(variant)] if variant else [])]
    options = {
        "run_dir": tmp_path,
        "data.data_dir": folder,
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
    if variant is not None:
        overlay = yaml.safe_load(variant.read_text())["model"]["prior"]
        assert overlay.get("class_path", prior.spec["class_path"]) == prior.spec["class_path"]
        assert subset(overlay.get("init_args", {}), prior.spec["init_args"])  # the overlay arrived


def subset(wanted: object, found: object) -> bool:
    """True if `found` holds all that `wanted` says."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(k in found and subset(v, found[k]) for k, v in wanted.items())
    return wanted == found
