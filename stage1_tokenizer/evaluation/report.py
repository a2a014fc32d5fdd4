"""A report as one HTML page that stands alone: figures, tables, curves and pictures, with where they came from.

    report = Report("Reconstruction", "demo tokenizer on 1,000 held-out scenes")
    report.figures([Figure("PSNR", "33.1 dB", "PCA 31.2 dB")])
    report.table("By prefix length", ["k", "PSNR"], [["1", "27.9"]])
    report.curve("PSNR", "latents", "dB", {"learned": ([1, 2], [27.9, 30.1])})
    report.grid("Prefixes", ["learned"], [("k = 1", [images])])
    report.write("runs/demo/reconstruction", metrics)

`write` leaves report.html, metrics.json and every picture and curve as a PNG of its own. The page (template
`report.html`, filled with everything escaped: captions come from anywhere) has no script and refers to nothing outside
itself: pictures are data URIs, curves are drawn once for light and once for dark screens. Both stages use it; it knows
nothing about tokenizers.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from stage1_tokenizer.evaluation.curves import INK, Series, draw_curve
from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.evaluation.picture_sheet import data_uri, image_grid, image_strip, png

WORDS = re.compile(r"[a-z] \S*[a-z]")  # two words in a row: text, and not a number with its unit
LARGEST_PICTURE = 112  # pixels of the page that one picture of a grid may be wide


@dataclass(frozen=True)
class Figure:
    """One headline: what it is, its value with unit, and what to compare it with."""

    name: str
    value: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" + (f" ({self.note})" if self.note else "")


class Report:
    """Collects the parts of a page in order; `write` makes the files. Every method returns the report itself."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self.files: dict[str, bytes] = {}  # the PNGs beside the page, by name
        self._parts: list[tuple[str, dict[str, Any]]] = []  # a macro of the template, and its arguments

    def figures(self, figures: Sequence[Figure]) -> "Report":
        """Headlines, the figures that one looks for first."""
        return self._add("figures", figures=list(figures))

    def section(self, heading: str, note: str = "") -> "Report":
        """A heading, with a paragraph below it if there is a note."""
        return self._add("section", heading=heading, note=note)

    def table(
        self, heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", quiet: str = ""
    ) -> "Report":
        """A table of text cells, with a note below it; rows whose first cell starts with `quiet` are set back.

        Raises ValueError for a row of another length than the columns.
        """
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(
                f"got rows of {sorted({len(r) for r in rows})} cells, wanted {len(columns)}: one for each column"
            )
        # Numbers are set to the right, words to the left; a column of words has its heading there too.
        words = [i for i in range(len(columns)) if any(WORDS.search(row[i]) for row in rows)]
        set_back = [i for i, row in enumerate(rows) if quiet and row[0].startswith(quiet)]
        return self._add(
            "table", heading=heading, columns=columns, rows=rows, text_columns=words, quiet_rows=set_back, note=note
        )

    def curve(self, heading: str, x_label: str, y_label: str, series: Series, log: bool = True) -> "Report":
        """Lines over x (logarithmic: the number of latents, ticks at the given x); consecutive curves share a row."""
        plots = {screen: draw_curve(x_label, y_label, series, ink, log) for screen, ink in INK.items()}
        self.files[f"{_slug(heading)}.png"] = plots["light"]
        if not self._parts or self._parts[-1][0] != "curves":
            self._add("curves", plots=[])
        sources = {screen: data_uri(plot) for screen, plot in plots.items()}
        self._parts[-1][1]["plots"].append({"heading": heading, **sources})
        return self

    def grid(
        self, heading: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Tensor]]], note: str = ""
    ) -> "Report":
        """Pictures: each row a label and, for each column, a strip of pictures (N, 3, H, W) in [-1, 1].

        Raises ValueError for a row of another length than the columns.
        """
        if any(len(strips) != len(columns) for _, strips in rows):
            raise ValueError(
                f"got rows of {sorted({len(s) for _, s in rows})} strips, wanted {len(columns)}: one for each column"
            )
        scale = max(1, 64 // rows[0][1][0].shape[-1])
        for index, column in enumerate(columns):
            name = _slug(heading if len(columns) == 1 else f"{heading} {column}")
            self.files[f"{name}.png"] = png(image_grid([strips[index] for _, strips in rows], scale))
        cells = [
            (label, [{"source": data_uri(png(image_strip(s))), "width": LARGEST_PICTURE * len(s)} for s in strips])
            for label, strips in rows
        ]
        return self._add("grid", heading=heading, note=note, columns=columns, rows=cells)

    def skipped(self, skipped: Sequence[Skipped]) -> "Report":
        """What was left out, why, and how to have it."""
        if not skipped:
            return self
        rows = [[part.name, part.reason, part.how_to_fix] for part in skipped]
        return self.table("Left out", ["metric", "reason", "to have it"], rows)

    def provenance(self, facts: Mapping[str, str]) -> "Report":
        """Where the figures come from, as `evaluation.provenance` names it."""
        return self._add("provenance", facts=facts)

    def html(self, reload: int = 0) -> str:
        """The whole page; reload: seconds after which a browser loads it again, 0 for never."""
        template: Any = _environment().get_template("report.html").module
        parts = [getattr(template, macro)(**arguments) for macro, arguments in self._parts]
        return str(template.page(self.title, self.subtitle, parts, reload)).strip() + "\n"

    def write(self, folder: str | Path, metrics: Mapping[str, Any]) -> Path:
        """Write report.html, metrics.json and the PNGs into `folder`, over older ones; returns the page's path.

        A figure that is not finite becomes null in metrics.json, which has to stay JSON.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        text = json.dumps(_finite(metrics), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
        page = folder / "report.html"
        page.write_text(self.html(), encoding="utf-8")
        return page

    def _add(self, macro: str, **arguments: Any) -> "Report":
        self._parts.append((macro, arguments))
        return self


def _environment() -> Environment:
    """Templates of this package. Autoescape is on, and a name that a template misspells is an error."""
    loader = PackageLoader("stage1_tokenizer", "evaluation")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _slug(heading: str) -> str:
    """The heading as a file name."""
    plain = unicodedata.normalize("NFKD", heading.lower()).encode("ascii", "ignore").decode()  # é becomes e
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")


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
