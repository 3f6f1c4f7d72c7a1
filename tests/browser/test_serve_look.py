"""The page of `florence2 serve` for everyone: axe, small screens, the dark, less motion, one live region."""

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browser.served import BOX, PAGE, OpenedPage, Served
from tests.serve.server import RunningServer


def states(served: Served) -> Iterator[str]:
    """Bring the page into one state after another."""
    yield "empty"
    served.page.click("#send")
    yield "an error"
    served.use_example()
    served.ask("<DENSE_REGION_CAPTION>")
    yield "boxes"
    served.ask("<MORE_DETAILED_CAPTION>")
    served.code("json")
    yield "a text, with code"
    served.ask("<REGION_TO_SEGMENTATION>", box=BOX)
    yield "a region and its outline"
    served.page.locator("#key-form").evaluate("e => e.hidden = false")
    served.page.locator("#rows li").nth(0).hover()
    yield "a row that is lit, and the field for a key"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_has_nothing_to_say(visited: OpenedPage, scheme: str, width: int) -> None:
    served = visited(width=width, color_scheme=scheme, reduced_motion="reduce")
    for state in states(served):
        results = Axe().run(served.page)
        assert results.violations_count == 0, f"{state}: {results.generate_report()}"


@pytest.mark.parametrize(("width", "height"), [(320, 568), (640, 450), (1280, 900)])  # 640 is 1280 at 200 %
def test_nothing_scrolls_sideways(visited: OpenedPage, width: int, height: int) -> None:
    served = visited(width=width, height=height)
    for state in states(served):
        assert served.fits(), state


def test_targets_are_large_enough(visited: OpenedPage) -> None:
    served = visited(width=360, height=740, has_touch=True, is_mobile=True)
    for state in states(served):
        targets = served.page.locator("button:visible, .button:visible, .face:visible, summary:visible")
        sizes = targets.evaluate_all(
            "all => all.filter((e) => e.id !== 'region-box')"
            ".map((e) => [e.textContent, e.getBoundingClientRect().height])"
        )
        assert len(sizes) > 6 and [size for size in sizes if size[1] < 44] == [], state
    assert served.page.locator(".camera").is_visible()


def test_the_image_stays_in_sight_on_a_phone(visited: OpenedPage) -> None:
    served = visited(width=360, height=740)
    served.use_example()
    served.ask("<OD>")
    served.page.locator("#rows li").last.scroll_into_view_if_needed()
    stage, last = served.page.locator("#stage").bounding_box(), served.page.locator("#rows li").last.bounding_box()
    assert stage["y"] == pytest.approx(0, abs=1) and stage["y"] + stage["height"] <= last["y"] < 740


def test_the_dark_and_less_motion(visited: OpenedPage) -> None:
    def colours(served: Served) -> list[str]:
        found: list[str] = served.page.evaluate(
            "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
        )
        return found

    light, dark = visited(color_scheme="light"), visited(color_scheme="dark", reduced_motion="reduce")
    assert [sum(map(int, colour[4:-1].split(","))) > 384 for colour in colours(light) + colours(dark)] == [
        *(True, False),
        *(False, True),
    ]
    for served, motion in ((light, "slide"), (dark, "none")):
        served.use_example()
        served.page.route("**/v1/florence2", lambda route: None)
        served.page.click("#send")
        assert served.page.locator(".progress").evaluate("e => getComputedStyle(e).animationName") == motion
        assert served.page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == (
            "smooth" if motion == "slide" else "auto"
        )


def test_one_live_region_says_what_happened(visited: OpenedPage) -> None:
    served = visited()
    live = served.page.locator("[role=status], [role=alert], [role=log], [aria-live]")
    assert live.count() == 1
    served.use_example()
    assert served.status == "The image is ready: 303 × 279 pixels. Choose a task and ask."
    served.ask("<OD>")
    assert served.status == "5 boxes found."
    served.ask("<CAPTION>")
    assert served.status == served.text("#said")


def test_the_page_is_small_files_of_its_own(server: RunningServer) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in (".html", ".css", ".js", ".svg", ".png")}
    assert {"index.html", "main.js", "example.png", "icon.svg"} <= files.keys()
    for name, path in files.items():
        reply = server.call("GET", "/" if name == "index.html" else f"/page/{name}")
        assert reply.status == 200 and reply.body == path.read_bytes(), name
        assert reply.headers["content-security-policy"] == "default-src 'self'; img-src 'self' blob: data:"
        if path.suffix in (".html", ".css", ".js"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, name
            assert "://" not in path.read_text(encoding="utf-8").replace("http://www.w3.org/", ""), name
