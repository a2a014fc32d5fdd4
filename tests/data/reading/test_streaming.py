"""Pictures streamed from tars: the same order from the same seed, whole epochs, and bad members counted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data.reading.datamodule import ImageDataModule
from data.reading.streaming import StreamDataModule
from data.schema import DataError
from data.sources.open import SourceConfig
from stage1_tokenizer.evaluation.picture_data import draw_training
from tests.data_samples import encoded, foreign, photo, prepared, samples_in, tar_of


def stream(path: Path, **options: Any) -> StreamDataModule:
    options = {"batch_size": 5, "image_size": 16, "steps_per_epoch": 8, "shuffle_buffer": 20, **options}
    return StreamDataModule([str(path / "*.tar")], **options)


def keys_of(loader: Any) -> list[str]:
    return [key for batch in loader for key in batch["keys"]]


def test_a_stream_repeats_with_its_seed_and_differs_by_epoch(tmp_path: Path) -> None:
    foreign(tmp_path)
    loader = stream(tmp_path).train_dataloader()
    first, second = keys_of(loader), keys_of(loader)
    assert len(first) == len(second) == 40 and first != second
    assert first == keys_of(stream(tmp_path).train_dataloader()) != keys_of(stream(tmp_path, seed=1).train_dataloader())


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_has_its_steps_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    loader = stream(foreign(tmp_path), num_workers=workers).train_dataloader()
    batches = list(loader)
    assert len(batches) == 8 == len(loader)
    for batch in batches:
        assert batch["images"].shape == (5, 3, 16, 16) and -1 <= batch["images"].min() < batch["images"].max() <= 1
        assert batch["captions"] == [[f"text {key}"] for key in batch["keys"]]


def test_a_stream_counts_what_it_cannot_read_and_ends_above_its_limit(tmp_path: Path) -> None:
    foreign(tmp_path)
    broken = [("x1.txt", b"no picture"), ("x2.jpg", b"not a picture"), ("x3.jpg", encoded(photo(1))[:500])]
    tar_of(tmp_path / "00002.tar", broken)
    (tmp_path / "00003.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:3000])
    loader = stream(tmp_path, steps_per_epoch=30).train_dataloader()
    assert len(keys_of(loader)) == 150 and loader.dataset.errors > 4  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="more than 3 unreadable"):
        keys_of(stream(tmp_path, steps_per_epoch=30, most_errors=3).train_dataloader())
    with pytest.raises(DataError, match="would run a command"):
        StreamDataModule(["pipe:cat x.tar"])
    with pytest.raises(DataError, match="no tar at"):
        StreamDataModule([str(tmp_path / "nothing-*.tar")])


def test_captions_of_a_stream_are_those_of_its_samples_on_every_rank(tmp_path: Path) -> None:
    data = stream(foreign(tmp_path))
    captions = list(data.captions("train"))
    assert len(captions) == 40 and captions == list(data.captions("train"))
    loader = data.train_dataloader()
    read = {f"text {key}" for _ in range(20) for key in keys_of(loader)}
    assert {text for texts in captions for text in texts} <= read and len(read) == 40
    with pytest.raises(DataError, match="no split val"):
        next(data.captions("val"))


def test_a_stream_validates_on_an_indexed_directory(tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    prepared(SourceConfig("scenes", num=20, size=16, seed=4), scenes, shard_size=15)
    data = stream(foreign(tmp_path / "tars"), val_dir=str(scenes))
    wanted = [key for split, key, _ in samples_in(scenes) if split == "val"]
    assert keys_of(data.val_dataloader()) == wanted


def test_the_first_pictures_of_a_stream_are_the_same_ones_whoever_reads_them(tmp_path: Path) -> None:
    foreign(tmp_path)
    data, other = stream(tmp_path, first_pictures=12), stream(tmp_path, first_pictures=12)
    keys_of(other.train_dataloader())  # a pass of training changes nothing
    first = draw_training(data, 100, seed=0)
    assert first["images"].shape == (12, 3, 16, 16) and first["images"].std() > 0.05
    assert len(data.split("train")) == 12 == len(first["captions"]) and len(set(first["keys"])) > 6
    again = draw_training(other, 100, seed=0)
    assert first["keys"] == again["keys"] and torch.equal(first["images"], again["images"])
    assert draw_training(other, 100, seed=1)["keys"] != first["keys"]
    assert data.samples("train", [3, 1])["keys"] == [data.arrays("train")["keys"][i] for i in (3, 1)]
    with pytest.raises(DataError, match="set data.val_dir"):
        data.samples("val", [0])
    with pytest.raises(DataError, match="wants each of them once"):
        data.predict_dataloader()


def test_a_report_takes_held_out_pictures_of_the_directory(tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    prepared(SourceConfig("scenes", num=20, size=16, seed=4), scenes, shard_size=15)
    data = stream(foreign(tmp_path / "tars"), val_dir=str(scenes), first_pictures=5)
    indexed = ImageDataModule(str(scenes), 5, image_size=16)
    assert data.data_dir == str(scenes) and len(data.split("val")) == len(indexed.split("val"))
    assert torch.equal(data.samples("val", [1, 0])["images"], indexed.samples("val", [1, 0])["images"])
    assert keys_of(data.test_dataloader()) == keys_of(indexed.test_dataloader())
