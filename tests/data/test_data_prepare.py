"""`prepare`: the same bytes from any engine and after any interruption, a manifest that is true, and its commands."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from data.__main__ import main
from data.prepare import finalize as finalize_module
from data.prepare.engines import processes, ray, run
from data.prepare.options import PrepareConfig
from data.prepare.stats import describe, plot
from data.prepare.verify import verify
from data.schema import DataError
from data.sources.open import SourceConfig
from tests.data_samples import (
    SCENES,
    contents,
    encoded,
    flickr_folder,
    photo,
    prepared,
    records_in,
    samples_in,
    tar_of,
)


def config(**options: Any) -> PrepareConfig:
    return PrepareConfig(SCENES, **{"size": 16, "format": "png", "val_fraction": 0.25, "shard_size": 7, **options})


def test_same_bytes_from_one_process_several_and_tasks(tmp_path: Path) -> None:
    run(config(), tmp_path / "one", processes(1), lambda _: None)
    run(config(), tmp_path / "three", processes(3), lambda _: None)
    for task in (2, 0, 1):
        assert run(config(), tmp_path / "tasks", processes(1), lambda _: None, 3, task) is None
    finalize_module.finalize(tmp_path / "tasks")
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "tasks")
    assert len(list((tmp_path / "one").glob("train/*.tar"))) == 9


@pytest.mark.slow
def test_same_bytes_from_ray(tmp_path: Path) -> None:
    cluster = pytest.importorskip("ray")
    run(config(shard_size=20), tmp_path / "one", processes(1), lambda _: None)
    cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        run(config(shard_size=20), tmp_path / "ray", ray, lambda _: None)
    finally:
        cluster.shutdown()
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")


def test_tasks_that_are_missing_are_named(tmp_path: Path) -> None:
    run(config(), tmp_path / "out", processes(1), lambda _: None, 3, 1)
    with pytest.raises(DataError, match="6 of 9 chunks are not written yet"):
        finalize_module.finalize(tmp_path / "out")
    with pytest.raises(DataError, match="--task-id from 0"):
        run(config(), tmp_path / "out", processes(1), lambda _: None, 3, 3)


def test_a_finished_run_does_nothing_again_and_other_options_are_refused(tmp_path: Path) -> None:
    run(config(), tmp_path / "out", processes(1), lambda _: None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    run(config(), tmp_path / "out", processes(1), lambda _: None)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(DataError, match="other options"):
        run(config(quality=50), tmp_path / "out", processes(1), lambda _: None)


def test_a_folder_of_something_else_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        run(config(), tmp_path, processes(1), lambda _: None)
    with pytest.raises(DataError, match="is a file"):
        run(config(), tmp_path / "notes.txt", processes(1), lambda _: None)


def test_lost_and_damaged_shards_are_written_again(tmp_path: Path) -> None:
    run(config(), tmp_path / "out", processes(1), lambda _: None)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "train" / "00002.tar").unlink()
    with open(tmp_path / "out" / "val" / "00001.tar", "ab") as file:
        file.write(b"\0" * 512)
    (tmp_path / "out" / "chunks" / "00004.json").write_text('{"fingerpr')
    (tmp_path / "out" / "manifest.json").unlink()
    run(config(), tmp_path / "out", processes(1), lambda _: None)
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL of the main process, in the middle of whatever it does; its workers end themselves."""
    folder = flickr_folder(tmp_path / "flickr", count=180, captions=2)
    for i in range(9, 180, 9):  # something for the last phase to remove
        shutil.copy(folder / "Images" / "000_ab.jpg", folder / "Images" / f"{i:03d}_ab.jpg")
    options = ["--path", str(folder), "--resize", "no", "--shard-size", "6", "--near-duplicates", "0", "--workers", "2"]
    command = [sys.executable, "-m", "data", "prepare", *options, "--val-fraction", "0.2", "--out"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    span = time.monotonic() - begin
    clock = random.Random(0)
    kills = finished = 0
    while kills < 20:
        out = tmp_path / f"killed{finished}"
        process = subprocess.Popen(
            [*command, str(out)], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            process.wait(clock.uniform(0.1, 0.9) * span)
            finished += 1  # it was through before the blow; start another one
            assert contents(out) == contents(tmp_path / "whole")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run([*command, str(out)], env=environment, check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")
    keys = [key for _, key, _ in samples_in(out)]
    assert len(keys) == len(set(keys)) == 180 - 19


def test_a_crash_between_any_two_writes_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the n-th rename, for every n: each file is there whole or not at all, and the next run completes them."""
    folder = flickr_folder(tmp_path / "flickr", count=8, captions=1)
    shutil.copy(folder / "Images" / "001_ab.jpg", folder / "Images" / "004_ab.jpg")
    source = SourceConfig("folder", (str(folder),))
    # Two small samples fill one record of a tar as well as one does, so that the sizes of the shards tell nothing.
    options: dict[str, Any] = {"format": "jpg", "quality": 20, "resize": "no", "val_fraction": 0.0, "shard_size": 2}
    options["filters"] = {"near_duplicates": 0}
    assert prepared(source, tmp_path / "whole", **options)["dropped"] == {"near duplicate": 1}
    whole = contents(tmp_path / "whole")
    rename = os.replace
    for fatal in range(100):
        count = -1

        def replace(a: Any, b: Any) -> None:
            nonlocal count
            count += 1
            if count == fatal:  # noqa: B023
                raise KeyboardInterrupt
            rename(a, b)

        out = tmp_path / f"out{fatal}"
        monkeypatch.setattr(os, "replace", replace)
        try:
            prepared(source, out, **options)
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(os, "replace", rename)
        prepared(source, out, **options)
        assert contents(out) == whole, f"after a crash at rename {fatal}"
        assert not list(out.rglob("*.part"))
    assert fatal > 10


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # as if 8 kB were left
    try:
        with pytest.raises(DataError, match="cannot write .*make room"):
            run(config(shard_size=60), out, processes(1), lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.tar"))
    run(config(shard_size=60), out, processes(1), lambda _: None)
    run(config(shard_size=60), tmp_path / "whole", processes(1), lambda _: None)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=12)
    source = PrepareConfig(SourceConfig("folder", (str(folder),)), size=16, format="png", shard_size=5)

    def report(progress: Any) -> None:
        if progress.chunks == 1:
            (folder / "Images" / "000_ab.jpg").write_bytes(encoded(photo(500), quality=30))

    with pytest.raises(DataError, match="changed while it was read"):
        run(source, tmp_path / "out", processes(1), report)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_manifest_counts_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    manifest = prepared(SCENES, tmp_path)
    for name, shard in manifest["shards"].items():
        content = (tmp_path / name).read_bytes()
        assert shard["bytes"] == len(content) and shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert sum(s["count"] for s in manifest["shards"].values()) == 60 == sum(manifest["counts"].values())
    for split in ("train", "val"):
        sizes = json.loads((tmp_path / split / "sizes.json").read_text())
        assert sizes == {n.split("/")[1]: s["count"] for n, s in manifest["shards"].items() if n.startswith(split)}
    assert sum(manifest["caption_length"].values()) == 180 == manifest["captions"]["kept"]
    assert manifest["short_side"] == {"16": 60}
    assert manifest["versions"]["torchvision"] == version("torchvision")


def test_verify_names_what_is_wrong_down_to_the_member(tmp_path: Path) -> None:
    manifest = prepared(SCENES, tmp_path, format="jpg")
    assert list(verify(tmp_path)) == []
    first, second, third, *_ = [name for name in manifest["shards"] if name.startswith("train")]
    members = [(f"{k}.{m}", c) for s, k, ms in samples_in(tmp_path) for m, c in ms.items() if s == "train"][:9]
    spoiled = [(n, c[: len(c) // 2] if n == members[3][0] else c) for n, c in members]
    tar_of(tmp_path / first, spoiled)
    (tmp_path / second).unlink()
    (tmp_path / third).write_bytes((tmp_path / third).read_bytes()[:2000])
    shutil.copy(tmp_path / first, tmp_path / "train" / "77777.tar")
    problems = "\n".join(verify(tmp_path))
    assert f"{first}: {members[3][0]}: " in problems and members[0][0] not in problems
    assert f"{second}: missing" in problems
    assert f"{third}: " in problems and "truncated" in problems
    assert "77777.tar: not in the manifest" in problems


def test_stats_print_and_plot_every_histogram_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each count is on a bar, in the text and in the picture; a set that lost nothing has no panel for it."""
    drawn: list[Any] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    folder = flickr_folder(tmp_path / "flickr", count=9, captions=2)
    (folder / "Images" / "004_ab.jpg").write_bytes(b"no picture")
    (folder / "Images" / "005_ab.jpg").unlink()
    manifest = prepared(SourceConfig("folder", (str(folder),)), tmp_path / "out", filters={"min_caption": 3})
    text, path = describe(tmp_path / "out"), plot(tmp_path / "out")
    assert path == tmp_path / "out" / "stats.png" and Image.open(path).size[0] == 960
    panels = {panel.get_title(loc="left"): panel for panel in drawn[0].axes}
    bars = {title: [bar.get_width() for bar in panel.patches] for title, panel in panels.items()}
    assert bars == {
        "samples left out": [1, 1],
        "short side, pixels": [7],
        "caption length, characters": [14],
        "samples per split": list(manifest["counts"].values()),
    }
    names = [label.get_text() for label in panels["short side, pixels"].get_yticklabels()]
    assert names == ["32-63"] and "           32-63         7 ####" in text  # they were 40 pixels high
    assert "missing         1" in text and "unreadable         1" in text and "repaired: none" in text
    assert list(verify(tmp_path / "out")) == []  # the picture is no part of the data


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
