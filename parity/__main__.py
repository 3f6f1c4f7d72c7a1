"""`python -m parity`: compare this project with its references, and print one table."""

import argparse
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from florence2.checkpoints.checkpoint import checkpoint_folder, load_model
from florence2.checkpoints.hub import EMBEDDED_MODEL, NAMES, resolve
from florence2.errors import Florence2Error
from florence2.inputs.tasks import TASKS
from florence2.loading import load
from florence2.model.florence2 import Florence2Model
from parity.adapters import compare_adapter
from parity.cases import IMAGES, base_shape, shapes
from parity.compare import Work, compare_checkpoint, compare_inside_specimen, compare_shape, compare_text
from parity.gradients import compare_dropout
from parity.lite import compare_lite
from parity.recipe import make_checkpoint
from parity.recorded import compare_recorded
from parity.records import compare_records
from parity.references import Native, Reference, Remote
from parity.renamed import compare_renamed
from parity.report import Comparison, format_table, load_tolerances, record_tolerances
from parity.schedules import compare_schedules
from parity.specimen import SCENES, answer_one_by_one, compare_specimen, compare_specimen_records
from parity.tape import TapeRecorder

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> int:
    """Compare, print the table and write it; return 1 when anything differs."""
    options = _parser().parse_args()
    code = _find_code(options)
    rows: list[Comparison] = []
    began = time.monotonic()
    for row in _compare(options, code):
        rows.append(row)
        print(f"{time.monotonic() - began:6.1f} s  {row.subject}: {row.stage}", file=sys.stderr)
    if options.record:
        record_tolerances(rows)
    tolerances = load_tolerances()
    table = format_table(rows, tolerances)
    failed = [row for row in rows if not row.passes(tolerances)]
    verdict = f"{len(rows) - len(failed)} of {len(rows)} comparisons agree."
    print(table, verdict, sep="\n\n")
    output = options.output or (RESULTS if _is_default_run(options) else None)
    if output:
        output.write_text(_document(table, verdict, options))
    return 1 if failed else 0


def _is_default_run(options: argparse.Namespace) -> bool:
    return options.model is None and options.reference == "native" and options.device is None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parity", description=__doc__)
    parser.add_argument("--reference", choices=("native", "remote"), default="native")
    parser.add_argument(
        "--code", type=Path, metavar="DIR", help="the folder of the remote code's .py files, which will be executed"
    )
    parser.add_argument("--model", help="a checkpoint (base, OWNER/NAME, folder) instead of synthetic ones")
    parser.add_argument(
        "--device",
        help="compare what is recorded and replayed on this device (cuda) with the plain way, and nothing else; "
        "cpu replays stand-ins",
    )
    parser.add_argument("--full", action="store_true", help="also the full base shape, with synthetic weights")
    parser.add_argument("--record", action="store_true", help="set the tolerances from this run's differences")
    parser.add_argument("--output", type=Path, help="where to write the table (parity/RESULTS.md for the default run)")
    return parser


def _compare(options: argparse.Namespace, code: Path | None) -> Iterator[Comparison]:
    group = options.reference
    if options.device is not None:
        yield from compare_recorded(torch.device(options.device), 500 if options.full else 50)
        return

    def make_reference(folder: Path, ours: Florence2Model, dtype: torch.dtype) -> Reference:
        return Native(folder, ours, dtype) if code is None else Remote(folder, code, dtype)

    if options.model is not None:
        folder = checkpoint_folder(resolve(options.model))
        yield from compare_text(group, folder, make_reference(folder, load_model(folder), torch.float32))
        work = Work(
            prompts=_all_prompts(),
            settings=[{"max_new_tokens": 100}, {"num_beams": 1, "max_new_tokens": 100}],
            training_side=224,
        )
        yield from compare_checkpoint(group, options.model, folder, make_reference, work)
        return
    yield from compare_records()
    nano = load(EMBEDDED_MODEL, device="cpu")
    answers = answer_one_by_one(nano, SCENES)
    again = SCENES if options.full else 50
    yield from compare_specimen_records(nano, answers, again)
    yield from compare_specimen(group, make_reference, nano, answers, again)
    with tempfile.TemporaryDirectory() as name:
        shape = shapes()[0]
        make_checkpoint(Path(name), shape.config, shape.seed, shape.end_bonus, shape.size)
        yield from compare_text(group, Path(name), make_reference(Path(name), load_model(Path(name)), torch.float32))
    for shape in shapes():
        if group in shape.references:
            yield from compare_shape(group, shape, make_reference, Work())
    if group == "native":
        yield compare_schedules(500 if options.full else 50)
        yield compare_schedules(100 if options.full else 15, recorder=TapeRecorder())
        yield from compare_lite()
        yield from compare_inside_specimen("nano", make_reference)
        yield from compare_renamed()
        yield from compare_dropout(group, make_reference)
        yield from compare_adapter(group, shapes()[3], make_reference)
    if options.full:
        few = Work(
            images=IMAGES[:1],
            settings=[{"max_new_tokens": 30}, {"num_beams": 1, "max_new_tokens": 30}],
            rounded_gradients=False,
            training_side=224,
        )
        yield from compare_shape(group, base_shape(), make_reference, few)


def _all_prompts() -> list[str]:
    inputs = {"nothing": "", "text": "a green car", "region": "<loc_52><loc_332><loc_932><loc_774>"}
    return [task.token + inputs[task.takes] for task in TASKS.values()]


def _find_code(options: argparse.Namespace) -> Path | None:
    """Return the folder of the remote code if that is the reference: `--code`, or downloaded with `--model`."""
    if options.reference == "native":
        return None
    if options.code is not None:
        if not (options.code / "modeling_florence2.py").is_file():
            raise Florence2Error(
                f"--code is {options.code}, which has no modeling_florence2.py; give the folder of the remote code."
            )
        code: Path = options.code
        return code
    if options.model is None or Path(options.model).exists():
        raise Florence2Error(
            "--reference remote needs --code DIR, or --model with the name of a Hub repository that holds the code."
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(NAMES.get(options.model, options.model), allow_patterns="*.py"))


def _document(table: str, verdict: str, options: argparse.Namespace) -> str:
    words = [word for word in ("--full",) if options.full]
    if options.reference == "remote":
        words.append("--reference remote")
    if options.model:
        words.append(f"--model {options.model}")
    if options.device:
        words.append(f"--device {options.device}")
    command = " ".join(["python -m parity", *words])
    return f"""# Parity

Generated by `{command}`.
{describe_machine()}, transformers {importlib.metadata.version("transformers")}.

{verdict} "equal" counts the items that are exactly equal; for stages with differences, the items that were compared.
Differences in float64 show whether the formulas are the same. Tokens and log-probabilities are compared in float32, as
people use them; an answer that parts where two scores are equal up to rounding is counted as tied. Gradients are
compared tensor by tensor, relative to the norm of the reference's. A tolerance is five times the largest difference of
the recorded runs, `--full` included.

{table}
"""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Florence2Error as error:
        print(f"parity: {error}", file=sys.stderr)
        sys.exit(2)
