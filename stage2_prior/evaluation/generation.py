"""The generation report: what a prior's pictures and latents are worth, on held-out captions.

Every held-out caption is sampled at each guidance scale and the pictures are read by a classifier that was trained on
real ones. Five questions, five kinds of figures:

* does a picture show what its caption says: every attribute right, by kind of caption, and separately for
  combinations that no training picture has;
* do the pictures look like the data: Frechet distances, precision and recall in named features, each beside the figure
  it may be compared with (`distances`);
* do the latents have the data's spread at every position (the drift meter: a prior whose errors add up drifts along
  the line), data drawn as in training, posterior noise included;
* how likely are held-out lines, and do they tell their captions from others (`likelihood_report`); if the prior also
  reads lines out, how often it is right (`captioning_report`);
* what it costs: evaluations of the head and seconds per picture, decoding included.

Same caption and different seeds must give different pictures: their spread is measured and shown.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from data.reading.order import spread_rows
from stage1_tokenizer.evaluation.attributes import LETTER
from stage1_tokenizer.evaluation.classifier import Classifier
from stage1_tokenizer.evaluation.classifier_fit import report_classifier
from stage1_tokenizer.evaluation.frechet import RandomConvFeatures
from stage1_tokenizer.evaluation.provenance import provenance
from stage1_tokenizer.evaluation.report import Figure, Report
from stage1_tokenizer.precision import matmul_dtype
from stage2_prior.base import LatentSpace, Prior
from stage2_prior.captions import askable
from stage2_prior.evaluation.captioning_report import captioning_report
from stage2_prior.evaluation.distances import distance_report
from stage2_prior.evaluation.likelihood_report import classification_report, likelihood_report
from stage2_prior.guidance import Guidance
from stage2_prior.training.latent_data import CaptionSource, same_samples

FEWEST = 20  # captions in a group that is told apart further


@dataclass
class Samples:
    """Latents and pictures of all captions at one guidance scale, on the CPU, and what they cost."""

    latents: Tensor  # (N,K,C)
    images: Tensor  # (N,3,H,W)
    seconds: float


class GenerationReport:
    """What `test` measures.

    Args:
        guidances: scales to compare; the headline figures are those of `guidance`.
        guidance: the scale of headline figures, of the pictures and of the timing.
        steps: evaluations of the head per latent (None: the head's default).
        num_captions: held-out captions sampled at each scale.
        batch_size: captions per call of `sample`.
        images_dir: image shards that the latents were made from; None: `data/` of the run, or those that are encoded.
        nll_lines: held-out lines whose exact likelihood is integrated; 0 leaves it out.
        classify_lines: of these, lines that are classified by likelihood, each under ten captions; 0 leaves it out.
        seed: of the samples.
    """

    def __init__(
        self,
        guidances: list[float] | None = None,
        guidance: float = 2.0,
        steps: int | None = None,
        num_captions: int = 1000,
        batch_size: int = 250,
        images_dir: str | None = None,
        nll_lines: int = 64,
        classify_lines: int = 16,
        seed: int = 0,
    ) -> None:
        if num_captions < 8 or batch_size < 1:
            raise ValueError(f"got num_captions={num_captions}, batch_size={batch_size}; want at least 8 and 1.")
        if min(nll_lines, classify_lines) < 0:
            raise ValueError(f"got nll_lines={nll_lines}, classify_lines={classify_lines}; want at least 0 (none).")
        self.guidances = sorted({float(w) for w in (*(guidances or [1.0, 1.5, 2.0, 3.0]), guidance, 1.0)})
        self.guidance, self.steps, self.num_captions, self.batch_size = float(guidance), steps, num_captions, batch_size
        self.images_dir, self.nll_lines, self.classify_lines, self.seed = images_dir, nll_lines, classify_lines, seed

    def write(self, prior: Prior, tokenizer: LatentSpace, data: CaptionSource, run_dir: Path) -> Path:
        """Measure, and write run_dir/generation; returns the page's path."""
        # Lightning tests in inference mode, in which the classifier could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            return self.measure(prior.eval(), tokenizer, data, run_dir)

    def measure(self, prior: Prior, tokenizer: LatentSpace, data: CaptionSource, run_dir: Path) -> Path:
        encoded = data.data_dir if isinstance(data, ImageDataModule) else str(run_dir / "data")
        images = ImageDataModule(self.images_dir or encoded, image_size=tokenizer.image_size)
        held = self.held_out(data, tokenizer)
        real = same_samples(data, images, held, self.num_captions)
        total = len(held["keys"])
        (held, captions), (real, _) = askable(prior.words.ask, held), askable(prior.words.ask, real)
        with torch.enable_grad():
            classifier = report_classifier(images, run_dir)
        extractor = RandomConvFeatures() if classifier is None else classifier
        samples = {w: self.sample(prior, tokenizer, captions, w) for w in self.guidances}

        metrics: dict[str, Any] = {"captions": len(captions), "without_caption": total - len(captions)}
        metrics |= {"features": extractor.feature_name, "seed": self.seed}
        metrics["latents"] = self.spread(samples, held)
        parts = held["latents"].to(device_of(prior)).split(self.batch_size)
        recon = torch.cat([tokenizer.decode(z).cpu() for z in parts])

        def features(pictures: Tensor) -> Tensor:
            return torch.cat([extractor.features(part) for part in pictures.split(self.batch_size)])

        pictures = {w: s.images for w, s in samples.items()}
        found = distance_report(features, pictures, recon, real, images, tokenizer, self.seed)
        metrics["distances"] = {"features": extractor.feature_name, **found}
        if classifier is not None:
            groups = caption_groups(classifier, images, real)
            metrics["faithfulness"] = {
                str(w): faithfulness(classifier, s.images, real, groups) for w, s in samples.items()
            }
            metrics["faithfulness"]["real"] = faithfulness(classifier, real["images"], real, groups)
            metrics["faithfulness"]["reconstruction"] = faithfulness(classifier, recon, real, groups)
            metrics["group_sizes"] = {name: int(rows.sum()) for name, rows in groups.items()}
        metrics["cost"] = self.cost(prior, tokenizer, captions)
        metrics["diversity"], same = self.diversity(prior, tokenizer, captions)
        noise = torch.randn(held["latents"].shape, generator=torch.Generator().manual_seed(self.seed))
        z = (held["latents"] + held["latents_std"] * noise).to(device_of(prior))  # as in training
        if self.nll_lines:
            lines = spread_rows(len(z), self.nll_lines)
            metrics["nll"] = likelihood_report(prior, z[lines], [captions[i] for i in lines])
        if self.classify_lines:
            found = classification_report(prior, z, captions, self.classify_lines, held["labels"], self.seed)
            metrics["classification_by_likelihood"] = found
        metrics["captioning"] = captioning_report(prior, z, held["captions"], self.batch_size)
        return self.page(metrics, samples, captions, real, same).write(run_dir / "generation", metrics)

    def held_out(self, data: CaptionSource, tokenizer: LatentSpace) -> dict[str, Any]:
        """`num_captions` samples spread over the val split, with `latents` and `latents_std` (N,K,C)."""
        held = data.arrays("val", self.num_captions)
        if "latents" not in held:
            device = next(iter(tokenizer.state_dict().values())).device  # type: ignore[attr-defined]
            parts = [tokenizer.posterior(x.to(device)) for x in held["images"].split(self.batch_size)]
            held["latents"], held["latents_std"] = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
        return held

    # -- measuring ----------------------------------------------------------------------------------------------------

    def sample(self, prior: Prior, tokenizer: LatentSpace, captions: list[str], guidance: float | Guidance) -> Samples:
        """Latents and pictures of all captions; matrix products in bfloat16 where that is fast."""
        device = device_of(prior)
        generator = torch.Generator(device=device).manual_seed(self.seed)
        dtype = matmul_dtype(device)
        start, latents, pictures = time.perf_counter(), [], []
        for at in range(0, len(captions), self.batch_size):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                z = prior.sample(captions[at : at + self.batch_size], guidance, self.steps, generator=generator)
                pictures.append(tokenizer.decode(z, generator).cpu())
            latents.append(z.cpu())
        return Samples(torch.cat(latents), torch.cat(pictures), time.perf_counter() - start)

    def spread(self, samples: dict[float, Samples], held: dict[str, Any]) -> dict[str, Any]:
        """The drift meter: standard deviation of samples over data by position, and its slope along the line."""
        mean, std = held["latents"], held["latents_std"]
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(self.seed))
        data = (mean + std * noise).var(dim=0).mean(dim=-1)  # (K,)
        out: dict[str, Any] = {}
        for w, s in samples.items():
            ratio = (s.latents.var(dim=0).mean(dim=-1) / data).sqrt()  # (K,)
            at = torch.linspace(-0.5, 0.5, len(ratio))
            out[str(w)] = {
                "std_ratio": ratio.tolist(),
                "lowest": ratio.min().item(),
                "highest": ratio.max().item(),
                "slope_along_line": ((at * ratio).sum() / at.square().sum()).item() if len(ratio) > 1 else 0.0,
                "overall": (s.latents.var(dim=0).mean() / data.mean()).sqrt().item(),
            }
        return out

    def cost(self, prior: Prior, tokenizer: LatentSpace, captions: list[str]) -> dict[str, Any]:
        """Pictures per second of one warm call of `batch_size` captions, guidance on, decoding included."""
        chosen = (captions * (self.batch_size // len(captions) + 1))[: self.batch_size]
        seconds = min(self.sample(prior, tokenizer, chosen, self.guidance).seconds for _ in range(2))
        return {
            "images_per_second": len(chosen) / seconds,
            "seconds_per_image": seconds / len(chosen),
            "batch_size": len(chosen),
            "guidance": self.guidance,
            "evaluations_per_latent": prior.num_evaluations(self.steps),
            "threads": torch.get_num_threads(),
            "device": device_of(prior).type,
        }

    def diversity(self, prior: Prior, tokenizer: LatentSpace, captions: list[str]) -> tuple[dict[str, float], Tensor]:
        """8 pictures of each of 8 captions: how far two seeds are apart, and the pictures (8,8,3,H,W)."""
        chosen = list(dict.fromkeys(captions))[:8]
        drawn = self.sample(prior, tokenizer, [c for c in chosen for _ in range(8)], self.guidance).images
        same = drawn.unflatten(0, (len(chosen), 8))
        apart = (same[:, :1] - same[:, 1:]).square().mean(dim=(2, 3, 4)).sqrt()  # (8,7)
        spread = {
            "pixel_std_within_caption": same.std(dim=1).mean().item(),
            "rms_between_two_seeds": apart.mean().item(),
            "smallest_rms_between_two_seeds": apart.min().item(),
        }
        return spread, same

    # -- the page -----------------------------------------------------------------------------------------------------

    def page(
        self,
        metrics: dict[str, Any],
        samples: dict[float, Samples],
        captions: list[str],
        real: dict[str, Any],
        same: Tensor,
    ) -> Report:
        report = Report("Generation", f"{len(captions)} held-out captions, guidance {self.guidance:g}")
        key, cost, latents = str(self.guidance), metrics["cost"], metrics["latents"]
        distances = metrics["distances"]
        floor = distances.get("same_captions")
        figures = [
            Figure(
                f"Frechet distance [{distances['features']}]",
                f"{distances['generated_real'][key]:.1f}",
                f"real-real {distances['real_real']:.1f}, reconstruction {distances['reconstruction_real']:.1f}"
                f", n = {distances['n']}"
                + (
                    f"; on {floor['n']} captions that training pictures have, too: {floor['generated_real'][key]:.1f}"
                    f" against {floor['reconstruction_real']:.1f} for reconstructions of other pictures and"
                    f" {floor['real_real']:.1f} for real pictures of those captions"
                    if floor
                    else ""
                ),
            ),
            Figure(
                "spread of latents, samples / data",
                f"{latents['1.0']['lowest']:.2f} to {latents['1.0']['highest']:.2f}",
                "lowest and highest position, guidance 1",
            ),
            Figure(
                "pictures per second",
                f"{cost['images_per_second']:.0f}",
                f"{cost['evaluations_per_latent']} evaluations per latent, batch {cost['batch_size']}, decoding too",
            ),
        ]
        if "faithfulness" in metrics:
            ours, best = metrics["faithfulness"][key], metrics["faithfulness"]["real"]
            figures = [Figure(n, f"{v:.3f}", f"real pictures {best[n]:.3f}") for n, v in ours.items()][:4] + figures
        reading = metrics["captioning"]
        if reading:
            chance = f"word for word; of the next line's captions {reading['right_of_the_next_line']:.3f}"
            figures.append(Figure("captions read out right", f"{reading['right']:.3f}", chance))
        report.figures(figures)
        if "faithfulness" in metrics:
            read, sizes = metrics["faithfulness"], metrics["group_sizes"]
            rows = [
                [name, str(sizes.get(name.split(", without")[0], "")), *(f"{v[name]:.3f}" for v in read.values())]
                for name in read["real"]
            ]
            columns = [f"guidance {name}" if name in latents else name for name in read]
            report.table("What the classifier reads right", ["captions of", "number", *columns], rows)
        rows = []
        for name, spread in latents.items():
            precision, recall = distances["precision_recall"][name]
            cells = (precision, recall, spread["overall"], spread["lowest"], spread["highest"])
            drift = f"{spread['slope_along_line']:+.3f}"
            rows.append([name, f"{distances['generated_real'][name]:.1f}", *(f"{c:.3f}" for c in cells), drift])
        columns = ["guidance", "Frechet", "precision", "recall", "std ratio", "lowest", "highest", "drift on the line"]
        report.table("Distribution, by guidance", columns, rows)
        report.table(*distance_table(distances))
        line = list(range(1, len(latents[key]["std_ratio"]) + 1))
        curves = {f"guidance {w}": (line, latents[w]["std_ratio"]) for w in latents}
        report.curve("Spread of latents by position", "position", "std of samples / data", curves)
        nll, told = metrics.get("nll", {}), metrics.get("classification_by_likelihood", {})
        if "by_position" in nll:
            curve = {"held-out lines": (line, nll["by_position"])}
            report.curve("Negative log-likelihood by position", "position", "nats per latent", curve)
        if "accuracy" in told:
            curve = {
                "own caption found": (line, told["accuracy_by_prefix"]),
                "chance": (line, [told["chance"]] * len(line)),
            }
            heading = (
                f"Captions told apart by likelihood: {told['lines']} lines, {told['captions_per_line']} captions each"
            )
            report.curve(heading, "latents", "accuracy", curve)
            knows = {"own caption over others": (line, told["nats_by_position"])}
            report.curve("What each latent knows of its caption", "position", "nats", knows)
        skipped = [["negative log-likelihood", nll], ["classification by likelihood", told]]
        if any("skipped" in part for _, part in skipped):
            rows = [[name, part["skipped"]] for name, part in skipped if "skipped" in part]
            report.table("Left out", ["figure", "why"], rows)
        rows_shown = list(dict.fromkeys(captions))[:10]
        first = [captions.index(c) for c in rows_shown]
        pictures = [real["images"], *(s.images for s in samples.values())]
        report.grid(
            "Captions by guidance",
            ["held-out picture", *(f"guidance {w:g}" for w in samples)],
            [(captions[i], [x[i : i + 1] for x in pictures]) for i in first],
        )
        if reading:
            said = zip(reading["examples"], real["images"].split(1), strict=False)
            rows_read = [(words, [picture]) for words, picture in said]
            report.grid("Captions read out", ["held-out picture"], rows_read)
        seen = list(dict.fromkeys(captions))[: len(same)]
        report.grid("One caption, eight seeds", [""], [(c, [same[i]]) for i, c in enumerate(seen)])
        return report.provenance(provenance(self.seed))


def distance_table(distances: dict[str, Any]) -> tuple[str, list[str], list[list[str]], str]:
    """Heading, columns, rows and note of all Frechet distances to held-out pictures."""
    parts = [(f"all {distances['n']} captions", "paired", distances)]
    if "same_captions" in distances:
        same = distances["same_captions"]
        parts.append((f"{same['n']} captions that training pictures have, too", "other pictures", same))
        if "at_infinity" in same:
            parts.append(("the same, extrapolated to infinite n", "other pictures", same["at_infinity"]))
    guidances = list(distances["generated_real"])
    rows = [
        [name, f"{d['reconstruction_real']:.2f} ({which})", f"{d['real_real']:.2f}"]
        + [f"{d['generated_real'][w]:.2f}" for w in guidances]
        for name, which, d in parts
    ]
    columns = ["pictures of", "reconstructions", "other real pictures", *(f"guidance {w}" for w in guidances)]
    note = (
        "Paired: reconstructions of the held-out pictures themselves, beside real pictures of any caption. Below, both"
        " are of other pictures with the same captions, as generated ones are: only there like is compared with like."
    )
    return "Frechet distances to held-out pictures", columns, rows, note


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def caption_groups(classifier: Classifier, images: ImageDataModule, real: dict[str, Any]) -> dict[str, Tensor]:
    """Rows of the held-out pictures by what they show, each (N,) bool; empty groups are left out.

    A combination is seen if training pictures have all its attributes together, whatever their words: with a word,
    nearly every scene is new. Since more objects make more combinations, and are harder, seen and unseen ones are also
    told apart among pictures of equally many objects, where there are enough of both.
    """
    n = len(real["keys"])
    groups = {"all": torch.ones(n, dtype=torch.bool)}
    if all(real["attributes"]):
        objects = torch.tensor([len(a["objects"]) for a in real["attributes"]])
        groups |= {f"{int(k)} object{'s' if k > 1 else ''}": objects == k for k in objects.unique()}
        kept = torch.tensor([not name.startswith(LETTER) for name in classifier.slots.names])
        trained = classifier.slots.targets(images.arrays("train")["attributes"])[:, kept]
        combinations = {tuple(row) for row in trained.tolist()}
        seen = torch.tensor([tuple(row) in combinations for row in classifier.targets(real)[:, kept].tolist()])
        both = {"seen combination": seen, "unseen combination": ~seen}
        counts = {name: rows for name, rows in groups.items() if name != "all"}
        groups |= both
        for name, rows in counts.items():
            parts = {f"{name}, {which}": rows & those for which, those in both.items()}
            if all(int(part.sum()) >= FEWEST for part in parts.values()):
                groups |= parts
    return {name: rows for name, rows in groups.items() if bool(rows.any())}


def faithfulness(
    classifier: Classifier, images: Tensor, real: dict[str, Any], groups: dict[str, Tensor]
) -> dict[str, float]:
    """Share of pictures in which everything is read right, by group; also without shapes, words (if any), or both."""
    predictions = torch.cat([classifier.predict(part) for part in images.split(250)])
    right = predictions == classifier.targets(real)  # (N,S)
    slots = classifier.slots.names
    out = {name: right[rows].all(dim=1).float().mean().item() for name, rows in groups.items()}
    shapes = torch.tensor([name.endswith(".shape") for name in slots])
    words = torch.tensor([name.startswith(LETTER) for name in slots])
    left_out = {"shapes": shapes} if shapes.any() else {}
    if words.any():
        left_out |= {"words": words, "shapes and words": shapes | words}
    for what, hidden in left_out.items():
        rest = right[:, ~hidden].all(dim=1).float()
        out |= {f"{name}, without {what}": rest[rows].mean().item() for name, rows in groups.items()}
    return out
