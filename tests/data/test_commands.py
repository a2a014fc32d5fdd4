"""`python -m data`: options, sentences, exit statuses, and every shipped config."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import main
from tests.data_samples import (
    encoded,
    flickr_folder,
    photo,
    records_in,
    tar_of,
)


def test_commands_end_with_a_sentence_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["prepare", "--source", "scenes", "--num", "30", "--size", "16", "--out", out, "--workers", "1"]) == 0
    assert "train and" in capsys.readouterr().out
    assert main(["verify", out]) == 0 and main(["stats", out]) == 0
    said = capsys.readouterr().out
    assert "caption length" in said and "plotted in" in said and (tmp_path / "out" / "stats.png").is_file()
    assert main(["prepare", "--path", str(tmp_path / "nowhere"), "--out", out]) == 1
    assert "no file or folder at" in capsys.readouterr().err
    assert main(["stats", str(tmp_path)]) == 1
    assert "no manifest.json" in capsys.readouterr().err
    (tmp_path / "out" / "train" / "00000.tar").unlink()
    assert main(["verify", out]) == 1
    assert main(["prepare", "--source", "scenes", "--num", "0", "--out", out]) == 1


def test_options_from_a_file_are_checked_and_the_command_line_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("source: scenes\nnum: 40\nsize: 16\nval-fraction: 0.5\nworkers: 1\n")
    arguments = ["prepare", "--config", str(file), "--out"]
    assert main([*arguments, str(tmp_path / "a"), "--num", "20"]) == 0
    assert len(records_in(tmp_path / "a")) == 20
    assert main(["prepare", "--num", "10", "--out", str(tmp_path / "c"), f"--config={file}"]) == 0
    assert len(records_in(tmp_path / "c")) == 10, "in any order"
    assert capsys.readouterr().err.splitlines()[-1].startswith("prepare: 100%"), "a log has lines"
    for line, sentence in (
        ("nmu: 3", "'nmu'"),
        ("size: big", 'Parser key "size"'),
        ("source: foo", "'foo' not among choices"),
        ("num: 4.5", "Got value: 4.5"),
        (": : {", "parsing"),
        ("- 3", "config"),
    ):
        file.write_text(line + "\n")
        assert main([*arguments, str(tmp_path / "b")]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    file.write_text(f"path: {tmp_path / 'nowhere'}\n")  # one path without brackets
    assert main([*arguments, str(tmp_path / "b")]) == 1
    assert "no file or folder at" in capsys.readouterr().err
    assert main(["prepare", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_prepare_starts_without_torch() -> None:
    code = (
        "import sys, data.prepare.engines, data.prepare.progress, data.__main__ as m\n"
        "try: m.main(['prepare', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--near-duplicates" in done.stdout


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_config_prepares_a_small_set(tmp_path: Path, file: Path) -> None:
    command = ["prepare", "--config", str(file), "--out", str(tmp_path / "out"), "--workers", "1"]
    if "source: scenes" in file.read_text():
        command += ["--num", "30"]
    elif "source: folder" in file.read_text():
        command += ["--path", str(flickr_folder(tmp_path / "flickr"))]
    elif "source: parquet" in file.read_text():
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
        image = [{"bytes": encoded(photo(i, 32, 32), "PNG"), "path": None} for i in range(12)]
        pyarrow_parquet.write_table(
            pyarrow.table({"image": image, "label": [*range(10), 0, 1]}), tmp_path / "train.parquet"
        )
        command += ["--path", str(tmp_path / "train.parquet")]
    else:
        members = [
            m for i in range(12) for m in ((f"{i}.jpg", encoded(photo(i, 300, 260))), (f"{i}.txt", b"a caption"))
        ]
        command += ["--path", str(tar_of(tmp_path / "tars" / "0.tar", members))]
    assert main(command) == 0
    assert len(records_in(tmp_path / "out")) == (30 if "--num" in command else 12)
