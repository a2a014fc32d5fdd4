"""Densities of the priors integrate to one and are causal; classification by likelihood on lines that are known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior import CausalPrior, Prior
from stage2_prior.backbone import Backbone
from stage2_prior.evaluation.likelihood_report import classification_report, likelihood_report
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.mse import MSEHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.likelihood import half_step_times, ode_log_prob
from stage2_prior.orders import LearnedOrder, RandomOrder, ReversedOrder
from stage2_prior.prior import PriorError
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior

K, D = 3, 32
CAPTIONS = ["a red circle", "a cross", "a blue star"]
PRIORS = [CausalPrior, MaskedPrior, NoiseExtendedPrior]


def make(kind: type[Prior], **options: Any) -> Prior:
    """A small prior of one channel with random weights, so that its densities are anything but normal."""
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(64, 12)
    vocabulary.fit(CAPTIONS)
    backbone = Backbone(D, 2, 2, max_tokens=16)
    more = {} if kind is NoiseExtendedPrior else {"head": FlowHead(HoistedNet(1, D, 24, 2))}
    if kind is MaskedPrior:
        more["sets"] = K  # type: ignore[assignment]
    prior = kind(K, 1, vocabulary, backbone, **more, **options)  # type: ignore
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


@pytest.mark.parametrize("position", [0, K - 1])
@pytest.mark.parametrize("kind", PRIORS)
def test_the_density_of_a_latent_given_the_earlier_ones_integrates_to_one(kind: type[Prior], position: int) -> None:
    prior, grid = make(kind), torch.linspace(-9, 9, 91)
    z = torch.tensor([0.3, -1.0, 0.7]).repeat(len(grid), 1)
    z[:, position] = grid
    found = prior.log_prob(z[..., None], CAPTIONS[:1] * len(grid), steps=8)[:, position]
    mass = torch.trapezoid(found.exp(), grid)
    assert abs(mass - 1) < 0.01
    normal = -0.5 * grid.square() - 0.919
    assert (found - normal)[30:60].abs().max() > 0.2  # control: it is not simply the noise's


@pytest.mark.parametrize("kind", PRIORS)
def test_a_latent_is_scored_given_the_caption_and_earlier_latents_only(kind: type[Prior]) -> None:
    prior, z = make(kind), torch.randn(3, K, 1, generator=torch.Generator().manual_seed(1))
    before = prior.log_prob(z, CAPTIONS, steps=4)
    for j in range(K):
        changed = z.clone()
        changed[:, j] += 0.5
        after = prior.log_prob(changed, CAPTIONS, steps=4)
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-4)
        assert (after[:, j:] - before[:, j:]).abs().max(0).values.min() > 1e-3
    other = prior.log_prob(z, CAPTIONS[::-1], steps=4)
    assert (other - before)[[0, 2]].abs().min() > 1e-5  # the caption has a say


@pytest.mark.parametrize(
    ("order", "line"), [(LearnedOrder(), [0, 1, 2]), (ReversedOrder(), [2, 1, 0]), (RandomOrder(), [0, 1, 2])]
)
def test_a_latent_is_scored_in_its_own_place_given_what_its_order_put_before_it(
    order: LearnedOrder, line: list[int]
) -> None:
    prior, z = make(CausalPrior, order=order), torch.randn(3, K, 1, generator=torch.Generator().manual_seed(1))
    before = prior.log_prob(z, CAPTIONS, steps=4)
    for i, j in enumerate(line):
        changed = z.clone()
        changed[:, j] += 0.5
        moved = (prior.log_prob(changed, CAPTIONS, steps=4) - before).abs().max(0).values  # (K,)
        assert (moved[line[:i]] < 1e-4).all() and (moved[line[i:]] > 1e-3).all()


def test_a_reversed_prior_scores_a_line_as_the_plain_one_scores_it_reversed() -> None:
    plain, reverse = make(CausalPrior), make(CausalPrior, order=ReversedOrder())
    reverse.load_state_dict(plain.state_dict())
    z = torch.randn(3, K, 1, generator=torch.Generator().manual_seed(1))
    expected = plain.log_prob(z.flip(1), CAPTIONS, steps=4).flip(1)
    torch.testing.assert_close(reverse.log_prob(z, CAPTIONS, steps=4), expected)
    assert (plain.log_prob(z, CAPTIONS, steps=4) - expected).abs().max() > 1e-2  # control


def test_a_density_leaves_nothing_to_chance_in_training_either() -> None:
    """No context noise, no dropped captions: both belong to the training loss."""
    prior = make(CausalPrior, context_noise=0.5, caption_dropout=1.0)
    z = torch.randn(3, K, 1, generator=torch.Generator().manual_seed(1))
    expected = prior.log_prob(z, CAPTIONS, steps=4)
    prior.train()
    assert torch.equal(prior.log_prob(z, CAPTIONS, steps=4), expected)
    assert torch.equal(prior.log_prob(z, CAPTIONS, steps=4), expected)


def test_a_density_is_found_to_the_solvers_error() -> None:
    """The exact field of N(mu, s^2) in every channel: x_t has mean (1 - t) mu, variance (1 - t)^2 s^2 + t^2."""
    mu, s, x = 0.7, 0.4, torch.randn(5, 2, 3)

    def errors(steps: int) -> float:
        times = half_step_times(steps)

        def field(x: Tensor, i: int) -> Tensor:
            t = times[i]
            slope = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
            return -mu + slope * (x - (1 - t) * mu)

        exact = torch.distributions.Normal(mu, s).log_prob(x).sum(-1)
        return (ode_log_prob(field, x, steps) - exact).abs().max().item()

    assert errors(32) < 1e-3 and errors(4) > 8 * errors(8)  # fourth order
    with pytest.raises(ValueError, match="at least 1"):
        half_step_times(0)


@pytest.mark.parametrize("kind", [CausalPrior, MaskedPrior])
def test_heads_without_a_density_are_refused_and_named(kind: type[Prior]) -> None:
    prior = make(kind)
    prior.head = MSEHead(1, D)  # type: ignore[assignment]
    z = torch.zeros(3, K, 1)
    with pytest.raises(PriorError, match="such as FlowHead"):
        prior.log_prob(z, CAPTIONS)
    assert "such as FlowHead" in likelihood_report(prior, z, CAPTIONS)["skipped"]
    assert "such as FlowHead" in classification_report(prior, z, CAPTIONS, 2)["skipped"]


class Knows:
    """log p of a line: -1 for every latent that is not its caption's number; the first `blind` latents know nothing."""

    def __init__(self, blind: int):
        self.blind = blind

    def log_prob(self, z: Tensor, captions: list[str], steps: int = 32) -> Tensor:
        wrong = z[..., 0] != torch.tensor([float(c) for c in captions])[:, None]
        return -(wrong & (torch.arange(z.shape[1]) >= self.blind)).float()


def test_classification_counts_what_each_prefix_knows() -> None:
    captions = [str(i) for i in range(12)]
    z = torch.arange(12.0)[:, None, None].expand(-1, 4, 1)
    found = classification_report(Knows(2), z, captions, lines=8)  # type: ignore[arg-type]
    assert found["lines"] == 8 and found["captions_per_line"] == 10
    assert found["accuracy_by_prefix"] == pytest.approx([0.1, 0.1, 1, 1])  # ties are chance, not luck
    assert found["nats_by_position"] == [0, 0, 1, 1] and found["accuracy"] == 1
    wrong = classification_report(Knows(0), z.flip(0), captions, lines=8)  # type: ignore[arg-type]
    assert wrong["accuracy"] < 0.1  # control: lines of other captions
    same = classification_report(Knows(0), z, ["1"] * 12, lines=8)  # type: ignore[arg-type]
    assert "nothing to choose between" in same["skipped"]


def test_classes_are_told_apart_by_one_caption_each() -> None:
    labels = torch.tensor([0, 1, 2] * 4)
    captions = [str(i.item()) for i in labels]
    found = classification_report(Knows(0), labels[:, None, None].float().expand(-1, 2, 1), captions, 12, labels)  # type: ignore[arg-type]
    assert found["captions_per_line"] == 3 and found["accuracy"] == 1 and found["chance"] == pytest.approx(1 / 3)
