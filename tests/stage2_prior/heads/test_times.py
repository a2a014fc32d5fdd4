"""Times of training: one draw into each stratum, spread as they should be, and the condition computed once for all."""

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.flow import logit_normal_times, stratified_uniform
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import AdaLNNet


def distance_to_uniform(u: Tensor) -> float:
    """Kolmogorov's: of n uniform numbers it is below 1.95 / sqrt(n) but once in 1,000 times."""
    steps = (torch.arange(u.numel()) + 0.5) / u.numel()
    return (u.flatten().sort().values - steps).abs().max().item()


def assert_stratified(u: Tensor) -> None:
    """u (S,M) uniform in each column's S strata, one draw in each."""
    draws, rows = u.shape
    assert torch.equal((u * draws).long().sort(dim=0).values, torch.arange(draws)[:, None].expand(-1, rows))
    assert distance_to_uniform((u * draws) % 1) < 1.95 / u.numel() ** 0.5  # and anywhere within its stratum
    assert u.unique().numel() > 0.99 * u.numel()  # rows have draws of their own


@pytest.mark.parametrize("draws", [1, 4, 5])
def test_uniform_draws_fall_one_into_each_stratum(draws: int) -> None:
    g, cpu = torch.Generator().manual_seed(3), torch.device("cpu")
    assert_stratified(stratified_uniform(2000, draws, g, cpu))
    with pytest.raises(AssertionError):
        assert_stratified(torch.rand(4, 2000, generator=g))  # control: plain draws


def test_logit_normal_times_have_their_quantiles() -> None:
    g, cpu = torch.Generator().manual_seed(3), torch.device("cpu")
    t = logit_normal_times(5000, 4, device=cpu, mean=0.7, std=1.5, generator=g)
    assert t.shape == (4, 5000) and t.min() > 0 and t.max() < 1
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = torch.sigmoid(0.7 + 1.5 * torch.distributions.Normal(0, 1).icdf(at))
    torch.testing.assert_close(t.flatten().quantile(at), expected, rtol=0, atol=0.01)
    assert_stratified(torch.special.ndtr((t.double().logit() - 0.7) / 1.5))


@pytest.mark.parametrize("kind", ["flow", "flow, moved", "diffusion"])
def test_draws_of_t_are_stratified_and_share_the_condition(kind: str) -> None:
    calls: list[tuple[int, ...]] = []
    times: list[Tensor] = []

    class Counting(AdaLNNet):
        def time(self, t: Tensor) -> Tensor:
            times.append(t)
            return super().time(t)

        def condition(self, c: Tensor) -> Tensor:
            calls.append(tuple(c.shape))
            return super().condition(c)

    net, rows = Counting(2, 4, width=8, depth=1), 600
    mean, std = (1.0, 0.5) if kind == "flow, moved" else (0.0, 1.0)
    head = DiffusionHead(net, draws=4) if kind == "diffusion" else FlowHead(net, None, None, 4, mean, std)
    generator = torch.Generator().manual_seed(3)
    assert head.loss(torch.randn(rows, 4), torch.randn(rows, 2), generator).shape == (rows,)
    assert calls == [(rows, 4)] and len(times) == 1
    t = times[0].double().view(4, rows)
    assert_stratified(t if kind == "diffusion" else torch.special.ndtr((t.logit() - mean) / std))
