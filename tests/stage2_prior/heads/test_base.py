"""What every head keeps: guidance one and zero are the plain branches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stage2_prior.heads.base import Head, HeadError
from stage2_prior.heads.categorical import CategoricalHead
from stage2_prior.heads.ddpm import DDPM
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.mixture import MixtureHead
from stage2_prior.heads.mse import MSEHead
from stage2_prior.heads.nets import AdaLNNet, AddedConditionNet, HoistedNet


def alphabet_head() -> CategoricalHead:
    """Two channels of 3 and 50 levels, so that a change of condition nearly always shows."""
    head = CategoricalHead(2, 4, sizes=[3, 50], width=16)
    for values, n in zip(head.values, head.sizes, strict=True):
        values[:n, 0] = torch.linspace(-1, 1, n)
    return head


HEADS: dict[str, Callable[[], Head]] = {
    "flow": lambda: FlowHead(AdaLNNet(2, 4)),
    "diffusion": lambda: DiffusionHead(HoistedNet(2, 4), solver=DDPM(5)),
    "added": lambda: FlowHead(AddedConditionNet(2, 4)),
    "mse": lambda: MSEHead(2, 4, sigma=0.5),
    "mixture": lambda: MixtureHead(2, 4, components=3, width=16),
    "categorical": lambda: alphabet_head(),
}


@pytest.mark.parametrize("name", HEADS)
def test_guidance_one_and_zero_are_the_plain_branches_for_every_head(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]()
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    c, u = torch.randn(2, 5, 4)

    def sample(cond: Tensor, uncond: Tensor | None, w: float) -> Tensor:
        with torch.no_grad():
            return head.sample(cond, uncond, w, generator=torch.Generator().manual_seed(1))

    assert torch.equal(sample(c, u, 1.0), sample(c, None, 1.0))
    assert torch.equal(sample(c, u, 0.0), sample(u, None, 1.0))
    torch.testing.assert_close(sample(c, c, 3.0), sample(c, None, 1.0), rtol=1e-3, atol=1e-3)
    assert (sample(c, u, 3.0) - sample(c, u, 1.0)).abs().max() > 1e-3  # control
    with pytest.raises(HeadError, match="without unconditional rows"):
        sample(c, None, 2.0)


@pytest.mark.parametrize("options", [{"draws": 0}, {"time_std": 0.0}, {"rows_per_time": 0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(HeadError, match="want"):
        FlowHead(AdaLNNet(2, 4), **options)  # type: ignore[arg-type]
    with pytest.raises(HeadError, match="wanted 1"):
        MSEHead(2, 4).plan(8)
    with pytest.raises(HeadError, match="sigma"):
        MSEHead(2, 4, sigma=-1.0)
