"""`florence2 inspect` as a user types it; what an explanation holds is tested where it is made."""

import base64
import html
import json
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from florence2 import Florence2, GenerationOptions, load
from florence2.cli import main as cli
from florence2.inspect import explain
from florence2.inspect.page.render import render_page
from recipes.nano.scenes import make_scene
from tests.inspect import made_up

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return cli.main(["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def detection() -> dict[str, Any]:
    return made_up.detection()


@pytest.fixture
def asked(detection: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked to be explained; the explanation is made up."""
    calls: list[Any] = []

    def explain(model, task, image, text=None, *, box=None, options=None, saliency=True, name=""):
        calls.append(SimpleNamespace(model=model, task=task, image=image, text=text, box=box, options=options))
        calls[-1].saliency, calls[-1].name = saliency, name
        return SimpleNamespace(to_dict=lambda: detection)

    module = ModuleType("florence2.inspect.explanation")
    monkeypatch.setattr(module, "explain", explain, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_a_page(
    asked: list[Any], small_folder: Path, picture_file: Path, detection: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "report.html"
    assert run(picture_file, "<OD>", "--model", small_folder, "--out", out, "--beams", 2, "--max-new-tokens", 7) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text(encoding="utf-8") == render_page(detection)
    (call,) = asked
    assert isinstance(call.model, Florence2) and isinstance(call.options, GenerationOptions)
    assert (call.task, call.image, call.text, call.box) == ("<OD>", picture_file, None, None)
    assert (call.options.num_beams, call.options.max_new_tokens) == (2, 7)


def test_the_models_own_settings_and_inputs(asked: list[Any], small_folder: Path, picture_file: Path) -> None:
    common = ("--model", small_folder, "--json")
    assert run(picture_file, "caption_to_phrase_grounding", "--text", "a cup", *common) == 0
    assert run(picture_file, "region_to_category", "--box", "1,2,30,40", "--no-saliency", *common) == 0
    assert (asked[0].text, asked[0].box) == ("a cup", None)
    assert (asked[1].text, asked[1].box) == (None, (1, 2, 30, 40))
    assert asked[0].options == asked[0].model.options()
    assert (asked[0].saliency, asked[1].saliency) == (True, False)
    assert asked[0].name == small_folder.name


def test_json(
    asked: list[Any], small_folder: Path, picture_file: Path, detection: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    common = (picture_file, "od", "--model", small_folder, "--json")
    assert run(*common) == 0
    assert json.loads(capsys.readouterr().out) == detection
    assert run(*common, "--out", tmp_path / "e.json") == 0
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8")) == detection


def test_plots(
    asked: list[Any],
    small_folder: Path,
    picture_file: Path,
    detection: dict[str, Any],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(detection, "tokens", detection["tokens"][2:3])
    assert run(picture_file, "<OD>", "--model", small_folder, "--plots", tmp_path / "a" / "plots") == 0
    names = {path.name for path in (tmp_path / "a" / "plots").iterdir()}
    plots = ["attention-000", "lens", "spread-000"]
    assert names == {f"{plot}.{ending}" for plot in plots for ending in ("png", "svg")}
    assert capsys.readouterr().out == f"{tmp_path}/a/plots\n"


@pytest.mark.parametrize("ending", ["html", "json"])
def test_all_the_way(ending: str, tmp_path: Path, capsys: Capture) -> None:
    """Nothing made up: the specimen's own answer to a small picture, as the command writes it and Python says it."""
    picture, out = tmp_path / "scene.png", tmp_path / f"report.{ending}"
    make_scene(8, 2).image.resize((96, 64)).save(picture)
    search = ("--beams", 1, "--max-new-tokens", 6)
    given = ("--json",) if ending == "json" else ()
    assert run(picture, "<CAPTION>", "--model", "nano", *search, *given, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    f = load("nano")
    options = f.options(num_beams=1, max_new_tokens=6)
    expected = explain(f, "<CAPTION>", picture, options=options, name="nano").to_dict()
    answer = f.run("<CAPTION>", picture, options=options)
    assert expected["answer"]["text"] == answer.text
    assert [token["id"] for token in expected["tokens"]] == list(answer.token_ids[1:])
    assert all(token["saliency"] for token in expected["tokens"])
    written = out.read_text(encoding="utf-8")
    if ending == "json":
        assert alike(json.loads(written), json.loads(json.dumps(expected)))
        return
    packed = re.search(r'id="data-head">([^<]*)<', written)
    assert packed is not None
    head = json.loads(zlib.decompress(base64.b64decode(packed[1])))
    for token, known in zip(head["tokens"], expected["tokens"], strict=True):
        assert alike(token["lens"], known["lens"]) and alike(token["alternatives"], known["alternatives"])
    assert html.escape(answer.text) in written and len(written) < 200_000


def alike(a: Any, b: Any) -> bool:
    """Equal but for the last digit of numbers, and for bytes in base64 that are as long."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float):
        return bool(a == pytest.approx(b, rel=1e-3, abs=2e-4))
    return bool(a == b or (isinstance(a, str) and len(a) == len(b) > 90))


def test_a_file_is_not_lost(asked: list[Any], small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    """Least of all the picture itself; and the answer is not computed first."""
    before = picture_file.read_bytes()
    assert run(picture_file, "<OD>", "--model", small_folder, "--out", picture_file) == 2
    assert f"{picture_file} exists; choose another name, or add --overwrite." in capsys.readouterr().err
    assert picture_file.read_bytes() == before and asked == []
    other = picture_file.with_name("old.html")
    other.write_text("old")
    assert run(picture_file, "<OD>", "--model", small_folder, "--out", other, "--overwrite") == 0
    assert other.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{picture}", "<OD>"], "Where to? Give --out report.html, --plots DIR or --json."),
        (["{picture}", "<OD>", "--out", "{folder}/no/report.html"], "There is no folder {folder}/no for report.html;"),
        (["{picture}", "<OD>", "--out", "{folder}"], "{folder} is a folder; --out needs a file, such as"),
        (["{picture}", "<OD>", "--plots", "{picture}"], "{picture} is a file; --plots needs a folder."),
        (["{folder}/absent.png", "<OD>", "--json"], "absent.png"),
        (["{picture}", "<VQA>", "--json"], "<VQA> is no task of this model."),
        (["{picture}", "<OD>", "--json", "--text", "a"], "Task <OD> takes no input, but got 'a'"),
        (["{picture}", "<OD>", "--json", "--box", "1,2,3,4"], "<OD> takes no region; leave out --box."),
        (["{picture}", "<REGION_TO_OCR>", "--json"], "Task <REGION_TO_OCR> needs a region"),
        (
            ["{picture}", "region_to_ocr", "--json", "--text", "a", "--box", "1,2,3,4"],
            "give --text or --box, not both.",
        ),
        (["{picture}", "<OD>", "--json", "--model", "nowhere"], "'nowhere' is not an existing path"),
    ],
)
def test_wrong_input_gets_a_sentence(
    arguments: list[str], sentence: str, asked: list[Any], picture_file: Path, capsys: Capture
) -> None:
    folder = picture_file.parent
    assert run(*(word.format(picture=picture_file, folder=folder) for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("florence2: ") and sentence.format(picture=picture_file, folder=folder) in err
    assert out == "" and asked == []


def test_a_missing_plotting_package_is_one_sentence(
    asked: list[Any], picture_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "florence2.inspect.plots", raising=False)
    assert run(picture_file, "<OD>", "--plots", tmp_path / "plots") == 2
    assert "--plots needs the package matplotlib" in capsys.readouterr().err and asked == []
