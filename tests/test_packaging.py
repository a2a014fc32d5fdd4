"""What is installed is complete: a wheel holds code, configs, templates and type stubs, and runs from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a clean copy of the tracked files, unpacked as an installer would."""
    made, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tracked files are unknown")
    archive = made / "tracked.tar"
    subprocess.run(["git", "-C", str(ROOT), "archive", "-o", str(archive), "HEAD"], check=True)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(source)], check=True)  # no filters before Python 3.11.4
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(made), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = made.glob("unspool-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(made / "site")
    return made / "site"


def run(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the unpacked wheel, from a folder that is not the repository."""
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=folder, env=env)


def test_the_wheel_holds_what_the_commands_need(site: Path) -> None:
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    for wanted in ("configs/stage1/demo.yaml", "stage1_tokenizer/__init__.pyi", "stage2_prior/heads/base.py"):
        assert wanted in names
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    for name in tracked.split():
        if name.split("/")[0] in ("data", "stage1_tokenizer", "stage2_prior", "configs"):
            assert name in names, f"the wheel lacks {name}"
    assert not any(name.startswith("tests/") for name in names)


@pytest.mark.slow
def test_its_commands_run_from_another_folder(site: Path, tmp_path: Path) -> None:
    words = ["data", "prepare", "--source", "scenes", "--num", "20", "--workers", "1", "--out", "scenes"]
    done = run(site, tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "scenes" / "manifest.json").is_file()
    done = run(site, tmp_path, "stage1_tokenizer", "fit", "--config", "demo", "--print_config")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stage1_tokenizer.QFormerEncoder" in done.stdout
    done = run(site, tmp_path, "stage2_prior", "fit", "--config", "nothing")
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) <= 2, done.stderr
