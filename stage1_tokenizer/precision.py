"""Which device a command computes on, and which number format its matrix products are fast in.

bfloat16 halves the time of a step where the processor multiplies it natively, and multiplies it where it does not
(the products are then emulated), so the choice is made from what the hardware says and never from its name.
"""

import torch


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
