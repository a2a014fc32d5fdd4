"""What every hostile case is held to: right or a documented error, 10 s of a processor, 2 GB, no pickle, no other file.

    with case(folder): ...      anything but a documented error fails, and so does what the interpreter's audit hook saw
    @budget(300)                so many cases in the suite, ten times as many with UNSPOOL_FUZZ=10

The cases are the same in every run of the same length (`derandomize`).
"""

import linecache
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings

from stage1_tokenizer.training.user_errors import ROOMS, SOURCE_ROOT

SECONDS, BYTES = 10, 2 << 30
TIMES = float(os.environ.get("UNSPOOL_FUZZ", "1"))
TIMERS = (signal.ITIMER_PROF, signal.ITIMER_REAL)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect")

F = TypeVar("F", bound=Callable[..., Any])


def budget(cases: int) -> Callable[[F], F]:
    """Run a test on `cases` examples, times UNSPOOL_FUZZ."""
    count = max(1, round(cases * TIMES))
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking files of kilobytes takes minutes and shows little
        report_multiple_bugs=True,
    )


class TooSlowError(BaseException):
    """A case that took longer than `SECONDS`; no `except Exception` swallows it."""


class Watch:
    """What the process did while a case ran that no input may make it do."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # of the case that runs
        self.seen: list[str] = []
        self.cases = 0
        self.slowest, self.largest = 0.0, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "pickle.find_class":
            self.seen.append(f"unpickled {arguments}")
        elif event in STARTS and arguments[0] != "git":  # which commit this is: run.json
            self.seen.append(f"{event} {arguments}")
        elif event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, (str, bytes)) and not self.may_change(Path(os.fsdecode(path))):
                    self.seen.append(f"{event} {path!r}")

    def may_change(self, path: Path) -> bool:
        """Files of the case; and those of the interpreter and of the system's devices."""
        assert self.folder is not None
        whole = Path(os.path.realpath(path))
        return whole.is_relative_to(self.folder) or "__pycache__" in whole.parts or whole.parts[1] in ("dev", "proc")


WATCH = Watch()
sys.addaudithook(WATCH)


def documented(error: BaseException) -> bool:
    """True for an error class of this project, and for a `raise` of a line of it; both in one line of text.

    Stricter than what commands print: there, a ValueError that an expression of ours raises counts too.
    """
    if "\n" in str(error).strip() or not isinstance(error, (ValueError, OSError)):
        return False
    if type(error).__module__.split(".")[0] in ROOMS:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    name = trace.tb_frame.f_code.co_filename
    ours = any(Path(name).is_relative_to(SOURCE_ROOT / room) for room in ROOMS)
    return ours and linecache.getline(name, trace.tb_lineno).strip().startswith("raise")


@contextmanager
def case(folder: Path, *exits: int) -> Iterator[None]:
    """One hostile input. `folder`: where files may change. `exits`: statuses with which a command may end."""
    WATCH.seen, WATCH.cases = [], WATCH.cases + 1
    before, start = status("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    limits = resource.getrlimit(resource.RLIMIT_AS)
    main = threading.current_thread() is threading.main_thread()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2 * BYTES, limits[1]))
        if main:
            previous = [signal.signal(number, too_slow) for number in (signal.SIGPROF, signal.SIGALRM)]
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: others may be using it, too
            signal.setitimer(signal.ITIMER_REAL, 30 * SECONDS)  # what waits uses none
        WATCH.folder = Path(os.path.realpath(folder))
        yield
    except SystemExit as end:
        if end.code not in exits:
            raise AssertionError(f"ended with status {end.code}, expected one of {exits}") from end
    except Exception as error:
        if not documented(error):
            raise
    finally:
        WATCH.folder = None
        if main:
            for timer, number, handler in zip(TIMERS, (signal.SIGPROF, signal.SIGALRM), previous, strict=True):
                signal.setitimer(timer, 0)
                signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        WATCH.slowest = max(WATCH.slowest, time.process_time() - start)
        WATCH.largest = max(WATCH.largest, status("VmHWM") - before)
    assert not WATCH.seen, WATCH.seen
    assert status("VmHWM") - before < BYTES, f"{(status('VmHWM') - before) >> 20} MB"


def too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"longer than {SECONDS} s")


def status(name: str) -> int:
    """Bytes that the kernel states for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


@contextmanager
def place() -> Iterator[Path]:
    """A folder for one case, gone after it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)
