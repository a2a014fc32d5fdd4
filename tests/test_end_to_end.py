"""A small data set goes through both stages of every config, and through stage 1 with every overlay."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.__main__ import main as data_main
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.latent_writer import LatentWriter
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage1_tokenizer.training.metrics_file import read_metrics
from stage1_tokenizer.training.options import StartOptions
from stage2_prior.prior import Prior
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior
from tests.same_numbers import build
from tests.tiny import TINY_CLIP, tiny_clip, tiny_tokenizer

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(p.stem for p in (CONFIGS / "stage1").glob("*.yaml"))
SHRUNK = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--live.every_n_steps=0",
    "--data.batch_size=4",
    "--data.val_batch_size=8",
]


def stage1(*args: str) -> None:
    from data.reading.datamodule import ImageDataModule

    run_cli("stage1", LitTokenizer, ImageDataModule, "python -m stage1_tokenizer", list(args), [LatentWriter()])


def stage2(*args: str) -> None:
    run_cli("stage2", LitPrior, PriorDataModule, "python -m stage2_prior", list(args))


VARIANTS = sorted(
    p.stem for p in (CONFIGS / "variants").glob("*.yaml") if not p.stem.startswith(("prior_", "streaming"))
)
EXTRA = {v: ["--model.adversarial.init_args.start_step=1"] for v in ("adversarial", "adversarial_decoder")}
SAME_PARTS = (
    *EXTRA,
    "no_linear_path",
    "next_latent",
    "next_latent_pixels",
    "frozen_prior",
    "features_on_prefixes",
    "perceptual_lite0",
    "night",
)  # other training, or a part that the demo has not
FROZEN = ("flow_decoder", "flow_decoder_64", "adversarial_decoder")  # variants that tune the decoder of a run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's config, two steps long."""
    folder = tmp_path_factory.mktemp("demo")
    scenes = ["--source", "scenes", "--num", "40", "--val-fraction", "0.3", "--workers", "1"]
    assert not data_main(["prepare", *scenes, "--out", str(folder / "data")])
    own = [f"--run_dir={folder}", f"--data.data_dir={folder / 'data'}", "--model.passes.statistics_images=16"]
    stage1("fit", f"--config={CONFIGS / 'stage1' / 'demo.yaml'}", *own, *SHRUNK)
    return folder


def prior_of(run: Path, folder: Path) -> Path:
    """The demo's prior, untrained, of the run's tokenizer; its folder."""
    tokenizer, prior = Tokenizer.from_pretrained(run / "tokenizer"), build("stage2", ["stage2/demo"], []).prior
    prior.vocabulary.fit(["a red circle"])
    prior.bind(tokenizer.num_latents, tokenizer.latent_dim, tokenizer.fingerprint)
    return Path(prior.save_pretrained(folder / "prior"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_stage_1_overlays_run_on_the_demo(variant: str, demo: Path, tmp_path: Path) -> None:
    configs = [f"--config={CONFIGS / 'stage1' / 'demo.yaml'}", f"--config={CONFIGS / 'variants' / (variant + '.yaml')}"]
    own = [f"--run_dir={tmp_path}", f"--data.data_dir={demo / 'data'}", "--model.passes.statistics_images=16"]
    own += [f"--model.start.init_from={demo / 'tokenizer'}"] if variant in FROZEN else []
    if variant == "frozen_prior":
        part = "--model.tokenizer.init_args.predictor.init_args"
        own += [f"{part}.prior_dir={prior_of(demo, tmp_path)}", f"{part}.tokenizer_dir={demo / 'tokenizer'}"]
        own += [f"--model.start.init_from={demo / 'tokenizer'}"]
    if variant == "text_open_clip":
        part = "--model.tokenizer.init_args.text.init_args"
        own += [f"{part}.tower.init_args.checkpoint={tiny_clip(tmp_path)}", f"{part}.reader.init_args.embed_dim=24"]
        own += [f"{part}.tower.init_args.model={TINY_CLIP}"]
        own += [f"{part}.tower.init_args.vocabulary.init_args.context_length=20"]
    stage1("fit", *configs, *own, *SHRUNK, *EXTRA.get(variant, []))
    tokenizer, base = (Tokenizer.from_pretrained(folder / "tokenizer") for folder in (tmp_path, demo))
    if variant in FROZEN:
        assert tokenizer.fingerprint == base.fingerprint, "a frozen latent space stays as it is"
    assert tokenizer.spec != base.spec or variant in SAME_PARTS, "other parts"
    metrics = read_metrics(tmp_path / "stage1" / "metrics.csv")
    assert any("val/psnr_16" in line for line in metrics)


def test_a_tokenizer_trains_on_a_stream(demo: Path, tmp_path: Path) -> None:
    configs = [f"--config={CONFIGS / name}" for name in ("stage1/demo.yaml", "variants/streaming.yaml")]
    data = [f"--data.train_urls=['{demo}/data/train/*.tar']", f"--data.val_dir={demo / 'data'}", "--data.batch_size=4"]
    sizes = ["--data.steps_per_epoch=4", "--data.shuffle_buffer=8", "--model.passes.statistics_images=16"]
    stage1("fit", *configs, f"--run_dir={tmp_path}", *data, *sizes, *SHRUNK[:6])
    tokenizer, base = (Tokenizer.from_pretrained(folder / "tokenizer") for folder in (tmp_path, demo))
    (known, other), _ = tokenizer.vocabulary.encode(["red", "unheard"])
    assert not torch.equal(known, other), "the vocabulary is that of the stream"
    assert tokenizer.fingerprint != base.fingerprint
    metrics = read_metrics(tmp_path / "stage1" / "metrics.csv")
    assert any("val/psnr_16" in line for line in metrics)


LARGE = 128  # pixels from which a config is shrunk to be stepped
SMALL = {
    "image_size": 64,
    "width": 64,
    "cond_dim": 64,
    "heads": 2,
    "depth": 1,
    "layers": 1,
    "embed_dim": 32,
    "rows": 64,
}


def shrunk(config: Path, folder: Path) -> Path:
    """The config itself, or, of one for large pictures, a copy with small numbers in the same places."""

    def shrink(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {n: shrink(v, n) for n, v in value.items()}
        if isinstance(value, list):
            return [shrink(v) for v in value]
        return min(value, SMALL[name]) if name in SMALL else 0 if name == "num_workers" else value

    content = yaml.safe_load(config.read_text())
    if "init_args" in content["model"]:  # LPIPS needs weights that are not here; its own tests have some
        content["model"]["init_args"]["image_losses"] = []
    pixels = yaml.safe_load((CONFIGS / "stage1" / config.name).read_text())["sizes"]["image_size"]
    if pixels < LARGE:
        return config
    copy = folder / f"{config.parent.name}-{config.name}"
    copy.write_text(yaml.safe_dump(shrink(content)))
    return copy


@pytest.mark.parametrize("name", NAMES)
def test_both_stages_of_a_config_run(name: str, tmp_path: Path) -> None:
    config = shrunk(CONFIGS / "stage1" / f"{name}.yaml", tmp_path)
    size = yaml.safe_load(config.read_text())["sizes"]["image_size"]
    scenes = ["--source", "scenes", "--num", "40", "--size", str(size), "--val-fraction", "0.3", "--workers", "1"]
    assert not data_main(["prepare", *scenes, "--out", str(tmp_path / "data")])

    own = [f"--run_dir={tmp_path}", f"--data.data_dir={tmp_path / 'data'}"]
    live = [f"--live.every_n_steps={int(name == 'demo')}"]
    stage1("fit", f"--config={config}", *own, *SHRUNK, *live, "--model.passes.statistics_images=16")
    assert (tmp_path / "live.html").exists() == (name == "demo")
    stage1("predict", f"--config={config}", *own, *SHRUNK[4:])
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (tokenizer.latent_scale > 0).all() and tokenizer.latent_mean.abs().sum() > 0

    assert (CONFIGS / "stage2" / f"{name}.yaml").is_file(), f"configs/stage1/{name}.yaml has no partner in stage2"
    config = shrunk(CONFIGS / "stage2" / f"{name}.yaml", tmp_path)
    own = [f"--run_dir={tmp_path}", f"--data.data_dir={tmp_path / 'latents'}"]
    stage2("fit", f"--config={config}", *own, *SHRUNK, *live)
    assert name != "demo" or "LitPrior after 2 steps" in (tmp_path / "live.html").read_text()
    prior = Prior.from_pretrained(tmp_path / "prior")
    prior.check(tokenizer)
    for export in (tmp_path / "tokenizer", tmp_path / "prior"):  # scenes may be shown
        with Image.open(export / "pictures.png") as picture:
            picture.load()
        assert "(pictures.png)" in (export / "README.md").read_text()
    images = tokenizer.decode(prior.sample(["a red circle", "a blue square"], steps=2))
    assert images.shape == (2, 3, size, size) and images.isfinite().all()


def test_a_resumed_fit_ends_with_the_same_weights_as_an_undisturbed_one(demo: Path, tmp_path: Path) -> None:
    config = f"--config={CONFIGS / 'stage1' / 'demo.yaml'}"
    own = [f"--data.data_dir={demo / 'data'}", "--model.passes.statistics_images=16", *SHRUNK, "--trainer.max_steps=4"]
    keep = ["--checkpoint.every_n_steps=2", "--checkpoint.keep_every=2"]
    stage1("fit", config, f"--run_dir={tmp_path / 'whole'}", *own, *keep)
    (middle,) = [p for p in (tmp_path / "whole" / "stage1" / "checkpoints").glob("*.ckpt") if "2" in p.stem]
    stage1("fit", config, f"--run_dir={tmp_path / 'resumed'}", *own, f"--resume={middle}")
    whole, resumed = (load_file(tmp_path / name / "tokenizer" / "model.safetensors") for name in ("whole", "resumed"))
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not different


@pytest.mark.parametrize("steps", [4, 7])  # within an epoch, and at its end
def test_a_finished_fit_that_is_resumed_exports_the_same(demo: Path, tmp_path: Path, steps: int) -> None:
    own = [f"--run_dir={tmp_path}", f"--data.data_dir={demo / 'data'}", "--model.passes.statistics_images=16", *SHRUNK]
    words = ["fit", f"--config={CONFIGS / 'stage1' / 'demo.yaml'}", *own, f"--trainer.max_steps={steps}"]
    stage1(*words)
    first = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    stage1(*words, "--resume=auto")
    second = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert torch.equal(first.latent_mean, second.latent_mean) and first.fingerprint == second.fingerprint


def test_a_decoder_is_not_trained_on_random_or_other_latents(demo: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(demo / "tokenizer")
    with pytest.raises(ValueError, match="freeze_encoder without init_from"):
        StartOptions(freeze_encoder=True)
    with pytest.raises(ValueError, match="the encoder of this config differs"):
        tokenizer.start_from(tiny_tokenizer())
