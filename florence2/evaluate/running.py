"""A run over tables: from examples through the journal of `florence2 label` to results."""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from florence2 import __version__
from florence2.asking.questions import Runtime
from florence2.checkpoints.files import read_json, write_json, written_whole
from florence2.cli.options.arguments import generation_options, say
from florence2.cli.run import Backend
from florence2.errors import OptionError
from florence2.evaluate.answers import (
    count_unanswered,
    first_images,
    join_answers,
    missing_images,
    read_answers,
    resized_images,
    shard_of,
    to_items,
)
from florence2.evaluate.protocols import PROTOCOLS, Protocol, find_protocol
from florence2.evaluate.published import published_name, published_results
from florence2.evaluate.report import Report, Result
from florence2.evaluate.scoring import AnsweredExample, Score, score_table
from florence2.evaluate.tables.catalogue import Family, find_split, read_table
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.label.journal import Journal
from florence2.label.labelling import Labelling
from florence2.label.remaining import Remaining
from florence2.label.settings import run_settings

if TYPE_CHECKING:
    from florence2.pipeline import Florence2

_RUN = "run.json"  # how the last run of a split computed, for a later --score
_COMMIT = re.compile("[0-9a-f]{40}")
_COMPUTED = ("model", "revision", "weights", "adapter", "dtype", "attention", "beams", "max_new_tokens", "background")


@dataclass(frozen=True)
class SplitRun:
    """One split of a run: its name, "TABLE:SPLIT", its examples, and where its answers are."""

    name: str
    family: Family
    protocol: Protocol
    every: Sequence[BenchmarkExample[Any]]
    chosen: Sequence[BenchmarkExample[Any]]
    folder: Path


class Running:
    """A run over splits. All files are read before anything is answered."""

    def __init__(self, options: argparse.Namespace, backend: Backend, names: Sequence[str]):
        """Read the examples of the splits.

        Raises:
            TableError: A file is missing or damaged, or a table does not have the protocol.
        """
        self._options, self._backend = options, backend
        self._model: Runtime | None = None
        protocols = {name: find_protocol(find_split(name)[2].family, options.protocol) for name in names}
        self._splits = [self._read(name, protocol) for name, protocol in protocols.items()]

    def _load_once(self, options: argparse.Namespace) -> Runtime:
        """Return the model, which is loaded for the first split that needs it."""
        if self._model is None:
            self._model = self._backend.load(options)
        return self._model

    def _read(self, name: str, protocol: Protocol) -> SplitRun:
        family, every = find_split(name)[2].family, read_table(name, self._options.data)
        chosen, folder = first_images(every, self._options.limit), self._options.out / name.replace(":", "-")
        return SplitRun(name, family, protocol, every, chosen, folder)

    def check_images(self) -> None:
        """Say how many images of each split are missing. Raises TableError where all are."""
        for split in self._splits:
            missing, count = missing_images(split.chosen)
            if len(missing) == count:
                raise TableError(
                    f"None of the {count:,} images of {split.name} exists, such as {missing[0]}; put them there, or "
                    "check --data. --score needs no images."
                )
            if missing:
                say(
                    f"florence2: Missing images of {split.name}: {len(missing):,} of {count:,}, such as {missing[0]}; "
                    "questions about them count as wrong until a run finds them."
                )

    def answer(self) -> int:
        """Answer the questions that are left; return the worst exit code. Ctrl-C keeps the rows written so far."""
        path = self._backend.find(self._options)  # before a folder is made, so that a misspelt name leaves nothing
        settings, revision = run_settings(self._options, self._backend, path), commit_of(path)
        worst = 0
        for split in self._splits:
            say(f"florence2: {split.name}, {len(split.chosen):,} examples, protocol {split.protocol.name}")
            worst = max(worst, self._answer(split, settings, revision))
            if worst > 1:
                break
        return worst

    def _used(self, model: Runtime) -> dict[str, Any]:
        """Return the settings that were chosen where the options leave them open."""
        loaded, search = cast("Florence2", model).model, generation_options(self._options, model)
        dtype = str(loaded.dtype).removeprefix("torch.")
        used = {"device": str(loaded.device), "dtype": dtype, "beams": search.num_beams}
        return used | {"max_new_tokens": search.max_new_tokens}

    def _answer(self, split: SplitRun, settings: Mapping[str, Any], revision: str | None) -> int:
        items = shard_of(to_items(split.chosen, split.protocol, self._options.data), self._options.shard)
        with Journal(split.folder, settings, shard=self._options.shard) as journal:
            for note in journal.notes:
                say(f"florence2: {note}")
            began, before = time.monotonic(), journal.results.stat().st_size
            code = Labelling(self._options, self._load_once, Remaining(items, (), journal), journal).run()
            if self._model is not None and journal.results.stat().st_size != before:
                used = self._used(self._model) | ({} if revision is None else {"revision": revision})
                write_json(split.folder / _RUN, used | {"seconds": round(time.monotonic() - began, 1)})
        return code

    def score(self) -> Report:
        """Compute the results from the answers in the folders.

        Raises:
            OptionError: A folder has no answers, or two were answered with different settings.
            ConfigError: The settings of a folder, or its run.json, are damaged.
        """
        settings = [_read_settings(split.folder) for split in self._splits]
        if any(each != settings[0] for each in settings):
            raise OptionError(
                f"The splits in {self._options.out} were answered with different settings; measure them one by one."
            )
        compared = self._options.published or published_name(str(settings[0].get("model")))
        published = {} if compared is None else published_results(compared)
        results, notes = [], []
        for split in self._splits:
            answers = read_answers(split.folder)
            answered = list(join_answers(split.chosen, split.protocol, self._options.data, answers))
            if self._options.score and count_unanswered(answered) == len(answered):
                raise OptionError(
                    f"{split.folder} holds no answers by the protocol {split.protocol.name}; leave --score out to "
                    "answer its questions, or choose another --protocol."
                )
            results += _results(split, answered, published)
            if split.family == "questions":
                write_submission(split.folder / "submission.json", answered)
            notes += _notes(split, answered)
        computed = {name: settings[0].get(name) for name in _COMPUTED}
        runs = [read_json(file) for split in self._splits if (file := split.folder / _RUN).exists()]
        computed |= join_runs(runs) | {"version": __version__}
        return Report(results, computed, compared, notes)


def commit_of(path: Path) -> str | None:
    """Return the commit of a checkpoint in the cache of the Hub, None for one elsewhere."""
    return path.name if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) else None


def join_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how the runs of several splits computed: the sum of their seconds, and each other value that one had."""
    names = dict.fromkeys(name for run in runs for name in run)
    values = {name: list(dict.fromkeys(str(run[name]) for run in runs if name in run)) for name in names}
    joined: dict[str, Any] = {name: " and ".join(each) for name, each in values.items()}
    for run in runs:  # a value that all have keeps its type
        joined |= {name: value for name, value in run.items() if len(values[name]) == 1}
    seconds = [run["seconds"] for run in runs if isinstance(run.get("seconds"), int | float)]
    return joined | ({"seconds": round(sum(seconds), 1)} if seconds else {})


def write_submission(file: Path, answered: Sequence[AnsweredExample]) -> None:
    """Write the answers in the form that the owners' server takes. Raises OutputError where that cannot be written."""
    names = {int: "question_id", str: "image"}  # VizWiz names the image
    rows = [
        {names[type(truth.question_id)]: truth.question_id, "answer": str(each.answers[0].get("text", "")).strip()}
        for each in answered
        for truth in [each.example.truth]
    ]
    with written_whole(file) as draft:
        draft.write_text(json.dumps(rows), encoding="utf-8")


def _read_settings(folder: Path) -> dict[str, Any]:
    if not (folder / "settings.json").exists() or not any(folder.glob("results*.jsonl")):
        raise OptionError(
            f"{folder} holds no answers; leave --score out to answer the questions first, or check --out."
        )
    return read_json(folder / "settings.json")


def _results(
    split: SplitRun, answered: Sequence[AnsweredExample], published: Mapping[tuple[str, str, str], float]
) -> list[Result]:
    part = len(split.chosen) < len(split.every)
    scores = score_table(split.family, answered, split.every if part else None)
    usual = split.protocol == PROTOCOLS[split.family][0]

    def result(place: int, score: Score) -> Result:
        table, _, name = split.name.partition(":")
        # the first score is the one that was published
        known = published.get((table, name, score.metric)) if usual and place == 0 else None
        protocol = f"{split.protocol.name}, {score.variant}" if score.variant else split.protocol.name
        images = len({each.example.image for each in score.about})
        counts = score.count, images, count_unanswered(score.about)
        return Result(
            split.name, score.metric, score.value, known, score.interval, *counts, protocol, split.protocol.description
        )

    return [result(place, score) for place, score in enumerate(scores)]


def _notes(split: SplitRun, answered: Sequence[AnsweredExample]) -> list[str]:
    """Return sentences about a split that its results do not show."""
    notes = []
    if split.family == "detection":
        from florence2.evaluate.detection import describe_unknown  # which needs pycocotools

        notes += describe_unknown([each.answers[0] for each in answered], split.chosen[0].truth.categories)
    if split.family in ("detection", "expressions", "masks") and (resized := resized_images(answered)):
        notes.append(
            f"Images of {split.name} whose size is not the one in its files: {len(resized):,}, such as {resized[0]}; "
            "boxes and masks are compared in pixels, so use the images as their owners distribute them."
        )
    if split.family == "questions" and not any(each.example.truth.answers for each in answered):
        notes.append(f"{split.name}: the true answers are not published, so there is no result.")
    return notes
