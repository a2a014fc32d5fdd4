"""The reconstruction report: what a tokenizer keeps, by prefix length, next to PCA at the same number of floats.

    held-out pictures --posterior--> z --decode(z[:, :k])--> pictures --> PSNR, SSIM, attributes, Frechet distance
                             |                     PCA(k C floats) --> the same
                             +--> retrieval of captions, zero-shot classes, linear probe, rate and active units

Pictures stream through in batches and none is kept that is not shown: beyond 5,000 only numbers are kept of a picture
(`reconstruction_pass`; the report says how much memory and time it took). Everything is measured on the held-out
split; PCA, the classifier and the probes are fitted on the training split. Which figures there are follows from the
data: attributes and words for scenes, classes for labelled pictures, captions alone for the rest. What a figure needs
and the machine does not have is named in the report.

Letters: N pictures, K latents, C channels, k prefix length, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stage1_tokenizer.evaluation import reconstruction_page
from stage1_tokenizer.evaluation.classifier import Classifier
from stage1_tokenizer.evaluation.classifier_fit import report_classifier
from stage1_tokenizer.evaluation.frechet import (
    FeatureExtractor,
    RandomConvFeatures,
    imagenet_features,
)
from stage1_tokenizer.evaluation.image_metrics import Skipped, lpips_metric
from stage1_tokenizer.evaluation.inception import inception_features
from stage1_tokenizer.evaluation.latent_use import latent_use
from stage1_tokenizer.evaluation.picture_data import PictureData, draw_training, training_rows
from stage1_tokenizer.evaluation.provenance import Cost, provenance
from stage1_tokenizer.evaluation.reconstruction_pass import (
    HeldOut,
    Lines,
    Meters,
    measure,
    prefix_lengths,
    training_pass,
)
from stage1_tokenizer.evaluation.reconstruction_read import distances, probe, read_back
from stage1_tokenizer.evaluation.reconstruction_text import text_metrics
from stage1_tokenizer.pca import PCA
from stage1_tokenizer.similarity import psnr, ssim
from stage1_tokenizer.text.ranks import rank
from stage1_tokenizer.tokenizer import Tokenizer

PCA_BYTES = 2**30  # training pictures that PCA is fitted on, as float32
PCA_PICTURES = 25_000


@torch.inference_mode(False)  # Lightning tests in inference mode, where neither classifier nor probes could be trained
@torch.enable_grad()
def reconstruction_report(
    tokenizer: Tokenizer,
    datamodule: PictureData,
    out_dir: str | Path,
    run_dir: str | Path,
    limit: int = 2000,
    probe_images: int = 5_000,
    lpips_trunk: str = "alex",
    lpips_weights: str | None = None,
    inception_weights: str | None = None,
    imagenet_weights: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure `tokenizer` (in eval mode, on its own device) and write report.html, metrics.json and PNGs to `out_dir`.

    Args:
        datamodule: of the pictures; its val split is measured, its training split is fitted on.
        run_dir: keeps the report's classifier, which the generation report uses too.
        limit: held-out pictures to measure, spread over the split.
        probe_images: training pictures for the linear probes.
        lpips_trunk: "alex", "vgg" or "squeeze".
        lpips_weights: path of torchvision's weights of that trunk, None: in torch's cache; left out by name without.
        inception_weights: path of FID's Inception weights; left out by name without.
        imagenet_weights: path of EfficientNet-Lite0's weights or "installed"; left out by name without.
        seed: of the draw of training pictures, the classifier, PCA's first directions and a stochastic decoder's noise.

    Returns:
        The content of metrics.json; entries by prefix length are dictionaries {k: value}. Of several ranks each goes
        through its share of the pictures, the first does the rest, and the others return nothing.
    """
    cost, device = Cost(), tokenizer.latent_mean.device
    lengths, channels = prefix_lengths(tokenizer.num_latents), tokenizer.latent_dim
    print("report: principal components, classifier, then the held-out pictures and the probes", flush=True)
    pca = _fit_pca(datamodule, tokenizer.num_latents * channels, seed, device)
    classifier = report_classifier(datamodule, run_dir, seed, device)
    named = (inception_features(inception_weights, device), imagenet_features(imagenet_weights, device))
    meters, skipped = _meters(classifier, lpips_trunk, lpips_weights, named, device)
    held_out, learned, linear = measure(tokenizer, pca, datamodule, lengths, limit, meters, seed)
    probed = 0 if classifier is None else probe_images
    rows = training_rows(datamodule, max(held_out.set.n, probed), seed)
    train = training_pass(tokenizer, pca, datamodule, rows, held_out.set.n, probed, meters.extractors)
    if rank() > 0:
        return {}
    metrics: dict[str, Any] = {
        "num_images": held_out.set.n,
        "prefix_lengths": lengths,
        "floats": {k: k * channels for k in lengths},
        **learned.means(),
        "pca": {**linear.means(), "num_floats": pca.num_floats},
        "latents": _latents(tokenizer, held_out.lines),
        **distances(held_out, learned, linear, train.set, meters.extractors),
    }
    if classifier is not None:
        metrics["classifier"] = read_back(classifier, held_out, learned, linear)
    if classifier is not None and train.lines is not None:
        metrics["linear_probe"] = probe(classifier, train.lines, held_out.lines, lengths)
    reason = _without_retrieval(tokenizer, held_out)
    if reason is not None:
        skipped.append(reason)
    else:
        metrics |= text_metrics(tokenizer, held_out.lines.z, held_out.lines.samples, train.samples, lengths)
    metrics["skipped"] = [vars(item) for item in skipped]
    metrics["cost"] = cost.so_far()
    metrics["provenance"] = provenance(seed, datamodule.data_dir) | {"cost": cost.text()}
    pictures = reconstruction_page.Pictures(held_out.pictures(), learned.pictures(), linear.pictures())
    figures = reconstruction_page.headlines(metrics)
    metrics["figures"] = [vars(figure) for figure in figures]
    written = reconstruction_page.page(metrics, pictures, skipped).write(out_dir, metrics)
    print("\n".join([f"reconstruction report: {written}", *map(str, figures)]), flush=True)
    return metrics


def _meters(
    classifier: Classifier | None,
    lpips_trunk: str,
    lpips_weights: str | None,
    named: Sequence[FeatureExtractor | Skipped],
    device: torch.device,
) -> tuple[Meters, list[Skipped]]:
    """What is measured of every picture here, and what is left out. named: extractors with weights, where there are."""
    skipped: list[Skipped] = []
    meters = Meters({"psnr": psnr, "ssim": ssim}, [classifier or RandomConvFeatures(0).to(device)])
    distance = lpips_metric(lpips_trunk, device, lpips_weights)
    if isinstance(distance, Skipped):
        skipped.append(distance)
    else:
        meters.pair_metrics[f"lpips[{lpips_trunk}]"] = distance
    for found in named:
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            meters.extractors.append(found)
    return meters, skipped


def _without_retrieval(tokenizer: Tokenizer, held_out: HeldOut) -> Skipped | None:
    """Why captions are not looked for, None where they are."""
    if tokenizer.text is None:
        return Skipped("retrieval", "the tokenizer has no text part", "train it with text losses")
    if not all(held_out.samples["captions"]):
        return Skipped("retrieval", "held-out pictures have no captions", "prepare data with captions")
    return None


def _fit_pca(datamodule: PictureData, num_floats: int, seed: int, device: torch.device) -> PCA:
    """PCA of up to 25,000 training pictures, fewer where they are large."""
    picture = datamodule.samples("train", [0])["images"]
    limit = min(PCA_PICTURES, PCA_BYTES // (4 * picture.numel()))
    return PCA.fit(draw_training(datamodule, limit, seed)["images"].to(device), num_floats, seed, overwrite=True)


def _latents(tokenizer: Tokenizer, lines: Lines) -> dict[str, Any]:
    """What each position carries, and the bits of a symbol where the bottleneck makes symbols."""
    latents: dict[str, Any] = {name: values.tolist() for name, values in vars(latent_use(lines.z, lines.std)).items()}
    latents["n"] = len(lines.z)
    capacity = getattr(tokenizer.bottleneck, "bits_per_latent", None)
    if capacity is not None:  # of symbols, which have no noise and so no finite rate
        latents["bits_per_latent"] = capacity
    return latents
