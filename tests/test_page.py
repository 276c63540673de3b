"""The page at /ui in a real browser, before a real daemon with the built-in model, and before a server of fake engines with a token file."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import Daemon
from hub import Fault, Hub, builtin_repository, hub
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from server_client import Supervised, supervised, until
from test_mlxd import real_settings

ADMIN, INFERENCE = "admin-0123456789abc", "inference-0123456789"
#: What looks for barriers: a file of npm's, and its SHA-512.
AXE = "axe-core@4.14.1"
AXE_SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
#: Another name of the built-in model, so hot that it babbles: with this seed it says 1,269 tokens.
TALKER = {"model": "talker", "from": "mlxd-tiny", "parameters": {"temperature": 10.0, "seed": 1, "num_predict": 3000}}
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # which cannot be had as root
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
T = TypeVar("T")
FILES = {"/ui": "text/html", "/ui/page.js": "text/javascript", "/ui/page.css": "text/css"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Supervised]:
    """A server with tokens and fake engines, which say what they are told to."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home:
        token = Path(home) / "token"
        token.write_text(f"inference {INFERENCE}\nadmin {ADMIN}\n")
        token.chmod(0o600)
        with supervised(Path(home), ("tiny", "think")) as running:
            yield running


@pytest.fixture(scope="module")
def there() -> Iterator[Hub]:
    with hub() as one:
        one.repositories["org/small"] = builtin_repository()
        yield one


@pytest.fixture(scope="module")
def daemon_of_all(there: Hub) -> Iterator[Daemon]:
    """Everything real, with a spare engine, a model that talks long, and a hub on loopback."""
    with tempfile.TemporaryDirectory(prefix="mlxd-t-") as home:
        settings = real_settings(Path(home)) | {
            "MLXD_SUPERVISOR_SPARE_BYTES": "0",
            "HF_ENDPOINT": there.url,
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
        }
        with Daemon(Path(home), **settings).running() as d:
            url = f"http://127.0.0.1:{d.status()['port']}"
            assert httpx.post(f"{url}/api/create", json=TALKER, timeout=60, trust_env=False).status_code == 200
            yield d


class Page:
    """The page in a browser. Selectors are CSS."""

    def __init__(self, browser: webdriver.Chrome):
        self.browser = browser
        self.asked: set[str | None] = set()

    # --- doing --------------------------------------------------------------------------------------------------------------

    def open(self, url: str, width: int = 1280, scheme: str = "light") -> None:
        """Anew, with nothing kept."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.browser.get(f"{url}/ui")
        self.run("sessionStorage.clear()")
        self.browser.refresh()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def choose(self, selector: str, value: str) -> None:
        self.until(f"{value} in {selector}", lambda: self.find(f"{selector} option[value='{value}']"))
        self.click(f"{selector} option[value='{value}']")

    def ask(self, question: str) -> None:
        self.find("#question").send_keys(question + Keys.ENTER)

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    # --- looking ------------------------------------------------------------------------------------------------------------

    def text(self, selector: str = "body") -> str:
        """Of all that fits, as it is there, seen or not."""
        found = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent).join('\\n')"
        return str(self.run(found, selector))

    def until(self, what: str, look: Callable[[], T]) -> T:
        def patient() -> T | None:
            with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
                return look()
            return None

        return until(what, patient, lambda: f"{self.text()}\n{self.complaints()}")  # type: ignore[no-any-return]

    def shows(self, selector: str, text: str) -> None:
        self.until(f"{text!r} in {selector}", lambda: text in self.text(selector))

    def focused(self) -> str:
        return str(self.run("return document.activeElement.id"))

    def complaints(self) -> list[str]:
        """What the console says, since the last look."""
        return [entry["message"] for entry in self.browser.get_log("browser")]  # type: ignore[no-untyped-call]

    def expected(self, *words: str) -> None:
        """Every complaint since the last look has one of these words."""
        rest = [complaint for complaint in self.complaints() if not any(word in complaint for word in words)]
        assert not rest

    def listen(self) -> set[str | None]:
        """The hosts that pages asked for something, ever."""
        for entry in self.browser.get_log("performance"):  # type: ignore[no-untyped-call]
            word = json.loads(entry["message"])["message"]
            if word["method"] == "Network.requestWillBeSent" and not word["params"]["request"]["url"].startswith("data:"):
                self.asked.add(urlsplit(word["params"]["request"]["url"]).hostname)
        return self.asked


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]  # type: ignore[assignment]
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(programs[1]))
    try:
        yield Page(browser)
    finally:
        browser.quit()


@pytest.fixture
def page(chromium: Page) -> Iterator[Page]:
    """Complaints of the browser are failures, but those that a test has looked at itself; and nobody but this machine is asked."""
    yield chromium
    chromium.browser.get("about:blank")
    assert chromium.complaints() == []
    assert chromium.listen() <= {"127.0.0.1", None}


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    """The script, fetched once."""
    directory = pytestconfig.cache.mkdir("axe")  # type: ignore[union-attr]
    archive = directory / f"{AXE.replace('@', '-')}.tgz"
    if not archive.exists():
        if not (npm := shutil.which("npm")):
            pytest.skip("no npm here to fetch axe-core with")
        ran = subprocess.run([npm, "pack", AXE], cwd=directory, capture_output=True, text=True, timeout=120)
        if ran.returncode:
            pytest.skip(f"npm cannot fetch axe-core: {ran.stderr[-200:]}")
    assert base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == AXE_SHA512
    with tarfile.open(archive) as files, files.extractfile("package/axe.min.js") as script:  # type: ignore[union-attr]
        return script.read().decode()


def url_of(d: Daemon) -> str:
    return f"http://127.0.0.1:{d.status()['port']}"


# --- the files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_the_files_need_no_token_and_a_browser_may_do_nothing_with_them_but_show_them(guarded: Supervised, path: str) -> None:
    with guarded.client() as client:
        answer, head = client.get(path), client.head(path)
    assert answer.status_code == head.status_code == 200
    assert head.headers["content-length"] == str(len(answer.content)) and head.content == b""
    assert answer.headers["content-type"] == FILES[path] + "; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/ui/", "/ui/index.html", "/ui/../ui", "/ui/%2e%2e/page.py", "/ui/page.js/"])
def test_there_is_no_other_file(guarded: Supervised, path: str) -> None:
    status, _, _ = guarded.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN}\r\n\r\n".encode())
    assert status == 404


def test_what_the_page_shows_is_for_admins_and_for_pages_of_this_server(guarded: Supervised) -> None:
    with guarded.client() as client:
        for path in ("/ui/feed", "/ui/log?of=server"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=bearer(INFERENCE)).status_code == 403
            assert foreign(client, "GET", path).status_code == 403
        for path in ("/api/generate", "/api/pull", "/v1/chat/completions"):
            assert foreign(client, "POST", path).status_code == 403
        for path in FILES:  # but a link to the page may be followed
            visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
            assert client.get(path, headers=visit).status_code == (200 if path == "/ui" else 403)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def foreign(client: httpx.Client, method: str, path: str) -> httpx.Response:
    """As a page of another site would ask that has stolen the token."""
    body = {"model": "tiny"} if method == "POST" else None
    return client.request(method, path, json=body, headers=bearer(ADMIN) | {"Origin": "https://evil.example"})


# --- how it looks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_whoever_looks_sees_how_it_is_and_meets_no_barrier(
    page: Page, daemon_of_all: Daemon, axe: str, width: int, scheme: str
) -> None:
    page.open(url_of(daemon_of_all), width, scheme)
    page.shows("#state", "Ready")
    told = daemon_of_all.status()
    for row in ("supervisor", "server", "mlxd-tiny", "spare", f"pid {told['server']['pid']}"):
        page.shows("#process-rows", row)
    page.shows("#model-rows", "talkeranother name of mlxd-tiny")
    page.ask("What is mlxd?")
    page.shows(".note", "tokens in")
    page.shows("#request-rows", "/v1/chat/completions")
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.run(axe)
    found = page.browser.execute_async_script("axe.run().then(arguments[0])")  # type: ignore[no-untyped-call]
    told_of = [f"{one['id']}: {one['help']}\n{[node['html'] for node in one['nodes']]}" for one in found["violations"]]
    assert not told_of, "\n".join(told_of)
    assert len(found["passes"]) > 20


def test_figures_change_in_place_and_nothing_moves(page: Page, daemon_of_all: Daemon) -> None:
    """The nodes of a second ago are the nodes of now, and the height is the same."""
    page.open(url_of(daemon_of_all))
    page.shows("#process-rows", "mlxd-tiny")
    page.run("window.before = [...document.querySelectorAll('#panels tr, #model option, path')]")
    height = page.run("return document.documentElement.scrollHeight")
    up = page.text("#process-rows tr:first-child td:nth-child(3)")
    page.until("a later second", lambda: page.text("#process-rows tr:first-child td:nth-child(3)") != up)
    assert page.run("return before.length > 8 && before.every((one) => one.isConnected)")
    assert page.run("return document.documentElement.scrollHeight") == height


# --- what happens --------------------------------------------------------------------------------------------------------------


def test_an_answer_goes_on_before_the_readers_eyes_when_its_engine_is_killed(page: Page, daemon_of_all: Daemon) -> None:
    d = daemon_of_all
    d.until("a spare", lambda s: any(engine["state"] == "blank" for engine in s["engines"]))
    page.open(url_of(d))
    page.choose("#model", "talker:latest")
    page.run(WATCH)
    page.ask("Tell me a long story.")
    page.until("a few words", lambda: len(page.text(".words")) > 100)
    pid = next(engine["pid"] for engine in d.status()["engines"] if engine["model"])
    os.kill(pid, signal.SIGKILL)
    killed_at = time.time()
    page.until("the death", lambda: page.run("return window.death"))
    page.until("the resumption", lambda: page.run("return window.resumption"))
    death_s, resumption_s = (page.run(f"return {name}") / 1000 - killed_at for name in ("death", "resumption"))
    print(f"the death was shown after {death_s:.2f} s, the resumed stream after {resumption_s:.2f} s")
    length = len(page.text(".words"))
    page.until("more words", lambda: len(page.text(".words")) > length)
    page.shows("#incidents", f"engine-{slot_of(d, pid)} was killed from outside")
    page.shows("#reason", "1 answer went on in another engine")
    page.click("#stop")
    page.shows(".note", "stopped")


#: When the page first says each of these, in milliseconds since 1970.
WATCH = """
new MutationObserver(() => {
  const text = document.getElementById("talk").textContent;
  if (text.includes("the engine died") || text.includes("resumed after")) window.death ??= Date.now();
  if (text.includes("resumed after")) window.resumption ??= Date.now();
}).observe(document.getElementById("talk"), { childList: true, subtree: true, characterData: true });
"""


def slot_of(d: Daemon, pid: int) -> int:
    return next(record["slot"] for record in d.exits() if record["pid"] == pid)


def test_the_page_finds_the_next_server_when_one_is_killed(page: Page, daemon_of_all: Daemon) -> None:
    d = daemon_of_all
    page.open(url_of(d))
    page.shows("#state", "Ready")
    page.run("window.same = true")
    page.choose("#model", "talker:latest")
    page.ask("Talk.")
    page.until("a few words", lambda: len(page.text(".words")) > 50)
    pid = d.status()["server"]["pid"]
    os.kill(pid, signal.SIGKILL)
    page.shows(".note.bad", "Cut off: the connection broke. Send it again")
    assert page.find("#question").get_attribute("value") == "Talk."
    page.until("the next server", lambda: f"pid {pid}" not in page.text("#process-rows") and page.text("#state") == "Ready")
    page.shows("#incidents", "The server was killed from outside")
    assert page.run("return window.same") is True
    page.expected("net::ERR_", "503")


def test_a_model_is_unloaded_and_loaded_and_a_pull_that_fails_says_why(page: Page, daemon_of_all: Daemon) -> None:
    page.open(url_of(daemon_of_all))
    row = "#model-rows tr[data-key='mlxd-tiny:latest']"
    page.shows(row, "ready")
    page.click(f"{row} button")
    page.shows("#said", "mlxd-tiny is unloaded; the next request loads it again.")
    page.shows(row, "on disk")
    page.click(f"{row} button")
    page.shows("#said", "mlxd-tiny is loaded.")
    page.shows(row, "ready")
    page.find("#pull-name").send_keys("nonsense" + Keys.ENTER)
    page.shows("#pull-error", "nonsense was not pulled: model 'nonsense' not found")
    page.expected("404")


def test_a_pull_shows_how_far_it_is_and_goes_on_when_it_is_killed(page: Page, daemon_of_all: Daemon, there: Hub) -> None:
    d = daemon_of_all
    half = len(there.repositories["org/small"].files["model.safetensors"]) // 2
    there.faults["model.safetensors"] = Fault("stall", at=half)
    page.open(url_of(d))
    page.shows("#model-rows", "mlxd-tiny")
    page.find("#pull-name").send_keys("org/small" + Keys.ENTER)
    page.shows("#process-rows", "puller-1")
    page.shows("#pulls", " MB of 3 MB")
    os.kill(d.until("a puller", lambda s: s["pullers"][0]["pid"])["pullers"][0]["pid"], signal.SIGKILL)
    page.shows("#said", "org/small is here.")
    page.shows("#model-rows", "org/small")
    page.until("its row gone", lambda: not page.text("#pulls"))


def test_a_keyboard_is_enough(page: Page, daemon_of_all: Daemon) -> None:
    page.open(url_of(daemon_of_all))
    page.shows("#model", "talker")
    page.press(Keys.TAB, Keys.ENTER)
    assert page.focused() == "question"
    page.press(Keys.TAB, "t")
    assert page.focused() == "model" and page.run("return document.activeElement.value") == "talker:latest"
    ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    page.press("Talk.", Keys.ENTER)
    page.until("a few words", lambda: len(page.text(".words")) > 50)
    page.press(Keys.TAB, Keys.TAB)
    assert page.focused() == "stop"
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(Keys.SPACE)
    page.shows(".note", "stopped")
    assert page.focused() == "stop"


def test_tabs_do_not_take_the_server_from_each_other(page: Page, daemon_of_all: Daemon) -> None:
    """A browser has six connections for a server, and a tab that nobody looks at gives its own back."""
    windows, url = page.browser.window_handles, url_of(daemon_of_all)
    for _ in range(8):
        page.browser.switch_to.new_window("tab")
        page.open(url)
        page.shows("#state", "Ready")
    for window in set(page.browser.window_handles) - set(windows):
        page.browser.switch_to.window(window)
        page.shows("#state", "Ready")
        page.browser.close()
    page.browser.switch_to.window(windows[0])


# --- what must not happen ------------------------------------------------------------------------------------------------------


def test_markup_is_text_wherever_it_comes_from(page: Page, guarded: Supervised) -> None:
    """A fake engine that echoes says what no trained model could be made to say."""
    page.open(guarded.url)
    enter(page, ADMIN)
    guarded.raw(
        b"GET /<img/src=x/onerror=alert(3)> HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + ADMIN.encode() + b"\r\n\r\n"
    )
    page.choose("#model", "tiny:latest")
    page.ask(f"echo {MARKUP}")
    page.shows(".note", "in ")
    assert MARKUP in page.text(".question") and MARKUP in page.text(".words")
    page.find("#pull-name").send_keys(MARKUP + Keys.ENTER)
    page.shows("#pull-error", MARKUP)
    page.find("#log").location_once_scrolled_into_view  # noqa: B018  # a property that scrolls
    page.shows("#log", "<img/src=x/onerror=alert(3)>")
    assert page.run("return document.querySelectorAll('main img, main script').length") == 0
    page.expected("400", "401", "404")


def test_last_words_are_text(page: Page, daemon_of_all: Daemon) -> None:
    d = daemon_of_all
    page.open(url_of(d))
    engine = d.until("an engine", lambda s: [one for one in s["engines"] if one["state"] == "blank"])["engines"][-1]
    with open(d.paths.log(f"engine-{engine['slot']}"), "a") as log:
        log.write(f"{MARKUP}\n")
    os.kill(engine["pid"], signal.SIGABRT)
    page.shows("#incidents", MARKUP)
    assert page.run("return document.querySelectorAll('main img, main script').length") == 0


def test_a_script_that_got_into_the_page_would_not_run(page: Page, guarded: Supervised) -> None:
    page.open(guarded.url)
    for intrusion in INTRUSIONS:
        page.run(f"try {{ {intrusion} }} catch (error) {{ window.caught = error.name }}")
    assert page.run("return window.caught") == "TypeError"
    assert page.run("return getComputedStyle(document.body).display") != "none"
    assert page.run("return window.owned") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


INTRUSIONS = [
    "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')",
    "document.body.setAttribute('onclick', 'window.owned = 2'); document.body.click()",
    "const one = document.createElement('script'); one.append('window.owned = 3'); document.body.append(one)",
    "const one = document.createElement('style'); one.append('body { display: none }'); document.body.append(one)",
]


# --- a token -------------------------------------------------------------------------------------------------------------------


def enter(page: Page, token: str) -> None:
    page.until("the question", lambda: page.find("#token").is_displayed())
    page.find("#token").send_keys(token + Keys.ENTER)


def test_a_server_with_tokens_asks_for_an_admins(page: Page, guarded: Supervised) -> None:
    page.open(guarded.url)
    page.shows("#state", "A token is needed")
    assert not page.find("#panels").is_displayed() and not page.text("#process-rows")
    for token, sentence in [
        ("no such token", "A token has letters, digits and signs, and no blank."),
        ("no-such-token-0123456789", "The server does not know this token."),
        (INFERENCE, "This token is for inference; the page needs an admin’s."),
    ]:
        page.run("document.getElementById('token').value = ''")
        enter(page, token)
        page.shows("#token-error", sentence)
    enter(page, ADMIN)
    page.until("the panels", lambda: page.find("#panels").is_displayed())
    page.browser.refresh()
    page.until("them again", lambda: page.find("#panels").is_displayed())
    page.click("#forget")
    page.shows("#state", "A token is needed")
    assert page.run("return sessionStorage.length") == 0
    page.expected("401", "403")


def test_thinking_stands_apart_and_an_error_says_what_to_do(page: Page, guarded: Supervised) -> None:
    page.open(guarded.url)
    enter(page, ADMIN)
    page.choose("#model", "think:latest")
    page.ask("think=2 n=4")
    page.shows(".note", "tokens in")
    assert page.text(".answer details p") and page.text(".words")
    assert not set(page.text(".answer details p").split()) & set(page.text(".words").split())
    page.ask("n=3 fail=400")
    page.shows(".note.bad", "Send it again, or choose another model.")
    assert page.find("#question").get_attribute("value") == "n=3 fail=400"
    page.expected("400", "401")
