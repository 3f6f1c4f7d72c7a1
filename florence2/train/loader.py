"""Load the batches of every step ahead of time, in worker processes."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from florence2.errors import Florence2Error
from florence2.train.data import Batch, StepData
from florence2.train.stopping import ignore_stop_signals

Item = TypeVar("Item")


def load_steps(data: StepData, first: int) -> Iterator[list[Batch]]:
    """Yield the batches of each step from `first` on. Raise the Florence2Error of data that cannot be used."""
    yield from load_ahead(data, range(first, len(data)), data.settings.workers)


def load_ahead(data: Dataset[Item], order: Sequence[int], workers: int) -> Iterator[Item]:
    """Yield the items of `data` in `order`; `workers` processes make the next ones meanwhile.

    Raises the Florence2Error of an item that cannot be made.
    """
    loader = DataLoader(
        _ErrorsAsValues(data),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )
    for item in loader:
        if isinstance(item, Florence2Error):
            raise item
        yield item


class _ErrorsAsValues(Dataset[Item | Florence2Error]):
    """`data` that returns errors: raised in a worker, they would reach the main process as a traceback in a text."""

    def __init__(self, data: Dataset[Item]):
        self.data = data

    def __getitem__(self, index: int) -> Item | Florence2Error:
        try:
            return self.data[index]
        except Florence2Error as error:
            return error


def _start_worker(_: int) -> None:
    """Leave the cores to the main process, and stopping too."""
    torch.set_num_threads(1)
    ignore_stop_signals()
