"""Hostile exports, checkpoints, arguments of calls, configs and command lines."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer import Tokenizer
from stage1_tokenizer.training.checkpoint_file import is_whole
from stage1_tokenizer.training.cli import UnspoolCLI, run_cli
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage1_tokenizer.training.run_folder import RunFolder
from stage2_prior import CausalPrior, Guidance, Prior
from stage2_prior.heads.solvers import Euler, Midpoint
from tests import small_priors
from tests.fuzz.damage import PICKLE, Program, damaged, damaged_json, text_of, values
from tests.fuzz.guard import budget, case, place
from tests.tiny import CAPTIONS, SIZE, C, K, tiny_tokenizer
from tests.tiny_run import checkpoint, fresh, run

__all__ = ["fresh"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of an exported tokenizer and an exported prior."""
    root = tmp_path_factory.mktemp("exports")
    tiny_tokenizer(linear_path=True).save_pretrained(root / "tokenizer")
    small_prior().save_pretrained(root / "prior")
    return {kind: {p.name: p.read_bytes() for p in (root / kind).iterdir()} for kind in ("tokenizer", "prior")}


def small_prior() -> Prior:
    return small_priors.awake(CausalPrior(K, C, *small_priors.parts(K, C)))


@st.composite
def damaged_exports(draw: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    files, part = dict(files), draw(st.integers(0, 3))
    weights = files["model.safetensors"]
    header = int.from_bytes(weights[:8], "little")
    if part < 2:
        files["config.json"] = text_of(draw(damaged_json(json.loads(files["config.json"]))))
    elif part == 2:
        entries = draw(damaged_json(json.loads(weights[8 : 8 + header])))
        text = text_of(entries)
        files["model.safetensors"] = len(text).to_bytes(8, "little") + text + weights[8 + header :]
    else:
        name = draw(st.sampled_from(sorted(files)))
        files[name] = draw(damaged([files[name][: 8 + header + 4000], PICKLE]))
    return files


@budget(250)
@given(data=st.data(), kind=st.sampled_from(["tokenizer", "prior"]))
def test_exports(exports: dict[str, dict[str, bytes]], kind: str, data: st.DataObject) -> None:
    files = data.draw(damaged_exports(exports[kind]))
    with place() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with case(folder):
            loaded = Tokenizer.from_pretrained(folder) if kind == "tokenizer" else Prior.from_pretrained(folder)
            assert sum(p.numel() for p in loaded.parameters()) < 1e6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with its checkpoint after two steps."""
    root = tmp_path_factory.mktemp("finished")
    run(root, "--trainer.max_steps=2")
    return root


@budget(150)
@given(data=st.data())
def test_files_of_checkpoints(finished: Path, data: st.DataObject) -> None:
    content = data.draw(damaged([(finished / "stage1" / "checkpoints" / "last.ckpt").read_bytes(), PICKLE]))
    with place() as folder:
        run_folder = RunFolder(folder, "stage1")
        run_folder.checkpoint_dir.mkdir(parents=True)
        run_folder.last_checkpoint.write_bytes(content)
        with case(folder):
            whole = run_folder.checkpoint_to_resume("auto", overwrite=False)
            assert whole is not None and is_whole(whole)


@budget(60)
@given(data=st.data())
def test_contents_of_checkpoints(finished: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject) -> None:
    stored = torch.load(finished / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
    odd = values() | st.sampled_from([torch.zeros(2), torch.zeros(8, 4), Program()])
    with place() as folder:
        last = folder / "stage1" / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        torch.save(data.draw(damaged_json(stored, 3, odd)), last)
        with case(folder, 1):
            run(folder, "--trainer.max_steps=3", "--resume=auto")
            assert all(bool(v.isfinite().all()) for v in checkpoint(folder)["state_dict"].values())
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("\n") <= 2, said


TOKENIZER, PRIOR = tiny_tokenizer(), small_prior()
SHAPES = [(), (0,), (2,), (0, K, C), (2, K, C), (2, 1, C), (2, K + 1, C), (2, K, C + 1), (0, 3, SIZE, SIZE)]
SHAPES += [(2, 3, SIZE, SIZE), (2, 1, SIZE, SIZE), (2, 3, SIZE, SIZE + 1), (1, 1, 1, 1, 1)]
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Tensors of any shape and dtype, some with values that are not finite or not in range."""
    x = torch.rand(draw(st.sampled_from(SHAPES)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    if draw(st.integers(0, 2)) == 0 and x.numel():
        x.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), -1e30, 300.0]))
    return x.to(draw(st.sampled_from([torch.float32] * 5 + DTYPES)))


def some(*good: Any) -> st.SearchStrategy[Any]:
    """A good value as often as a hostile one."""
    return st.sampled_from(good) | values()


TEXTS = [
    CAPTIONS[:2],
    [],
    "",
    "a",
    ["a", None],
    [" "],
    ["\ud800"],
    ["a\0b"],
    ["x" * 100_000],
    ["\U0001f415" * 3000],
    None,
    7,
]
CALLS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "encode": st.fixed_dictionaries({"images": tensors(), "k": some(None, 1, K)}),
    "decode": st.fixed_dictionaries({"z": tensors()}),
    "embed_latents": st.fixed_dictionaries({"z": tensors()}),
    "embed_text": st.fixed_dictionaries({"captions": st.sampled_from(TEXTS)}),
    "embed_images": st.fixed_dictionaries({"images": tensors(), "k": some(None, 2)}),
    "log_prob": st.fixed_dictionaries({"z": tensors(), "captions": st.sampled_from(TEXTS), "steps": some(2)}),
    "sample": st.fixed_dictionaries(
        {"captions": st.sampled_from([CAPTIONS[:2]] * 8 + TEXTS)},
        optional={
            "guidance": some(1.0, 2.0, 0.0, Guidance(2.0)),
            "steps": some(None, 2),
            "temperature": some(1.0, 0.0),
            "solver": st.sampled_from([None, Euler(2), Midpoint(2)]),
            "prefix": st.none() | tensors(),
            "num_latents": some(None, 1, K),
            "negative": some(None, "a cross") | st.sampled_from(TEXTS),
        },
    ),
}


@budget(400)
@given(data=st.data(), name=st.sampled_from(sorted(CALLS)))
def test_calls(name: str, data: st.DataObject) -> None:
    arguments = data.draw(CALLS[name])
    with place() as folder, case(folder), torch.no_grad():
        result = getattr(PRIOR if name in ("sample", "log_prob") else TOKENIZER, name)(**arguments)
        assert isinstance(result, torch.Tensor)
        given = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
        assert any(not bool((a.abs() < 1e3).all()) for a in given) or bool(result.isfinite().all())


ENCODER = "stage1_tokenizer.QFormerEncoder"
OVERLAY: dict[str, Any] = {
    "model": {
        "tokenizer": {
            "init_args": {"encoder": {"class_path": "stage1_tokenizer.QFormerEncoder", "init_args": {"depth": 1}}}
        },
        "optimizer": {"lr": 0.001, "matrix_lr": 0.01},
        "schedule": {"warmup_steps": 3, "flat_fraction": 0.3},
        "long_captions": 0.5,
        "image_losses": None,
    },
    "data": {"batch_size": 4, "num_workers": 0, "flip": 0.0, "seed": 0, "predict_splits": ["train"]},
    "trainer": {"max_steps": 3, "accelerator": "cpu", "devices": 1, "callbacks": None, "logger": None},
    "sizes": {"width": 32, "num_latents": 8, "latent_dim": 4},
    "ema": {"decay": 0.9},
    "checkpoint": {"every_n_steps": 3, "keep_every": None},
    "nan_guard": {"every_n_steps": 3},
    "precision": "32-true",
    "seed_everything": 1,
    "resume": None,
    "compile": False,
}
TOO_MUCH = (2**31, 10**30, 1e308, 5000)  # a model may be as large as a user's own config says


@budget(30)
@given(overlay=damaged_json(OVERLAY, 3, values().filter(lambda value: value not in TOO_MUCH)))
def test_configs(overlay: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with place() as folder, quiet():
        (folder / "overlay.yaml").write_bytes(text_of(overlay))  # JSON is YAML
        words = ["fit", "--config=demo", f"--config={folder / 'overlay.yaml'}", f"--run_dir={folder / 'run'}"]
        with case(folder, 1, 2), pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnspoolCLI, "fit", lambda *a, **k: None)
            run_cli("stage1", LitTokenizer, ImageDataModule, "stage1", words)
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("\n") <= 3, said


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the environment and the random state that parsing a config sets."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(os, "environ", os.environ.copy())
        yield
