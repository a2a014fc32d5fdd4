"""The figures of the reconstruction report that are not a pixel error: distances of sets, a classifier, linear probes.

Each stands beside two others: the same of real pictures, which says how good the reader is, and the same of PCA at
equal floats, which says what a linear code keeps.

Letters: N pictures, K latents, C channels, k prefix length, D features, F floats.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stage1_tokenizer.evaluation.attributes import LETTER
from stage1_tokenizer.evaluation.classifier import Classifier, accuracy_by_slot
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, ImageNetFeatures, frechet_distance, precision_recall
from stage1_tokenizer.evaluation.probes import linear_probe
from stage1_tokenizer.evaluation.reconstruction_pass import HeldOut, Measured
from stage1_tokenizer.pca import PCA

NEIGHBOUR_PICTURES = 2000  # precision and recall compare all pairs


def distances(
    held_out: HeldOut,
    learned: Measured,
    linear: Measured,
    train_images: Tensor,
    extractors: Sequence[FeatureExtractor],
    device: torch.device,
) -> dict[str, Any]:
    """Frechet distance to the held-out pictures by k, with precision and recall, and of as many training pictures.

    With ImageNet features also the share of pictures whose ImageNet class stays the same (`imagenet_top1_agreement`).
    """
    metrics: dict[str, Any] = {}
    for extractor in extractors:
        name = extractor.feature_name
        real = held_out.features[name]
        other = torch.cat([extractor.features(p.to(device)).cpu() for p in train_images[: len(real)].split(250)])
        entry: dict[str, Any] = {"n": len(real), "real_real": frechet_distance(real, other)}
        for label, code in (("reconstruction", learned), ("pca", linear)):
            by_k = code.features_by_k(name)
            entry[label] = {k: frechet_distance(real, fake) for k, fake in by_k.items()}
            if len(real) > 3:
                few = slice(NEIGHBOUR_PICTURES)
                pairs = {k: precision_recall(real[few], fake[few]) for k, fake in by_k.items()}
                entry[f"{label}_precision"] = {k: pair[0] for k, pair in pairs.items()}
                entry[f"{label}_recall"] = {k: pair[1] for k, pair in pairs.items()}
            if isinstance(extractor, ImageNetFeatures):
                label_of = extractor.top1(real)
                agreement = {k: (extractor.top1(fake) == label_of).float().mean().item() for k, fake in by_k.items()}
                metrics.setdefault(f"imagenet_top1_agreement[{name}]", {})[label] = agreement
        metrics[f"frechet[{name}]"] = entry
    return metrics


@torch.inference_mode()
def read_back(classifier: Classifier, held_out: HeldOut, learned: Measured, linear: Measured) -> dict[str, Any]:
    """Accuracy of the classifier on real held-out pictures and on what both codes make of them, by slot and k.

    Under "words", where scenes have them: the share of words that are read letter by letter.
    """
    name, slots = classifier.feature_name, classifier.slots
    targets = classifier.targets(held_out.samples)

    def read(features: Tensor) -> Tensor:
        return classifier.read(features.to(classifier.heads.weight.device)).cpu()

    real = read(held_out.features[name])
    by_code = {
        label: {k: read(features) for k, features in code.features_by_k(name).items()}
        for label, code in (("reconstruction", learned), ("pca", linear))
    }
    result: dict[str, Any] = {"features": name, "real": accuracy_by_slot(real, targets, slots)}
    for label, by_k in by_code.items():
        result[label] = {k: accuracy_by_slot(predicted, targets, slots) for k, predicted in by_k.items()}
    if any(slot.startswith(LETTER) for slot in slots.names):
        truth = slots.words(targets.clamp_min(0))
        rows = [i for i, word in enumerate(truth) if word]

        def share(predicted: Tensor) -> float:
            words = slots.words(predicted)
            return sum(words[i] == truth[i] for i in rows) / max(len(rows), 1)

        result["words"] = {"n": len(rows), "real": share(real)}
        result["words"] |= {label: {k: share(p) for k, p in by_k.items()} for label, by_k in by_code.items()}
    return result


def probe(
    classifier: Classifier,
    train: Mapping[str, Any],
    train_z: Tensor,
    held_out: HeldOut,
    lengths: Sequence[int],
    pca: PCA,
) -> dict[str, Any]:
    """Mean accuracy over slots of a linear probe on the first k latents and on as many PCA coefficients.

    train: images, labels and attributes of the training pictures to fit on. train_z: (N, K, C) their latents.
    """
    train_y, test_y = classifier.targets(train), classifier.targets(held_out.samples)
    channels = train_z.shape[-1]
    train_codes = torch.cat([pca.encode(part.to(pca.mean.device)).cpu() for part in train["images"].split(1000)])
    result: dict[str, Any] = {"n": len(train_y), "learned": {}, "pca": {}}
    for k in tqdm(lengths, desc="linear probes", disable=None, leave=False):
        pairs = {
            "learned": (train_z[:, :k].flatten(1), held_out.z[:, :k].flatten(1)),
            "pca": (train_codes[:, : k * channels], held_out.codes[:, : k * channels]),
        }
        for label, (x, test_x) in pairs.items():
            accuracy = linear_probe(x, train_y, test_x, test_y, classifier.slots.sizes)
            result[label][k] = accuracy[:-1].mean().item()
    return result
