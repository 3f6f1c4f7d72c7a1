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
from tests.inspect import synthetic
from tests.release import keep

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return cli.main(["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def detection() -> dict[str, Any]:
    return synthetic.detection()


@pytest.fixture
def calls(detection: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `explain`, which is replaced by a stand-in."""
    calls: list[Any] = []

    def explain(model, task, image, text=None, *, options=None, saliency=True, name=""):
        calls.append(SimpleNamespace(model=model, task=task, image=image, text=text, options=options))
        calls[-1].saliency, calls[-1].name = saliency, name
        return SimpleNamespace(to_dict=lambda: detection)

    module = ModuleType("florence2.inspect.explanation")
    monkeypatch.setattr(module, "explain", explain, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_a_page(
    calls: list[Any], small_folder: Path, picture_file: Path, detection: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "report.html"
    assert run("<OD>", picture_file, "--model", small_folder, "--out", out, "--beams", 2, "--max-new-tokens", 7) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text(encoding="utf-8") == render_page(detection)
    (call,) = calls
    assert isinstance(call.model, Florence2) and isinstance(call.options, GenerationOptions)
    assert (call.task, call.image, call.text) == ("<OD>", picture_file, None)
    assert (call.options.num_beams, call.options.max_new_tokens) == (2, 7)


def test_the_models_own_settings_and_inputs(calls: list[Any], small_folder: Path, picture_file: Path) -> None:
    common = ("--model", small_folder, "--json")
    assert run("caption_to_phrase_grounding", picture_file, "--text", "a cup", *common) == 0
    assert run("region_to_category", picture_file, "--box", "1,2,30,40", "--no-saliency", *common) == 0
    assert run("open_vocabulary_detection", picture_file, "--text", "a cup", "--text", "a dog", *common) == 0
    assert [call.text for call in calls] == ["a cup", (1, 2, 30, 40), ["a cup", "a dog"]]
    assert calls[0].options == calls[0].model.options()
    assert (calls[0].saliency, calls[1].saliency) == (True, False)
    assert calls[0].name == small_folder.name


def test_json(
    calls: list[Any], small_folder: Path, picture_file: Path, detection: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    common = ("od", picture_file, "--model", small_folder, "--json")
    assert run(*common) == 0
    assert json.loads(capsys.readouterr().out) == detection
    assert run(*common, "--out", tmp_path / "e.json") == 0
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8")) == detection


@pytest.mark.release
def test_plots(
    calls: list[Any],
    small_folder: Path,
    picture_file: Path,
    detection: dict[str, Any],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(detection, "tokens", detection["tokens"][2:3])
    assert run("<OD>", picture_file, "--model", small_folder, "--plots", tmp_path / "a" / "plots") == 0
    names = {path.name for path in (tmp_path / "a" / "plots").iterdir()}
    plots = ["attention-000", "lens", "spread-000"]
    assert names == {f"{plot}.{ending}" for plot in plots for ending in ("png", "svg")}
    assert capsys.readouterr().out == f"{tmp_path}/a/plots\n"


@pytest.mark.parametrize("ending", keep([0], ["html", "json"]))
def test_all_the_way(ending: str, tmp_path: Path, capsys: Capture) -> None:
    """No stand-ins: the specimen's own answer to a small image, as the command writes it and Python says it."""
    image, out = tmp_path / "scene.png", tmp_path / f"report.{ending}"
    make_scene(8, 2).image.resize((96, 64)).save(image)
    search = ("--beams", 1, "--max-new-tokens", 6)
    given = ("--json",) if ending == "json" else ()
    assert run("<CAPTION>", image, "--model", "nano", *search, *given, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    f = load("nano")
    options = f.options(num_beams=1, max_new_tokens=6)
    expected = explain(f, "<CAPTION>", image, options=options, name="nano").to_dict()
    answer = f.run("<CAPTION>", image, options=options)
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


def test_a_file_is_not_lost(calls: list[Any], small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    """Least of all the image itself; and the answer is not computed first."""
    before = picture_file.read_bytes()
    assert run("<OD>", picture_file, "--model", small_folder, "--out", picture_file) == 2
    assert f"{picture_file} exists; choose another name, or add --overwrite." in capsys.readouterr().err
    assert picture_file.read_bytes() == before and calls == []
    other = picture_file.with_name("old.html")
    other.write_text("old")
    assert run("<OD>", picture_file, "--model", small_folder, "--out", other, "--overwrite") == 0
    assert other.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["<OD>", "{image}"], "Where should the explanation go? Give --out report.html, --plots DIR or --json."),
        (
            ["<OD>", "{image}", "--out", "{folder}/no/report.html"],
            "The folder {folder}/no for report.html does not exist;",
        ),
        (["<OD>", "{image}", "--out", "{folder}"], "{folder} is a folder; --out needs a file, such as"),
        (["<OD>", "{image}", "--plots", "{image}"], "{image} is a file; --plots needs a folder."),
        (["<OD>", "{folder}/absent.png", "--json"], "absent.png"),
        (["<VQA>", "{image}", "--json"], "Known tasks: <OCR>"),
        (["<OD>", "{image}", "--json", "--text", "a"], "Task '<OD>' takes no --text; leave it out."),
        (["<OD>", "{image}", "--json", "--box", "1,2,3,4"], "Task '<OD>' takes no --box; leave it out."),
        (["<REGION_TO_OCR>", "{image}", "--json"], "Task <REGION_TO_OCR> needs a region"),
        (
            ["region_to_ocr", "{image}", "--json", "--text", "a", "--box", "1,2,3,4"],
            "takes no --text when --box is given; leave it out.",
        ),
        (
            ["region_to_ocr", "{image}", "--json", "--box", "1,2,3,4", "--box", "2,3,4,5"],
            "--box is given 2 times, but only one answer can be explained; give one box.",
        ),
        (["{image}", "<OD>", "--json"], "The task comes before the image: florence2 inspect '<OD>' {image}"),
        (["captoin", "{image}", "--json"], "Unknown task 'captoin'; did you mean caption?"),
        (["<OD>", "{image}", "--json", "--model", "nowhere"], "'nowhere'"),
    ],
)
def test_wrong_input_gets_a_sentence(
    arguments: list[str], sentence: str, calls: list[Any], picture_file: Path, capsys: Capture
) -> None:
    folder = picture_file.parent
    assert run(*(word.format(image=picture_file, folder=folder) for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("florence2: ") and sentence.format(image=picture_file, folder=folder) in err
    assert out == "" and calls == []


def test_a_missing_plotting_package_is_one_sentence(
    calls: list[Any], picture_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "florence2.inspect.plots", raising=False)
    assert run("<OD>", picture_file, "--plots", tmp_path / "plots") == 2
    assert "--plots needs the package matplotlib" in capsys.readouterr().err and calls == []
