"""Shards in other programs' loaders, and other programs' shards in ours."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from data.reading.datamodule import ImageDataModule
from data.reading.latents import LatentShardWriter, write_latent_manifest
from data.sources.open import SourceConfig
from tests.data_samples import foreign, prepared, records_in


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    prepared(SourceConfig("scenes", num=80, size=16, seed=4), out, shard_size=15)
    return out


def module(path: Path, **options: Any) -> ImageDataModule:
    return ImageDataModule(str(path), **{"batch_size": 8, "image_size": 16, **options})


def test_plain_webdataset_reads_our_shards(scenes: Path) -> None:
    urls = sorted(map(str, (scenes / "train").glob("*.tar")))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("png", "txt", "json")
    )
    records = {key: r for key, r in records_in(scenes).items() if r["split"] == "train"}
    seen = 0
    for picture, text, record in dataset:
        assert picture.shape == (16, 16, 3) and text == record["caption"] == records[record["key"]]["caption"]
        seen += 1
    assert seen == len(records)


def test_the_training_loader_of_open_clip_reads_our_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(SourceConfig("scenes", num=64, size=16), tmp_path, shard_size=16, val_fraction=0.0)
    import open_clip_train.data as open_clip_data

    # It is written for webdataset 0.2.86, where shards ended without the marker that 1.0 yields and it trips over.
    without_marker = functools.partial(open_clip_data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(open_clip_data, "tar_file_expander", without_marker)

    arguments = Namespace(
        train_data=str(tmp_path / "train" / "{00000..00003}.tar"),
        train_num_samples=None,  # it must find sizes.json
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=8,
        workers=0,
        world_size=1,
    )
    found = open_clip_data.get_wds_dataset(
        arguments,
        lambda image: torch.from_numpy(np.array(image)),
        True,
        tokenizer=lambda text: [torch.tensor([len(text)])],
    )
    assert found.dataloader.num_samples == 64 and found.dataloader.num_batches == 8
    images, texts = next(iter(found.dataloader))
    assert images.shape == (8, 16, 16, 3) and texts.shape == (8, 1)


def test_tars_of_img2dataset_are_read_in_place(tmp_path: Path) -> None:
    data = module(foreign(tmp_path), val_fraction=0.2)
    data.setup()
    train, val = data.arrays("train"), data.arrays("val")
    assert len(train["keys"]) + len(val["keys"]) == 40 and not set(train["keys"]) & set(val["keys"])
    assert all(captions == [f"text {key}"] for key, captions in zip(train["keys"], train["captions"], strict=True))
    assert train["images"].shape[1:] == (3, 16, 16)


def test_plain_webdataset_and_safetensors_read_our_latents(tmp_path: Path) -> None:
    """The loop of the README, without a line of this project."""
    z = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    with LatentShardWriter(tmp_path, "train", shard_size=2) as writer:
        for i in range(5):
            writer.write(f"key{i}", z[i], z[i].abs(), [f"caption {i}", "another"], {})
    write_latent_manifest(tmp_path, 3, 2, "abc")
    shards = [str(path) for path in sorted((tmp_path / "train").glob("*.tar"))]
    seen = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        arrays = safetensors.torch.load(sample["safetensors"])
        i = int(sample["__key__"].removeprefix("key"))
        assert torch.equal(arrays["mean"], z[i]) and torch.equal(arrays["std"], z[i].abs())
        assert sample["txt"].decode().splitlines()[0] == f"caption {i}"
        assert json.loads(sample["json"])["captions"] == [f"caption {i}", "another"]
        seen += 1
    assert seen == 5 and len(shards) == 3
