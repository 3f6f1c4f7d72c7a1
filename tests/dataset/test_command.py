"""The command: words that do not fit are one sentence, and what was left out is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from florence2.cli.main import main
from tests.dataset.rows import boxes, caption, failed, write_rows

ROWS = [
    boxes("a.jpg", ("Dogs", 1, 2, 3, 4), ("zebra", -5, 2, 300, 4), ("DOG", 5, 5, 5, 5)),
    boxes("b.jpg", ("zebra", 9, 9, 3, 4)),
    failed("c.jpg"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return write_rows(tmp_path / "rows", ROWS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to coco,fly", "Unknown format 'fly' in --to. Known formats: coco, coco-results, coco-captions, yolo, "),
        ("--to coco,", "Unknown format '' in --to."),
        ("--to coco --prefix x", "--prefix has no effect on --to coco; it is for captions, metadata, coco-captions."),
        ("--to csv --classes {classes}", "--classes has no effect on --to csv; it is for coco, coco-results, yolo, "),
        ("--to coco --unmatched drop", "--unmatched needs --classes FILE"),
        ("--to coco --with-images", "--with-images has no effect on --to coco; it is for webdataset."),
        ("--to yolo --images {classes}", ", which is not a folder; give the one with the images."),
        ("--to csv --images .", "--images has no effect on --to csv; it is for yolo, yolo-seg, yolo-obb, "),
        ("--to captions --overwrite", "--overwrite needs --beside"),
        ("--to captions --ext txt", "--ext is 'txt'; give a dot"),
        ("--to coco --classes {classes}x", "classes.txtx cannot be read: No such file or directory."),
        ("--to coco --split train=2", "--split has the part 'train=2'"),
        ("--to coco --task ocr", "has no row of the task 'ocr'. It holds <OD> (2 rows, boxes), <OD> (1 row, failed)."),
        ("--to captions", "No answer in "),
        ("--to yolo --split a=1", "A YOLO dataset needs the parts train and val; name both in --split."),
    ],
)
def test_wrong_words(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    given = words.format(classes=tmp_path / "classes.txt").split()
    assert main(["dataset", str(source), "--out", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("florence2: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["", "--to coco --min-confidence 2", "--to coco --unmatched fly", "--to yolo --link x"]
)
def test_words_that_the_grammar_refuses(source: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["dataset", str(source), "--out", str(tmp_path / "out"), *words.split()])
    assert caught.value.code == 2


def test_captions_next_to_the_images_need_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    row = caption("a.jpg", "a cat") | {"place": str(tmp_path / "a.jpg")}
    words = ["dataset", str(write_rows(tmp_path / "rows", [row])), "--to", "captions"]
    assert main(words) == 2 and "Where to? Give --out DIR" in capsys.readouterr().err
    assert main([*words, "--beside", "--prefix", "ohwx, "]) == 0
    assert (tmp_path / "a.txt").read_text() == "ohwx, a cat"
    assert (tmp_path / "rows" / "dataset" / "report.json").is_file()


def test_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", str(tmp_path), "--to", "coco", "--out", str(tmp_path / "out")]) == 2
    assert "holds no results.jsonl; give an output folder of `florence2 label`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_everything_that_was_left_out_is_said(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--classes", str(tmp_path / "classes.txt"), "--unmatched", "drop"]
    assert main(["dataset", str(source), "--to", "coco", "--out", str(tmp_path / "out"), *words]) == 0
    output = capsys.readouterr()
    assert output.out == "" and output.err.splitlines() == [
        "florence2: 1 row failed; report.json lists the errors.",
        "florence2: coco: 2 images, 1 annotation.",
        "florence2: coco: 1 region was clipped to the image.",
        "florence2: coco: 1 box had left and right, or top and bottom, in the wrong order; they were exchanged.",
        "florence2: coco: 1 region without area was left out.",
        "florence2: coco: labels matched to classes: 0 exactly, 0 by case and white space, 1 as plurals, 2 not matched "
        "and left out: 'zebra' (2).",
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_bytes())["coco"]
    assert report["classes"]["unmatched"] == {"zebra": 2} and report["settings"] == {"unmatched": "drop"}
    assert report["errors"][0]["id"] == "c.jpg"


def test_what_is_missing_gives_another_exit_code(source: Path, tmp_path: Path) -> None:
    words = ["dataset", str(source), "--out", str(tmp_path / "out"), "--to"]
    assert main([*words, "yolo"]) == 1  # no image is at its place
    assert main([*words, "coco"]) == 0
    with (source / "results.jsonl").open("a") as file:
        file.write("damaged\n")
    assert main([*words, "coco"]) == 1


def test_the_program_without_torch(tmp_path: Path) -> None:
    """A view of a million rows must not wait for the import of a model."""
    write_rows(tmp_path, [caption("a.jpg", "a cat")])
    code = (
        "import sys; sys.modules['torch'] = None; from florence2.cli.main import main; "
        "sys.exit(main(['dataset', '.', '--to', 'captions,csv,coco-captions', '--out', 'out']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.splitlines()[0] == "florence2: captions: 1 image, 1 written."
    assert (tmp_path / "out" / "captions" / "a.txt").read_text() == "a cat"
