"""Latent shards: read with their texts, written again, verified down to the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepare.verify import verify
from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.reading.latents import LatentShardWriter, write_latent_manifest
from data.sources.open import SourceConfig
from tests.data_samples import prepared


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    prepared(SourceConfig("scenes", num=80, size=16, seed=4), out, shard_size=15)
    return out


def module(path: Path, **options: Any) -> ImageDataModule:
    return ImageDataModule(str(path), **{"batch_size": 8, "image_size": 16, **options})


def test_latents_come_back_with_their_texts(scenes: Path, tmp_path: Path) -> None:
    data = module(scenes)
    K, C = 4, 3
    for split, loader in zip(("train", "val"), data.predict_dataloader(), strict=True):
        for rank in range(2):  # two ranks, each with every second batch
            with LatentShardWriter(tmp_path, split, shard_size=9, rank=rank, world=2) as writer:
                for i, batch in enumerate(loader):
                    if i % 2 == rank:
                        mean = batch["images"].flatten(1)[:, : K * C].reshape(-1, K, C)
                        writer.write_batch(batch, mean, mean.abs())
    write_latent_manifest(tmp_path, K, C, "abc")
    latents = LatentDataModule(str(tmp_path), batch_size=8)
    assert latents.latent_info["num_latents"] == K and latents.latent_info["tokenizer_fingerprint"] == "abc"
    for split in ("train", "val"):
        wanted, got = data.arrays(split), latents.arrays(split)
        rows = [got["keys"].index(key) for key in wanted["keys"]]
        assert len(rows) == len(got["keys"])
        mean = wanted["images"].flatten(1)[:, : K * C].reshape(-1, K, C)
        assert torch.equal(got["latents"][rows], mean) and torch.equal(got["latents_std"][rows], mean.abs())
        assert [got["captions"][r] for r in rows] == wanted["captions"]
        assert [got["attributes"][r] for r in rows] == wanted["attributes"]
    on_demand = LatentDataModule(str(tmp_path), batch_size=8, in_memory=False)
    for a, b in zip(latents.train_dataloader(), on_demand.train_dataloader(), strict=True):
        assert a["keys"] == b["keys"] and torch.equal(a["latents"], b["latents"])


def test_latents_written_again_leave_no_old_shards(tmp_path: Path) -> None:
    for count in (10, 3):
        with LatentShardWriter(tmp_path, "train", shard_size=2) as writer:
            for i in range(count):
                writer.write(f"{i}", torch.zeros(2, 2), torch.ones(2, 2), ["x"], {})
        write_latent_manifest(tmp_path, 2, 2, "abc")
    assert LatentDataModule(str(tmp_path)).arrays("train")["keys"] == ["0", "1", "2"]


def test_verify_reads_latents_down_to_their_values(tmp_path: Path) -> None:
    bad = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    means = {"good": torch.ones(2, 2), "wide": torch.ones(2, 3), "nan": bad}
    with LatentShardWriter(tmp_path, "train") as writer:
        for key, mean in means.items():
            writer.write(key, mean, torch.ones(2, 2), ["x"], {})
    write_latent_manifest(tmp_path, 2, 2, "abc")
    assert list(verify(tmp_path)) == [
        "train/00000.tar: wide.safetensors: mean is (2, 3), the manifest says (2, 2)",
        "train/00000.tar: nan.safetensors: mean has values that are not finite",
    ]
    path = tmp_path / "train" / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:512] + bytes(8) + whole[520:])  # the length of the first member's header
    problems = list(verify(tmp_path))
    assert "another sha256" in problems[0] and "good.safetensors: not a safetensors file" in problems[1]
