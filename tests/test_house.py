"""The files around the code agree with each other and with what the code imports."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [text for group in PROJECT["optional-dependencies"].values() for text in group]
IMPORT_NAMES = {
    "open_clip_train": "open-clip-torch",
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
    "lazy_loader": "lazy-loader",
    "rapidocr_onnxruntime": "rapidocr-onnxruntime",
    "gradio_client": "gradio",  # comes with it
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "names and exact versions only: no host, no marker, no range"
    return {normal(name): version for name, version in pairs}


def test_every_dependency_is_pinned_within_its_bounds_and_justified() -> None:
    pinned = constraints()
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert any(f'"{text}",  # ' in line for line in lines), f"{text} has no comment saying why it is there"
        assert requirement.specifier.contains(Version(pinned[normal(requirement.name)])), text
    optional = {"torch-fidelity", "unspool"}  # not among the tested versions; the project itself, for its extras
    for text in EXTRAS:
        requirement = Requirement(text)
        if requirement.name not in optional:
            assert requirement.specifier.contains(Version(pinned[normal(requirement.name)])), text


def imports_of(rooms: set[str]) -> set[str]:
    """Names of all distributions that files of these folders import, inside functions too."""
    names: set[str] = set()
    for file in (file for room in rooms for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return {normal(IMPORT_NAMES.get(top, top)) for top in {name.split(".")[0] for name in names}}


def test_every_declared_dependency_is_imported_by_the_package() -> None:
    imported = imports_of({"data", "stage1_tokenizer", "stage2_prior"})
    for text in PROJECT["dependencies"]:
        name = normal(Requirement(text).name)
        assert name in imported, f"{name} is declared in pyproject.toml and nothing imports it: remove it"


def test_what_the_code_imports_is_declared() -> None:
    declared = {normal(Requirement(text).name) for text in [*PROJECT["dependencies"], *EXTRAS]}
    rooms = {"data", "stage1_tokenizer", "stage2_prior", "tests"}
    for room in rooms:
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for name in {name.split(".")[0] for name in names} - rooms - sys.stdlib_module_names:
                    found = normal(IMPORT_NAMES.get(name, name))
                    assert found in declared, f"{file.relative_to(ROOT)} imports {name}, which pyproject.toml lacks"


def test_one_test_command_everywhere() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == "make test" and "set -euo pipefail" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme and "make demo" in readme


def test_the_demo_runs_commands_and_configs_that_exist() -> None:
    recipe = subprocess.run(
        ["make", "-n", "-o", "setup", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    modules = re.findall(r"^python -m ([\w.]+)", recipe, flags=re.MULTILINE)
    assert modules[0] == "data" and modules[-1] == "stage2_prior" and len(modules) == 7
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for config in re.findall(r"--config (configs[\w/.]+)", (ROOT / "Makefile").read_text()):
        assert (ROOT / config).is_file(), config


def test_git_shows_the_data_package_and_hides_runs() -> None:
    if not (ROOT / ".git").exists():
        return  # an unpacked archive
    names = ["data/schema.py", "data/new.py", "runs/demo/data/manifest.json", ".venv/bin/python"]
    run = subprocess.run(["git", "-C", str(ROOT), "check-ignore", *names], capture_output=True, text=True, check=False)
    assert run.stdout.split() == names[2:]


def test_the_licence_is_the_one_that_is_named() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
