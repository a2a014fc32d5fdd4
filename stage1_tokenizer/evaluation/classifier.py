"""Classifiers that a report trains for itself on the training pictures, to read pictures that the models made.

Two of them, one interface: `AttributeClassifier` reads every attribute of a scene, `LabelClassifier` the class of a
labelled photograph. A figure such as "all attributes right in 93% of reconstructions" is only as good as the reader,
so a report always prints the reader's own accuracy on real held-out pictures, and the stopping decision is made on
training pictures set aside, never on the held-out ones.

    classifier = report_classifier(datamodule, run_dir)         # trained once per run folder, then read from disk
    right = classifier.predict(images) == classifier.targets(batch)      # (N, S) for S slots
    frechet_distance(classifier.features(real), classifier.features(generated))

Both are plain convolutional networks in channels-last, trained with Adam on a one-cycle schedule for a number of steps
or seconds, whichever ends first. Letters: N pictures, S slots, D features.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.precision import matmul_dtype

TRAINING_BYTES = 2**31  # of pictures in memory while a classifier is trained
HELD_BACK = 2000  # training pictures set aside for the stopping decision


class PictureData(Protocol):
    """What a report asks of a data module: the samples of a split, and where they lie on disk."""

    data_dir: str

    def split(self, split: str) -> Sized: ...

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]: ...


def draw_training(datamodule: PictureData, limit: int, seed: int) -> dict[str, Any]:
    """`limit` training samples (all, if there are no more) as one batch, drawn and ordered at random by `seed`.

    Stored order would not do, neither for a part of the split nor for a part of the batch: pictures from class folders
    lie class by class, and the first of them are of a few classes only.
    """
    total = len(datamodule.split("train"))
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
    return datamodule.samples("train", rows.tolist())


def _conv(n_in: int, n_out: int, stride: int = 1, kernel: int = 3, pool: int = 1) -> nn.Sequential:
    """Convolution, maximum over pool x pool (first, as it leaves less to normalise), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.MaxPool2d(pool) if pool > 1 else nn.Identity(),
        nn.BatchNorm2d(n_out),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """x + two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Classifier(nn.Module):
    """A trunk, D features, and one linear head per slot (stored as one matrix, split by slot)."""

    feature_name: str

    def __init__(self, trunk: nn.Module, feature_dim: int, slots: Slots) -> None:
        super().__init__()
        self.trunk = trunk
        self.slots = slots
        self.heads = nn.Linear(feature_dim, sum(slots.sizes))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] -> logits (N, classes) of each slot."""
        return list(self.heads(self.trunk(images)).float().split(self.slots.sizes, dim=1))

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D), what the heads see."""
        return self.trunk(images.to(memory_format=torch.channels_last)).float()

    def read(self, features: Tensor) -> Tensor:
        """Features (N, D) -> class index of every slot, (N, S)."""
        return torch.stack([x.argmax(dim=1) for x in self.heads(features).split(self.slots.sizes, dim=1)], dim=1)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> class index of every slot, (N, S)."""
        return self.read(self.features(images))

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """The true class index of every slot of a batch of the data module, (N, S); -1 is never right."""
        raise NotImplementedError

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Training pictures as the network is to see them, (N, 3, H, W) -> the same."""
        raise NotImplementedError


class AttributeClassifier(Classifier):
    """Reads the attributes of scenes: a small network that keeps places apart (it flattens, it does not pool).

    The first convolution halves the picture: full-size feature maps would be half of the time and add nothing. At 16
    pixels and below there are residual blocks; `width` is that at 16, half as wide at twice the side.
    """

    feature_name = "attribute-classifier"

    def __init__(self, slots: Slots, image_size: int = 32, width: int = 48, feature_dim: int = 256) -> None:
        halvings = round(math.log2(image_size / 4))
        if image_size != 4 * 2**halvings or halvings < 2:
            raise ValueError(f"got pictures of {image_size} pixels, wanted 16, 32, 64, ...; they are halved to 4")
        sides = [image_size >> level for level in range(1, halvings + 1)]  # ..., 16, 8, 4
        widths = [3, *(min(width * 16 // side, 128) for side in sides)]
        layers: list[nn.Module] = []
        for side, (n_in, n_out) in zip(sides, itertools.pairwise(widths), strict=True):
            layers.append(_conv(n_in, n_out, stride=2, kernel=5 if n_in == 3 else 3))
            if side <= 16:
                layers.append(Residual(n_out))
        layers += [nn.Flatten(), nn.Linear(16 * widths[-1], feature_dim), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), feature_dim, slots)

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        return self.slots.targets(batch["attributes"])

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images


class LabelClassifier(Classifier):
    """Reads the class of photographs: a nine-layer residual network, pictures flipped and shifted while it trains."""

    feature_name = "label-classifier"

    def __init__(self, slots: Slots, width: int = 32) -> None:
        layers: list[nn.Module] = [_conv(3, width)]
        layers += [_conv(width, 2 * width, pool=2), Residual(2 * width), _conv(2 * width, 4 * width, pool=2)]
        layers += [_conv(4 * width, 8 * width, pool=2), Residual(8 * width), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        super().__init__(nn.Sequential(*layers), 8 * width, slots)

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["labels"].reshape(-1, 1)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Flip half of them, then shift each by up to an eighth of its side, edges mirrored."""
        n, _, h, w = images.shape
        pad = h // 8
        flip = torch.rand(n, 1, 1, 1, generator=generator).to(images.device) < 0.5
        padded = F.pad(torch.where(flip, images.flip(3), images), (pad, pad, pad, pad), mode="reflect")
        top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator).to(images.device)
        rows = (top + torch.arange(h, device=images.device))[:, None, :, None]  # (N, 1, h, 1)
        columns = (left + torch.arange(w, device=images.device))[:, None, None, :]  # (N, 1, 1, w)
        samples = torch.arange(n, device=images.device)[:, None, None, None]
        return padded[samples, torch.arange(3, device=images.device)[None, :, None, None], rows, columns]


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


def scene_budget(image_size: int) -> Budget:
    """800 steps at 32 pixels, about a minute of two cores; more for larger scenes with more in them."""
    scale = max(1, image_size // 32)
    return Budget(steps=800 * scale**2, seconds=200 * scale, target=0.997)


def fit_classifier(
    classifier: Classifier, data: Mapping[str, Any], budget: Budget, seed: int, device: torch.device | str = "cpu"
) -> float:
    """Train in place on `data` (fields of a data module's batch, whole split); returns the set-aside accuracy.

    The pictures set aside are drawn at random: where classes lie one after another, both parts have all of them. The
    schedule follows steps or seconds, whichever is further on, so a slow machine ends with a low rate as well.
    """
    images, targets = data["images"], classifier.targets(data)
    held_back = min(HELD_BACK, len(images) // 5)
    num_train = len(images) - held_back
    if num_train < 1 or held_back < 1:
        raise ValueError(f"got {len(images)} pictures to train a classifier on, wanted 5 or more; prepare more data")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(images), generator=generator)
    aside, trained = drawn[:held_back], drawn[held_back:]
    classifier.to(device)
    classifier.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=budget.learning_rate, weight_decay=0.02)
    dtype = matmul_dtype(torch.device(device))
    bar = tqdm(total=100, desc=f"train {classifier.feature_name}", unit="%", disable=None, leave=False)
    start, order, accuracy = time.monotonic(), torch.empty(0, dtype=torch.long), 0.0
    for step in range(1, budget.steps + 1):
        progress = max(step / budget.steps, (time.monotonic() - start) / budget.seconds)
        bar.update(min(int(100 * progress), 100) - bar.n)
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * max(min(progress / 0.2, (1 - progress) / 0.8), 0.01)
        if len(order) < budget.batch_size:
            order = torch.cat([order, trained[torch.randperm(num_train, generator=generator)]])
        chosen, order = order[: budget.batch_size], order[budget.batch_size :]
        x = classifier.augment(images[chosen].to(device), generator).to(memory_format=torch.channels_last)
        y = targets[chosen].to(device)
        classifier.train()
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            features = classifier.trunk(x)
        logits = classifier.heads(features.float()).split(classifier.slots.sizes, dim=1)
        loss = torch.stack([F.cross_entropy(slot, y[:, i], ignore_index=-1) for i, slot in enumerate(logits)]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ended = progress >= 1 or step == budget.steps
        if ended or step % budget.check_every == 0:
            accuracy = slot_accuracy(classifier, images[aside], targets[aside], device)["all"]
            elapsed = time.monotonic() - start
            left = "" if ended else f", at most {elapsed * (1 / progress - 1):.0f} s left"
            bar.clear()
            print(
                f"{classifier.feature_name}: {accuracy:.2%} of set-aside pictures right, {elapsed:.0f} s{left}",
                flush=True,
            )
            if ended or accuracy >= budget.target:
                break
    bar.close()
    classifier.eval()
    return accuracy


def slot_accuracy(
    classifier: Classifier, images: Tensor, targets: Tensor, device: torch.device | str = "cpu", batch_size: int = 250
) -> dict[str, float]:
    """Share of pictures (N, 3, H, W) read right, for each slot and for "all" slots at once; targets (N, S)."""
    was_training = classifier.training
    classifier.eval()
    predictions = torch.cat([classifier.predict(part.to(device)).cpu() for part in images.split(batch_size)])
    classifier.train(was_training)
    return accuracy_by_slot(predictions, targets, classifier.slots)


def accuracy_by_slot(predictions: Tensor, targets: Tensor, slots: Slots) -> dict[str, float]:
    """Share right of (N, S) predictions for each slot by name, and under "all" with every slot right."""
    right = predictions.cpu() == targets.cpu()
    shares = {name: right[:, i].float().mean().item() for i, name in enumerate(slots.names)}
    return {"all": right.all(dim=1).float().mean().item(), **shares}


def report_classifier(
    datamodule: PictureData,
    run_dir: str | Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    budget: Budget | None = None,
) -> Classifier | None:
    """The classifier of a run: from `run_dir`/classifier if it was trained on this data, else trained and kept there.

    An `AttributeClassifier` where training samples have attributes, a `LabelClassifier` where they have labels, and
    None where they have neither (captions alone name no classes).
    """
    folder = Path(run_dir) / "classifier"
    fingerprint = _fingerprint(datamodule)
    kept = load_classifier(folder, fingerprint)
    if kept is not None:
        return kept.to(device)
    probe = draw_training(datamodule, 64, seed)
    has_attributes = all(probe["attributes"])
    if not has_attributes and int(probe["labels"].min()) < 0:
        return None
    data = draw_training(datamodule, _training_limit(probe["images"]), seed)
    classifier: Classifier
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        if has_attributes:
            classifier = AttributeClassifier(Slots.of_scenes(data["attributes"]), data["images"].shape[-1])
        else:
            names = [str(i) for i in range(int(data["labels"].max()) + 1)]
            classifier = LabelClassifier(Slots({"class": names}))
    if budget is None:
        budget = scene_budget(data["images"].shape[-1]) if has_attributes else PHOTO_BUDGET
    accuracy = fit_classifier(classifier, data, budget, seed, device)
    save_classifier(classifier, folder, fingerprint, data["images"].shape[-1], accuracy)
    return classifier


def _training_limit(images: Tensor) -> int:
    """Pictures like `images` (n, 3, H, W) to train on: 60,000, fewer where they are large."""
    return min(60_000, TRAINING_BYTES // (images[0].numel() * images.element_size()))


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
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    return classifier.eval()


def _fingerprint(datamodule: PictureData) -> str:
    """A hash of the data's manifest: it names every shard with its content hash."""
    manifest = Path(datamodule.data_dir) / "manifest.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
