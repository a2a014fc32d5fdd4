"""Principal components of the training pictures: the linear code that every learned one has to beat.

A code of F floats per picture is the projection on the first F components. It is the best linear code in mean squared
error, it is ordered, and its prefixes are exact, so "PCA at equal floats" is a fair opponent at every prefix length k
of a tokenizer with C channels per latent (F = k C). The floats here are exact; a learned code with noise has less.

The fit is `torch.pca_lowrank` (Halko, Martinsson & Tropp 2011): it needs neither the P x P covariance nor its
eigenvectors, so 12,288 pixels are seconds. With as many directions as pixels or pictures it is exact. It holds the
pictures four times, though: of large ones, of which there are few, the components come from the N x N products between
pictures, exactly, and take the place of the pictures.

Letters: N pictures, P = 3 H W pixel values, F floats (components), Q = F + oversampling directions.
"""

import torch
from torch import Tensor

OVERSAMPLING = 32
ITERATIONS = 4
LARGE = 2**16  # pixel values from which on the products between pictures are taken: 148 pixels a side
BLOCK = 2**13  # pixel values that are handled at once


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
    def fit(cls, images: Tensor, num_floats: int, seed: int = 0, overwrite: bool = False) -> "PCA":
        """Fit on pictures (N, 3, H, W); `seed` draws the first directions, the global random state stays as it is.

        overwrite: large float pictures need no second copy then.
        """
        if images.ndim != 4 or len(images) < 2:
            raise ValueError(f"got pictures of shape {tuple(images.shape)}, wanted (N, 3, H, W) with N of 2 or more")
        x = images.flatten(1).float()  # (N, P)
        num_floats = min(num_floats, len(x) - 1, x.shape[1])
        mean = x.mean(dim=0)
        x = x.sub_(mean) if overwrite and x.dtype == images.dtype else x - mean
        variance = torch.stack([part.double().square().sum() for part in x.split(64)]).sum().clamp_min(1e-30).float()
        if x.shape[1] > LARGE and len(x) < x.shape[1]:
            singular, components = _in_place(x, num_floats)
        else:
            singular, components = _low_rank(x, num_floats, seed)
        c, h, w = images.shape[1:]
        return cls(mean, components, singular.square() / variance, (c, h, w))

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


def _low_rank(x: Tensor, num_floats: int, seed: int) -> tuple[Tensor, Tensor]:
    """Singular values (F,) and components (F, P) of centred pictures x (N, P), from random directions."""
    directions = min(num_floats + OVERSAMPLING, *x.shape)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        of_device = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
        of_device.manual_seed(seed)  # torch.manual_seed would seed every GPU
        _, singular, components = torch.pca_lowrank(x, directions, center=False, niter=ITERATIONS)  # (Q,), (P, Q)
    return singular[:num_floats], components.T[:num_floats].contiguous()


def _in_place(x: Tensor, num_floats: int) -> tuple[Tensor, Tensor]:
    """The same from the products between pictures; x is overwritten, and the components are its first rows.

    x x^T = U S^2 U^T, and the components are S^-1 U^T x. The products are in float64: they square what x spans.
    """
    products = x.new_zeros(len(x), len(x), dtype=torch.float64)  # (N, N)
    for block in x.split(BLOCK, dim=1):
        products.addmm_(block.double(), block.double().T)
    values, vectors = torch.linalg.eigh(products)  # smallest first
    values, vectors = values.flip(0)[:num_floats].clamp_min(1e-30), vectors.flip(1)[:, :num_floats]
    combine = (vectors / values.sqrt()).T.float()  # (F, N)
    for block in x.split(BLOCK, dim=1):
        block[:num_floats] = combine @ block
    return values.sqrt().float(), x[:num_floats].clone()  # a view would keep all of x
