"""The command line: short errors, overlays, classes by path, precision, compilation."""

import importlib
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from stage1_tokenizer.commands import answered
from stage1_tokenizer.training import launch, parser
from stage1_tokenizer.training.cli import UnspoolCLI, run_cli
from stage1_tokenizer.training.launch import (
    UsageError,
    compile_networks,
    keep_freed_memory,
    resolve_precision,
    several_ranks,
)
from tests.test_configs import STAGES
from tests.tiny import CAPTIONS, pictures, tiny_tokenizer
from tests.tiny_run import NumbersModule, TinyLit, fresh, run

__all__ = ["fresh"]  # a fixture that every test here uses


def test_evaluating_without_an_export_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, command="test")
    assert stopped.value.code == 1
    assert "run fit first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.widht=3"], "widht"),
        (["--model.width=abc"], "abc"),
        (["--trainer.precision=32-true"], "top-level option precision"),
        (["--precision=bf16-true"], "bf16-mixed"),
        (["--trainer.strategy=fsdp"], "which shards weights, wanted ddp"),
        (["--resume=nowhere.ckpt"], "nowhere.ckpt, which is no file"),
        (["--resume=auto", "--overwrite=true"], "choose one"),
    ],
)
def test_wrong_options_get_a_short_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *words)
    error = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and expected in error
    assert "All options" not in error or "python -m stage1_tokenizer fit --help" in error
    assert error.count("\n") <= 2 and "usage:" not in error


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--model.widht=3"], "width"),
        (["--trainer.max_stpes=3"], "trainer.max_steps"),
        (["--runn_dir=3"], "run_dir"),
        (["--data.batchsize=3"], "batch_size"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], meant: str
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *words)
    assert f"did you mean {meant}" in capsys.readouterr().err.splitlines()[0]


def test_misspelt_keys_of_a_config_are_answered_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, meant in (({"trainer": {"maxsteps": 3}}, "trainer.max_steps"), ({"ema": {"deacy": 0.5}}, "ema.decay")):
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(SystemExit):
            run(tmp_path, f"--config={tmp_path / 'wrong.yaml'}")
        assert f"did you mean {meant}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--nothing.like.it=3")
    assert "did you mean" not in capsys.readouterr().err


def test_threads_of_a_command_sleep_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, wanted in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_WAIT_POLICY": given})
        assert answered("prog", "fit", {"fit": "train"}) is None
        assert os.environ["OMP_WAIT_POLICY"] == wanted


@pytest.mark.parametrize("stage", ["stage1_tokenizer", "stage2_prior"])
def test_help_says_what_commands_do_and_loads_nothing(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"import sys; from {stage}.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RUN_DIR/" in done.stdout and done.stdout.endswith("False\n") and "optimization routine" not in done.stdout
    main = importlib.import_module(f"{stage}.__main__").main
    assert main(["fitt"]) == 2 and "did you mean fit?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "--help"])
    assert stopped.value.code == 0 and "RUN_DIR/" in capsys.readouterr().out.split("options:")[0]


def test_help_lists_the_trainer_options_that_people_set_and_all_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = []
    for words in (["--help"], ["--help=all"]):
        with pytest.raises(SystemExit):
            run(tmp_path, *words)
        pages.append(capsys.readouterr().out)
    short, whole = pages
    for option in ("--trainer.max_steps", "--run_dir", "--live.every_n_steps", "--help=all"):
        assert option in short
    assert "--trainer.barebones" not in short and "--trainer.barebones" in whole
    assert short.count("\n") < 0.7 * whole.count("\n")


class OtherLit(TinyLit):
    """A variant that trains differently: chosen by its class path in an overlay."""

    def __init__(self, width: int = 8, lr: float = 1e-2, layer: dict[str, Any] | None = None, extra: int = 1) -> None:
        super().__init__(width, lr, layer)
        self.extra = extra


def test_an_overlay_changes_the_class_and_keeps_the_arguments(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
    base.write_text(yaml.safe_dump({"model": {"width": 6, "lr": 0.1}}))
    overlay.write_text(yaml.safe_dump({"model": {"class_path": f"{__name__}.OtherLit", "init_args": {"extra": 7}}}))
    words = [f"--config={base}", "--trainer.max_steps=1"]
    plain = run(tmp_path / "plain", *words)
    other = run(tmp_path / "other", *words, f"--config={overlay}", "--model.lr=0.3")
    assert type(plain.model) is TinyLit and (plain.model.hparams["width"], plain.model.lr) == (6, 0.1)
    assert isinstance(other.model, OtherLit)
    assert (other.model.extra, other.model.lr, other.model.net[0].out_features) == (7, 0.3, 6)
    saved = tmp_path / "other" / "stage1" / "config.yaml"
    again = run(tmp_path, f"--config={saved}", f"--run_dir={tmp_path / 'again'}")
    assert isinstance(again.model, OtherLit) and again.model.extra == 7  # a saved config is a config


def test_options_are_those_of_jsonargparse_though_no_class_is_checked_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = "--model.tokenizer.init_args"
    words = [f"{part}.encoder=stage1_tokenizer.TiTokEncoder", f"{part}.decoder.init_args.depth=5", "--sizes.width=64"]
    quick = read_only("stage1", *words)
    with monkeypatch.context() as patch:
        patch.setattr(parser, "is_subclass_spec", lambda value: False)  # nothing is known
        assert quick == read_only("stage1", *words)
    assert quick != read_only("stage1", *words[1:])
    with pytest.raises(SystemExit):  # what a class requires is missed, though it was looked at before
        read_only("stage1", "--config=variants/streaming")
    assert "required: train_urls" in capsys.readouterr().err


class Read(BaseException):
    """Raised in place of running a command whose options were read."""


def read_only(stage: str, *words: str) -> dict[str, Any]:
    """Options of a fit of the demo with these words."""
    found: list[dict[str, Any]] = []

    class Reading(UnspoolCLI):
        def before_instantiate_classes(self) -> None:
            found.append(self.config.as_dict())
            raise Read

    with pytest.raises(Read):
        Reading(stage, *STAGES[stage], stage, ["fit", "--config=demo", "--run_dir=nowhere", *words])
    return found[0]


def test_unknown_keys_of_a_config_file_and_overlays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, overlay, wrong = (tmp_path / name for name in ("base.yaml", "overlay.yaml", "wrong.yaml"))
    base.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "model": {"width": 6, "lr": 0.1}}))
    overlay.write_text(yaml.safe_dump({"model": {"lr": 0.2}}))
    wrong.write_text(yaml.safe_dump({"model": {"codebook": 3}}))
    both = run(tmp_path / "run", f"--config={base}", f"--config={overlay}", "--trainer.max_steps=1")
    assert (both.model.hparams["width"], both.model.lr) == (6, 0.2)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", f"--config={base}", f"--config={wrong}")
    assert "codebook" in capsys.readouterr().err


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_fast_bfloat16", lambda device: True)
    assert resolve_precision("auto", "cpu") == "bf16-mixed"
    monkeypatch.setattr(launch, "has_fast_bfloat16", lambda device: False)
    assert resolve_precision("auto", "cpu") == "32-true"
    assert resolve_precision("bf16-mixed", "cpu") == "bf16-mixed"
    for accelerator in ("cpu", "cuda"):
        with pytest.raises(UsageError, match=r"float16 overflows above 65,504.*choose bf16-mixed"):
            resolve_precision("16-mixed", accelerator)


def test_compiling_keeps_names_and_results_and_does_compile() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu()

    torch.manual_seed(0)
    networks = nn.ModuleDict({"body": Body(), "head": nn.Linear(4, 2)})
    x, keys = torch.randn(3, 4), list(networks.state_dict())
    plain = networks["head"](networks["body"](x))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_networks(networks, backend="eager") == 2  # the container has no forward: its two children
    compiled = networks["head"](networks["body"](x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(compiled, plain)
    assert list(networks.state_dict()) == keys


def test_compiling_a_tokenizer_leaves_its_losses_and_its_names() -> None:
    tokenizer, images = tiny_tokenizer().train(), pictures(4)
    ids, names = tokenizer.vocabulary.encode(CAPTIONS)[0], list(tokenizer.state_dict())

    def losses() -> dict[str, Tensor]:
        torch.manual_seed(1)
        return tokenizer.losses(images, ids)[0]

    plain = losses()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_networks(tokenizer, backend="eager") >= 5
    torch.testing.assert_close(losses(), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert list(tokenizer.state_dict()) == names
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("devices", "nodes", "world", "several"),
    [
        (1, 1, None, False), ("1", 1, None, False), ("1,", 1, None, False), ([1], 1, None, False),
        (2, 1, None, True), ("2", 1, None, True), ("0,1", 1, None, True), ([0, 1], 1, None, True),
        ("auto", 1, None, False), (1, 2, None, True), ("auto", 1, "2", True), (1, 1, "1", False),
    ],
)  # fmt: skip
def test_several_ranks_are_told_from_the_options(
    monkeypatch: pytest.MonkeyPatch, devices: Any, nodes: int, world: str | None, several: bool
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert several_ranks(devices, nodes, "cpu") == several


@pytest.mark.parametrize(("found", "several"), [(1, False), (2, True)])
def test_devices_that_are_found_count(monkeypatch: pytest.MonkeyPatch, found: int, several: bool) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    for devices in ("auto", -1, "-1"):
        assert several_ranks(devices, 1, "auto") == several_ranks(devices, 1, "gpu") == several
    assert not several_ranks("auto", 1, "cpu")


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_ranks_may_leave_parameters_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setattr(UnspoolCLI, "fit", lambda self, model, datamodule: None)
    cli = run(tmp_path, f"--trainer.strategy={strategy}", "--trainer.devices=2")
    assert cli.trainer.strategy._ddp_kwargs == {"find_unused_parameters": True}


def test_help_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli("stage1", TinyLit, NumbersModule, "python -m stage1_tokenizer", ["fit", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--run_dir" in text and "python -m stage1_tokenizer" in text


def test_freed_memory_is_used_again_and_not_fetched_anew() -> None:
    if not keep_freed_memory():
        pytest.skip("another allocator than glibc's")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12_000_000)  # 48 MB, 11,719 pages: more than glibc keeps by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert sum([faults() for _ in range(8)][4:]) < 11_719
