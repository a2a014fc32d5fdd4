"""Nearest real pictures: copies are told from new pictures, and names are those of the nearest."""

from typing import Any

import torch
from torch import Tensor

from stage2_prior.evaluation.lengths import length_report
from stage2_prior.evaluation.neighbours import Bank, neighbour_report, shortest

D = 24


def features(pictures: Tensor) -> Tensor:
    return pictures.flatten(1)[:, :D]


def pictures(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def setting() -> tuple[Bank, dict[str, Any], Tensor]:
    """300 training pictures and 60 held-out ones of the same distribution; the name is the number of the picture."""
    train, held = pictures(300, 0), pictures(60, 1)
    names = [f"t{i}" for i in range(300)] + [f"v{i}" for i in range(60)]
    everything = torch.cat([train, held])
    bank = Bank(torch.nn.functional.normalize(features(everything), dim=1), names, torch.arange(360) < 300, everything)
    return bank, {"captions": [[f"v{i}", f"v{i}, at length"] for i in range(60)], "images": held}, train


def report(drawn: Tensor, seen: Tensor) -> dict[str, Any]:
    bank, real, _ = setting()
    names = [f"t{i}" for i in range(len(seen))]
    return neighbour_report(features, bank, {"1.0": drawn}, real, ({"1.0": seen}, names))[0]


def test_new_pictures_are_as_far_from_training_as_held_out_ones() -> None:
    new = report(pictures(60, 2), pictures(60, 3))
    assert 0.3 < new["nearer_to_training"]["1.0"] < 0.7
    assert new["recognised"]["1.0"] < 0.2 and new["recognised_seen"]["1.0"] < 0.2


def test_copies_are_seen_and_recognised() -> None:
    _, real, train = setting()
    copies = report(train[:60] + 0.01 * pictures(60, 4), train[:60])
    assert copies["nearer_to_training"]["1.0"] == 1.0
    assert copies["recognised_seen"]["1.0"] == 1.0 and copies["recognised"]["1.0"] == 0.0
    right = report(real["images"] + 0.01 * pictures(60, 5), train[:60].roll(1, 0))
    assert right["recognised"]["1.0"] == 1.0 and right["recognised_seen"]["1.0"] == 0.0
    assert 0.3 < right["nearer_to_training"]["1.0"] < 0.7, "what the caption asks for is no copy of training"


def test_the_nearest_training_picture_is_shown() -> None:
    bank, real, train = setting()
    nearest = neighbour_report(features, bank, {"1.0": train[5:65]}, real, ({"1.0": train[:3]}, ["t0", "t1", "t2"]))[1]
    assert torch.equal(nearest, train[5:65])
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
    bank = Bank(features(real), ["a"] * 300, torch.arange(300) < 150, real)
    z = torch.randn(200, 4, 6)
    report = length_report(features, bank, ["a"] * 200, Space(), {"1.0": z})  # type: ignore[arg-type]
    assert list(report["distance"]["1.0"]) == [1, 2, 4] and report["best"] == {"1.0": 2}
    assert report["recognised"]["1.0"] == {1: 1.0, 2: 1.0, 4: 1.0}
