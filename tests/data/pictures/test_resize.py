"""Policies of resizing, and JPEGs that are decoded reduced."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources.open import SourceConfig
from tests.data_samples import (
    encoded,
    photo,
    prepared,
    samples_in,
)


@pytest.mark.parametrize(
    ("mode", "size"), [("center_crop", (32, 32)), ("keep_ratio", (64, 32)), ("budget", (45, 22)), ("no", (120, 60))]
)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_resize_policies(tmp_path: Path, mode: str, size: tuple[int, int], kind: str) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images" / "a.jpg").write_bytes(encoded(photo(5, 120, 60), quality=95))
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,x\n")
    source = SourceConfig("folder", (str(tmp_path),))
    prepared(source, tmp_path / "out", size=32, resize=mode, format=kind, quality=95)
    ((_, _, members),) = samples_in(tmp_path / "out")
    picture = Image.open(io.BytesIO(members[kind]))
    assert picture.size == size == tuple(json.loads(members["json"])[side] for side in ("width", "height"))
    box = (30, 0, 90, 60) if mode == "center_crop" else (0, 0, 120, 60)
    wanted = photo(5, 120, 60).resize(size, Image.Resampling.BICUBIC, box=box)
    assert np.abs(np.asarray(picture, np.int16) - np.asarray(wanted, np.int16)).mean() < (2 if kind == "png" else 7)


def test_large_jpegs_are_decoded_reduced_and_look_the_same(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    large = photo(6, 1600, 1200)
    (tmp_path / "Images" / "a.jpg").write_bytes(encoded(large, quality=95))
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,x\n")
    prepared(SourceConfig("folder", (str(tmp_path),)), tmp_path / "out", size=64)
    ((_, _, members),) = samples_in(tmp_path / "out")
    picture = Image.open(io.BytesIO(members["png"]))
    wanted = large.resize((64, 64), Image.Resampling.BICUBIC, box=(200, 0, 1400, 1200))
    error = np.mean((np.asarray(picture, np.float64) - np.asarray(wanted)) ** 2)
    assert 10 * np.log10(255**2 / error) > 40
    assert json.loads(members["json"])["original_width"] == 1600
