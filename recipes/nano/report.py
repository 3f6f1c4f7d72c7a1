"""`python -m recipes.nano.report CHECKPOINT --out DIR`: the metrics, curve and sheet of answers of nano's card."""

import argparse
import itertools
import json
import random
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from florence2.answers.answer import Answer
from florence2.cli.progress import Progress
from florence2.loading import load
from florence2.pipeline import Florence2
from florence2.train.metrics import Metrics
from florence2.train.trainer import LOG
from recipes.nano.exam import Exam, examine
from recipes.nano.scene_tasks import ask
from recipes.nano.scenes import make_scene
from recipes.nano.train import CURVE_SEED, HELD_OUT_SEED, PHASES, SNAPSHOTS

HEADLINES: dict[str, str] = {
    "<OD>": "f1",
    "<CAPTION>": "named",
    "<DETAILED_CAPTION>": "edit_similarity",
    "<MORE_DETAILED_CAPTION>": "edit_similarity",
    "<OCR>": "word_accuracy",
    "<OCR_WITH_REGION>": "f1",
    "<CAPTION_TO_PHRASE_GROUNDING>": "f1",
    "<OPEN_VOCABULARY_DETECTION>": "f1",
    "<DENSE_REGION_CAPTION>": "f1",
    "<REGION_PROPOSAL>": "f1",
    "<REGION_TO_CATEGORY>": "exact_match",
    "<REGION_TO_DESCRIPTION>": "exact_match",
    "<REGION_TO_OCR>": "exact_match",
    "<REGION_TO_SEGMENTATION>": "miou",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "miou",
}
"""The most telling metric of each task."""
_MEANINGS = {
    "f1": "F1 at IoU 0.5, labels equal",
    "named": "captions that name every thing with its colour, and nothing else",
    "edit_similarity": "similarity by edits",
    "word_accuracy": "words read",
    "exact_match": "answers right to the letter",
    "miou": "mean IoU of masks",
}
_SHEET = (
    "<OD>",
    "<DENSE_REGION_CAPTION>",
    "<OCR_WITH_REGION>",
    "<REFERRING_EXPRESSION_SEGMENTATION>",
    "<CAPTION>",
    "<CAPTION_TO_PHRASE_GROUNDING>",
)
_CELL, _LINES = 340, 4
_HEIGHT = _CELL + 16 * _LINES


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine a checkpoint with its own generation settings; write `metrics.md`, `answers.png` and `curve.png`."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.report", description=main.__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--run", type=Path, help="the training run's folder, to draw the curve")
    parser.add_argument("--scenes", type=int, default=500, help="how many scenes to measure on (500)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    f = load(options.checkpoint)
    if options.run:
        plot_curves(options.run, examine_snapshots(options.run), options.out / "curve.png")
    draw_sheet(f).save(options.out / "answers.png", optimize=True)
    progress = Progress(options.scenes)
    metrics = examine(f, Exam(HELD_OUT_SEED, options.scenes), progress=lambda done, _: progress.show(done))
    progress.close()
    table = format_table(metrics)
    (options.out / "metrics.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def format_table(metrics: Mapping[str, Metrics]) -> str:
    """Return a table in Markdown: each task, the number of questions, its metric, and what the metric is."""
    rows = ["| task | questions | value | metric |", "| --- | --- | --- | --- |"]
    for task, name in HEADLINES.items():
        values = metrics[task]
        rows.append(f"| `{task}` | {values['count']:.0f} | {values[name]:.3f} | {_MEANINGS[name]} |")
    return "\n".join(rows) + "\n"


def examine_snapshots(run: Path, scenes: int = 32) -> list[dict[str, Any]]:
    """Examine every snapshot that answers: {"step": updates of all phases so far, "exam": metrics by task}.

    The answers are greedy, on scenes of a separate seed. Earlier results are read from `exams.jsonl` in the folder.
    """
    path = run / "exams.jsonl"
    rows = _read_rows(path) if path.is_file() else []
    examined = {row["step"] for row in rows}
    for step, folder in _snapshots(run):
        if step not in examined:
            f = load(folder)
            row = {"step": step, "exam": examine(f, Exam(CURVE_SEED, scenes), f.options(num_beams=1))}
            rows.append(row)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{folder}: examined", file=sys.stderr)
    return sorted(rows, key=lambda row: row["step"])


def _snapshots(run: Path) -> Iterator[tuple[int, Path]]:
    before = 0
    for phase in PHASES:
        if phase.speaks:
            yield from ((before + int(path.name), path) for path in sorted((run / phase.name / SNAPSHOTS).iterdir()))
        before += phase.settings.steps


def plot_curves(run: Path, exams: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Plot the loss of every phase, and each task's metric on unseen scenes, over the updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    before = 0
    for phase in PHASES:
        rows = [row for row in _read_rows(run / phase.name / LOG) if "loss" in row]
        left.plot([before + row["step"] for row in rows], [row["loss"] for row in rows], label=phase.name)
        before += phase.settings.steps
    left.set(xlabel="update", ylabel="loss", yscale="log", title="training")
    left.legend(fontsize=8)
    for line, (task, name) in enumerate(HEADLINES.items()):
        style = ("-", "--", ":")[line % 3]
        points = [(row["step"], row["exam"][task][name]) for row in exams if task in row["exam"]]
        right.plot(*zip(*points, strict=True), style, label=f"{task.strip('<>').lower()}: {name}")
    right.locator_params(axis="x", nbins=6)
    right.set(xlabel="update", ylim=(0, 1), title="32 unseen scenes, greedy")
    right.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(target, dpi=110)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_sheet(f: Florence2) -> Image.Image:
    """Draw the model's answers on the first six held-out scenes that have four things or more and some text."""
    sheet = Image.new("RGB", (3 * _CELL, 2 * _HEIGHT), "white")
    scenes = (make_scene(HELD_OUT_SEED, index) for index in itertools.count())
    full = (scene for scene in scenes if len(scene.things) >= 4 and any(thing.text for thing in scene.things))
    for cell, (task, scene) in enumerate(zip(_SHEET, full, strict=False)):
        question = ask(task, scene, random.Random(cell))
        assert question is not None  # the scene has text
        drawn = draw_cell(f.run(question.prefix, scene.image), scene.image, question.prefix)
        sheet.paste(drawn, (cell % 3 * _CELL, cell // 3 * _HEIGHT))
    return sheet


def draw_cell(answer: Answer, image: Image.Image, prompt: str) -> Image.Image:
    """Draw one image with its answer; the prompt stands below it, with the answer if that is text."""
    cell = Image.new("RGB", (_CELL, _HEIGHT), "white")
    cell.paste(answer.draw(image), ((_CELL - image.width) // 2, (_CELL - 10 - image.height) // 2))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    words = [prompt] + ([str(answer)] if answer.kind == "text" else [])
    lines = [line for text in words for line in textwrap.wrap(text, 56)]
    for row, line in enumerate(lines[:_LINES]):
        draw.text((6, _CELL - 6 + 16 * row), line, fill="black", font=font)
    return cell


if __name__ == "__main__":
    sys.exit(main())
