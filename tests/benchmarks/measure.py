"""How a benchmark measures: median time, model FLOPs, and the share of what this process's matmuls reach.

FLOPs are those of the matrix products (two per multiply-add), counted by torch while the function runs once, with
attention written out so that the counter sees it; elementwise work is not in them. The peak is what one large square
product reaches in the same process, with the same threads and number format, so a share says how far a step is from
the best this machine does at that moment, and not from a data sheet.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PEAK_SIDE = 2048


@dataclass(frozen=True)
class Row:
    """One line of the table; FLOPs are per picture and per second, both counted as above."""

    name: str
    batch: int
    milliseconds: float
    images_per_second: float
    flops_per_image: float
    flops_per_second: float
    share_of_peak: float


def measure(
    name: str, function: Callable[[], Any], batch: int, peak: float, device: torch.device, seconds: float
) -> Row:
    """Run `function`, which handles `batch` pictures, for about `seconds` (three times at least); medians."""
    function()  # allocations and caches
    flops = count_flops(function)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return Row(name, batch, 1e3 * median, batch / median, flops / batch, flops / median, flops / median / peak)


def count_flops(function: Callable[[], Any]) -> float:
    """FLOPs of the matrix products of one call, backward included if the call has one."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return float(counter.get_total_flops())


def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 15) -> float:
    """FLOPs per second of a large square matrix product: the median of `repeats`."""
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * PEAK_SIDE**3 / statistics.median(times[3:])


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    cells = [["", "batch", "ms", "images/s", "MFLOP/image", "GFLOP/s", "of peak"]]
    for r in rows:
        speeds = [f"{r.milliseconds:.1f}", f"{r.images_per_second:.0f}", f"{r.flops_per_image / 1e6:.1f}"]
        cells.append([r.name, str(r.batch), *speeds, f"{r.flops_per_second / 1e9:.0f}", f"{r.share_of_peak:.1%}"])
    return "\n".join(f"{row[0]:26}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in cells)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
