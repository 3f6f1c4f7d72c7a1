"""What `test_trainer.py` runs in one process and in two."""

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState

from florence2.processor import Processor
from florence2.train.checkpoints import load_state
from florence2.train.settings import TrainSettings
from florence2.train.trainer import train
from recipes.nano.train import SceneSamples, make_model, nano_config
from tests.train.disturbed import DisturbedSamples, send
from tests.two_stages import two_stages

SIZES: dict[str, int] = {
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32},
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}
"""Of the text model, one layer each."""


def write(stream: int, line: str) -> None:
    """Write a line at once, so that those of two processes do not mix."""
    os.write(stream, f"{line}\n".encode())


def run(processor_folder: Path, out: Path) -> None:
    """Three updates without dropout, two micro-batches each; of several processes the last is asked to stop."""
    full = Processor.from_folder(processor_folder)
    processor = Processor(full.tokenizer, replace(full.image_config, height=64, width=64))
    config = nano_config(processor.tokenizer.vocab_size)
    config = replace(config, vision=two_stages(config.vision), text=replace(config.text, **SIZES))
    settings = TrainSettings(
        steps=3, batch=5, micro_batch=2, learning_rate=1e-4, warmup=1, log_every=1, workers=0, save_every=10
    )
    state, say = PartialState(cpu=True), partial(write, 2)
    name = f"{state.process_index}/{state.num_processes}"
    if state.num_processes > 1:
        signalled = DisturbedSamples(4, 16, 1, send(signal.SIGTERM))
        samples = signalled if state.is_last_process else SceneSamples(4, 16)
        try:
            train(make_model(config, processor, seed=1), processor, samples, settings, out, say=say)
        except KeyboardInterrupt:
            state.wait_for_everyone()
            write(1, f"{name}:{load_state(out).step}")
    train(make_model(config, processor, seed=1), processor, SceneSamples(4, 16), settings, out, say=say)
    write(1, name)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
