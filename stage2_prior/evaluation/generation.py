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

Same caption and different seeds must give different pictures: their spread is measured and shown. Pictures go by in
batches and none is kept that is not shown (`generation_pass`): beyond 10,000 only numbers are kept of a caption; the
report says how much memory and time it took. The page is made by `generation_page`.

Letters: N captions, M of them in the sample, K latents, C latent channels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from data.reading.order import spread_rows
from stage1_tokenizer.evaluation.classifier import Classifier
from stage1_tokenizer.evaluation.classifier_fit import report_classifier
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, RandomConvFeatures, imagenet_features
from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.evaluation.inception import InceptionFeatures, inception_features, read_reference
from stage1_tokenizer.evaluation.judge import load_judge
from stage1_tokenizer.evaluation.picture_data import draw_training
from stage1_tokenizer.evaluation.picture_set import features_of
from stage1_tokenizer.evaluation.provenance import Cost, provenance
from stage1_tokenizer.text.ranks import rank
from stage2_prior.base import Prior
from stage2_prior.captions import askable
from stage2_prior.evaluation.captioning_report import EXAMPLES, captioning_report
from stage2_prior.evaluation.distances import Twins, distance_report
from stage2_prior.evaluation.faithfulness import faithfulness_report
from stage2_prior.evaluation.generation_pass import (
    Drawn,
    Originals,
    Training,
    diversity,
    draw,
    neighbour_figures,
    originals,
    scores,
)
from stage2_prior.evaluation.held_out import HeldOut, HeldOutData, Lines
from stage2_prior.evaluation.lengths import length_report, worthwhile
from stage2_prior.evaluation.likelihood_report import classification_report, likelihood_report
from stage2_prior.evaluation.neighbours import Bank, shortest
from stage2_prior.evaluation.sampling import Sampler, device_of, spread
from stage2_prior.latent_space import LatentSpace

SHOWN = 10  # captions in the grids
SEEN = 250  # captions of training pictures
JUDGED = 2000  # pictures among which the judge looks for a caption, at most


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
        inception_weights: path of torch-fidelity's weights (`unspool[inception]`): FID, sFID, Inception score.
        reference: of these scores, `.npz` statistics as ADM's evaluation has them or a folder of pictures; None: the
            held-out pictures of the captions.
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
        inception_weights: str | None = None,
        reference: str | None = None,
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
        if reference is not None and inception_weights is None:
            raise ValueError("got a reference and no inception_weights, whose features it has; set inception_weights.")
        self.imagenet_weights, self.judge = imagenet_weights, judge
        self.inception_weights, self.reference = inception_weights, reference
        self.sample = Sampler(steps, batch_size, seed)

    def write(self, prior: Prior, tokenizer: LatentSpace, data: HeldOutData, run_dir: Path) -> Path:
        """Measure, and write run_dir/generation; returns the page's path."""
        # Lightning tests in inference mode, in which the classifier could not be trained.
        with torch.inference_mode(False), torch.no_grad():
            return self.measure(prior.eval(), tokenizer, data, run_dir)

    def measure(self, prior: Prior, tokenizer: LatentSpace, data: HeldOutData, run_dir: Path) -> Path:
        """As `write`, with a prior in eval mode and without gradients."""
        judge = None if self.judge is None else load_judge(self.judge)  # a wrong folder is said before the sampling
        cost, device, size = Cost(), device_of(prior), self.batch_size
        held = HeldOut.of(data, prior.words.ask, self.num_captions, size)
        images = ImageDataModule(self.images_dir or self.pictures_of(data, run_dir), image_size=tokenizer.image_size)
        with torch.enable_grad():
            classifier = report_classifier(images, run_dir, device=device)
        extractors, skipped = self.extractors(classifier, device)
        inception = next((x for x in extractors if isinstance(x, InceptionFeatures)), None)
        reference = read_reference(self.reference, inception) if self.reference and inception else None
        name, shown = extractors[-1].feature_name, self.shown(held)
        first = originals(held, data, images, tokenizer, extractors, shown, prior.num_latents, size)
        training = Training.of(images, extractors, len(held.rows), self.seed, size, device)
        bank = training.bank(name, held, first.real)
        drawn = {
            str(w): draw(self.sample, prior, tokenizer, held, w, bank, extractors, shown, w in (1.0, self.guidance))
            for w in self.guidances
        }
        if rank() > 0:
            return run_dir / "generation" / "report.html"  # which the first rank writes
        seen = self.seen(prior, tokenizer, extractors[-1], bank, images, len(held.rows))
        metrics = self.figures(extractors, first, training, drawn, images, tokenizer)
        z = first.lines.drawn(self.seed)
        metrics |= {
            "captions": len(held.asked),
            "without_caption": held.total - len(held.asked),
            "latents": {w: spread(each.latents, z) for w, each in drawn.items()},
            "skipped": [vars(item) for item in skipped],
            "neighbours": neighbour_figures(drawn, *seen, name),
        }
        by_length = {w: each.lengths for w, each in drawn.items() if each.lengths is not None}
        metrics["lengths"] = {"features": name, **length_report(by_length, first.real.moments[name])}
        best = worthwhile(metrics["lengths"]["distance"][str(self.guidance)])
        prior.best_length = best if prior.stops_early else None
        sets = {w: each.pictures for w, each in drawn.items()} | {"real": first.real, "reconstruction": first.recon}
        if inception is not None:
            metrics[f"scores[{inception.feature_name}]"] = scores(first.real, drawn, reference)
        if judge is not None and all(item.name != "judge" for item in skipped):
            rows = spread_rows(len(first.lines.asked), JUDGED)
            read = {key: pictures.rows(name)[rows] for key, pictures in sets.items()}
            metrics["judge"] = judge.verdicts(read, [first.lines.asked[i] for i in rows])
        if classifier is not None:
            read = {key: pictures.readings(classifier.feature_name) for key, pictures in sets.items()}
            metrics |= faithfulness_report(classifier, read, images, held.samples)
        metrics["cost"] = self.cost(prior, tokenizer, held.asked)
        metrics["diversity"], same = diversity(self.sample, prior, tokenizer, held.asked, self.guidance)
        metrics |= self.likelihoods(prior, z.to(device), first.lines)
        metrics["report_cost"] = cost.so_far()
        metrics["provenance"] = provenance(self.seed, images.data_dir) | {"cost": cost.text()}
        return self.write_page(metrics, held, first, drawn, bank, images, same, run_dir)

    def pictures_of(self, data: HeldOutData, run_dir: Path) -> str:
        """Where the pictures of the held-out samples lie: those that are encoded, or `data/` of the run."""
        return str(run_dir / "data") if "latents" in data.samples("val", [0]) else data.data_dir

    def extractors(
        self, classifier: Classifier | None, device: torch.device
    ) -> tuple[list[FeatureExtractor], list[Skipped]]:
        """The report's own features, Inception's and ImageNet's where they are named; and what is left out."""
        inception, imagenet = (
            inception_features(self.inception_weights, device),
            imagenet_features(self.imagenet_weights, device),
        )
        found = [classifier or RandomConvFeatures().to(device), inception, imagenet]
        skipped = [x for x in (imagenet, inception) if isinstance(x, Skipped)]
        if self.judge is not None and isinstance(imagenet, Skipped):
            skipped.append(Skipped("judge", imagenet.reason, imagenet.how_to_fix))
        return [x for x in found if not isinstance(x, Skipped)], skipped

    def shown(self, held: HeldOut) -> list[int]:
        """Numbers of the samples that the page shows: of ten different captions, and the first of the sample."""
        different = list(dict.fromkeys(held.asked))[:SHOWN]
        return sorted({*(held.asked.index(caption) for caption in different), *held.sample[:EXAMPLES]})

    def figures(
        self,
        extractors: list[FeatureExtractor],
        first: Originals,
        training: Training,
        drawn: dict[str, Drawn],
        images: ImageDataModule,
        tokenizer: LatentSpace,
    ) -> dict[str, Any]:
        """Distances in every extractor's features; those of the report's own under `distances`."""
        generated = {w: each.pictures for w, each in drawn.items()}
        twins = Twins.of(images, first.lines.samples["captions"], tokenizer, extractors, self.batch_size)
        own = extractors[0].feature_name
        metrics: dict[str, Any] = {"features": own, "seed": self.seed}
        for extractor in extractors:
            name = extractor.feature_name
            others = training.first(name, first.real.n)
            report = distance_report(name, first.real, first.recon, generated, others, twins, self.seed)
            metrics["distances" if name == own else f"distances[{name}]"] = {"features": name} | report
        return metrics

    def seen(
        self,
        prior: Prior,
        tokenizer: LatentSpace,
        extractor: FeatureExtractor,
        bank: Bank,
        images: ImageDataModule,
        n: int,
    ) -> tuple[dict[str, int], int]:
        """Pictures of n captions of training pictures (at most 250) that are recognised, by guidance, and how many."""
        train, captions = askable(prior.words.ask, draw_training(images, min(n, SEEN), self.seed))
        names = [shortest(captions) for captions in train["captions"]]
        counts = {}
        for w in self.guidances:
            pictures = self.sample(prior, tokenizer, captions, w).images.to(device_of(prior))
            counts[str(w)] = bank.recognised(features_of(extractor, pictures), names)
        return counts, len(names)

    def write_page(
        self,
        metrics: dict[str, Any],
        held: HeldOut,
        first: Originals,
        drawn: dict[str, Drawn],
        bank: Bank,
        images: ImageDataModule,
        same: Tensor,
        run_dir: Path,
    ) -> Path:
        """Write the page and metrics.json; same: pictures (n,seeds,3,H,W) of the first captions."""
        from stage2_prior.evaluation.generation_page import Pictures, headlines, page  # plotting: only this command

        rows = [held.asked.index(caption) for caption in list(dict.fromkeys(held.asked))[:SHOWN]]
        last = list(drawn.values())[-1]
        nearest = images.samples("train", [bank.numbers[last.neighbours.nearest[i]] for i in rows])["images"]
        pictures = Pictures(
            captions=[held.asked[i] for i in rows],
            real=torch.stack([first.real.pictures[i] for i in rows]),
            generated={w: torch.stack([each.pictures.pictures[i] for i in rows]) for w, each in drawn.items()},
            same=same,
            nearest=nearest,
            read_out=torch.stack([first.real.pictures[i] for i in held.sample[:EXAMPLES]]),
        )
        figures = headlines(metrics, str(self.guidance))
        metrics["figures"] = [vars(figure) for figure in figures]
        written = page(metrics, pictures, str(self.guidance)).write(run_dir / "generation", metrics)
        print("\n".join([f"generation report: {written}", *map(str, figures)]), flush=True)
        return written

    def likelihoods(self, prior: Prior, z: Tensor, lines: Lines) -> dict[str, Any]:
        """What the prior makes of held-out lines z (M,K,C): `nll`, `classification_by_likelihood`, `captioning`."""
        metrics: dict[str, Any] = {}
        if self.nll_lines:
            rows = spread_rows(len(z), self.nll_lines)
            metrics["nll"] = likelihood_report(prior, z[rows], [lines.asked[i] for i in rows])
        if self.classify_lines:
            metrics["classification_by_likelihood"] = classification_report(
                prior, z, lines.asked, self.classify_lines, lines.samples["labels"], self.seed
            )
        metrics["captioning"] = captioning_report(prior, z, lines.samples["captions"], self.batch_size)
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
