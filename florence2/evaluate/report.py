"""The report of a run: each result next to the published one, as JSON and as a table in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from florence2.checkpoints.files import write_json, written_whole
from florence2.evaluate.published import published_note, published_source

_HEADINGS = "table metric result published difference 95_%_interval examples images unanswered protocol".split()


@dataclass(frozen=True)
class Result:
    """One line of a report.

    Attributes:
        table: "TABLE:SPLIT".
        metric: The name of the metric.
        value: Percent, or CIDEr times 100.
        published: The published result of the same checkpoint; None where there is none, or where the protocol is
            another one than the default.
        interval: The values between which the result lies with a probability of 95 %.
        examples: How many examples were measured, for phrases how many phrases.
        images: How many images they are about.
        unanswered: How many examples have no answer; they count as wrong.
        protocol: The protocol, and the variant of the metric after a comma.
        description: The task that the protocol asks, and which part of the answer counts.
    """

    table: str
    metric: str
    value: float
    published: float | None
    interval: tuple[float, float] | None
    examples: int
    images: int
    unanswered: int
    protocol: str
    description: str

    @property
    def difference(self) -> float | None:
        """The result less the published one."""
        return None if self.published is None else self.value - self.published


@dataclass(frozen=True)
class Report:
    """The results of a run, and what they were computed with.

    Attributes:
        results: One line for each result.
        computed: The model and how it answered: "model", "revision", "weights", "device", "dtype", "beams", "seconds",
            "version"; "seconds" are those of each split's last run that answered something.
        compared: The name of the checkpoint whose published results are shown.
        notes: Sentences about the results.
    """

    results: Sequence[Result]
    computed: Mapping[str, Any]
    compared: str | None = None
    notes: Sequence[str] = ()

    def sentences(self) -> list[str]:
        """Return the notes, and what must be known about the published results."""
        sentences = list(self.notes)
        if self.compared is not None:
            sentences.append(f"Published results: those of {self.compared}. {published_source()}.")
            note = published_note(self.compared)
            sentences += [note] if note else []
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        rows = [asdict(result) | {"difference": result.difference} for result in self.results]
        return {"results": rows, "computed": dict(self.computed), "compared": self.compared, "notes": self.sentences()}

    def to_markdown(self) -> str:
        """Return a table of the results, what they were computed with, and the notes."""
        rows = [_cells(result) for result in self.results]
        lines = [_line([heading.replace("_", " ") for heading in _HEADINGS]), _line(["---"] * len(_HEADINGS))]
        lines += map(_line, rows)
        used = [f"- {name}: {value}" for name, value in self.computed.items() if value is not None]
        names = [each.protocol.partition(",")[0] for each in self.results]
        described = zip(names, self.results, strict=True)
        descriptions = dict.fromkeys(f"- {name}: {each.description}" for name, each in described)
        return "\n".join([*lines, "", *used, "", *descriptions, "", *(f"- {each}" for each in self.sentences())]) + "\n"

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md`. Raises OutputError where a file cannot be written."""
        write_json(folder / "report.json", self.to_dict())
        with written_whole(folder / "report.md") as draft:
            draft.write_text(self.to_markdown(), encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(result: Result) -> list[str]:
    interval = "" if result.interval is None else f"{result.interval[0]:.1f} to {result.interval[1]:.1f}"
    published = "" if result.published is None else f"{result.published:.1f}"
    difference = "" if result.difference is None else f"{result.difference:+.1f}"
    counts = [f"{count:,}" for count in (result.examples, result.images, result.unanswered)]
    value = f"{result.value:.1f}"
    return [result.table, result.metric, value, published, difference, interval, *counts, result.protocol]
