"""Every prior keeps the contract."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from stage2_prior import Prior
from stage2_prior.guidance import Guidance, RisingGuidance
from stage2_prior.heads.flow import Output
from stage2_prior.heads.solvers import Midpoint
from stage2_prior.prior import PriorError
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.small_priors import CAPTIONS, C, K, awake, parts


def noise_extended(output: Output | None = None) -> NoiseExtendedPrior:
    vocabulary, backbone, _ = parts()
    prior = awake(NoiseExtendedPrior(K, C, vocabulary, backbone, output=output))
    assert isinstance(prior, NoiseExtendedPrior)
    return prior


def masked(sets: int = 3) -> MaskedPrior:
    vocabulary, backbone, head = parts()
    prior = awake(MaskedPrior(K, C, vocabulary, backbone, head, sets=sets))
    assert isinstance(prior, MaskedPrior)
    return prior


@pytest.mark.parametrize("make", [noise_extended, masked])
def test_every_prior_keeps_the_contract(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    prior = make()

    def draw(captions: list[str], guidance: float, seed: int = 1) -> Tensor:
        return prior.sample(captions, guidance, generator=torch.Generator().manual_seed(seed))

    z = draw(CAPTIONS, 2.0)
    assert z.shape == (3, K, C) and z.dtype == torch.float32
    assert torch.equal(z, draw(CAPTIONS, 2.0)) and not torch.equal(z, draw(CAPTIONS, 2.0, seed=2))
    assert torch.equal(draw(CAPTIONS, 0.0), draw(["a cross"] * 3, 0.0))
    assert not torch.equal(draw(CAPTIONS, 1.0), draw(["a cross"] * 3, 1.0))
    assert prior.losses(z, prior.encode_text(CAPTIONS)).shape == (3, K)
    assert prior.num_evaluations() == 8 and prior.num_evaluations(4) == 4
    prior.save_pretrained(tmp_path)
    loaded = Prior.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample(CAPTIONS, 2.0, generator=torch.Generator().manual_seed(1)), z)
    with pytest.raises(PriorError, match="temperature"):
        prior.sample(CAPTIONS, temperature=-1.0)


@pytest.mark.parametrize(
    "make", [noise_extended, masked, lambda: masked(1)], ids=["noise-extended", "masked", "at-once"]
)
def test_guidance_acts_within_its_interval_and_a_schedule_is_no_constant(make) -> None:  # type: ignore[no-untyped-def]
    prior = make()

    def draw(guidance: float | Guidance) -> Tensor:
        return prior.sample(CAPTIONS, guidance, generator=torch.Generator().manual_seed(1))

    plain, guided = draw(1.0), draw(3.0)
    times = Midpoint().times()
    between = [(a + b) / 2 for a, b in pairwise(sorted(times))]
    torch.testing.assert_close(draw(Guidance(3.0, between[0], between[0] + 1e-3)), plain)  # never asked there
    partly = draw(Guidance(3.0, between[2], between[5]))
    assert min((partly - plain).abs().max(), (partly - guided).abs().max()) > 1e-2
    rising = draw(RisingGuidance(3.0))
    assert min((rising - plain).abs().max(), (rising - guided).abs().max()) > 1e-2
