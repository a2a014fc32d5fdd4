"""The data module of pictures keeps its contract, and directories that are not whole get a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures.transforms import to_pixels
from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.schema import DataError
from data.sources.open import SourceConfig
from data.sources.scenes import Scenes
from tests.data_samples import encoded, flickr_folder, photo, prepared, tar_of


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    prepared(SourceConfig("scenes", num=80, size=16, seed=4), out, shard_size=15)
    return out


def module(path: Path, **options: Any) -> ImageDataModule:
    return ImageDataModule(str(path), **{"batch_size": 8, "image_size": 16, **options})


@pytest.mark.parametrize("in_memory", [True, False])
def test_scenes_come_out_as_they_were_drawn(scenes: Path, in_memory: bool) -> None:
    attributes, pixels = Scenes(80, seed=4, size=16).draw(np.arange(80))
    seen = 0
    for split in ("train", "val"):
        batch = module(scenes, in_memory=in_memory).arrays(split)
        for i, key in enumerate(batch["keys"]):
            assert np.array_equal(to_pixels(batch["images"][i]).permute(1, 2, 0).numpy(), pixels[int(key)])
            assert batch["attributes"][i] == attributes[int(key)]
            assert len(batch["captions"][i]) == 3 and batch["labels"][i] == -1
            seen += 1
    assert seen == 80


def test_batches_keep_the_contract(scenes: Path) -> None:
    data = module(scenes)
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (8, 3, 16, 16) and batch["images"].dtype == torch.float32
    assert -1 <= batch["images"].min() < batch["images"].max() <= 1
    assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (8,)
    assert [len(batch[name]) for name in ("captions", "keys", "attributes")] == [8, 8, 8]
    assert [c for b in data.val_dataloader() for c in b["captions"]] == list(data.captions("val"))
    assert len(data.arrays("train", limit=5)["keys"]) == 5
    counts = data.manifest()["counts"]
    assert [sum(len(b["keys"]) for b in loader) for loader in data.predict_dataloader()] == list(counts.values())


def test_batches_that_are_held_stay_as_they_were(scenes: Path) -> None:
    loader = module(scenes, in_memory=False).train_dataloader()
    held = list(loader)
    copies = [batch["images"].clone() for batch in held]
    assert len(held) > 6 and all(batch["images"].is_contiguous() for batch in loader)
    assert all(torch.equal(batch["images"], copy) for batch, copy in zip(held, copies, strict=True))


def test_pictures_of_another_size_are_fitted(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=6)
    prepared(SourceConfig("folder", (str(folder),)), tmp_path / "out", resize="no", val_fraction=0.0)
    batch = module(tmp_path / "out", image_size=24).arrays("train")
    assert batch["images"].shape == (6, 3, 24, 24)
    wanted = photo(2).resize((24, 24), Image.Resampling.BICUBIC, box=(10, 0, 50, 40))
    row = batch["keys"].index("002_ab")
    assert np.abs(to_pixels(batch["images"][row]).permute(1, 2, 0).numpy() - np.asarray(wanted, np.int16)).mean() < 6


def test_flips_mirror_about_their_share_anew_in_every_epoch(scenes: Path) -> None:
    plain, flipped = module(scenes), module(scenes, flip=0.5)
    reference = {k: x for b in plain.train_dataloader() for k, x in zip(b["keys"], b["images"], strict=True)}
    order = flipped.train_dataloader()
    mirrored = []
    for epoch in (0, 1):
        order.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found = set()
        for batch in order:
            for key, image in zip(batch["keys"], batch["images"], strict=True):
                assert torch.equal(image, reference[key]) or torch.equal(image, reference[key].flip(-1))
                if not torch.equal(image, reference[key]):
                    found.add(key)
        mirrored.append(found)
    assert mirrored[0] != mirrored[1] and all(10 < len(found) < 50 for found in mirrored)
    assert torch.equal(flipped.arrays("val")["images"], plain.arrays("val")["images"])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text('{"sch'), "not valid JSON"),
        (lambda p: (p / "manifest.json").write_text('{"schema": 99}'), "schema 99"),
        (lambda p: (p / "train" / "00000.tar").unlink(), "are gone"),
    ],
)
def test_a_directory_that_is_not_whole_gets_a_sentence(tmp_path: Path, spoil: Any, sentence: str) -> None:
    prepared(SourceConfig("scenes", num=20, size=16), tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=sentence):
        module(tmp_path).split("train")


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [("good.jpg", encoded(photo(0))), ("bad.jpg", encoded(photo(1))[:900])])
    with pytest.raises(DataError, match="sample bad: "):
        module(tmp_path, val_fraction=0.0).arrays("train")


def test_missing_and_wrong_directories_get_a_sentence(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data directory"):
        module(tmp_path / "nowhere").setup()
    with pytest.raises(DataError, match="holds images, wanted latents"):
        LatentDataModule(str(scenes)).setup()
    with pytest.raises(DataError, match="split 'test' is unknown"):
        module(scenes).arrays("test")
    with pytest.raises(DataError, match="flip is 2"):
        module(scenes, flip=2.0)
