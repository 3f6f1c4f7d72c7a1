"""A real browser without a network. A machine without one fails here: a skip would hide a page that is broken."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from florence2.inspect.page.render import render_page
from tests.browser.served import OpenedPage, opening
from tests.inspect import synthetic
from tests.serve.server import RunningServer, serving

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
Opened = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("tests/browser needs Chromium: apt-get install chromium.")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def explanations() -> dict[str, dict[str, Any]]:
    return {"caption": synthetic.caption(), "detection": synthetic.detection()}


@pytest.fixture(scope="session")
def files(explanations: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a report of each explanation."""
    folder = tmp_path_factory.mktemp("reports")
    for name, values in explanations.items():
        (folder / f"{name}.html").write_text(render_page(values), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in explanations}


@pytest.fixture
def opened(browser: Browser, files: dict[str, Path], tmp_path: Path) -> Iterator[Opened]:
    """Open a report, offline: `opened("caption", width=360)`, or an explanation of one's own.

    When the test is over, the pages must have asked for nothing but themselves and complained of nothing.
    """
    asked: list[str] = []
    complaints: list[str] = []
    own: list[str] = []
    contexts = []

    def open_page(what: str | dict[str, Any], width: int = 1280, height: int = 900, **settings: Any) -> Page:
        path = files[what] if isinstance(what, str) else tmp_path / "own.html"
        if not isinstance(what, str):
            path.write_text(render_page(what), encoding="utf-8")
        contexts.append(browser.new_context(offline=True, viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.on("request", lambda request: None if request.url.startswith("data:") else asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        own.append(path.as_uri())
        page.goto(path.as_uri())
        page.wait_for_selector("#tokens button")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked == own and complaints == []


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """`florence2 serve` with nano."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def visited(browser: Browser, server: RunningServer) -> Iterator[OpenedPage]:
    """Open the page of the server; see `opening`."""
    with opening(browser, server) as open_page:
        yield open_page
