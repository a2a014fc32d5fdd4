"""How fast the data room is, against loops that do the least: `python -m tests.benchmarks.bench_data`.

    prepare   photographs of about 500 x 400 to 256, images per second of a core, against PIL's decode + resize + encode
    memory    peak of a process that prepares N and 4 N pictures
    reading   batches from shards, against decoding the same bytes from memory on the same workers
    index     finding the members of 10,000 samples at the start
    captions  memory that a captions file takes while its pictures are prepared
    shuffle   how well the indexed order and the streaming buffer mix

Ratios come from loops that take turns within one run and count the processor time of their own thread or process, so
that a busy machine slows both; rates are for that machine at that moment.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from data.prepare.chunks import Chunk, write_chunk
from data.prepare.options import PrepareConfig
from data.reading.datamodule import ImageDataModule
from data.reading.datasets import as_is
from data.reading.order import permutation
from data.reading.shards import ShardReader, ShardWriter
from data.reading.streaming import StreamDataModule
from data.schema import Drop, Sample, Stretch, cut
from data.sources.open import SourceConfig


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """JPEGs of about 500 x 400 and 90 kB with the spectrum of photographs: amplitude falls as one over frequency."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        width, height = int(rng.integers(440, 520)), int(rng.integers(340, 420))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        strength = np.array([1.0, 0.25, 0.25])[:, None, None]  # of luminance and of the two colour differences
        spectrum = (
            strength * rng.normal(size=(3, *frequency.shape)) * np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
        )
        waves = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / 400) ** 1.1, (height, width))
        waves = waves / waves[0].std() * 50 + 128
        pixels = waves.transpose(1, 2, 0).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels, "YCbCr").convert("RGB").save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


class InMemory:
    """A source over encoded pictures held in memory, so that only `prepare` itself is timed."""

    unit = "img"

    def __init__(self, pictures: list[bytes]) -> None:
        self.pictures = pictures

    def chunks(self, longest: int) -> list[Stretch]:
        """All of them in equal stretches."""
        return cut(0, len(self.pictures), longest)

    def fingerprint(self) -> str:
        """There is one in a process."""
        return "memory"

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """The pictures in order, each with a caption."""
        for i in range(start, stop):
            yield Sample(f"{i:09d}", [f"picture number {i}"], image=self.pictures[i])


def in_turns(
    loops: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Run the loops in turns; return items per second of processor time, the median over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            begin = clock()
            items = loop()
            rates[name].append(items / (clock() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}


def pil_loop(pictures: list[bytes]) -> int:
    """What a script would do: decode, resize the short side to 256 (bicubic), crop the centre, encode."""
    for data in pictures:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        scale = 256 / min(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (picture.width - 256) // 2, (picture.height - 256) // 2
        picture.crop((left, top, left + 256, top + 256)).save(io.BytesIO(), "JPEG", quality=95)
    return len(pictures)


def prepare_loops(pictures: list[bytes], folder: Path) -> dict[str, Callable[[], int]]:
    """The PIL loop, and `prepare` with hashing, json, tar and sync, over the same pictures."""
    config = PrepareConfig(SourceConfig("tars", ("memory",)), size=256)
    source = InMemory(pictures)

    def ours() -> int:
        chunk = Chunk(0, 0, len(pictures), {"train": "train/00000.tar", "val": "val/00000.tar"})
        write_chunk(source, config, chunk, folder, "bench", lambda: None)
        return len(pictures)

    (folder / "chunks").mkdir(parents=True, exist_ok=True)
    return {"pil": lambda: pil_loop(pictures), "prepare": ours}


def bench_prepare(pictures: list[bytes], rounds: int, folder: Path) -> dict[str, float]:
    """Images per second of one core of `prepare_loops`."""
    rates = in_turns(prepare_loops(pictures, folder), rounds)
    return {**rates, "prepare / pil": rates["prepare"] / rates["pil"]}


_PEAK = """
import sys
from data.__main__ import main
assert main(sys.argv[1:]) == 0
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


_HELD = """
import sys
from data.sources.open import SourceConfig, open_source
def memory(line):
    return next(int(text.split()[1]) for text in open("/proc/self/status") if text.startswith(line))
before = memory("VmRSS")
source = open_source(SourceConfig("folder", (sys.argv[1],)))
print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


def bench_memory(count: int, folder: Path) -> dict[str, int]:
    """Peak resident memory, in MB, of preparing `count` and four times as many scenes of 256 pixels, and re-reading."""
    peaks = {}
    for times in (1, 4):
        out = folder / f"scenes{times}"
        options = ["--source", "scenes", "--size", "256", "--format", "jpg", "--shard-size", "200", "--workers", "1"]
        commands = {
            "scenes": ["prepare", *options, "--num", str(count * times), "--out", str(out)],
            "tars": ["prepare", "--path", str(out), "--size", "128", "--workers", "1", "--out", f"{out}-again"],
        }
        for name, command in commands.items():
            run = subprocess.run([sys.executable, "-c", _PEAK, *command], check=True, capture_output=True, text=True)
            peaks[f"{name}, {count * times} pictures, MB"] = int(run.stdout.splitlines()[-1])
    return peaks


class Bytes(Dataset[Any]):
    """The least a loader can do: the same bytes, already in memory, decoded by torchvision alone and stacked."""

    def __init__(self, pictures: list[bytes]) -> None:
        self.pictures = pictures

    def decode(self, data: bytes) -> np.ndarray:
        """Return the pixels of a JPEG, (3, H, W) uint8."""
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB).numpy()

    def __getitem__(self, batch: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.decode(self.pictures[i]) for i in batch]))


class BytesByPIL(Bytes):
    """The same with PIL's decoder."""

    def decode(self, data: bytes) -> np.ndarray:
        """Return the pixels of a picture, (H, W, 3) uint8."""
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def bench_reading(folder: Path, rounds: int, workers: int) -> dict[str, float]:
    """Pictures per second. Without workers by processor time, with workers by the wall clock.

    raw            the same bytes held in memory, decoded and stacked on the same workers: no reading, no captions
    raw, floats    the same, and floats in [-1, 1] made of them in the training process, as a plain loop does it
    batches        what a loader hands over: shards read, captions and labels parsed, pictures uint8; what a GPU is sent
    finished       what a training step on a CPU gets: `batches` as floats

    The figures to look at are batches / raw and finished / (raw, floats): equal work on both sides, but for reading.
    """
    module = ImageDataModule(str(folder), 32, image_size=256, in_memory=False, num_workers=workers)
    images = module.split("train")
    raw = [images.reader.read(i, "jpg") or b"" for i in range(len(images))]
    plans = list(module.train_dataloader().sampler)
    rows = [list(plan.samples) for plan in plans]
    loader = module.train_dataloader()

    def load(dataset: Any, sampler: list[Any], floats: bool = False) -> Callable[[], int]:
        def loop() -> int:
            for batch in DataLoader(dataset, None, sampler=sampler, num_workers=workers, collate_fn=as_is):
                if floats:
                    batch.to(torch.float32).mul_(1 / 127.5).sub_(1.0)
            return len(raw)

        return loop

    def finished() -> int:
        for _ in loader:
            pass
        return len(raw)

    loops = {
        "raw": load(Bytes(raw), rows),
        "raw, PIL": load(BytesByPIL(raw), rows),
        "raw, floats": load(Bytes(raw), rows, floats=True),
        "batches": load(images, plans),
        "finished": finished,
    }
    rates = in_turns(loops, rounds, time.perf_counter if workers else time.process_time)
    pairs = [("batches", "raw"), ("batches", "raw, PIL"), ("finished", "raw, floats"), ("finished", "raw")]
    return {**rates, **{f"{a} / ({b})": rates[a] / rates[b] for a, b in pairs}}


def bench_index(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of processor time to find the members of 10,000 samples in tars that the system holds in memory."""
    folder.mkdir()
    paths = [folder / f"{number:05d}.tar" for number in range(5)]
    for path in paths:
        with ShardWriter(path) as shard:
            for i in range(2000):
                shard.write(f"{path.stem}{i:05d}", {"jpg": bytes(20_000), "txt": bytes(60), "json": bytes(400)})
    return {"seconds per 10,000 samples": 10_000 / in_turns({"": lambda: len(ShardReader(paths))}, rounds)[""]}


def bench_captions(folder: Path, pictures: int = 100_000) -> dict[str, float]:
    """Bytes of memory per picture, with one caption of 75 letters, that `prepare` takes for a captions file."""
    (folder / "Images").mkdir(parents=True)
    text = "A brown dog runs across the wet grass, number {}, a red ball in its mouth."
    lines = (f"{i:09d}.jpg,{text.format(i)}\n" for i in range(pictures))
    (folder / "captions.txt").write_text("image,caption\n" + "".join(lines))
    run = subprocess.run([sys.executable, "-c", _HELD, str(folder)], check=True, capture_output=True, text=True)
    peak, held = (int(value) * 1024 / pictures for value in run.stdout.split())
    return {"peak, bytes per picture": peak, "held, bytes per picture": held}


def bench_shuffle(folder: Path) -> dict[str, float]:
    """Share of neighbours in the order that come from one shard, against the share that chance gives."""
    reader = ShardReader(sorted((folder / "train").glob("*.tar")))
    shard = {reader.key(i): reader.shard(i) for i in range(len(reader))}
    counts = np.bincount(list(shard.values())) / len(shard)

    def neighbours(keys: list[str]) -> float:
        numbers = np.array([shard[key] for key in keys])
        return float(np.mean(numbers[1:] == numbers[:-1]))

    indexed = [reader.key(i) for i in permutation(0, 0, len(reader))]
    stored = [reader.key(i) for i in range(len(reader))]
    result = {"chance": float((counts**2).sum()), "stored": neighbours(stored), "indexed": neighbours(indexed)}
    for buffer in (50, 200, 800):
        stream = StreamDataModule(
            [str(folder / "train" / "*.tar")], None, 32, 32, len(reader) // 32, shuffle_buffer=buffer
        )
        keys = [key for batch in stream.train_dataloader() for key in batch["keys"]]
        result[f"stream, buffer {buffer}"] = neighbours(keys)
    return result


def main() -> None:
    """Run all of them and print one json object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the loaders that are read with")
    parser.add_argument("--only", choices=("prepare", "memory", "reading", "index", "captions", "shuffle"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = photographs(options.pictures)
        say("pictures", {"count": len(pictures), "kB": float(np.mean([len(p) for p in pictures])) / 1000})
        if options.only in (None, "prepare"):
            say("prepare", bench_prepare(pictures, options.rounds, folder / "prepare"))
        if options.only in (None, "memory"):
            say("memory", bench_memory(600, folder))
        if options.only in (None, "reading", "shuffle"):
            shards = write_photo_shards(pictures, folder / "shards")
        if options.only in (None, "reading"):
            for workers in options.workers:
                say(f"reading, {workers} workers", bench_reading(shards, options.rounds, workers))
        if options.only in (None, "index"):
            say("index", bench_index(folder / "index", options.rounds))
        if options.only in (None, "captions"):
            say("captions", bench_captions(folder / "captions"))
        if options.only in (None, "shuffle"):
            say("shuffle", bench_shuffle(shards))


def write_photo_shards(pictures: list[bytes], out: Path) -> Path:
    """Prepare the pictures, five times over under other keys, to shards of 256 pixels; return the directory."""
    source = InMemory(pictures * 5)
    config = PrepareConfig(SourceConfig("tars", ("memory",)), size=256)
    (out / "chunks").mkdir(parents=True)
    for number, stretch in enumerate(source.chunks(100)):
        chunk = Chunk(number, stretch.start, stretch.stop, {"train": f"train/{number:05d}.tar"})
        write_chunk(source, PrepareConfig(config.source, val_fraction=0.0), chunk, out, "bench", lambda: None)
    return out


def say(name: str, figures: dict[str, Any]) -> None:
    """Print one row."""
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    print(json.dumps({"bench": name, **rounded, "cores": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    main()
