"""How a benchmark runs a network on one device: products in its fast format, a call, a training step, torch.compile.

Needs torch and this package's models, no training framework, so that it works where nothing else is installed.
"""

from collections.abc import Callable
from typing import Any

import torch

from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups


class Machine:
    """One device. Products are in the format that it multiplies fast; the same optimiser trains everything."""

    def __init__(self, device: torch.device):
        self.device, self.dtype = device, matmul_dtype(device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def used(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """A call without gradients."""

        def call() -> Any:
            with torch.inference_mode(), self.autocast():
                return function(*arguments)

        return call

    def trained(self, module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        """One training step: forward, backward, optimiser. Rates are so small that weights stay where they are."""
        optimizer = MuonAdamW(parameter_groups(module), lr=1e-6, matrix_lr=1e-6)

        def step() -> None:
            with self.autocast():
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By inductor; on a GPU its graphs are captured, too."""
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        compiled: Callable[..., Any] = torch.compile(function, dynamic=False, mode=mode)
        return compiled
