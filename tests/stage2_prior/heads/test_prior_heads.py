"""Do trained heads draw from the right distribution? Four toys in the plane, one head for all, tests of two samples.

The toys are conditional: the condition row says which one. Each claim comes with a control that must fail.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.flow import interpolate, stratified_uniform, velocity
from stage2_prior.heads.base import Head, HeadError
from stage2_prior.heads.categorical import CategoricalHead
from stage2_prior.heads.ddpm import DDPM, alpha_sigma
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.flow import CleanOutput, FlowHead, NoiseOutput, VelocityOutput
from stage2_prior.heads.mixture import MixtureHead
from stage2_prior.heads.mse import MSEHead
from stage2_prior.heads.nets import AdaLNNet, AddedConditionNet, HeadNet, HoistedNet
from stage2_prior.heads.solvers import Midpoint
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


# -- without training -------------------------------------------------------------------------------------------------


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


def test_rows_that_share_their_times_must_fill_groups() -> None:
    head = FlowHead(HoistedNet(2, 4), rows_per_time=3)
    assert head.loss(torch.randn(6, 4), torch.randn(6, 2)).shape == (6,)
    with pytest.raises(HeadError, match="multiple of rows_per_time"):
        head.loss(torch.randn(7, 4), torch.randn(7, 2))


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


# -- diffusion --------------------------------------------------------------------------------------------------------


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
