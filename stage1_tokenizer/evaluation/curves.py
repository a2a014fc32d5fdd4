"""One plot of the reports: lines over the number of latents, as a PNG on a transparent ground.

The axis of x is logarithmic with ticks at the values that were measured, since prefix lengths double; of training steps
it is linear. A page needs each plot twice, once with dark ink for light screens and once with light ink; the lines keep
their colours.
"""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure as Canvas

SERIES_COLOURS = ("#3b6fd4", "#d9822b", "#2a9d6f", "#b14fc5", "#c2424d", "#8a6d3b")
REFERENCE_COLOUR = "#7a7f87"
INK = {"light": "#1d2330", "dark": "#d9dee8"}  # by the screen that it is for

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label -> (x, y)


def draw_curve(x_label: str, y_label: str, series: Series, ink: str, log: bool = True) -> bytes:
    """A plot with text and axes in `ink`. A level series behind the first is a reference: dashed and grey."""
    with matplotlib.rc_context({"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink}):
        canvas = Canvas(figsize=(5.0, 3.2), dpi=144, layout="constrained")
        axes = canvas.add_subplot()
        for index, (label, (x, y)) in enumerate(series.items()):
            colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
            if index and len(set(y)) == 1 and len(y) > 1:
                axes.axhline(y[0], linestyle="--", linewidth=1.3, color=REFERENCE_COLOUR, label=label)
            else:
                axes.plot(x, y, marker="o", markersize=4, linewidth=1.8, color=colour, label=label)
        if log:
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
