"""AMED: a few-step solver with a learned mean direction, distilled on a trained head (Zhou et al. 2024).

Between two times of a grid there is some point whose velocity points along the chord of the true trajectory; the mean
value theorem says nothing about where, so it is learned: an Euler step to `where` of the interval, the velocity there
times `scale`, and with it the whole interval. Midpoint is the same with where = 1/2 and scale = 1. The teacher is the
same head with many steps on the same noise.

The paper's predictor looks at the network's bottleneck for every sample. Here two numbers per interval are learned for
all samples: the solver's times then stay known beforehand, so that a head can tabulate them.

    python -m stage2_prior.amed --run_dir runs/demo --steps 4      # writes runs/demo/prior_amed
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from data.datamodule import LatentDataModule
from stage2_prior.contract import Prior
from stage2_prior.heads import FlowHead, HeadError
from stage2_prior.prior import CausalPrior
from stage2_prior.prior_data import askable
from stage2_prior.samplers import Field, Midpoint, Solver, power_grid
from stage2_prior.sweep import default_device


class AMED(Solver):
    """Two evaluations a step at learned places; as constructed it is midpoint. `fit_amed` learns the places."""

    per_step = 2

    def __init__(self, steps: int = 2, power: float = 1.5):
        super().__init__(steps, power)
        self.where = nn.Parameter(torch.full((steps,), 0.5))
        self.scale = nn.Parameter(torch.ones(steps))
        self.known: tuple[tuple[int, ...], list[tuple[float, float]]] = ((), [])

    def places(self) -> list[tuple[float, float]]:
        """(where, scale) of every interval as numbers, read from the device again only after they changed."""
        version = (self.where.data_ptr(), self.where._version, self.scale.data_ptr(), self.scale._version)
        if self.known[0] != version:
            self.known = (version, list(zip(self.where.tolist(), self.scale.tolist(), strict=True)))
        return self.known[1]

    def forward(
        self, field: Field, x: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        for (t, s), (where, scale) in zip(pairwise(self.grid()), self.places(), strict=True):
            middle = t - where * (t - s)
            x = x - (t - s) * scale * field(x - (t - middle) * field(x, t), middle)
        return x

    def with_evaluations(self, evaluations: int) -> Solver:
        """This solver if it costs that much; what was learned for one grid is worth nothing on another."""
        if evaluations != self.evaluations:
            raise HeadError(f"got steps={evaluations}, wanted {self.evaluations}: AMED was distilled for that many.")
        return self

    def trace(self, field: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """`forward` with gradients to `where` and `scale`; the field is asked at tensors of time."""
        for i, (t, s) in enumerate(pairwise(power_grid(self.steps, self.power))):
            middle = t - self.where[i] * (t - s)
            ahead = x - (t - middle) * field(x, x.new_tensor(t))
            x = x - (t - s) * self.scale[i] * field(ahead, middle)
        return x


def fit_amed(
    head: FlowHead,
    cond: Tensor,
    steps: int = 2,
    iterations: int = 150,
    batch: int = 512,
    generator: torch.Generator | None = None,
) -> AMED:
    """Distil an AMED solver of `steps` intervals on condition rows (M, D) that the head will meet.

    Minimises the squared distance of its end points to those of midpoint x 32 from the same noise.
    """
    solver, teacher = AMED(steps).to(cond.device), Midpoint(steps=32)
    optimizer = torch.optim.Adam(solver.parameters(), lr=0.02)
    plan = head.plan(teacher.evaluations) if isinstance(head.solver, Midpoint) else None
    trained = [p for p in head.parameters() if p.requires_grad]
    head.requires_grad_(False)
    for step in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / iterations)
        rows = torch.randint(len(cond), (batch,), generator=generator, device=cond.device)
        condition = head.net.condition(cond[rows])
        noise = torch.randn(batch, head.latent_dim, generator=generator, device=cond.device)

        def field(x: Tensor, t: Tensor, condition: Tensor = condition) -> Tensor:
            return head.velocity(x, head.net.time(t), condition, t)

        with torch.no_grad():
            table = plan.table if plan is not None else {}

            def known(x: Tensor, t: float, condition: Tensor = condition, table: dict[float, Tensor] = table) -> Tensor:
                time = table[t] if t in table else head.net.time(torch.tensor(t, device=x.device))
                return head.velocity(x, time, condition, t)

            target = teacher(known, noise)
        loss = (solver.trace(field, noise) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            solver.where.clamp_(0.05, 0.95)
    for parameter in trained:
        parameter.requires_grad_(True)
    return solver.requires_grad_(False)


def main(arguments: list[str] | None = None) -> Path:
    """Distil on the condition rows of held-out latents and export the prior with its new default solver."""
    parser = argparse.ArgumentParser(prog="python -m stage2_prior.amed", description="Distil a few-step solver.")
    parser.add_argument("--run_dir", type=Path, required=True, help="run with prior/ and latents/")
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the head per latent, even")
    parser.add_argument("--lines", type=int, default=500, help="held-out lines whose condition rows are used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.steps % 2:
        parser.error(f"got --steps {options.steps}, wanted an even number of at least 2")
    prior = Prior.from_pretrained(options.run_dir / "prior").to(options.device)
    if not isinstance(prior, CausalPrior) or not isinstance(prior.head, FlowHead):
        parser.error(f"{options.run_dir / 'prior'} has no flow head to distil on")
    data = LatentDataModule(str(options.run_dir / "latents"))
    info = data.latent_info
    prior.check_space(info["num_latents"], info["latent_dim"], info["tokenizer_fingerprint"])
    held, captions = askable(prior.words.ask, data.arrays("val", options.lines))
    torch.manual_seed(options.seed)
    with torch.no_grad():
        z = held["latents"] + held["latents_std"] * torch.randn(held["latents"].shape)
        cond = prior.conditions(z.to(options.device), prior.encode_text(captions))
    solver = fit_amed(prior.head, cond.flatten(0, 1), options.steps // 2)
    prior.head.solver = solver
    prior.spec["init_args"]["head"]["init_args"]["solver"] = solver.spec
    folder = prior.save_pretrained(options.run_dir / "prior_amed")
    places = ", ".join(f"{w:.3f} x {c:.3f}" for w, c in zip(solver.where.tolist(), solver.scale.tolist(), strict=True))
    print(f"AMED with {options.steps} evaluations (where x scale: {places}): {folder}")
    return folder


if __name__ == "__main__":
    from stage2_prior.amed import main as run  # not this module: an export must not name a class of `__main__`

    run()
