"""Runs over folders and trainings that are killed, disturbed and resumed: no row lost, none twice, none torn."""

import json
import re
import resource
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from florence2.train.checkpoints import load_state
from tests.fuzz import material, values
from tests.fuzz.commands import furnish
from tests.fuzz.shell import Command, Streams, check_end, type_words
from tests.fuzz.worker import expect

_DISTURBANCES = (
    "kill",
    "kill",
    "stop",
    "term",
    "vanish",
    "second",
    "full",
    "typo",
    "settings",
    "rows",
    "closed",
    "other",
)
_ODD_NAMES = (
    "a" * 246 + ".png",
    "日" * 80 + ".png",
    "é.png",
    "b c.jpeg.png",
    "-x.png",
    ".hidden.png",
    "\u202eabc.png",
    "<b>.png",
    "a\nb.png",
    "%s.png",
)
_ROWS = (
    b"\xff\xfe\n",
    b"[" * 5000 + b"\n",
    b'{"place": ' + b"9" * 5000 + b"}\n",
    b'{"image": "a", "pla',
    b"null\n5\n[]\n",
    b'{"place": {}, "task": []}\n',
    b"\n\n",
)


def draw(random: Random) -> dict[str, Any]:
    """A run: its images, options, and what happens to it before it may end in peace."""
    if random.random() < 0.15:
        ends = [
            (random.choice(("SIGKILL", "SIGTERM", "SIGINT")), round(random.uniform(0, 0.6), 2))
            for _ in range(random.randint(1, 2))
        ]
        return {"form": "training", "ends": ends}
    return {
        "form": "answers",
        "images": random.randint(1, 8),
        "odd": random.sample(_ODD_NAMES, random.choice((0, 0, 1, 3))),
        "tasks": random.sample(
            ("od", "caption", "ocr_with_region", "region_proposal", "dense_region_caption"), random.randint(1, 2)
        ),
        "options": [*random.choice(((), ("--draw",), ("--draw",))), "--batch", str(random.choice((1, 1, 3, 20)))],
        "command": random.choice(("run", "run", "run", "cascade")),
        "disturbances": [
            (random.choice(_DISTURBANCES), round(random.uniform(0, 0.3), 3)) for _ in range(random.randint(1, 3))
        ],
        "rows": random.choice(_ROWS)
        if random.random() < 0.7
        else values.change_bytes(random, b'{"image": "a.png", "place": "/a.png", "task": "<OD>", "text": ""}\n' * 3),
    }


def check(case: dict[str, Any], place: Path) -> None:
    (_check_training if case["form"] == "training" else _Run(case, place).check)(
        *((case, place) if case["form"] == "training" else ())
    )


class _Run:
    """One output folder and everything that is done to it."""

    def __init__(self, case: dict[str, Any], place: Path):
        self.case, self.place = case, place
        self.album, self.out = place / "album", place / "out"
        self.album.mkdir()
        for name in [*(f"p{i:02}.png" for i in range(case["images"])), *case["odd"]]:
            material.drawing(len(name)).save(self.album / name)
        tasks = case["tasks"] if case["command"] == "run" else []
        self.words = [
            case["command"],
            *tasks,
            str(self.album),
            "--model",
            str(material.folder()),
            "--out",
            str(self.out),
        ]
        self.words += ["--max-new-tokens", "4", "--beams", "1", *case["options"]]
        self.questions = max(1, len(tasks))
        self.count = 0
        self.gone: set[str] = set()

    def check(self) -> None:
        for name, seconds in self.case["disturbances"]:
            before = self.finished()
            getattr(self, f"_{name}")(seconds)
            lost = {key for key in before - self.finished() if not any(gone in key for gone in self.gone)}
            expect(name in ("rows", "settings") or not lost, f"after {name}, rows are lost: {sorted(lost)[:3]}")
        code, command = self._type(self.words)
        if "settings" in dict(self.case["disturbances"]) and code == 2:
            return  # damaged settings may be refused, in a sentence
        expect(code == 0, f"the last run ends with {code}: {command.text('stderr')[-300:]}")
        self._check_rows()

    def _type(self, words: list[str], streams: Streams | None = None) -> tuple[int, Command]:
        self.count += 1
        return type_words(words, self.place / f"typed{self.count}", streams, self.place)

    def _start(self, words: list[str] | None = None) -> Command:
        self.count += 1
        return Command(words or self.words, self.place / f"typed{self.count}", None, self.place)

    # ---- disturbances ----

    def _end(self, seconds: float, number: int) -> None:
        command = self._start()
        time.sleep(seconds)
        command.send(number)
        code = command.wait()
        if code != -number:  # the signal's default action, before or after the command catches it
            check_end(code, command)

    def _kill(self, seconds: float) -> None:
        self._end(seconds, signal.SIGKILL)

    def _term(self, seconds: float) -> None:
        self._end(seconds, signal.SIGTERM)

    def _stop(self, seconds: float) -> None:
        self._end(seconds, signal.SIGINT)

    def _vanish(self, seconds: float) -> None:
        command = self._start()
        time.sleep(seconds)
        gone = sorted(self.album.iterdir())[-1]
        if len(list(self.album.iterdir())) > 1:
            gone.unlink()
            self.gone.add(gone.name)
        check_end(command.wait(), command)

    def _second(self, seconds: float) -> None:
        """Two runs at once: the second waits or is refused, and the first loses nothing."""
        first = self._start()
        time.sleep(seconds)
        second = self._start()
        codes = first.wait(), second.wait()
        check_end(codes[0], first)
        check_end(codes[1], second)
        if codes[0] != 2:
            self._check_rows()

    def _full(self, seconds: float) -> None:
        self._type(self.words, Streams(limits={resource.RLIMIT_FSIZE: 3000 + int(seconds * 10_000)}))

    def _closed(self, seconds: float) -> None:
        kinds = ("closed", "full", "gone")
        stdout, stderr = kinds[int(seconds * 1000) % 3], (*kinds, "file")[int(seconds * 100) % 4]
        code, _ = self._type(self.words, Streams(stdout=stdout, stderr=stderr))
        if code == 0:
            self._check_rows()

    def _typo(self, seconds: float) -> None:
        words = [word if word != str(material.folder()) else "nanno" for word in self.words]
        expect(self._type(words)[0] == 2, "a model that does not exist was run")

    def _other(self, seconds: float) -> None:
        """Other settings are refused where there are answers, and nothing changes."""
        before = (self.out / "results.jsonl").read_bytes() if self.finished() else None
        if before is not None:
            expect(self._type([*self.words, "--dtype", "bfloat16"])[0] == 2, "answers of two types are mixed")
            expect((self.out / "results.jsonl").read_bytes() == before, "a refused run has changed the answers")

    def _settings(self, seconds: float) -> None:
        if self.out.exists():
            data = [b"{", b"[]", b"\xff", b"[" * 9999, b'{"model": ' + b"9" * 5000 + b"}"][int(seconds * 1000) % 5]
            (self.out / "settings.json").write_bytes(data)

    def _rows(self, seconds: float) -> None:
        if (self.out / "results.jsonl").exists():
            with (self.out / "results.jsonl").open("ab" if seconds < 0.25 else "wb") as file:
                file.write(self.case["rows"])

    # ---- what must hold ----

    def finished(self) -> set[str]:
        """The keys of the whole rows with an answer."""
        file = self.out / "results.jsonl"
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        return {key for key in map(_key, lines) if key}

    def _check_rows(self) -> None:
        lines = (self.out / "results.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [
            row for row in map(json.loads, lines) if isinstance(row, dict) and str(self.album) in str(row.get("place"))
        ]
        keys = [(row["place"], row.get("task")) for row in rows]
        expect(len(keys) == len(set(keys)), f"{len(keys) - len(set(keys))} rows are there twice")
        present = {str(path) for path in self.album.iterdir() if not path.name.startswith(".") or path.suffix}
        missing = present - {row["place"] for row in rows}
        expect(not missing, f"images without a row: {sorted(missing)[:3]}")
        full = [key for key in keys if key[0] in present]
        expect(
            len(full) == len(present) * self.questions,
            f"{len(full)} rows for {len(present)} images and {self.questions} questions",
        )
        self._check_drawings(rows)

    def _check_drawings(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if "drawing" in row:
                with Image.open(self.out / row["drawing"]) as image:
                    image.load()
        left = [path.name for path in self.out.rglob(".*") if re.fullmatch(r"\..+\.[0-9a-f]{12}", path.name)]
        killed = any(name == "kill" for name, _ in self.case["disturbances"])
        expect(killed or not left, f"drafts are left: {left}")


def _key(line: bytes) -> str | None:
    """What a row of an answer is about; None for an error and for what is not a row."""
    try:
        row = json.loads(line)
        return None if "error" in row else f"{row['place']} {row.get('task')}"
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _check_training(case: dict[str, Any], place: Path) -> None:
    """Killed trainings resume where they were saved, and end."""
    folder, out = furnish(place), place / "out"
    words = ["train", str(folder / "data.jsonl"), "--model", str(material.folder()), "--out", str(out), "--steps", "6"]
    words += ["--batch", "1", "--save-every", "1", "--log-every", "1", "--workers", "0", "--lora", "1"]
    step = 0
    for i, (name, seconds) in enumerate(case["ends"]):
        command, number = Command(words, place / f"typed{i}", None, folder), signal.Signals[name]
        time.sleep(seconds)
        command.send(number)
        code = command.wait()
        if code != -number:
            check_end(code, command)
        state = load_state(out) if out.exists() else None
        expect((state.step if state else 0) >= step, "the state went back")
        step = state.step if state else 0
    code, command = type_words(words, place / "last", None, folder)
    expect(code == 0, f"the last training ends with {code}: {command.text('stderr')[-300:]}")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    expect(steps == list(range(1, 7)), f"the log has the steps {steps}")
