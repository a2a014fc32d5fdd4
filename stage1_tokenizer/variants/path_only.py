"""A code that is not learned: the linear path's, with a learned decoder behind it.

The control of every encoder beside a linear path: what of a figure is the decoder's, and what did learning the code
bring? `BlindEncoder` looks at nothing and `PathBottleneck` takes nothing from it, so that latents are the path's alone.

Letters: B batch, K latents, k <= K, C latent channels.
"""

import torch
from torch import Tensor

from stage1_tokenizer.contract import Bottleneck, Encoder


class BlindEncoder(Encoder):
    """Zeros for every image: forward(images, k=None) -> h (B,k,1). It has no parameters."""

    def __init__(self, num_latents: int = 16):
        super().__init__()
        self.num_latents, self.width = num_latents, 1

    def forward(self, images: Tensor, k: int | None = None) -> Tensor:
        return images.new_zeros(len(images), k or self.num_latents, self.width)


class PathBottleneck(Bottleneck):
    """The mean is `shift`, whatever the features; noise of standard deviation `noise` is added in training.

    Raises ValueError for noise below 0, and when it is used without a linear path.
    """

    def __init__(self, num_latents: int = 16, latent_dim: int = 16, noise: float = 0.011):
        super().__init__()
        if noise < 0:
            raise ValueError(f"got noise {noise}, wanted a standard deviation of 0 or more.")
        self.num_latents, self.latent_dim, self.noise = num_latents, latent_dim, noise

    def start_silent(self) -> None:
        """It is silent for good."""

    def posterior(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if shift is None:
            raise ValueError("got no linear path for a PathBottleneck, which has no code without; give one.")
        return shift, torch.full_like(shift, self.noise)

    def forward(self, h: Tensor, shift: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std = self.posterior(h, shift)
        return mean + std * torch.randn_like(mean), {}
