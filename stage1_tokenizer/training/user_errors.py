"""Which errors are answered with one sentence and which with a traceback: the former are the user's to mend."""

import traceback
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

ROOMS = ("data", "stage1_tokenizer", "stage2_prior")
SOURCE_ROOT = Path(__file__).resolve().parents[2]


def sentence_of(error: BaseException) -> str | None:
    """What to print of an error that a user can mend; None for one of the program."""
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            f"a loader's worker process was killed, by the system for want of memory as a rule ({error}); checkpoints "
            "are whole: go on with --resume auto, fewer data.num_workers or a smaller batch"
        )
    mendable = isinstance(error, (ValueError, OSError, MisconfigurationException))
    return str(error) if mendable and raised_for_the_user(error) else None


def raised_for_the_user(error: BaseException) -> bool:
    """True for an error class of this project, an error raised by a line of it, and Lightning's for wrong settings."""
    if isinstance(error, MisconfigurationException) or type(error).__module__.split(".")[0] in ROOMS:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    rooms = [SOURCE_ROOT / room for room in ROOMS]
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(room) for room in rooms)
