"""FID, sFID and Inception score against closed forms, with a small random network in the place of Inception."""

import math
import pickle
import sys
import tomllib
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stage1_tokenizer.evaluation.frechet import Moments, frechet_distance
from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.evaluation.inception import (
    InceptionFeatures,
    InceptionScore,
    StatisticsError,
    field_scores,
    inception_features,
    read_reference,
)
from stage1_tokenizer.evaluation.picture_set import PictureSet
from stage1_tokenizer.similarity import WeightsError
from tests.tiny import SmallInception

POOLED, CLASSES = 6, 10


@pytest.fixture
def inception() -> InceptionFeatures:
    return InceptionFeatures(SmallInception(), "cpu")


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def statistics(widths: tuple[int, ...], shift: float = 0.0, scale: float = 1.0) -> dict[str, Any]:
    """Gaussians of known moments: mean `shift` everywhere, covariance `scale` squared times the identity."""
    mean = {"mu": np.full(widths[0], shift), "mu_s": np.full(widths[1], shift)}
    return mean | {"sigma": scale**2 * np.eye(widths[0]), "sigma_s": scale**2 * np.eye(widths[1])}


def test_statistics_of_two_gaussians_are_at_their_known_distance(tmp_path: Path, inception: InceptionFeatures) -> None:
    shift, scale = 3.0, 2.0
    np.savez(tmp_path / "a.npz", **statistics(inception.widths))
    np.savez_compressed(tmp_path / "b.npz", **statistics(inception.widths, shift, scale), arr_0=np.zeros(3))
    a, b = (read_reference(tmp_path / name, inception) for name in ("a.npz", "b.npz"))
    assert a.spatial is not None and b.spatial is not None
    for one, two, width in ((a.pooled, b.pooled, POOLED), (a.spatial, b.spatial, 7 * 16)):
        assert frechet_distance(one, two) == pytest.approx(width * (shift**2 + (scale - 1) ** 2), rel=1e-9)


def test_spatial_features_are_the_first_channels_place_by_place(inception: InceptionFeatures) -> None:
    images = pictures(2)
    rounded = ((images + 1) * 127.5).round() / 127.5 - 1
    maps = inception.network.get_submodule("Mixed_6d.branch1x1")(rounded)  # (2, 9, 4, 4)
    spatial = inception.all_features(images)[1].unflatten(1, (4, 4, 7))
    torch.testing.assert_close(spatial[1, 2, 3], maps[1, :7, 2, 3])


def test_scores_of_pictures_are_those_of_their_features(tmp_path: Path, inception: InceptionFeatures) -> None:
    """Whatever the batches; the reference from a folder of the pictures and from a file of their statistics alike."""
    drawn, real = pictures(60, 1), pictures(40, 2)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(((real + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "real" / f"{i}.png")
    pooled, spatial, logits = inception.all_features(drawn)
    wanted, wanted_spatial, _ = inception.all_features(real)
    held: dict[str, Any] = {"mu": wanted.mean(0), "sigma": wanted.T.cov(), "mu_s": wanted_spatial.mean(0)}
    held["sigma_s"] = wanted_spatial.T.cov()
    np.savez(tmp_path / "real.npz", **held)
    p = logits.double().softmax(1)
    score = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    for path in ("real", "real.npz"):
        reference = read_reference(tmp_path / path, inception)
        for batch in (7, 60):
            fakes = PictureSet([inception])
            for part in drawn.split(batch):
                fakes.add(part)
            found = field_scores(fakes.inception, reference)
            assert found["n"] == 60
            assert found["fid"] == pytest.approx(frechet_distance(pooled, wanted), rel=1e-3)
            assert found["sfid"] == pytest.approx(frechet_distance(spatial, wanted_spatial), rel=1e-3)
            assert found["inception_score"] == pytest.approx(score, rel=1e-6)


def test_inception_score_of_known_softmaxes() -> None:
    sure = 100 * torch.eye(CLASSES).repeat(3, 1)  # every class as often, without a doubt
    for logits, wanted in ((sure, CLASSES), (torch.zeros(30, CLASSES), 1.0), (sure[:1].repeat(30, 1), 1.0)):
        score = InceptionScore()
        for part in logits.split(7):
            score.add(part, 0)
        assert score.value() == pytest.approx(wanted)
    half = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])  # (3/4, 1/4) and (1/4, 3/4): KL to the mean
    score = InceptionScore()
    score.add(half, 0)
    assert math.log(score.value()) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_inception_score_is_the_mean_over_parts_and_merges() -> None:
    logits = torch.randn(23, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
    whole = InceptionScore(10)
    whole.add(logits, 0)
    values = []
    for part in logits.split(10):
        alone = InceptionScore()
        alone.add(part, 0)
        values.append(alone.value())
    assert whole.value() == pytest.approx(sum(values) / 3) and len(set(values)) == 3
    ranks = [InceptionScore(10), InceptionScore(10)]
    for number, part in enumerate(logits.split(3)):  # batches of two ranks in turns
        ranks[number % 2].add(part, 3 * number)
    ranks[0].merge(ranks[1])
    assert ranks[0].value() == pytest.approx(whole.value())


def test_statistics_of_another_kind_are_refused_in_one_sentence(tmp_path: Path, inception: InceptionFeatures) -> None:
    good, file = statistics(inception.widths), tmp_path / "statistics.npz"
    cases: list[tuple[dict[str, Any], str]] = [
        ({**good, "mu": np.zeros(POOLED + 1)}, r"mu is float64 of shape \(7,\), wanted floats of shape \(6,\)"),
        ({**good, "sigma": np.eye(POOLED, dtype=complex)}, "sigma is complex"),
        ({**good, "sigma": np.array([None])}, "sigma is object"),
        ({**good, "sigma_s": np.full((112, 112), np.nan)}, "not finite"),
        ({**good, "sigma": np.triu(np.ones((POOLED, POOLED)))}, "no covariance"),
        ({"mu": good["mu"]}, "one of mu and sigma alone"),
        ({"mu_s": good["mu_s"], "sigma_s": good["sigma_s"]}, "has no mu and sigma"),
    ]
    for content, sentence in cases:
        np.savez(file, **content)
        with pytest.raises(StatisticsError, match=sentence) as error:
            read_reference(file, inception)
        assert "\n" not in str(error.value)
    header = np.lib.format.magic(1, 0) + (118).to_bytes(2, "little")
    header += b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,)}".ljust(117) + b"\n"
    with zipfile.ZipFile(file, "w") as archive:  # a header that states 800 GB
        archive.writestr("mu.npy", header)
        archive.writestr("sigma.npy", header)
    with pytest.raises(StatisticsError, match="shape"):
        read_reference(file, inception)
    np.savez(file, **good)
    file.write_bytes(file.read_bytes()[:-200])
    for wrong in (file, tmp_path / "nowhere"):
        with pytest.raises(StatisticsError, match="no folder and no readable"):
            read_reference(wrong, inception)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StatisticsError, match="found 0 pictures"):
        read_reference(tmp_path / "empty", inception)


def test_a_file_without_spatial_statistics_leaves_sfid_out(tmp_path: Path, inception: InceptionFeatures) -> None:
    good = statistics(inception.widths)
    np.savez(tmp_path / "statistics.npz", mu=good["mu"], sigma=good["sigma"])
    fakes = PictureSet([inception])
    fakes.add(pictures(20))
    found = field_scores(fakes.inception, read_reference(tmp_path / "statistics.npz", inception))
    assert "fid" in found and "sfid" not in found


def test_moments_that_are_given_are_those_of_the_features() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    given = Moments.given(x.mean(0), x.T.cov())
    assert frechet_distance(given, x) == pytest.approx(0, abs=1e-9)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_missing_weights_are_skipped_by_name(tmp_path: Path) -> None:
    for weights in (None, tmp_path / "missing.pth"):
        result = inception_features(weights)
        assert isinstance(result, Skipped) and "inception" in result.name and result.how_to_fix


def test_the_extra_that_brings_inception_is_one_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    result = inception_features(tmp_path / "weights.pth")
    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    extra = next(name for name, needs in project["optional-dependencies"].items() if "torch-fidelity" in needs[0])
    assert isinstance(result, Skipped) and f"unspool[{extra}]" in result.how_to_fix


class Marks:
    """Unpickled, it leaves a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_weights_are_plain_tensors_of_that_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(FeatureExtractorInceptionV3=SmallInception)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(feature_extractor_inceptionv3=module))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    file, mark = tmp_path / "weights.pth", tmp_path / "mark"
    torch.save(SmallInception().state_dict(), file)
    assert isinstance(inception_features(file), InceptionFeatures)
    for content, sentence in ((OrderedDict(a=torch.zeros(1)), "another network"), (Marks(mark), "plain tensors")):
        torch.save(content, file)
        with pytest.raises(WeightsError, match=sentence) as error:
            inception_features(file)
        assert "\n" not in str(error.value)
    file.write_bytes(pickle.dumps(Marks(mark)))
    with pytest.raises(WeightsError, match="plain tensors"):
        inception_features(file)
    assert not mark.exists()
