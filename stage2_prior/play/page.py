"""The playground's page: four tabs of Gradio over the functions of `studio`.

    Unspool   a picture, a slider over its latents: what they bring back, what the last one changed, nearest captions
    Write     a caption, and the picture while its line is drawn
    Edit      keep the first latents and draw the rest anew, swap them between two pictures, walk between two
    Read      the caption that the prior writes, and the log-likelihood of the line under a given one

Uploads come as bytes and are decoded by the data room's allow-list, never by Gradio. The slider answers without the
queue, everything else waits its turn in it. What goes wrong is shown as one sentence, and the page lives on.
"""

import functools
import html
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
from torch import Tensor

from stage1_tokenizer.evaluation.curves import REFERENCE_COLOUR, draw_curve
from stage1_tokenizer.evaluation.picture_sheet import data_uri, image_strip, png
from stage2_prior.play.studio import LONGEST_CAPTION, MOST_STEPS, Drawing, Picture, PlayError, Studio

Example = tuple[str, Tensor]
LARGEST_UPLOAD = "20mb"
WAITING = 16  # requests that may wait in the queue
VISITS = 32  # open pages that are remembered; the oldest goes first
SHOWN = 224  # pixels of the page that a picture is wide
CSS = """
.pictures {display: flex; flex-wrap: wrap; gap: 12px}
.pictures figure {margin: 0; max-width: 100%}
.pictures img {image-rendering: pixelated; height: auto; max-width: 100%; border-radius: 4px}
.pictures figcaption {font-size: 14px; opacity: .8}
"""


def figures(*named: tuple[str, Tensor], width: int = SHOWN) -> str:
    """Pictures (N, 3, S, S) in [-1, 1], a strip each, with a line of text below, as HTML."""
    cells = []
    for name, images in named:
        source, text = data_uri(png(image_strip(images))), html.escape(name, quote=True)
        size = f"width:{width * len(images)}px"
        cells.append(
            f"<figure><img src='{source}' style='{size}' alt='{text}'><figcaption>{text}</figcaption></figure>"
        )
    return f"<div class='pictures'>{''.join(cells)}</div>"


def change_map(change: Tensor) -> Tensor:
    """A change in [-2, 2] around mid grey, scaled so that its largest value is white or black."""
    return change / change.abs().max().clamp_min(1e-6)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, or generator, whose errors for users (ValueError, OSError) are shown on the page."""

    @functools.wraps(function)
    def answer(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    @functools.wraps(function)
    def answers(*arguments: Any) -> Any:
        try:
            yield from function(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return answers if inspect.isgeneratorfunction(function) else answer


def drawing_of(values: Sequence[Any]) -> Drawing:
    """Raises PlayError where a box was emptied."""
    if None in values:
        raise PlayError("a box below `How it is drawn` is empty; give it a value")
    return Drawing(*values)


def needed(picture: Picture | None, name: str) -> Picture:
    """Raises PlayError where none is chosen."""
    if picture is None:
        raise PlayError(f"choose a picture first: {name}")
    return picture


def caption_box(elem_id: str, label: str = "caption") -> gr.Textbox:
    return gr.Textbox("", label=label, max_length=20 * LONGEST_CAPTION, elem_id=f"{elem_id}-caption")


def slug(*words: str) -> str:
    """Words as the id of an element."""
    return "-".join(words).lower().replace(" ", "-")


class Page:
    """Builds the page. studio: models and functions. examples: pictures to choose from, by name."""

    def __init__(self, studio: Studio, examples: Sequence[Example]):
        self.studio, self.examples = studio, dict(examples)
        self.k = studio.tokenizer.num_latents

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="Unspool", analytics_enabled=False, delete_cache=(600, 3600)) as app:
            gr.Markdown("# Unspool")
            if self.studio.maybe_prior is None:
                gr.Markdown(f"Unspool, swap and interpolate only: {html.escape(self.studio.absent)}")
            with gr.Tab("Unspool"):
                self.unspool_tab()
            with gr.Tab("Write"):
                self.write_tab()
            with gr.Tab("Edit"):
                self.edit_tab()
            with gr.Tab("Read"):
                self.read_tab()
        app.queue(max_size=WAITING, default_concurrency_limit=1)
        return app

    # -- choosing a picture -------------------------------------------------------------------------------------------

    def picker(self, name: str, first: int = 0) -> gr.State:
        """A place to drop a picture, a list of held-out ones, and what was chosen (returned); at first one of these."""
        names = list(self.examples)
        start = names[first] if first < len(names) else None

        def show(picture: Picture | None) -> tuple[Picture | None, str]:
            return picture, "" if picture is None else figures((name, picture.image), width=SHOWN // 2)

        def of_file(content: bytes | None) -> tuple[Picture | None, str]:
            return show(None if content is None else self.studio.read(content, "the upload"))

        def of_held(held: str | None) -> tuple[Picture | None, str]:
            return show(self.studio.encode(self.examples[held]) if held in self.examples else None)

        picture, preview = of_held(start)
        chosen = gr.State(picture, time_to_live=3600)
        with gr.Column():
            label = f"{name}: drop or choose a file"
            file = gr.File(label=label, type="binary", height=130, elem_id=slug(name, "file"))
            label = f"{name}: or a held-out one"
            held = gr.Dropdown(names, value=start, label=label, visible=bool(names), elem_id=slug(name, "held"))
            shown = gr.HTML(preview, elem_id=slug(name, "shown"))
        file.change(guarded(of_file), file, [chosen, shown], show_progress="hidden")
        held.input(guarded(of_held), held, [chosen, shown], show_progress="hidden")
        return chosen

    # -- tabs ---------------------------------------------------------------------------------------------------------

    def unspool_tab(self) -> None:
        def unspool(picture: Picture | None, k: int) -> str:
            if picture is None:
                return "Choose a picture."
            prefix = self.studio.unspool(picture, int(k))
            lines = "".join(f"<li>{html.escape(c)} <small>{v:.2f}</small></li>" for c, v in prefix.captions)
            rate = f"{prefix.bits:,.0f} bits at most" if prefix.bits < float("inf") else "no noise, so no bits to count"
            shown = figures(
                ("the picture", picture.image),
                (f"from {k} of {self.k} latents", prefix.image),
                (f"what latent {k} changed, at most {prefix.change.abs().max():.2f} of 2", change_map(prefix.change)),
            )
            near = f"<p>Nearest captions of {len(self.studio.captions):,}:</p><ol>{lines}</ol>" if lines else ""
            return f"{shown}<p data-k='{k}'>PSNR {prefix.psnr:.2f} dB; {rate}</p>{near}"

        with gr.Row():
            picture = self.picker("Picture")
            with gr.Column(scale=3):
                k = gr.Slider(1, self.k, 1, step=1, label="latents", elem_id="latents")
                out = gr.HTML(unspool(picture.value, 1), elem_id="unspooled")
        answer = guarded(unspool)
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last"}
        k.input(answer, [picture, k], out, **quick)
        picture.change(answer, [picture, k], out, **quick)

    def drawing(self) -> list[gr.components.Component]:
        """Inputs in the order of `Drawing`."""
        names = [("the head's own", ""), *((name, name) for name in self.studio.solvers())]
        with gr.Accordion("How it is drawn", open=False):
            return [
                gr.Slider(0, 8, 2, step=0.25, label="guidance (1: none)"),
                gr.Slider(0, MOST_STEPS, 0, step=1, label="evaluations per latent (0: the solver's own)"),
                gr.Dropdown(names, value="", label="solver"),
                gr.Slider(0, 2, 1, step=0.05, label="temperature"),
                gr.Number(0, label="seed", precision=0, minimum=0),
                gr.Textbox("", label="negative caption (guidance above 1)", max_length=LONGEST_CAPTION + 1),
            ]

    def grown(self, lines: Iterator[Tensor]) -> Iterator[str]:
        """The picture of every line, as it grows."""
        for z in lines:
            yield figures((f"{z.shape[1]} of {self.k} latents", self.studio.decode(z)))

    def write_tab(self) -> None:
        with gr.Row():
            with gr.Column():
                caption = caption_box("write")
                how = self.drawing()
                button = gr.Button("Draw", variant="primary", elem_id="write")
            out = gr.HTML(elem_id="written")

        def write(caption: str, *how: Any) -> Iterator[str]:
            yield from self.grown(self.studio.draw(caption, drawing_of(how)))

        gr.on([button.click, caption.submit], guarded(write), [caption, *how], out, show_progress="hidden")

    def edit_tab(self) -> None:
        with gr.Row():
            first, second = self.picker("Picture A"), self.picker("Picture B", 1)
            with gr.Column(scale=2):
                k = gr.Slider(1, self.k, 1, step=1, label="latents to keep, or to swap", elem_id="keep")
                caption = caption_box("edit")
                how = self.drawing()
                with gr.Row():
                    redraw = gr.Button("Keep A's first, draw the rest", variant="primary", elem_id="redraw")
                    swap, walk = (
                        gr.Button("Swap A and B", elem_id="swap"),
                        gr.Button("Walk from A to B", elem_id="walk"),
                    )
                out = gr.HTML(elem_id="edited")

        def keep(a: Picture | None, k: int, caption: str, *how: Any) -> Iterator[str]:
            yield from self.grown(self.studio.draw(caption, drawing_of(how), needed(a, "A").z[:, : int(k)]))

        def swapped(a: Picture | None, b: Picture | None, k: int) -> str:
            images = self.studio.swap(needed(a, "A"), needed(b, "B"), int(k))
            return figures((f"first {k} of A, rest of B", images[:1]), (f"first {k} of B, rest of A", images[1:]))

        def walked(a: Picture | None, b: Picture | None) -> str:
            return figures(("from A to B", self.studio.interpolate(needed(a, "A"), needed(b, "B"))), width=SHOWN // 2)

        redraw.click(guarded(keep), [first, k, caption, *how], out, show_progress="hidden")
        swap.click(guarded(swapped), [first, second, k], out, show_progress="hidden")
        walk.click(guarded(walked), [first, second], out, show_progress="hidden")

    def read_tab(self) -> None:
        with gr.Row():
            picture = self.picker("Picture to read")
            with gr.Column(scale=3):
                read = gr.Button("Write its caption", elem_id="read")
                written = gr.HTML(elem_id="caption")
                caption, other = caption_box("likely"), caption_box("other", "and of another (may be empty)")
                score = gr.Button("Log-likelihood of the line", variant="primary", elem_id="score")
                out = gr.HTML(elem_id="scored")

        def captioned(picture: Picture | None) -> str:
            return f"<p>{html.escape(self.studio.caption(needed(picture, 'first')))}</p>"

        def scored(picture: Picture | None, *captions: str) -> str:
            asked = dict.fromkeys(c for c in captions if c.strip()) or {captions[0]: None}
            nats = {c: self.studio.nats(needed(picture, "first"), c) for c in asked}
            x = list(range(1, self.k + 1))
            labels = {c[:40]: (x, values) for c, values in nats.items()}
            plot = data_uri(draw_curve("latent", "nats", labels, REFERENCE_COLOUR, log=False))
            sums = "".join(f"<li>{html.escape(c)}: {sum(v):.2f} nats</li>" for c, v in nats.items())
            return f"<img src='{plot}' alt='nats of each latent' style='max-width:100%;width:640px'><ul>{sums}</ul>"

        read.click(guarded(captioned), picture, written, show_progress="hidden")
        score.click(guarded(scored), [picture, caption, other], out, show_progress="hidden")


def serve(studio: Studio, examples: Sequence[Example], host: str, port: int, block: bool = True) -> gr.Blocks:
    """Serve the page until interrupted; with block=False return at once (the page is closed by `close`)."""
    app = Page(studio, examples).build()
    app.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        max_file_size=LARGEST_UPLOAD,
        max_threads=8,
        state_session_capacity=VISITS,
        run_history=False,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    print(f"playground: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    if block:
        app.block_thread()
    return app
