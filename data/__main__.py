"""`python -m data prepare|verify|stats`: make shards, check them, look at them. Starts without torch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data.schema import DataError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 something is wrong with the data, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m data", description="Image-text pairs to shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_prepare(commands.add_parser("prepare", help="write shards from a source"))
    verify = commands.add_parser("verify", help="re-read everything and name what is wrong")
    verify.add_argument("data_dir", type=Path)
    stats = commands.add_parser("stats", help="print what a data directory holds")
    stats.add_argument("data_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        return {"prepare": _prepare, "verify": _verify, "stats": _stats}[options.command](options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    from data.sources import KINDS, LABEL_TEMPLATE

    parser.add_argument("--out", type=Path, required=True, help="data directory to write")
    parser.add_argument("--source", "--format-of-source", default="auto", choices=("auto", *KINDS), help="kind of source")
    parser.add_argument("--path", nargs="+", default=[], help="folder or files of the source")
    parser.add_argument("--num", type=int, default=0, help="scenes: how many")
    parser.add_argument("--seed", type=int, default=0, help="scenes: which ones")
    parser.add_argument("--max-objects", type=int, default=2, help="scenes: 1, 2 or 3")
    parser.add_argument("--words", type=float, nargs="?", const=1.0, default=0.0, help="scenes: fraction with a word")
    parser.add_argument("--class-names", default="", help="parquet: names of the labels, a,b,c")
    parser.add_argument("--template", default=LABEL_TEMPLATE, help="caption of a label, with {label} in it")
    parser.add_argument("--size", type=int, default=None, help="side in pixels (scenes: 32, others: 256)")
    parser.add_argument("--resize", default="center_crop", help="center_crop, keep_ratio, budget or no")
    parser.add_argument("--format", default=None, choices=("jpg", "png", "webp"), help="of the pictures (up to 64 px: png)")
    parser.add_argument("--quality", type=int, default=95, help="of jpg and webp, 1 to 100")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of the keys that go to val")
    parser.add_argument("--shard-size", type=int, default=2000, help="samples per shard, at most")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")


def _prepare(options: argparse.Namespace) -> int:
    import os

    from data.prepare import PrepareConfig, run
    from data.sources import SourceConfig, find_kind

    kind = find_kind(tuple(options.path)) if options.source == "auto" else options.source
    size = options.size if options.size is not None else 32 if kind == "scenes" else 256
    names = tuple(name.strip() for name in options.class_names.split(",") if name.strip())
    source = SourceConfig(
        kind=kind,
        path=tuple(options.path),
        num=options.num,
        seed=options.seed,
        size=size,
        max_objects=options.max_objects,
        words=options.words,
        class_names=names,
        template=options.template,
    )
    config = PrepareConfig(
        source=source,
        size=size,
        resize=options.resize,
        format=options.format or ("png" if size <= 64 else "jpg"),
        quality=options.quality,
        val_fraction=options.val_fraction,
        shard_size=options.shard_size,
    )
    manifest = run(config, options.out, options.workers or os.cpu_count() or 1, _progress())
    dropped = sum(manifest["dropped"].values())
    print(f"{manifest['counts']['train']} train and {manifest['counts']['val']} val samples in {options.out}, {dropped} dropped")
    for reason, count in manifest["dropped"].items():
        print(f"  dropped, {reason}: {count} (keys in {options.out / 'dropped.jsonl'})")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data.verify import verify

    problems = 0
    for problem in verify(options.data_dir):
        print(problem, file=sys.stderr)
        problems += 1
    print(f"{problems} problems in {options.data_dir}" if problems else f"{options.data_dir} is as its manifest says")
    return 1 if problems else 0


def _stats(options: argparse.Namespace) -> int:
    from data.verify import describe

    print(describe(options.data_dir))
    return 0


def _progress() -> Callable[[int, int], None]:
    """Return a reporter: a bar with rate and time left on a terminal, a line every few seconds elsewhere."""
    from tqdm import tqdm

    bar: tqdm[None] | None = None
    said = started = time.monotonic()
    first = 0

    def report(done: int, total: int) -> None:
        nonlocal bar, said, first
        if sys.stderr.isatty():
            if bar is None:
                bar = tqdm(total=total, initial=done, unit="img", desc="prepare")
            bar.update(done - bar.n)
            if done >= total:
                bar.close()
            return
        now = time.monotonic()
        if now == started or not first:
            first = max(done, 0) or 1
        if now - said < 5 and done < total:
            return
        said = now
        rate = max(done - first, 1) / max(now - started, 1e-9)
        print(f"prepare: {done}/{total} images, {rate:.0f}/s, {(total - done) / rate:.0f} s left", file=sys.stderr)

    return report


if __name__ == "__main__":
    sys.exit(main())
