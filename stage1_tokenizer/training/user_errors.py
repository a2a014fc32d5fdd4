"""Which errors are answered with one sentence and which with a traceback: the former are the user's to mend."""

import pickle
import traceback
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from stage1_tokenizer.training.launch import UsageError

RESTORING = ("load_state_dict", "restore_options", "set_random_states")
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


def constructor_error(error: ValueError) -> BaseException:
    """What to raise in place of an error in which jsonargparse has wrapped that of a constructor: the latter."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if sentence_of(cause) is not None:
        return cause
    return error if sentence_of(error) else UsageError(f"this configuration cannot be built: {reason_of(cause)}")


def while_restoring(error: BaseException) -> bool:
    """True for an error that came up while the content of a checkpoint was put in place."""
    return any(
        frame.name in RESTORING
        or (Path(frame.filename).name == "checkpoint_connector.py" and frame.name.startswith(("restore", "resume")))
        for frame in traceback.extract_tb(error.__traceback__)
    )


def reason_of(error: BaseException) -> str:
    """What a library said, on one line and not without end."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds objects that are neither tensors nor plain values."
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(lines[1:3] if "loading state_dict" in lines[0] else lines) if lines else ""
    return f"{text[:300] or type(error).__name__}{'' if text.endswith('.') else '.'}"
