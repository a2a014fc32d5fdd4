"""Paths, losses and solvers stay float32 under autocast."""

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.flow import interpolate, stratified_uniform, velocity
from stage2_prior.heads.ddpm import DDPM, alpha_sigma
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.flow import CleanOutput, FlowHead, NoiseOutput, VelocityOutput
from stage2_prior.heads.nets import HoistedNet


def is_float32(x: Tensor) -> bool:
    """Also in value: seven of ten numbers or more do not exist in bfloat16."""
    return x.dtype == torch.float32 and bool((x != x.bfloat16()).float().mean() > 0.7)


def small_head(output: VelocityOutput | CleanOutput | NoiseOutput) -> FlowHead:
    torch.manual_seed(0)
    head = FlowHead(HoistedNet(4, 8, width=16, depth=2), output)
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return head


@pytest.mark.parametrize("output", [VelocityOutput(), CleanOutput(), NoiseOutput()])
def test_path_and_loss_stay_float32_under_autocast(output: VelocityOutput | CleanOutput | NoiseOutput) -> None:
    """The network's answer alone is bfloat16: with it, x_t and t as recorded, the loss is that of a float32 path."""
    head = small_head(output)
    seen: dict[str, Tensor] = {}
    head.net.embed.register_forward_pre_hook(lambda layer, inputs: seen.update(x_t=inputs[0]))
    head.net.register_forward_hook(lambda layer, inputs, answer: seen.update(answer=answer))
    original = head.net.time
    head.net.time = lambda t: seen.update(t=t) or original(t)  # type: ignore[method-assign,assignment,func-returns-value]
    cond, x = torch.randn(50, 8), torch.randn(50, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(cond, x, torch.Generator().manual_seed(1))
    assert seen["answer"].dtype == torch.bfloat16  # control: autocast is at work
    x_t, t = seen["x_t"].squeeze(2), seen["t"]  # (S,M,C), (S,M,1)
    assert is_float32(x_t) and is_float32(t) and is_float32(loss)
    g = torch.Generator().manual_seed(1)
    stratified_uniform(50, 4, g, torch.device("cpu"))  # what `loss` draws before the noise
    noise = torch.randn(4, 50, 1, 4, generator=g).squeeze(2)
    assert torch.equal(x_t, interpolate(x, noise, t))
    v = head.output(x_t, seen["answer"].float().squeeze(2), t)
    torch.testing.assert_close(loss, (v - velocity(x, noise)).square().mean(dim=(0, -1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("output", [VelocityOutput(), CleanOutput(), NoiseOutput()])
def test_the_solver_stays_float32_under_autocast(output: VelocityOutput | CleanOutput | NoiseOutput) -> None:
    """Its state at every call, and its steps: replayed in float64 from the network's recorded answers."""
    head, states, answers = small_head(output), [], []
    head.net.embed.register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0]))
    head.net.register_forward_hook(lambda layer, inputs, answer: answers.append(answer))
    c, u = torch.randn(2, 50, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = head.sample(c, u, 1.7, generator=torch.Generator().manual_seed(1))
    assert len(states) == 8 and all(is_float32(x) for x in [*states, z])
    assert all(answer.dtype == torch.bfloat16 for answer in answers)  # control: autocast is at work
    replay = iter(answers)

    def field(x: Tensor, t: float) -> Tensor:
        answer_c, answer_u = next(replay).double().chunk(2)
        return head.output(x, answer_u + 1.7 * (answer_c - answer_u), t)

    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(z.double(), head.solver(field, noise.double()), rtol=1e-4, atol=1e-4)


def test_a_diffusion_stays_float32_under_autocast() -> None:
    """Path, loss and chain, as of the flow head."""
    torch.manual_seed(0)
    head, states, answers = DiffusionHead(HoistedNet(4, 8, width=16, depth=2), solver=DDPM(5)), [], []
    nn.init.normal_(head.net.out.weight, std=0.3)
    head.net.embed.register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0]))
    head.net.register_forward_hook(lambda layer, inputs, answer: answers.append(answer))
    cond, x = torch.randn(50, 8), torch.randn(50, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(cond, x, torch.Generator().manual_seed(1))
        z = head.sample(cond, generator=torch.Generator().manual_seed(1))
    assert len(states) == 1 + 5 and all(is_float32(x) for x in [*states, loss, z])
    assert all(answer.dtype == torch.bfloat16 for answer in answers)  # control: autocast is at work
    g = torch.Generator().manual_seed(1)
    alpha, sigma = (a[..., None] for a in alpha_sigma(stratified_uniform(50, 4, g, torch.device("cpu"))))
    noise = torch.randn(4, 50, 4, generator=g)
    torch.testing.assert_close(states[0], alpha * x + sigma * noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, (answers[0].float() - noise).square().mean(dim=(0, -1)), rtol=1e-5, atol=1e-6)
