"""The callable that Ray Data's actors are made of."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence2.answers.confidence import check_least
from florence2.asking.requests import check_batch_size, check_request
from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.dataset.tables import COLUMNS, to_table
from florence2.errors import Florence2Error, ImageError, OptionError, listing, shown
from florence2.inputs.processor import TaskText
from florence2.inputs.tasks import find_task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_IDS = ("id", "path")
"""The columns that name the images, where nobody says which."""


class Labeler:
    """A model that answers one question about the images of batches, for `ray.data.Dataset.map_batches`.

    Each actor loads the model once:

        ds.map_batches(
            Labeler,
            fn_constructor_kwargs={"model": "base", "task": "<OD>"},
            batch_size=64,
            compute=ray.data.ActorPoolStrategy(size=8),
            num_gpus=1,
            udf_modifying_row_count=False,
        )

    It needs pyarrow and not Ray itself, so that it can be tried on a dictionary of arrays. A pickled one loads its
    model again where it is unpickled.
    """

    def __init__(
        self,
        model: str = "base",
        task: str = "<CAPTION>",
        text: TaskText = None,
        *,
        image_column: str = "bytes",
        id_column: str | None = None,
        batch_size: int | None = None,
        min_confidence: float | None = None,
        loading: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        """Load the model.

        Args:
            model: A name or a path, as in `florence2.load`.
            task: The task, or a prompt.
            text: The task's input, if it takes one: a text, a list of classes, or a box in pixels.
            image_column: The column of the images: their bytes, their paths, or structs of both as `datasets` has
                them.
            id_column: The column of the ids. None takes "id", or if it is missing "path".
            batch_size: How many images are answered at once, at least 1; None is as many as memory allows. The size
                of Ray's batches may be larger.
            min_confidence: Leave out boxes, quads and outlines below this confidence, 0 to 1.
            loading: Further arguments of `florence2.load`, such as {"device": "cpu"}.
            **settings: Generation settings, such as `num_beams=1`.

        Raises:
            Florence2Error: The model cannot be loaded, the task is unknown or lacks its input, or a setting is wrong.
        """
        from florence2.loading import load  # which needs torch

        given: dict[str, Any] = {"image_column": image_column, "id_column": id_column, "batch_size": batch_size}
        given |= {"min_confidence": min_confidence, "loading": loading, **settings}
        self._rebuild = partial(Labeler, model, task, text, **given)
        check_batch_size(batch_size)
        if min_confidence is not None:
            check_least(min_confidence)
        self._model = load(model, **(loading or {}))
        self._options = self._model.options(**settings)
        self._question = TaskQuestion(task, text, find_task(task, self._model.processor.tasks))
        self._image_column, self._id_column = image_column, id_column
        self._batch_size, self._min_confidence = batch_size, min_confidence
        self._check_question()

    def __reduce__(self) -> Any:
        """Pickle the arguments and not the model."""
        return self._rebuild, ()

    def __call__(self, batch: "Mapping[str, np.ndarray]") -> "pa.Table":
        """Answer the question about each image of a batch.

        Args:
            batch: Arrays by column name, all of one length: the images, their ids, and any others.

        Returns:
            The batch without its images, as a table of pyarrow, which keeps the types of columns that hold nothing
            in this batch. It has the columns of `florence2 dataset --to parquet` in addition to those of the batch;
            "error" says why an image has no answer.

        Raises:
            OptionError: The batch lacks a column, or has one that the answers have too.
        """
        import pyarrow as pa

        others = self._check_columns(batch)
        sources = list(self._sources(batch))
        requests = (
            self._request(source, value) for source, value in zip(sources, batch[self._image_column], strict=True)
        )
        answers = self._model.stream(requests, options=self._options, batch_size=self._batch_size)
        table = to_table(self._row(source, answer) for source, answer in zip(sources, answers, strict=True))
        for name in others:
            values = batch[name]  # of more than one dimension in a column of arrays
            table = table.append_column(name, pa.array(values if values.ndim == 1 else values.tolist()))
        return table

    def _check_question(self) -> None:
        """Raise PromptError for a task or an input that would fail for every image."""
        check_request((self._question.task, b"", self._question.text), self._model.processor.tasks)

    def _check_columns(self, batch: "Mapping[str, np.ndarray]") -> list[str]:
        """Return the columns that are handed on. Raises OptionError."""
        columns = listing(sorted(batch))
        for name in (self._image_column, *([] if self._id_column is None else [self._id_column])):
            if name not in batch:
                raise OptionError(f"The batch has no column {shown(name)}. Its columns: {columns}.")
        if self._id_column is None and not batch.keys() & {*_IDS}:
            raise OptionError(f"The batch has no column id or path; name one with id_column. Its columns: {columns}.")
        others = [name for name in batch if name not in (self._image_column, "id")]
        if taken := [name for name in others if name in COLUMNS]:
            raise OptionError(f"The answers have columns of the same names, {listing(taken)}; rename those first.")
        return others

    def _sources(self, batch: "Mapping[str, np.ndarray]") -> Iterator[Source]:
        """Yield the names of the images."""
        ids = batch[self._id_column or next(name for name in _IDS if name in batch)]
        paths = batch.get("path", ids)
        for id, path, value in zip(ids, paths, batch[self._image_column], strict=True):
            data = Path(str(path)) if "path" in batch else _bytes_of(value)
            yield Source(str(path), data, "", str(id))

    def _request(self, source: Source, value: Any) -> Any:
        """Return what to ask about an image, or the error that says that it has none."""
        if isinstance(value, Mapping):  # a struct with bytes, a path, or both
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            value = Path(value)
        if not isinstance(value, bytes | Path):
            return ImageError(f"{source.name} has no image: the column {self._image_column} holds {shown(value)}.")
        return self._question.task, value, self._question.text

    def _row(self, source: Source, answer: Any) -> dict[str, Any]:
        if isinstance(answer, Florence2Error):
            return Row(source, self._question, error=str(answer)).to_dict()
        if self._min_confidence is not None:
            answer = answer.with_confidence(self._min_confidence)
        return Row(source, self._question, answer).to_dict()


def _bytes_of(value: Any) -> bytes:
    """Return the bytes by which an image without a path is known."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return data if isinstance(data, bytes) else b""
