"""The game: gradients reach the right player only, weights balance, and the discriminator learns to tell."""

import pytest
import torch
from torch import nn

from stage1_tokenizer.spec import build
from stage1_tokenizer.training.adversarial import (
    AdversarialLoss,
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator,
    lecam,
)


def game(start_step: int = 0, lecam_weight: float = 1e-3) -> AdversarialLoss:
    return AdversarialLoss(PatchDiscriminator(8, 2), start_step=start_step, lecam_weight=lecam_weight, lecam_decay=0.5)


def test_formulas_on_numbers() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_discriminator(real, fake) == pytest.approx(0.5 * (0.5 + 1.0))
    assert lecam(real, fake, torch.tensor(0.5), torch.tensor(1.0)) == pytest.approx(0.5 + 0.5 * 3.5**2)


def test_each_player_gets_only_its_own_gradient() -> None:
    adversarial, decoder = game(), nn.Conv2d(3, 3, 1)
    real, x = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    fake = decoder(x)
    adversarial.generator(fake, (fake - real).square().mean(), decoder.weight).backward()
    assert decoder.weight.grad is not None and decoder.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversarial.parameters())

    decoder.zero_grad()
    loss, _ = adversarial.discriminate(real, decoder(x))
    loss.backward()
    assert decoder.weight.grad is None
    assert all(p.grad is not None for p in adversarial.discriminator.parameters())


def test_adaptive_weight_equalises_gradients_at_the_last_layer() -> None:
    last = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight(10 * last.sum(), 2 * last.sum(), last)
    assert weight == pytest.approx(5.0, rel=1e-4) and not weight.requires_grad
    assert adaptive_weight(last.sum(), 0 * last.sum(), last) == 1e4  # bounded where the discriminator has no opinion


def test_the_discriminator_learns_to_tell_and_its_logits_are_tracked() -> None:
    adversarial = game()
    optimizer = torch.optim.Adam(adversarial.discriminator.parameters(), lr=2e-3)
    for _ in range(40):
        real = torch.rand(8, 3, 16, 16)
        fake = real.mean((2, 3), keepdim=True).expand_as(real)  # blurred away
        loss, means = adversarial.discriminate(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adversarial.track(means)
    assert loss < 0.3
    assert adversarial.real_mean > 0.5 and adversarial.fake_mean < -0.5
    assert set(adversarial.state_dict()) > {"real_mean", "fake_mean"}  # a resumed run goes on from them


def test_start_step_norms_and_specs() -> None:
    adversarial = game(start_step=5)
    assert [adversarial.active(step) for step in (4, 5)] == [False, True]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in adversarial.modules())
    assert any(isinstance(m, nn.GroupNorm) for m in adversarial.modules())
    assert build(adversarial.spec).start_step == 5


def test_logits_of_a_picture_do_not_depend_on_its_batch() -> None:
    discriminator, x = PatchDiscriminator(8, 2), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(discriminator(x)[:1], discriminator(x[:1]), atol=1e-5, rtol=0)


def test_pictures_too_small_for_the_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="16 pixel pictures, wanted 24"):
        PatchDiscriminator(8, 3)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="multiple of 8"):
        PatchDiscriminator(12)
