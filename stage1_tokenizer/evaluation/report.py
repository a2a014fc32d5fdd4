"""A report as one HTML page that stands alone: figures, tables, curves and pictures, with where they came from.

    report = Report("Reconstruction", "demo tokenizer on 1,000 held-out scenes")
    report.figures([Figure("PSNR", "33.1 dB", "PCA 31.2 dB")])
    report.table("By prefix length", ["k", "PSNR"], [["1", "27.9"]])
    report.curve("PSNR", "latents", "dB", {"learned": ([1, 2], [27.9, 30.1])})
    report.grid("Prefixes", ["learned"], [("k = 1", [images])])
    report.write("runs/demo/reconstruction", metrics)

`write` leaves report.html, metrics.json and every picture and curve as a PNG of its own. The page has no script and
refers to nothing outside itself: pictures are data URIs, curves are drawn once for light and once for dark screens.
Both stages use it; it knows nothing about tokenizers.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure as Canvas
from PIL import Image
from torch import Tensor

from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.training.run_folder import describe_process

WORDS = re.compile(r"[a-z] \S*[a-z]")  # two words in a row: text, and not a number with its unit
GAP = 2  # pixels between pictures of a strip, before scaling
LARGEST_PICTURE = 112  # pixels of the page that one picture of a grid may be wide
SERIES_COLOURS = ("#3b6fd4", "#d9822b", "#2a9d6f", "#b14fc5", "#c2424d", "#8a6d3b")
REFERENCE_COLOUR = "#7a7f87"
INK = {"light": "#1d2330", "dark": "#d9dee8"}
STYLE = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1d2330;--soft:#5d6675;--line:#dfe3ea;--accent:#3b6fd4;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--page:#12151b;--card:#1a1f28;--ink:#d9dee8;--soft:#98a2b3;--line:#2c333f;--accent:#7aa2f7}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.2rem 1.2rem 4rem}h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.2rem;margin:2.6rem 0 .6rem}p{margin:.4rem 0;max-width:46rem}.soft{color:var(--soft);font-size:.9rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:1.6rem 0 0}
.figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem}
.figure b{display:block;font-size:1.55rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.figure .name{font-size:.85rem;color:var(--soft)}.figure .note{font-size:.82rem;color:var(--soft);line-height:1.35}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:.3rem .8rem;margin:0 0 .9rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.42rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600;white-space:normal;vertical-align:bottom}tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left}
tr.quiet td{color:var(--soft)}td.text,th.text{text-align:left;white-space:normal;min-width:9rem;vertical-align:top}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:.9rem}
.curves figure,.grid{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem;margin:0}
.curves img{width:100%;height:auto;display:block}figcaption{font-size:.88rem;color:var(--soft);margin-bottom:.3rem}
.grid{overflow-x:auto}.grid table{min-width:34rem;table-layout:fixed}.grid th:first-child{width:8.5rem}
.grid td,.grid th{border:0;padding:.16rem .45rem;text-align:left}
.grid td:first-child{white-space:normal;font-size:.85rem;color:var(--soft);width:8.5rem;vertical-align:middle}
.grid img{width:100%;height:auto;display:block;image-rendering:pixelated;border-radius:3px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;font-size:.88rem;margin:.4rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}code{font:.88em ui-monospace,monospace}
@media(max-width:560px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}}
"""


@dataclass(frozen=True)
class Figure:
    """One headline: what it is, its value with unit, and what to compare it with."""

    name: str
    value: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" + (f" ({self.note})" if self.note else "")


def image_strip(images: Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """Pictures (N, 3, H, W) in [-1, 1] side by side (rows of `columns`), each pixel `scale` x `scale`; RGBA.

    Gaps and missing cells are transparent, so that the strip sits on a light and on a dark page alike.
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[1] != 3:
        raise ValueError(f"got pictures of shape {tuple(images.shape)}, wanted (N, 3, H, W) with N of 1 or more")
    columns = columns or len(images)
    rows = math.ceil(len(images) / columns)
    h, w = images.shape[-2:]
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    sheet = Image.new("RGBA", (columns * (w + GAP) - GAP, rows * (h + GAP) - GAP), (0, 0, 0, 0))
    for index, picture in enumerate(pixels.numpy()):
        sheet.paste(Image.fromarray(picture), (index % columns * (w + GAP), index // columns * (h + GAP)))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def image_grid(rows: Sequence[Tensor], scale: int = 1) -> Image.Image:
    """Strips of pictures (N, 3, H, W) below one another, one strip for each entry of `rows`."""
    strips = [image_strip(images, scale=scale) for images in rows]
    gap = GAP * scale
    sheet = Image.new("RGBA", (max(s.width for s in strips), sum(s.height + gap for s in strips) - gap), (0, 0, 0, 0))
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + gap
    return sheet


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def provenance(seed: int | None = None) -> dict[str, str]:
    """Where figures come from: command, date, commit of this code, seed, versions, device."""
    process = describe_process()
    versions = {"Python": process["python"], **process["versions"]}
    return {
        "command": " ".join(process["command"]),
        "date": process["started"],
        "commit": process["commit"] or "not in a git checkout",
        "seed": "not given" if seed is None else str(seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "device": f"{process['device']}, {process['torch_threads']} threads",
    }


class Report:
    """Collects the parts of a page in order; `write` makes the files. Every method returns the report itself."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._parts: list[str] = []
        self._files: dict[str, bytes] = {}

    def figures(self, figures: Sequence[Figure]) -> "Report":
        """The headline numbers, as cards; the first thing on the page."""
        cards = "".join(
            f'<div class="figure"><div class="name">{_text(f.name)}</div><b>{_text(f.value)}</b>'
            f'<div class="note">{_text(f.note)}</div></div>'
            for f in figures
        )
        return self._add(f'<div class="figures">{cards}</div>')

    def section(self, heading: str, text: str = "") -> "Report":
        """A heading and a sentence or two of plain text."""
        return self._add(f"<h2>{_text(heading)}</h2>" + (f"<p>{_text(text)}</p>" if text else ""))

    def table(
        self,
        heading: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        note: str = "",
        quiet: str | None = None,
    ) -> "Report":
        """A table of text cells, each row's name first; rows whose name begins with `quiet` are set softly."""
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"got rows of {sorted({len(r) for r in rows})} cells for {len(columns)} columns")
        # Numbers are set to the right, words to the left; a column of words has its heading there too.
        words = [any(WORDS.search(row[i]) for row in rows) for i in range(len(columns))]
        kinds = [' class="text"' if is_words else "" for is_words in words]
        head = "".join(f"<th{kind}>{_text(c)}</th>" for kind, c in zip(kinds, columns, strict=True))
        body = ""
        for row in rows:
            cells = "".join(f"<td{kind}>{_text(c)}</td>" for kind, c in zip(kinds, row, strict=True))
            body += f'<tr class="quiet">{cells}</tr>' if quiet and row[0].startswith(quiet) else f"<tr>{cells}</tr>"
        self.section(heading)
        self._add(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
        return self._add(f'<p class="soft">{_text(note)}</p>') if note else self

    def curve(
        self, heading: str, x_label: str, y_label: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    ) -> "Report":
        """Lines over the number of latents (logarithmic, ticks at the given x); consecutive curves share a row."""
        light, dark = (_draw_curve(x_label, y_label, series, ink) for ink in INK.values())
        self._files[f"{_slug(heading)}.png"] = light
        figure = (
            f"<figure><figcaption>{_text(heading)}</figcaption><picture>"
            f'<source srcset="{_data_uri(dark)}" media="(prefers-color-scheme: dark)">'
            f'<img src="{_data_uri(light)}" alt="{_text(heading)}"></picture></figure>'
        )
        if self._parts and self._parts[-1].startswith('<div class="curves">'):
            self._parts[-1] = self._parts[-1].removesuffix("</div>") + figure + "</div>"
            return self
        return self._add(f'<div class="curves">{figure}</div>')

    def grid(
        self, heading: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Tensor]]], note: str = ""
    ) -> "Report":
        """Pictures: each row a label and, for each column, a strip of pictures (N, 3, H, W) in [-1, 1]."""
        if any(len(strips) != len(columns) for _, strips in rows):
            raise ValueError(f"got rows of {sorted({len(s) for _, s in rows})} strips for {len(columns)} columns")
        scale = max(1, 64 // rows[0][1][0].shape[-1])
        head = "".join(f"<th>{_text(c)}</th>" for c in ["", *columns])
        body = ""
        for label, strips in rows:
            cells = "".join(
                f'<td><img src="{_data_uri(png(image_strip(s)))}" alt="{_text(f"{label} {column}")}" '
                f'style="max-width:{LARGEST_PICTURE * len(s)}px"></td>'
                for column, s in zip(columns, strips, strict=True)
            )
            body += f"<tr><td>{_text(label)}</td>{cells}</tr>"
        for index, column in enumerate(columns):
            name = _slug(heading if len(columns) == 1 else f"{heading} {column}")
            self._files[f"{name}.png"] = png(image_grid([strips[index] for _, strips in rows], scale))
        self.section(heading, note)
        return self._add(f'<div class="grid"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def skipped(self, skipped: Sequence[Skipped]) -> "Report":
        """What was left out, why, and how to have it."""
        if not skipped:
            return self
        cells = "".join(
            f"<tr><td>{_text(s.name)}</td><td class=text>{_text(s.reason)}</td>"
            f"<td class=text>{_text(s.how_to_fix)}</td></tr>"
            for s in skipped
        )
        self.section("Left out")
        head = "<tr><th>metric</th><th>reason</th><th>to have it</th></tr>"
        return self._add(f'<div class="scroll"><table><thead>{head}</thead><tbody>{cells}</tbody></table></div>')

    def provenance(self, facts: Mapping[str, str]) -> "Report":
        """Where the figures come from."""
        self.section("Provenance")
        items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
        return self._add(f"<dl>{items}</dl>")

    def html(self) -> str:
        """The whole page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{_text(self.title)}</title><style>{STYLE}</style></head><body><main>"
            f'<h1>{_text(self.title)}</h1><p class="soft">{_text(self.subtitle)}</p>'
            f"{''.join(self._parts)}</main></body></html>\n"
        )

    def write(self, folder: str | Path, metrics: Mapping[str, Any]) -> Path:
        """Write report.html, metrics.json and the PNGs into `folder`, over older ones; returns the page's path.

        A figure that is not finite becomes null in metrics.json, which has to stay JSON.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        text = json.dumps(_finite(metrics), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
        page = folder / "report.html"
        page.write_text(self.html(), encoding="utf-8")
        return page

    def _add(self, part: str) -> "Report":
        self._parts.append(part)
        return self


def _draw_curve(
    x_label: str, y_label: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ink: str
) -> bytes:
    """One plot on a transparent ground with text and axes in `ink`."""
    with matplotlib.rc_context({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink}):
        canvas = Canvas(figsize=(5.0, 3.2), dpi=144, layout="constrained")
        axes = canvas.add_subplot()
        for index, (label, (x, y)) in enumerate(series.items()):
            colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
            if index and len(set(y)) == 1 and len(y) > 1:  # behind the first: a level to compare it with
                axes.axhline(y[0], linestyle="--", linewidth=1.3, color=REFERENCE_COLOUR, label=label)
            else:
                axes.plot(x, y, marker="o", markersize=4, linewidth=1.8, color=colour, label=label)
        ticks = sorted({value for x, _ in series.values() for value in x})
        if len(ticks) > 8:
            ticks = [tick for tick in ticks if math.log2(tick).is_integer()]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        axes.grid(alpha=0.18, color=ink)
        axes.patch.set_alpha(0)
        axes.legend(frameon=False, fontsize=8)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def _text(value: str) -> str:
    return html.escape(str(value))


def _slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_")


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _finite(value: Any) -> Any:
    """The same nested value with keys as text, tensors as lists, and None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return _finite(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
