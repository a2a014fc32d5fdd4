"""A page on this machine to play with a tokenizer and its prior.

    python -m stage2_prior play --run_dir runs/demo
    python -m stage2_prior play --tokenizer runs/demo/tokenizer --prior runs/demo/prior --data runs/demo/data

Unspool a picture latent by latent, write captions and watch lines being drawn, edit, and read out. The page is served
to this machine alone unless --host says otherwise; nothing is sent anywhere. Needs Gradio: pip install 'unspool[play]'.
"""

import argparse
import os
import shutil
import socket
from pathlib import Path

from torch import Tensor

from data.reading.datamodule import ImageDataModule
from data.reading.order import spread_rows
from stage1_tokenizer import Tokenizer
from stage1_tokenizer.precision import default_device
from stage2_prior.base import Prior
from stage2_prior.captions import longest
from stage2_prior.play.studio import PlayError, Studio

MOST_CAPTIONS = 2000  # held-out captions that a prefix is looked up among
EXAMPLES = 24  # held-out pictures to choose from
FIRST_PORT, PORTS = 7860, 40

Example = tuple[str, Tensor]  # a name, and an image (1, 3, S, S)


def held_out(data_dir: Path, image_size: int) -> tuple[list[str], list[Example]]:
    """Different captions of the val split, and some of its pictures, by number and caption; empty without a folder.

    Raises DataError for a folder that holds something else.
    """
    if not data_dir.is_dir():
        return [], []
    data = ImageDataModule(str(data_dir), image_size=image_size, in_memory=False)
    captions = dict.fromkeys(longest(each) for each in data.captions("val"))
    rows = spread_rows(len(data.split("val")), EXAMPLES)
    samples = data.samples("val", rows)
    names = [f"{row}: {longest(own)}" for row, own in zip(rows, samples["captions"], strict=True)]
    return [c for c in captions if c][:MOST_CAPTIONS], list(zip(names, samples["images"].split(1), strict=True))


def studio_of(options: argparse.Namespace) -> tuple[Studio, list[Example]]:
    """Load what the options name. Raises PlayError, and the errors of `from_pretrained`."""
    if options.run_dir is None and options.tokenizer is None:
        raise PlayError("give --run_dir (a run such as runs/demo), or --tokenizer and perhaps --prior")
    run = Path(options.run_dir or ".")
    tokenizer = Tokenizer.from_pretrained(options.tokenizer or run / "tokenizer", device=options.device)
    place = options.prior or (run / "prior" if options.run_dir else None)
    absent = "there is no prior, name one with --prior" if place is None else f"there is no prior in {place}, train one"
    prior = None
    if place is not None and (options.prior is not None or Path(place).is_dir()):
        prior = Prior.from_pretrained(place, device=options.device)
    data_dir = options.data or (run / "data" if options.run_dir else Path("nowhere"))
    captions, examples = held_out(Path(data_dir), tokenizer.image_size)
    return Studio(tokenizer, prior, captions, f"{absent}: python -m stage2_prior fit"), examples


def free_port(host: str, port: int | None) -> int:
    """`port` if it can be listened on, else the first free one from 7860 on where none is asked for.

    Raises PlayError where it, or all of them, are in use, or the host is none of this machine's.
    """
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                problem = error.strerror
                continue
            return candidate
    wanted = f"{FIRST_PORT} to {FIRST_PORT + PORTS - 1}" if port is None else str(port)
    raise PlayError(f"cannot listen on {host}, port {wanted} ({problem}); choose another with --port")


def keep_uploads(run: Path, port: int) -> None:
    """What the page of this port is given lies in the run folder, and what an earlier one left there goes.

    Gradio deletes uploads while it runs and when it ends, not when it is killed.
    """
    folder = run.absolute() / "page_uploads" / str(port)
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when it is imported


def main(arguments: list[str] | None = None) -> int:
    """Run the command until it is interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_prior play",
        description="Serve a local page: unspool pictures, write captions, edit, read out.",
    )
    parser.add_argument("--run_dir", help="run folder with tokenizer/ and, where there are, prior/ and data/")
    parser.add_argument("--tokenizer", help="exported tokenizer, a folder or a Hub id (default: the run's)")
    parser.add_argument("--prior", help="exported prior, a folder or a Hub id (default: the run's)")
    parser.add_argument("--data", type=Path, help="image shards for captions and pictures to choose (the run's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, help=f"port to listen on (the first free one from {FIRST_PORT})")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (%(default)s)")
    options = parser.parse_args(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        port = free_port(options.host, options.port)
        studio, examples = studio_of(options)
        if options.run_dir is not None:
            keep_uploads(Path(options.run_dir), port)
        from stage2_prior.play.page import serve
    except ModuleNotFoundError as error:
        parser.exit(1, f"error: {error}; the page needs Gradio: pip install 'unspool[play]'\n")
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    serve(studio, examples, options.host, port)
    return 0
