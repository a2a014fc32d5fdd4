"""`python -m tests.benchmarks.bench_codes`: trained continuous and discrete tokenizers side by side, at counted bits.

    python -m tests.benchmarks.bench_codes --data runs/cifar10/data --runs KL runs/kl FSQ runs/fsq VQ runs/vq

Of every run folder its `tokenizer/`, and of its prior what `stage2_prior test` has written to `generation/`. A line is
read as a receiver of so many bits gets it: symbols as they are, a noisy code with its noise drawn; beside it the PSNR
of posterior means, floats that cost more bits than were counted. Pictures are read by the classifier that the first of
the run folders keeps. The bits of a prior: of symbols, -log2 of their probability; of a noisy code what bits-back
coding pays on average, E log2 q(z | picture) - log2 p(z) (Hinton & van Camp 1993), the same unit of both.

Letters: N pictures, K latents, C channels.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.classifier import Classifier, accuracy_by_slot
from stage1_tokenizer.evaluation.classifier_fit import report_classifier
from stage1_tokenizer.evaluation.frechet import frechet_distance
from stage1_tokenizer.evaluation.latent_use import code_bits, received
from stage1_tokenizer.evaluation.picture_set import features_of
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.tokenizer import Tokenizer

BATCH = 250


def nats_of_noise(std: Tensor) -> float:
    """Entropy of normals of standard deviations (N,K,C), in nats a picture; 0 where there is no noise (symbols)."""
    each = 0.5 * math.log(2 * math.pi * math.e) + std.double().clamp_min(1e-12).log()
    return torch.where(std > 0, each, 0.0).sum((1, 2)).mean().item()


def decoded(tokenizer: Tokenizer, z: Tensor) -> Tensor:
    """z (N,K,C) -> pictures (N,3,S,S), batch by batch."""
    return torch.cat([tokenizer.decode(part) for part in z.split(BATCH)])


def generation(run: Path, noise: float) -> dict[str, Any]:
    """Figures of the run's generation report; noise: nats a picture that the posterior's noise is worth."""
    path = run / "generation" / "metrics.json"
    if not path.is_file():
        return {}
    metrics = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = {"seconds": metrics["cost"]["seconds_per_image"]}
    found["evaluations"] = metrics["cost"]["evaluations_per_latent"]
    found["generated"] = metrics["distances"]["generated_real"]
    found["real_real"] = metrics["distances"]["real_real"]
    found["right"] = {scale: of["all"] for scale, of in metrics["faithfulness"].items()}
    if "nats_per_latent" in metrics["nll"]:
        nats = metrics["nll"]["nats_per_latent"] * len(metrics["nll"]["by_position"])
        found["prior_bits"] = (nats - noise) / math.log(2)
    return found


def measured(run: Path, classifier: Classifier, samples: dict[str, Any], real: Tensor) -> dict[str, Any]:
    """Figures of one run folder on held-out `samples`, whose features are `real` (N,D)."""
    tokenizer, images = Tokenizer.from_pretrained(run / "tokenizer"), samples["images"]
    mean, std = tokenizer.posterior(images)
    plain, coded = decoded(tokenizer, mean), decoded(tokenizer, received(tokenizer, images))
    features = features_of(classifier, coded)
    right = accuracy_by_slot(classifier.read(features), classifier.targets(samples), classifier.slots)
    return {
        "bits": code_bits(tokenizer, images)[-1],
        "psnr": psnr(coded, images).mean().item(),
        "psnr_of_means": psnr(plain, images).mean().item(),
        "read": right["all"],
        "frechet": frechet_distance(real, features),
        **generation(run, nats_of_noise(std)),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print one line of JSON per run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_codes", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared directory of the pictures")
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME FOLDER", help="names and run folders")
    parser.add_argument("--held_out", type=int, default=2000)
    options = parser.parse_args(arguments)
    folders = [Path(folder) for folder in options.runs[1::2]]
    size = Tokenizer.from_pretrained(folders[0] / "tokenizer").image_size
    data = ImageDataModule(options.data, image_size=size)
    classifier = report_classifier(data, folders[0])
    if classifier is None:
        parser.error(f"the pictures in {options.data} have neither attributes nor labels to be read")
    with torch.inference_mode():
        samples = data.arrays("val", options.held_out)
        real = features_of(classifier, samples["images"])
        right = accuracy_by_slot(classifier.read(real), classifier.targets(samples), classifier.slots)
        print(json.dumps({"real": right["all"], "features": classifier.feature_name}), flush=True)
        for name, folder in zip(options.runs[::2], folders, strict=True):
            print(json.dumps({"name": name, **measured(folder, classifier, samples, real)}), flush=True)


if __name__ == "__main__":
    main()
