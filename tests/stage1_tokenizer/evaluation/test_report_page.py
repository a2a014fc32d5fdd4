"""The report's page in a real browser: readable on a telephone and on a desk, in light and in dark, without errors."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from stage1_tokenizer.evaluation.report import Figure, Report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DARK, LIGHT = 0, 1  # Chromium's own numbers for what a user prefers
LOOK = """<!doctype html><body>
<iframe id="page" src="{page}" style="width:{width}px;height:900px;border:0"></iframe><script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument, style = event.target.contentWindow.getComputedStyle
  const look = {{
    width: page.documentElement.clientWidth, needed: page.documentElement.scrollWidth,
    ground: style(page.body).backgroundColor, ink: style(page.body).color,
    small: Math.min(...[...page.querySelectorAll("p,td,th,dd,span")].map(e => parseFloat(style(e).fontSize))),
    broken: [...page.images].filter(image => !image.naturalWidth).length, pictures: page.images.length,
    plot: page.querySelector(".curves img").currentSrc,
  }}
  document.body.textContent = "LOOK" + JSON.stringify(look) + "END"
}}
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part, and words and tables that are wider than a telephone."""
    pictures, long = torch.rand(8, 3, 32, 32) * 2 - 1, "a_caption_without_a_space_" * 12
    report = Report("Reconstruction", long).figures([Figure("PSNR", "30 dB", long)])
    report.table("Numbers", ["k", *map(str, range(20))], [["PSNR dB", *["30.25"] * 20]], long)
    report.curve("PSNR by k", "latents", "dB", {"a": ([1, 2, 4], [1.0, 2.0, 3.0])})
    report.grid("Pictures", ["learned", "PCA"], [(long, [pictures, pictures])])
    report.provenance({"command": long})
    return report.write(tmp_path_factory.mktemp("page"), {})


def look(page: Path, width: int, scheme: int) -> dict[str, Any]:
    """What a browser with a window of `width` pixels and a preferred scheme makes of the page."""
    frame = page.parent / f"{width}_{scheme}.html"
    frame.write_text(LOOK.format(page=page.as_uri(), width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr", "--window-size=1600,1000"]
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={page.parent / 'profile'}", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(done.stdout.split("LOOK")[1].split("END")[0]))
    return seen


@pytest.mark.parametrize("width", [400, 1400])
def test_a_page_is_readable_at_every_width_in_both_schemes(page: Path, width: int) -> None:
    light, dark = look(page, width, LIGHT), look(page, width, DARK)
    for seen in (light, dark):
        assert seen["needed"] <= seen["width"] <= width, "the page itself never scrolls sideways"
        assert seen["small"] >= 12 and seen["pictures"] == 3 and seen["broken"] == 0
        ground, ink = (sum(map(int, seen[name].strip("rgb()").split(","))) / 3 for name in ("ground", "ink"))
        assert abs(ground - ink) > 150, "dark on light, or light on dark"
        assert (ground > ink) == (seen is light)
    assert light["plot"] != dark["plot"], "each scheme has plots with its own ink"
