"""The playground as a person uses it: every tab in a real browser, and what it shows against what the API gives."""

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.pictures.transforms import to_pixels
from stage2_prior.play.studio import Studio
from tests.browser import browser, console_errors, needs_browser, prefer, shown_pictures
from tests.stage2_prior.play.test_studio import made, png_of
from tests.tiny import CAPTIONS, K, pictures

pytestmark = [needs_browser, pytest.mark.slow]
HOST, TOAST = "127.0.0.1", "[data-testid=toast"
SET = """const e = document.querySelector(arguments[0]); e.value = arguments[1]
e.dispatchEvent(new Event("input", {bubbles: true}))"""


class Served:
    """A page that is served by this process."""

    def __init__(self, studio: Studio) -> None:
        from stage2_prior.play.page import serve

        self.studio = studio
        self.examples = [(f"{i}: a picture", image) for i, image in enumerate(pictures(3).split(1))]
        with socket.socket() as probe:  # tests run in several processes: none from a range that all would begin with
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        self.app = serve(studio, self.examples, HOST, port, block=False)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    page = Served(made())
    yield page
    page.app.close()


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(served: Served, driver: Any) -> Iterator[Any]:
    """The page, freshly opened; after the test, no error was written to the console."""
    open_page(driver, served.url)
    yield driver
    assert console_errors(driver) == []


def open_page(driver: Any, url: str) -> None:
    driver.get(url)
    until(driver, "return document.querySelector('#latents input') !== null")


def until(driver: Any, script: str, seconds: float = 30) -> Any:
    """Wait until a script returns something true, and return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, 0.05).until(lambda d: d.execute_script(script))


def element(driver: Any, css: str) -> Any:
    return driver.find_element("css selector", css)


def tab(driver: Any, name: str) -> None:
    (button,) = [b for b in driver.find_elements("css selector", "button[role=tab]") if b.text == name]
    button.click()


def fill(driver: Any, name: str, text: str) -> None:
    """Put a text into a box as pasting does: typing ten thousand letters takes a minute."""
    driver.execute_script(SET, f"#{name}-caption textarea, #{name}-caption input", text)


def upload(driver: Any, picker: str, file: Path) -> None:
    element(driver, f"#{picker}-file input[type=file]").send_keys(str(file))


def wait_text(driver: Any, css: str, text: str) -> str:
    return str(
        until(driver, f"const t = document.querySelector('{css}').textContent; return t.includes('{text}') && t")
    )


def refusal(driver: Any) -> str:
    """The sentence that the page answers with, and close it."""
    text = str(until(driver, f"const t = document.querySelector('{TOAST}-text]'); return t && t.textContent"))
    assert "&" not in text, "plain words, not HTML"
    driver.execute_script(f"document.querySelectorAll('{TOAST}-close]').forEach(b => b.click())")
    until(driver, f"return document.querySelector('{TOAST}-text]') === null")
    return text


def same(shown: Tensor, wanted: Tensor) -> bool:
    """A shown picture uint8 and one in [-1, 1], to one level of 255."""
    return bool((shown.int() - to_pixels(wanted).int()).abs().max() <= 1)


def test_unspool(page: Any, served: Served, tmp_path: Path) -> None:
    studio = served.studio
    first = studio.encode(served.examples[0][1])
    assert same(shown_pictures(page, "#unspooled")[1], studio.unspool(first, 1).image[0]), "a picture is there at once"
    (tmp_path / "photo.png").write_bytes(png_of())
    upload(page, "picture", tmp_path / "photo.png")
    picture = studio.read(png_of(), "photo")
    for k in (1, 4, K):
        page.execute_script(SET, "#latents input[type=range]", k)
        wanted = studio.unspool(picture, k)
        text = wait_text(page, "#unspooled", f"PSNR {wanted.psnr:.2f} dB; {wanted.bits:,.0f} bits")
        shown = shown_pictures(page, "#unspooled")
        assert same(shown[0], picture.image[0]) and same(shown[1], wanted.image[0])
        assert same(shown[2], (wanted.change / wanted.change.abs().max())[0])
        at = [text.index(f"{caption} {cosine:.2f}") for caption, cosine in wanted.captions]
        assert at == sorted(at), "nearest first"


def test_write(page: Any, served: Served) -> None:
    tab(page, "Write")
    page.execute_script("""window.seen = []; new MutationObserver(() => {
        const t = document.querySelector('#written figcaption'); if (t) window.seen.push(t.textContent)
    }).observe(document.querySelector('#written'), {subtree: true, childList: true, characterData: true})""")
    fill(page, "write", CAPTIONS[0])
    element(page, "#write").click()
    wait_text(page, "#written", f"{K} of {K} latents")
    z = served.studio.prior.sample([CAPTIONS[0]], generator=torch.Generator().manual_seed(0))
    assert same(shown_pictures(page, "#written")[0], served.studio.decode(z)[0])
    assert len(set(page.execute_script("return window.seen"))) > 1, "it is shown while it is being drawn"


def test_edit(page: Any, served: Served) -> None:
    studio = served.studio
    a, b = (studio.encode(image) for _, image in served.examples[:2])
    tab(page, "Edit")
    page.execute_script(SET, "#keep input[type=range]", 2)
    until(page, "return document.querySelector('#keep input[type=number]').value === '2'")
    fill(page, "edit", CAPTIONS[1])
    element(page, "#redraw").click()
    wait_text(page, "#edited", f"{K} of {K} latents")
    z = studio.prior.sample([CAPTIONS[1]], generator=torch.Generator().manual_seed(0), prefix=a.z[:, :2])
    assert same(shown_pictures(page, "#edited")[0], studio.decode(z)[0])
    element(page, "#swap").click()
    wait_text(page, "#edited", "first 2 of B")
    assert all(
        same(shown, wanted) for shown, wanted in zip(shown_pictures(page, "#edited"), studio.swap(a, b, 2), strict=True)
    )
    element(page, "#walk").click()
    wait_text(page, "#edited", "from A to B")
    (strip,) = shown_pictures(page, "#edited")
    side = a.image.shape[-1]
    assert same(strip[..., :side], studio.decode(a.z)[0]) and same(strip[..., -side:], studio.decode(b.z)[0])


def test_read(page: Any, served: Served) -> None:
    studio = served.studio
    picture = studio.encode(served.examples[0][1])
    tab(page, "Read")
    element(page, "#read").click()
    assert wait_text(page, "#caption", studio.caption(picture))
    fill(page, "likely", CAPTIONS[0])
    fill(page, "other", CAPTIONS[1])
    element(page, "#score").click()
    for caption in CAPTIONS[:2]:
        wait_text(page, "#scored", f"{caption}: {sum(studio.nats(picture, caption)):.2f} nats")
    assert len(shown_pictures(page, "#scored")) == 1


def test_what_cannot_be_done_is_one_sentence_and_the_page_lives_on(page: Any, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture at all")
    upload(page, "picture", tmp_path / "words.png")
    assert "no usable picture (unreadable)" in refusal(page)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(200 * 2**20)
    element(page, "#picture-file button[aria-label='Clear']").click()
    upload(page, "picture", tmp_path / "large.png")
    assert "maximum" in refusal(page)
    tab(page, "Write")
    for caption, sentence in (("", "at least one word"), ("a" * 10_000, "10000 characters, wanted at most 500")):
        fill(page, "write", caption)
        element(page, "#write").click()
        assert sentence in refusal(page)
    fill(page, "write", CAPTIONS[0])
    element(page, "#write").click()
    wait_text(page, "#written", f"{K} of {K} latents")


def test_the_server_refuses_a_large_upload_by_itself(served: Served) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(25 * 10**6)
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{served.url}/gradio_api/upload", body, headers), timeout=30)
    assert getattr(refused.value, "code", 413) == 413


def test_two_users_at_once_each_get_their_own(page: Any, served: Served) -> None:
    with browser() as other:
        open_page(other, served.url)
        users = list(zip((page, other), CAPTIONS, strict=False))
        for user, caption in users:
            tab(user, "Write")
            fill(user, "write", caption)
        threads = [threading.Thread(target=element(user, "#write").click) for user, _ in users]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for user, caption in users:
            wait_text(user, "#written", f"{K} of {K} latents")
            z = served.studio.prior.sample([caption], generator=torch.Generator().manual_seed(0))
            assert same(shown_pictures(user, "#written")[0], served.studio.decode(z)[0])


def test_without_a_prior_the_page_says_so_and_unspools(driver: Any) -> None:
    page = Served(made(prior=False))
    try:
        open_page(driver, page.url)
        assert "no prior in runs/x/prior" in element(driver, "body").text
        page_k = page.studio.unspool(page.studio.encode(page.examples[0][1]), 3)
        driver.execute_script(SET, "#latents input[type=range]", 3)
        wait_text(driver, "#unspooled", f"PSNR {page_k.psnr:.2f} dB")
        tab(driver, "Write")
        fill(driver, "write", CAPTIONS[0])
        element(driver, "#write").click()
        assert "no prior in runs/x/prior" in refusal(driver)
    finally:
        driver.get("about:blank")
        page.app.close()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_at_every_width_in_both_schemes(page: Any, served: Served, width: int, scheme: str) -> None:
    prefer(page, scheme, width)
    open_page(page, served.url)
    for name in ("Unspool", "Write", "Edit", "Read"):
        tab(page, name)
        needed, there = page.execute_script("const d = document.documentElement; return [d.scrollWidth, d.clientWidth]")
        assert needed <= there, f"{name} scrolls sideways"
    ground, ink = page.execute_script("""const style = getComputedStyle(document.body)
        const light = c => c.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 3
        return [light(style.backgroundColor), light(style.color)]""")
    assert abs(ground - ink) > 120 and (ground > ink) == (scheme == "light")


def test_many_visits_are_not_remembered(served: Served) -> None:
    from gradio_client import Client

    from stage2_prior.play.page import VISITS

    remembered = served.app.app.state_holder.session_data
    for _ in range(VISITS + 3):
        Client(served.url, verbose=False, analytics_enabled=False).predict(1, api_name="/unspool")
    assert len(remembered) == VISITS
