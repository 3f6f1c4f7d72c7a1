"""What the tests of the store run in processes of their own."""

import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState

from florence2.processor import Processor
from florence2.train.settings import TrainSettings
from florence2.train.store import grids
from florence2.train.store.filling import StoreOptions
from florence2.train.trainer import train
from recipes.nano.train import make_model, nano_config
from tests.train.disturbed import DisturbedSamples, send
from tests.train.shared_run import SIZES
from tests.two_stages import two_stages

SETTINGS = TrainSettings(
    steps=4, batch=4, learning_rate=1e-4, warmup=1, log_every=1, workers=0, save_every=100, freeze=("vision",)
)


def run(processor_folder: Path, out: Path, after: int) -> None:
    """Four updates on eight images, killed after `after` reads; shards hold two images."""
    full = Processor.from_folder(processor_folder)
    processor = Processor(full.tokenizer, replace(full.image_config, height=64, width=64))
    config = nano_config(processor.tokenizer.vocab_size)
    config = replace(config, vision=two_stages(config.vision), text=replace(config.text, **SIZES))
    PartialState(cpu=True)
    grids.SHARD_BYTES = 2 * 8 * 8 * 32 * 4
    model = make_model(config, processor, seed=1)
    say = partial(print, file=sys.stderr, flush=True)
    train(
        model,
        processor,
        DisturbedSamples(4, 8, after + 1, send(signal.SIGKILL)),
        SETTINGS,
        out,
        store=StoreOptions(out / "features"),
        say=say,
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
