"""`python -m parity.record_runs`: score whole runs of `florence2 evaluate` by the benchmarks' official code.

The weights in this repository answer about synthetic scenes in the official layouts. This file reads the truths from
those files by itself, and gives them and the answers to pycocoevalcap and to the VQA project's code, as
`parity.record_metrics` does. It needs what that needs. The answers and the official results are recorded; the tests
compare the report that `florence2 evaluate --score` makes of the same answers.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from florence2.cli.main import main as florence2
from parity.record_metrics import FOLDER, official_cider, official_vqa
from recipes.nano.write_tables import write_tables

SCENES, SEED = 24, 30
TABLES = ("coco-caption:test", "nocaps:val", "textcaps:val", "vqav2:val", "textvqa:val", "vizwiz:val")
MODEL = ("--model", "nano", "--device", "cpu", "--beams", "1", "--workers", "0")
_KEPT = ("id", "task", "kind", "text", "raw_text", "image_size")


def main() -> int:
    """Run, score and record."""
    parser = argparse.ArgumentParser(prog="python -m parity.record_runs", description=__doc__)
    parser.add_argument("--vqa", type=Path, required=True, metavar="FILE", help="the official vqaEval.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data"), Path(folder, "out")
        write_tables(data, SEED, SCENES)
        if florence2(["evaluate", *TABLES, "--data", str(data), "--out", str(out), *MODEL]):
            return 1
        answers = {table: read_rows(out / table.replace(":", "-")) for table in TABLES}
        results = {table: score(table, data, rows, options.vqa) for table, rows in answers.items()}
    text = json.dumps({"answers": answers, "results": results}, ensure_ascii=False, separators=(",", ":"))
    (FOLDER / "runs.json").write_text(f"{text}\n", encoding="utf-8")
    print("\n".join(f"{table}\t{result}" for table, result in results.items()))
    return 0


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return what the rows of a folder answer."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {"image": row["id"], "place": row["id"]} | {name: row[name] for name in _KEPT} for row in map(json.loads, lines)
    ]


def score(table: str, data: Path, rows: Sequence[Mapping[str, Any]], vqa: Path) -> float:
    """Return the official result of a table: CIDEr times 100, or percent."""
    truths, answers = dict(_TRUTHS[table](data)), {row["id"]: row["text"] for row in rows}
    if truths.keys() != answers.keys():
        raise RuntimeError(f"The run answered {len(answers)} of {len(truths)} images of {table}.")
    pairs = [(answers[image], each) for image, each in truths.items()]
    if table.partition(":")[0] in ("vqav2", "textvqa", "vizwiz"):
        return official_vqa(vqa, pairs)[0]
    return 100 * official_cider(pairs)


# ---- the truths, from the owners' files ----------------------------------------------------------------------------


def _load(data: Path, name: str) -> Any:
    return json.loads((data / name).read_text(encoding="utf-8"))


def _karpathy(data: Path) -> Iterator[tuple[str, list[str]]]:
    for image in _load(data, "coco/dataset_coco.json")["images"]:
        if image["split"] == "test":
            path = f"coco/{image['filepath']}/{image['filename']}"
            yield path, [sentence["raw"] for sentence in image["sentences"]]


def _nocaps(data: Path) -> Iterator[tuple[str, list[str]]]:
    values = _load(data, "nocaps/nocaps_val_4500_captions.json")
    for image in values["images"]:
        captions = [each["caption"] for each in values["annotations"] if each["image_id"] == image["id"]]
        yield f"nocaps/val/{image['file_name']}", captions


def _textcaps(data: Path) -> Iterator[tuple[str, list[str]]]:
    for each in _load(data, "textvqa/TextCaps_0.1_val.json")["data"]:
        yield f"textvqa/train_images/{each['image_id']}.jpg", each["reference_strs"]


def _vqav2(data: Path) -> Iterator[tuple[str, list[str]]]:
    for each in _load(data, "vqav2/v2_mscoco_val2014_annotations.json")["annotations"]:
        people = [person["answer"] for person in each["answers"]]
        yield f"coco/val2014/COCO_val2014_{each['image_id']:012d}.jpg", people


def _textvqa(data: Path) -> Iterator[tuple[str, list[str]]]:
    for each in _load(data, "textvqa/TextVQA_0.5.1_val.json")["data"]:
        yield f"textvqa/train_images/{each['image_id']}.jpg", each["answers"]


def _vizwiz(data: Path) -> Iterator[tuple[str, list[str]]]:
    for each in _load(data, "vizwiz/val.json"):
        yield f"vizwiz/val/{each['image']}", [person["answer"] for person in each["answers"]]


_TRUTHS: Mapping[str, Callable[[Path], Iterator[tuple[str, list[str]]]]] = dict(
    zip(TABLES, (_karpathy, _nocaps, _textcaps, _vqav2, _textvqa, _vizwiz), strict=True)
)


if __name__ == "__main__":
    sys.exit(main())
