"""`prepare`: the same bytes from any engine and after any interruption, a manifest that is true, and its commands."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.prepare import finalize as finalize_module
from data.prepare.engines import processes, ray, run
from data.prepare.options import PrepareConfig
from data.schema import DataError
from data.sources.open import SourceConfig
from tests.data_samples import (
    SCENES,
    contents,
    encoded,
    flickr_folder,
    photo,
    prepared,
    samples_in,
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
