"""The demo's prior, plain and with every overlay, takes two steps and is exported as the overlay says.

An overlay's first line names what it goes over: `# Over CONFIG + OVERLAY: what it is for.`
"""

from pathlib import Path

import pytest
import torch
import yaml

from data.__main__ import main as data_main
from data.reading.latents import LatentShardWriter, write_latent_manifest
from stage1_tokenizer import Tokenizer
from stage1_tokenizer.training.cli import run_cli
from stage2_prior import Prior
from stage2_prior.__main__ import main as command
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior
from tests.same_numbers import build

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
OVERLAYS = [None, *sorted((CONFIGS / "variants").glob("prior_*.yaml"))]
SIZE, NARROW = (16, 16), (24, 5)
FIXED = {"patches": (64, 48), "next_scale": (85, 48), "frequencies": (64, 48)}  # by a word of the overlay's name
CAPTIONS = ["a photo of a cat", "a red circle on a white background"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random latents of the demo's size and narrow ones, with the tokenizers of both, untrained; a few pictures and
    their latents by fixed maps."""
    folder = tmp_path_factory.mktemp("run")
    spaces: list[tuple[Path, tuple[int, int], list[str]]] = [
        (folder, SIZE, []),
        (folder / "narrow", NARROW, ["variants/narrow_latents"]),
        (folder / "categorical", SIZE, ["variants/fsq"]),
    ]
    for made, size, overlays in spaces:
        tokenizer = build("stage1", ["stage1/demo", *overlays], []).tokenizer
        assert isinstance(tokenizer, Tokenizer) and (tokenizer.num_latents, tokenizer.latent_dim) == size
        tokenizer.vocabulary.fit(CAPTIONS)
        tokenizer.save_pretrained(made / "tokenizer")
        for split, n in (("train", 12), ("val", 4)):
            with LatentShardWriter(made / "latents", split) as writer:
                for i in range(n):
                    writer.write(f"{i:03d}", torch.randn(size), torch.rand(size), CAPTIONS, {}, label=i % 10)
        write_latent_manifest(made / "latents", *size, tokenizer.fingerprint)
    words = ["prepare", "--source", "scenes", "--num", "24", "--val-fraction", "0.25", "--workers", "1"]
    assert data_main([*words, "--out", str(folder / "data")]) == 0
    for word, name in (("patches", "patches"), ("pyramid", "next_scale"), ("frequencies", "frequencies")):
        cut = [] if word == "frequencies" else ["--patch_size", "4"]
        assert command([word, "--run_dir", str(folder / name), "--data", str(folder / "data"), *cut]) == 0
    return folder


def files_of(overlay: Path | None) -> list[Path]:
    """The configs that the overlay's first line names, and itself."""
    if overlay is None:
        return [CONFIGS / "stage2" / "demo.yaml"]
    named = overlay.read_text().splitlines()[0].removeprefix("# Over ").split(":")[0]
    return [*(CONFIGS.parent / name for name in named.split(" + ")), overlay]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem if p else "plain")
def test_prior_takes_two_steps(overlay: Path | None, run: Path, tmp_path: Path) -> None:
    changes = yaml.safe_load(overlay.read_text()) if overlay else {}
    from_pictures = "class_path" in changes.get("data", {})
    files = [word for file in files_of(overlay) for word in ("--config", str(file))]
    made, size = run, SIZE
    for folder, other in (*FIXED.items(), ("narrow", NARROW), ("categorical", SIZE)):
        if any(folder in file for file in files):
            made, size = run / folder, other
    options = {
        "run_dir": tmp_path,
        "data.data_dir": run / "data" if from_pictures else made / "latents",
        "data.batch_size": 4,
        "model.tokenizer_dir": made / "tokenizer",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "live.every_n_steps": 0,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    cli = run_cli(
        "stage2", LitPrior, PriorDataModule, "stage2", ["fit", *files, *(f"--{k}={v}" for k, v in options.items())]
    )
    assert not any("encoder" in name for name in cli.model.state_dict())  # a checkpoint holds no tokenizer
    prior = Prior.from_pretrained(tmp_path / "prior")
    assert (prior.num_latents, prior.latent_dim) == size
    text = prior.encode_text(["a photo of a cat"])
    assert prior.losses(torch.randn(1, prior.num_latents, prior.latent_dim), text).isfinite().all()
    drawn = prior.sample(["a photo of a cat"])
    assert drawn.shape == (1, *size) and drawn.isfinite().all()
    wanted = changes.get("model", {}).get("prior", {})
    assert wanted.get("class_path", prior.spec["class_path"]) == prior.spec["class_path"]
    assert subset(wanted.get("init_args", {}), prior.spec["init_args"])  # the overlay arrived
    assert type(cli.datamodule).__name__ == ("PriorImageModule" if from_pictures else "PriorDataModule")


def subset(wanted: object, found: object) -> bool:
    """True if `found` holds all that `wanted` says."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(k in found and subset(v, found[k]) for k, v in wanted.items())
    return wanted == found
