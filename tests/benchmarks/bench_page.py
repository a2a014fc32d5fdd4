"""`python -m tests.benchmarks.bench_page`: time from a move of the playground's slider to the picture, in a browser.

The tokenizer of the demo, at random weights (time does not depend on them), unspools a noise picture; the slider is
moved through all its lengths several times. A move ends when the pictures of the answer are decoded and the next frame
begins.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch

from stage2_prior.play.command import free_port
from stage2_prior.play.studio import Studio
from tests.browser import browser
from tests.same_numbers import build

MOVE = """const [k, done] = arguments, out = document.querySelector("#unspooled")
const slider = document.querySelector("#latents input[type=range]"), start = performance.now()
const watch = new MutationObserver(async () => {
  if (out.querySelector("p[data-k]")?.dataset.k != k) return
  watch.disconnect()
  await Promise.all([...out.querySelectorAll("img")].map(image => image.decode()))
  requestAnimationFrame(() => done(performance.now() - start))
})
watch.observe(out, {subtree: true, childList: true, attributes: true})
slider.value = k
slider.dispatchEvent(new Event("input", {bubbles: true}))"""


def moves(driver: Any, url: str, k: int, rounds: int) -> list[float]:
    """Milliseconds of every move but those of the first round."""
    driver.get(url)
    while not driver.execute_script("return document.querySelector('#latents input') !== null"):
        time.sleep(0.1)
    lengths = [*range(2, k + 1), 1]
    taken = [driver.execute_async_script(MOVE, length) for _ in range(rounds) for length in lengths]
    return taken[len(lengths) :]


def main(arguments: list[str] | None = None) -> None:
    """Print median and 95th percentile; `arguments` as on the command line, None for the process's own."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_page", description=__doc__)
    parser.add_argument("--configs", nargs="+", default=["stage1/demo", "variants/narrow_latents"])
    parser.add_argument("--rounds", type=int, default=4, help="times that the slider walks through all lengths")
    options = parser.parse_args(arguments)
    from stage2_prior.play.page import serve

    torch.manual_seed(0)
    tokenizer = build("stage1", options.configs, []).tokenizer.eval()
    colours, shapes = ("red", "green", "blue", "gray"), ("circle", "square", "star", "cross")
    captions = [f"a {c} {s} above a {d} {t}" for c in colours for s in shapes for d in colours for t in shapes]
    tokenizer.vocabulary.fit(captions)
    side = tokenizer.image_size
    picture = ("noise", torch.rand(1, 3, side, side) * 2 - 1)
    port = free_port("127.0.0.1", None)
    app = serve(Studio(tokenizer, None, captions), [picture], "127.0.0.1", port, block=False)
    with browser() as driver:
        taken = moves(driver, f"http://127.0.0.1:{port}", tokenizer.num_latents, options.rounds)
    app.close()
    print(
        f"{len(taken)} moves, {len(captions)} captions, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: median"
        f" {statistics.median(taken):.0f} ms, 95th percentile {statistics.quantiles(taken, n=20)[-1]:.0f} ms"
    )


if __name__ == "__main__":
    main()
