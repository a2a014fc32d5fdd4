"""`python -m data prepare|finalize|verify|stats`: make shards, check them, look at them. Starts without torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.schema import DataError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 something is wrong with the data, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m data", description="Image-text pairs to shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write shards from a source")
    _add_prepare(prepare)
    for name, help_text in (
        ("finalize", "make one dataset of what all tasks of prepare have written"),
        ("verify", "re-read everything and name what is wrong"),
        ("stats", "print what a data directory holds, and plot it to its stats.png"),
    ):
        commands.add_parser(name, help=help_text).add_argument("data_dir", type=Path)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser.parse_args(given)
        if options.command == "prepare" and options.config is not None:
            _take_defaults(prepare, options.config)
            options = parser.parse_args(given)
        commands_by_name = {"prepare": _prepare, "finalize": _finalize, "verify": _verify, "stats": _stats}
        return commands_by_name[options.command](options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    from data.prepare.quality import Filters
    from data.sources.open import KINDS, TEMPLATES

    add, limits = parser.add_argument, Filters()
    add("--config", type=Path, help="YAML file with any of these options, under their long names")
    add("--out", type=Path, required=True, help="data directory to write")
    add("--source", default="auto", choices=("auto", *KINDS), help="kind of source (auto: look at --path)")
    add("--path", nargs="+", default=[], help="folder, files or URLs of the source")
    add("--images", help="folder: where the pictures are, if not beside the captions file")
    add("--num", type=int, default=0, help="scenes: how many")
    add("--seed", type=int, default=0, help="scenes: which ones")
    add("--max-objects", type=int, default=2, help="scenes: 1, 2 or 3")
    add("--words", type=float, nargs="?", const=1.0, default=0.0, help="scenes: fraction with a word in the picture")
    add(
        "--class-names",
        default="",
        help="names of the labels, a,b,c; of classes also a file such as words.txt",
    )
    add("--template", nargs="+", default=list(TEMPLATES), help="captions of a label, with {label} in them")
    add("--size", type=int, default=None, help="side in pixels (scenes: 32, others: 256)")
    add("--resize", default=None, choices=("center_crop", "keep_ratio", "budget", "no"), help="(center_crop)")
    add("--format", default=None, choices=("jpg", "png", "webp", "keep"), help="of the pictures (up to 64 pixels: png)")
    add("--quality", type=int, default=95, help="of jpg and webp, 1 to 100")
    add("--val-fraction", type=float, default=0.05, help="share of the keys that go to val")
    add("--shard-size", type=int, default=2000, help="samples per shard, at most (tars: one shard of each)")
    add("--min-side", type=int, default=limits.min_side, help="in pixels, before resizing")
    add("--max-aspect", type=float, default=limits.max_aspect, help="longest over shortest side")
    add("--max-pixels", type=int, default=limits.max_pixels, help="larger pictures are never decoded")
    add("--min-caption", type=int, default=limits.min_caption, help="characters")
    add("--max-caption", type=int, default=limits.max_caption, help="characters")
    add("--near-duplicates", type=int, default=None, metavar="BITS", help="drop pictures whose hashes differ in so few")
    add("--score-model", default="ViT-B-32", help="open_clip model, by name or json, for --score-weights")
    add("--score-weights", default=None, help="its weights: drop pairs whose picture and caption do not fit")
    add("--min-score", type=float, default=0.2, help="lowest cosine of a pair that stays")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    add("--engine", default="processes", choices=("processes", "ray"), help="who writes the shards")
    array = os.environ
    add("--num-tasks", type=int, default=int(array.get("SLURM_ARRAY_TASK_COUNT", 1)), help="tasks that share the work")
    add("--task-id", type=int, default=int(array.get("SLURM_ARRAY_TASK_ID", 0)), help="which of them this is, from 0")


def _take_defaults(parser: argparse.ArgumentParser, path: Path) -> None:
    """Let the options of a YAML file stand in for those not given on the command line."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"cannot read --config {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"--config {path} holds {type(content).__name__}, wanted lines like `size: 64`")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for name, value in content.items():
        action = known.get(str(name).replace("-", "_"))
        if action is None:
            raise DataError(f"--config {path}: no option {name!r}, known are {', '.join(sorted(known))}")
        if action.choices is not None and value not in action.choices:
            raise DataError(f"--config {path}: {name} is {value!r}, not in {', '.join(map(str, action.choices))}")
        if action.type in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(f"--config {path}: {name} is {value!r}, wanted a number")
        action.required = False
        parser.set_defaults(**{action.dest: Path(value) if action.type is Path else value})


def _prepare(options: argparse.Namespace) -> int:
    from data.prepare.engines import ENGINES, run
    from data.prepare.options import PrepareConfig
    from data.prepare.quality import Filters
    from data.sources.open import KINDS, SourceConfig, find_kind

    paths = tuple([options.path] if isinstance(options.path, str) else options.path)
    kind = find_kind(paths) if options.source == "auto" else options.source
    size = options.size if options.size is not None else KINDS[kind].size
    source = SourceConfig(
        kind=kind,
        path=paths,
        images=options.images,
        num=options.num,
        seed=options.seed,
        size=size,
        max_objects=options.max_objects,
        words=options.words,
        class_names=tuple(name.strip() for name in options.class_names.split(",") if name.strip()),
        templates=tuple([options.template] if isinstance(options.template, str) else options.template),
    )
    config = PrepareConfig(
        source=source,
        size=size,
        resize=options.resize or ("no" if options.format == "keep" else "center_crop"),
        format=options.format or ("png" if size <= 64 else "jpg"),
        quality=options.quality,
        val_fraction=options.val_fraction,
        shard_size=options.shard_size,
        score_model=options.score_model,
        score_weights=options.score_weights,
        min_score=options.min_score,
        filters=Filters(
            min_side=options.min_side,
            max_aspect=options.max_aspect,
            max_pixels=options.max_pixels,
            min_caption=options.min_caption,
            max_caption=options.max_caption,
            near_duplicates=options.near_duplicates,
        ),
    )
    engine = ENGINES[options.engine](options.workers)
    manifest = run(config, options.out, engine, _progress(), options.num_tasks, options.task_id)
    if manifest is None:
        print(f"task {options.task_id} of {options.num_tasks} is done; then: python -m data finalize {options.out}")
    else:
        _say(manifest, options.out)
    return 0


def _finalize(options: argparse.Namespace) -> int:
    from data.prepare.finalize import finalize

    _say(finalize(options.data_dir), options.data_dir)
    return 0


def _say(manifest: dict[str, Any], out: Path) -> None:
    dropped, counts = manifest["dropped"], manifest["counts"]
    print(f"{counts['train']} train and {counts['val']} val samples in {out}, {sum(dropped.values())} dropped")
    for reason, count in dropped.items():
        print(f"  dropped, {reason}: {count} (keys in {out / 'dropped.jsonl'})")
    for reason, count in manifest["captions"].items():
        if reason != "kept" and count:
            print(f"  {reason if reason != 'repaired' else 'captions repaired'}: {count}")


def _verify(options: argparse.Namespace) -> int:
    from data.prepare.verify import verify

    problems = 0
    for problem in verify(options.data_dir):
        print(problem, file=sys.stderr)
        problems += 1
    print(f"{problems} problems in {options.data_dir}" if problems else f"{options.data_dir} is as its manifest says")
    return 1 if problems else 0


def _stats(options: argparse.Namespace) -> int:
    from data.prepare.stats import describe, plot

    print(describe(options.data_dir))
    print(f"plotted in {plot(options.data_dir)}")
    return 0


def _progress() -> Callable[[Any], None]:
    """Return a reporter: a bar with rate and time left on a terminal, a line every few seconds elsewhere."""
    from tqdm import tqdm

    bar: tqdm[None] | None = None
    started = said = time.monotonic()
    first: int | None = None

    def report(progress: Any) -> None:
        nonlocal bar, said, first
        first = progress.samples if first is None else first
        if sys.stderr.isatty():
            bar = bar or tqdm(total=progress.total, initial=first, unit=" img", desc="prepare")
            bar.set_postfix_str(f"shard {progress.chunks}/{progress.total_chunks}", refresh=False)
            bar.update(progress.samples - bar.n)
            if progress.chunks == progress.total_chunks:
                bar.close()
            return
        now = time.monotonic()
        if now - said < 5 and (progress.chunks < progress.total_chunks or progress.samples == first):
            return
        said = now
        rate = (progress.samples - first) / max(now - started, 1e-9)
        of = f"/{progress.total}" if progress.total is not None else ""
        left = f", {(progress.total - progress.samples) / rate:.0f} s left" if progress.total and rate else ""
        shards = f"shard {progress.chunks}/{progress.total_chunks}"
        print(f"prepare: {progress.samples}{of} images, {shards}, {rate:.0f}/s{left}", file=sys.stderr)

    return report


if __name__ == "__main__":
    sys.exit(main())
