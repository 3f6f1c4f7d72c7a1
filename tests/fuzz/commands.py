"""Command lines of odd words, options, files and streams: one of four exit codes, a sentence, and no traceback."""

import json
import re
import resource
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from florence2.inputs.tasks import TASKS
from tests.fuzz import material, values
from tests.fuzz.shell import Streams, type_words
from tests.fuzz.worker import expect

_NAMES = (
    "run",
    "run",
    "run",
    "run",
    "run",
    "cascade",
    "info",
    "convert",
    "audit",
    "init",
    "train",
    "evaluate",
    "inspect",
    "download",
    "",
    "x",
)
_FILES = (
    "a.png",
    "folder",
    "empty",
    "bad.png",
    "absent.png",
    "link",
    "-",
    "notes.txt",
    "data.jsonl",
    "é\udcff.png",
    "https://example.com/x.png",
    "",
)
_OPTIONS: dict[str, tuple[str, ...]] = {
    "--beams": ("1", "2", "0", "-1", "x", "9" * 30),
    "--max-new-tokens": ("3", "0", "1e3", "9" * 30),
    "--batch": ("1", "3", "0", "-2", "9" * 30),
    "--text": ("cat", "", "\udcff", "<loc_1><loc_2><loc_3><loc_4>", "x" * 3000),
    "--box": ("1,2,30,20", "1,2,3", "nan,1,2,3", "5,5,1,1", "1e400,0,1,1", "-5,0,9,9"),
    "--out": ("out", "", "a.png", "deep/er/out", "/proc/x", "x" * 300, "\udcff", "out"),
    "--device": ("cpu", "tpu", "cuda:99", ""),
    "--dtype": ("float32", "float16", "bfloat16", "int8"),
    "--attention": ("sdpa", "eager", "x"),
    "--change": (
        "vision.window_size=2",
        "vision.window_size=256",
        "text.dropout=" + "9" * 400,
        "x",
        "=",
        "a=b",
        "generation.num_beams=null",
    ),
    "--prepare": ("os:system", "absent:f", ":", "os.path:join", "tests.two_stages:two_stages"),
    "--adapter": ("folder", "absent", ""),
    "--seed": ("1", "-1", "9" * 30),
    "--temperature": ("0.5", "0", "nan"),
    "--top-p": ("0.5", "2", "nan"),
    "--revision": ("main", ""),
    "--model": ("nano", "absent/at/all", "owner/name", "a.png", ""),
    "--layout": ("native", "microsoft", "x"),
    "--steps": ("1", "0", "x"),
    "--epochs": ("1", "nan", "0", "1e400"),
    "--lora": ("1", "0", "9" * 30),
    "--preset": ("tiny", "x"),
    "--task": ("<OD>", "x"),
    "--top": ("1", "-1"),
}
_FLAGS = (
    "--json",
    "--draw",
    "--sample",
    "--allow-pickle",
    "--overwrite",
    "--help",
    "--version",
    "--check",
    "--no-saliency",
    "--verify",
    "--",
    "-h",
    "-x",
)


def draw(random: Random) -> tuple[list[str], dict[str, Any]]:
    """(words, streams)."""
    name = random.choice(_NAMES)
    words = [name, *_operands(random, name)]
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        option = random.choice(list(_OPTIONS))
        words += (
            [option, random.choice(_OPTIONS[option])]
            if random.random() < 0.7
            else [f"{option}={random.choice(_OPTIONS[option])}"]
        )
    words += random.sample(_FLAGS, random.choice((0, 0, 1, 2)))
    if name in ("run", "cascade", "inspect", "train", "evaluate") and random.random() < 0.9:
        words += ["--model", "MODEL", *(["--max-new-tokens", "3"] if name in ("run", "cascade", "inspect") else [])]
    if random.random() < 0.15:
        random.shuffle(words)
    kinds = ("file",) * 12 + ("closed", "full", "gone")
    streams: dict[str, Any] = {
        "stdin": random.choice(("/dev/null", "closed", "a.png", "bad.png")),
        "stdout": random.choice(kinds),
        "stderr": random.choice(kinds),
    }
    if random.random() < 0.1:
        streams["limits"] = {resource.RLIMIT_FSIZE: random.choice((2000, 5000, 100_000))}
    return words, streams


def _operands(random: Random, name: str) -> list[str]:
    if name in ("run", "inspect"):
        task = random.choice(
            (*(task.alias for task in TASKS.values()), "<OD>", "<CAPTION>", "<od>", "what is it?", values.text(random))
        )
        return [task, *random.choices(_FILES, k=random.choice((1, 1, 1, 2, 0)))]
    if name == "cascade":
        return random.choices(_FILES, k=random.choice((1, 1, 2, 0)))
    if name in ("train", "evaluate"):
        return [
            random.choice(("data.jsonl", "data.jsonl", *_FILES)),
            *(["--out", "out", "--steps", "1", "--batch", "1", "--workers", "0"] if name == "train" else []),
        ]
    if name in ("info", "audit"):
        return random.choices(("MODEL", "MODEL", *_FILES), k=random.choice((1, 1, 2)))
    if name == "convert":
        return [random.choice(("MODEL", "MODEL", *_FILES)), random.choice(("out", "folder", "a.png", "x" * 300))]
    if name == "init":
        return [
            random.choice(("out", "a.png", "")),
            "--preset",
            "tiny",
            "--tokenizer",
            random.choice(("MODEL", "nano", "folder", "absent")),
        ]
    return random.choices(_FILES, k=random.choice((0, 1)))


@cache
def _picture() -> bytes:
    import io

    buffer = io.BytesIO()
    material.drawing(1).save(buffer, "PNG")
    return buffer.getvalue()


def furnish(place: Path) -> Path:
    """Make the folder in which the commands are typed."""
    (place / "folder" / "deeper").mkdir(parents=True)
    (place / "empty").mkdir()
    for name in ("a.png", "folder/a.png", "folder/deeper/a.png"):
        (place / name).write_bytes(_picture())
    (place / "bad.png").write_bytes(_picture()[:70])
    (place / "folder" / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (place / "notes.txt").write_text("a note", encoding="utf-8")
    (place / "link").symlink_to("link")
    row = {"image": "a.png", "prefix": "<OD>", "suffix": "c<loc_1><loc_2><loc_3><loc_4>"}
    (place / "data.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return place


def check(case: tuple[list[str], dict[str, Any]], place: Path) -> None:
    words, given = case
    folder = furnish(place)
    words = [str(material.folder()) if word == "MODEL" else word for word in words]
    streams = Streams(
        **{
            **given,
            "stdin": given["stdin"] if given["stdin"] in ("/dev/null", "closed") else str(folder / given["stdin"]),
        }
    )
    code, command = type_words(words, place / "output", streams, folder)
    if streams.stdout == "full" and words[0] in ("run", "info") and "--out" not in " ".join(words):
        expect(code != 0, "the answer was lost, and the exit code is 0")
    for file in place.rglob("results.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            expect("place" in row and ("error" in row or "text" in row or "caption" in row), f"the row {line[:200]}")
    if "--json" in words and words[0] in ("run", "cascade") and streams.stdout == "file" and code in (0, 1):
        for line in command.text("stdout").splitlines() if not {"-h", "--help"} & set(words) else ():
            json.loads(line)
    left = [file.name for file in place.rglob("*") if re.fullmatch(r"\..+\.[0-9a-f]{12}", file.name)]
    expect(not left, f"drafts are left: {left}")
