"""`predict` of stage 1: every sample once, on any ranks, and what an interrupted run has finished is kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from data.prepare.verify import verify
from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.reading.latents import LatentShardWriter, begin_latents, write_latent_manifest
from data.schema import SPLITS, DataError
from data.sources.open import SourceConfig
from stage1_tokenizer.training.latent_writer import LatentWriter
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage2_prior.evaluation.held_out import same_samples
from tests.data_samples import prepared
from tests.tiny import C, K, tiny_tokenizer
from tests.warm import ranks

SHARD = 10  # samples, in batches of 4, 4 and 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads are rounded otherwise, and ranks in processes of their own have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    prepared(SourceConfig("scenes", num=60, size=16), out, val_fraction=0.3, shard_size=25)
    return out


class Stopped(Exception):
    """What the tests interrupt a run with."""


class CountingLit(LitTokenizer):
    """Remembers the keys that it encoded, and stops after so many batches."""

    keys: list[str]
    stop_after: int | None = None

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == self.stop_after and dataloader_idx == 0:
            raise Stopped
        self.keys += batch["keys"]
        return super().predict_step(batch, batch_idx, dataloader_idx)


def predict(scenes: Path, run_dir: Path, stop_after: int | None = None, seed: int = 0, **options: Any) -> list[str]:
    """One `predict`; returns the keys that it encoded. `options` are of the trainer, `data` of the data module."""
    lit = CountingLit(tiny_tokenizer(text=False, seed=seed))
    lit.run_dir, lit.keys, lit.stop_after = run_dir, [], stop_after
    data = ImageDataModule(str(scenes), batch_size=4, image_size=16, **options.pop("data", {}))
    data.predict_shard_size = SHARD
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=run_dir, callbacks=[LatentWriter()], **{"devices": 1, **quiet, **options}
    )
    if stop_after is None:
        trainer.predict(lit, datamodule=data, return_predictions=False)
    else:
        with pytest.raises(Stopped):
            trainer.predict(lit, datamodule=data, return_predictions=False)
    return lit.keys


def files(run_dir: Path) -> dict[str, bytes]:
    """The bytes of all that a predict leaves."""
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in sorted((run_dir / "latents").rglob("*.*"))}


def keys(scenes: Path) -> dict[str, list[str]]:
    data = ImageDataModule(str(scenes), image_size=16)
    return {split: data.arrays(split)["keys"] for split in SPLITS}


def every_key(scenes: Path) -> list[str]:
    return [key for split in keys(scenes).values() for key in split]


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    assert predict(scenes, run_dir) == every_key(scenes)
    return run_dir


def test_latents_are_those_of_the_tokenizer_in_stored_order(scenes: Path, whole: Path) -> None:
    latents, tokenizer = LatentDataModule(str(whole / "latents")), tiny_tokenizer(text=False)
    assert list(verify(whole / "latents")) == []
    for split, wanted in keys(scenes).items():
        got = latents.arrays(split)
        assert got["keys"] == wanted
        mean, std = tokenizer.posterior(ImageDataModule(str(scenes), image_size=16).arrays(split)["images"])
        torch.testing.assert_close(got["latents"], mean.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["latents_std"], std.detach(), rtol=1e-4, atol=1e-5)


def test_a_part_is_spread_over_the_split_and_has_its_pictures(scenes: Path, whole: Path, tmp_path: Path) -> None:
    """A split may be stored class by class; pictures are those of the same rows, also where only some were encoded."""
    latents, images = LatentDataModule(str(whole / "latents")), ImageDataModule(str(scenes), image_size=16)
    stored, total = keys(scenes)["val"], len(keys(scenes)["val"])
    held = latents.arrays("val", 8)
    assert held["keys"] == [stored[i * total // 8] for i in range(8)]
    rows = [i * total // 8 for i in range(8)]
    found = same_samples(latents, images, rows, held["keys"])
    assert found["keys"] == held["keys"] and found["images"].shape == (8, 3, 16, 16)
    held["keys"][3] = "another"
    with pytest.raises(DataError, match="of different samples"):
        same_samples(latents, images, rows, held["keys"])
    with LatentShardWriter(tmp_path, "val") as writer:
        for key in stored[:5]:
            writer.write(key, torch.zeros(K, C), torch.ones(K, C), ["a caption"], {})
    write_latent_manifest(tmp_path, K, C, "0123456789abcdef")
    few = LatentDataModule(str(tmp_path))
    assert same_samples(few, images, list(range(5)), few.arrays("val", 8)["keys"])["keys"] == stored[:5]


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5, 9])  # batches; a shard takes three
def test_a_predict_that_is_started_again_keeps_finished_shards(
    scenes: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_after: int
) -> None:
    first = predict(scenes, tmp_path, stop_after)
    kept = SHARD * (stop_after // 3)
    with pytest.raises(DataError, match="no latents at"):
        LatentDataModule(str(tmp_path / "latents")).setup()
    capsys.readouterr()
    second = predict(scenes, tmp_path, data={"val_batch_size": 4})
    everything = every_key(scenes)
    assert second == everything[kept:] and len(first) >= kept
    assert files(tmp_path) == files(whole)
    assert (f"kept {kept} of {len(everything)} samples" in capsys.readouterr().out) == (kept > 0)
    assert predict(scenes, tmp_path) == [] and files(tmp_path) == files(whole)


def test_a_shard_without_its_record_is_written_again(scenes: Path, whole: Path, tmp_path: Path) -> None:
    """As a run leaves it that is killed between the two files; and one whose tar was cut by a full disk."""
    predict(scenes, tmp_path)
    (tmp_path / "latents" / "train" / "00001.stats").unlink()
    (tmp_path / "latents" / "train" / "00003.tar").write_bytes(b"")
    (tmp_path / "latents" / "val" / "00000.tar.123.part").write_bytes(b"left behind")
    train = keys(scenes)["train"]
    assert predict(scenes, tmp_path) == train[SHARD : 2 * SHARD] + train[3 * SHARD : 4 * SHARD]
    assert files(tmp_path) == files(whole)


def test_a_predict_that_was_limited_leaves_no_short_shard(scenes: Path, whole: Path, tmp_path: Path) -> None:
    assert len(predict(scenes, tmp_path, limit_predict_batches=4)) == 2 * (SHARD + 4)
    assert LatentDataModule(str(tmp_path / "latents")).manifest()["counts"] == {"train": SHARD + 4, "val": SHARD + 4}
    assert len(predict(scenes, tmp_path)) == 60 - 2 * SHARD
    assert files(tmp_path) == files(whole)


def test_latents_are_of_pictures_as_they_are_stored(scenes: Path, whole: Path, tmp_path: Path) -> None:
    predict(scenes, tmp_path, data={"flip": 1.0})
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("other", [{"seed": 1}, {"precision": "bf16-mixed"}])
def test_of_another_origin_nothing_is_kept(scenes: Path, whole: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    predict(scenes, tmp_path, **other)
    assert predict(scenes, tmp_path) == every_key(scenes)
    assert files(tmp_path) == files(whole)


def test_a_set_without_training_samples_gives_val_latents(tmp_path: Path) -> None:
    prepared(SourceConfig("scenes", num=12, size=16), tmp_path / "data", val_fraction=1.0)
    assert len(predict(tmp_path / "data", tmp_path)) == 12
    assert LatentDataModule(str(tmp_path / "latents")).manifest()["counts"] == {"train": 0, "val": 12}


def test_one_split_of_a_new_tokenizer_is_refused_beside_the_other_split_of_an_old_one(
    scenes: Path, whole: Path, tmp_path: Path
) -> None:
    predict(scenes, tmp_path)
    with pytest.raises(DataError, match=r"train/00000.tar is of tokenizer \w+, wanted \w+; predict this split too, or"):
        predict(scenes, tmp_path, seed=1, data={"predict_splits": ["val"]})
    assert files(tmp_path) == files(whole)
    with pytest.raises(DataError, match="is of tokenizer"):
        write_latent_manifest(tmp_path / "latents", 6, 4, "another")
    assert predict(scenes, tmp_path, data={"predict_splits": ["val"]}) == []


def test_shards_from_before_records_named_a_tokenizer(scenes: Path, whole: Path, tmp_path: Path) -> None:
    """They are read, written anew where their split is predicted, and else known by the manifest beside them."""
    predict(scenes, tmp_path)
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    for path in (tmp_path / "latents").rglob("*.stats"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "origin"}))
    before = files(tmp_path)
    assert LatentDataModule(str(tmp_path / "latents")).arrays("train")["keys"] == keys(scenes)["train"]
    with pytest.raises(DataError, match=f"of tokenizer {manifest['latents']['tokenizer_fingerprint']}, wanted other"):
        begin_latents(tmp_path / "latents", ["val"], "other")
    assert files(tmp_path) == before
    assert predict(scenes, tmp_path, data={"predict_splits": ["val"]}) == keys(scenes)["val"]
    assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["shards"] == manifest["shards"]
    assert predict(scenes, tmp_path) == keys(scenes)["train"]
    assert files(tmp_path) == files(whole)


def test_a_writer_without_an_origin_writes_records_that_any_tokenizer_may_own(tmp_path: Path) -> None:
    with LatentShardWriter(tmp_path, "val") as writer:
        writer.write("a", torch.zeros(2, 2), torch.ones(2, 2), ["x"], {})
    assert write_latent_manifest(tmp_path, 2, 2, "abc") == {"train": 0, "val": 1}


def predict_of_rank(scenes: Path, run_dir: Path) -> None:
    predict(scenes, run_dir, strategy="ddp", devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [None, 4])
def test_two_ranks_write_what_one_writes(scenes: Path, whole: Path, tmp_path: Path, stop_after: int | None) -> None:
    """Also where two ranks go on with what one rank began."""
    if stop_after is not None:
        predict(scenes, tmp_path, stop_after)
    for done in (results := ranks(2, predict_of_rank, scenes, tmp_path)):
        assert done.returncode == 0, done.stderr[-2000:]
    assert files(tmp_path) == files(whole)
    assert ("kept 10 of 60" in results[0].stdout) == (stop_after is not None)
