"""The flow head: its likelihood, guidance and outputs against exact fields."""

import math

import pytest
import torch
from torch import Tensor

from stage2_prior.heads.base import HeadError
from stage2_prior.heads.flow import CleanOutput, FlowHead, NoiseOutput, VelocityOutput
from stage2_prior.heads.nets import HeadNet, HoistedNet
from stage2_prior.heads.solvers import Midpoint


class Exact(HeadNet):
    """A head network that knows: the velocity of N(mean, s^2), mean = the condition row's first C entries."""

    def __init__(self, s: float, latent_dim: int = 2, cond_dim: int = 2):
        super().__init__(latent_dim, cond_dim, 8, 0)
        self.s = s

    def time(self, t: Tensor) -> Tensor:
        return t.unsqueeze(-1)

    def condition(self, c: Tensor) -> Tensor:
        return c

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        t, s2 = time, self.s**2
        slope = (t - (1 - t) * s2) / ((1 - t) ** 2 * s2 + t**2)
        return -condition + slope * (x - (1 - t) * condition)


def test_likelihood_of_the_exact_field_is_exact() -> None:
    head, x = FlowHead(Exact(0.4)), torch.randn(50, 2)
    cond = torch.randn(50, 2)
    exact = -0.5 * ((x - cond) / 0.4).square().sum(1) - 2 * math.log(0.4) - math.log(2 * math.pi)
    errors = [(head.log_prob(cond, x, steps) - exact).abs().max().item() for steps in (8, 16)]
    assert errors[1] < 0.02 and errors[1] < errors[0] / 6  # fourth order
    assert (FlowHead(Exact(0.5)).log_prob(cond, x, 16) - exact).abs().mean() > 0.1  # control


def test_guidance_is_the_guided_ode_and_not_a_product_of_densities() -> None:
    """Against 1,000 plain Euler steps of v_u + w (v_c - v_u), for two Gaussians of unlike widths."""

    class Two(Exact):
        """Conditional N(2, 0.5^2) where the row says 2, unconditional N(0, 1) where it says 0."""

        def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            s2 = torch.where(condition[..., :1] == 2.0, 0.25, 1.0)
            slope = (time - (1 - time) * s2) / ((1 - time) ** 2 * s2 + time**2)
            return -condition + slope * (x - (1 - time) * condition)

    net, w, n = Two(1.0), 2.0, 4000
    head = FlowHead(net, solver=Midpoint(steps=32))
    c, u = torch.full((n, 2), 2.0), torch.zeros(n, 2)
    with torch.no_grad():
        found = head.sample(c, u, w, generator=torch.Generator().manual_seed(1))
        x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
        for i in range(1000):
            t = torch.tensor([1 - i / 1000])
            v_c, v_u = net(x, t, c), net(x, t, u)
            x = x - (v_u + w * (v_c - v_u)) / 1000
    torch.testing.assert_close(found, x, rtol=0, atol=0.02)
    precision = w / 0.25 - (w - 1) / 1.0  # of p_c^w p_u^(1-w)
    product = torch.tensor([w * 2.0 / 0.25 / precision, precision**-0.5])
    measured = torch.stack([found.mean(), found.std()])
    assert (measured - product).abs().max() > 0.05  # control: that is another distribution


@pytest.mark.parametrize("output", [VelocityOutput(), CleanOutput(), NoiseOutput()])
def test_every_output_learns_the_same_velocity(output: VelocityOutput | CleanOutput | NoiseOutput) -> None:
    """With answers that make v right, the loss is only what the noise leaves: the same for all three."""

    class Answer(Exact):
        def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            v = super().forward(x, time, condition)
            if isinstance(output, CleanOutput):
                return x - time.clamp(min=0.05) * v
            return x + (1 - time).clamp(min=0.05) * v if isinstance(output, NoiseOutput) else v

    cond = torch.randn(400, 2)
    x = cond + 0.4 * torch.randn(400, 2, generator=torch.Generator().manual_seed(1))
    losses = [
        FlowHead(net, out).loss(cond, x, torch.Generator().manual_seed(2))
        for net, out in ((Answer(0.4), output), (Exact(0.4), VelocityOutput()))
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_rows_that_share_their_times_must_fill_groups() -> None:
    head = FlowHead(HoistedNet(2, 4), rows_per_time=3)
    assert head.loss(torch.randn(6, 4), torch.randn(6, 2)).shape == (6,)
    with pytest.raises(HeadError, match="multiple of rows_per_time"):
        head.loss(torch.randn(7, 4), torch.randn(7, 2))
