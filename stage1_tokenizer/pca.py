"""Principal components of the training pictures: the linear code that every learned one has to beat.

A code of F floats per picture is the projection on the first F components. It is the best linear code in mean squared
error, it is ordered, and its prefixes are exact, so "PCA at equal floats" is a fair opponent at every prefix length k
of a tokenizer with C channels per latent (F = k C). The floats here are exact; a learned code with noise has less.

The fit is `torch.pca_lowrank` (Halko, Martinsson & Tropp 2011): it needs neither the P x P covariance nor its
eigenvectors, so 12,288 pixels are seconds. With as many directions as pixels or pictures it is exact.

Letters: N pictures, P = 3 H W pixel values, F floats (components), Q = F + oversampling directions.
"""

import torch
from torch import Tensor

OVERSAMPLING = 32
ITERATIONS = 4


class PCA:
    """Mean (P,) and orthonormal components (F, P) of pictures, with the share of variance that each explains (F,)."""

    def __init__(self, mean: Tensor, components: Tensor, explained: Tensor, image_shape: tuple[int, int, int]) -> None:
        self.mean = mean
        self.components = components
        self.explained = explained
        self.image_shape = image_shape

    @property
    def num_floats(self) -> int:
        """The most floats this code can spend: less than asked for if there were too few pictures to fit on."""
        return len(self.components)

    @classmethod
    def fit(cls, images: Tensor, num_floats: int, seed: int = 0) -> "PCA":
        """Fit on pictures (N, 3, H, W); `seed` draws the first directions, the global random state stays as it is."""
        if images.ndim != 4 or len(images) < 2:
            raise ValueError(f"got pictures of shape {tuple(images.shape)}, wanted (N, 3, H, W) with N of 2 or more")
        x = images.flatten(1).float()  # (N, P)
        num_floats = min(num_floats, len(x) - 1, x.shape[1])
        directions = min(num_floats + OVERSAMPLING, *x.shape)
        mean = x.mean(dim=0)
        x = x - mean
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            of_device = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
            of_device.manual_seed(seed)  # torch.manual_seed would seed every GPU
            _, singular, components = torch.pca_lowrank(x, directions, center=False, niter=ITERATIONS)  # (Q,), (P, Q)
        explained = singular.square() / x.double().square().sum().clamp_min(1e-30).float()
        c, h, w = images.shape[1:]
        return cls(mean, components.T[:num_floats].contiguous(), explained[:num_floats], (c, h, w))

    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, F), first component first."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"got pictures of shape {tuple(images.shape[1:])}, wanted {self.image_shape}, as fitted; fit again"
            )
        return (images.flatten(1).float() - self.mean) @ self.components.T

    def decode(self, codes: Tensor) -> Tensor:
        """(N, f) with any f <= F -> (N, 3, H, W), clipped to [-1, 1]."""
        pixels = codes @ self.components[: codes.shape[1]] + self.mean  # (N, P)
        return pixels.clamp(-1, 1).unflatten(1, self.image_shape)

    def reconstruct(self, images: Tensor, num_floats: int) -> Tensor:
        """Pictures through a code of `num_floats` floats (all there are, if fewer): (N, 3, H, W) -> the same."""
        return self.decode(self.encode(images)[:, :num_floats])
