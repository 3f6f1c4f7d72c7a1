"""The half of `florence2 evaluate` that measures a model's answers to the questions of a data file."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from florence2.bulk.summary import Summary
from florence2.cli.main import name_options
from florence2.cli.options.arguments import (
    SETTINGS,
    check_at_least,
    check_model,
    generation_changes,
    generation_options,
    load_model,
    say,
)
from florence2.cli.options.groups import add_generation, add_model, add_weights
from florence2.cli.options.tasks import stored_tasks
from florence2.cli.progress import Progress
from florence2.errors import OptionError
from florence2.train.command import add_data, add_store, check_data, check_store

if TYPE_CHECKING:
    from florence2.pipeline import Florence2
    from florence2.train.evaluate import Outcome
    from florence2.train.metrics import Metrics, Pair
    from florence2.train.store.images import StoredImages


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that answers the questions of a data file."""
    add_data(parser)
    add_answering_options(parser)


def add_answering_options(parser: argparse.ArgumentParser) -> None:
    """Add the model that answers, and how it does."""
    add_model(parser)
    add_weights(parser)
    add_generation(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="questions answered at once (default: as memory allows)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images (default: all)")
    add_store(parser, "default: none; `train` keeps its own in OUT/features")


def measure_file(options: argparse.Namespace) -> int:
    """Answer the questions of a data file and print the metrics of each task; progress and counts go to stderr.

    With `--json`, stdout has one JSON object for each question that could not be answered, then one for each task.

    Returns:
        1 if a question could not be answered, otherwise 0.

    Raises:
        Florence2Error: The data, the model or an option cannot be used.
    """
    check_at_least(options, 1, "batch", "limit")
    check_data(options, "data", "images")
    check_store(options)
    generation_changes(options)
    known = stored_tasks(options, check_model(options))
    from florence2.train.evaluate import answer_samples
    from florence2.train.metrics import measure_by_task
    from florence2.train.sources import read_samples

    samples = read_samples(options.data, options.images, sys.maxsize, options.task, known)[: options.limit]
    model = load_model(options)
    results = answer_samples(
        model, samples, options.batch, generation_options(options, model), open_store(options, model)
    )
    pairs, failed = collect(results, len(samples), options.json)
    _print_metrics(measure_by_task(pairs, known), options.json)
    cut_off = sum(answer.is_cut_off for _, answer in pairs)
    for sentence in Summary(options.max_new_tokens, 0, len(pairs) + failed, failed, cut_off).sentences():
        say(f"florence2: {sentence}")
    return 1 if failed else 0


def open_store(options: argparse.Namespace, model: "Florence2") -> "StoredImages | None":
    """Return what encodes the images through `--store`; None without it."""
    if options.store is None:
        return None
    from florence2.train.store.filling import DEFAULT_LIMIT, StoreOptions
    from florence2.train.store.images import StoredImages

    return StoredImages(model, StoreOptions(options.store, options.store_limit or DEFAULT_LIMIT))


def collect(results: Iterable[list["Outcome"]], total: int, as_json: bool) -> tuple[list["Pair"], int]:
    """Return the pairs to measure and the number of failed questions; failures are printed as they come."""
    pairs: list[Pair] = []
    failed = 0
    with Progress(total) as progress:
        for done, outcomes in enumerate(results, 1):
            for outcome in outcomes:
                if outcome.pair is not None:
                    pairs.append(outcome.pair)
                else:
                    failed += 1
                    _print_failure(outcome, as_json)
            progress.show(done)
    return pairs, failed


def _print_failure(outcome: "Outcome", as_json: bool) -> None:
    error = str(outcome.error)
    if isinstance(outcome.error, OptionError):  # an answer that would take too much memory
        error = name_options(error, SETTINGS)
    if as_json:
        print(json.dumps({"sample": outcome.name, "prefix": outcome.prompt, "error": error}), flush=True)
    else:
        say(f"florence2: {outcome.name}, {outcome.prompt}: {error}")


def _print_metrics(metrics: Mapping[str, "Metrics"], as_json: bool) -> None:
    if as_json:
        for task, values in metrics.items():
            print(json.dumps({"task": task, **values}))
    elif metrics:
        from florence2.train.metrics import format_metrics

        print(format_metrics(metrics))
