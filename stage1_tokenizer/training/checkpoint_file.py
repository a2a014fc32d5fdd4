"""A checkpoint as a file: written whole or not at all, and known to be whole by the checksums inside.

torch's files are zip archives, with a CRC-32 for every tensor that is written and, by torch, never compared. `is_whole`
compares them all: a file that a torn write, a full disk or a flipped bit has damaged is not resumed from.
"""

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError

PREVIOUS = "previous.ckpt"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


class UnwritableError(OSError):
    """A file of a run cannot be written, for want of space as a rule."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails to be written inside becomes one sentence about `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = cause_of(error)
        if reason is None:
            raise
        raise UnwritableError(
            f"cannot write {path} ({reason}); make room, then go on with --resume auto: what was there is whole"
        ) from error


def cause_of(error: BaseException) -> str | None:
    """What the system said of a failed write; None where `error` is of another kind."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in DISK else None
    text = str(error)
    if isinstance(error, SafetensorError):
        return text if "I/O error" in text or "IoError" in text else None
    if "PytorchStreamWriter failed" in text or "file write failed" in text:
        return next((cause_of(e) for e in (error.__cause__, error.__context__) if isinstance(e, OSError)), text)
    return None


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints straight to their place on disk (Lightning's own go through memory and a temporary folder).

    A failed write leaves no file and raises UnwritableError.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with writing(file), file.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            file.unlink(missing_ok=True)
            raise


def replace_last(part: Path, last: Path) -> None:
    """`part` becomes `last`, and what was there before becomes `PREVIOUS`; one of the two is there at any moment."""
    previous = last.with_name(PREVIOUS)
    if last.exists():
        os.replace(last, previous)
    os.replace(part, last)
    folder = os.open(last.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the names, too, outlive a power cut
    finally:
        os.close(folder)


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints of a run: the last, the one before, then those that were kept, by falling step."""
    kept = {int(path.stem[5:]): path for path in folder.glob("step=*.ckpt") if path.stem[5:].isdigit()}
    names = [folder / "last.ckpt", folder / PREVIOUS]
    return [path for path in [*names, *(kept[step] for step in sorted(kept, reverse=True))] if path.is_file()]


def is_whole(path: Path) -> bool:
    """True for a zip archive of torch all of whose checksums are right; reads the file once."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile):
        return False
