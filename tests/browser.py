"""A real browser for tests: headless Chromium, driven by Selenium. Without it these tests are skipped by name."""

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="no Chromium with its driver on this machine (chromium, chromium-driver)"
)


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """A Selenium driver; what the pages wrote to the console is in `get_log("browser")`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"window-size={width},{height}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def console_errors(driver: Any) -> list[str]:
    """What pages wrote to the console as errors, since the last call.

    Gradio asks how far an upload is; on a busy machine a small one has ended before it asks, and it gets a 404, which
    its own script then writes as the `Response` that it is.
    """
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    late = [message for message in errors if "/upload_progress?" in message]
    return [message for message in errors if message not in late and not (late and message.endswith(" Response"))]


def prefer(driver: Any, scheme: str, width: int) -> None:
    """A window of `width` pixels and a preferred scheme, "light" or "dark"."""
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def shown_pictures(driver: Any, css: str) -> list[Tensor]:
    """The pictures below an element, as uint8 (3, H, W), read from the addresses that hold them."""
    sources = driver.execute_script(f"return [...document.querySelectorAll('{css} img')].map(i => i.src)")
    decoded = [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGB") for source in sources]
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in decoded]
