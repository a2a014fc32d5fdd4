"""What a command decides before it starts: precision, ranks, compilation, memory, which warnings are worth reading."""

import ctypes
import logging
import os
import warnings
from typing import Literal

import torch
from torch import nn

from stage1_tokenizer.precision import has_fast_bfloat16

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]  # weights stay in float32: updates are too small


class UsageError(ValueError):
    """Options that contradict each other or what they are applied to."""


def resolve_precision(precision: Precision, accelerator: str) -> str:
    """Lightning's name of the precision to use on `accelerator` ("auto", "cpu", "cuda", "gpu").

    Raises UsageError for float16.
    """
    cuda = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
    if precision == "auto":
        return "bf16-mixed" if has_fast_bfloat16(torch.device("cuda" if cuda else "cpu")) else "32-true"
    if precision == "16-mixed":
        raise UsageError(
            "got precision 16-mixed: float16 overflows above 65,504, and the steps that its loss scale then leaves out "
            "would count in schedule, average and checkpoints all the same; choose bf16-mixed, 32-true or auto"
        )
    return precision


def check_strategy(strategy: object) -> None:
    """Raises UsageError for a strategy that shards weights (`trainer.strategy`: a name, or a class path and arguments).

    Muon orthogonalises whole matrices, the average and the export are of whole weights; each would need a gather of its
    own. DDP keeps 16 bytes of each weight on a card, 20 where AdamW has it (weight, gradient, momentum or two moments,
    average): 10 GB for the largest config here. Sharding begins to pay at some 4 B weights on cards of 80 GB.
    """
    if any(name in str(strategy).lower() for name in ("fsdp", "deepspeed", "modelparallel", "model_parallel")):
        raise UsageError(
            f"got trainer.strategy={strategy!s:.60}, which shards weights, wanted ddp: Muon, average and export are "
            "of whole matrices. A weight takes 16 to 20 bytes of a card; for activations lower data.batch_size and "
            "raise trainer.accumulate_grad_batches"
        )


def several_ranks(devices: list[int] | str | int, nodes: int, accelerator: str) -> bool:
    """True if a fit with these options of Lightning's trainer, or its launcher (torchrun), uses more than one rank."""
    if nodes > 1 or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return True
    if isinstance(devices, list):
        return len(devices) > 1
    if str(devices) in ("auto", "-1"):
        return accelerator in ("auto", "cuda", "gpu") and torch.cuda.device_count() > 1
    indices = [d for d in str(devices).split(",") if d.strip()]  # "0,1" names two devices, "2" and 2 count them
    return len(indices) > 1 or ("," not in str(devices) and int(devices) > 1)


def compile_networks(networks: nn.Module, backend: str = "inductor") -> int:
    """Compile `networks` in place, keeping the names of its weights; returns the number of compiled modules.

    A module that has a forward of its own is compiled as a whole; one that has none is a container, and its children
    are taken instead.
    """
    if type(networks).forward is not nn.Module.forward:
        networks.compile(backend=backend)
        return 1
    return sum(compile_networks(child, backend) for child in networks.children())


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what is freed for the next tensor; False where this process has another allocator.

    By default every tensor beyond some 100 kB to 32 MB comes from the system and goes back to it, and the first touch
    of each of its pages is a fault: in a virtual machine they take longer than a ReLU or a convolution that writes
    there (tests/benchmarks/LOG.md, 2026-11-27). The process then holds its largest need until it ends.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


def launched_by_another_rank() -> bool:
    """True in a process that another process of the same fit started: what is decided once was decided there."""
    return any(os.environ.get(name, "0") != "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def quieten_lightning() -> None:
    """Leave out what Lightning prints about itself, its products, and this machine's lack of TPUs; keep warnings."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # small sets are held in memory, where workers only cost
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*srun.*",
        ".*GPU available but not used.*",
        ".*your dataloader is not resumable.*",  # the data modules of this project resume exactly
        ".*isinstance.treespec, LeafSpec.*",
        ".*in eval mode at the start of training.*",  # frozen parts, which the lit modules put there
        ".*predict returned None.*",  # predict writes files, it returns nothing
        ".*torch.jit.script. is deprecated.*",  # a library's own use of it
    ):
        warnings.filterwarnings("ignore", message=message)
