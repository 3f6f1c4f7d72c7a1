"""The end of a run in words: how many answers failed, were cut off or lack a part, which files were passed over."""

from dataclasses import dataclass, field

from florence2.answers.cascade import Cascade
from florence2.bulk.earlier import Earlier
from florence2.bulk.rows import Row


@dataclass
class Summary:
    """The counts of a run.

    `limit` is the limit of new tokens that the user gave; None is the model's own. `passed_over` counts the files of
    folders that were not taken.
    """

    limit: int | None = None
    passed_over: int = 0
    rows: int = 0
    failed: int = 0
    cut_off: int = 0
    incomplete: int = 0
    left_out: int = 0
    drawing_errors: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        self.failed += row.error is not None
        self.cut_off += row.answer is not None and row.answer.is_cut_off
        self.incomplete += isinstance(row.answer, Cascade) and bool(row.answer.missing)
        self.left_out += (row.answer is not None and row.answer.left_out) or 0
        self.add_drawing(row)

    def add_drawing(self, row: Row) -> None:
        """Note why a row's answer could not be drawn, if it could not."""
        self.drawing_errors += [row.drawing_error] if row.drawing_error else []

    def add_earlier(self, earlier: Earlier) -> None:
        """Count the requested answers of earlier runs, which a resumed run does not compute again."""
        self.rows += earlier.requested
        self.cut_off += earlier.cut_off
        self.incomplete += earlier.incomplete
        self.left_out += earlier.left_out

    @property
    def complete(self) -> bool:
        """Whether the results hold everything that was requested."""
        return not (self.failed or self.incomplete or self.drawing_errors)

    def sentences(self) -> list[str]:
        """Return a sentence for each thing that a user must know; none where all went well."""
        sentences = []
        if self.failed and self.rows > 1:  # of a single one the message has just been shown
            sentences.append(f"{self._of_all(self.failed)} failed.")
        if self.cut_off:
            limit = "the model's own token limit" if self.limit is None else f"--max-new-tokens {self.limit}"
            remedy = "--max-new-tokens N sets another" if self.limit is None else "a larger number gives the rest"
            sentences.append(f"{self._of_all(self.cut_off)} {_were(self.cut_off)} cut off at {limit}; {remedy}.")
        if self.incomplete:
            sentences.append(f"{self._of_all(self.incomplete)} {_were(self.incomplete)} left incomplete.")
        if self.left_out:
            count = self.left_out
            regions = "region" if count == 1 else "regions"
            sentences.append(f"{count} {regions} below --min-confidence {_were(count)} left out.")
        if self.drawing_errors:
            count = len(self.drawing_errors)
            sentences.append(
                f"{self._of_all(count)} {_were(count)} not drawn. The first reason: {self.drawing_errors[0]}"
            )
        if self.passed_over:
            count = self.passed_over
            sentences.append(f"{count} file{'' if count == 1 else 's'} in folders {_were(count)} passed over.")
        return sentences

    def _of_all(self, count: int) -> str:
        return f"{count} of {self.rows} answer{'' if self.rows == 1 else 's'}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
