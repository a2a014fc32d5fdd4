"""Networks that read pictures: every attribute of a scene, or the class of a labelled photograph.

A report asks them what is in the pictures that a model made, and takes Frechet distances in their features. A figure
such as "all attributes right in 93% of reconstructions" is only as good as the reader, so a report always prints the
reader's own accuracy on real held-out pictures. How they are trained and kept is the business of `classifier_fit`.

    right = classifier.predict(images) == classifier.targets(batch)      # (N, S) for S slots
    frechet_distance(classifier.features(real), classifier.features(generated))

Both are plain convolutional networks in channels-last. Letters: N pictures, S slots, D features.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_tokenizer.evaluation.attributes import Slots


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
    trained_on: int = 0  # different pictures that training has seen

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

    @torch.inference_mode()
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
        """Shift each by up to a sixteenth of its side, unless a slot says where something is."""
        placed = any(name == "layout" or name.endswith(".place") for name in self.slots.names)
        return images if placed else shifted(images, images.shape[-1] // 16, generator)


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
        flip = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
        return shifted(torch.where(flip, images.flip(3), images), images.shape[2] // 8, generator)


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each of images (N, 3, H, W) moved by up to `most` pixels in either direction, edges mirrored."""
    n, _, h, w = images.shape
    padded = F.pad(images, (most, most, most, most), mode="reflect")
    top, left = torch.randint(0, 2 * most + 1, (2, n, 1), generator=generator).to(images.device)
    rows = (top + torch.arange(h, device=images.device))[:, None, :, None]  # (N, 1, h, 1)
    columns = (left + torch.arange(w, device=images.device))[:, None, None, :]  # (N, 1, 1, w)
    samples = torch.arange(n, device=images.device)[:, None, None, None]
    return padded[samples, torch.arange(3, device=images.device)[None, :, None, None], rows, columns]


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
