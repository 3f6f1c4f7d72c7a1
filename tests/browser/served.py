"""The page of `florence2 serve` in a browser, and what its tests do with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Request

from florence2.inputs.tasks import TASKS
from tests.serve.server import RunningServer

PAGE = Path(__file__).parents[2] / "florence2" / "serve" / "page"
EXAMPLE = PAGE / "example.png"
BOX = [192, 150, 246, 225]  # of the digit
OpenedPage = Callable[..., "Served"]
EDGES = ("left", "top", "right", "bottom")
_GROUPS = {"<OCR>": "read", "<OCR_WITH_REGION>": "read"}


class Served:
    """A page, the server that sent it, and every request that it made."""

    def __init__(self, page: Page, server: RunningServer, requests: list[Request]):
        self.page, self.server, self.requests = page, server, requests

    @property
    def questions(self) -> list[Request]:
        return [request for request in self.requests if request.url.endswith("/v1/florence2")]

    @property
    def status(self) -> str:
        return self.page.locator("#status").text_content() or ""

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text().replace("\xa0", " ")

    def use_example(self) -> None:
        self.page.click("#example")
        self.page.wait_for_selector("#stage:visible")

    def choose(self, token: str) -> None:
        takes, answer = TASKS[token].takes, TASKS[token].answer
        group = _GROUPS.get(token) or ("region" if takes == "region" else "describe" if answer == "text" else "find")
        self.page.locator(f"#groups input[value={group}]").check()
        self.page.locator(f"#tasks input[value='{token}']").check()

    def type_region(self, box: list[int]) -> None:
        for edge, value in zip(EDGES, box, strict=True):
            self.page.fill(f"#region-{edge}", str(value))

    def region(self) -> list[int]:
        """The four numbers of the region."""
        return [int(self.page.input_value(f"#region-{edge}")) for edge in EDGES]

    def sent(self) -> Any:
        """The last question, which named its image by hash."""
        return self.questions[-1].post_data_json["tasks"][0]

    def ask(self, token: str, text: str = "", box: list[int] | None = None) -> None:
        self.choose(token)
        if text:
            self.page.fill("#text", text)
        if box:
            self.type_region(box)
        self.send()

    def send(self) -> None:
        self.wait_for_answer(lambda: self.page.click("#send"))

    def wait_for_answer(self, act: Callable[[], object]) -> None:
        with self.page.expect_response("**/v1/florence2"):
            act()
        self.page.wait_for_selector("body:not(.busy)")

    def rows(self) -> list[str]:
        """The names of the rows that are shown."""
        return self.page.locator("#rows li:visible strong").all_inner_texts()

    def code(self, form: str) -> str:
        if not self.page.locator("#code").evaluate("e => e.open"):
            self.page.click("#code summary")
        self.page.locator(f"#forms input[value={form}]").check()
        return self.page.locator("#snippet").text_content() or ""

    def focused(self) -> str:
        """The id of the element that has the focus, or its label."""
        label: str = self.page.evaluate(
            "() => { const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.textContent; }"
        )
        return label

    def fits(self) -> bool:
        """Whether nothing makes the page scroll sideways."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@contextmanager
def opening(browser: Browser, server: RunningServer) -> Iterator[OpenedPage]:
    """Open the page of a server: `visited(width=360)`. At the end it must have asked no other host, and had no errors.

    The browser itself complains of each answer that is an error; those lines are not the page's.
    """
    complaints: list[str] = []
    requests: list[Request] = []
    contexts = []

    def open_page(width: int = 1280, height: int = 900, prepare: Any = None, **settings: Any) -> Served:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request))  # not the method itself: playwright marks it
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if prepare:
            prepare(page)
        page.goto(f"http://127.0.0.1:{server.port}/")
        if prepare is None:
            page.wait_for_selector("#tasks label")
        return Served(page, server, requests)

    yield open_page
    for context in contexts:
        context.close()
    urls = [request.url for request in requests if not request.url.startswith(("blob:", "data:"))]
    assert [url for url in urls if not url.startswith(f"http://127.0.0.1:{server.port}/")] == []
    assert [line for line in complaints if not line.startswith("Failed to load resource")] == []
