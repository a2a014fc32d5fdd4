"""Weights in the number format of the matrix products for as long as a sample takes, converted once.

Autocast keeps a converted weight only where gradients are recorded; elsewhere it converts every weight again in every
call. A sampler asks the same matrices hundreds of times with a handful of rows, and the conversion then costs as much
as the products. The products are the same, bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


@contextmanager
def cast_weights(module: nn.Module) -> Iterator[None]:
    """Hold the weights of all linear layers of `module` in autocast's dtype; afterwards they are what they were.

    Without autocast, or where they are held already, it does nothing: a caller of many short samples may hold them
    around all of these. The module is changed for the time being: no training, and no second thread, inside.
    """
    kind = next(module.parameters()).device.type
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.float32]
    if not torch.is_autocast_enabled(kind):
        layers = []
    weights = [layer.weight for layer in layers]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(weight.detach().to(torch.get_autocast_dtype(kind)), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


def cast_once(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """A module's method, run with `cast_weights` of that module."""

    @wraps(method)
    def held(self: M, *args: P.args, **kw: P.kwargs) -> R:
        with cast_weights(self):
            return method(self, *args, **kw)

    return held
