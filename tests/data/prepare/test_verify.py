"""A manifest says what is there, `verify` what is wrong, `stats` how much there is of what."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from data.prepare.stats import describe, plot
from data.prepare.verify import verify
from data.sources.open import SourceConfig
from tests.data_samples import (
    SCENES,
    flickr_folder,
    prepared,
    samples_in,
    tar_of,
)


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
