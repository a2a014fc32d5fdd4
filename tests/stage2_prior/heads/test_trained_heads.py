"""Do trained heads draw from the right distribution? Four toys in the plane, one head for all, tests of two samples.

The toys are conditional: the condition row says which one. Each claim comes with a control that must fail.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from stage2_prior.heads.base import Head
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.mse import MSEHead
from stage2_prior.heads.nets import HoistedNet
from tests.toys import TOYS, draw, rows, toy, train


@pytest.fixture(scope="module")
def flow() -> Head:
    torch.manual_seed(0)
    return train(FlowHead(HoistedNet(2, len(TOYS), width=64, depth=3)), 900)


@pytest.fixture(scope="module")
def mse() -> Head:
    torch.manual_seed(0)
    return train(MSEHead(2, len(TOYS), width=64), 300)


def energy_p_value(a: Tensor, b: Tensor, permutations: int = 200) -> float:
    """Permutation test of the energy distance: how often a random split of both samples is as far apart."""
    g = torch.Generator().manual_seed(5)
    pooled, n = torch.cat([a, b]), len(a)
    distance = torch.cdist(pooled, pooled)

    def statistic(sign: Tensor) -> Tensor:
        return -(sign @ distance @ sign)  # 2 E|a-b| - E|a-a'| - E|b-b'| up to a factor

    sign = torch.cat([torch.ones(n), -torch.ones(len(b))])
    found = statistic(sign)
    others = torch.stack([statistic(sign[torch.randperm(len(sign), generator=g)]) for _ in range(permutations)])
    return ((others >= found).sum().item() + 1) / (permutations + 1)


def classifier_auc(a: Tensor, b: Tensor) -> float:
    """Area under the curve of a small classifier on held-out halves; 0.5 if the two samples cannot be told apart."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.01)
    n = len(a) // 2
    x, y = torch.cat([a[:n], b[:n]]), torch.cat([torch.ones(n), torch.zeros(n)])
    for _ in range(150):
        loss = nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ours, theirs = net(a[n:])[:, 0], net(b[n:])[:, 0]
    return (ours[:, None] > theirs).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_a_trained_flow_head_cannot_be_told_from_the_toy(flow: Head, name: str) -> None:
    index, g = TOYS.index(name), torch.Generator().manual_seed(9)
    real, ours = toy(name, 2000, g), draw(flow, index, 2000)  # by default: eight evaluations
    assert energy_p_value(real[:500], ours[:500]) > 0.01
    assert classifier_auc(real, ours) < 0.55
    cold = draw(flow, index, 2000, temperature=0.3)  # control: wrong temperature
    assert energy_p_value(real[:500], cold[:500]) < 0.01 and classifier_auc(real, cold) > 0.6


@pytest.mark.slow
def test_the_mean_of_a_bimodal_toy_is_where_nothing_is(flow: Head, mse: Head) -> None:
    """Control for the whole idea: squared error collapses to 0 between modes at -1 and 1; the flow head does not."""
    index = TOYS.index("bimodal")
    assert draw(mse, index, 500)[:, 0].abs().max() < 0.2
    ours = draw(flow, index, 500)[:, 0]
    assert (ours.abs() > 0.6).float().mean() > 0.95 and 0.4 < (ours > 0).float().mean() < 0.6


@pytest.mark.slow
def test_eight_evaluations_are_close_to_many(flow: Head) -> None:
    few, many = (torch.cat([draw(flow, i, 500, steps=n) for i in range(len(TOYS))]) for n in (8, 128))
    assert (few - many).abs().mean() < 0.06  # the same noise ends in the same place
    other = torch.cat([draw(flow, i, 500, steps=128, seed=4) for i in range(len(TOYS))])
    assert (other - many).abs().mean() > 0.3  # control


@pytest.mark.slow
def test_likelihood_is_that_of_a_known_density(flow: Head) -> None:
    """The narrow Gaussian's log-density, and that of points far from it."""
    assert isinstance(flow, FlowHead)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    g, index = torch.Generator().manual_seed(2), TOYS.index("narrow")
    x = toy("narrow", 300, g)
    e = x @ turn.T / torch.tensor([1.5, 0.15])
    exact = -0.5 * e.square().sum(1) - math.log(2 * math.pi) - math.log(1.5 * 0.15)
    found = flow.log_prob(rows(index, 300), x, 16)
    assert (found - exact).abs().mean() < 0.2 and abs((found - exact).mean().item()) < 0.1
    assert (flow.log_prob(rows(index, 300), x, 8) - found).abs().mean() < 0.05  # the solver's own error
    assert flow.log_prob(rows(index, 1), torch.tensor([[3.0, -3.0]]), 16) < -20  # control
