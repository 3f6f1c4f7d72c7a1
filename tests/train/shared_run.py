"""What `test_trainer.py` runs in one process and in two."""

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from florence2.processor import Processor
from florence2.train.nano import SceneSamples, make_model, nano_config
from florence2.train.settings import TrainSettings
from florence2.train.trainer import train


def run(processor_folder: Path, out: Path) -> None:
    """Three updates without dropout, two micro-batches each."""
    full = Processor.from_folder(processor_folder)
    processor = Processor(full.tokenizer, replace(full.image_config, height=64, width=64))
    config = nano_config(processor.tokenizer.vocab_size)
    model = make_model(config, processor, seed=1)
    settings = TrainSettings(
        steps=3, batch=5, micro_batch=2, learning_rate=1e-4, warmup=1, log_every=1, workers=0, save_every=10
    )
    train(model, processor, SceneSamples(4, 16), settings, out)
    state = PartialState()
    print(f"{state.process_index}/{state.num_processes}")


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
