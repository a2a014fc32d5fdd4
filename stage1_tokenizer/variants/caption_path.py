"""A linear path whose first latents also begin with what captions name, as a frozen classifier sees it.

What principal components are to pixels, canonical components are to captions: of all linear readings of a classifier's
features the ones that correlate most with which words a picture's captions have (Hotelling 1936; on pictures and words
Hardoon et al. 2004). Some thousand pictures teach a network few words in an hour; the closed form needs no steps. It
fills a few channels of the first latents that principal components leave free. Pixels pay for it: what these channels
held moves back in the line. How much of a caption so few channels hold has not been measured yet (LOG, 2026-11-27).

Letters: B batch, K latents, C latent channels, D features, V words, F channels kept free.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from stage1_tokenizer.encoder import Trunk
from stage1_tokenizer.linear_path import LinearPath
from stage1_tokenizer.text.vocabulary import byte_pair_ids

WORDS = 2000  # of the captions, the most frequent ones
RIDGE_FEATURES, RIDGE_WORDS = 1.0, 3.0  # on the diagonals of both covariances, as shares of their mean


class CaptionPath(LinearPath):
    """`LinearPath` with canonical components of features and captions in the last channels of the first latents.

    Args:
        features: frozen trunk whose patches, averaged, are the features; a `TimmTrunk` with an ImageNet classifier.
        free: channels that hold canonical components, of each latent from the first on; the best component first.
        image_size, num_latents, latent_dim: as `LinearPath`.
    Raises ValueError for more latents or channels than there are, or a trunk that is trained.
    """

    def __init__(
        self,
        features: Trunk,
        free: tuple[int, ...] = (0, 2, 2, 2, 4, 4),
        image_size: int = 32,
        num_latents: int = 16,
        latent_dim: int = 16,
    ):
        super().__init__(image_size, num_latents, latent_dim)
        if len(free) > num_latents or not all(0 <= n <= latent_dim for n in free):
            raise ValueError(
                f"got free {tuple(free)}, wanted at most {num_latents} numbers of channels from 0 to {latent_dim}."
            )
        if any(parameter.requires_grad for parameter in features.parameters()):
            raise ValueError("the features of a CaptionPath are trained, wanted a frozen trunk; set frozen: true.")
        canonical = [i * latent_dim + c for i, n in enumerate(free) for c in range(latent_dim - n, latent_dim)]
        self.features, self.free = features, tuple(free)
        self.slots = torch.tensor(sorted(set(range(num_latents * latent_dim)) - set(canonical)), dtype=torch.long)
        self.register_buffer("canonical", torch.tensor(canonical, dtype=torch.long), persistent=False)
        self.canonical: Tensor
        self.register_buffer("words", torch.zeros(len(canonical), features.width))
        self.register_buffer("words_mean", torch.zeros(features.width))
        self.words: Tensor
        self.words_mean: Tensor

    def fit(self, images: Tensor, captions: Sequence[Sequence[str]] = ()) -> None:
        """Principal components of the images, and canonical ones of their features and captions.

        Raises ValueError where there are no captions.
        """
        super().fit(images)
        if not any(captions):
            raise ValueError("got pictures without captions for a CaptionPath; use a LinearPath, or prepare captions.")
        device = self.words.device
        features = torch.cat([self.pooled(part.to(device)) for part in images.split(64)])
        weights = canonical_components(features.cpu(), word_weights(captions), len(self.canonical))  # (F,D)
        self.words_mean.copy_(features.mean(0))
        self.words.copy_(weights)

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) -> features (B,D)."""
        return self.features(images.float()).float().mean(1)

    def encode(self, images: Tensor, k: int) -> Tensor:
        x = super().encode(images, k).flatten(1)  # (B,kC)
        within = self.canonical[: sum(self.free[:k])]
        with torch.autocast(images.device.type, enabled=False):
            components = (self.pooled(images) - self.words_mean) @ self.words[: len(within)].T
        return x.index_copy(1, within, components).unflatten(1, (k, self.latent_dim))  # (B,k,C)


def word_weights(captions: Sequence[Sequence[str]]) -> Tensor:
    """Captions of N pictures -> (N,V): the share of its captions that has a word, times log(N / pictures with it)."""
    bags = [Counter(token for caption in texts for token in set(byte_pair_ids(caption))) for texts in captions]
    pictures = Counter(token for bag in bags for token in bag)
    column = {token: i for i, (token, _) in enumerate(pictures.most_common(WORDS))}
    weights = torch.zeros(len(bags), len(column))
    for row, (bag, texts) in enumerate(zip(bags, captions, strict=True)):
        for token in bag.keys() & column.keys():
            weights[row, column[token]] = bag[token] / len(texts) * math.log(len(bags) / pictures[token])
    return weights


def canonical_components(x: Tensor, y: Tensor, n: int) -> Tensor:
    """The n linear readings of x (N,D) that correlate most with any of y (N,V): (n,D), of unit variance; zeros beyond.

    Regularised canonical correlation: singular vectors of Lx^-1 Cxy Ly^-T, with L L^T the covariances plus a ridge.
    """
    scale = x.std(0).clamp_min(1e-6).double()
    x, y = (x - x.mean(0)).double() / scale, (y - y.mean(0)).double()
    roots = []
    for part, ridge in ((x, RIDGE_FEATURES), (y, RIDGE_WORDS)):
        covariance = part.T @ part / len(part)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(1e-12))
        roots.append(torch.linalg.cholesky(covariance))
    cross = torch.linalg.solve_triangular(roots[0], x.T @ y / len(x), upper=False)  # (D,V)
    cross = torch.linalg.solve_triangular(roots[1], cross.T, upper=False)  # (V,D)
    directions = torch.linalg.svd(cross, full_matrices=False).Vh[:n]  # (<=n,D)
    weights = torch.linalg.solve_triangular(roots[0].T, directions.T, upper=True).T  # (<=n,D)
    weights = weights / (x @ weights.T).std(0).clamp_min(1e-6)[:, None] / scale
    return torch.nn.functional.pad(weights, (0, 0, 0, n - len(weights))).float()
