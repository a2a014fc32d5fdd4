"""What README, docstrings and configs tell people to type works: it is run, shrunk, where that is cheap, else parsed.

Run, in the README's order and in one folder: making data, both fits, both predicts, one picture, verify and stats, and
the Python example on what they left. Parsed by the command's own parser, with every config it names: all of them.
CONTRIBUTING has a test of its own.
"""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from PIL import Image

from tests.data_samples import flickr_folder
from tests.test_end_to_end import SHRUNK
from tests.tiny import pictures

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"python -m ((?:data|stage1_tokenizer|stage2_prior)[\w.]*) ([^`]*)")
MORE = {  # what makes a command of the README small
    ("data", "prepare"): ["--workers=1"],
    ("stage1_tokenizer", "fit"): [*SHRUNK, "--model.passes.statistics_images=16"],
    ("stage1_tokenizer", "predict"): ["--data.val_batch_size=50"],
    ("stage2_prior", "fit"): SHRUNK,
    ("stage2_prior", "predict"): ["--model.sampling.steps=2"],
    ("stage1_tokenizer", "reconstruct"): [],
    ("data", "verify"): [],
    ("data", "stats"): [],
}


def cleaned(text: str) -> list[str]:
    """Words of a command without the comment behind it; [] for a pattern of commands and not one that is typed."""
    text = re.split(r"\s#\s", text.strip())[0]
    return [] if re.search(r"\||\.\.\.|\[", text) else shlex.split(text)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def typed(page: str) -> list[tuple[str, list[str]]]:
    """(module, words) of the commands in a page's shell blocks, in their order."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").replace("torchrun --nproc_per_node 8 -m", "python -m")
    found = [match for line in lines.splitlines() if (match := COMMAND.match(line))]
    return [(match[1], words) for match in found if (words := cleaned(match[2]))]


def documented() -> list[tuple[str, str, list[str]]]:
    """(file, module, words) of the commands in docstrings and in comments of configs."""
    made = []
    files = [path for room in ("data", "stage1_tokenizer", "stage2_prior") for path in (ROOT / room).rglob("*.py")]
    for path in files:
        tree = ast.parse(path.read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        text = "\n".join(ast.get_docstring(node, clean=False) or "" for node in nodes)
        made += [(path, m) for m in re.finditer(r"(?m)^ {4}" + COMMAND.pattern, re.sub(r"\\\s*\n\s*", " ", text))]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
        made += [(path, m) for line in lines for m in COMMAND.finditer(line)]
    return [
        (path.relative_to(ROOT).as_posix(), match[1], words)
        for path, match in made
        for line in [match[2].splitlines()[0]]
        if (words := cleaned(line))
    ]


class Understood(BaseException):
    """Raised in place of running a command that was parsed."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

        def parse(self: Any, *args: Any, original: Any = kind.parse_args, **kwargs: Any) -> Any:
            original(self, *args, **kwargs)
            raise Understood

        monkeypatch.setattr(kind, "parse_args", parse)


def main_of(module: str) -> Any:
    """The main function behind `python -m module`."""
    name = module if "." in module else f"{module}.__main__"
    return importlib.import_module(name).main


PARSED = [*documented(), *(("README.md", *command) for command in typed("README.md"))]


@pytest.mark.parametrize(("file", "module", "words"), PARSED, ids=[f"{f}: {' '.join(w)[:40]}" for f, _, w in PARSED])
def test_a_documented_command_is_understood(parse_only: None, file: str, module: str, words: list[str]) -> None:
    with pytest.raises(Understood):
        main_of(module)([word.replace("NAME", "demo") for word in words])


def test_the_commands_are_found() -> None:
    modules = [module for module, _ in typed("README.md")]
    assert modules[0] == "data" and len(modules) >= 10 and len(documented()) >= 20
    assert cleaned("fit --config demo   # -> runs/demo") == ["fit", "--config", "demo"]
    assert cleaned("fit|validate --config x") == [] and cleaned("prepare --out [DIR]") == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the README's commands have run, and what they asked for."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("readme")
        patch.chdir(place)
        (place / "captions.txt").write_text("a red circle\na blue star\n")
        flickr_folder(place / "FOLDER")
        shown = ((pictures(1, 40)[0] + 1) * 127.5).byte().permute(1, 2, 0)
        Image.fromarray(shown.numpy()).save(place / "photo.jpg")
        for module, words in typed("README.md"):
            if (module, words[0]) in MORE and not {"imagenet256", "FONT"} & set(words):
                words = ["120" if word == "40000" else word.replace("NAME", "mine") for word in words]
                assert not main_of(module)([*words, *MORE[module, words[0]]]), words
        yield place


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(folder: Path) -> None:
    left = ["runs/demo/tokenizer", "runs/demo/latents", "runs/demo/prior", "grid.png", "runs/mine/data/stats.png"]
    assert [name for name in left if not (folder / name).exists()] == []
    assert len(list((folder / "runs/demo/images").glob("*.png"))) == 2


@pytest.mark.slow
def test_the_python_example_runs_on_what_the_commands_left(folder: Path) -> None:
    names: dict[str, Any] = {"images": pictures(2, 32), "captions": ["a red circle", "a blue star"]}
    for code in blocks("README.md", "python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["x"].shape == (1, 3, 32, 32) and torch.isfinite(names["nats"]).all()
