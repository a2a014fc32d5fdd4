"""A linear path beside the learned one: the first latents start as whitened principal components.

On photographs a small learned code needs long to reach what PCA has at once; on drawings it beats PCA within a minute
and a linear path only holds it back. So it is a module of its own, used by the photograph configs: the encoder's
posterior mean is `whitened PCA + learned`, the decoder starts from the PCA reconstruction and corrects it.
The basis is computed from training pictures before the first step and stays fixed.

Letters: B batch, K latents, C latent channels, P = 3HW pixel values, F = K C floats.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.pca import PCA
from stage1_tokenizer.spec import Spec


class LinearPath(Spec, nn.Module):
    """`encode(images) -> (B,K,C)` whitened coefficients, `decode(z, keep_mask) -> (B,3,H,W)`.

    Component i goes to latent i // C, so that a prefix of latents is a prefix of components.
    """

    basis: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, image_size: int = 32, num_latents: int = 16, latent_dim: int = 16):
        super().__init__()
        self.image_size, self.num_latents, self.latent_dim = image_size, num_latents, latent_dim
        pixels = 3 * image_size**2
        self.register_buffer("basis", torch.zeros(num_latents * latent_dim, pixels))
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("scale", torch.ones(num_latents * latent_dim))

    def fit(self, images: Tensor) -> None:
        """Set the basis from training images (n,3,H,W) in [-1,1]; fewer images than floats leave the rest empty."""
        pca = PCA.fit(images, self.basis.shape[0])
        n = pca.components.shape[0]
        self.basis.zero_()
        self.basis[:n] = pca.components
        self.mean.copy_(pca.mean)
        self.scale.fill_(1.0)
        self.scale[:n] = pca.encode(images).std(0).clamp_min(1e-4)

    @property
    def variances(self) -> Tensor:
        """(K,C) variance of every component in the training images."""
        return self.scale.square().view(self.num_latents, self.latent_dim)

    def encode(self, images: Tensor, k: int) -> Tensor:
        n = k * self.latent_dim
        with torch.autocast(images.device.type, enabled=False):  # whitening multiplies rounding errors of bf16
            x = (images.float().flatten(1) - self.mean) @ self.basis[:n].T / self.scale[:n]  # (B,kC)
        return x.unflatten(1, (k, self.latent_dim))  # (B,k,C)

    def decode(self, z: Tensor, keep_mask: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            f = (z.float() * keep_mask[..., None]).flatten(1) * self.scale  # (B,F)
            x = f @ self.basis + self.mean  # (B,P)
        return x.unflatten(1, (3, self.image_size, self.image_size))  # (B,3,H,W)
