"""Small pictures, folders and runs of `prepare` that several tests of the data room use."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.prepare.engines import processes, run
from data.prepare.options import PrepareConfig
from data.prepare.quality import Filters
from data.sources.open import SourceConfig

SCENES = SourceConfig("scenes", num=60, size=16)


def photo(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A smooth random picture with some grain: something a codec and a hash can tell from another seed's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.fromarray(
        np.clip(np.asarray(coarse, np.int16) + rng.integers(-4, 5, (height, width, 1)), 0, 255).astype("u1")
    )


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def flickr_folder(root: Path, count: int = 12, captions: int = 5) -> Path:
    """The Flickr8k layout: Images/ and captions.txt."""
    (root / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for i in range(count):
        (root / "Images" / f"{i:03d}_ab.jpg").write_bytes(encoded(photo(i)))
        lines += [f'{i:03d}_ab.jpg,"picture {i}, seen {c} times ."' for c in range(captions)]
    (root / "captions.txt").write_text("\n".join(lines) + "\n")
    return root


def tar_of(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def prepared(source: SourceConfig, out: Path, workers: int = 1, **options: Any) -> dict[str, Any]:
    """Run prepare on `source`; return the manifest. `filters` may be a dictionary."""
    if isinstance(options.get("filters"), dict):
        options["filters"] = Filters(**options["filters"])
    options = {"size": 16, "format": "png", "val_fraction": 0.25, "shard_size": 5, **options}
    manifest = run(PrepareConfig(source, **options), out, processes(workers), lambda _: None)
    assert manifest is not None
    return manifest


def samples_in(out: Path) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield (split, key, members) of everything under a data directory, read by tarfile alone."""
    for path in sorted(out.glob("*/*.tar")):
        found: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, member = info.name.partition(".")
                content = tar.extractfile(info)
                assert content is not None
                found.setdefault(key, {})[member] = content.read()
        for key, members in found.items():
            yield path.parent.name, key, members


def records_in(out: Path) -> dict[str, dict[str, Any]]:
    """Return the json of every sample by key, its split added."""
    return {key: {**json.loads(members["json"]), "split": split} for split, key, members in samples_in(out)}


def dropped_in(out: Path) -> list[tuple[str, str]]:
    """Return (key, reason) of `dropped.jsonl`."""
    lines = (out / "dropped.jsonl").read_text().splitlines()
    return [(line["key"], line["reason"]) for line in map(json.loads, lines)]


def contents(out: Path) -> dict[str, bytes]:
    """Return the bytes of every shard, size list, drop list and manifest."""
    wanted = [*out.glob("*/*.tar"), *out.glob("*/sizes.json"), out / "manifest.json", out / "dropped.jsonl"]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(wanted)}


def foreign(root: Path) -> Path:
    """Tars as img2dataset leaves them: no manifest, captions in txt and json, jpg pictures, members to ignore."""
    for shard in range(2):
        members = []
        for i in range(20):
            key = f"{shard:05d}{i:04d}"
            members += [(f"{key}.jpg", encoded(photo(i))), (f"{key}.txt", f"text {key}".encode())]
            members += [
                (f"{key}.json", json.dumps({"caption": f"text {key}", "url": "x"}).encode()),
                (f"{key}.pkl", b"x"),
            ]
        tar_of(root / f"{shard:05d}.tar", members)
    return root
