"""What comes back on the page of `florence2 serve`: rows tied to shapes, a cascade, code to copy, a saved image."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.browser.served import EXAMPLE, PAGE, OpenedPage

HOSTILE = "<img src=x onerror=\"document.title='got'\">"


def test_rows_and_shapes_are_tied(visited: OpenedPage) -> None:
    served = visited()
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


def test_the_slider(visited: OpenedPage) -> None:
    served = visited()
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


def test_a_cascade_is_walked(visited: OpenedPage) -> None:
    served = visited()
    page = served.page
    served.use_example()
    served.ask("<CAPTION>")
    caption = served.text("#said")
    served.wait_for_answer(lambda: page.get_by_text("Ground this caption").click())
    assert served.sent() == {"task": "<CAPTION_TO_PHRASE_GROUNDING>", "text": caption}
    assert served.rows() == caption.replace(" and ", ", ").split(", ")
    assert served.focused() == "answer-title"  # the button is gone
    served.wait_for_answer(lambda: page.get_by_label("Outline this: a blue star").click())
    assert served.sent()["task"] == "<REGION_TO_SEGMENTATION>" and served.sent()["box"] == served.region()
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


def test_code_to_copy_runs(visited: OpenedPage) -> None:
    served = visited(permissions=["clipboard-read", "clipboard-write"])
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


def test_the_image_with_its_answer_is_saved(visited: OpenedPage) -> None:
    served = visited()
    served.use_example()
    served.ask("<OD>")
    with served.page.expect_download() as download:
        served.page.click("#save")
    assert download.value.suggested_filename == "example-answer.png"
    saved = Image.open(download.value.path()).convert("RGB")
    plain = Image.open(EXAMPLE).convert("RGB").resize(saved.size)
    assert max(saved.size) == 1000
    left, top, right, bottom = json.loads(served.code("json"))["boxes"][0]["xyxy"]
    scale = 1000 / 303
    for x, y in ((left, (top + bottom) / 2), ((left + right) / 2, bottom)):  # the first label has a solid line
        assert saved.getpixel((round(x * scale), round(y * scale))) == (255, 210, 63)
    assert saved.getpixel((30, 900)) == pytest.approx(plain.getpixel((30, 900)), abs=3)  # where nothing is drawn


def test_labels_are_text(visited: OpenedPage) -> None:
    served = visited()
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
