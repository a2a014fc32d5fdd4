"""The reconstruction report: what a tokenizer keeps, by prefix length, next to PCA at the same number of floats.

    held-out pictures --posterior--> z --decode(z[:, :k])--> pictures --> PSNR, SSIM, attributes, Frechet distance
                             |                     PCA(k C floats) --> the same
                             +--> retrieval of captions, zero-shot classes, linear probe, rate and active units

Pictures stream through in batches and only numbers, latents and features are kept. Everything is measured on the
held-out split; PCA, the classifier and the probes are fitted on the training split. Which figures there are follows
from the data: attributes and words for scenes, classes for labelled pictures, captions alone for the rest. What a
figure needs and does not find is named in the report.

Letters: N pictures, K latents, C channels, k prefix length, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from data.reading.order import spread_rows
from stage1_tokenizer.evaluation import reconstruction_page
from stage1_tokenizer.evaluation.attributes import LETTER
from stage1_tokenizer.evaluation.classifier import (
    Classifier,
    PictureData,
    accuracy_by_slot,
    draw_training,
    report_classifier,
)
from stage1_tokenizer.evaluation.frechet import (
    FeatureExtractor,
    RandomConvFeatures,
    frechet_distance,
    inception_features,
    precision_recall,
)
from stage1_tokenizer.evaluation.image_metrics import PairMetric, Skipped, latent_use, lpips_metric, psnr, ssim
from stage1_tokenizer.evaluation.probes import linear_probe
from stage1_tokenizer.evaluation.reconstruction_text import text_metrics
from stage1_tokenizer.evaluation.report import provenance
from stage1_tokenizer.pca import PCA
from stage1_tokenizer.tokenizer import Tokenizer

PCA_BYTES = 2**30  # training pictures that PCA is fitted on, as float32
NEIGHBOUR_PICTURES = 2000  # precision and recall compare all pairs
GRID_PICTURES = 8


class ReportData(PictureData, Protocol):
    """The data module as this report uses it."""

    val_batch_size: int


@dataclass
class Measured:
    """What is kept of the pictures of one code (a tokenizer, or PCA) at each length k."""

    values: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)  # metric -> k -> parts (B,)
    features: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)  # extractor -> k -> parts (B, D)
    pictures: dict[int, Tensor] = field(default_factory=dict)  # the first few, for the grid

    def add(
        self,
        k: int,
        made: Tensor,
        images: Tensor,
        pair_metrics: dict[str, PairMetric],
        extractors: Sequence[FeatureExtractor],
    ) -> None:
        """Measure pictures `made` (B, 3, H, W) with k latents' worth of floats against `images`."""
        for name, metric in pair_metrics.items():
            self.values.setdefault(name, {}).setdefault(k, []).append(metric(made, images).cpu())
        for extractor in extractors:
            parts = self.features.setdefault(extractor.feature_name, {}).setdefault(k, [])
            parts.append(extractor.features(made).cpu())
        self.pictures.setdefault(k, made[:GRID_PICTURES].cpu())

    def means(self) -> dict[str, dict[int, float]]:
        """The mean over pictures of every metric at every k."""
        return {n: {k: torch.cat(p).mean().item() for k, p in by_k.items()} for n, by_k in self.values.items()}


def prefix_lengths(num_latents: int) -> list[int]:
    """1, 2, 4, ... and K."""
    return [2**i for i in range(num_latents.bit_length()) if 2**i < num_latents] + [num_latents]


@torch.inference_mode(False)  # Lightning tests in inference mode, where neither classifier nor probes could be trained
@torch.enable_grad()
def reconstruction_report(
    tokenizer: Tokenizer,
    datamodule: ReportData,
    out_dir: str | Path,
    run_dir: str | Path,
    limit: int = 2000,
    probe_images: int = 5_000,
    baseline: Mapping[str, Any] | None = None,
    lpips_trunk: str = "alex",
    lpips_weights: str | None = None,
    inception_weights: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure `tokenizer` (in eval mode, on its own device) and write report.html, metrics.json and PNGs to `out_dir`.

    Args:
        datamodule: of the pictures; its val split is measured, its training split is fitted on.
        run_dir: keeps the report's classifier, which the generation report uses too.
        limit: held-out pictures to measure, spread over the split.
        probe_images: training pictures for the linear probes.
        baseline: content of metrics.json of the same run without text losses; the page then shows what text costs.
        lpips_trunk: "alex", "vgg" or "squeeze".
        lpips_weights: path of torchvision's weights of that trunk, None: in torch's cache; left out by name without.
        inception_weights: path of FID's Inception weights; left out by name without.
        seed: of the draw of training pictures, the classifier, PCA's first directions and a stochastic decoder's noise.

    Returns:
        The content of metrics.json; entries by prefix length are dictionaries {k: value}.
    """
    device = tokenizer.latent_mean.device
    lengths = prefix_lengths(tokenizer.num_latents)
    channels = tokenizer.latent_dim
    skipped: list[Skipped] = []

    print("report: principal components, classifier, then the held-out pictures and the probes", flush=True)
    train = draw_training(datamodule, max(limit, probe_images), seed)
    pca = _fit_pca(datamodule, train, tokenizer.num_latents * channels, seed, device)
    classifier = report_classifier(datamodule, run_dir, seed, device)
    extractors: list[FeatureExtractor] = [classifier if classifier is not None else RandomConvFeatures(0).to(device)]
    pair_metrics: dict[str, PairMetric] = {"psnr": psnr, "ssim": ssim}
    for found in (lpips_metric(lpips_trunk, device, lpips_weights), inception_features(inception_weights, device)):
        if isinstance(found, Skipped):
            skipped.append(found)
        elif callable(found):
            pair_metrics[f"lpips[{lpips_trunk}]"] = found
        else:
            extractors.append(found)

    held_out, learned, linear = _measure(
        tokenizer, pca, datamodule, lengths, limit, pair_metrics, extractors, seed, device
    )
    train_z = _encode(tokenizer, train["images"][:probe_images], device)
    num = len(held_out["z"])
    metrics: dict[str, Any] = {
        "num_images": num,
        "prefix_lengths": lengths,
        "floats": {k: k * channels for k in lengths},
        **learned.means(),
        "pca": {**linear.means(), "num_floats": pca.num_floats},
    }
    use = latent_use(held_out["z"], held_out["std"])
    metrics["latents"] = {
        "active_units": use.active_units.tolist(),
        "rate_bits": use.rate_bits.tolist(),
        "mean_variance": use.mean_variance.tolist(),
    }
    capacity = getattr(tokenizer.bottleneck, "bits_per_latent", None)
    if capacity is not None:  # of symbols, which have no noise and so no finite rate
        metrics["latents"]["bits_per_latent"] = capacity
    metrics |= _distances(held_out, learned, linear, train["images"], extractors, device)
    if classifier is not None:
        metrics["classifier"] = _read_back(classifier, held_out, learned, linear)
        metrics["linear_probe"] = _probe(classifier, train, train_z, held_out, lengths, pca, channels, probe_images)
    if tokenizer.text is None:
        skipped.append(Skipped("retrieval", "the tokenizer has no text part", "train it with text losses"))
    elif not all(held_out["captions"]):
        skipped.append(Skipped("retrieval", "held-out pictures have no captions", "prepare data with captions"))
    else:
        metrics |= text_metrics(tokenizer, held_out, train, lengths)
    if baseline is not None:
        metrics["baseline"] = _compare(baseline, metrics["psnr"])
    metrics["skipped"] = [vars(item) for item in skipped]
    metrics["provenance"] = provenance(seed)
    pictures = {"original": held_out["pictures"], "learned": learned.pictures, "pca": linear.pictures}
    figures = reconstruction_page.headlines(metrics)
    metrics["figures"] = [vars(figure) for figure in figures]
    written = reconstruction_page.page(metrics, pictures, skipped).write(out_dir, metrics)
    print("\n".join([f"reconstruction report: {written}", *map(str, figures)]), flush=True)
    return metrics


def _compare(baseline: Mapping[str, Any], psnr_here: Mapping[int, float]) -> dict[str, Any]:
    """PSNR of another run's metrics.json, whose keys are text, and what this run has less."""
    if "psnr" not in baseline:
        raise ValueError("got a baseline without psnr, wanted the metrics.json of another run's reconstruction report")
    theirs = {k: baseline["psnr"][str(k)] for k in psnr_here if str(k) in baseline["psnr"]}
    facts = baseline.get("provenance", {})
    return {
        "command": facts.get("command", ""),
        "date": facts.get("date", ""),
        "psnr": theirs,
        "cost": {k: value - psnr_here[k] for k, value in theirs.items()},
    }


def _fit_pca(datamodule: ReportData, train: dict[str, Any], num_floats: int, seed: int, device: torch.device) -> PCA:
    """PCA of up to 25,000 training pictures, fewer where they are large."""
    limit = min(25_000, PCA_BYTES // (4 * train["images"][0].numel()))
    images = train["images"][:limit]
    if len(images) < limit:
        images = draw_training(datamodule, limit, seed)["images"]
    return PCA.fit(images.to(device), num_floats, torch.Generator().manual_seed(seed))


@torch.inference_mode()
def _measure(
    tokenizer: Tokenizer,
    pca: PCA,
    datamodule: ReportData,
    lengths: Sequence[int],
    limit: int,
    pair_metrics: dict[str, PairMetric],
    extractors: Sequence[FeatureExtractor],
    seed: int,
    device: torch.device,
) -> tuple[dict[str, Any], Measured, Measured]:
    """One pass over the held-out pictures: their latents and texts, and what both codes make of them."""
    generator = torch.Generator(device).manual_seed(seed)
    learned, linear = Measured(), Measured()
    kept: dict[str, Any] = {"z": [], "std": [], "captions": [], "attributes": [], "labels": [], "pictures": None}
    features: dict[str, list[Tensor]] = {extractor.feature_name: [] for extractor in extractors}
    rows, size = spread_rows(len(datamodule.split("val")), limit), datamodule.val_batch_size
    if len(rows) < 2:
        raise ValueError(f"got {len(rows)} held-out pictures for the report, wanted 2 or more; prepare more of them")
    for at in tqdm(range(0, len(rows), size), desc="reconstruct", disable=None, leave=False):
        batch = datamodule.samples("val", rows[at : at + size])
        images = batch["images"].to(device)
        mean, std = tokenizer.posterior(images)
        codes = pca.encode(images)
        for k in lengths:
            learned.add(k, tokenizer.decode(mean[:, :k], generator=generator), images, pair_metrics, extractors)
            linear.add(k, pca.decode(codes[:, : k * tokenizer.latent_dim]), images, pair_metrics, extractors)
        for extractor in extractors:
            features[extractor.feature_name].append(extractor.features(images).cpu())
        for name, value in (("z", mean), ("std", std), ("labels", batch["labels"])):
            kept[name].append(value.cpu())
        kept["captions"] += batch["captions"]
        kept["attributes"] += batch["attributes"]
        kept.setdefault("codes", []).append(codes.cpu())
        if kept["pictures"] is None:
            kept["pictures"] = images[:GRID_PICTURES].cpu()
    kept |= {name: torch.cat(kept[name]) for name in ("z", "std", "labels", "codes")}
    kept["features"] = {name: torch.cat(parts) for name, parts in features.items()}
    return kept, learned, linear


@torch.inference_mode()
def _encode(tokenizer: Tokenizer, images: Tensor, device: torch.device) -> Tensor:
    return torch.cat([tokenizer.posterior(part.to(device))[0].cpu() for part in images.split(500)])


def _distances(
    held_out: dict[str, Any],
    learned: Measured,
    linear: Measured,
    train_images: Tensor,
    extractors: Sequence[FeatureExtractor],
    device: torch.device,
) -> dict[str, Any]:
    """Frechet distance to the held-out pictures by k, with precision and recall, and of as many training pictures."""
    metrics = {}
    for extractor in extractors:
        name = extractor.feature_name
        real = held_out["features"][name]
        other = torch.cat([extractor.features(p.to(device)).cpu() for p in train_images[: len(real)].split(250)])
        entry: dict[str, Any] = {"n": len(real), "real_real": frechet_distance(real, other)}
        for label, code in (("reconstruction", learned), ("pca", linear)):
            by_k = {k: torch.cat(parts) for k, parts in code.features[name].items()}
            entry[label] = {k: frechet_distance(real, fake) for k, fake in by_k.items()}
            if len(real) > 3:
                few = slice(NEIGHBOUR_PICTURES)
                pairs = {k: precision_recall(real[few], fake[few]) for k, fake in by_k.items()}
                entry[f"{label}_precision"] = {k: pair[0] for k, pair in pairs.items()}
                entry[f"{label}_recall"] = {k: pair[1] for k, pair in pairs.items()}
        metrics[f"frechet[{name}]"] = entry
    return metrics


def _read_back(classifier: Classifier, held_out: dict[str, Any], learned: Measured, linear: Measured) -> dict[str, Any]:
    """Accuracy of the classifier on real held-out pictures and on what both codes make of them, by slot and k."""
    name, slots = classifier.feature_name, classifier.slots
    targets = classifier.targets(held_out)

    def read(features: Tensor) -> Tensor:
        return classifier.read(features.to(classifier.heads.weight.device)).cpu()

    with torch.inference_mode():
        real = read(held_out["features"][name])
        made = {
            label: {k: read(torch.cat(parts)) for k, parts in code.features[name].items()}
            for label, code in (("reconstruction", learned), ("pca", linear))
        }
    result: dict[str, Any] = {"features": name, "real": accuracy_by_slot(real, targets, slots)}
    for label, by_k in made.items():
        result[label] = {k: accuracy_by_slot(predicted, targets, slots) for k, predicted in by_k.items()}
    if any(slot.startswith(LETTER) for slot in slots.names):
        truth = slots.words(targets.clamp_min(0))
        written = [i for i, word in enumerate(truth) if word]

        def share(predicted: Tensor) -> float:
            words = slots.words(predicted)
            return sum(words[i] == truth[i] for i in written) / max(len(written), 1)

        result["words"] = {"n": len(written), "real": share(real)}
        result["words"] |= {label: {k: share(p) for k, p in by_k.items()} for label, by_k in made.items()}
    return result


def _probe(
    classifier: Classifier,
    train: dict[str, Any],
    train_z: Tensor,
    held_out: dict[str, Any],
    lengths: Sequence[int],
    pca: PCA,
    channels: int,
    limit: int,
) -> dict[str, Any]:
    """Mean accuracy over slots of a linear probe on the first k latents and on as many PCA coefficients."""
    few = {"labels": train["labels"][:limit], "attributes": train["attributes"][:limit]}
    train_y, test_y = classifier.targets(few), classifier.targets(held_out)
    images = train["images"][:limit].split(1000)
    train_codes = torch.cat([pca.encode(part.to(pca.mean.device)).cpu() for part in images])
    result: dict[str, Any] = {"n": len(train_y), "learned": {}, "pca": {}}
    for k in tqdm(lengths, desc="linear probes", disable=None, leave=False):
        pairs = {
            "learned": (train_z[:, :k].flatten(1), held_out["z"][:, :k].flatten(1)),
            "pca": (train_codes[:, : k * channels], held_out["codes"][:, : k * channels]),
        }
        for label, (x, test_x) in pairs.items():
            accuracy = linear_probe(x, train_y, test_x, test_y, classifier.slots.sizes)
            result[label][k] = accuracy[:-1].mean().item()
    return result
