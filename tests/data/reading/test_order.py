"""The order of the samples: the same on any number of ranks and workers, and across a restart at any step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.prepare.engines import processes, run
from data.prepare.options import PrepareConfig
from data.reading.datamodule import ImageDataModule
from data.reading.order import BatchOrder, ShardOrder, permutation, spread_rows
from data.schema import DataError
from data.sources.open import SourceConfig


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    source = SourceConfig("scenes", num=120, size=16)
    config = PrepareConfig(source, size=16, format="png", val_fraction=0.2, shard_size=40)
    run(config, out, processes(1), lambda _: None)
    return out


def keys_of(order: BatchOrder, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return [sample for batch in order for sample in batch.samples]


def interleaved(orders: list[BatchOrder], epoch: int) -> list[int]:
    """Put the samples of all ranks back together in the global order."""
    for order in orders:
        order.set_epoch(epoch)
    sequence: list[int] = []
    for batches in zip(*orders, strict=True):
        rows = [list(batch.samples) for batch in batches]
        for i in range(len(rows[0])):
            sequence += [row[i] for row in rows if i < len(row)]
    return sequence


@pytest.mark.parametrize("world", [1, 2, 4])
def test_order_does_not_depend_on_ranks(world: int) -> None:
    total, together = 103, 12
    for epoch in (0, 3):
        orders = [BatchOrder(total, together // world, seed=5, rank=r, world=world) for r in range(world)]
        assert interleaved(orders, epoch) == permutation(5, epoch, total).tolist()
        assert len({len(order) for order in orders}) == 1


def test_every_sample_once_per_epoch_and_epochs_differ() -> None:
    order = BatchOrder(50, 8, seed=1)
    first, second = keys_of(order, 0), keys_of(order, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first == keys_of(BatchOrder(50, 8, seed=1), 0) != keys_of(BatchOrder(50, 8, seed=2), 0)


def test_drop_last_leaves_out_only_the_remainder() -> None:
    order = BatchOrder(50, 8, drop_last=True)
    assert [len(batch.samples) for batch in order] == [8] * 6 and len(order) == 6
    with pytest.raises(DataError, match="do not fill one batch"):
        BatchOrder(50, 32, world=2, drop_last=True)


def test_ranks_stay_equal_when_the_last_samples_do_not_suffice() -> None:
    orders = [BatchOrder(9, 2, rank=r, world=4, shuffle=False) for r in range(4)]
    batches = [[len(batch.samples) for batch in order] for order in orders]
    assert batches == [[2, 1]] * 4  # the ninth sample goes to all four


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [1, 5, 12, 103])
def test_what_is_written_comes_exactly_once_on_any_ranks(total: int, world: int) -> None:
    shards: dict[int, list[tuple[int, ...]]] = {}
    for rank in range(world):
        order = ShardOrder(total, 2, 5, rank, world)
        assert len(order) == len(list(ShardOrder(total, 2, 5, 0, world))) >= len(list(order))
        for batch in order:
            shards.setdefault(batch.samples[0] // 5, []).append(batch.samples)
    assert sorted(sample for batches in shards.values() for batch in batches for sample in batch) == list(range(total))
    for number, batches in shards.items():  # the same batches as on one rank
        assert batches == [b.samples for b in ShardOrder(total, 2, 5) if b.samples[0] // 5 == number]


def test_finished_shards_are_left_out_also_when_they_are_named_late() -> None:
    finished: set[int] = set()
    order = ShardOrder(12, 2, 5, finished=finished)
    batches = iter(order)
    finished.update((0, 2))
    assert [sample for batch in batches for sample in batch.samples] == [5, 6, 7, 8, 9]
    with pytest.raises(DataError, match="shards of 0, wanted 1 or more"):
        ShardOrder(12, 2, 0)


class Ranks(SimpleNamespace):
    """What a data module asks of its trainer."""

    def __init__(self, rank: int, world: int) -> None:
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        super().__init__(global_rank=rank, world_size=world, strategy=strategy, current_epoch=3)


def test_reports_and_statistics_see_the_same_samples_on_any_ranks_and_after_a_restart(scenes: Path) -> None:
    plain = ImageDataModule(str(scenes), 8, image_size=16)
    seen = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        data = ImageDataModule(str(scenes), 8, image_size=16)
        data.trainer = Ranks(rank, world)  # type: ignore[assignment]
        data._resume = {"epoch": 3, "samples": 40, "batches": 5, "step": 8}
        loaders = (data.test_dataloader(), data.statistics_dataloader())
        seen.append([[key for batch in loader for key in batch["keys"]] for loader in loaders])
        assert data.state_dict() == {}, "they are no place in the training order"
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] == plain.arrays("val")["keys"]
    assert sorted(seen[0][1]) == sorted(plain.arrays("train")["keys"])


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_restart_at_every_step_continues_behind_the_samples_seen_on_any_ranks(before: int, after: int) -> None:
    """103 samples in steps of 12, the last one smaller; stopped after every step and gone on with other ranks."""
    whole = permutation(7, 2, 103).tolist()
    first = [BatchOrder(103, 12 // before, seed=7, rank=r, world=before) for r in range(before)]
    for order in first:
        order.set_epoch(2)
    assert len(first[0]) == 9
    for step in range(10):
        seen = first[0].samples_after(step)
        assert seen == min(12 * step, 103)
        orders = [BatchOrder(103, 12 // after, seed=7, rank=r, world=after) for r in range(after)]
        for order in orders:
            order.set_start(epoch=2, samples=seen, batches=step)
            assert len(order) == 9
        assert interleaved(orders, 2) == whole[seen:]
        assert interleaved(orders, 3) == permutation(7, 3, 103).tolist()


def test_steps_of_a_restarted_epoch_count_those_before() -> None:
    order = BatchOrder(60, 6)
    order.set_start(epoch=0, samples=24, batches=3)  # three steps of eight, then steps of six
    assert len(order) == 3 + 6
    assert order.samples_after(4) == 30
    order.set_epoch(1)
    assert len(order) == 10 and order.samples_after(1) == 6


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_do_not_depend_on_workers(scenes: Path, in_memory: bool) -> None:
    def batches(workers: int) -> list[dict[str, Any]]:
        module = ImageDataModule(
            str(scenes), 16, image_size=16, num_workers=workers, seed=3, in_memory=in_memory, flip=0.5
        )
        return list(module.train_dataloader())

    reference = batches(0)
    for workers in (1, 3):
        for got, wanted in zip(batches(workers), reference, strict=True):
            assert got["keys"] == wanted["keys"] and got["captions"] == wanted["captions"]
            assert torch.equal(got["images"], wanted["images"])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_keys_come_in_one_order_on_any_ranks_and_workers_and_after_a_restart(
    scenes: Path, world: int, workers: int
) -> None:
    images = ImageDataModule(str(scenes), image_size=16).split("train")
    whole = [images.reader.key(i) for i in permutation(9, 1, len(images))]
    steps = range(-(-len(images) // 12))  # all of them in this process, a few with workers, which take time to start
    for seen in [12 * step for step in (steps if workers == 0 else (0, 5) if world == 1 else (3,))]:
        ranks = []
        for rank in range(world):
            order = BatchOrder(len(images), 12 // world, seed=9, rank=rank, world=world)
            order.set_epoch(1)
            if seen:
                order.set_start(1, seen, seen // 12)
            ranks.append([b["keys"] for b in DataLoader(images, None, sampler=order, num_workers=workers)])
        together = [keys[i] for step in zip(*ranks, strict=True) for i in range(12) for keys in step if i < len(keys)]
        assert together == whole[seen:]


def test_shuffle_leaves_no_trace_of_the_stored_order() -> None:
    """The rank correlation of stored and shuffled place is that of chance, and neighbours are parted."""
    total = 20_000
    order = permutation(0, 0, total)
    correlation = np.corrcoef(order, np.arange(total))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(total)
    near = np.mean(np.abs(np.diff(order)) < total // 100)  # chance: 2 %
    assert near == pytest.approx(0.02, abs=0.005)


class Recorder(lightning.LightningModule):
    """One weight that is trained on the mean picture; remembers the keys it saw."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.keys: list[str] = []
        self.stop_after = stop_after

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.keys += batch["keys"]
        return (self.weight - batch["images"].mean()) ** 2

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.stop_after is not None and self.trainer.global_step == self.stop_after:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "place.ckpt")
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    scenes: Path, root: Path, stop_after: int | None, workers: int, ckpt: Path | None, batch_size: int = 16
) -> Recorder:
    model = Recorder(stop_after)
    trainer = lightning.Trainer(
        default_root_dir=root,
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = ImageDataModule(str(scenes), batch_size, image_size=16, seed=11, num_workers=workers)
    trainer.fit(model, datamodule=module, ckpt_path=ckpt)
    return model


@pytest.mark.parametrize(
    ("stop_after", "workers"), [*((step, 0) for step in range(1, 8)), (4, 2), (9, 1), (13, 3)]
)  # of 18 steps, six an epoch
def test_resumed_training_sees_exactly_the_samples_it_would_have_seen(
    scenes: Path, tmp_path: Path, stop_after: int, workers: int
) -> None:
    whole = fit(scenes, tmp_path, None, 0, None)
    first = fit(scenes, tmp_path, stop_after, 0, None)
    second = fit(scenes, tmp_path, None, workers, tmp_path / "place.ckpt")
    assert first.keys + second.keys == whole.keys
    assert torch.equal(second.weight, whole.weight)


def test_resumed_training_may_change_its_batch_size(scenes: Path, tmp_path: Path) -> None:
    whole = fit(scenes, tmp_path, None, 0, None)
    first = fit(scenes, tmp_path, 3, 0, None)
    second = fit(scenes, tmp_path, None, 0, tmp_path / "place.ckpt", batch_size=8)
    assert first.keys + second.keys == whole.keys


def test_a_part_of_a_split_is_spread_over_it() -> None:
    assert spread_rows(10, None) == spread_rows(10, 10) == spread_rows(10, 99) == list(range(10))
    assert spread_rows(10, 3) == [0, 3, 6] and spread_rows(10, 0) == spread_rows(0, None) == []
    rows = spread_rows(50_000, 2_000)
    assert len(set(rows)) == 2_000 and {row // 50 for row in rows} == set(range(1000))  # of 1,000 classes, 50 each
