"""The page of `florence2 serve`, from a real server: every task, regions, a cascade, code to copy, and errors."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from florence2.inputs.tasks import TASKS
from tests.browser.served import BOX, EXAMPLE, PAGE, Opened, Served, opening
from tests.serve.server import RunningServer, native_body, serving

TEXTS = {
    "<CAPTION_TO_PHRASE_GROUNDING>": "a blue star and a yellow arrow",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "a blue star",
    "<OPEN_VOCABULARY_DETECTION>": "star",
}
KEY = "a-key-of-the-tests"
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
HOSTILE = "<img src=x onerror=\"document.title='got'\">"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture
def opened(browser: Browser, server: RunningServer) -> Iterator[Opened]:
    with opening(browser, server) as open_page:
        yield open_page


def asked_directly(server: RunningServer, token: str) -> dict[str, Any]:
    task = {"task": token}
    if TASKS[token].takes != "nothing":
        task |= {"box": BOX} if TASKS[token].takes == "region" else {"text": TEXTS[token]}  # type: ignore[dict-item]
    answer: dict[str, Any] = server.post("/v1/florence2", native_body(EXAMPLE.read_bytes(), task)).json["answers"][0]
    return answer


def ask(served: Served, token: str) -> None:
    served.ask(token, TEXTS.get(token, ""), BOX if TASKS[token].takes == "region" else None)


def test_all_fifteen_tasks(opened: Opened, server: RunningServer) -> None:
    served = opened()
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


def test_the_groups_are_those_of_the_server(opened: Opened) -> None:
    served = opened()
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


def sent(served: Served) -> dict[str, Any]:
    """The last question, which named its image by hash."""
    task: dict[str, Any] = served.questions[-1].post_data_json["tasks"][0]
    return task


def region(served: Served) -> list[int]:
    return [int(served.page.input_value(f"#region-{edge}")) for edge in ("left", "top", "right", "bottom")]


def test_everything_by_keyboard(opened: Opened) -> None:
    served = opened()
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
    assert served.focused() == "region-box" and region(served) == [76, 70, 227, 209]
    for key, times in (("ArrowLeft", 21), ("ArrowDown", 38), ("Shift+ArrowLeft", 16), ("Shift+ArrowUp", 1)):
        for _ in range(times):
            press(key)
    assert region(served) == [13, 140, 116, 276]  # a step is 3 pixels; the lower edge of the image stops the box
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


def test_a_region_by_pointer_and_by_paste(opened: Opened) -> None:
    served = opened()
    served.use_example()
    served.choose("<REGION_TO_DESCRIPTION>")
    assert served.page.locator("#region-box").is_hidden()
    drag(served.page, (0.9, 0.45), (0.5, 0.0))  # from the lower right to the upper left
    drawn = region(served)
    assert drawn == pytest.approx([0.5 * 303, 0, 0.9 * 303, 0.45 * 279], abs=2)
    drag(served.page, (0.05, 0.9), (0.05, 0.9))
    assert region(served) == drawn  # a click draws nothing
    drag(served.page, (0.7, 0.2), (0.6, 0.2))
    assert region(served) == pytest.approx([drawn[0] - 30, drawn[1], drawn[2] - 30, drawn[3]], abs=2)
    drag(served.page, (0.8, 0.45), (0.9, 0.6))  # by its lower right corner
    assert region(served) == pytest.approx([0.4 * 303, 0, 0.9 * 303, 0.6 * 279], abs=3)
    served.page.locator("#region-top").evaluate(
        "e => { const data = new DataTransfer(); data.setData('text', '[151, 11, 266, 122]');"
        "e.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true })); }"
    )
    assert region(served) == [151, 11, 266, 122]
    served.send()
    assert "star" in served.text("#said")
    assert served.page.locator("#overlay text").text_content() == served.text("#said")
    served.page.click("#region-clear")
    with served.page.expect_response("**/v1/florence2"):
        served.page.click("#send")
    served.page.wait_for_selector(".status.bad")
    assert served.status == "Task <REGION_TO_DESCRIPTION> needs a region: a box in pixels, or four location tokens."


# ---- answers --------------------------------------------------------------------------------------------------------


def test_rows_and_shapes_are_tied(opened: Opened) -> None:
    served = opened()
    page = served.page
    served.use_example()
    served.ask("<OD>")
    assert served.rows() == ["word", "arrow", "word", "star", "digit 5"]
    lit = page.locator(".lit")
    page.locator("#rows li").nth(3).hover()
    assert lit.count() == 2 and page.locator("#overlay .lit text").text_content() == "star"
    page.locator("#overlay g[aria-label^='digit 5']").hover()
    assert served.text("#rows li.lit strong") == "digit 5"
    page.mouse.move(2, 2)
    assert lit.count() == 0
    page.get_by_label("Use this box: arrow").focus()
    assert page.locator("#overlay .lit text").text_content() == "arrow"
    page.locator("#overlay g[tabindex='0']").focus()
    assert served.focused().startswith("word, confidence")
    page.keyboard.press("ArrowRight")
    assert served.focused().startswith("arrow") and served.text("#rows li.lit strong") == "arrow"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.matches('#rows li:nth-child(2)')")
    # equal labels look alike, others differ in colour and dashes
    looks = page.locator(".swatch rect:last-child").evaluate_all("all => all.map(e => e.outerHTML)")
    assert looks[0] == looks[2] and len(set(looks)) == 4
    assert (
        len(
            set(
                page.locator(".swatch rect:last-child").evaluate_all(
                    "all => all.map(e => getComputedStyle(e).strokeDasharray)"
                )
            )
        )
        == 4
    )


def test_the_slider(opened: Opened) -> None:
    served = opened()
    served.use_example()
    served.ask("<OD>")
    boxes = json.loads(served.code("json"))["boxes"]
    sure = sorted(box["confidence"] for box in boxes)
    served.page.locator("#least").fill(str(round((sure[1] + sure[2]) / 2, 2)))
    least = float(served.page.input_value("#least"))
    names = [box["label"] for box in boxes if box["confidence"] >= least]
    assert 0 < len(names) < 5 and served.rows() == names
    assert served.page.locator("#overlay g:visible").count() == len(names)
    assert served.text("#least-now") == f"{round(100 * least)} % · {len(names)} of 5"


def test_a_cascade_is_walked(opened: Opened) -> None:
    served = opened()
    page = served.page
    served.use_example()
    served.ask("<CAPTION>")
    caption = served.text("#said")
    served.wait_for_answer(lambda: page.get_by_text("Ground this caption").click())
    assert sent(served) == {"task": "<CAPTION_TO_PHRASE_GROUNDING>", "text": caption}
    assert served.rows() == caption.replace(" and ", ", ").split(", ")
    assert served.focused() == "answer-title"  # the button is gone
    served.wait_for_answer(lambda: page.get_by_label("Outline this: a blue star").click())
    assert sent(served)["task"] == "<REGION_TO_SEGMENTATION>" and sent(served)["box"] == region(served)
    assert served.rows() == ["a blue star"] and page.locator("#overlay .filled").count() == 1
    page.get_by_label("Use this box: a blue star").click()
    assert page.locator("#tasks input:checked").input_value() == "<REGION_TO_SEGMENTATION>"
    page.locator("#tasks input[value='<REGION_TO_CATEGORY>']").check()
    served.send()
    assert served.text("#said") == "star"
    steps = page.locator("#trail-steps button")
    assert steps.all_inner_texts() == [
        "Caption",
        f"Phrases of a caption: {caption}",
        "Outline: a blue star",
        "Category",
    ]
    steps.nth(0).click()
    assert served.text("#said") == caption and served.focused() == "Caption"


def test_code_to_copy_runs(opened: Opened, server: RunningServer) -> None:
    served = opened(permissions=["clipboard-read", "clipboard-write"])
    served.use_example()
    served.ask("<REFERRING_EXPRESSION_SEGMENTATION>", 'the artist\'s "star" \\ $HOME `x`')
    answer = json.loads(served.code("json"))

    def copied(form: str) -> str:
        text = served.code(form)
        served.page.click("#copy")
        expect(served.page.locator("#status")).to_have_text("Copied.")
        assert served.page.evaluate("navigator.clipboard.readText()") == text
        return text

    ran = subprocess.run(["bash", "-c", copied("curl")], capture_output=True, check=True, timeout=60)
    reply = json.loads(ran.stdout)["answers"][0]
    assert reply["text"] == answer["text"] and json.loads(copied("reference")) == reply["florence2_result"]
    ran = subprocess.run([sys.executable, "-c", copied("python")], capture_output=True, check=True, timeout=60)
    assert repr(answer["text"]) in ran.stdout.decode()
    assert copied("json").count("\n") < 40  # coordinates stay in one line


def test_the_image_with_its_answer_is_saved(opened: Opened) -> None:
    served = opened()
    served.use_example()
    served.ask("<OD>")
    with served.page.expect_download() as download:
        served.page.click("#save")
    assert download.value.suggested_filename == "example-answer.png"
    saved = Image.open(download.value.path()).convert("RGB")
    plain = Image.open(EXAMPLE).convert("RGB").resize(saved.size)
    assert max(saved.size) == 1000
    assert (255, 210, 63) in {colour for _, colour in saved.getcolors(1 << 24)}  # the first label's colour
    assert (255, 210, 63) not in {colour for _, colour in plain.getcolors(1 << 24)}
    assert saved.getpixel((30, 900)) == pytest.approx(plain.getpixel((30, 900)), abs=3)  # where nothing is drawn


def test_labels_are_text(opened: Opened, server: RunningServer) -> None:
    served = opened()
    served.use_example()
    answer = {"task": "<OD>", "kind": "boxes", "text": HOSTILE, "image_size": [303, 279], "florence2_result": {}}
    answer["boxes"] = [{"xyxy": [10, 10, 90, 90], "label": HOSTILE, "score": 0.5}]
    reply = {"picture": {"sha256": "0" * 64, "cached": False}, "answers": [answer]}
    reply["timing"] = {"queue_ms": 1, "encode_ms": 1, "decode_ms": 1}
    served.page.route("**/v1/florence2", lambda route: route.fulfill(json=reply))
    served.ask("<OD>")
    assert served.rows() == [HOSTILE] and served.page.title() == "Florence-2"
    assert served.text("#least-label") == "Least score"
    assert served.page.locator("#answer img, #overlay img").count() == 0
    scripts = "".join(path.read_text(encoding="utf-8") for path in PAGE.glob("*.js"))
    assert not [
        way for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(") if way in scripts
    ]


# ---- images ---------------------------------------------------------------------------------------------------------


def test_drop_paste_and_choose(opened: Opened) -> None:
    served = opened()
    data = base64.b64encode(EXAMPLE.read_bytes()).decode()
    bring = """([name, type, data]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, { type: "image/png" }));
        const about = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(type === "drop" ? new DragEvent("drop", { ...about, dataTransfer: transfer })
          : new ClipboardEvent("paste", { ...about, clipboardData: transfer })); }"""
    for way in ("drop", "paste"):
        served.page.evaluate(bring, [f"{way}.png", way, data])
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
    served.page.wait_for_selector(".status.bad")
    assert served.status.startswith("The browser cannot show notes.txt; choose a PNG")
    assert served.text("#about-image") == "a.jpg, 279 × 303"
    assert served.page.get_attribute("#photo", "capture") == "environment"


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_without_an_image_or_a_network(opened: Opened) -> None:
    served = opened()
    served.page.click("#send")
    assert served.status == "Choose an image first, or use the example."
    served.use_example()
    served.ask("<CAPTION>")
    served.page.context.set_offline(True)
    served.page.click("#send")
    served.page.wait_for_selector(".status.bad")
    assert served.status == (
        f"The server at 127.0.0.1:{served.server.port} cannot be reached. Check that it is running and that this "
        "device is online, then ask again."
    )
    assert served.text("#said").startswith("a brown word")  # the earlier answer stays
    served.page.context.set_offline(False)
    served.send()
    assert "bad" not in served.page.get_attribute("#status", "class")


def test_a_question_is_cancelled(opened: Opened) -> None:
    served = opened()
    served.use_example()
    served.page.route("**/v1/florence2", lambda route: None)  # never answered
    served.page.click("#send")
    assert served.status == "Asking…" and served.page.get_attribute("#answer", "aria-busy") == "true"
    served.page.click("#cancel")
    expect(served.page.locator("#status")).to_have_text("Cancelled.")
    assert served.page.get_attribute("#answer", "aria-busy") == "false" and served.page.locator("#cancel").is_hidden()


def test_while_the_model_loads(opened: Opened, server: RunningServer) -> None:
    sentence = "The model is being loaded; try again in a few seconds."
    answers = [
        lambda route: route.fulfill(status=503, headers={"retry-after": "1"}, json={"error": {"message": sentence}})
    ]

    def prepare(page: Page) -> None:
        page.route("**/v1/tasks", lambda route: answers.pop()(route) if answers else route.continue_())

    served = opened(prepare=prepare)
    served.page.wait_for_selector(".status.bad")
    assert served.status == sentence
    served.page.wait_for_selector("#tasks label")
    assert served.status == ""


def test_a_server_with_keys_and_without_a_cache(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("strict")
    with (
        serving(folder, "--cache-mb", "0", FLORENCE2_API_KEYS=KEY) as server,
        opening(browser, server) as opened,
    ):
        served = opened(prepare=lambda page: None)
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
