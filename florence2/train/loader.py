"""Load the batches of every step ahead of time, in worker processes."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from florence2.errors import Florence2Error
from florence2.train.data import Batch, StepData
from florence2.train.stopping import ignore_stop_signals


def load_steps(data: StepData, first: int) -> Iterator[list[Batch]]:
    """Yield the batches of each step from `first` on. Raise the Florence2Error of data that cannot be used."""
    workers = data.settings.workers
    loader = DataLoader(
        _ErrorsAsValues(data),
        batch_size=None,
        sampler=range(first, len(data)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )
    for batches in loader:
        if isinstance(batches, Florence2Error):
            raise batches
        yield batches


class _ErrorsAsValues(Dataset[list[Batch] | Florence2Error]):
    """`data` that returns errors: raised in a worker, they would reach the main process as a traceback in a text."""

    def __init__(self, data: StepData):
        self.data = data

    def __getitem__(self, step: int) -> list[Batch] | Florence2Error:
        try:
            return self.data[step]
        except Florence2Error as error:
            return error


def _start_worker(_: int) -> None:
    """Leave the cores to the main process, and stopping too."""
    torch.set_num_threads(1)
    ignore_stop_signals()
