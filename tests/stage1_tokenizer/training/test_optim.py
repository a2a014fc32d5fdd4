"""The optimizer agrees with torch's own Muon and AdamW, keeps its state, and the schedule has the promised shape."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import Block
from stage1_tokenizer.training import optim
from stage1_tokenizer.training.optim import (
    MuonAdamW,
    configured_options,
    orthogonalize,
    parameter_groups,
    planned_steps,
    restore_options,
    warmup_flat_cosine,
)


def network(seed: int = 0) -> nn.ParameterDict:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (16, 16), "b": (16, 16), "wide": (16, 48), "tall": (48, 16), "table": (10, 16), "gain": (16,)}
    net = nn.ParameterDict({name: nn.Parameter(torch.randn(shape, generator=g)) for name, shape in shapes.items()})
    for name in ("a", "b", "wide", "tall"):
        net[name].group = "matrix"  # type: ignore[attr-defined]
    net["table"].group = "decay"  # type: ignore[attr-defined]
    return net


def set_gradients(net: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def test_groups_follow_the_mark_on_the_parameter() -> None:
    net = network()
    net["gain"].requires_grad = True
    net["frozen"] = nn.Parameter(torch.zeros(3), requires_grad=False)
    groups = {g["group"]: g["params"] for g in parameter_groups(net)}
    assert [len(groups[name]) for name in ("matrix", "decay", "plain")] == [4, 1, 1]
    assert groups["plain"][0] is net["gain"]

    net["gain"].group = "matrix"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'gain' of shape \(16,\) is in group 'matrix'"):
        parameter_groups(net)
    net["gain"].group = "embedding"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="expected one of matrix, decay, plain"):
        parameter_groups(net)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (48, 4, 1, 1)])
def test_a_convolution_moves_as_the_matrix_of_its_outputs_and_inputs(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    matrix = nn.Parameter(weight.detach().flatten(1).clone())
    start = weight.detach().clone()
    for p in (weight, matrix):
        p.group = "matrix"  # type: ignore[attr-defined]
    optimizers = [MuonAdamW(parameter_groups(nn.ParameterList([p]))) for p in (weight, matrix)]
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        weight.grad, matrix.grad = gradient, gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(weight.flatten(1), matrix) and not torch.equal(weight, start)


def test_matrices_move_as_under_torch_muon() -> None:
    ours, theirs = network(), network()
    mine = MuonAdamW(parameter_groups(ours), matrix_lr=0.02, matrix_weight_decay=0.1)
    reference = torch.optim.Muon([theirs[k] for k in ("a", "b", "wide", "tall")], lr=0.02, weight_decay=0.1)
    start = {k: v.detach().clone() for k, v in ours.items()}
    for step in range(4):
        for net, optimizer in ((ours, mine), (theirs, reference)):
            set_gradients(net, step)
            optimizer.step()
    for k in ("a", "b", "wide", "tall"):
        moved, expected = ours[k] - start[k], theirs[k] - start[k]
        assert (moved - expected).norm() < 0.03 * expected.norm(), k  # both iterate in bfloat16


def test_the_rest_moves_as_under_torch_adamw_after_clipping() -> None:
    ours, theirs = network(), network()
    mine = MuonAdamW(parameter_groups(ours), lr=1e-2, weight_decay=0.1, adamw_clip=0.5)
    groups = [{"params": [theirs["table"]], "weight_decay": 0.1}, {"params": [theirs["gain"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 2:  # sizes differ between steps, or Adam would not notice a wrong clip
            for net in (ours, theirs):
                for p in net.parameters():
                    p.grad.mul_(1e-3)  # type: ignore[union-attr]
        mine.step()
        nn.utils.clip_grad_norm_([theirs["table"], theirs["gain"]], 0.5)
        reference.step()
    for k in ("table", "gain"):
        torch.testing.assert_close(ours[k], theirs[k], atol=1e-6, rtol=1e-5)


def test_orthogonalize_keeps_directions_and_levels_singular_values() -> None:
    g = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 8, 24, generator=g)
    out = orthogonalize(stack)
    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    values = u.mT @ out @ vh.mT  # diagonal where the singular directions are kept
    off = values - torch.diag_embed(values.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-4
    assert values.diagonal(dim1=-2, dim2=-1).min() > 0.6 and values.diagonal(dim1=-2, dim2=-1).max() < 1.3
    with pytest.raises(ValueError, match="transpose them first"):
        orthogonalize(stack.mT)


def test_a_missing_gradient_leaves_parameter_and_neighbours_right() -> None:
    ours, alone = network(), network()
    mine, reference = MuonAdamW(parameter_groups(ours)), MuonAdamW(parameter_groups(alone))
    before = {k: v.detach().clone() for k, v in ours.items()}
    set_gradients(ours, 0)
    set_gradients(alone, 0)
    ours["a"].grad = None
    ours["gain"].grad = None
    alone["gain"].grad = None
    mine.step()
    reference.step()
    assert torch.equal(ours["a"], before["a"]) and torch.equal(ours["gain"], before["gain"])
    torch.testing.assert_close(ours["b"], alone["b"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours["table"], alone["table"])


def test_state_round_trip_continues_exactly(tmp_path: Any) -> None:
    def run(net: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            set_gradients(net, step)
            optimizer.step()

    ours, other = network(), network()
    first = MuonAdamW(parameter_groups(ours))
    run(ours, first, range(3))
    torch.save({"net": ours.state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")
    run(ours, first, range(3, 6))

    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    second = MuonAdamW(parameter_groups(other))
    other.load_state_dict(stored["net"])
    second.load_state_dict(stored["optimizer"])
    run(other, second, range(3, 6))
    for k in ours:
        assert torch.equal(ours[k], other[k]), k


def test_it_trains_and_the_schedule_drives_every_group() -> None:
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    net[0].weight.group = "matrix"  # type: ignore[union-attr, assignment]
    x, y = torch.randn(64, 8, generator=g), torch.randn(64, 4, generator=g)
    optimizer = MuonAdamW(parameter_groups(net), lr=1e-2, matrix_lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_flat_cosine(step, 200))
    losses: list[Tensor] = []
    for _ in range(200):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.2 * losses[0]
    assert {group["group"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"matrix": 0.02 * 0.01, "plain": 1e-2 * 0.01}
    )


def test_schedule_warms_up_stays_flat_and_falls_to_its_end() -> None:
    factors = [warmup_flat_cosine(step, 1000) for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 31) and factors[:30] == sorted(factors[:30]) and factors[29] < 1
    assert set(factors[30:301]) == {1.0}
    falling = factors[300:1000]
    assert falling == sorted(falling, reverse=True)
    assert factors[650] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 350 / 699)))
    assert factors[999] == factors[1000] == pytest.approx(0.01)
    assert warmup_flat_cosine(0, 5) == 1.0  # too short for a warm-up
    assert [warmup_flat_cosine(step, None, 3) for step in (0, 1, 3, 10**9)] == [0.25, 0.5, 1.0, 1.0]  # no known end
    with pytest.raises(ValueError, match="at least 1 step"):
        warmup_flat_cosine(0, 0)


@pytest.mark.parametrize("lr", [1e-2, 3e-2])
def test_configured_rates_come_back_after_a_state_was_loaded(lr: float) -> None:
    def build(lr: float, decay: float) -> tuple[MuonAdamW, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = MuonAdamW(parameter_groups(network()), lr=lr, matrix_lr=0.7 * lr, weight_decay=decay)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_flat_cosine(step, 200))

    first, schedule = build(1e-2, 0.01)
    for _ in range(7):
        first.step()
        schedule.step()
    second, resumed = build(lr, 0.2)
    options = configured_options(second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    restore_options(second, options, resumed)
    factor = warmup_flat_cosine(7, 200)
    assert [group["lr"] for group in second.param_groups] == [0.7 * lr * factor, lr * factor, lr * factor]
    assert [group["weight_decay"] for group in second.param_groups] == [0.0, 0.2, 0.0]
    if lr == 1e-2:  # to the last bit
        assert [group["lr"] for group in second.param_groups] == [group["lr"] for group in first.param_groups]
    second.step()
    resumed.step()
    assert second.param_groups[1]["lr"] == lr * warmup_flat_cosine(8, 200)


@pytest.mark.parametrize(
    ("estimated", "batches", "epochs", "steps", "accumulate", "planned"),
    [
        (80, 10, 8, -1, 1, 80),
        (80, 10, 8, -1, 4, 24),  # 4 + 4 + 2 in each epoch
        (50, 10, 8, 50, 4, 24),
        (20, 10, 8, 20, 4, 20),
        (30, math.inf, -1, 30, 4, 30),
        (math.inf, math.inf, -1, -1, 1, None),
        (-1, math.inf, 8, -1, 1, None),  # Lightning's answer for batches that it cannot count
    ],
)
def test_the_number_of_steps_knows_epochs_and_accumulation(
    estimated: float, batches: float, epochs: int, steps: int, accumulate: int, planned: int | None
) -> None:
    trainer = SimpleNamespace(
        estimated_stepping_batches=estimated, num_training_batches=batches, max_epochs=epochs, max_steps=steps
    )
    assert planned_steps(trainer, accumulate) == planned


def test_bad_groups_and_rates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter_groups\(module\)"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(2))]}])
    with pytest.raises(ValueError, match="matrix_lr=0.0"):
        MuonAdamW(parameter_groups(network()), matrix_lr=0.0)
    assert set(optim.GROUPS) == {"matrix", "decay", "plain"}


def test_a_deep_copy_whose_matrices_have_lost_their_group_is_refused() -> None:
    """Otherwise AdamW would silently train them."""
    block = Block(16, 2)
    assert {group["group"] for group in parameter_groups(block)} == {"matrix", "plain"}
    with pytest.raises(ValueError, match="'self_attention.q' has lost its group"):
        parameter_groups(copy.deepcopy(block))
