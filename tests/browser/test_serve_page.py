"""The page of `florence2 serve`, from a real server: every task, regions, images and errors."""

import base64
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from florence2.inputs.tasks import TASKS
from tests.browser.served import BOX, EXAMPLE, OpenedPage, Served, opening
from tests.serve.server import RunningServer, native_body, serving

TEXTS = {
    "<CAPTION_TO_PHRASE_GROUNDING>": "a blue star and a yellow arrow",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "a blue star",
    "<OPEN_VOCABULARY_DETECTION>": "star",
}
KEY = "a-key-of-the-tests"
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}


def asked_directly(server: RunningServer, token: str) -> dict[str, Any]:
    task = {"task": token}
    if TASKS[token].takes != "nothing":
        task |= {"box": BOX} if TASKS[token].takes == "region" else {"text": TEXTS[token]}  # type: ignore[dict-item]
    answer: dict[str, Any] = server.post("/v1/florence2", native_body(EXAMPLE.read_bytes(), task)).json["answers"][0]
    return answer


def ask(served: Served, token: str) -> None:
    served.ask(token, TEXTS.get(token, ""), BOX if TASKS[token].takes == "region" else None)


def test_all_fifteen_tasks(visited: OpenedPage, server: RunningServer) -> None:
    served = visited()
    served.use_example()
    for token in TASKS:
        ask(served, token)
        answer = asked_directly(server, token)
        shown = json.loads(served.code("json"))
        assert (shown["task"], shown["text"]) == (token, answer["text"])
        assert json.loads(served.code("reference")).keys() == {token}
        if answer["kind"] == "text":
            assert served.text("#said") == answer["text"].strip() and served.rows() == []
            assert served.page.locator("#overlay g").count() == (TASKS[token].takes == "region")
        else:
            parts = [*answer.get("boxes", []), *answer.get("quads", []), *answer.get("polygons", [])]
            names = [row or TEXTS.get(token, "") for row in (part["label"].strip() for part in parts)]
            assert len(parts) > 0 and [name for name in names if name] in ([], served.rows())
            assert served.page.locator("#overlay g").count() == len(parts) == len(served.rows())
    # the image travels once; all later questions name it by its hash
    kinds = [request.headers["content-type"].partition(";")[0] for request in served.questions]
    assert kinds == ["multipart/form-data"] + ["application/json"] * (len(TASKS) - 1)
    assert "image already encoded" in served.text("#timing")


def test_the_groups_are_those_of_the_server(visited: OpenedPage) -> None:
    served = visited()
    groups = served.page.locator("#groups .face").all_inner_texts()
    assert [group.split("\n") for group in groups] == [
        ["Describe", "image only"],
        ["Find", "some need words"],
        ["Read", "image only"],
        ["About a region", "needs a region"],
    ]
    own = {"task": "<VQA>", "alias": "vqa", "sentence": "<VQA>{input}", "takes": "anything", "kind": "text"}
    tasks = [own]
    served.page.route("**/v1/tasks", lambda route: route.fulfill(json={"tasks": tasks}))
    served.page.reload()
    served.page.wait_for_selector("#tasks label")
    assert served.page.locator("#tasks .face strong").all_inner_texts() == ["vqa"]
    assert served.page.locator("#text-input").is_visible() and served.page.locator("#region-input").is_visible()


# ---- regions --------------------------------------------------------------------------------------------------------


def test_everything_by_keyboard(visited: OpenedPage) -> None:
    served = visited()
    page, press = served.page, served.page.keyboard.press

    def tab_to(name: str) -> None:
        for _ in range(30):
            press("Tab")
            if served.focused() == name:
                return
        raise AssertionError(f"Tab does not reach {name}; it ends at {served.focused()}")

    tab_to("example")
    press("Enter")
    page.wait_for_selector("#stage:visible")
    for _ in range(6):
        press("Tab")
        if page.evaluate("document.activeElement.name") == "group":
            break
    for _ in range(3):
        press("ArrowRight")
    assert page.locator("#groups input:checked").input_value() == "region"
    press("Tab")
    press("ArrowDown")
    press("ArrowDown")
    press("ArrowDown")
    assert page.locator("#tasks input:checked").input_value() == "<REGION_TO_OCR>"
    tab_to("region-middle")
    press("Enter")
    assert served.focused() == "region-box" and served.region() == [76, 70, 227, 209]
    for key, times in (("ArrowLeft", 21), ("ArrowDown", 38), ("Shift+ArrowLeft", 16), ("Shift+ArrowUp", 1)):
        for _ in range(times):
            press(key)
    assert served.region() == [13, 140, 116, 276]  # a step is 3 pixels; the lower edge of the image stops the box
    tab_to("region-top")
    page.keyboard.type("183")
    tab_to("region-bottom")
    page.keyboard.type("226")
    served.wait_for_answer(lambda: press("Enter"))
    assert served.text("#said") == "PAN"
    assert '"box":[13,183,116,226]' in served.code("curl")


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag between two places, which are shares of the image."""
    frame = page.locator("#stage").bounding_box()
    places = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=3)
    page.mouse.up()


def test_a_region_by_pointer_and_by_paste(visited: OpenedPage) -> None:
    served = visited()
    served.use_example()
    served.choose("<REGION_TO_DESCRIPTION>")
    assert served.page.locator("#region-box").is_hidden()
    drag(served.page, (0.9, 0.45), (0.5, 0.0))  # from the lower right to the upper left
    drawn = served.region()
    assert drawn == pytest.approx([0.5 * 303, 0, 0.9 * 303, 0.45 * 279], abs=2)
    drag(served.page, (0.05, 0.9), (0.05, 0.9))
    assert served.region() == drawn  # a click draws nothing
    drag(served.page, (0.7, 0.2), (0.6, 0.2))
    assert served.region() == pytest.approx([drawn[0] - 30, drawn[1], drawn[2] - 30, drawn[3]], abs=2)
    drag(served.page, (0.8, 0.45), (0.9, 0.6))  # by its lower right corner
    assert served.region() == pytest.approx([0.4 * 303, 0, 0.9 * 303, 0.6 * 279], abs=3)
    served.page.locator("#region-top").evaluate(
        "e => { const data = new DataTransfer(); data.setData('text', '[151, 11, 266, 122]');"
        "e.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true })); }"
    )
    assert served.region() == [151, 11, 266, 122]
    served.send()
    assert "star" in served.text("#said")
    assert served.page.locator("#overlay text").text_content() == served.text("#said")
    served.page.click("#region-clear")
    with served.page.expect_response("**/v1/florence2"):
        served.page.click("#send")
    served.page.wait_for_selector(".toast.bad")
    assert served.status == "Task <REGION_TO_DESCRIPTION> needs a region: a box in pixels, or four location tokens."


# ---- images ---------------------------------------------------------------------------------------------------------


def test_drop_paste_and_choose(visited: OpenedPage) -> None:
    served = visited()
    data = base64.b64encode(EXAMPLE.read_bytes()).decode()
    bring = """([name, type, data]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, { type: "image/png" }));
        const about = { bubbles: true, cancelable: true };
        return document.body.dispatchEvent(type === "drop" ? new DragEvent("drop", { ...about, dataTransfer: transfer })
          : new ClipboardEvent("paste", { ...about, clipboardData: transfer })); }"""
    for way in ("drop", "paste"):
        assert not served.page.evaluate(bring, [f"{way}.png", way, data])  # or the browser would open the file
        expect(served.page.locator("#about-image")).to_have_text(f"{way}.png, 303 × 279")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; whoever shows it turns it upright
    Image.open(EXAMPLE).convert("RGB").save(turned, "JPEG", exif=exif)
    served.page.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": turned.getvalue()})
    expect(served.page.locator("#about-image")).to_have_text("a.jpg, 279 × 303")
    served.ask("<OD>")
    assert json.loads(served.code("json"))["image_size"] == [279, 303]
    assert served.page.get_attribute("#overlay", "viewBox") == "0 0 279 303"
    served.page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"words"})
    served.page.wait_for_selector(".toast.bad")
    assert served.status.startswith("The browser cannot show notes.txt; choose a PNG")
    assert served.text("#about-image") == "a.jpg, 279 × 303"
    assert served.page.get_attribute("#photo", "capture") == "environment"


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_without_an_image_or_a_network(visited: OpenedPage) -> None:
    served = visited()
    served.page.click("#send")
    assert served.status == "Choose an image first, or use the example."
    served.page.click("#dismiss")
    assert served.status == "" and served.page.locator("#dismiss").is_hidden() and served.focused() == "send"
    served.use_example()
    served.ask("<CAPTION>")
    served.page.context.set_offline(True)
    served.page.click("#send")
    served.page.wait_for_selector(".toast.bad")
    assert served.status == (
        f"The server at 127.0.0.1:{served.server.port} cannot be reached. Check that it is running and that this "
        "device is online, then ask again."
    )
    assert served.text("#said").startswith("a brown word")  # the earlier answer stays
    served.page.context.set_offline(False)
    served.send()
    assert served.page.get_attribute("#toast", "class") == "toast away"


def test_a_question_is_cancelled(visited: OpenedPage) -> None:
    served = visited()
    served.use_example()
    served.page.route("**/v1/florence2", lambda route: None)  # never answered
    served.page.click("#send")
    assert served.status == "Asking…" and served.page.get_attribute("#answer", "aria-busy") == "true"
    served.page.click("#cancel")
    expect(served.page.locator("#status")).to_have_text("Cancelled.")
    assert served.page.get_attribute("#answer", "aria-busy") == "false" and served.page.locator("#cancel").is_hidden()


def test_while_the_model_loads(visited: OpenedPage, server: RunningServer) -> None:
    sentence = "The model is being loaded; try again in a few seconds."
    answers = [
        lambda route: route.fulfill(status=503, headers={"retry-after": "1"}, json={"error": {"message": sentence}})
    ]

    def prepare(page: Page) -> None:
        page.route("**/v1/tasks", lambda route: answers.pop()(route) if answers else route.continue_())

    served = visited(prepare=prepare)
    served.page.wait_for_selector(".toast.bad")
    assert served.status == sentence
    served.page.wait_for_selector("#tasks label")
    assert served.status == ""


def test_a_server_with_keys_and_without_a_cache(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("strict")
    with (
        serving(folder, "--cache-mb", "0", FLORENCE2_API_KEYS=KEY) as server,
        opening(browser, server) as visited,
    ):
        served = visited(prepare=lambda page: None)
        served.page.wait_for_selector("#key-form:visible")
        assert served.status == "The API key is missing or wrong; send it as Authorization: Bearer KEY."
        assert served.focused() == "key"
        served.page.keyboard.type("wrong key")
        served.page.keyboard.press("Enter")
        assert served.status == "An API key consists of ASCII characters without spaces; check it."
        served.page.fill("#key", KEY)
        served.page.keyboard.press("Enter")
        served.page.wait_for_selector("#tasks label")
        assert served.page.locator("#key-form").is_hidden() and served.status == ""
        served.use_example()
        served.ask("<CAPTION>")
        served.ask("<OCR>")  # its hash is not known here, so the image is sent again
        text = server.post("/v1/florence2", native_body(EXAMPLE.read_bytes(), "<OCR>"), HEADERS).json["answers"][0][
            "text"
        ]
        assert served.text("#said") == text
        (folder / "example.png").write_bytes(EXAMPLE.read_bytes())
        known = {"FLORENCE2_API_KEYS": KEY, "FLORENCE2_API_KEY": KEY, "PATH": "/usr/bin:/bin"}
        curl, python = served.code("curl"), served.code("python")
        assert KEY not in curl + python
        ran = subprocess.run(["bash", "-c", curl], cwd=folder, env=known, capture_output=True, check=True, timeout=60)
        assert json.loads(ran.stdout)["answers"][0]["text"] == served.text("#said")
        ran = subprocess.run([sys.executable, "-c", python], cwd=folder, env=known, capture_output=True, check=True)
        assert repr(served.text("#said")) in ran.stdout.decode()
