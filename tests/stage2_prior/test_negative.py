"""Guidance against a negative caption, of every prior: what it leads away from, and when it is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage2_prior import NoCondition, Prior
from stage2_prior.prior import CausalPrior, PriorError
from tests.small_priors import CAPTIONS, C, D, K, awake, parts
from tests.stage2_prior.test_prefix import causal, every_prior, seeded

OTHERS = ["a blue square", "a small red star", "a green star above a red circle"]


def draw(prior: Prior, captions: list[str], guidance: float, negative: str | list[str] | None = None) -> Tensor:
    return prior.sample(captions, guidance, generator=seeded(), negative=negative)


@every_prior
def test_the_negative_caption_is_the_other_end_of_the_scale(make: Callable[[], Prior]) -> None:
    prior = make()
    alone = draw(prior, OTHERS, 1.0)
    torch.testing.assert_close(draw(prior, CAPTIONS, 0.0, OTHERS), alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(draw(prior, OTHERS, 3.0, OTHERS), alone, atol=1e-4, rtol=1e-4)  # v + 3 (v - v)
    assert (draw(prior, CAPTIONS, 3.0, OTHERS) - draw(prior, CAPTIONS, 3.0)).abs().amax((1, 2)).min() > 1e-3


@every_prior
def test_each_caption_has_its_own_and_one_serves_all(make: Callable[[], Prior]) -> None:
    prior = make()
    one = draw(prior, CAPTIONS, 2.0, OTHERS[0])
    torch.testing.assert_close(one, draw(prior, CAPTIONS, 2.0, [OTHERS[0]] * 3), atol=1e-4, rtol=1e-4)
    other = draw(prior, CAPTIONS, 2.0, [OTHERS[0], OTHERS[1], OTHERS[0]])
    changed = (other - one).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False]


def test_a_negative_caption_that_nothing_would_look_at_is_refused() -> None:
    prior = causal()
    with pytest.raises(PriorError, match="raise guidance above 1"):
        draw(prior, CAPTIONS, 1.0, OTHERS)
    with pytest.raises(PriorError, match="got 2 negative captions for 3"):
        draw(prior, CAPTIONS, 2.0, OTHERS[:2])
    with pytest.raises(PriorError, match="at least one word"):
        draw(prior, CAPTIONS, 2.0, "  ")
    _, backbone, head = parts()
    silent = awake(CausalPrior(K, C, None, backbone, head, condition=NoCondition(D)))
    with pytest.raises(PriorError, match="reads no captions"):
        draw(silent, CAPTIONS, 2.0, OTHERS)
