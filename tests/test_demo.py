"""The live page from end to end: the command serves it, and headless Chromium uses it as people do."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

import piadm
from piadm import models
from piadm.cli import app
from piadm.pictures import pixels

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SOON = 60_000  # milliseconds in which anything must have happened

browsing = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: name one in CHROMIUM")


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "piadm.demo", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)  # what makes an import fail as if it were absent
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr == "piadm demo: the page needs gradio: pip install 'piadm[demo]'\n"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio", reason="no gradio here: pip install 'piadm[demo]'")
    pytest.importorskip("playwright", reason="no playwright here")
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "piadm", "demo", "--port", str(port), "--no-browser"]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)
    assert log.read_text() == f"serving on {address}\n", "the server complained"


@pytest.fixture(scope="module")
def browser(server: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Callable[[], Page]]:
    """Opens the page as one more user; all of them leave at the end.

    Each in a context of its own: tabs of one share six connections to a server, and the page holds two open.
    """
    pages: list[Page] = []

    def come() -> Page:
        pages.append(Page(browser.new_context(), server))
        return pages[-1]

    yield come
    for one in pages:
        one.context.close()
        assert one.foreign == [], "something was asked of another machine"
        assert one.wrong == []


@pytest.fixture
def page(visit: Callable[[], Page]) -> Page:
    return visit()


class Page:
    """The page in a browser of its own, as one user has it."""

    def __init__(self, context: Any, address: str) -> None:
        self.context, self.page = context, context.new_page()
        self.foreign: list[str] = []
        self.wrong: list[str] = []
        self.page.set_default_timeout(SOON)
        self.page.on("request", lambda one: self._seen(one.url, address))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(address)
        self.button("Run").wait_for()

    def _seen(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.foreign.append(url)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def choose(self, **values: object) -> Page:
        for name, value in values.items():
            text = str(value)
            if name in ("model", "sampler", "scheduler"):
                self.page.get_by_role("combobox", name=name.title()).click()
                self.page.get_by_role("option", name=text, exact=True).click()
                continue
            kind = {"label": "combobox", "window": "textbox"}.get(name, "spinbutton")
            field = self.page.locator(f"#{name}").get_by_role(kind).first
            field.fill(text)
            field.press("Enter" if name == "label" else "Tab")
        return self

    def run(self) -> Page:
        self.button("Run").click()
        return self

    def told(self, text: str) -> str:
        self.page.locator("#note", has_text=text).wait_for()
        return str(self.page.locator("#note").inner_text())

    def refused(self) -> str:
        """What the newest message says, which is then closed."""
        message = self.page.get_by_test_id("toast-body").last
        message.wait_for()
        text = str(message.inner_text())
        message.get_by_role("button").last.click()
        message.wait_for(state="detached")
        return text

    def rounds(self, lane: str) -> int:
        cells = self.page.locator(f"#{lane} td")
        return int(cells.first.inner_text()) if cells.count() else 0

    def contrast(self) -> float:
        """Luminance of the text less that of the ground."""
        script = "name => getComputedStyle(document.body)[name].match(/[0-9.]+/g).slice(0, 3).map(Number)"
        text, ground = (sum(self.page.evaluate(script, name)) / 765 for name in ("color", "backgroundColor"))
        return text - ground

    def image(self, lane: str) -> np.ndarray[Any, Any]:
        source = self.page.locator(f"#{lane} img").first.get_attribute("src")
        return np.round(255 * imread(BytesIO(base64.b64decode(source.partition(",")[2])))[..., :3])


def drawn(seed: int, labels: list[int], steps: int) -> np.ndarray[Any, Any]:
    """What the library's sequential sampler draws, as the page shows it: side by side."""
    shape, label = (len(labels), 1, 8, 8), torch.tensor(labels)
    sampler = piadm.Sequential(models.load("digits"), piadm.DDPM(steps))
    samples = sampler(shape, generator=torch.Generator().manual_seed(seed), label=label).samples
    return np.concatenate(list(pixels(samples)), axis=1)


@browsing
def test_a_run_fills_in_on_both_sides_and_ends_on_the_librarys_samples(page: Page) -> None:
    page.choose(label="3,8", steps=250, window=8, samples=2, seed=4).run()
    seen: list[tuple[int, int]] = []
    maps = set()
    while not page.page.locator("#note", has_text="as fast").count():
        seen.append((page.rounds("parallel"), page.rounds("sequential")))
        if page.page.locator("#map img").count():
            maps.add(page.page.locator("#map img").get_attribute("src"))
        time.sleep(0.1)
    told = page.told("as fast")
    between = {pair for pair in seen if pair[0] > 0 and 0 < pair[1] < 250}
    assert len(between) >= 3, "it was to be watched while it ran"
    assert len(maps) >= 3
    rounds = page.rounds("parallel")
    assert page.rounds("sequential") == 250
    assert 250 / 8 <= rounds < 125
    assert f"{rounds} rounds in place of 250" in told
    assert f"Rounds 1 to {rounds} " in page.page.locator("#map").inner_text()
    want = drawn(4, [3, 8], 250)
    assert np.abs(page.image("sequential") - want).max() <= 1
    assert np.abs(page.image("parallel") - want).mean() <= 3  # of 255: the tolerance is 0.01 of 2
    assert page.button("Stop").is_disabled()


@browsing
def test_a_stop_ends_the_run_and_the_page_can_be_used_again(page: Page) -> None:
    page.choose(model="fashion", steps=1000, samples=4).run()
    page.page.wait_for_function("document.querySelector('#sequential td')?.innerText > 2")
    assert page.button("Run").is_disabled()
    page.button("Stop").click()
    page.told("Stopped")
    reached = page.rounds("parallel"), page.rounds("sequential")
    assert 0 < reached[1] < 1000
    time.sleep(0.5)
    assert (page.rounds("parallel"), page.rounds("sequential")) == reached
    page.choose(model="digits", steps=20, samples=1).run()
    page.told("as fast")
    assert page.rounds("sequential") == 20


@browsing
def test_bad_values_are_refused_with_the_librarys_words_and_nothing_runs(page: Page) -> None:
    def refused(**values: object) -> str:
        return page.choose(**values).run().refused()

    assert "window is 0: give an integer of at least 1" in refused(window=0)
    assert "window is 'wide': give a number of steps such as 32, all, or auto" in refused(window="wide")
    assert "steps is 1001" in refused(window=32, steps=1001)
    assert "steps is 0: give an integer of at least 1" in refused(steps=0)
    assert "label is '11': give classes from 0 to 9" in refused(steps=10, label=11)
    assert "label is '<b>': give classes" in refused(label="<b>")
    assert "seed is -1" in refused(label=7, seed=-1)
    assert "noise" in refused(seed=0, sampler="exact", scheduler="ddim")
    assert "scheduler is 'euler'" in refused(sampler="parallel", scheduler="euler")
    assert page.rounds("parallel") == page.rounds("sequential") == 0
    assert page.button("Run").is_enabled()
    page.choose(sampler="piadm-sde")
    page.page.wait_for_function("document.querySelector('#window textarea, #window input').disabled")


@browsing
def test_two_users_at_once_have_each_their_own(visit: Callable[[], Page]) -> None:
    first, second = visit(), visit()
    first.choose(label=2, steps=150, seed=1)
    second.choose(label=5, steps=100, seed=2, samples=2, sampler="exact")
    first.run()
    second.run()
    together = 0
    while not second.page.locator("#note", has_text="as fast").count():
        together += 0 < first.rounds("sequential") < 150 and 0 < second.rounds("sequential") < 100
        time.sleep(0.1)
    assert "of exactly the same law" in second.told("as fast")
    first.told("as fast")
    assert together >= 2, "one waited for the other's end"
    for page, want in ((first, drawn(1, [2], 150)), (second, drawn(2, [5, 5], 100))):
        assert np.abs(page.image("sequential") - want).max() <= 1


@browsing
def test_the_queue_is_bounded_and_who_leaves_makes_room(visit: Callable[[], Page]) -> None:
    from piadm.demo import USERS, WAITING

    pages = [visit() for _ in range(USERS + WAITING)]
    late = visit().choose(steps=20)
    for n, page in enumerate(pages):
        if n < USERS:
            page.choose(samples=4).run()
            page.page.wait_for_function("document.querySelector('#sequential td')")
        else:
            page.run().told("Waiting")
    assert "currently busy" in late.run().refused()
    assert late.rounds("sequential") == 0
    waiting = pages.pop()
    waiting.button("Stop").click()
    for page in pages:
        page.context.close()
    waiting.told("Stopped")
    assert waiting.rounds("sequential") == 0
    late.run().told("as fast")


@browsing
def test_the_page_asks_nothing_of_other_machines_and_no_other_can_ask_it(server: str, page: Page) -> None:
    with urllib.request.urlopen(server) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self' ")
    blocked = page.page.evaluate(
        "new Promise(resolve => { document.addEventListener('securitypolicyviolation', one => resolve(one.blockedURI));"
        "fetch('http://127.0.0.1:9/x').catch(() => setTimeout(resolve, 3000)) })"
    )
    assert blocked == "http://127.0.0.1:9/x"
    page.foreign.clear()
    port = int(server.rpartition(":")[2])
    # a server that listens on every address would answer on this one
    with pytest.raises((ConnectionRefusedError, TimeoutError)), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass


@browsing
def test_nothing_is_cut_off_and_text_can_be_read(page: Page) -> None:
    page.choose(steps=20, samples=3).run().told("as fast")
    for width in (390, 1200):
        page.page.set_viewport_size({"width": width, "height": 800})
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.contrast() < -0.6


@browsing
def test_the_dark_page_is_dark(browser: Any, server: str) -> None:
    context = browser.new_context(color_scheme="dark")
    assert Page(context, server).contrast() > 0.6
    context.close()
