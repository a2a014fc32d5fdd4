"""Heads: what one latent looks like given its past. Two verbs, `loss` and `sample`, over condition rows.

The transformer runs once per latent and hands over one row; a head turns that row into a distribution. Its members
differ in what they assume of it (Li et al. 2024, "MAR", is the source of the idea):

* `MSEHead`: a Gaussian around one mean, the control.
* `MixtureHead`: a sum of Gaussians, density in closed form, one evaluation.
* `FlowHead`, `DiffusionHead`: any distribution, by several evaluations of a small network (`SolverHead`).
* `CategoricalHead`, `CodebookHead`: symbols, for the latents of a discrete bottleneck and no others.

A head that has a density also answers `log_prob`. What sampling can prepare once for all latents of a picture goes into
a `Plan`. Guidance combines two rows, conditional and unconditional, of velocities, means or logits,
and all compute one half only where one is enough (w = 1 and w = 0).

Letters: M rows, C latent channels, D condition width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec
from stage2_prior.conditions import TrainingData
from stage2_prior.guidance import ALWAYS
from stage2_prior.heads.nets import HeadNet
from stage2_prior.heads.solvers import Field, Solver, check_solver


class HeadError(ValueError):
    """An option, or latents, that a head cannot work with."""


@dataclass
class Plan:
    """How a head samples, prepared once for all latents of a picture: the solver, and its network's time table."""

    solver: Solver | None = None
    table: dict[float, Tensor] = field(default_factory=dict)
    num_evaluations: int = 1


class Head(Spec, nn.Module):
    """Contract of all heads; cond rows are (M, D), latents (M, C).

    has_density: `log_prob` is there.
    """

    latent_dim: int
    cond_dim: int
    has_density = False

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> None:
        """Learn what is fixed about the latents before the first step; `tokenizer` loads the exported one when called.

        Raises HeadError for latents that this head cannot model: a continuous one refuses symbols.
        """
        refuse_symbols(type(self).__name__, data, tokenizer)

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(M, D), (M, C) -> (M,) loss of each row, the mean over channels and draws."""
        raise NotImplementedError

    def plan(self, steps: int | None = None, solver: Solver | None = None) -> Plan:
        """Prepare sampling with `steps` network evaluations per latent, by `solver` (None: the head's own defaults)."""
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

    def log_prob(self, cond: Tensor, x: Tensor, steps: int = 32) -> Tensor:
        """cond (M, D), x (M, C) float32 -> (M,) nats: log density of x (log mass, of a discrete head).

        steps: of a solver, where there is one. Raises HeadError for a head without a density.
        """
        raise HeadError(f"got a {type(self).__name__}, wanted a head that has a density, such as FlowHead.")


def one_evaluation(head: Head, steps: int | None, solver: Solver | None) -> Plan:
    """The plan of a head without a solver. Raises HeadError for a solver, or steps other than 1."""
    if steps not in (None, 1) or solver is not None:
        got = f"steps={steps}" if solver is None else f"the solver {type(solver).__name__}"
        raise HeadError(f"got {got} for a {type(head).__name__}, wanted 1 evaluation and no solver; leave both out.")
    return Plan()


def guided_rows(cond: Tensor, uncond: Tensor | None, guidance: float, interval: tuple[float, float] = ALWAYS) -> Tensor:
    """The condition rows that a guided step needs: cond, uncond or both. Raises HeadError if one is missing.

    Without a condition (guidance 0) at all times, cond is not evaluated; at times outside a narrower interval it is.
    """
    if guidance == 1.0:
        return cond
    if uncond is None:
        raise HeadError(f"got guidance={guidance} without unconditional rows, wanted them, or guidance=1.")
    return uncond if guidance == 0.0 and interval == ALWAYS else torch.cat([cond, uncond])


def refuse_symbols(whose: str, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> None:
    """Raises HeadError where the latents are those of a discrete bottleneck, whose density would be without bound.

    The tokenizer is loaded only where the latents have no noise, as symbols have none.
    """
    some = data.arrays("train", 8)
    if "latents_std" in some and bool(some["latents_std"].any()):
        return
    bottleneck = getattr(tokenizer(), "bottleneck", None)
    if getattr(bottleneck, "rounds", False):
        raise HeadError(
            f"got a {whose} for the latents of a {type(bottleneck).__name__}, which are symbols: it would draw values"
            " between them; use a CategoricalHead."
        )


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

    def field(self, x: Tensor, answer: Tensor, t: float) -> Tensor:
        """What the solver asks for at x (M, C) and t, from the network's answer there, float32."""
        raise NotImplementedError

    def plan(self, steps: int | None = None, solver: Solver | None = None) -> Plan:
        chosen = self.solver if solver is None else solver
        check_solver(chosen, self.answers_with, type(self).__name__)
        chosen = chosen if steps is None else chosen.with_evaluations(steps)
        times = chosen.times()
        rows = self.net.time(torch.tensor(times, device=self.net.out.weight.device))  # (T,·)
        return Plan(chosen, dict(zip(times, rows, strict=True)), len(times))

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
        wants a gradient. Guidance is field_u + w (field_c - field_u) through the network's answers, both halves in one
        call; an answer is linear in the field, so that it may be guided in its place. Errors as `guided_rows`.
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
            return self.field(x, torch.lerp(answer_u, answer_c, guidance), t)

        return field
