"""The average is one of parameters only, warms up, swaps in and out exactly, and survives a checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stage1_tokenizer.training.ema import EMA


class Net(nn.Module):
    count: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(3))


def test_average_follows_the_formula_with_warm_up() -> None:
    net = Net()
    ema = EMA(net, decay=0.5)
    expected = torch.zeros(4)
    for n in range(12):
        with torch.no_grad():
            net.weight.fill_(float(n + 1))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    torch.testing.assert_close(ema.averages[0], expected)
    assert ema.names == ["weight"]  # neither the frozen parameter nor a buffer


def test_buffers_stay_the_live_ones_while_the_average_is_in() -> None:
    net = Net()
    ema = EMA(net)
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.count.fill_(8)
        net.scale.fill_(2.0)
    ema.update()
    with ema.averaged():
        assert net.count == 8 and torch.equal(net.scale, torch.full((3,), 2.0))  # not 7.2, not 1.1
        assert 0 < net.weight[0] < 3
    assert torch.equal(net.weight, torch.full((4,), 3.0))


def test_own_weights_come_back_after_an_error_inside() -> None:
    net = Net()
    ema = EMA(net)
    with torch.no_grad():
        net.weight.fill_(3.0)
    with pytest.raises(RuntimeError), ema.averaged():
        raise RuntimeError
    assert torch.equal(net.weight, torch.full((4,), 3.0))


def test_state_is_plain_and_continues_exactly(tmp_path: Path) -> None:
    net, other = Net(), Net()
    first, second = EMA(net), EMA(other)
    with torch.no_grad():
        net.weight.fill_(3.0)
    first.update()
    torch.save(first.state_dict(), tmp_path / "ema.pt")
    second.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    with torch.no_grad():
        other.weight.fill_(5.0)
        net.weight.fill_(5.0)
    first.update()
    second.update()
    assert torch.equal(first.averages[0], second.averages[0]) and first.updates == second.updates == 2


def test_a_state_of_other_networks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight' \(stored \(5,\), here \(4,\)\)"):
        EMA(Net()).load_state_dict({"updates": 1, "averages": {"weight": torch.zeros(5)}})
    with pytest.raises(ValueError, match="below 1"):
        EMA(Net(), decay=1.0)
