"""`florence2 evaluate DATA`: how good a model's answers to given questions are."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from florence2.bulk.sinks import Progress
from florence2.checkpoints.hub import DEFAULT_MODEL
from florence2.devices import DTYPES
from florence2.errors import OptionError
from florence2.pipeline import load
from florence2.train.evaluate import Outcome, answer_samples
from florence2.train.metrics import Metrics, Pair, format_metrics, measure_by_task
from florence2.train.sources import read_samples


def main(arguments: Sequence[str]) -> int:
    """Answer the questions of a data file and print the metrics of each task; progress goes to stderr.

    With `--json`, stdout has one JSON object for each task, after one for each question that could not be answered.
    Returns 1 if there was such a question, 0 otherwise. Raises a Florence2Error for unusable data, model or options.
    """
    chosen = build_parser().parse_args(arguments)
    for option in ("batch", "limit"):
        value = getattr(chosen, option)
        if value is not None and value < 1:
            raise OptionError(f"--{option} is {value}; it must be at least 1.")
    samples = read_samples(chosen.data, chosen.images, sys.maxsize, chosen.task)[: chosen.limit]
    model = load(
        chosen.model,
        device=chosen.device,
        dtype=chosen.dtype,
        revision=chosen.revision,
        adapter=chosen.adapter,
        report=lambda line: print(line, file=sys.stderr),
    )
    changes = {"num_beams": chosen.beams, "max_new_tokens": chosen.max_new_tokens}
    options = model.options(**{name: value for name, value in changes.items() if value is not None})
    pairs, failed = _collect(answer_samples(model, samples, chosen.batch, options), len(samples), chosen.json)
    _print_metrics(measure_by_task(pairs), chosen.json)
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 evaluate", description="Answer the questions of a data file and measure the answers, by task."
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="JSON Lines of image, prefix, suffix; or a COCO file")
    parser.add_argument("--task", action="append", default=[], help="what to ask of a COCO file (its usual task)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the pictures are (beside DATA)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"name, OWNER/NAME, folder or file ({DEFAULT_MODEL})")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for the model, a folder or OWNER/NAME")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="type of the weights (auto)")
    parser.add_argument("--beams", type=int, help="beams of the search, 1 for greedy (the model's own setting)")
    parser.add_argument("--max-new-tokens", type=int, help="limit of an answer's length (the model's own setting)")
    parser.add_argument("--batch", type=int, default=8, help="questions computed at once (8)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures with their questions (all)")
    parser.add_argument("--json", action="store_true", help="JSON Lines instead of a table on stdout")
    return parser


def _collect(results: Iterable[list[Outcome]], total: int, as_json: bool) -> tuple[list[Pair], int]:
    """The pairs to measure, and how many questions failed; failures are told as they come."""
    pairs: list[Pair] = []
    failed, progress = 0, Progress(total)
    try:
        for done, outcomes in enumerate(results, 1):
            for outcome in outcomes:
                if outcome.pair is not None:
                    pairs.append(outcome.pair)
                else:
                    failed += 1
                    _print_failure(outcome, as_json)
            progress.show(done)
    finally:
        progress.close()
    return pairs, failed


def _print_failure(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"sample": outcome.name, "prefix": outcome.prompt, "error": str(outcome.error)}), flush=True)
    else:
        print(f"florence2: {outcome.name}, {outcome.prompt}: {outcome.error}", file=sys.stderr)


def _print_metrics(metrics: Mapping[str, Metrics], as_json: bool) -> None:
    if as_json:
        for task, values in metrics.items():
            print(json.dumps({"task": task, **values}))
    elif metrics:
        print(format_metrics(metrics))
