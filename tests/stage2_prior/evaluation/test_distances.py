"""Frechet distances of the generation report: what is compared with what, and the extrapolation in n."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.evaluation.frechet import frechet_distance
from stage1_tokenizer.evaluation.picture_set import PictureSet
from stage2_prior.evaluation import distances
from stage2_prior.evaluation.distances import Twins, distance_report, frechet_at_infinity

D = 16


def normal(n: int, seed: int, shift: float = 0.0) -> Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return x + shift / D**0.5


def test_extrapolation_takes_the_bias_of_a_finite_n_away() -> None:
    """Sets of one law have distance 0, shifted ones that of the shift; both look larger by c / n."""
    same = [(normal(600, 2 * i), normal(600, 2 * i + 1)) for i in range(4)]
    plain = sum(frechet_distance(a, b) for a, b in same) / 4
    extrapolated = sum(frechet_at_infinity(a, b, i) for i, (a, b) in enumerate(same)) / 4
    assert plain > 0.2 and abs(extrapolated) < 0.3 * plain
    content = 5 * normal(600, 20)  # what the captions say: rows of both sets share it
    a, b = content + normal(600, 21), content + normal(600, 22)
    assert abs(frechet_at_infinity(a, b)) < 0.5 * frechet_distance(a, b)
    a, b = normal(600, 11), normal(600, 12, shift=2.0)
    assert abs(frechet_at_infinity(a, b) - 4.0) < 0.5


class Pictures:
    """120 training pictures, whose captions are numbers; the pixel says which picture."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.train = torch.rand(120, 3, 2, 2, generator=generator)

    def captions(self, split: str) -> list[list[str]]:
        return [[str(i % 40)] for i in range(120)]

    def split(self, split: str) -> Tensor:
        return self.train

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]:
        return {"images": self.train[rows]}


class Pixels:
    """Pixels as features."""

    feature_name = "pixels"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def set_of(images: Tensor) -> PictureSet:
    pictures = PictureSet([Pixels()], range(len(images)))
    for part in images.split(13):
        pictures.add(part)
    return pictures


class Blur(torch.nn.Module):
    """A tokenizer that loses what `keep` says."""

    def __init__(self, keep: float):
        super().__init__()
        self.register_buffer("keep", torch.tensor(keep))
        self.keep: Tensor

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images * self.keep, torch.zeros_like(images)

    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return z


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_same_captions_compare_like_with_like(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer that loses nothing, reconstructions of other pictures are at the distance of those pictures."""
    monkeypatch.setattr(distances, "MANY", 10)
    pictures, held = Pictures(), torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    captions = [[str(i)] for i in range(60)]  # 40 to 59 are of no training picture
    generated = {"2.0": set_of(pictures.train[:60])}  # a perfect sampler: another real picture of each caption
    twins = Twins.of(pictures, captions, Blur(keep), [Pixels()], 16)  # type: ignore[arg-type]
    others = pictures.train.flatten(1)[:60]
    report = distance_report("pixels", set_of(held), set_of(held * keep), generated, others, twins)
    same = report["same_captions"]
    assert report["n"] == 60 and same["n"] == 40
    if keep == 1:
        assert report["reconstruction_real"] < 1e-6 < 0.01 < same["reconstruction_real"] == same["real_real"]
    else:
        assert same["reconstruction_real"] > 2 * same["real_real"]
    assert same["generated_real"]["2.0"] == pytest.approx(same["real_real"])  # the twins are these pictures
    assert same["generated_over_reconstruction"]["2.0"] == pytest.approx(
        same["real_real"] / same["reconstruction_real"]
    )
    assert abs(same["at_infinity"]["real_real"]) < same["real_real"]
