"""Every file in configs/ is parsed, built and stepped: a small data set goes through both stages of each config."""

from pathlib import Path

import pytest
import yaml

from data.__main__ import main as data_main
from stage1_tokenizer.cli import run_cli
from stage1_tokenizer.lit_tokenizer import LitTokenizer
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.lit_prior import LitPrior
from stage2_prior.prior import Prior
from stage2_prior.prior_data import PriorDataModule

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(p.stem for p in (CONFIGS / "stage1").glob("*.yaml"))
SHRUNK = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--data.batch_size=4",
    "--data.val_batch_size=8",
]


def stage1(*args: str) -> None:
    from data.datamodule import ImageDataModule

    run_cli("stage1", LitTokenizer, ImageDataModule, "python -m stage1_tokenizer", list(args))


def stage2(*args: str) -> None:
    run_cli("stage2", LitPrior, PriorDataModule, "python -m stage2_prior", list(args))


@pytest.mark.parametrize("name", NAMES)
def test_both_stages_of_a_config_run(name: str, tmp_path: Path) -> None:
    config = CONFIGS / "stage1" / f"{name}.yaml"
    size = yaml.safe_load(config.read_text())["data"]["image_size"]
    scenes = ["--source", "scenes", "--num", "40", "--size", str(size), "--val-fraction", "0.3", "--workers", "1"]
    assert not data_main(["prepare", *scenes, "--out", str(tmp_path / "data")])

    own = [f"--run_dir={tmp_path}", f"--data.data_dir={tmp_path / 'data'}"]
    stage1("fit", f"--config={config}", *own, *SHRUNK, "--model.statistics_images=16")
    stage1("predict", f"--config={config}", *own, *SHRUNK[4:])
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (tokenizer.latent_scale > 0).all() and tokenizer.latent_mean.abs().sum() > 0

    config = CONFIGS / "stage2" / f"{name}.yaml"
    assert config.is_file(), f"configs/stage1/{name}.yaml has no partner in configs/stage2"
    own = [f"--run_dir={tmp_path}", f"--data.data_dir={tmp_path / 'latents'}"]
    stage2("fit", f"--config={config}", *own, *SHRUNK)
    prior = Prior.from_pretrained(tmp_path / "prior")
    prior.check(tokenizer)
    images = tokenizer.decode(prior.sample(["a red circle", "a blue square"], steps=2))
    assert images.shape == (2, 3, size, size) and images.isfinite().all()
