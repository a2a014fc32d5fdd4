"""Networks of heads: what they may tabulate, and what it saves."""

import pytest
import torch
from torch import Tensor, nn

from stage2_prior.heads.ddpm import DDPM
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import AdaLNNet, AddedConditionNet, HeadNet, HoistedNet


@pytest.mark.parametrize("net", [HoistedNet, AddedConditionNet])
def test_tabulated_networks_ask_for_time_once_per_grid_and_condition_once_per_latent(net: type[HeadNet]) -> None:
    calls = {"time": 0, "condition": 0, "forward": 0}

    class Counting(net):  # type: ignore[misc,valid-type]
        def time(self, t: Tensor) -> Tensor:
            calls["time"] += 1
            return super().time(t)

        def condition(self, c: Tensor) -> Tensor:
            calls["condition"] += 1
            return super().condition(c)

        def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            calls["forward"] += 1
            return super().forward(x, time, condition)

    head = FlowHead(Counting(2, 4))
    plan = head.plan()
    for _ in range(5):
        head.sample(torch.randn(3, 4), plan=plan)
    assert calls == {"time": 1, "condition": 5, "forward": 40}


def test_a_time_shared_by_all_rows_is_the_gain_and_bias_of_a_layer_norm() -> None:
    """Sampling gives one time for all rows, training one for each: two kernels, the same answer."""
    net = AddedConditionNet(3, 4, width=24)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, time, condition = torch.randn(5, 3), net.time(torch.tensor(0.3)), net.condition(torch.randn(5, 4))
    answer = net(x, time, condition)
    torch.testing.assert_close(answer, net(x, time.expand(5, -1), condition), rtol=1e-4, atol=1e-4)
    other = net.time(torch.tensor(0.6))
    assert (answer - net(x, other, condition)).abs().max() > 1e-2  # control
    assert (answer - net(x, time, condition.flip(0))).abs().max() > 1e-2  # control: the condition reaches the answer


@pytest.mark.parametrize(("size", "net"), [((128, 160, 3), HoistedNet), ((768, 1024, 6), AddedConditionNet)])
def test_default_sampling_takes_a_thirtieth_of_the_arithmetic_of_a_diffusion_head(
    size: tuple[int, int, int], net: type[HeadNet]
) -> None:
    """Counted, at the demo's size and MAR-B's: 8 evaluations with what can be tabulated, against 100 of full adaLN."""
    from torch.utils.flop_counter import FlopCounterMode

    d, width, depth = size
    flops = {}
    for name, head in (
        ("flow", FlowHead(net(16, d, width, depth))),  # type: ignore[arg-type]
        ("diffusion", DiffusionHead(AdaLNNet(16, d, width, depth), solver=DDPM(100))),
    ):
        with FlopCounterMode(display=False) as counter:
            plan, cond = head.to("meta").plan(), torch.randn(2, d, device="meta")
            made = counter.get_total_flops()  # the table: once for all latents of all pictures
            head.sample(cond, cond, 2.0, plan=plan)
        flops[name] = counter.get_total_flops() - made
    assert flops["diffusion"] > 30 * flops["flow"]
