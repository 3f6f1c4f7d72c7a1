"""The store in a training run, which may have several processes."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from florence2.model.florence2 import Florence2Model
from florence2.train.data import Collate, StepData, make_batch
from florence2.train.stopping import catch_stop_signals
from florence2.train.store.filling import StoredGrids, StoreOptions, fill_store
from florence2.train.store.grids import GridStore
from florence2.train.store.keys import ImageKeys
from florence2.train.store.tower import FrozenTower

Value = TypeVar("Value")


def fill_for_run(
    model: Florence2Model,
    data: StepData,
    first: int,
    options: StoreOptions,
    accelerator: Accelerator,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> Collate:
    """Encode every image that the steps from `first` on need; return what makes batches from the store.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the encoded images were written; other errors as `fill_store`.
    """
    processor, settings = data.processor, data.settings
    tower = FrozenTower(model, processor, settings.precision)
    grids = StoredGrids(GridStore(options.folder, tower.digest), ImageKeys(processor))
    with catch_stop_signals(announce=False) as stop, stop.immediate():
        fill_store(
            grids,
            tower,
            processor,
            data.samples,
            data.needed(first),
            options,
            workers=settings.workers,
            share=(accelerator.process_index, accelerator.num_processes),
            agree=partial(_agree, accelerator),
            say=say,
            progress=progress if progress and accelerator.is_main_process else lambda *_: None,
        )
    return partial(make_batch, read_grid=grids)


def _agree(accelerator: Accelerator, value: Value) -> Value:
    """Return the value of the first process, in every process, when all have come here."""
    values = [value]
    broadcast_object_list(values)
    accelerator.wait_for_everyone()
    return values[0]
