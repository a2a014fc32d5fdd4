"""What a data directory holds, from its manifest alone: as text with bars and as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from data.schema import read_manifest, write_bytes


def describe(data_dir: Path) -> str:
    """Return a summary of the manifest with histograms as bars."""
    manifest = read_manifest(data_dir)
    lines = [f"{data_dir}: {manifest['kind']}, {len(manifest['shards'])} shards"]
    for split, count in manifest["counts"].items():
        size = sum(s["bytes"] for n, s in manifest["shards"].items() if n.startswith(split + "/"))
        lines.append(f"  {split}: {count} samples, {size / 1e6:.1f} MB")
    for title, bins in histograms(manifest).items():
        most = max(bins.values(), default=1)
        lines.append(f"  {title}:" + ("" if bins else " none"))
        for name, count in bins.items():
            lines.append(f"    {name:>16} {count:>9} {'#' * -(-40 * count // most)}")
    return "\n".join(lines)


def histograms(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the counts that a manifest holds by title and bin; bins of sizes and lengths are named by their edges."""
    captions = manifest.get("captions") or {}
    return {
        "samples left out": manifest.get("dropped") or {},
        "captions left out or repaired": {name: n for name, n in captions.items() if name != "kept"},
        "short side, pixels": _ranges(manifest.get("short_side") or {}),
        "caption length, characters": _ranges(manifest.get("caption_length") or {}),
    }


def plot(data_dir: Path) -> Path:
    """Draw the histograms of the manifest to `stats.png` beside it; return its path.

    Raises:
        DataError: there is no manifest, or the picture cannot be written.
    """
    from matplotlib.figure import Figure  # half a second, only here

    manifest = read_manifest(data_dir)
    drawn = {title: bins for title, bins in histograms(manifest).items() if bins}
    drawn["samples per split"] = manifest["counts"]
    figure = Figure(figsize=(8, 1 + 0.3 * sum(2 + len(bins) for bins in drawn.values())), layout="constrained")
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=[2 + len(bins) for bins in drawn.values()])
    for panel, (title, bins) in zip(axes[:, 0], drawn.items(), strict=True):
        bars = panel.barh(list(bins), list(bins.values()))
        panel.bar_label(bars, padding=3)
        panel.margins(x=0.12)
        panel.invert_yaxis()  # in the order of the text
        panel.xaxis.set_visible(False)  # the bars carry their counts
        panel.set_title(title, loc="left", fontsize="medium")
    figure.suptitle(f"{data_dir.resolve().name}: {manifest['kind']}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes(data_dir / "stats.png", picture.getvalue())
    return data_dir / "stats.png"


def _ranges(bins: dict[str, int]) -> dict[str, int]:
    """Return bins that are named by their lower edge, a power of two, under names that state both: "16-31"."""
    return {f"{edge}-{2 * int(edge) - 1}" if int(edge) > 1 else edge: count for edge, count in bins.items()}
