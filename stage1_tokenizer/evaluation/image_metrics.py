"""Numbers about pictures and latents, each a pure function of tensors.

Pictures are (N, 3, H, W) in [-1, 1], so the peak-to-peak range is 2 and every formula below says so once, through
PEAK. Picture metrics return one value per image: the caller averages, and so "the mean PSNR" is the mean over images
of each image's PSNR, not the PSNR of the mean error (which rewards a model that is very good on a few).

Metrics that need downloaded weights are built by a function that returns either the metric or a `Skipped` with the
reason and the way to fix it: a report lists what it left out, and never downloads.

Letters: N images, K latents, C channels of a latent, E width of an embedding, Q queries, M candidates.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer.lpips_network import LPIPS_TRUNKS, lpips_network, trunk_file

PEAK = 2.0  # pictures span [-1, 1]
SSIM_WINDOW = 11
ACTIVE_VARIANCE = 0.01  # Burda et al. 2015, section 4.2: a unit whose posterior mean varies more than this is in use


@dataclass(frozen=True)
class Skipped:
    """A metric that was left out: why, and what would bring it back."""

    name: str
    reason: str
    how_to_fix: str


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            f"got pictures of shape {tuple(images.shape)} against {tuple(reference.shape)}, wanted two equal "
            "(N, 3, H, W); decode to the size of the reference first"
        )


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image: (N, 3, H, W) twice, in [-1, 1] -> (N,).

    10 log10(4 / mean squared error). Identical pictures give 100 dB rather than infinity, so that a mean survives one.
    """
    _check_pair(images, reference)
    squared_error = (images.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / squared_error.clamp_min(PEAK**2 * 1e-10))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), one value per image: (N, 3, H, W) twice, in [-1, 1] -> (N,).

    Gaussian window of 11 pixels, sigma 1.5, per channel, averaged over the places where the whole window is inside the
    picture, as in the paper; sides of at least 11 pixels. The window is applied as two banded matrices, 20 times
    faster on a CPU than the depthwise convolution of torchmetrics, whose mean also counts a mirrored border. Always in
    float32: a variance is a small difference of large means, and bfloat16 leaves nothing of it.
    """
    _check_pair(images, reference)
    h, w = images.shape[-2:]
    if min(h, w) < SSIM_WINDOW:
        raise ValueError(f"got {h} x {w} pictures, wanted sides of {SSIM_WINDOW} or more for SSIM")
    x, y = images.float(), reference.float()
    rows, columns = _gaussian_band(h, x.device), _gaussian_band(w, x.device).T  # (H - 10, H), (W, W - 10)
    with torch.autocast(x.device.type, enabled=False):
        means = (rows @ part @ columns for part in (x, y, x * x, y * y, x * y))
        mu_x, mu_y, xx, yy, xy = means  # (N, 3, H - 10, W - 10)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x.square() + mu_y.square() + c1)
    structure = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x.square() + yy - mu_y.square() + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


@functools.lru_cache(maxsize=32)
def _gaussian_band(size: int, device: torch.device) -> Tensor:
    """Matrix (size - 10, size) that averages each run of 11 neighbours with Gaussian weights, sigma 1.5.

    Kept by size and device: a copy to a GPU in every step of a loss would make the step wait for it.
    """
    with torch.inference_mode(False):  # a report may be the first to ask, and a loss needs it for its gradient
        offset = torch.arange(size)[None] - torch.arange(size - SSIM_WINDOW + 1)[:, None]
        weights = torch.exp(-(((offset - SSIM_WINDOW // 2) / 1.5) ** 2) / 2)
        weights = weights * ((offset >= 0) & (offset < SSIM_WINDOW))
        return (weights / weights.sum(dim=1, keepdim=True)).to(device)


PairMetric = Callable[[Tensor, Tensor], Tensor]  # (images, reference), both (N, 3, H, W) -> (N,)


def lpips_metric(
    trunk: str = "alex", device: torch.device | str = "cpu", weights: str | Path | None = None
) -> PairMetric | Skipped:
    """LPIPS (Zhang et al. 2018) as a function (images, reference) -> (N,), or `Skipped` where its trunk is not found.

    The `lpips` package brings the linear heads and no trunk: its weights are torchvision's, read from the file
    `weights`, or from torch's cache without one. Fetching them is a choice of the user's, not of a report's.
    """
    if trunk not in LPIPS_TRUNKS:
        raise ValueError(f"got LPIPS trunk {trunk!r}, wanted one of {', '.join(LPIPS_TRUNKS)}")
    name, file = f"lpips[{trunk}]", LPIPS_TRUNKS[trunk]
    path = trunk_file(trunk, weights)
    if not path.is_file():
        if weights is not None:
            return Skipped(name, f"there is no file at {path}", f"give lpips_weights the path of torchvision's {file}")
        return Skipped(
            name,
            f"the weights of its trunk are not at {file} in torch's cache",
            f"put torchvision's {file} into $TORCH_HOME/hub/checkpoints, or give its path as lpips_weights",
        )
    network = lpips_network(trunk, path).to(device)

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        _check_pair(images, reference)
        return network(images.float(), reference.float()).flatten()

    return distance


@dataclass(frozen=True)
class Retrieval:
    """How well queries find their candidates, beside what guessing at random would give."""

    recall: dict[int, float]  # R -> share of queries with a hit among the first R candidates, in [0, 1]
    chance: dict[int, float]
    bits: float  # what a query tells about its caption, at least (below)
    most_bits: float  # what there is to tell: the entropy of the captions
    num_queries: int
    num_candidates: int


def retrieval(
    queries: Tensor,
    candidates: Tensor,
    query_captions: Sequence[str],
    candidate_captions: Sequence[str],
    ranks: Sequence[int] = (1, 5),
) -> Retrieval:
    """Recall at R of captions by pictures: queries (Q, E) or (Q, P, E), candidates (M, E), all unit vectors.

    Of a query's P vectors the best one counts (`similarities`). A query with a similarity that is not finite finds
    nothing and tells nothing.

    A candidate is a hit if its words equal the query's caption: different pictures may share a caption word by word,
    and then either copy is right. Copies take one rank together. Ties in similarity count against the query (a constant
    embedding scores like the worst order, not like the best). Chance is exact for R of the M candidates drawn at
    random, copies among them: 1 - C(M - h, R) / C(M, R) for a query with h hits.

    `bits` is the likelihood of the captions: with p = softmax(similarity / T) over the candidates, the mean over
    queries of log2 of p(hits) against the share of hits, a lower bound of the mutual information (van den Oord et al.
    2018, equation 9). The one temperature T is the best of a grid; T = infinity is on it, so bits are not negative.
    """
    if len(query_captions) != len(queries) or len(candidate_captions) != len(candidates):
        raise ValueError(
            f"got {len(query_captions)} and {len(candidate_captions)} captions for {len(queries)} queries and "
            f"{len(candidates)} candidates, wanted one caption for each"
        )
    ids = {caption: index for index, caption in enumerate(dict.fromkeys(candidate_captions))}
    candidate_ids = torch.tensor([ids[caption] for caption in candidate_captions])
    query_ids = torch.tensor([ids.get(caption, -1) for caption in query_captions])
    hits = query_ids[:, None] == candidate_ids[None]  # (Q, M)
    similarity = similarities(queries.float().cpu(), candidates.float().cpu())  # (Q, M)
    finite = similarity.isfinite().all(dim=1)  # (Q,)
    similarity = similarity.where(finite[:, None], 0.0)  # NaN >= NaN is false: nothing would be ahead of the right one
    best_hit = similarity.masked_fill(~hits, -math.inf).amax(dim=1, keepdim=True)
    captions = similarity.new_full((len(queries), len(ids)), -math.inf)  # (Q, D) of the D different captions
    captions = captions.scatter_reduce(1, candidate_ids.expand(len(queries), -1), similarity, "amax")
    ahead = (captions >= best_hit).sum(dim=1) - 1  # (Q,) wrong captions that come first; - 1 is the right one itself
    ahead = ahead.masked_fill(~finite | ~hits.any(dim=1), 2**31)  # never found, however many are looked at
    recall = {rank: (ahead < rank).float().mean().item() for rank in ranks}
    chance = _chance(hits.sum(dim=1), len(candidates), ranks)
    return Retrieval(recall, chance, *_information(similarity, hits), len(queries), len(candidates))


def similarities(pictures: Tensor, texts: Tensor) -> Tensor:
    """Scalar products (N, M) of pictures (N, E) and texts (M, E); of P vectors per picture, (N, P, E), the largest."""
    vectors = (pictures,) if pictures.ndim == 2 else pictures.unbind(dim=1)  # P of (N, E)
    return functools.reduce(torch.maximum, (each @ texts.T for each in vectors))


def _information(similarity: Tensor, hits: Tensor) -> tuple[float, float]:
    """Bits that queries tell about their captions at the best temperature, and the bits there are; (Q, M) both.

    Queries without a hit tell nothing that could be counted here and are left out.
    """
    found = hits.any(dim=1)
    if not found.any():
        return 0.0, 0.0
    similarity, hits = similarity[found].double(), hits[found]
    prior = hits.double().mean(dim=1).log2()  # (Q,)
    best = 0.0
    for scale in torch.logspace(-1, 2.5, 36).tolist():  # 1 / T
        log_p = (scale * similarity).log_softmax(dim=1)
        told = log_p.masked_fill(~hits, -math.inf).logsumexp(dim=1) / math.log(2) - prior
        best = max(best, told.mean().item())
    return best, -prior.mean().item()


def _chance(hits_per_query: Tensor, num_candidates: int, ranks: Sequence[int]) -> dict[int, float]:
    """Mean over queries of the chance to draw at least one hit in R draws without replacement."""
    chance = {}
    for rank in ranks:
        miss = torch.ones(len(hits_per_query), dtype=torch.float64)
        for drawn in range(min(rank, num_candidates)):
            miss *= ((num_candidates - hits_per_query - drawn).clamp_min(0) / (num_candidates - drawn)).double()
        chance[rank] = 1 - miss.mean().item()
    return chance


@dataclass(frozen=True)
class LatentUse:
    """What each latent position carries; every tensor is (K,)."""

    active_units: Tensor  # channels whose posterior mean varies over pictures, 0..C
    mean_variance: Tensor  # variance of the posterior mean, mean over channels; 1 = all variance is signal
    rate_bits: Tensor  # mean KL(q(z|x) || N(0, 1)) summed over channels, in bits; inf for a deterministic code


def latent_use(mean: Tensor, std: Tensor) -> LatentUse:
    """Use of each latent position from standardised posteriors: mean and std (N, K, C) of N pictures.

    Standardised means that posterior samples have mean 0 and variance 1 over the pictures, so the KL to N(0, 1) is the
    rate of a code whose receiver knows only those two moments: an upper bound of the information in the position.
    """
    if mean.shape != std.shape or mean.ndim != 3:
        raise ValueError(f"got mean {tuple(mean.shape)} and std {tuple(std.shape)}, wanted two equal (N, K, C)")
    mean, std = mean.double().cpu(), std.double().cpu()
    variance = mean.var(dim=0, correction=0)  # (K, C)
    kl = 0.5 * (mean.square() + std.square() - 1) - std.log()  # (N, K, C); inf where std = 0
    return LatentUse(
        active_units=(variance > ACTIVE_VARIANCE).sum(dim=1),
        mean_variance=variance.mean(dim=1),
        rate_bits=kl.mean(dim=0).sum(dim=1) / math.log(2),
    )
