"""`python -m data prepare|finalize|verify|stats`: make shards, check them, look at them. Starts without torch."""

from __future__ import annotations

import functools
import os
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from data.schema import DataError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 something is wrong with the data, 2 wrong usage."""
    set_loader("options", _load_options, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog="python -m data", description="Image-text pairs to shards.", parser_mode="options", exit_on_error=False
    )
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("prepare", _prepare_parser(), help="write shards from a source")
    for name, help_text in (
        ("finalize", "make one dataset of what all tasks of prepare have written"),
        ("verify", "re-read everything and name what is wrong"),
        ("stats", "print what a data directory holds, and plot it to its stats.png"),
    ):
        command = ArgumentParser(description=help_text, exit_on_error=False)
        command.add_argument("data_dir", type=Path)
        commands.add_subcommand(name, command, help=help_text)
    try:
        options = parser.parse_args(_configs_first(sys.argv[1:] if arguments is None else arguments))
        run = {"prepare": _prepare, "finalize": _finalize, "verify": _verify, "stats": _stats}[options.command]
        return run(options[options.command])
    except ArgumentError as error:
        print(f"error: {' '.join(str(error).split()).rstrip('.')}; see --help", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130


def _prepare_parser() -> ArgumentParser:
    from data.prepare.quality import Filters
    from data.sources.open import KINDS, TEMPLATES

    parser = ArgumentParser(description="Write shards from a source.", exit_on_error=False)
    add, limits = parser.add_argument, Filters()
    add("--config", action="config", help="YAML file with any of these options, under their long names")
    add("--out", type=Path, required=True, help="data directory to write")
    add("--source", default="auto", choices=("auto", *KINDS), help="kind of source (auto: look at --path)")
    add("--path", type=str, nargs="+", default=[], help="folder, files or URLs of the source")
    add(
        "--images",
        type=str | None,
        default=None,
        help="folder: where the pictures are, if not beside the captions file",
    )
    add("--num", type=int, default=0, help="scenes, glyphs, emoji: how many")
    add("--seed", type=int, default=0, help="scenes, glyphs: which ones; emoji: which backgrounds")
    add("--max-objects", type=int, default=2, help="scenes: 1, 2 or 3")
    add("--words", type=float, nargs="?", const=1.0, default=0.0, help="scenes: fraction with a word in the picture")
    add("--class-names", type=str, default="", help="of the labels: a,b,c; of classes also a file such as words.txt")
    add("--template", type=str, nargs="+", default=list(TEMPLATES), help="captions of a label, with {label} in them")
    add("--languages", type=str, nargs="+", default=["en"], help="emoji: of the captions, such as en zh")
    add("--background", default="white", choices=("white", "random"), help="emoji: white, or plain colours")
    add("--font", type=str, default="", help="glyphs: path of a TrueType or OpenType font")
    add("--alphabet", type=str, default="", help="glyphs: the characters, U+4E00..U+9FA5, or a file of them")
    add("--characters", type=int, default=4, help="glyphs: how many in a picture")
    add("--size", type=int | None, default=None, help="side in pixels (scenes: 32, emoji and glyphs: 64, others: 256)")
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
    add("--near-duplicates", type=int | None, metavar="BITS", help="drop pictures whose hashes differ in so few")
    add("--score-model", type=str, default="ViT-B-32", help="open_clip model, by name or json, for --score-weights")
    add(
        "--score-weights",
        type=str | None,
        default=None,
        help="its weights: drop pairs whose picture and caption do not fit",
    )
    add("--min-score", type=float, default=0.2, help="lowest cosine of a pair that stays")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    add("--engine", default="processes", choices=("processes", "ray"), help="who writes the shards")
    array = os.environ
    add("--num-tasks", type=int, default=int(array.get("SLURM_ARRAY_TASK_COUNT", 1)), help="tasks that share the work")
    add("--task-id", type=int, default=int(array.get("SLURM_ARRAY_TASK_ID", 0)), help="which of them this is, from 0")
    return parser


def _configs_first(words: list[str]) -> list[str]:
    """The same words with every --config before the other options, so that those win over the file."""
    places = [i for i, word in enumerate(words) if word.partition("=")[0] == "--config"]
    files = [j for i in places for j in ((i,) if "=" in words[i] else (i, i + 1)) if j < len(words)]
    return words[:1] + [words[j] for j in files] + [word for j, word in enumerate(words) if j and j not in files]


def _load_options(text: str) -> Any:
    """YAML in which one path, template or language may stand without brackets."""
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        return content
    return content | {
        name: [content[name]] for name in ("path", "template", "languages") if isinstance(content.get(name), str)
    }


def _prepare(options: Namespace) -> int:
    from data.prepare.engines import ENGINES, run
    from data.prepare.options import PrepareConfig
    from data.prepare.progress import progress_bar, show
    from data.prepare.quality import Filters
    from data.sources.open import KINDS, SourceConfig, find_kind

    paths = tuple(options.path)
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
        languages=tuple(options.languages),
        background=options.background,
        font=options.font,
        alphabet=options.alphabet,
        characters=options.characters,
        templates=tuple(options.template),
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
    with progress_bar() as bar:
        manifest = run(config, options.out, engine, functools.partial(show, bar), options.num_tasks, options.task_id)
    if manifest is None:
        print(f"task {options.task_id} of {options.num_tasks} is done; then: python -m data finalize {options.out}")
    else:
        _say(manifest, options.out)
    return 0


def _finalize(options: Namespace) -> int:
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


def _verify(options: Namespace) -> int:
    from data.prepare.verify import verify

    problems = 0
    for problem in verify(options.data_dir):
        print(problem, file=sys.stderr)
        problems += 1
    print(f"{problems} problems in {options.data_dir}" if problems else f"{options.data_dir} is as its manifest says")
    return 1 if problems else 0


def _stats(options: Namespace) -> int:
    from data.prepare.stats import describe, plot

    print(describe(options.data_dir))
    print(f"plotted in {plot(options.data_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
