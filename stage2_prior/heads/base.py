"""Heads: what one latent looks like given its past. Two verbs, `loss` and `sample`, over condition rows.

A squared error would say: a Gaussian around one mean, and its samples are that mean (or that mean plus noise). Real
latents given a past are neither. The flow head learns a velocity field that carries noise to the latent, so that any
distribution fits; the transformer runs once per latent, the small network of the head several times (Li et al. 2024,
"MAR", with the linear path of Liu et al. 2022 instead of a cosine schedule). `MSEHead` is the control.

Choices, with reasons:
* Several draws of t per latent share one condition: the expensive row is computed once.
* t is logit-normal and stratified over a latent's draws: most of what a field must learn is at middle times, and
  strata halve the noise of the loss for nothing.
* The path, the loss and the solver are float32; only matrix products may be bfloat16 (autocast of the caller).
* Guidance is v = v_u + w (v_c - v_u), both halves in one call of the network. w = 1 and w = 0 need one half only and
  compute only that one; outside the guidance interval the other half is skipped, too.

Letters: M rows, C latent channels, D condition width, S draws of t.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.flow import interpolate, logit_normal_times, v_from_noise, v_from_x, velocity
from stage1_tokenizer.layers import decayed
from stage1_tokenizer.spec import Spec
from stage2_prior.guidance import ALWAYS
from stage2_prior.heads.nets import HeadNet
from stage2_prior.heads.solvers import Field, Midpoint, Solver, check_solver


class HeadError(ValueError):
    """An option that a head cannot work with."""


@dataclass
class Plan:
    """How a head samples, prepared once for all latents of a picture: the solver, and its network's time table."""

    solver: nn.Module | None = None
    table: dict[float, Tensor] = field(default_factory=dict)
    evaluations: int = 0


class Head(Spec, nn.Module):
    """Contract of all heads; cond rows are (M, D), latents (M, C)."""

    latent_dim: int
    cond_dim: int

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(M, D), (M, C) -> (M,) loss of each row, the mean over channels and draws."""
        raise NotImplementedError

    def plan(self, steps: int | None = None) -> Plan:
        """Prepare sampling with `steps` network evaluations per latent (None: the head's own default)."""
        raise NotImplementedError

    def sample(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        *,
        interval: tuple[float, float] = ALWAYS,
        plan: Plan | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(M, D) -> (M, C) float32. `guidance` != 1 needs `uncond` (M, D); it acts at times within `interval`."""
        raise NotImplementedError


def guided_rows(cond: Tensor, uncond: Tensor | None, guidance: float, interval: tuple[float, float] = ALWAYS) -> Tensor:
    """The condition rows that a guided step needs: cond, uncond or both. Raises HeadError if one is missing.

    Without a condition (guidance 0) at all times, cond is not asked; at times outside a narrower interval it is.
    """
    if guidance == 1.0:
        return cond
    if uncond is None:
        raise HeadError(f"got guidance={guidance} without unconditional rows, wanted them, or guidance=1.")
    return uncond if guidance == 0.0 and interval == ALWAYS else torch.cat([cond, uncond])


class SolverHead(Head):
    """What heads share that walk from noise to a latent along their network's answers.

    Raises SamplerError for a solver that asks for what the head does not answer with (`answers_with`).

    Args:
        net: the network, with latent width C and condition width D.
        solver: default solver of `sample`.
        draws: draws of t per latent and training step.
    """

    answers_with = "velocity"

    def __init__(self, net: HeadNet, solver: Solver, draws: int):
        super().__init__()
        check_solver(solver, self.answers_with, type(self).__name__)
        if draws < 1:
            raise HeadError(f"got draws={draws}, wanted at least 1 draw of t per latent.")
        self.net, self.latent_dim, self.cond_dim = net, net.latent_dim, net.cond_dim
        self.solver, self.draws = solver, draws

    def field(self, x: Tensor, answer: Tensor, t: float) -> Any:
        """What the solver asks for at x (M, C) and t, from the network's answer there, float32."""
        raise NotImplementedError

    def guided(self, answer_c: Tensor, answer_u: Tensor, guidance: float) -> Tensor:
        """The two answers as one; every answer is linear in the velocity, so that it may be guided in its place."""
        return torch.lerp(answer_u, answer_c, guidance)

    def plan(self, steps: int | None = None) -> Plan:
        return self.plan_with(self.solver if steps is None else self.solver.with_evaluations(steps))

    def plan_with(self, solver: Solver) -> Plan:
        """`plan` for another solver than the head's own."""
        times = solver.times()
        rows = self.net.time(torch.tensor(times, device=self.net.out.weight.device))  # (T,·)
        return Plan(solver, dict(zip(times, rows, strict=True)), len(times))

    def sample(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        *,
        interval: tuple[float, float] = ALWAYS,
        plan: Plan | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        plan = self.plan() if plan is None else plan
        field = self.field_of(cond, uncond, guidance, interval, plan.table.__getitem__)
        noise = torch.randn(len(cond), self.latent_dim, generator=generator, device=cond.device) * temperature
        assert plan.solver is not None, "the plan of a head with a solver"
        return plan.solver(field, noise, generator, temperature)

    def field_of(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        interval: tuple[float, float] = ALWAYS,
        time_of: Callable[[float], Tensor] | None = None,
    ) -> Field:
        """What a solver walks along: (x (M,C), t) -> (M,C) float32, given condition rows (M,D).

        `time_of` gives the network's time of t, from a table, say; None computes it, and t may then be a tensor that
        wants a gradient. Other arguments and errors as `guided_rows`.
        """
        rows = guided_rows(cond, uncond, guidance, interval)
        condition = self.net.condition(rows)  # (M,·) or, guided, (2M,·)
        m, guided = len(cond), len(rows) > len(cond)
        if time_of is None:

            def time_of(t: Tensor | float) -> Tensor:
                return self.net.time(torch.as_tensor(t, dtype=torch.float32, device=cond.device))

        def field(x: Tensor, t: float) -> Any:
            time = time_of(t)
            if not (guided and interval[0] <= t <= interval[1]):
                return self.field(x, self.net(x, time, condition[:m]).float(), t)
            answer_c, answer_u = self.net(torch.cat([x, x]), time, condition).float().chunk(2)
            return self.field(x, self.guided(answer_c, answer_u, guidance), t)

        return field


class VelocityOutput(Spec, nn.Module):
    """The network's answer is v itself."""

    def forward(self, x_t: Tensor, answer: Tensor, t: Tensor | float) -> Tensor:
        return answer


class CleanOutput(Spec, nn.Module):
    """The network's answer is the data; v follows by the path's algebra."""

    def forward(self, x_t: Tensor, answer: Tensor, t: Tensor | float) -> Tensor:
        return v_from_x(x_t, answer, t)


class NoiseOutput(Spec, nn.Module):
    """The network's answer is the noise; v follows by the path's algebra."""

    def forward(self, x_t: Tensor, answer: Tensor, t: Tensor | float) -> Tensor:
        return v_from_noise(x_t, answer, t)


Output = VelocityOutput | CleanOutput | NoiseOutput


class FlowHead(SolverHead):
    """Velocity regression on the linear path.

    Args:
        net: the network, with latent width C and condition width D.
        output: what the network's answer means; the loss is on the velocity in any case.
        solver: default solver of `sample` (None: midpoint x 4).
        draws: draws of t per latent and step.
        time_mean, time_std: of logit(t); a larger mean trains more at high noise.
        rows_per_time: so many consecutive rows share their draws of t (all latents of a picture, say), which makes the
            time side of the network that much cheaper. Must divide the number of rows.
    """

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
        if rows_per_time < 1 or time_std <= 0 or net.answers != 1:
            raise HeadError(
                f"got rows_per_time={rows_per_time}, time_std={time_std} and a network with {net.answers} answers; want"
                " rows_per_time at least 1, time_std above 0 and 1 answer, the velocity."
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
        v = self.output(x_t, answer, t.unsqueeze(-1))
        return (v - velocity(x, noise)).square().mean(dim=(0, -1)).flatten()  # (M,)

    def velocity(self, x: Tensor, time: Tensor, condition: Tensor, t: Tensor | float) -> Tensor:
        """The field at x (M, C) and t, float32, from the network's prepared time and condition."""
        return self.output(x, self.net(x, time, condition).float(), t)

    def field(self, x: Tensor, answer: Tensor, t: float) -> Tensor:
        return self.output(x, answer, t)


class MSEHead(Head):
    """The Gaussian assumption: predict the mean, add noise of one fixed size (the control).

    Args:
        latent_dim, cond_dim: C and D.
        sigma: standard deviation of the noise that `sample` adds; 0 returns the mean (as Emu2 does).
    """

    def __init__(self, latent_dim: int, cond_dim: int, sigma: float = 0.0, width: int = 320):
        super().__init__()
        if sigma < 0:
            raise HeadError(f"got sigma={sigma}, wanted 0 or a positive standard deviation.")
        self.latent_dim, self.cond_dim, self.sigma = latent_dim, cond_dim, sigma
        self.net = nn.Sequential(decayed(nn.Linear(cond_dim, width)), nn.SiLU(), decayed(nn.Linear(width, latent_dim)))

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (self.net(cond).float() - target.float()).square().mean(-1)  # (M,)

    def plan(self, steps: int | None = None) -> Plan:
        if steps not in (None, 1):
            raise HeadError(f"got steps={steps}, wanted 1: an MSE head answers in one evaluation.")
        return Plan(evaluations=1)

    def sample(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        *,
        interval: tuple[float, float] = ALWAYS,
        plan: Plan | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        rows = guided_rows(cond, uncond, guidance)
        mean = self.net(rows).float()
        if len(rows) > len(cond):
            mean_c, mean_u = mean.chunk(2)
            mean = torch.lerp(mean_u, mean_c, guidance)
        draw = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + self.sigma * temperature * draw
