"""Scores in the features of the Inception network that published figures use: FID, sFID, Inception score.

    inception = inception_features("pt_inception-2015-12-05-6726825d.pth")
    reference = read_reference("VIRTUAL_imagenet256_labeled.npz", inception)
    pictures = PictureSet([inception]); pictures.add(images); field_scores(pictures.inception, reference)

The network and its weights are torch-fidelity's (`unspool[inception]`), the weights from a path that the user gives.
A reference is a file of statistics as the evaluation of ADM has them (Dhariwal & Nichol 2021): `.npz` with mu, sigma
and, for sFID, mu_s, sigma_s; or a folder of pictures.

* FID: Frechet distance of the 2,048 pooled features (Heusel et al. 2017).
* sFID: of the first 7 channels of the first branch of Mixed_6d, 17 x 17 places, row by row, channels last: 2,023
  features that know where things are (Nash et al. 2021).
* Inception score: exp E KL(p(y | x) || p(y)), p by the logits without bias (Salimans et al. 2016); the mean over parts
  of 5,000 pictures, as they come.

Letters: N pictures, D features.
"""

import itertools
import statistics
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.pictures.decode import SOURCE_FORMATS, decode
from stage1_tokenizer.evaluation.frechet import Moments, frechet_distance
from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.similarity import WeightsError

SPATIAL_CHANNELS = 7
PART = 5000  # pictures of one part of the Inception score
WEIGHTS = "torch-fidelity's pt_inception-2015-12-05-6726825d.pth"
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class StatisticsError(ValueError):
    """A reference that is none, or that is one of other features."""


class InceptionFeatures:
    """Features of FID's network. network: uint8 pictures (N, 3, H, W) -> pooled features (N, D), logits without bias.

    It has a `Mixed_6d.branch1x1`, whose maps are the spatial features.
    """

    feature_name = "inception-v3-compat"

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self.network, self.device = network.to(device).eval(), torch.device(device)
        self._maps: list[Tensor] = []
        branch = network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda module, inputs, maps: self._maps.append(maps[:, :SPATIAL_CHANNELS]))
        blank = torch.zeros(1, 3, 32, 32, device=self.device)
        self.widths = tuple(x.shape[1] for x in self.all_features(blank))

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> pooled features (N, D); the network resizes to 299 pixels itself."""
        return self.all_features(images)[0]

    @torch.inference_mode()
    def all_features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] -> pooled (N, 2048), spatial (N, 2023) and logits (N, 1008)."""
        self._maps.clear()
        pooled, logits = self.network(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        spatial = self._maps.pop().permute(0, 2, 3, 1).flatten(1)
        return pooled.float(), spatial.float(), logits.float()


def inception_features(weights: str | Path | None, device: torch.device | str = "cpu") -> InceptionFeatures | Skipped:
    """Inception features from `weights` (torch-fidelity's file), or why not.

    Raises WeightsError for a file that is there and holds no plain tensors or another network.
    """
    name = f"frechet[{InceptionFeatures.feature_name}]"
    if weights is None or not Path(weights).is_file():
        reason = "no weights file was named" if weights is None else f"there is no file at {weights}"
        return Skipped(name, reason, f"give inception_weights the path of {WEIGHTS}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return Skipped(name, "torch-fidelity is not installed", "pip install 'unspool[inception]'")
    try:  # before torch-fidelity reads the file, which would unpickle it
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on what is no checkpoint; all mean the same here
        raise WeightsError(f"{weights} cannot be read as plain tensors; give {WEIGHTS}") from error
    try:
        network = FeatureExtractorInceptionV3(
            InceptionFeatures.feature_name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
    except (RuntimeError, TypeError) as error:  # of load_state_dict
        raise WeightsError(f"{weights} holds another network than FID's Inception; give {WEIGHTS}") from error
    return InceptionFeatures(network, device)


class InceptionScore:
    """exp E KL(p(y | x) || p(y)) of logits that come in batches: sums of each part of `part` pictures."""

    def __init__(self, part: int = PART) -> None:
        self.part = part
        self.sums: dict[int, tuple[int, Tensor, Tensor]] = {}  # part -> n, sums of p (D,) and of E log p(y | x)

    def add(self, logits: Tensor, at: int) -> None:
        """Take in logits (B, D). at: number of the first."""
        log_p = logits.double().cpu().log_softmax(1)
        for place, own in itertools.groupby(range(len(log_p)), key=lambda i: (at + i) // self.part):
            now = log_p[list(own)]
            self._take(place, len(now), now.exp().sum(0), (now.exp() * now).sum())

    def _take(self, place: int, n: int, p: Tensor, entropy: Tensor) -> None:
        before = self.sums.get(place, (0, 0.0, 0.0))
        self.sums[place] = (before[0] + n, before[1] + p, before[2] + entropy)

    def merge(self, other: "InceptionScore") -> None:
        """Take in what `other` has taken in."""
        for place, sums in other.sums.items():
            self._take(place, *sums)

    def value(self) -> float:
        """The mean over the parts; 1 where all pictures are read alike, D at most."""
        means = [(p / n, entropy / n) for n, p, entropy in self.sums.values()]
        return statistics.fmean((entropy - torch.special.xlogy(p, p).sum()).exp().item() for p, entropy in means)


class InceptionSums:
    """What is kept of pictures in Inception's features."""

    def __init__(self) -> None:
        self.pooled, self.spatial, self.score = Moments(), Moments(), InceptionScore()

    def add(self, pooled: Tensor, spatial: Tensor, logits: Tensor, at: int) -> None:
        """Take in features (B, D) of three kinds. at: number of the first."""
        self.pooled.add(pooled)
        self.spatial.add(spatial)
        self.score.add(logits, at)

    def merge(self, other: "InceptionSums") -> None:
        """Take in what `other` has taken in."""
        self.pooled.merge(other.pooled)
        self.spatial.merge(other.spatial)
        self.score.merge(other.score)


@dataclass(frozen=True)
class Reference:
    """Statistics of real pictures. spatial: None where a file has none."""

    name: str
    pooled: Moments
    spatial: Moments | None


def field_scores(sums: InceptionSums, reference: Reference) -> dict[str, Any]:
    """FID, sFID (where the reference has spatial statistics) and Inception score of two pictures or more."""
    scores = {"n": sums.pooled.n, "reference": reference.name, "inception_score": sums.score.value()}
    scores["fid"] = frechet_distance(sums.pooled, reference.pooled)
    if reference.spatial is not None:
        scores["sfid"] = frechet_distance(sums.spatial, reference.spatial)
    return scores


def read_reference(path: str | Path, inception: InceptionFeatures) -> Reference:
    """A reference from an `.npz` of statistics or a folder of pictures (each at its own size).

    Raises StatisticsError where it is neither, or statistics of other features.
    """
    path = Path(path)
    if path.is_dir():
        sums = InceptionSums()
        for images in pictures_of(path):
            sums.add(*inception.all_features(images.to(inception.device)), at=0)  # its own score is not asked for
        if sums.pooled.n < 2:
            raise StatisticsError(f"found {sums.pooled.n} pictures in {path}, wanted 2 or more; name another folder")
        return Reference(str(path), sums.pooled, sums.spatial)
    try:
        with zipfile.ZipFile(path) as archive:
            pooled = _gaussian(archive, "mu", "sigma", inception.widths[0])
            spatial = _gaussian(archive, "mu_s", "sigma_s", inception.widths[1])
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise StatisticsError(
            f"{path} is no folder and no readable .npz; give statistics as ADM's evaluation has them"
        ) from error
    except ValueError as error:
        raise StatisticsError(f"{path}: {error}; give statistics of {WEIGHTS} as ADM's evaluation has them") from error
    if pooled is None:
        raise StatisticsError(f"{path} has no mu and sigma; give statistics as ADM's evaluation has them")
    return Reference(path.name, pooled, spatial)


def _gaussian(archive: zipfile.ZipFile, mean: str, covariance: str, width: int) -> Moments | None:
    """Two members of an archive; None where both are missing. Raises ValueError for others than (D,) and (D, D)."""
    held = [f"{name}.npy" in archive.namelist() for name in (mean, covariance)]
    if not any(held):
        return None
    if not all(held):
        raise ValueError(f"it has one of {mean} and {covariance} alone")
    mu, sigma = _member(archive, mean, (width,)), _member(archive, covariance, (width, width))
    if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6) or (sigma.diagonal() < 0).any():
        raise ValueError(f"{covariance} is no covariance")
    return Moments.given(mu, (sigma + sigma.T) / 2)


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> Tensor:
    """One array of finite numbers of this shape; its header is looked at before anything is allocated."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, _, dtype = read(member)
        if found != shape or dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} is {dtype} of shape {found}, wanted floats of shape {shape}")
    with archive.open(f"{name}.npy") as member:
        values = torch.from_numpy(np.lib.format.read_array(member, allow_pickle=False)).double()
    if not values.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
    return values


def pictures_of(folder: Path, most: int = 32) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) in [-1, 1] of a folder's pictures, by name; those of one size that follow each other."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
    arrays = (np.array(decode(file.read_bytes(), SOURCE_FORMATS)) for file in files)
    for _, group in itertools.groupby(arrays, key=lambda x: x.shape):
        batch: list[Tensor] = []
        for array in group:
            batch.append(torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1)
            if len(batch) == most:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)
