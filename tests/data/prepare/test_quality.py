"""Filters: every rule counts its reasons, near-duplicates are those of comparing all pairs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.prepare.quality import near_duplicates, picture_hash
from data.prepare.verify import verify
from data.schema import DataError
from data.sources.open import SourceConfig
from tests.data_samples import (
    dropped_in,
    encoded,
    flickr_folder,
    photo,
    prepared,
    records_in,
    samples_in,
)


def test_filters_count_their_reasons(tmp_path: Path) -> None:
    pictures = {"ok": (60, 40), "small": (30, 12), "long": (200, 20), "big": (300, 300)}
    (tmp_path / "Images").mkdir()
    for i, (name, size) in enumerate(pictures.items()):
        (tmp_path / "Images" / f"{name}.jpg").write_bytes(encoded(photo(i, *size)))
    (tmp_path / "Images" / "mute.jpg").write_bytes(encoded(photo(9)))
    captions = [f"{name}.jpg,a picture" for name in pictures] + ["mute.jpg,", "mute.jpg,x", f"ok.jpg,{'y' * 60}"]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "\n".join(captions) + "\n")
    filters = {"min_side": 16, "max_aspect": 5, "max_pixels": 50_000, "min_caption": 2, "max_caption": 50}
    manifest = prepared(SourceConfig("folder", (str(tmp_path),)), tmp_path / "out", filters=filters)
    assert manifest["dropped"] == {"aspect": 1, "no caption": 1, "too many pixels": 1, "too small": 1}
    assert manifest["captions"] == {"caption empty": 1, "caption too long": 1, "caption too short": 1, "kept": 4}
    assert list(records_in(tmp_path / "out")) == ["ok"]
    assert ("ok", "caption too long") in dropped_in(tmp_path / "out")


def test_near_duplicates_go_across_shards_and_splits(tmp_path: Path) -> None:
    """A recompressed and a resized copy are found, another picture is not, and the first one stays."""
    (tmp_path / "Images").mkdir()
    for i in range(12):
        (tmp_path / "Images" / f"{i:02d}.jpg").write_bytes(encoded(photo(i, 90, 60), quality=92))
    (tmp_path / "Images" / "50.jpg").write_bytes(encoded(photo(3, 90, 60), quality=60))
    (tmp_path / "Images" / "51.png").write_bytes(encoded(photo(4, 90, 60).resize((72, 48)), "PNG"))
    names = sorted(path.name for path in (tmp_path / "Images").iterdir())
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"{name},x y\n" for name in names))
    source = SourceConfig("folder", (str(tmp_path),))
    manifest = prepared(source, tmp_path / "out", filters={"near_duplicates": 6})
    assert manifest["dropped"] == {"near duplicate": 2}
    assert set(dropped_in(tmp_path / "out")) == {("50", "near duplicate"), ("51", "near duplicate")}
    assert sorted(records_in(tmp_path / "out")) == [f"{i:02d}" for i in range(12)]
    assert list(verify(tmp_path / "out")) == []
    assert prepared(source, tmp_path / "all")["dropped"] == {}


@pytest.mark.parametrize("bits", [0, 3, 8])
def test_near_duplicates_equal_those_of_comparing_all_pairs(bits: int) -> None:
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 256, (400, 16), np.uint8)
    for i in range(200, 400):  # copies of earlier ones with a few bits flipped, and copies of copies
        hashes[i] = hashes[rng.integers(0, i)]
        for place in rng.choice(128, rng.integers(0, 6), replace=False):
            hashes[i, place // 8] ^= 1 << (place % 8)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(2)
    stays: list[int] = []
    gone = set()
    for i in range(400):
        if any(distance[i, j] <= bits for j in stays):
            gone.add(i)
        else:
            stays.append(i)
    assert set(near_duplicates(hashes, bits)) == gone and len(gone) > 20


def test_picture_hash_is_close_for_copies_and_far_for_others() -> None:
    def bits(a: Image.Image, b: Image.Image) -> int:
        pair = [np.frombuffer(picture_hash(p), np.uint8) for p in (a, b)]
        return int(np.bitwise_count(pair[0] ^ pair[1]).sum())

    copy = Image.open(io.BytesIO(encoded(photo(1, 120, 90), quality=50)))
    assert bits(photo(1, 120, 90), copy) <= 6
    assert min(bits(photo(1, 120, 90), photo(i, 120, 90)) for i in range(2, 20)) > 20


def test_pairs_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    """With an untrained model of two layers: the same scores as computed here, the lower half dropped."""
    import open_clip
    import torch

    sizes = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 2}
    (tmp_path / "tiny-pair.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": sizes, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-pair.json")
    torch.manual_seed(1)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-pair", pretrained=None)
    torch.save(model.eval().state_dict(), tmp_path / "tiny.pt")
    folder = flickr_folder(tmp_path / "flickr", count=10, captions=2)
    source = SourceConfig("folder", (str(folder),))
    prepared(source, tmp_path / "all", val_fraction=0.0)
    wanted = {}
    for _, key, members in samples_in(tmp_path / "all"):
        image = preprocess(Image.open(io.BytesIO(members["png"])))[None]
        words = open_clip.get_tokenizer("tiny-pair")([json.loads(members["json"])["caption"]])
        with torch.inference_mode():
            pair = model.encode_image(image, normalize=True) * model.encode_text(words, normalize=True)
        wanted[key] = float(pair.sum())
    middle = float(np.median(list(wanted.values())))
    options: dict[str, Any] = {
        "score_model": str(tmp_path / "tiny-pair.json"),
        "score_weights": str(tmp_path / "tiny.pt"),
    }
    manifest = prepared(source, tmp_path / "fit", val_fraction=0.0, min_score=middle, **options)
    records = records_in(tmp_path / "fit")
    assert manifest["dropped"] == {"image-text score": 5} and set(records) == {
        k for k, v in wanted.items() if v > middle
    }
    assert all(abs(record["image_text_score"] - wanted[key]) < 1e-3 for key, record in records.items())
    with pytest.raises(DataError, match="no weights at"):
        prepared(source, tmp_path / "none", score_weights=str(tmp_path / "none.pt"))
    with pytest.raises(DataError, match="knows no model"):
        prepared(source, tmp_path / "no", score_model="no-model", score_weights=options["score_weights"])
