"""Nearest real pictures: copies are told from new pictures, and names are those of the nearest."""

import torch
from torch import Tensor

from stage1_tokenizer.evaluation.frechet import Moments
from stage2_prior.evaluation.lengths import Lengths, length_report
from stage2_prior.evaluation.neighbours import Bank, Neighbours, shortest

D = 24


class Pixels:
    """The first pixels as features."""

    feature_name = "pixels"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :D]


def features(pictures: Tensor) -> Tensor:
    return Pixels().features(pictures)


def pictures(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def setting() -> tuple[Bank, Tensor, Tensor]:
    """300 training pictures and 60 held-out ones of the same distribution; the name is the number of the picture."""
    train, held = pictures(300, 0), pictures(60, 1)
    names = [f"t{i}" for i in range(300)] + [f"v{i}" for i in range(60)]
    numbers = [*range(300), *range(60)]
    return Bank(features(torch.cat([train, held])), names, torch.arange(360) < 300, numbers), train, held


def shares(drawn: Tensor, seen: Tensor) -> tuple[float, float, float]:
    """Nearer to training, recognised of held-out captions, recognised of training captions."""
    bank, found = setting()[0], []
    for kind, each in (("v", drawn), ("t", seen)):
        counts = Neighbours(bank)
        for rows in torch.arange(len(each)).split(25):
            counts.add(features(each[rows]), [f"{kind}{i}" for i in rows.tolist()], counts.n)
        found.append(counts)
    return found[0].nearer / found[0].n, found[0].recognised / found[0].n, found[1].recognised / found[1].n


def test_new_pictures_are_as_far_from_training_as_held_out_ones() -> None:
    nearer, recognised, recognised_seen = shares(pictures(60, 2), pictures(60, 3))
    assert 0.3 < nearer < 0.7 and recognised < 0.2 and recognised_seen < 0.2


def test_copies_are_seen_and_recognised() -> None:
    _, train, held = setting()
    assert shares(train[:60] + 0.01 * pictures(60, 4), train[:60]) == (1.0, 0.0, 1.0)
    nearer, recognised, recognised_seen = shares(held + 0.01 * pictures(60, 5), train[:60].roll(1, 0))
    assert recognised == 1.0 and recognised_seen == 0.0
    assert 0.3 < nearer < 0.7, "what the caption asks for is no copy of training"


def test_the_nearest_training_picture_of_those_that_are_shown_is_remembered() -> None:
    bank, train, _ = setting()
    counts = Neighbours(bank, [2, 40])
    for part in train[5:65].split(25):
        counts.add(features(part), [""] * len(part), counts.n)
    assert counts.nearest == {2: 7, 40: 45}
    assert shortest(["a long one", "short", "also1"]) == "short" and shortest([]) == ""


def test_lengths_are_compared_on_the_same_samples() -> None:
    """A space whose latents after the first two are noise: the least distance is at two."""

    class Space:
        latent_dim, num_latents = 6, 4

        def state_dict(self) -> dict[str, Tensor]:
            return {"x": torch.zeros(1)}

        def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.nn.functional.pad(z.flatten(1), (0, 48 - z.shape[1] * 6)).view(-1, 3, 4, 4)

    real = torch.nn.functional.pad(torch.randn(300, 12), (0, 36)).view(-1, 3, 4, 4)
    bank = Bank(features(real), ["a"] * 300, torch.arange(300) < 150, list(range(300)))
    lengths = Lengths(Pixels(), bank, Space(), 4)  # type: ignore[arg-type]
    for part in torch.randn(200, 4, 6).split(33):
        lengths.add(part, ["a"] * len(part))
    reference = Moments()
    reference.add(features(real)[150:])
    report = length_report({"1.0": lengths}, reference)
    assert list(report["distance"]["1.0"]) == [1, 2, 4] and report["best"] == {"1.0": 2}
    assert report["recognised"]["1.0"] == {1: 1.0, 2: 1.0, 4: 1.0}
