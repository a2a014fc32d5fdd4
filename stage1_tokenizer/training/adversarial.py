"""A discriminator that learns to tell reconstructions from pictures, and what a tokenizer learns from it.

PatchGAN (Isola et al. 2017) with GroupNorm instead of BatchNorm: batch statistics would leak which batch is real, and
differ between ranks. Hinge losses; the tokenizer's part is scaled so that its gradient at the last layer of the decoder
matches that of the reconstruction (VQGAN, Esser et al. 2021, eq. 7); LeCam regularisation (Tseng et al. 2021) keeps the
discriminator in place on little data. Nothing counts before `start_step`: a tokenizer that still paints blurs teaches a
discriminator only that blurs are false.

A training step calls `generator` (gradients reach the reconstruction only), steps the tokenizer, then calls
`discriminate` (gradients reach the discriminator only), steps the discriminator, and calls `track`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec


class PatchDiscriminator(Spec, nn.Module):
    """Convolutions with stride 2 and GroupNorm: images (B,3,H,W) in [-1,1] -> one logit per patch (B,1,h,w).

    Args:
        width: channels after the first convolution, a multiple of 8; doubled per layer up to 8 times that.
        layers: stride-2 convolutions; each logit sees about 70 pixels with 3, 34 with 2.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        if width % 8 or layers < 1:
            raise ValueError(f"got width {width}, layers {layers}; wanted a multiple of 8, and at least 1 layer.")
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            wider = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            conv = nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False)
            modules += [conv, nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            channels = wider
        modules.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.net = nn.Sequential(*modules)
        self.smallest = 2**layers * 3  # sides below leave the last convolutions nothing to see

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"got {images.shape[-1]} pixel pictures, wanted {self.smallest} or more for this discriminator: lower "
                "its layers."
            )
        return self.net(images)  # (B,1,h,w)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from logits of any shape: 0 where real >= 1 and fake <= -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def lecam(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """LeCam regulariser (Tseng et al. 2021, eq. 4): logits must not leave the running mean of the other kind behind."""
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor, most: float = 1e4) -> Tensor:
    """|gradient of `reconstruction`| / |gradient of `adversarial`| at parameter `last`, detached, at most `most`."""
    rec = torch.autograd.grad(reconstruction, last, retain_graph=True)[0]
    adv = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
    return (rec.norm() / (adv.norm() + 1e-6)).clamp(0.0, most).detach()


class AdversarialLoss(Spec, nn.Module):
    """The game between a tokenizer and a discriminator.

    Args:
        discriminator: images -> logits.
        weight: of the tokenizer's part, relative to the reconstruction (see `adaptive_weight`).
        start_step: optimiser steps before it begins.
        lecam_weight: of the regulariser; lecam_decay: of the running means of the logits.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        weight: float = 0.1,
        start_step: int = 10_000,
        lecam_weight: float = 1e-3,
        lecam_decay: float = 0.999,
    ):
        super().__init__()
        self.discriminator, self.weight, self.start_step = discriminator, weight, start_step
        self.lecam_weight, self.lecam_decay = lecam_weight, lecam_decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def active(self, step: int) -> bool:
        """True from `start_step` on; before, neither part is computed."""
        return step >= self.start_step

    def generator(self, fake: Tensor, reconstruction: Tensor, last: Tensor) -> Tensor:
        """What the tokenizer minimises besides `reconstruction` (0-d): scalar, `weight` and adaptive weight included.

        fake (B,3,H,W) with its graph; `last` is a weight of the decoder's last layer. The discriminator gets no
        gradient.
        """
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        loss = -torch.func.functional_call(self.discriminator, frozen, (fake,)).mean()
        return self.weight * adaptive_weight(reconstruction, loss, last) * loss

    def discriminate(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of the discriminator, its mean logits to log and to `track`); the tokenizer gets no gradient.

        Real and reconstructed pictures go through in one pass.
        """
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake.detach()])).float().chunk(2)
        loss = hinge_discriminator(real_logits, fake_logits)
        if self.lecam_weight:
            loss = loss + self.lecam_weight * lecam(real_logits, fake_logits, self.real_mean, self.fake_mean)
        means = {"real_logit": real_logits.mean().detach(), "fake_logit": fake_logits.mean().detach()}
        return loss, means

    @torch.no_grad()
    def track(self, means: dict[str, Tensor]) -> None:
        """Move the running means towards those of this step."""
        self.real_mean.lerp_(means["real_logit"], 1 - self.lecam_decay)
        self.fake_mean.lerp_(means["fake_logit"], 1 - self.lecam_decay)
