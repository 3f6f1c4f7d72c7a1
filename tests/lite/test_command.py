"""`python -m florence2.lite`: the rows of `florence2 run`, its folders, its sentences."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from florence2.cli.main import main as torch_main
from florence2.lite.command import main
from recipes.nano.exam import Exam
from tests.release import keep


@pytest.fixture
def images(scenes: Exam, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        scenes[index].image.save(folder / f"{index}.png")
    return folder


def rows(text: str) -> list[dict[str, object]]:
    """Rows with their numbers rounded, since these differ by the last digits."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return round(value, 3)
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return [rounded(each) for each in value] if isinstance(value, list) else value

    return [rounded(json.loads(line)) for line in text.splitlines()]  # type: ignore[misc]


@pytest.mark.parametrize(
    "words",
    keep(
        [0, 1],
        [
            ["run", "od", "caption", "{images}", "--json"],
            [
                "run",
                "region_to_ocr",
                "{images}",
                "--box",
                "1,2,60,70",
                "--json",
                "--beams",
                "1",
                "--min-confidence",
                "0.2",
            ],
            ["cascade", "{images}", "--json", "--detail", "detailed", "--max-new-tokens", "40"],
            ["run", "od", "{images}", "--json", "--no-confidence", "--beams", "1", "--max-new-tokens", "20"],
        ],
    ),
    ids=" ".join,
)
def test_the_rows_are_those_of_torch(
    words: list[str], images: Path, nano_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(images=images) for word in words]
    assert torch_main([*words, "--model", "nano"]) == 0
    expected = rows(capsys.readouterr().out)
    assert main([*words, "--model", str(nano_folder), "--threads", "1"]) == 0
    assert rows(capsys.readouterr().out) == expected and expected


def test_a_folder_is_resumed(
    images: Path, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["run", "caption", str(images), "--model", str(nano_folder), "--out", str(out), "--draw"]
    assert main(words) == 0
    stored = (out / "results.jsonl").read_text()
    assert len(stored.splitlines()) == 2
    capsys.readouterr()
    assert main(words) == 0 and (out / "results.jsonl").read_text() == stored
    assert "already holds 2 answers" in capsys.readouterr().err
    assert main([*words, "--beams", "1"]) == 2  # answers of other settings do not belong into one folder


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("run od {images}", "the following arguments are required: --model"),
        ("run od {images} --model nowhere", "'nowhere' is not a folder; give one that `florence2 export` has written"),
        ("run od {images} --model {model} --provider abacus", "provider is 'abacus'"),
        ("run od {images} --model {model} --threads 0", "--threads is 0; it must be at least 1"),
        ("run od {images} --model {model} --kind q5", "invalid choice: 'q5'"),
        ("run od {images} --model {images}", "config.json"),
        ("run {images} od --model {model}", "python -m florence2.lite run od "),
        ("run od {images} --model {model} --device cpu", "unrecognized arguments: --device"),
        ("train", "invalid choice: 'train'"),
    ],
)
def test_wrong_words(
    words: str, sentence: str, images: Path, nano_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.format(images=images, model=nano_folder) for word in words.split()]
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    assert code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


WITHOUT_TORCH = """
import sys, time
for name in ("torch", "safetensors", "transformers"):
    sys.modules[name] = None  # any import of it fails
began = time.process_time()
import florence2.lite
from florence2.lite import load
seconds = time.process_time() - began
f = load(sys.argv[1], threads=1)
answer = f.run("<OD>", sys.argv[2])
from florence2.lite.command import main
code = main(["run", "caption", sys.argv[2], "--model", sys.argv[1]])
print(code, len(answer.boxes) > 0, seconds < 1.5)
"""


def test_torch_is_not_imported(images: Path, nano_folder: Path) -> None:
    """The limit on the seconds is loose, for a machine under load; docs/lite.md has a measured number."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(nano_folder), str(images / "0.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 True True"


@pytest.mark.release
def test_the_program(images: Path, nano_folder: Path) -> None:
    command = [sys.executable, "-m", "florence2.lite", "run", "od", str(images / "0.png"), "--model", str(nano_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "confidence" in done.stdout
