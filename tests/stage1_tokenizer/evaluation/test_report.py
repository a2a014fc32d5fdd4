"""The report page: escapes what it is given, stands alone, keeps files beside it; picture strips keep pixels."""

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stage1_tokenizer.evaluation.curves import SERIES_COLOURS, draw_curve
from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.evaluation.picture_sheet import image_grid, image_strip
from stage1_tokenizer.evaluation.provenance import attribution, provenance
from stage1_tokenizer.evaluation.report import Figure, Report
from stage1_tokenizer.training.card import tokenizer_card
from tests.tiny import tiny_tokenizer


def test_strip_keeps_every_pixel() -> None:
    images = torch.rand(3, 3, 4, 5) * 2 - 1
    strip = np.asarray(image_strip(images))
    assert strip.shape == (4, 3 * 5 + 2 * 2, 4)
    for i, image in enumerate(images):
        cell = strip[:, i * 7 : i * 7 + 5]
        np.testing.assert_allclose(cell[..., :3] / 127.5 - 1, image.permute(1, 2, 0), atol=0.5 / 127.5 + 1e-6)
        assert (cell[..., 3] == 255).all()
    assert (strip[:, 5:7, 3] == 0).all(), "gaps are transparent"


def test_strip_wraps_and_scales_and_grid_stacks() -> None:
    images = torch.zeros(5, 3, 4, 4)
    assert image_strip(images, columns=2).size == (10, 16)
    assert image_strip(images, scale=3).size == (3 * 28, 12)
    assert image_grid([images, images[:2]], scale=2).size == (2 * 28, 2 * 4 + 2 * 2 + 2 * 4)


def test_page_has_every_part_and_loads_nothing(tmp_path: Path) -> None:
    pictures = torch.zeros(2, 3, 8, 8)
    report = Report("A <title>", "subtitle").figures([Figure("PSNR", "30 dB", "PCA 28 dB")])
    report.section("Curves")
    report.curve("One", "k", "dB", {"a": ([1, 2, 4], [1.0, 2.0, 3.0])}).curve("Two", "k", "dB", {"a": ([1], [1.0])})
    report.table("Table", ["k", "x"], [["1", "<b>"]], "note")
    report.grid("Pictures", ["left", "right"], [("row & one", [pictures, pictures])])
    report.skipped([Skipped("lpips[alex]", "no weights", "put them there")]).provenance(provenance(3))
    page = report.write(tmp_path / "out", {"a": math.inf, "b": {1: torch.tensor([1.0])}}).read_text()
    assert "A &lt;title&gt;" in page and "<b>" not in page.split("<table>", 1)[1].split("</table>")[0]
    for text in ("30 dB", "row &amp; one", "lpips[alex]", "put them there", "commit", "torch"):
        assert text in page
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert page.count('<div class="curves">') == 1, "neighbouring curves share a row"
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"a": None, "b": {"1": [1.0]}}
    files = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert files == {"one.png", "two.png", "pictures_left.png", "pictures_right.png"}
    assert Image.open(tmp_path / "out" / "pictures_left.png").width == (2 * 8 + 2) * 8


HOSTILE = """<script>alert(1)</script> "quoted" 'onerror=x' {{ 7 * 7 }} {% raw %} </style>&amp;"""


class Elements(HTMLParser):
    """The tags, attribute names and visible texts of a page, as a browser would take them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def page_with(text: str) -> str:
    """A page that has `text` in every place that takes text."""
    picture, figure = torch.zeros(1, 3, 8, 8), Figure(text, text, text)
    report = Report(text, text).figures([figure]).section(text, text).table(text, [text], [[text]], text)
    report.curve(text, "k", "dB", {"a": ([1, 2], [1.0, 2.0])}).grid(text, [text], [(text, [picture])], text)
    return report.skipped([Skipped(text, text, text)]).provenance({text: text}).html()


def test_a_hostile_caption_is_text_wherever_it_stands() -> None:
    harmless, hostile = Elements(page_with("a red circle")), Elements(page_with(HOSTILE))
    assert hostile.tags == harmless.tags and hostile.attributes == harmless.attributes
    assert hostile.texts.count(HOSTILE) == harmless.texts.count("a red circle") >= 18


def test_a_level_first_series_is_drawn_in_its_colour_and_a_level_behind_it_is_not() -> None:
    x = [1, 2, 4]
    for behind, coloured in (([0.1, 0.2, 0.3], True), ([0.1] * 3, False)):
        plot = draw_curve("k", "share", {"ours": (x, [1.0] * 3), "chance": (x, behind)}, "#000000")
        pixels = np.asarray(Image.open(io.BytesIO(plot)).convert("RGB")).reshape(-1, 3).astype(int)
        for colour, wanted in zip(SERIES_COLOURS[:2], (True, coloured), strict=True):
            target = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert bool((abs(pixels - target).max(axis=1) < 3).any()) == wanted


def test_pictures_are_credited_where_their_manifest_asks_for_it(tmp_path: Path) -> None:
    assert "pictures" not in provenance(0, tmp_path)
    (tmp_path / "manifest.json").write_text('{"attribution": "drawn by A (CC-BY-4.0)"}')
    assert provenance(0, tmp_path)["pictures"] == "drawn by A (CC-BY-4.0)"
    card = tokenizer_card(tiny_tokenizer(), {}, attribution(tmp_path))
    assert "drawn by A (CC-BY-4.0)" in card and "## Pictures" not in tokenizer_card(tiny_tokenizer(), {})
