"""Which device a command computes on, and which number format its matrix products are fast in.

bfloat16 halves the time of a step where the processor multiplies it natively, and multiplies it where it does not
(the products are then emulated), so the choice is made from what the hardware says and never from its name.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if `device` multiplies bfloat16 matrices natively (AVX512-BF16 or AMX on a CPU, Ampere or newer on CUDA)."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16"))
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it natively, float32 elsewhere."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def default_device() -> str:
    """`cuda` where there is one, `cpu` elsewhere: the default of commands that have a --device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hold_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of all linear layers of `module` in `dtype` from now on, for use and not for training.

    Their products are then computed in it, as under autocast, but nothing is converted in every call: a sampler asks
    the same matrices hundreds of times with a handful of rows, and converting costs as much as the products. Norms,
    embeddings and biases stay float32.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)


def held_autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtype that weights are held in; where that is float32, whatever the caller has set up."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
