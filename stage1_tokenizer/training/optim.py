"""One optimizer for a whole network: Muon for its matrices, AdamW for everything else, and the schedule of both.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
semi-orthogonal matrix, found with a few Newton-Schulz steps. In the small networks of both stages it reaches in N steps
what AdamW reaches in about two N. It suits hidden matrices only; embeddings, biases, gains, and maps in and out of
the hidden width stay with AdamW. A hidden convolution is the matrix (output channels, inputs x kernel).

Which parameter goes where is written on it when it is born: `parameter.group` is "matrix" (Muon), "decay" (AdamW
with weight decay) or "plain" (AdamW without; also what a parameter without the attribute gets). Both rules live in one
`Optimizer`, so a training loop sees one `step` per batch and one learning-rate schedule.

What makes a step cheap: matrices of one shape are stacked into one batched product, tall ones are transposed to join
the wide ones, products run in bfloat16, and AdamW runs in torch's fused kernel. With 60 matrices of 128 x 128 to
128 x 512 (2.1 M parameters) a step takes 12 ms on 2 cores, 8 of them in the products. Iterating on the Gram matrix
alone would save a third of that for wide matrices; in bfloat16 it fails from a condition number of 100 on (singular
values of 4 and more come out), so it is not done.

Letters: m rows, n columns (m <= n), S matrices of one shape in a stack.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stage1_tokenizer.precision import matmul_dtype

GROUPS = ("matrix", "decay", "plain")

# The quintic of Jordan's reference code: steep at zero; 5 steps bring singular values into about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of `module`, one group per entry of `GROUPS` that occurs, ready for `MuonAdamW`.

    Raises ValueError if a parameter carries an unknown group, has lost its own, or is marked "matrix" and is no matrix.
    """
    for name, part in module.named_modules():
        if hasattr(part, "group") and not hasattr(part.weight, "group"):
            raise ValueError(
                f"the weight of '{name}' has lost its group, as in a deep copy of a network, wanted it marked: build "
                "the network anew and load the state of the first one."
            )
    members: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group = getattr(parameter, "group", "plain")
        if group not in members:
            raise ValueError(f"parameter '{name}' has group '{group}'; expected one of {', '.join(GROUPS)}")
        if group == "matrix" and parameter.ndim < 2:
            raise ValueError(
                f"parameter '{name}' of shape {tuple(parameter.shape)} is in group 'matrix', which takes matrices and "
                "convolutions only; put it in 'decay' or 'plain'"
            )
        members[group].append(parameter)
    return [{"params": parameters, "group": group} for group, parameters in members.items() if parameters]


def orthogonalize(stack: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The semi-orthogonal matrix nearest to each matrix of a stack, approximately: (S, m, n) -> (S, m, n) in `dtype`.

    Newton-Schulz iteration of Jordan's Muon: singular values end between about 0.7 and 1.2, which is enough, and all
    products may run in bfloat16. Needs m <= n (transpose first: the cost grows with the square of m).
    """
    if stack.shape[-2] > stack.shape[-1]:
        raise ValueError(f"got matrices of shape {tuple(stack.shape[-2:])}, taller than wide; transpose them first")
    a, b, c = NEWTON_SCHULZ
    x = stack.to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # the norm accumulates in float32
    for _ in range(steps):
        gram = x @ x.mT  # (S, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def planned_steps(trainer: Any, accumulate: int = 1) -> int | None:
    """Optimizer steps that a fit will take; None where neither steps nor epochs limit it (say, `max_time` alone).

    trainer: of Lightning, within `configure_optimizers`. accumulate: batches per step where the module itself adds
    gradients up, which the trainer cannot know of; a window that the end of an epoch cuts short is a step as well.
    """
    planned = trainer.estimated_stepping_batches  # it reads the data, so that the number of batches is known below
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if accumulate > 1 and epochs not in (None, -1) and math.isfinite(batches):
        by_epochs = math.ceil(batches / accumulate) * max(epochs, 1)
        planned = by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps)
    return int(planned) if math.isfinite(planned) and planned > 0 else None


def configured_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each parameter group was built with, `lr` before any schedule; for `restore_options`."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [group | {"lr": group.get("initial_lr", group["lr"])} for group in groups]


def restore_options(
    optimizer: torch.optim.Optimizer, options: list[dict[str, Any]], schedule: torch.optim.lr_scheduler.LambdaLR | None
) -> None:
    """Give each parameter group its `configured_options` again, with the factor that `schedule` has reached on `lr`.

    torch stores rates and weight decays in the states of optimizers and schedules, so that loading one undoes what a
    resumed fit was configured with. Where nothing was changed, this changes nothing, to the last bit.
    """
    if schedule is not None:
        if type(schedule.last_epoch) is not int or type(schedule._step_count) is not int:
            raise TypeError(f"the schedule's step is {schedule.last_epoch!r:.40}")
        schedule.optimizer, schedule.base_lrs = optimizer, [configured["lr"] for configured in options]
    for index, (group, configured) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        group.update(configured)
        if schedule is not None:
            group["lr"] = configured["lr"] * schedule.lr_lambdas[index](schedule.last_epoch)


def warmup_flat_cosine(
    step: int,
    total_steps: int | None,
    warmup_steps: int = 30,
    flat_fraction: float = 0.3,
    final_fraction: float = 0.01,
) -> float:
    """Factor on the learning rate at `step` of `total_steps`: linear warm-up, flat, then a cosine down to the end.

    `flat_fraction` of all steps passes before the cosine begins; `final_fraction` is the factor of the last step and of
    every step after it. A run too short for its warm-up gives it at most a tenth of its steps. Without a known end
    (`total_steps` None) the rate stays where the warm-up took it.
    """
    if total_steps is None:
        return min((step + 1) / (warmup_steps + 1), 1.0)
    if total_steps < 1:
        raise ValueError(f"got total_steps={total_steps}; a schedule needs at least 1 step")
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, flat_fraction * total_steps)
    progress = min(max((step - start) / max(total_steps - 1 - start, 1), 0.0), 1.0)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the group "matrix", AdamW for "decay" and "plain"; give it `parameter_groups(module)`.

    Muon: Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns)) x `matrix_lr` (Jordan's scale: the
    update then changes activations by about the same amount whatever the shape). AdamW: `lr`, with the norm of all its
    gradients together clipped to `adamw_clip` first; Muon needs no clipping, its update has a fixed size.
    Nothing in a step waits for the device. The clipping scales the AdamW gradients in place.

    Raises ValueError for a group without the key "group" or a rate out of range.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 2.5e-3,
        matrix_lr: float = 0.012,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        matrix_weight_decay: float = 0.0,
        adamw_clip: float = 1.0,
        newton_schulz_steps: int = 5,
    ) -> None:
        for name, rate in (("lr", lr), ("matrix_lr", matrix_lr), ("adamw_clip", adamw_clip)):
            if not rate > 0:
                raise ValueError(f"got {name}={rate}; expected a number above 0 (float('inf') switches clipping off)")
        groups = [dict(group) for group in params]
        for group in groups:
            if group.get("group") not in GROUPS:
                raise ValueError(
                    "a parameter group has no 'group' entry; build the groups with parameter_groups(module)"
                )
            matrix = group["group"] == "matrix"
            group.setdefault("lr", matrix_lr if matrix else lr)
            decay = {"matrix": matrix_weight_decay, "decay": weight_decay, "plain": 0.0}[group["group"]]
            group.setdefault("weight_decay", decay)
            group["fused"] = not matrix  # torch then keeps the step counts on the device when a state is loaded
        super().__init__(groups, {})
        self.betas, self.eps, self.momentum = betas, eps, momentum
        self.adamw_clip, self.newton_schulz_steps = adamw_clip, newton_schulz_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        self._clip([g for group, params in groups if group["group"] != "matrix" for g in _gradients(params)])
        for group, params in groups:
            if params:
                (self._step_muon if group["group"] == "matrix" else self._step_adamw)(group, params)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Raises ValueError where what is stored of a parameter is not of its shape."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            wanted = {"momentum"} if group["group"] == "matrix" else {"step", "exp_avg", "exp_avg_sq"}
            for p in group["params"]:
                state = self.state[p]
                shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
                right = {name: torch.Size() if name == "step" else p.shape for name in wanted}
                if state and shapes != right:
                    raise ValueError(
                        "the optimiser's state does not fit this configuration: that of a parameter of shape "
                        f"{tuple(p.shape)} has {shapes}."
                    )

    def _clip(self, grads: list[Tensor]) -> None:
        """Scale `grads` in place so that their common norm is at most `adamw_clip`, without reading it on the host."""
        if grads and math.isfinite(self.adamw_clip):
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_mul_(grads, (self.adamw_clip / (norm + 1e-6)).clamp(max=1.0))

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [self.state[p] for p in params]
        adamw(
            params,
            _gradients(params),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )

    def _step_muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        grads = _gradients(params)
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        directions = torch._foreach_lerp(grads, buffers, self.momentum)  # Nesterov: look one step ahead

        matrices = [direction.flatten(1) for direction in directions]  # convolutions: (outputs, inputs x kernel)
        stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            stacks[(min(matrix.shape), max(matrix.shape))].append(index)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for members in stacks.values():
            tall = [matrices[i].shape[0] > matrices[i].shape[1] for i in members]
            stack = torch.stack([matrices[i].mT if t else matrices[i] for i, t in zip(members, tall, strict=True)])
            updates = orthogonalize(stack, self.newton_schulz_steps, matmul_dtype(stack.device))  # (S, m, n)
            for i, t, update in zip(members, tall, updates, strict=True):
                rows, columns = matrices[i].shape
                scale = math.sqrt(max(1.0, rows / columns))
                params[i].add_((update.mT if t else update).reshape(params[i].shape), alpha=-group["lr"] * scale)


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]
