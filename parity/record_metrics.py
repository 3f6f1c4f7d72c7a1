"""`python -m parity.record_metrics`: record what the benchmarks' official code returns for cases from seeds.

It needs Java, the package pycocoevalcap, and two files of public repositories, none of which this project uses
otherwise: `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of GT-Vision-Lab/VQA (Python 2; two statements are rewritten
as it is read) and `datasets/flickr_eval.py` of ashkamath/mdetr.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from florence2.evaluate.metrics.penn import split_captions
from parity.metric_cases import (
    Phrase,
    draw_answers,
    draw_captions,
    draw_foreign_strings,
    draw_odd_strings,
    draw_sentences,
)
from parity.recipe import GOLDEN

FOLDER = GOLDEN / "evaluate"
SIZES = {"captions": 1500, "odd": 1000, "foreign": 500, "images": 1000, "answers": 20_000, "sentences": 500}
SEEDS = {"captions": 1, "odd": 2, "foreign": 3, "images": 4, "answers": 5, "sentences": 6}
CHECKED = 100_000
"""So many strings are compared while recording; only the first ones are kept."""


def main() -> int:
    """Record all cases; print how many strings the two tokenizers split in the same way."""
    parser = argparse.ArgumentParser(prog="python -m parity.record_metrics", description=__doc__)
    parser.add_argument("--vqa", type=Path, required=True, metavar="FILE", help="the official vqaEval.py")
    parser.add_argument("--flickr", type=Path, required=True, metavar="FILE", help="MDETR's flickr_eval.py")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    _write("tokens.json", record_tokens())
    _write("cider.json", record_cider())
    _write("vqa.json", record_vqa(options.vqa))
    _write("flickr.json", record_flickr(options.flickr))
    return 0


def _write(name: str, values: Any) -> None:
    (FOLDER / name).write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def record_tokens() -> dict[str, list[tuple[str, str]]]:
    """Return strings of three kinds with their tokens."""
    drawn = {"captions": draw_captions, "odd": draw_odd_strings, "foreign": draw_foreign_strings}
    share = {"captions": CHECKED // 2, "odd": CHECKED // 4, "foreign": CHECKED // 4}
    recorded = {}
    for kind, draw in drawn.items():
        texts = draw(share[kind], SEEDS[kind])
        official = split_officially(texts)
        equal = sum(first == second for first, second in zip(official, _split_own(texts), strict=True))
        print(f"{kind}: {equal:,} of {len(texts):,} strings have the official tokens")
        kept = SIZES[kind]
        recorded[kind] = list(zip(texts[:kept], official[:kept], strict=True))
    return recorded


def split_officially(texts: Sequence[str]) -> list[str]:
    """Return the tokens of each text, joined by spaces, from the official code with Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stderr(io.StringIO()):
        found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [found[i][0] for i in range(len(texts))]


def caption_cases() -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return captions and five references each: many images, one image, and an empty caption."""
    count = SIZES["images"]
    texts = draw_captions(6 * count, SEEDS["images"])
    captions, references = texts[:count], [texts[count + 5 * i : count + 5 * i + 5] for i in range(count)]
    captions = [references[i][0] if i % 7 == 0 else text for i, text in enumerate(captions)]  # some are perfect
    return {
        "many": (captions, references),
        "one": (captions[:1], references[:1]),
        "empty": (["", *captions[1:20]], references[:20]),
    }


def record_cider() -> dict[str, list[float]]:
    """Return the official score of each caption."""
    from pycocoevalcap.cider.cider import Cider

    recorded = {}
    for name, (captions, references) in caption_cases().items():
        results = {i: [text] for i, text in enumerate(_split_own(captions))}
        truths = {i: _split_own(texts) for i, texts in enumerate(references)}
        recorded[name] = Cider().compute_score(truths, results)[1].tolist()
    return recorded


def _split_own(texts: Sequence[str]) -> list[str]:
    return [" ".join(words) for words in split_captions(texts)]


def record_vqa(file: Path) -> list[int]:
    """Return the official accuracy of each answer, in thirtieths."""
    _, accuracies = official_vqa(file, draw_answers(SIZES["answers"], SEEDS["answers"]))
    return [round(accuracy * 0.3) for accuracy in accuracies]


def official_vqa(file: Path, cases: Sequence[tuple[str, Sequence[str]]]) -> tuple[float, list[float]]:
    """Return the official accuracy of answers with those of people, and that of each answer, in percent."""
    source = re.sub(r'print (".*")', r"print(\1)", file.read_text(encoding="utf-8"))
    source = source.replace(r"\d", "[0-9]")  # as Python 2 reads it
    module: dict[str, Any] = {}
    exec(compile(source, str(file), "exec"), module)
    questions = {
        i: {
            "answers": [{"answer": truth, "answer_id": person} for person, truth in enumerate(truths)],
            "question_type": "",
            "answer_type": "",
        }
        for i, (_, truths) in enumerate(cases)
    }
    truth = types.SimpleNamespace(qa=questions, getQuesIds=lambda: list(questions))
    answers = types.SimpleNamespace(qa={i: {"answer": answer} for i, (answer, _) in enumerate(cases)})
    evaluation = module["VQAEval"](truth, answers, n=10)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return evaluation.accuracy["overall"], [evaluation.evalQA[i] for i in questions]


def official_cider(cases: Sequence[tuple[str, Sequence[str]]]) -> float:
    """Return the official CIDEr of captions with their references, tokenized by the official code with Java."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stderr(io.StringIO()):
        results = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, (caption, _) in enumerate(cases)})
        texts = {i: [{"caption": text} for text in each] for i, (_, each) in enumerate(cases)}
        truths = PTBTokenizer().tokenize(texts)
    return float(Cider().compute_score(truths, results)[0])


def record_flickr(file: Path) -> dict[str, list[float]]:
    """Return the official Recall@1 of each sentence, with any box and with merged boxes."""
    source = re.sub(r"^(from prettytable|import util).*$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    module = types.ModuleType("flickr_eval")
    sys.modules[module.__name__] = module
    exec(compile(source, str(file), "exec"), module.__dict__)
    sentences = draw_sentences(SIZES["sentences"], SEEDS["sentences"])
    with tempfile.TemporaryDirectory() as folder:
        write_entities(Path(folder), sentences)
        return {
            name: _official_recalls(module.Flickr30kEntitiesRecallEvaluator, Path(folder), sentences, merged)
            for name, merged in (("any", False), ("merged", True))
        }


def _official_recalls(evaluator: Any, folder: Path, sentences: list[list[Phrase]], merged: bool) -> list[float]:
    evaluation = evaluator(folder, subset="test", topk=(1,), merge_boxes=merged, verbose=False)
    recalls = []
    for i, phrases in enumerate(sentences):
        evaluation.all_ids = [f"{i}_0"]
        boxes = [[list(box) for box in phrase.boxes] for phrase in phrases]
        recalls.append(evaluation.evaluate([{"image_id": i, "sentence_id": 0, "boxes": boxes}])[1]["all"])
    return recalls


def write_entities(folder: Path, sentences: list[list[Phrase]]) -> None:
    """Write sentences as Flickr30k Entities stores them, one for each image."""
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir()
    for i, phrases in enumerate(sentences):
        text = " and ".join(f"[/EN#{phrase.id}/other {phrase.words}]" for phrase in phrases)
        (folder / "Sentences" / f"{i}.txt").write_text(text + "\n", encoding="utf-8")
        (folder / "Annotations" / f"{i}.xml").write_text(_annotation(phrases), encoding="utf-8")
    (folder / "test.txt").write_text("".join(f"{i}\n" for i in range(len(sentences))), encoding="utf-8")


def _annotation(phrases: list[Phrase]) -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = "".join(
        f"<object><name>{phrase.id}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for phrase in phrases
        for box in phrase.truths
    )
    size = "<size><width>500</width><height>500</height><depth>3</depth></size>"
    return f"<annotation>{size}{boxes}</annotation>"


if __name__ == "__main__":
    sys.exit(main())
