"""`florence2 run` and `florence2 cascade`: answers on stdout and in an output folder."""

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import florence2
from florence2.bulk.answering import answer_images
from florence2.bulk.journal import Folder
from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.bulk.summary import Summary
from florence2.checkpoints.hub import resolve
from florence2.cli.cascade import CascadeQuestion
from florence2.cli.main import main
from florence2.cli.progress import Console, Progress
from florence2.cli.run import _write_rows
from florence2.errors import PromptError
from parity.recipe import make_picture
from recipes.nano.scenes import make_scene

FEW = ["--max-new-tokens", "8"]
Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_text_for_people(small_folder: Path, picture_file: Path, small: florence2.Florence2, capsys: Capture) -> None:
    assert run("run", "<CAPTION>", picture_file, "--model", small_folder, "--batch", 1, *FEW) == 0
    captured = capsys.readouterr()
    expected = small.run("<CAPTION>", picture_file, options=small.options(max_new_tokens=8))
    assert captured.out == f"{expected}\n"
    assert captured.err == "" or expected.is_cut_off


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


def test_several_tasks_and_images(
    small_folder: Path, picture_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_picture(1, 30, 30).save(tmp_path / "second.png")
    images, reports = [picture_file, tmp_path / "second.png"], []
    monkeypatch.setattr(Progress, "__call__", lambda self, *numbers: reports.append(numbers))
    assert run("run", "od", "<CAPTION>", *images, "--model", small_folder, "--batch", 2, *FEW) == 0
    assert reports == [(0, 2), (1, 2), (2, 2)]
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


def test_cut_answers_are_told_once_at_the_end(small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    common = ["run", "od", "<CAPTION>", picture_file, "--model", small_folder]
    assert run(*common, "--max-new-tokens", 2) == 0
    captured = capsys.readouterr()
    assert captured.out.count("(cut off at the token limit)") == 2 and "nothing found" not in captured.out
    assert captured.err == (
        "florence2: 2 of 2 answers were cut off at --max-new-tokens 2; a larger number gives the rest.\n"
    )


def test_boxes_are_resumed_one_by_one(small_folder: Path, picture_file: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ["run", "region_to_ocr", picture_file, "--model", small_folder, "--out", tmp_path / "out", *FEW]
    assert run(*common, "--box", "10,20,200,150") == 0
    capsys.readouterr()
    assert run(*common, "--box", "10,20,200,150", "--box", "0,0,100,90") == 0
    captured = capsys.readouterr()
    assert (
        captured.out.count("== ") == 1 and "already holds 1 answers; they are not computed or printed" in captured.err
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["input"] for row in rows] == [[10, 20, 200, 150], [0, 0, 100, 90]]


def test_the_only_image_of_a_folder_is_named(small_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "album").mkdir()
    make_picture(1, 40, 30).save(tmp_path / "album" / "a.png")
    assert run("run", "od", tmp_path / "album", "--model", small_folder, *FEW) == 0
    assert capsys.readouterr().out.startswith(f"== {tmp_path / 'album' / 'a.png'}  <OD>\n")
    assert run("run", "od", tmp_path / "album" / "a.png", "--model", small_folder, *FEW) == 0
    assert "==" not in capsys.readouterr().out


def test_files_passed_over_are_named_and_counted(small_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    album = tmp_path / "album"
    album.mkdir()
    make_picture(1, 40, 30).save(album / "a.png")
    for name in ("IMG_0001.HEIC", "notes.txt", ".hidden"):
        (album / name).write_text("x")
    assert run("run", "od", album, "--model", small_folder, *FEW) == 0
    errors = capsys.readouterr().err
    assert "2 files were passed over" in errors and "1 .heic (IMG_0001.HEIC), 1 .txt (notes.txt)" in errors
    assert "Convert HEIC images to JPEG first." in errors and "hidden" not in errors
    assert errors.endswith("florence2: 2 files in folders were passed over.\n")


def test_an_output_folder_inside_the_input_is_not_answered(small_folder: Path, tmp_path: Path) -> None:
    make_scene(8, 2).image.save(tmp_path / "scene.png")
    command = ["run", "od", tmp_path, "--model", "nano", "--beams", 1, "--out", tmp_path / "out", "--draw"]
    assert run(*command) == run(*command) == 0
    assert (tmp_path / "out" / "scene.od.png").exists()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1


def test_earlier_answers_are_drawn_without_the_model(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scene(8, 2).image.save(tmp_path / "scene.png")
    common = ["run", "od", tmp_path / "scene.png", "--model", "nano", "--beams", 1]
    assert run(*common, "--out", tmp_path / "drawn", "--draw") == 0
    assert run(*common, "--out", tmp_path / "out") == 0
    monkeypatch.setattr("florence2.cli.run.load_model", None)
    for _ in range(2):  # the second finds all drawn
        assert run(*common, "--out", tmp_path / "out", "--draw") == 0
        for name in ("results.jsonl", "scene.od.png"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "drawn" / name).read_bytes()
    (tmp_path / "out" / "scene.od.png").unlink()
    (tmp_path / "scene.png").unlink()
    capsys.readouterr()
    assert run(*common, "--out", tmp_path / "out", "--draw") == 1
    errors = capsys.readouterr().err
    assert "scene.png does not exist" in errors and "1 of 1 answer was not drawn. The first reason" in errors


def test_a_changed_image_is_answered_again(small_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """The answer to the old image is replaced, that to the other image is not computed again."""
    for name in ("a.png", "b.png"):
        make_picture(1, 40, 30).save(tmp_path / name)
    images = [tmp_path / name for name in ("a.png", "b.png")]
    common = ["run", "<CAPTION>", "od", *images, "--model", small_folder, "--out", tmp_path / "out", *FEW]
    assert run(*common) == 0
    make_picture(2, 50, 30).save(tmp_path / "b.png")
    capsys.readouterr()
    assert run(*common) == 0
    captured = capsys.readouterr()
    assert captured.out.count("== ") == 2 == captured.out.count("b.png")
    assert "2 answers are about images that have changed since, so they are computed again." in captured.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(Path(row["image"]).name, row["image_size"]) for row in rows] == [("a.png", [40, 30])] * 2 + [
        ("b.png", [50, 30])
    ] * 2
    assert run(*common) == 0
    assert "changed since" not in capsys.readouterr().err


def test_a_resumed_run_counts_the_cut_answers_of_the_earlier(
    small_folder: Path, picture_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    common = [picture_file, "--model", small_folder, "--out", tmp_path / "out", "--max-new-tokens", 2]
    assert run("run", "od", *common) == run("cascade", *common) == 0
    capsys.readouterr()
    assert run("run", "od", "<CAPTION>", *common) == 0
    assert "2 of 2 answers were cut off at --max-new-tokens 2;" in capsys.readouterr().err
    assert run("cascade", *common) == 0
    assert "1 of 1 answer was cut off at --max-new-tokens 2;" in capsys.readouterr().err


def test_a_misspelt_model_leaves_no_folder(picture_file: Path, small_folder: Path, tmp_path: Path) -> None:
    common = ["run", "od", picture_file, "--out", tmp_path / "out", *FEW]
    assert run(*common, "--model", "nanno") == 2 and not (tmp_path / "out").exists()
    damaged = tmp_path / "damaged"
    shutil.copytree(small_folder, damaged)
    (damaged / "config.json").write_text("{}")
    assert run(*common, "--model", damaged) == 2
    assert run(*common, "--model", small_folder) == 0


def test_a_cascade_with_a_gap_is_shown_and_counted(
    small: florence2.Florence2, picture_file: Path, capsys: Capture
) -> None:
    nothing = small.processor.answer("<CAPTION_TO_PHRASE_GROUNDING>", "", image_size=(320, 200))
    caption = small.processor.answer("<CAPTION>", "</s>a long caption</s>", image_size=(320, 200))
    cascade = florence2.Cascade(caption, nothing, (), ("It is too long.",))
    row = Row(Source("a.png", picture_file, "a"), CascadeQuestion(), cascade)
    code = _write_rows([row], None, Console(as_json=False, headings=False), Summary(), Progress())
    captured = capsys.readouterr()
    assert captured.out == "a long caption\nIt is too long.\n" and code == 1
    assert captured.err == "florence2: 1 of 1 answer was left incomplete.\n"


def test_a_drawing_that_failed_is_said_and_has_an_exit_code(tmp_path: Path, capsys: Capture) -> None:
    make_scene(8, 2).image.save(tmp_path / "scene.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "album").write_text("a file where the drawings should go")
    (tmp_path / "album" / "album").mkdir(parents=True)
    make_scene(8, 2).image.save(tmp_path / "album" / "album" / "scene.png")
    command = ["run", "od", tmp_path / "album", "--model", "nano", "--beams", 1, "--out", out, "--draw"]
    assert run(*command) == 1
    captured = capsys.readouterr()
    assert "scene.png: The drawing cannot be written: File exists." in captured.err
    assert "1 of 1 answer was not drawn. The first reason: The drawing cannot be written" in captured.err
    assert json.loads((out / "results.jsonl").read_text())["boxes"] and "cannot" not in captured.out


def test_ctrl_c_writes_the_answers_that_wait_for_a_slower_one(
    picture_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    questions = [TaskQuestion("<OD>"), TaskQuestion("<OCR>")]
    source = Source("a.png", picture_file, "a")

    def ask(pairs: Iterable[Any], arrived: Any) -> Iterator[Any]:
        next(pairs), next(pairs)
        arrived(1, PromptError("known"))
        raise KeyboardInterrupt
        yield

    rows = answer_images(florence2.load("nano"), [source], questions, ask)
    with Folder(tmp_path, draw=False, settings={}) as folder:
        assert _write_rows(rows, folder, Console(as_json=False, headings=False), Summary(), Progress()) == 130
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (row["task"], row["error"]) == ("<OCR>", "known") and "a.png: known" in capsys.readouterr().err


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


def test_a_task_named_in_words_is_not_a_free_prompt(small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    common = [picture_file, "--model", small_folder, *FEW]
    assert run("run", "more detailed caption", *common) == 2
    assert "did you mean more_detailed_caption?" in capsys.readouterr().err
    assert run("run", "more detailed caption", *common, "--free-prompt") == 0


def test_options_may_stand_between_tasks_and_images(
    small_folder: Path, picture_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = ["--model", small_folder]
    odd = tmp_path / "-odd.png"
    odd.write_bytes(picture_file.read_bytes())
    for words in (
        ["<OD>", *model, picture_file, *FEW, "--beams", 1, odd],
        [*model, "<OD>", "--beams", 1, picture_file, odd, *FEW],
    ):
        assert run("run", *words, "--json") == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(row["task"], row["image"]) for row in rows] == [("<OD>", str(picture_file)), ("<OD>", str(odd))]
    assert run("cascade", picture_file, *model, odd, *FEW, "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_after_two_hyphens_no_word_is_an_option(
    small_folder: Path, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-odd.png").write_bytes(picture_file.read_bytes())
    for words in (["--json", "--", "od", "-odd.png"], ["od", "--json", "--", "-odd.png"]):
        assert run("run", "--model", small_folder, *FEW, *words) == 0
        assert json.loads(capsys.readouterr().out)["image"] == "-odd.png"
    with pytest.raises(SystemExit):
        run("run", "od", "-odd.png")


def test_several_prompts_of_a_task_in_a_row(small_folder: Path, picture_file: Path, capsys: Capture) -> None:
    common = [picture_file, "--model", small_folder, "--json", *FEW]
    prompts = ["<VQA>what colour?", "<VQA>how many?", "<CAPTION_TO_PHRASE_GROUNDING>a car", "od"]
    assert run("run", *prompts, *common, "--task-kind", "VQA=text") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row.get("input")) for row in rows] == [
        ("<VQA>", "what colour?"),
        ("<VQA>", "how many?"),
        ("<CAPTION_TO_PHRASE_GROUNDING>", "a car"),
        ("<OD>", None),
    ]
    assert run("run", "od", "<VQA>how many?", *common) == 2
    assert "Unknown task <VQA>. Known tasks" in capsys.readouterr().err


def test_a_file_that_is_named_like_a_task_is_an_image(
    small_folder: Path, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("<VQA>what?", "ocr", "<OD>.png"):
        Path(name).write_bytes(picture_file.read_bytes())
        assert run("run", "od", name, "--model", small_folder, "--json", *FEW) == 0
        assert json.loads(capsys.readouterr().out)["image"] == name


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


def test_answers_about_changed_images_stay_until_they_are_replaced(
    small_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """And the settings are checked against them: a run that cannot begin takes nothing away."""
    for name in ("a.png", "b.png"):
        make_picture(1, 40, 30).save(tmp_path / name)
    words = ["run", "caption", str(tmp_path), "--model", str(small_folder), "--out", str(tmp_path / "out")]
    assert main([*words, "--max-new-tokens", "4"]) == 0
    results = tmp_path / "out" / "results.jsonl"
    before = results.read_bytes()
    for name in ("a.png", "b.png"):
        os.utime(tmp_path / name, (1, 1))
    capsys.readouterr()
    assert main([*words, "--max-new-tokens", "5"]) != 0
    assert "max_new_tokens" in capsys.readouterr().err and results.read_bytes() == before
    assert main([*words, "--max-new-tokens", "4", "--device", "nowhere"]) != 0 and results.read_bytes() == before
    assert main([*words, "--max-new-tokens", "4"]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png"]
    assert all(row["file"]["modified_ns"] == 10**9 for row in rows)


def test_regions_below_a_confidence_are_left_out(tmp_path: Path, capsys: Capture) -> None:
    make_scene(7, 3).image.save(tmp_path / "a.png")
    rows = []
    for least in ((), ("--min-confidence", "1"), ("--min-confidence", "0.1")):
        assert run("run", "<OD>", tmp_path / "a.png", "--model", "nano", "--device", "cpu", "--json", *least) == 0
        rows.append(json.loads(capsys.readouterr().out))
    every, none, some = ([box["confidence"] for box in row["boxes"]] for row in rows)
    assert every and not none and some == [value for value in every if value >= 0.1]
    assert run("cascade", tmp_path / "a.png", "--model", "nano", "--device", "cpu", "--min-confidence", "1") == 0
    captured = capsys.readouterr()
    assert "(nothing at or above 1; " in captured.out and "below --min-confidence were left out." in captured.err


def test_confidences_can_be_left_out(tmp_path: Path, capsys: Capture) -> None:
    make_scene(7, 3).image.save(tmp_path / "a.png")
    common = ["run", "<OD>", tmp_path / "a.png", "--model", "nano", "--device", "cpu", "--max-new-tokens", "20"]
    assert run(*common, "--no-confidence", "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "score  x1 y1 x2 y2" in captured.out and "confidence" not in captured.out + captured.err
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert row["boxes"] and all(box["confidence"] is None and box["score"] > 0 for box in row["boxes"])
    assert run(*common, "--out", tmp_path / "out") == 2  # answers with confidences may not join them
    assert "confidence was False and is None" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*common, "--no-confidence", "--min-confidence", "0.5")
    assert "not allowed with argument" in capsys.readouterr().err


def test_answers_of_two_calibrations_are_not_mixed(tmp_path: Path, capsys: Capture) -> None:
    """By content: a table that is added, removed or written again makes other confidences."""
    make_scene(7, 3).image.save(tmp_path / "a.png")
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(resolve("nano"), model)
    common = ["run", "<OD>", tmp_path / "a.png", "--model", model, "--device", "cpu", "--out", out, *FEW]
    assert run(*common) == 0
    shutil.move(model / "confidence.json", tmp_path / "own.json")
    capsys.readouterr()
    assert run(*common) == 2
    assert "and is 'raw'" in capsys.readouterr().err
    assert run(*common, "--calibration", tmp_path / "own.json") == 0
    table = {"tables": {"boxes": {"raw": [0, 1], "frequency": [0.1, 0.9]}}}
    (tmp_path / "own.json").write_text(json.dumps(table))
    assert run(*common, "--calibration", tmp_path / "own.json") == 2
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "calibration"}))
    assert run(*common) == 2  # of a version that did not store it
    assert "calibration was None and is 'raw'" in capsys.readouterr().err


@pytest.mark.parametrize("least", ["2", "-0.1", "nan", "much"])
def test_a_confidence_is_a_share(least: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run("run", "<OD>", "a.png", f"--min-confidence={least}")
    assert "is not a number from 0 to 1" in capsys.readouterr().err
