"""The generation report: what a prior's pictures and latents are worth, on held-out captions.

Every held-out caption is sampled at each guidance scale and the pictures are read by a classifier that was trained on
real ones. Six questions, six kinds of figures:

* does a picture show what its caption asks for (`faithfulness`; of photographs, what an independent judge finds);
* do the pictures look like the data: Frechet distances, precision and recall in named features, each beside the figure
  it may be compared with (`distances`);
* do the latents have the data's spread at every position (the drift meter: a prior whose errors add up drifts along
  the line), data drawn as in training, posterior noise included;
* how likely are held-out lines, and do they distinguish their captions from others (`likelihood_report`); if the prior
  also reads lines out, how often it is right (`captioning_report`);
* is a picture what its caption names or a copy (`neighbours`), and how many latents are best drawn (`lengths`), which
  is recorded as the prior's `best_length`;
* what it costs: evaluations of the head and seconds per picture, decoding included.

Same caption and different seeds must give different pictures: their spread is measured and shown. The page is made by
`generation_page`. Letters: N captions, K latents, C latent channels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from data.reading.order import spread_rows
from stage1_tokenizer.evaluation.classifier_fit import report_classifier
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, RandomConvFeatures, imagenet_features
from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.evaluation.judge import load_judge
from stage1_tokenizer.evaluation.picture_data import draw_training
from stage1_tokenizer.evaluation.provenance import provenance
from stage2_prior.base import Prior
from stage2_prior.captions import askable
from stage2_prior.evaluation.captioning_report import captioning_report
from stage2_prior.evaluation.distances import Features, distance_report, features_of
from stage2_prior.evaluation.faithfulness import faithfulness_report
from stage2_prior.evaluation.held_out import HeldOutData, held_out_latents, same_samples
from stage2_prior.evaluation.lengths import length_report, worthwhile
from stage2_prior.evaluation.likelihood_report import classification_report, likelihood_report
from stage2_prior.evaluation.neighbours import Bank, neighbour_report, shortest
from stage2_prior.evaluation.sampling import Sampler, decode_all, device_of
from stage2_prior.latent_space import LatentSpace

SEEN = 250  # captions of training pictures
SEEDS = 8  # pictures of one caption, and captions of which so many are drawn


class GenerationReport:
    """What `test` measures.

    Args:
        guidances: scales to compare; the headline figures are those of `guidance`.
        guidance: the scale of headline figures, of the pictures and of the timing.
        steps: evaluations of the head per latent (None: the head's default).
        num_captions: held-out captions sampled at each scale.
        batch_size: captions per call of `sample`.
        images_dir: image shards that the latents were made from; None: `data/` of the run, or those that are encoded.
        imagenet_weights: path of EfficientNet-Lite0's weights, or "installed" (`unspool[features]`): distances in its
            features too, and nearest real pictures, which are in the report's own features without.
        judge: folder of a judge of captions (`python -m stage1_tokenizer judge`), which needs these features.
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
        imagenet_weights: str | None = None,
        judge: str | None = None,
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
        if judge is not None and imagenet_weights is None:
            raise ValueError("got a judge and no imagenet_weights, whose features it reads; set it to installed.")
        self.imagenet_weights, self.judge = imagenet_weights, judge
        self.sample = Sampler(steps, batch_size, seed)

    def write(self, prior: Prior, tokenizer: LatentSpace, data: HeldOutData, run_dir: Path) -> Path:
        """Measure, and write run_dir/generation; returns the page's path."""
        # Lightning tests in inference mode, in which the classifier could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            return self.measure(prior.eval(), tokenizer, data, run_dir)

    def measure(self, prior: Prior, tokenizer: LatentSpace, data: HeldOutData, run_dir: Path) -> Path:
        """As `write`, with a prior in eval mode and without gradients."""
        from stage2_prior.evaluation.generation_page import Pictures, headlines, page  # plotting: only this command

        held = held_out_latents(data, tokenizer, self.num_captions, self.batch_size)
        encoded = data.data_dir if "images" in held else str(run_dir / "data")
        images = ImageDataModule(self.images_dir or encoded, image_size=tokenizer.image_size)
        real = same_samples(data, images, held, self.num_captions)
        total = len(held["keys"])
        (held, captions), (real, _) = askable(prior.words.ask, held), askable(prior.words.ask, real)
        with torch.enable_grad():
            classifier = report_classifier(images, run_dir)
        extractor: FeatureExtractor = classifier or RandomConvFeatures()
        imagenet = imagenet_features(self.imagenet_weights, device_of(prior))
        extractors = [extractor] if isinstance(imagenet, Skipped) else [extractor, imagenet]
        features = {x.feature_name: features_of(x, self.batch_size) for x in extractors}
        samples = {w: self.sample(prior, tokenizer, captions, w) for w in self.guidances}
        recon = decode_all(tokenizer, held["latents"], self.batch_size)
        mean, std = (held[name][:, : prior.num_latents] for name in ("latents", "latents_std"))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(self.seed))
        z = mean + std * noise  # as in training
        generated = {str(w): s.images for w, s in samples.items()}
        distances = {
            name: {"features": name} | distance_report(extract, generated, recon, real, images, tokenizer, self.seed)
            for name, extract in features.items()
        }
        metrics: dict[str, Any] = {
            "captions": len(captions),
            "without_caption": total - len(captions),
            "features": extractor.feature_name,
            "seed": self.seed,
            "latents": {str(w): spread(s.latents, z) for w, s in samples.items()},
            "distances": distances.pop(extractor.feature_name),
            **{f"distances[{name}]": entry for name, entry in distances.items()},
            "skipped": self.left_out(imagenet),
        }
        name, extract = list(features.items())[-1]
        bank = Bank.of(extract, images, real, self.seed)
        copies, nearest = self.neighbours(prior, tokenizer, extract, bank, generated, images, real)
        metrics["neighbours"] = {"features": name, **copies}
        drawn = {str(w): samples[w].latents for w in sorted({1.0, self.guidance})}
        asked = [shortest(captions) for captions in real["captions"]]
        lengths = length_report(extract, bank, asked, tokenizer, drawn, self.batch_size)
        metrics["lengths"] = {"features": name, **lengths}
        prior.best_length = worthwhile(lengths["distance"][str(self.guidance)]) if prior.stops_early else None
        by_name = {**generated, "real": real["images"], "reconstruction": recon}
        if classifier is not None:
            metrics |= faithfulness_report(classifier, by_name, images, real)
        if self.judge is not None and not isinstance(imagenet, Skipped):
            read = features[imagenet.feature_name]
            metrics["judge"] = load_judge(self.judge).verdicts({n: read(x).cpu() for n, x in by_name.items()}, captions)
        metrics["cost"] = self.cost(prior, tokenizer, captions)
        metrics["diversity"], same = self.diversity(prior, tokenizer, captions)
        metrics |= self.likelihoods(prior, z.to(device_of(prior)), captions, held)
        metrics["provenance"] = provenance(self.seed, images.data_dir)
        pictures = Pictures(captions, real["images"], generated, same, nearest)
        figures = headlines(metrics, str(self.guidance))
        metrics["figures"] = [vars(figure) for figure in figures]
        written = page(metrics, pictures, str(self.guidance)).write(run_dir / "generation", metrics)
        print("\n".join([f"generation report: {written}", *map(str, figures)]), flush=True)
        return written

    def left_out(self, imagenet: FeatureExtractor | Skipped) -> list[dict[str, str]]:
        """What there is no report of without ImageNet's features."""
        if not isinstance(imagenet, Skipped):
            return []
        asked = [] if self.judge is None else [Skipped("judge", imagenet.reason, imagenet.how_to_fix)]
        return [vars(item) for item in (imagenet, *asked)]

    def neighbours(
        self,
        prior: Prior,
        tokenizer: LatentSpace,
        features: Features,
        bank: Bank,
        generated: dict[str, Tensor],
        images: ImageDataModule,
        real: dict[str, Any],
    ) -> tuple[dict[str, Any], Tensor]:
        """`neighbour_report`, with pictures drawn for as many captions of training pictures, at most 250."""
        train = draw_training(images, min(len(real["images"]), SEEN), self.seed)
        train, captions = askable(prior.words.ask, train)
        seen = {str(w): self.sample(prior, tokenizer, captions, w).images for w in self.guidances}
        names = [shortest(captions) for captions in train["captions"]]
        return neighbour_report(features, bank, generated, real, (seen, names))

    def likelihoods(self, prior: Prior, z: Tensor, captions: list[str], held: dict[str, Any]) -> dict[str, Any]:
        """What the prior makes of held-out lines z (N,K,C): `nll`, `classification_by_likelihood`, `captioning`."""
        metrics: dict[str, Any] = {}
        if self.nll_lines:
            lines = spread_rows(len(z), self.nll_lines)
            metrics["nll"] = likelihood_report(prior, z[lines], [captions[i] for i in lines])
        if self.classify_lines:
            metrics["classification_by_likelihood"] = classification_report(
                prior, z, captions, self.classify_lines, held["labels"], self.seed
            )
        metrics["captioning"] = captioning_report(prior, z, held["captions"], self.batch_size)
        return metrics

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
        chosen = list(dict.fromkeys(captions))[:SEEDS]
        drawn = self.sample(prior, tokenizer, [c for c in chosen for _ in range(SEEDS)], self.guidance).images
        same = drawn.unflatten(0, (len(chosen), SEEDS))
        apart = (same[:, :1] - same[:, 1:]).square().mean(dim=(2, 3, 4)).sqrt()  # (8,7)
        figures = {
            "pixel_std_within_caption": same.std(dim=1).mean().item(),
            "rms_between_two_seeds": apart.mean().item(),
            "smallest_rms_between_two_seeds": apart.min().item(),
        }
        return figures, same


def spread(samples: Tensor, data: Tensor) -> dict[str, Any]:
    """The drift meter: standard deviation of samples over data, both (N,K,C), by position, and its slope.

    slope_along_line: of the ratio, from the first position to the last; 0 where no error adds up.
    """
    ours, wanted = samples.var(dim=0).mean(dim=-1), data.var(dim=0).mean(dim=-1)  # (K,)
    ratio = (ours / wanted).sqrt()
    at = torch.linspace(-0.5, 0.5, len(ratio))
    return {
        "std_ratio": ratio.tolist(),
        "lowest": ratio.min().item(),
        "highest": ratio.max().item(),
        "slope_along_line": ((at * ratio).sum() / at.square().sum()).item() if len(ratio) > 1 else 0.0,
        "overall": (ours.mean() / wanted.mean()).sqrt().item(),
    }
