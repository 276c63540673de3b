"""Take docs/page.png: the page of a running mlxd, with an answer under which its engine was killed.

    python tools/picture.py [--dark] [--width 1280] [URL] [FILE]

Starts nothing. It kills the engine that answers, with KILL: do not point it at a server that others use. Needs chromium and
chromedriver; `pngquant --ext .png --force FILE` makes the picture small.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

QUESTION = "Explain in detail how a request travels through mlxd."
PATIENCE_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1180)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:11435")
    parser.add_argument("file", nargs="?", default="docs/page.png")
    asked = parser.parse_args()
    browser = opened(asked.width, asked.height, "dark" if asked.dark else "light")
    try:
        browser.get(f"{asked.url}/ui")
        converse(browser, asked.url)
        picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        with open(asked.file, "wb") as file:
            file.write(base64.b64decode(picture["data"]))
    finally:
        browser.quit()


def opened(width: int, height: int, scheme: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    return browser


def converse(browser: webdriver.Chrome, url: str) -> None:
    """Ask, kill who answers, and wait until the answer is whole and a spare stands by again."""
    until(lambda: "spare" in text(browser, "#process-rows"))
    browser.find_element(By.ID, "question").send_keys(QUESTION + Keys.ENTER)
    until(lambda: len(text(browser, ".words")) > 300)
    os.kill(answering(url), signal.SIGKILL)
    until(lambda: "tokens in" in text(browser, ".note"))
    until(lambda: "spare" in text(browser, "#process-rows"))
    browser.execute_script("document.activeElement.blur(); document.getElementById('talk').scrollTop = 0")
    time.sleep(16)  # until what was announced is gone


def answering(url: str) -> int:
    """The process that holds a model, by the first look of the feed."""
    with urllib.request.urlopen(f"{url}/ui/feed", timeout=PATIENCE_S) as feed:
        for line in feed:
            if line.startswith(b'data: {"at"'):
                told: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                return next(engine["pid"] for engine in told["status"]["engines"] if engine["model"])
    raise SystemExit("the feed ended before it said anything")


def text(browser: webdriver.Chrome, selector: str) -> str:
    return " ".join(one.text for one in browser.find_elements(By.CSS_SELECTOR, selector))


def until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        if time.monotonic() > deadline:
            raise SystemExit("the page does not get there: is mlxd ready, with a spare engine?")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
