"""A report's own classifier: trained on the training pictures once per run folder, then read from disk.

    classifier = report_classifier(datamodule, run_dir)

Trained with AdamW on a one-cycle schedule for a number of steps or seconds, whichever ends first, on up to 60,000
pictures that are read when a step needs them: none is held, so large ones are no fewer. The stopping decision is made
on training pictures set aside, never on the held-out ones. Weights are safetensors, with a config that names the data
by a hash of its manifest: a classifier of other data is trained anew.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.evaluation.classifier import AttributeClassifier, Classifier, LabelClassifier, accuracy_by_slot
from stage1_tokenizer.evaluation.picture_data import PictureData, batches, described, draw_training, training_rows
from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.text.ranks import of_others, rank

TRAINING_PICTURES = 60_000
PIXELS = 2**19  # of a training batch whose maps are held at once: 512 pictures at 32 pixels, 8 at 256
HELD_BACK = 2000  # training pictures set aside for the stopping decision, at most a twentieth


@dataclass(frozen=True)
class Budget:
    """When training ends: after `steps` batches, after `seconds`, or when the set-aside pictures reach `target`."""

    steps: int
    seconds: float
    target: float = 1.1  # share of pictures with every slot right; above 1 never stops early
    batch_size: int = 128
    learning_rate: float = 4e-3  # the peak, reached after a fifth of the budget
    check_every: int = 200


PHOTO_BUDGET = Budget(steps=2700, seconds=900, learning_rate=6e-3)  # 7 epochs of CIFAR-10, 8 minutes of two cores


class Pictures(Protocol):
    """A tensor of pictures (N, 3, H, W), or what is indexed as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class StoredPictures:
    """Training pictures that are read when they are asked for. rows: their numbers in the split."""

    def __init__(self, datamodule: PictureData, rows: Sequence[int]) -> None:
        self.datamodule, self.rows = datamodule, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        images: Tensor = self.datamodule.samples("train", [self.rows[i] for i in rows.tolist()])["images"]
        return images


def scene_budget(image_size: int) -> Budget:
    """800 steps at 32 pixels, about a minute of two cores; more for larger scenes with more in them.

    The time is for machines that others keep busy: 3,200 steps at 64 pixels are 6 minutes of a thread with bfloat16.
    """
    scale = max(1, image_size // 32)
    return Budget(steps=800 * scale**2, seconds=450 * scale, target=0.997)


def fit_classifier(
    classifier: Classifier, data: Mapping[str, Any], budget: Budget, seed: int, device: torch.device | str = "cpu"
) -> float:
    """Train in place on `data` (fields of a batch; images: `Pictures`); returns the set-aside accuracy.

    The pictures set aside are drawn at random: where classes lie one after another, both parts have all of them. A
    batch of large pictures goes through in parts of at least 8, whose gradients are added up. The schedule follows
    steps or seconds, whichever is further on, so a slow machine ends with a low rate as well. Raises ValueError for
    fewer than 5 pictures.
    """
    images: Pictures = data["images"]
    targets = classifier.targets(data)
    held_back = min(HELD_BACK, len(images) // 5, max(len(images) // 20, 100))
    if held_back < 1:
        raise ValueError(f"got {len(images)} pictures to train a classifier on, wanted 5 or more; prepare more data")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(images), generator=generator)
    aside, trained = drawn[:held_back], drawn[held_back:]
    classifier.to(device)
    classifier.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=budget.learning_rate, weight_decay=0.02)
    start, accuracy = time.monotonic(), 0.0
    bar = tqdm(total=100, desc=f"train {classifier.feature_name}", unit="%", disable=None, leave=False)
    batches = _batches(trained, budget.batch_size, generator)
    for step in range(1, budget.steps + 1):
        progress = max(step / budget.steps, (time.monotonic() - start) / budget.seconds)
        bar.update(min(int(100 * progress), 100) - bar.n)
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * max(min(progress / 0.2, (1 - progress) / 0.8), 0.01)
        rows = next(batches)
        optimizer.zero_grad(set_to_none=True)
        _backward(classifier.train(), images[rows].to(device), targets[rows].to(device), generator)
        optimizer.step()
        ended = progress >= 1 or step == budget.steps
        if ended or step % budget.check_every == 0:
            accuracy = _accuracy(classifier, images, aside, targets, device)
            elapsed = time.monotonic() - start
            left = "" if ended else f", at most {elapsed * (1 / progress - 1):.0f} s left"
            share = f"{accuracy:.2%} of set-aside pictures right"
            bar.clear()
            print(f"{classifier.feature_name}: {share}, {elapsed:.0f} s{left}", flush=True)
            if ended or accuracy >= budget.target:
                break
    bar.close()
    classifier.trained_on = min(step * budget.batch_size, len(trained))
    classifier.eval()
    return accuracy


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches (size,) of `rows` without end, each row as often as any other, in an order of the generator's."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size:
            order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
        yield order[:size]
        order = order[size:]


def _backward(classifier: Classifier, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """Gradients of the mean loss of pictures x (B, 3, H, W) with targets y (B, S), mirrored and shifted first."""
    parts = min(-(-x[:, 0].numel() // PIXELS), max(1, len(x) // 8))
    for few, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
        seen = classifier.augment(few, generator).to(memory_format=torch.channels_last)
        (_loss(classifier, seen, wanted) * (len(few) / len(x))).backward()


@torch.inference_mode()
def _accuracy(
    classifier: Classifier, images: Pictures, rows: Tensor, targets: Tensor, device: torch.device | str
) -> float:
    """Share of the pictures `rows` in which everything is read right."""
    classifier.eval()
    side = images[rows[:1]].shape[-1]
    parts = rows.split(max(1, PIXELS // side**2))
    predictions = torch.cat([classifier.predict(images[part].to(device)).cpu() for part in parts])
    return accuracy_by_slot(predictions, targets[rows], classifier.slots)["all"]


def _loss(classifier: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed over slots, of pictures (B, 3, H, W) and targets (B, S); the heads are float32."""
    dtype = matmul_dtype(x.device)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        features = classifier.trunk(x)
    logits = classifier.heads(features.float()).split(classifier.slots.sizes, dim=1)
    return torch.stack([F.cross_entropy(slot, y[:, i], ignore_index=-1) for i, slot in enumerate(logits)]).sum()


def report_classifier(
    datamodule: PictureData,
    run_dir: str | Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    budget: Budget | None = None,
) -> Classifier | None:
    """The classifier of a run: from `run_dir`/classifier if it was trained on this data, else trained and kept there.

    An `AttributeClassifier` where training samples have attributes, a `LabelClassifier` where they have labels, and
    None where they have neither (captions alone name no classes). Of several ranks the first trains it, and the others
    wait and read it.
    """
    if rank() > 0:
        of_others(None)
    try:
        return _found_or_trained(datamodule, run_dir, seed, device, budget)
    finally:
        if rank() == 0:
            of_others(None)


def _found_or_trained(
    datamodule: PictureData, run_dir: str | Path, seed: int, device: torch.device | str, budget: Budget | None
) -> Classifier | None:
    folder = Path(run_dir) / "classifier"
    fingerprint = _fingerprint(datamodule)
    kept = load_classifier(folder, fingerprint)
    if kept is not None:
        return kept.to(device)
    probe = draw_training(datamodule, 64, seed)
    has_attributes = all(probe["attributes"])
    if not has_attributes and int(probe["labels"].min()) < 0:
        return None
    rows, image_size = training_rows(datamodule, TRAINING_PICTURES, seed), probe["images"].shape[-1]
    data = described([described([batch]) for batch in batches(datamodule, "train", rows, datamodule.val_batch_size)])
    data["images"] = StoredPictures(datamodule, rows)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        classifier, usual = _new_attributes(data, image_size) if has_attributes else _new_labels(data)
    accuracy = fit_classifier(classifier, data, budget or usual, seed, device)
    save_classifier(classifier, folder, fingerprint, image_size, accuracy)
    return classifier


def _new_attributes(data: Mapping[str, Any], image_size: int) -> tuple[Classifier, Budget]:
    return AttributeClassifier(Slots.of_scenes(data["attributes"]), image_size), scene_budget(image_size)


def _new_labels(data: Mapping[str, Any]) -> tuple[Classifier, Budget]:
    names = [str(i) for i in range(int(data["labels"].max()) + 1)]
    return LabelClassifier(Slots({"class": names})), PHOTO_BUDGET


def save_classifier(classifier: Classifier, folder: Path, fingerprint: str, image_size: int, accuracy: float) -> None:
    """Keep weights (safetensors) and what they belong to (config.json) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # Contiguous: a file knows no channels-last.
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = {
        "kind": classifier.feature_name,
        "slots": {name: list(values) for name, values in classifier.slots.classes.items()},
        "image_size": image_size,
        "data": fingerprint,
        "set_aside_accuracy": accuracy,
        "trained_on": classifier.trained_on,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_classifier(folder: Path, fingerprint: str) -> Classifier | None:
    """The classifier kept in `folder`, or None if there is none for the data with this fingerprint."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        return None
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config["data"] != fingerprint:
        print(f"the classifier in {folder} was trained on other data; training a new one")
        return None
    slots = Slots(config["slots"])
    classifier: Classifier
    if config["kind"] == AttributeClassifier.feature_name:
        classifier = AttributeClassifier(slots, config["image_size"])
    else:
        classifier = LabelClassifier(slots)
    classifier.trained_on = config.get("trained_on", 0)
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    return classifier.eval()


def _fingerprint(datamodule: PictureData) -> str:
    """A hash of the data's manifest: it names every shard with its content hash."""
    manifest = Path(datamodule.data_dir) / "manifest.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
