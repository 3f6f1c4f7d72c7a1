"""`florence2 run` and `florence2 cascade`: answers on stdout and in an output folder."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

import florence2
from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.cli.main import main
from florence2.cli.run import Console
from parity.recipe import make_picture
from recipes.nano.scenes import make_scene

FEW = ["--max-new-tokens", "8"]
Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_text_for_people(small_folder: Path, picture_file: Path, small: florence2.Florence2, capsys: Capture) -> None:
    assert run("run", "<CAPTION>", picture_file, "--model", small_folder, *FEW) == 0
    captured = capsys.readouterr()
    expected = small.run("<CAPTION>", picture_file, options=small.options(max_new_tokens=8))
    assert captured.out == f"{expected}\n" and captured.err == ""


@pytest.mark.parametrize("task", ["<OD>", "od"])
def test_json_lines_for_programs(
    task: str, small_folder: Path, picture_file: Path, small: florence2.Florence2, capsys: Capture
) -> None:
    assert run("run", task, picture_file, "--model", small_folder, "--json", "--beams", 2, *FEW) == 0
    row = json.loads(capsys.readouterr().out)
    expected = small.run("<OD>", picture_file, options=small.options(num_beams=2, max_new_tokens=8))
    assert row == {"image": str(picture_file), "place": str(picture_file), **json.loads(expected.to_json())}


def test_samples(small_folder: Path, picture_file: Path, small: florence2.Florence2, capsys: Capture) -> None:
    common = ["run", "od", picture_file, "--model", small_folder, "--json", *FEW]
    options = ["--sample", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.9", "--seed", "3"]
    assert run(*common, *options) == 0
    row = json.loads(capsys.readouterr().out)
    drawn = small.options(sample=True, temperature=0.9, top_k=40, top_p=0.9, seed=3, max_new_tokens=8)
    assert row["raw_text"] == small.run("<OD>", picture_file, options=drawn).raw_text
    assert run(*common, "--temperature", "0.9") == 2
    assert "temperature 0.9 has no effect without sampling" in capsys.readouterr().err


def test_samples_of_different_seeds_are_not_mixed(small_folder: Path, picture_file: Path, tmp_path: Path) -> None:
    common = ["run", "od", picture_file, "--model", small_folder, "--out", tmp_path / "out", *FEW]
    assert run(*common, "--sample", "--seed", "3") == 0
    assert run(*common, "--sample", "--seed", "3") == 0
    assert run(*common, "--sample", "--seed", "4") == run(*common) == 2


def test_several_tasks_and_images(small_folder: Path, picture_file: Path, tmp_path: Path, capsys: Capture) -> None:
    make_picture(1, 30, 30).save(tmp_path / "second.png")
    images = [picture_file, tmp_path / "second.png"]
    assert run("run", "od", "<CAPTION>", *images, "--model", small_folder, "--batch", 2, *FEW) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[1] for line in out.splitlines() if line.startswith("== ")] == ["<OD>", "<CAPTION>"] * 2


def test_inputs(small_folder: Path, picture_file: Path, small: florence2.Florence2, capsys: Capture) -> None:
    common = [picture_file, "--model", small_folder, "--json", *FEW]
    options = small.options(max_new_tokens=8)
    assert run("run", "open_vocabulary_detection", *common, "--text", "a car", "--text", "a dog") == 0
    row = json.loads(capsys.readouterr().out)
    expected = small.run("<OPEN_VOCABULARY_DETECTION>", picture_file, ["a car", "a dog"], options=options)
    assert row["raw_text"] == expected.raw_text
    assert run("run", "region_to_ocr", "region_to_category", *common, "--box", "10,20,200,150") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["input"] for row in rows] == [[10, 20, 200, 150]] * 2
    expected = small.run("<REGION_TO_OCR>", picture_file, box=(10, 20, 200, 150), options=options)
    assert rows[0]["raw_text"] == expected.raw_text
    assert run("run", "<CAPTION_TO_PHRASE_GROUNDING>a car", *common) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "<CAPTION_TO_PHRASE_GROUNDING>"
    assert run("run", "Is there a car?", *common) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "Is there a car?"


def test_several_boxes_are_several_questions(small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    """In the order given, and each answered as if it were alone."""
    boxes = ["10,20,200,150", "-5,0,100,90"]
    common = ["region_to_ocr", picture_file, "--model", small_folder, "--json", *FEW]
    alone = []
    for box in boxes:
        assert run("run", *common, f"--box={box}") == 0
        alone.append(json.loads(capsys.readouterr().out))
    assert run("run", *common, *(f"--box={box}" for box in boxes)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, one in zip(rows, alone, strict=True):
        for name in ("score", "sequence_score"):  # a batch may add its products in another order
            assert row.pop(name, None) == pytest.approx(one.pop(name, None), abs=1e-5)
    assert rows == alone and [row["input"] for row in rows] == [[10, 20, 200, 150], [-5, 0, 100, 90]]


def test_one_bad_image_in_many(small_folder: Path, picture_file: Path, tmp_path: Path, capsys: Capture) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(picture_file.read_bytes()[:500])
    assert run("run", "<OD>", picture_file, bad, tmp_path / "absent.png", "--model", small_folder, "--json", *FEW) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in row for row in rows] == [False, True, True]


def test_out_and_resume(small_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    album = tmp_path / "album"
    album.mkdir()
    for i in range(3):
        make_picture(i, 40, 30).save(album / f"{i}.png")
    command = ["run", "<OD>", album, "--model", small_folder, "--out", tmp_path / "out", "--draw", *FEW]
    assert run(*command) == 0
    first = (tmp_path / "out" / "results.jsonl").read_text()
    assert len(first.splitlines()) == 3
    capsys.readouterr()
    assert run(*command) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "already holds 3 answers" in captured.err
    assert (tmp_path / "out" / "results.jsonl").read_text() == first


def test_cascade(small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    assert run("cascade", picture_file, "--model", small_folder, "--json", "--detail", "detailed", *FEW) == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row) == ["image", "place", "task", "detail", "caption", "grounding", "segments"]
    assert row["task"] == "cascade" and row["detail"] == "detailed"
    assert row["caption"]["task"] == "<DETAILED_CAPTION>"
    assert row["grounding"]["task"] == "<CAPTION_TO_PHRASE_GROUNDING>"


def test_a_cascade_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    """The specimen finds the phrases of its own caption, so there are regions to draw."""
    make_scene(8, 2).image.save(tmp_path / "scene.png")
    common = ["cascade", tmp_path / "scene.png", "--model", "nano", "--beams", 1]
    assert run(*common, "--out", tmp_path / "out", "--draw") == 0
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert row["grounding"]["boxes"] and row["drawing"] == "scene.cascade.png"
    assert (tmp_path / "out" / "scene.cascade.png").exists()


def test_a_misspelt_task_gets_a_suggestion(small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    assert run("run", "captoin", picture_file, "--model", small_folder) == 2
    assert "did you mean caption?" in capsys.readouterr().err


def test_an_unusable_output_folder_is_found_at_once(picture_file: Path, capsys: Capture) -> None:
    assert run("run", "od", picture_file, "--model", "no/such/model", "--out", picture_file) == 2
    assert str(picture_file) in capsys.readouterr().err


def test_console(small: florence2.Florence2, picture_file: Path, capsys: Capture) -> None:
    text = "a café<loc_100><loc_200><loc_700><loc_800>"
    answer = small.processor.answer("<OD>", text, image_size=(320, 200))
    row = Row(Source(str(picture_file), picture_file, "photo"), TaskQuestion("<OD>"), answer)
    Console(as_json=True, headings=True)(row)
    assert json.loads(capsys.readouterr().out)["boxes"][0]["label"] == "a café"
    Console(as_json=False, headings=True)(row)
    out = capsys.readouterr().out
    assert out.startswith(f"== {picture_file}  <OD>\na café  ")
    Console(as_json=False, headings=False)(Row(row.source, row.question, error="something"))
    captured = capsys.readouterr()
    assert captured.out == "" and "something" in captured.err


def test_json_is_json_on_any_terminal(
    small: florence2.Florence2, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stream)
    row = Row(Source("日本é😀.png", picture_file, "x"), TaskQuestion("<OD>"), error="x")
    Console(as_json=True, headings=False)(row)
    stream.flush()
    assert json.loads(stream.buffer.getvalue())["image"] == "日本é😀.png"  # type: ignore[attr-defined]


def test_a_free_prompt_must_be_said_to_be_one(small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    common = [picture_file, "--model", small_folder, "--json", *FEW]
    for word, near in (("OD", "od"), ("<od>", "<OD>"), ("detect", "od"), ("<Caption>", "<CAPTION>")):
        assert run("run", word, *common) == 2
        assert f"did you mean {near}?" in capsys.readouterr().err
        assert run("run", word, *common, "--free-prompt") == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["task"], row["kind"]) == (word, "text")
    assert run("run", "<OD>", "caption", *common, "--free-prompt") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["kind"]) for row in rows] == [("<OD>", "text"), ("<CAPTION>", "text")]


def test_background(small_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    Image.new("RGBA", (64, 48)).save(tmp_path / "logo.png")
    Image.new("RGB", (64, 48), "white").save(tmp_path / "white.png")
    common = ["--model", small_folder, "--json", *FEW]
    scores = []
    for arguments in (["logo.png", "--background", "white"], ["white.png"], ["logo.png"]):
        assert run("run", "caption", tmp_path / arguments[0], *arguments[1:], *common) == 0
        scores.append(json.loads(capsys.readouterr().out)["score"])
    assert scores[0] == scores[1] != scores[2]
    with pytest.raises(SystemExit):
        run("run", "caption", tmp_path / "logo.png", "--background", "nocolour", *common)
    assert "background is 'nocolour'; it must be a colour" in capsys.readouterr().err
