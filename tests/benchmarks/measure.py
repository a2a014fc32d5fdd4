"""How a benchmark measures: contenders take turns in one process, and what is quoted is a ratio.

FLOPs are those of the matrix products (two per multiply-add), counted by torch while the function runs once, with
attention written out so that the counter sees it; elementwise work is not in them. In every turn the machine's own
matrix product is timed, too, then each contender once: a share of the peak and a ratio to the baseline compare what ran
within seconds of each other, and a busy machine slows both sides. Medians over the turns.

The clock is the processor time of the process where one thread computes on a CPU (what other programs take is not
counted), events on a GPU, and wall time elsewhere.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the peak


@dataclass(frozen=True)
class Row:
    """One contender in one contest; FLOPs and memory as above, memory in bytes beyond what the models hold."""

    contest: str
    name: str
    batch: int
    milliseconds: float
    images_per_second: float
    flops_per_image: float
    share_of_peak: float
    peak_bytes: int
    ratio: float  # pictures a second of this one / of the contest's baseline; 1 for the baseline
    baseline: str


@dataclass(frozen=True)
class Contender:
    """`function` handles `batch` pictures in a call; `scale` calls of it are what the row is about."""

    function: Callable[[], Any]
    batch: int
    scale: float = 1.0


def compete(
    contest: str, contenders: dict[str, Contender], dtype: torch.dtype, device: torch.device, turns: int
) -> list[Row]:
    """Rows of `contenders`, of which the first is the baseline, after `turns` turns and one for warming up."""
    flops = {name: count_flops(c.function) * c.scale for name, c in contenders.items()}
    memory = {name: peak_memory(c.function, device) for name, c in contenders.items()}
    peaks: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        peaks.append(matmul_peak(dtype, device, repeats=3))
        for name, contender in contenders.items():
            times[name].append(seconds(contender.function, device) * contender.scale)
    baseline = next(iter(contenders))
    per_image = {name: [t / contenders[name].batch for t in found] for name, found in times.items()}
    rows = []
    for name, contender in contenders.items():
        median = statistics.median(times[name])
        share = statistics.median(flops[name] / t / p for t, p in zip(times[name], peaks, strict=True))
        ratio = statistics.median(a / b for a, b in zip(per_image[baseline], per_image[name], strict=True))
        per = flops[name] / contender.batch
        speed = contender.batch / median
        batch = contender.batch
        rows.append(Row(contest, name, batch, 1e3 * median, speed, per, share, memory[name], ratio, baseline))
    return rows


def clock_name(device: torch.device) -> str:
    """Which clock `seconds` reads: "events", "processor" or "wall"."""
    if device.type == "cuda":
        return "events"
    return "processor" if torch.get_num_threads() == 1 else "wall"


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of one call by the clock that fits the device."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def count_flops(function: Callable[[], Any]) -> float:
    """FLOPs of the matrix products of one call, backward included if the call has one."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return float(counter.get_total_flops())


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that one call needs at once beyond what is held before it; 0 where the system does not tell.

    On a CPU the resident memory of the process, after freed memory went back to the system: Linux forgets its highest
    value when 5 is written to clear_refs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - held)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = _status("VmRSS")
        function()
        return max(0, _status("VmHWM") - held)
    function()
    return 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def matmul_peak(dtype: torch.dtype, device: torch.device, repeats: int = 15) -> float:
    """FLOPs per second of a large square matrix product: the median of `repeats`, after one that is not counted."""
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(repeats + 1)]
    return 2 * side**3 / statistics.median(times[1:])


def table(rows: list[Row], header: bool = True) -> str:
    """The rows as aligned text, contest by contest; the baseline stands first and has the ratio 1."""
    cells = [["", "batch", "ms", "images/s", "GFLOP/image", "of peak", "MB", "ratio"]] if header else []
    contest = ""
    for r in rows:
        if r.contest != contest:
            contest = r.contest
            cells.append([contest])
        numbers = [f"{r.milliseconds:.1f}", f"{r.images_per_second:.3g}", f"{r.flops_per_image / 1e9:.3g}"]
        ratio = "baseline" if r.name == r.baseline else f"{r.ratio:.2f}"
        memory = f"{r.peak_bytes / 1e6:.0f}" if r.peak_bytes else "-"
        cells.append([f"  {r.name}", str(r.batch), *numbers, f"{r.share_of_peak:.0%}", memory, ratio])
    return "\n".join(f"{row[0]:46}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in cells)
