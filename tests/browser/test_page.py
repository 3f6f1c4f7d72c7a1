"""The report in a real browser: every control by pointer and by keyboard, on a phone, in the dark."""

import json
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page

from florence2.cli import main as cli
from florence2.inspect.page.render import decode_map, render_page
from recipes.nano.scenes import make_scene
from tests.browser.conftest import Opened
from tests.inspect import synthetic

Values = dict[str, dict[str, Any]]
HOSTILE = "</script><img src=x onerror=\"document.title='got'\"><b>&amp;"


def heat(page: Page) -> np.ndarray:
    """(h, w) brightness of the map over the image; zeros where nothing is drawn."""
    pixels = page.evaluate(
        """() => { const shown = document.getElementById("heat"), copy = document.createElement("canvas");
        [copy.width, copy.height] = [shown.width, shown.height];
        const context = copy.getContext("2d");
        context.drawImage(shown, 0, 0);
        return Array.from(context.getImageData(0, 0, copy.width, copy.height).data); }"""
    )
    colours = np.array(pixels).reshape(synthetic.GRID, synthetic.GRID, 4)
    brightness: np.ndarray = colours[..., :3].sum(-1) * (colours[..., 3] > 0)
    return brightness


def stored(token: dict[str, Any], layer: int, head: int) -> np.ndarray:
    attention = token["attention"]
    cells = decode_map(attention["maps"][layer][head], synthetic.GRID, synthetic.GRID)
    weights: np.ndarray = cells * (attention["peak"][layer][head] / 255)
    return weights


def alike(page: Page, weights: np.ndarray) -> bool:
    """Whether the map on the page is that of `weights`: as bright where they are as large."""
    correlation = np.corrcoef(heat(page).ravel(), weights.ravel())[0, 1]
    return bool(correlation > 0.97 and heat(page).argmax() == weights.argmax())


def focused(page: Page) -> str:
    """Return the focused element: its id, or that of the group that holds it."""
    found: str = page.evaluate(
        """() => { const e = document.activeElement, group = e.closest("#tokens, #things, #tree, #modes");
        return e.id || (group ? group.id : e.className || e.tagName); }"""
    )
    return found


def text(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text().replace("\xa0", " ")


def pressed(page: Page) -> str:
    return text(page, "#tokens button[aria-pressed=true]")


def test_it_opens_on_the_first_word(opened: Opened, explanations: Values) -> None:
    page, token = opened("caption"), explanations["caption"]["tokens"][1]
    assert page.title() == f"<CAPTION>: {explanations['caption']['answer']['text']}"
    assert page.locator("#tokens button").count() == 31 and pressed(page) == "a"
    assert text(page, "#chosen") == f"Token 2 of 31: a, {round(100 * token['probability'])} %"
    everything = np.mean([stored(token, layer, head) for layer in range(12) for head in range(12)], axis=0)
    assert alike(page, everything)
    assert text(page, "#packing") == "Maps of 24 × 24 cells."
    assert page.locator("#image img").evaluate("e => e.naturalWidth") == 600


def test_a_token_by_pointer(opened: Opened, explanations: Values) -> None:
    page, token = opened("caption"), explanations["caption"]["tokens"][3]
    page.locator("#tokens button").nth(3).hover()
    assert text(page, "#chosen").startswith("Token 4 of 31: cup")
    page.mouse.move(5, 5)
    assert text(page, "#chosen").startswith("Token 2 of 31: a")  # a look, not a choice
    page.locator("#tokens button").nth(3).click()
    page.mouse.move(5, 5)
    assert text(page, "#chosen").startswith("Token 4 of 31: cup")
    rows = page.locator("#instead li")
    assert rows.locator(".word").all_inner_texts() == [other["text"].strip() for other in token["alternatives"]]
    assert rows.nth(0).get_attribute("class") == "said"
    lens = page.locator("#lens tbody tr")
    assert lens.locator("th").all_inner_texts() == ["input", *map(str, range(1, 13))]
    assert lens.nth(12).locator(".word").all_inner_texts() == [guess["text"].strip() for guess in token["lens"][12]]
    page.locator("#tokens button").nth(4).click()
    assert text(page, "#rules") == "no repeated n-grams: “ a”"


def test_modes_and_sliders(opened: Opened, explanations: Values) -> None:
    page, token = opened("caption"), explanations["caption"]["tokens"][3]
    page.locator("#tokens button").nth(3).click()
    page.locator("#layer").fill("5")
    assert page.locator("input[value=layer]").is_checked() and text(page, "#layer-now") == "5"
    assert alike(page, np.mean([stored(token, 4, head) for head in range(12)], axis=0))
    assert page.locator("#lens tr.now th").inner_text() == "5"
    page.locator("#head").fill("9")
    assert page.locator("input[value=head]").is_checked()
    assert alike(page, stored(token, 4, 8))
    share, top = token["attention"]["image"][4][8], float(f"{100 * token['attention']['peak'][4][8]:.2g}")
    assert text(page, "#legend").startswith(f"Layer 5, head 9: {round(100 * share)} % of the weight is on the image")
    assert text(page, "#scale-top") == f"{top:g} %"
    page.get_by_label("attention rollout").check()
    assert (text(page, "#scale-low"), text(page, "#scale-top")) == ("lowest", "highest")
    assert alike(page, decode_map(token["attention"]["rollout"], 24, 24))
    page.get_by_label("saliency").check()
    assert alike(page, decode_map(token["saliency"]["image"], 24, 24))
    page.get_by_role("radio", name="none").check()
    assert not heat(page).any() and text(page, "#legend") == "The image without a map."
    assert page.locator("#scale").is_hidden()
    page.locator("#heads rect[data-layer='2'][data-head='7']").nth(0).click(position={"x": 1, "y": 1})
    assert (text(page, "#layer-now"), text(page, "#head-now")) == ("3", "8") and alike(page, stored(token, 2, 7))


def test_the_prompt(opened: Opened, explanations: Values) -> None:
    values = explanations["caption"]
    page, attention = opened("caption"), values["tokens"][1]["attention"]
    page.locator("#layer").fill("2")
    page.locator("#head").fill("3")
    shown = page.locator("#prompt .weight").evaluate_all("all => all.map((e) => Number(e.style.opacity))")
    kept = np.array(attention["prompt"][1][2])
    np.testing.assert_allclose(shown, 0.55 * kept / kept.max(), atol=1e-5)
    assert page.locator("#prompt > span").all_inner_texts()[1].strip() == "What"


def test_places(opened: Opened, explanations: Values) -> None:
    page = opened("detection")
    assert page.locator("#marks polygon:not(.under)").count() == 3
    assert page.locator("#marks text").all_text_contents() == ["cup", "saucer", "spoon"]
    page.locator("#things button").nth(2).click()
    assert text(page, "#chosen").startswith("Token 13 of 17: <loc_543>")
    assert page.locator("#marks .of-token").count() == 1 and page.locator("#spread-panel").is_visible()
    line, corner = page.locator("#marks .place"), page.locator("#marks .corner")
    assert [float(line.get_attribute(side)) for side in ("x1", "x2")] == pytest.approx([543.5 * 0.6] * 2)
    assert [float(corner.get_attribute(side)) for side in ("cx", "cy")] == pytest.approx([543.5 * 0.6, 165.5 * 0.4])
    page.locator("#tokens button").nth(13).click()
    assert [float(line.get_attribute(side)) for side in ("y1", "y2")] == pytest.approx([165.5 * 0.4] * 2)
    assert page.locator("#spread rect").count() == len(explanations["detection"]["tokens"][13]["spread"]["bins"])
    assert "in one. Mean of all bins 165.4, standard deviation 3.6 bins (1.4 pixels)." in text(page, "#spread")
    page.locator("#tokens button").nth(11).click()
    assert page.locator("#marks .place").count() == 0 and page.locator("#spread-panel").is_hidden()


def test_the_score_of_a_box(opened: Opened, explanations: Values) -> None:
    values = explanations["detection"]
    page, spoon, tokens = opened("detection"), values["answer"]["boxes"][2], values["tokens"]
    page.locator("#tokens button").nth(0).click()
    assert page.locator("#shape-panel").is_hidden()
    page.locator("#things button").nth(2).click()
    assert text(page, "#shape-title") == f"Score of “spoon”: {spoon['score']:.3f}"
    places = [token for token in tokens[spoon["tokens"][0] : spoon["tokens"][1] + 1] if token["location"] is not None]
    sides = zip(("left", "top", "right", "bottom"), (600, 400, 600, 400), places, strict=True)
    names = [f"{name} ± {token['spread']['std'] * side / 1000:.1f}" for name, side, token in sides]
    rows = page.locator("#shape li")
    assert [name.replace("\xa0", " ") for name in rows.locator(".word").all_inner_texts()] == names
    shares = [f"{100 * token['probability']:.{0 if token['probability'] >= 0.0995 else 1}f} %" for token in places]
    assert [share.replace("\xa0", " ") for share in rows.locator(".share").all_inner_texts()] == shares
    assert rows.nth(0).get_attribute("class") == "said" and page.locator("#shape-chart *").count() == 0


def test_the_parts_of_a_confidence(opened: Opened) -> None:
    values = synthetic.detection()
    first, second, *_ = values["answer"]["boxes"]
    first["confidence"] = {"value": 0.75, "label": 0.8, "near": [0.9, 0.5, 0.95, 1.0]}
    second["confidence"] = {"value": 0.45, "label": 0.9, "near": [0.9, 0.8, 0.7, 0.5]}
    notes = []
    for calibrated in (True, False):
        page = opened(values | {"answer": values["answer"] | {"calibrated": calibrated}})
        assert [words.split()[-1] for words in page.locator("#things button").all_inner_texts()[:2]] == ["0.75", "0.45"]
        page.locator("#things button").nth(0 if calibrated else 1).click()
        notes.append(text(page, "#shape-note").replace("\xa0", " "))
    least = "Its confidence is {} % for the label times 50 % near its least sure place, {}."
    assert notes[0].endswith(least.format(80, "top: 0.400, which is calibrated to 0.750"))
    assert notes[1].endswith(least.format(90, "bottom: 0.450, not calibrated"))


def test_the_score_of_a_long_outline(opened: Opened) -> None:
    values = synthetic.detection()
    values["answer"]["boxes"] = []
    values["answer"]["polygons"] = [
        {"label": "", "points": [[[0, 0], [9, 9], [0, 9]]], "score": 0.5, "tokens": [1, 15]}
    ]
    page = opened(values)
    page.locator("#things button").nth(0).click()
    assert text(page, "#shape-title") == "Score: 0.500" and page.locator("#shape li").count() == 0
    bars = page.locator("#shape-chart rect")
    probabilities = [token["probability"] for token in values["tokens"][1:16] if token["location"] is not None]
    heights = [float(bar.get_attribute("height") or "") for bar in bars.all()]
    assert heights == pytest.approx(probabilities) and page.locator("#shape-chart .said").count() == 1


def test_an_empty_answer_and_signs_without_looks(opened: Opened) -> None:
    values = synthetic.caption()
    values["answer"]["text"] = ""
    values["tokens"][1]["lens"][3][0]["text"] = "\u2028"
    values["tokens"][1]["alternatives"][1] |= {"text": "\x85", "probability": 0.0}
    page = opened(values)
    assert "(empty answer: no text and no locations)" in text(page, "#answer")
    assert page.locator("#lens tbody tr").nth(3).locator(".word").first.inner_text() == "U+2028"
    other = page.locator("#instead li").nth(1)
    assert other.locator(".word").inner_text() == "U+0085" and other.locator(".share").inner_text() == "<0.1\xa0%"


def test_polygons_and_quads(opened: Opened) -> None:
    values = synthetic.detection()
    ring = [[10, 10], [200, 20], [150, 200]]
    values["answer"]["quads"] = [
        {"label": "text", "points": [[0, 0], [50, 0], [50, 20], [0, 20]], "score": None, "tokens": None}
    ]
    values["answer"]["polygons"] = [{"label": "two", "points": [ring, ring], "score": None, "tokens": [2, 5]}]
    page = opened(values)
    assert page.locator("#marks polygon:not(.under)").count() == 6 and page.locator("#marks .filled").count() == 2
    assert page.locator("#things button").all_inner_texts()[3:] == ["text", "two"]


def test_the_tree(opened: Opened, explanations: Values) -> None:
    page, steps = opened("caption"), explanations["caption"]["beams"]
    candidates = page.locator("#tree g.candidate")
    assert candidates.count() == sum(len(step["candidates"]) for step in steps)
    assert page.locator("#tree g.won").count() == 31
    for fate in ("dropped", "finished", "stopped", "low"):
        expected = {"low": "ended low"}.get(fate, fate)
        count = sum(one["fate"] == expected for step in steps for one in step["candidates"])
        assert page.locator(f"#tree g.{fate}").count() == count > 0
    dropped = steps[1]["candidates"][5]
    before = steps[0]["candidates"][dropped["parent"]]
    candidates.nth(11).click()
    assert text(page, "#node").splitlines()[0] == before["text"] + dropped["text"]
    assert f"summed log-probability {dropped['sum']:.3f}. It was dropped: better candidates took all beams." in text(
        page, "#node"
    )
    won = page.locator("#tree g.won").nth(3)
    won.click()
    assert text(page, "#chosen").startswith("Token 4 of 31: cup") and "It is part of the answer." in text(page, "#node")
    banned = next(i for i, one in enumerate(steps[4]["candidates"]) if one["parent"] == 1)
    candidates.nth(24 + banned).click()
    assert "Banned for its beam here: no repeated n-grams: “ a”, “ of”." in text(page, "#node")


def test_greedy_has_no_tree(opened: Opened) -> None:
    page = opened({**synthetic.caption(), "beams": [], "winner": []})
    assert "Greedy search, without beams" in text(page, "#search-note") and page.locator("#tree-scroll").is_hidden()


def test_keyboard_alone(opened: Opened) -> None:
    page = opened("detection")
    order: list[str] = []
    while (not order or focused(page) != "tree") and len(order) < 20:
        page.keyboard.press("Tab")
        order.append(focused(page))
        style = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none" or order[-1] == "tree"
    assert order == ["skip", "modes", "layer", "head", "things", "things", "things", "tokens", "tree"]
    seen = "() => getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth"
    assert page.evaluate(seen) == "4px"  # its outline in the tree
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "Step 2:" in text(page, "#node")
    page.keyboard.press("ArrowLeft")
    assert "Step 1:" in text(page, "#node")
    page.keyboard.press("Shift+Tab")
    while focused(page) != "tokens":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("End")
    assert text(page, "#chosen").startswith("Token 17 of 17: </s>")
    page.keyboard.press("ArrowLeft")
    assert text(page, "#chosen").startswith("Token 16 of 17: <loc_815>")
    page.keyboard.press("Home")
    assert text(page, "#chosen").startswith("Token 1 of 17: <s>")
    assert text(page, "#rules") == "forced first token: everything but <s>"
    page.locator("#layer").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert text(page, "#legend").startswith("Layer 11, head 2:")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert text(page, "#legend").startswith("Attention rollout")


def test_the_skip_link(opened: Opened) -> None:
    page = opened("caption")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert focused(page) == "tokens"


def test_every_control_has_a_name(opened: Opened) -> None:
    page = opened("detection")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, img, [role=button], [role=img], [role=group]")]
        .filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.textContent.trim() ||
          e.alt || (e.labels && e.labels.length))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("name", ["caption", "detection"])
def test_a_phone(name: str, opened: Opened) -> None:
    page = opened(name, 360, 740, has_touch=True, is_mobile=True)
    for number in (1, 4, 16):
        page.locator("#tokens button").nth(number).tap()
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    assert page.locator("#tree-scroll").evaluate("e => e.scrollWidth > e.clientWidth")  # the tree scrolls by itself
    image = page.locator("#image").bounding_box()
    assert image is not None and image["y"] >= 0  # still visible
    assert page.locator("#tokens button").evaluate_all("all => Math.min(...all.map((e) => e.clientHeight))") >= 24
    assert page.evaluate("() => parseFloat(getComputedStyle(document.body).fontSize)") >= 16


def luminance(page: Page, name: str, element: str = "body") -> float:
    colour = page.locator(element).first.evaluate(f"e => getComputedStyle(e).{name}")
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_both_schemes(scheme: Any, opened: Opened) -> None:
    page = opened("detection", color_scheme=scheme)
    paper = luminance(page, "backgroundColor")
    assert (paper > 0.5) == (scheme == "light")
    for element in ("body", ".quiet", "#legend", "#lens th", "#lens .share", "output"):
        ink = luminance(page, "color", element)
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.5, element


def test_motion_is_left_out_where_unwanted(opened: Opened) -> None:
    moving = "() => getComputedStyle(document.querySelector('#instead .fill')).transitionDuration"
    assert "0.12s" in opened("caption", reduced_motion="no-preference").evaluate(moving)
    assert opened("caption", reduced_motion="reduce").evaluate(moving) in ("0s", "0s, 0s")


def test_hostile_texts_are_shown_as_they_are(opened: Opened) -> None:
    values = json.loads(json.dumps(synthetic.detection()).replace('"cup"', json.dumps(HOSTILE)))
    page = opened({**values, "task": HOSTILE}, 360, 740)
    page.locator("#tokens button").nth(1).click()
    page.locator("#tree g.won").nth(1).click()
    assert text(page, "h1") == HOSTILE and text(page, "#chosen").startswith(f"Token 2 of 17: {HOSTILE}")
    assert page.locator("#marks text").first.text_content() == HOSTILE
    assert HOSTILE in text(page, "#node") and HOSTILE in text(page, "#things")
    assert page.title().startswith(HOSTILE) and page.locator("img").count() == 1 and page.locator("b").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_the_policy_stops_what_slips_in(browser: Any, tmp_path: Any) -> None:
    """Markup that was added to the file afterwards neither runs nor loads."""
    spoilt = render_page(synthetic.caption()).replace(
        "<main>", "<main><script>document.title = 'got'</script><img src='http://127.0.0.1:9/a.png' onerror='got()'>"
    )
    (tmp_path / "spoilt.html").write_text(spoilt, encoding="utf-8")
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "spoilt.html").as_uri())
    page.wait_for_selector("#tokens button")
    assert page.title().startswith("<CAPTION>")
    assert sum("Content Security Policy" in line for line in said) >= 2
    page.close()


def test_coarser_maps_say_so(browser: Any, explanations: Values, tmp_path: Any) -> None:
    path = tmp_path / "coarse.html"
    path.write_text(render_page(explanations["caption"], 900_000), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("#tokens button")
    expected = "maps have 32 levels and one value for each block of 2 × 2 of the 24 × 24 cells"
    assert expected in text(page, "#packing")
    page.locator("#layer").fill("5")
    page.locator("#head").fill("9")
    fine = stored(explanations["caption"]["tokens"][1], 4, 8)
    means = fine.reshape(12, 2, 12, 2).mean(axis=(1, 3)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.corrcoef(heat(page).ravel(), means.ravel())[0, 1] > 0.97
    page.close()


def test_a_real_report(opened: Opened, tmp_path: Any) -> None:
    """What the command says of the specimen's own answer, whatever that is."""
    make_scene(8, 1).image.save(tmp_path / "scene.png")
    common = ["<OD>", str(tmp_path / "scene.png"), "--model", "nano", "--max-new-tokens", "12", "--beams", "2"]
    assert cli.main(["inspect", *common, "--json", "--out", str(tmp_path / "scene.json")]) == 0
    values = json.loads((tmp_path / "scene.json").read_text(encoding="utf-8"))
    page = opened(values)
    assert page.locator("#tokens button").count() == len(values["tokens"])
    for number, token in enumerate(values["tokens"]):
        page.locator("#tokens button").nth(number).click()
        assert text(page, "#chosen").startswith(f"Token {number + 1} of {len(values['tokens'])}: ")
        assert page.locator("#instead li.said").count() == 1
        assert page.locator("#lens tbody tr").count() == values["model"]["layers"] + 1
        assert page.locator("#spread-panel").is_visible() == (token["location"] is not None)
    for mode in ("attention rollout", "saliency", "attention, one head"):
        page.get_by_label(mode, exact=True).check()
        assert page.locator("#heat").evaluate("e => e.width * e.height") == np.prod(values["image"]["grid"])
    assert page.locator("#tree g.won").count() == len(values["tokens"])
