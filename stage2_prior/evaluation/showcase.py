"""The README's pictures and its table of results, made from run folders and from nothing else.

    python -m stage2_prior showcase --run_dir runs/demo --out docs/scenes.png
    python -m stage2_prior showcase --table README.md --runs scenes runs/demo emoji runs/emoji64

Above: held-out pictures from their first k latents, the original last, with their captions.
Below: pictures that the prior draws for held-out captions; of a run without a prior the ladder alone. Rows are spread
over the held-out split and never chosen.
Where the pictures have a licence that asks for it, the manifest's attribution is written underneath.

The table stands between two marks in the file and is replaced as a whole; every figure comes from a report's
metrics.json, beside the command, commit and day that the run folder recorded.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer import Tokenizer
from stage1_tokenizer.evaluation.provenance import attribution
from stage2_prior.base import Prior
from stage2_prior.pipeline import Pipeline

ROWS = 5  # held-out pictures of the ladder, and as many captions twice over to draw for
SEED = 0
BEGIN, END = "<!-- results: python -m stage2_prior showcase --table -->", "<!-- end of results -->"


class ShowcaseError(ValueError):
    """A run folder or a file that no picture or table can be made from."""


def doubling(num_latents: int) -> list[int]:
    """1, 2, 4, ... below K, and K."""
    return [2**i for i in range(num_latents.bit_length()) if 2**i < num_latents] + [num_latents]


def pixels(images: Tensor) -> Any:
    """(N,3,H,W) in [-1, 1] -> (N,H,W,3) in [0, 1], as matplotlib takes them."""
    return ((images.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def showcase(tokenizer: Tokenizer, prior: Prior | None, data: ImageDataModule, guidance: float = 2.0) -> Figure:
    """The picture of a run: prefix ladder and drawn pictures, see the module's docstring."""
    held = data.arrays("val", 3 * ROWS)
    captions = [max(texts, key=len, default="") for texts in held["captions"]]
    images, lengths = held["images"][:ROWS], doubling(tokenizer.num_latents)
    z = tokenizer.encode(images)
    ladder = [pixels(tokenizer.decode(z[:, :k])) for k in lengths] + [pixels(images)]
    credit = attribution(data.data_dir)
    columns, below = len(ladder), 0.3 if prior is None else 4.7 if credit else 4.4  # inches
    figure = Figure(figsize=(1.25 * columns, 1.45 * ROWS + below), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.45 * ROWS, below], hspace=0.0)
    upper, lower = halves
    titles = [f"{k} latent{'s' * (k > 1)}" for k in lengths] + ["original"]
    grid = upper.subplots(
        ROWS,
        columns,
        gridspec_kw={"hspace": 0.26, "wspace": 0.06, "top": 0.97, "bottom": 0.03, "left": 0.04, "right": 0.98},
    )
    for row, axes in enumerate(grid):
        for column, axis in enumerate(axes):
            show(axis, ladder[column][row], titles[column] if row == 0 else "")
        axes[0].text(0, -0.05, captions[row][:110], transform=axes[0].transAxes, va="top", fontsize=8, style="italic")
    if prior is not None:
        asked = [caption for caption in captions[ROWS:] if caption.strip()][: 2 * ROWS]
        draw(lower, Pipeline(prior, tokenizer), asked, guidance, bottom=0.2 if credit else 0.14)
    lower.text(0.01, 0.01, credit, fontsize=6, color="#5d6675")
    return figure


def draw(part: Any, pipeline: Pipeline, captions: list[str], guidance: float, bottom: float) -> None:
    """What is drawn for captions, in two rows of a part of the figure above `bottom`, each above its caption."""
    drawings = pixels(pipeline.generate(captions, generator=torch.Generator().manual_seed(SEED), guidance=guidance))
    grid = part.subplots(
        2, ROWS, gridspec_kw={"hspace": 0.5, "wspace": 0.1, "top": 0.9, "bottom": bottom, "left": 0.04, "right": 0.98}
    )
    part.suptitle(f"drawn from held-out captions, guidance {guidance:g}, not chosen", fontsize=10)
    for axis in grid.flat:
        axis.axis("off")
    for axis, picture, caption in zip(grid.flat, drawings, captions, strict=False):
        show(axis, picture, "")
        label = "\n".join(textwrap.wrap(caption, 27)[:4])
        axis.text(0.5, -0.05, label, transform=axis.transAxes, va="top", ha="center", fontsize=7, style="italic")


def show(axis: Any, picture: Any, title: str) -> None:
    axis.imshow(picture, interpolation="nearest" if len(picture) < 128 else "antialiased")
    axis.axis("off")
    axis.set_title(title, fontsize=9)


def results_table(runs: dict[str, Path]) -> str:
    """Markdown table of the headline figures of runs by name; of a run without a prior those of its tokenizer.

    Raises ShowcaseError where a report is missing.
    """
    rows = ["| figure | value | commit, day |", "|---|---|---|"]
    for name, run in runs.items():
        reconstruction = read(run / "reconstruction" / "metrics.json")
        report = run / "generation" / "metrics.json"
        generation = read(report) if report.exists() or has_prior(run) else {}
        facts = reconstruction["provenance"]
        made = f"{facts['commit'][:8]}, {facts['date'][:10]}"
        rows += [f"| {name}: {figure} | {value} | {made} |" for figure, value in headlines(reconstruction, generation)]
    return "\n".join(rows)


def has_prior(run: Path) -> bool:
    """True for a run folder in which a prior was exported; one of stage 1 alone has none."""
    return (run / "prior").exists()


def read(path: Path) -> dict[str, Any]:
    """A report's metrics. Raises ShowcaseError where there are none."""
    if not path.is_file():
        raise ShowcaseError(f"found no {path}, wanted what `test` of both stages writes; run it for {path.parents[1]}.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def headlines(reconstruction: dict[str, Any], generation: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, value) pairs of what was measured: reconstruction and retrieval by prefix, faithfulness, speed."""
    psnr, pca = reconstruction["psnr"], reconstruction["pca"]["psnr"]
    shown = [k for k in psnr if int(k) in {1, 4, 8, max(map(int, psnr))}]
    rows = [
        (f"PSNR from {', '.join(shown)} latents, dB", ", ".join(f"{psnr[k]:.2f}" for k in shown)),
        ("PCA of the same floats", ", ".join(f"{pca[k]:.2f}" for k in shown)),
    ]
    kinds = {name: kind for name, kind in reconstruction.get("retrieval", {}).items() if name != "n"}
    if kinds:
        name, kind = max(kinds.items(), key=lambda item: item[1]["distinct"])  # of scenes the long caption
        first, name = kind["recall"][shown[0]]["1"], name if "caption" in name else f"{name} caption"
        number = reconstruction["retrieval"]["n"]
        rows.append((f"{name} found among {number} from the first latent", f"{first:.3f}"))
    for scale in ("1.0", "2.0"):
        groups = generation.get("faithfulness", {}).get(scale, {})
        if "all" in groups:
            unseen = groups.get("unseen combination")
            note = "" if unseen is None else f" ({unseen:.3f} of combinations never seen)"
            rows.append((f"captions drawn right, guidance {float(scale):g}", f"{groups['all']:.3f}{note}"))
    if not generation:
        return rows
    distances = generation["distances"]
    drawn = ", ".join(f"{distances['generated_real'][scale]:.1f}" for scale in ("1.0", "2.0"))
    rows.append(
        (
            f"Frechet distance [{distances['features']}] at guidance 1, 2 (real-real)",
            f"{drawn} ({distances['real_real']:.1f})",
        )
    )
    rows.append(("pictures drawn a second, guided, decoded", f"{generation['cost']['images_per_second']:.0f}"))
    return rows


def write_table(file: Path, table: str) -> None:
    """Put a table between the marks of a file. Raises ShowcaseError where they are missing."""
    text = file.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ShowcaseError(f"{file} has no place for the table; put the lines {BEGIN!r} and {END!r} where it goes.")
    before, rest = text.split(BEGIN, 1)
    file.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stage2_prior showcase", description=__doc__.split("\n")[0])
    parser.add_argument("--run_dir", type=Path, help="run with data/, tokenizer/ and prior/, to make a picture of")
    parser.add_argument("--out", type=Path, default=Path("showcase.png"), help="the picture to write (showcase.png)")
    parser.add_argument("--guidance", type=float, default=2.0, help="of what is drawn (2)")
    parser.add_argument("--table", type=Path, help="file whose table of results is renewed")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME RUN", help="names and run folders of the table")
    options = parser.parse_args(arguments)
    if options.run_dir is not None:
        tokenizer = Tokenizer.from_pretrained(options.run_dir / "tokenizer")
        prior = Prior.from_pretrained(options.run_dir / "prior") if has_prior(options.run_dir) else None
        data = ImageDataModule(str(options.run_dir / "data"), image_size=tokenizer.image_size)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        showcase(tokenizer, prior, data, options.guidance).savefig(options.out)
        print(f"written: {options.out}")
    if options.table is not None:
        names, folders = options.runs[::2], options.runs[1::2]
        write_table(options.table, results_table(dict(zip(names, map(Path, folders), strict=True))))
        print(f"table renewed: {options.table}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
