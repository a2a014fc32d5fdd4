"""The figures of the reconstruction report that are not a pixel error: distances of sets, a classifier, linear probes.

Each stands beside two others: the same of real pictures, which says how good the reader is, and the same of PCA at
equal floats, which says what a linear code keeps.

Letters: N pictures, K latents, C channels, k prefix length, D features, F floats.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from stage1_tokenizer.evaluation.attributes import LETTER
from stage1_tokenizer.evaluation.classifier import Classifier, accuracy_by_slot
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, ImageNetFeatures, frechet_distance, precision_recall
from stage1_tokenizer.evaluation.picture_set import PictureSet
from stage1_tokenizer.evaluation.probes import linear_probe
from stage1_tokenizer.evaluation.reconstruction_pass import HeldOut, Lines, Measured


def distances(
    held_out: HeldOut,
    learned: Measured,
    linear: Measured,
    train: PictureSet,
    extractors: Sequence[FeatureExtractor],
) -> dict[str, Any]:
    """Frechet distance to the held-out pictures by k, and of training pictures; precision and recall of a sample.

    With ImageNet features also the share of pictures whose ImageNet class stays the same (`imagenet_top1_agreement`).
    """
    metrics: dict[str, Any] = {}
    for extractor in extractors:
        name = extractor.feature_name
        real, sample = held_out.set.moments[name], held_out.set.rows(name)
        entry: dict[str, Any] = {"n": real.n, "real_real": frechet_distance(real, train.moments[name])}
        for label, code in (("reconstruction", learned), ("pca", linear)):
            entry[label] = {k: frechet_distance(real, fake.moments[name]) for k, fake in code.sets.items()}
            if len(sample) > 3:
                pairs = {k: precision_recall(sample, fake.rows(name)) for k, fake in code.sets.items()}
                entry[f"{label}_precision"] = {k: pair[0] for k, pair in pairs.items()}
                entry[f"{label}_recall"] = {k: pair[1] for k, pair in pairs.items()}
            if isinstance(extractor, ImageNetFeatures):
                classes = held_out.set.readings(name)
                same = {k: (fake.readings(name) == classes).float().mean().item() for k, fake in code.sets.items()}
                metrics.setdefault(f"imagenet_top1_agreement[{name}]", {})[label] = same
        metrics[f"frechet[{name}]"] = entry
    return metrics


def read_back(classifier: Classifier, held_out: HeldOut, learned: Measured, linear: Measured) -> dict[str, Any]:
    """Accuracy of the classifier on real held-out pictures and on what both codes make of them, by slot and k.

    Under "words", where scenes have them: the share of words that are read letter by letter.
    """
    name, slots = classifier.feature_name, classifier.slots
    targets = classifier.targets(held_out.samples)
    real = held_out.set.readings(name)
    by_code = {
        label: {k: pictures.readings(name) for k, pictures in code.sets.items()}
        for label, code in (("reconstruction", learned), ("pca", linear))
    }
    result: dict[str, Any] = {
        "features": name,
        "trained_on": classifier.trained_on,
        "real": accuracy_by_slot(real, targets, slots),
    }
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


def probe(classifier: Classifier, train: Lines, held_out: Lines, lengths: Sequence[int]) -> dict[str, Any]:
    """Mean accuracy over slots of a linear probe on the first k latents and on as many PCA coefficients."""
    train_y, test_y = classifier.targets(train.samples), classifier.targets(held_out.samples)
    channels = train.z.shape[-1]
    result: dict[str, Any] = {"n": len(train_y), "learned": {}, "pca": {}}
    for k in tqdm(lengths, desc="linear probes", disable=None, leave=False):
        pairs = {
            "learned": (train.z[:, :k].flatten(1), held_out.z[:, :k].flatten(1)),
            "pca": (train.codes[:, : k * channels], held_out.codes[:, : k * channels]),
        }
        for label, (x, test_x) in pairs.items():
            accuracy = linear_probe(x, train_y, test_x, test_y, classifier.slots.sizes)
            result[label][k] = accuracy[:-1].mean().item()
    return result
