"""The flow head: a velocity field that carries noise to the latent, so that any distribution fits.

A squared error would say: a Gaussian around one mean. Here the small network learns v on the linear path from data to
noise (Liu et al. 2022, instead of the cosine schedule of Li et al. 2024, "MAR"), and sampling walks it with a solver.

Choices, with reasons:
* Several draws of t per latent share one condition: the expensive row is computed once.
* t is logit-normal and stratified over a latent's draws: most of what a field must learn is at middle times, and
  strata halve the noise of the loss for nothing.
* The path, the loss and the solver are float32; only matrix products may be bfloat16 (autocast of the caller).
* What the network answers with is one thing (`output`), what is learned another: the loss is on v, but for
  `NextLevelOutput`.

Letters: M rows, C latent channels, D condition width, S draws of t, G groups of s rows that share their draws.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.flow import interpolate, logit_normal_times, v_from_noise, v_from_x, velocity
from stage1_tokenizer.spec import Spec
from stage2_prior.heads.base import HeadError, SolverHead
from stage2_prior.heads.chain import Step, level_below, step
from stage2_prior.heads.nets import HeadNet
from stage2_prior.heads.solvers import Midpoint, Solver
from stage2_prior.likelihood import half_step_times, ode_log_prob

LEAST_TIME = (
    1e-3  # of a conversion that no loss goes through, so that nothing is learned that would make up for a floor
)


class VelocityOutput(Spec, nn.Module):
    """The network's answer is v itself."""

    def forward(self, x_t: Tensor, answer: Tensor, t: Tensor | float) -> Tensor:
        """The velocity that an answer (...,C) at x_t and t implies."""
        return answer

    def error(
        self, x: Tensor, noise: Tensor, answer: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """What is minimised, (...,C), of answers at (1 - t) x + t noise; t (...,1)."""
        return (self(interpolate(x, noise, t), answer, t) - velocity(x, noise)).square()


class CleanOutput(VelocityOutput):
    """The network's answer is the data; v follows by the path's algebra."""

    def forward(self, x_t: Tensor, answer: Tensor, t: Tensor | float) -> Tensor:
        return v_from_x(x_t, answer, t)


class NoiseOutput(VelocityOutput):
    """The network's answer is the noise; v follows by the path's algebra."""

    def forward(self, x_t: Tensor, answer: Tensor, t: Tensor | float) -> Tensor:
        return v_from_noise(x_t, answer, t)


class NextLevelOutput(VelocityOutput):
    """The network's answer is the next cleaner of `levels` noise levels, and the loss is on that: see `heads.chain`."""

    def __init__(self, levels: int = 10):
        super().__init__()
        if levels < 1:
            raise HeadError(f"got levels={levels}, wanted at least 1 noise level.")
        self.levels = levels

    def step(self, t: Tensor) -> Step:
        s = level_below(t, self.levels)
        return step(1 - t, t, 1 - s, s)

    def forward(self, x_t: Tensor, answer: Tensor, t: Tensor | float) -> Tensor:
        at = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).clamp(min=LEAST_TIME)
        return v_from_x(x_t, self.step(at).data_from_mean(x_t, answer), at, floor=LEAST_TIME)

    def error(
        self, x: Tensor, noise: Tensor, answer: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return (answer - self.step(t).sample(x, interpolate(x, noise, t), generator)).square()


Output = VelocityOutput | CleanOutput | NoiseOutput | NextLevelOutput


class FlowHead(SolverHead):
    """Velocity regression on the linear path.

    Args:
        net: the network, with latent width C and condition width D.
        output: what the network's answer means, and with it the loss.
        solver: default solver of `sample` (None: midpoint x 4).
        draws: draws of t per latent and step.
        time_mean, time_std: of logit(t); a larger mean trains more at high noise.
        rows_per_time: so many consecutive rows share their draws of t (all latents of a picture, say), which makes the
            time side of the network that much cheaper. Must divide the number of rows.
    """

    has_density = True

    def __init__(
        self,
        net: HeadNet,
        output: Output | None = None,
        solver: Solver | None = None,
        draws: int = 4,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        rows_per_time: int = 1,
    ):
        super().__init__(net, Midpoint() if solver is None else solver, draws)
        if rows_per_time < 1 or time_std <= 0:
            raise HeadError(
                f"got rows_per_time={rows_per_time}, time_std={time_std}; wanted at least 1 row and a time_std above 0."
            )
        self.output: Output = VelocityOutput() if output is None else output
        self.time_mean, self.time_std, self.rows_per_time = time_mean, time_std, rows_per_time

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows, shared = target.shape[0], self.rows_per_time
        if rows % shared:
            raise HeadError(f"got {rows} rows, wanted a multiple of rows_per_time={shared}; set rows_per_time to 1.")
        groups = (rows // shared, shared)
        x = target.float().unflatten(0, groups)  # (G,s,C)
        t = logit_normal_times(
            groups[0], self.draws, device=x.device, mean=self.time_mean, std=self.time_std, generator=generator
        ).unsqueeze(-1)  # (S,G,1)
        noise = torch.randn(self.draws, *x.shape, generator=generator, device=x.device)  # (S,G,s,C)
        x_t = interpolate(x, noise, t.unsqueeze(-1))  # (S,G,s,C)
        condition = self.net.condition(cond).unflatten(0, groups)  # (G,s,·)
        answer = self.net(x_t, self.net.time(t), condition).float()  # (S,G,s,C)
        return self.output.error(x, noise, answer, t.unsqueeze(-1), generator).mean(dim=(0, -1)).flatten()  # (M,)

    def field(self, x: Tensor, answer: Tensor, t: float) -> Tensor:
        return self.output(x, answer, t)

    @torch.no_grad()
    def log_prob(self, cond: Tensor, x: Tensor, steps: int = 32) -> Tensor:
        """As `Head.log_prob`, by `steps` Runge-Kutta steps (see `likelihood`). Errors as `half_step_times`."""
        times = half_step_times(steps)
        condition, table = self.net.condition(cond), self.net.time(torch.tensor(times, device=x.device))

        def field(x: Tensor, i: int) -> Tensor:
            return self.output(x, self.net(x, table[i], condition).float(), times[i])

        return ode_log_prob(field, x, steps)
