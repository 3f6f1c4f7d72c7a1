"""`python -m recipes.nano.train DIR --run RUN`: train nano from scratch.

nano is Florence-2's architecture at 1/50 of base's size, with its own tokenizer, trained on synthetic scenes only. It
first learns to see (`places.py`), then to answer. Both at once does not work: while the decoder learns which words
exist, vision tower and encoder collapse to a constant that helps it, and lose the image.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from florence2.checkpoints.checkpoint import copy_companions, save_checkpoint
from florence2.checkpoints.files import write_json
from florence2.checkpoints.presets import PUBLISHED_PREPROCESSOR
from florence2.inputs.coordinates import NUM_BINS
from florence2.inputs.tasks import TASKS
from florence2.inputs.tokenizer import ADDED_TOKENS, FlorenceTokenizer
from florence2.model.config import FEATURE_SOURCES, Florence2Config, TextConfig, VisionConfig
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.settings import TrainSettings
from florence2.train.trainer import train
from recipes.nano.places import PlacesLoss, SceneSample, make_scene_batch
from recipes.nano.scene_tasks import ask
from recipes.nano.scenes import COLORS, make_scene

SIDE, STRIDE = 192, 16
"""Pixels of a side of the image, and of an image token."""
SNAPSHOTS = "snapshots"
"""Folder inside a run: the checkpoint at every save, for the learning curve."""
TRAINING_SEED, HELD_OUT_SEED, CURVE_SEED = 1, 2, 3
"""Seeds of the scenes to train on, to measure the card's metrics on, and to draw the learning curve from."""


WEIGHTS: dict[str, float] = {
    "<OCR>": 1.5,
    "<OCR_WITH_REGION>": 1.5,
    "<CAPTION>": 1.5,
    "<DETAILED_CAPTION>": 0.7,
    "<MORE_DETAILED_CAPTION>": 0.5,
    "<OD>": 1.5,
    "<DENSE_REGION_CAPTION>": 0.7,
    "<REGION_PROPOSAL>": 0.5,
    "<CAPTION_TO_PHRASE_GROUNDING>": 1.0,
    "<REFERRING_EXPRESSION_SEGMENTATION>": 0.8,
    "<REGION_TO_SEGMENTATION>": 0.7,
    "<OPEN_VOCABULARY_DETECTION>": 1.0,
    "<REGION_TO_CATEGORY>": 0.7,
    "<REGION_TO_DESCRIPTION>": 0.5,
    "<REGION_TO_OCR>": 0.7,
}
"""The relative frequency of each task in training."""
READING_WEIGHTS: dict[str, float] = {
    **WEIGHTS,
    "<OCR>": 4.0,
    "<OCR_WITH_REGION>": 4.0,
    "<REGION_TO_OCR>": 1.5,
    "<CAPTION>": 3.0,
    "<OPEN_VOCABULARY_DETECTION>": 1.5,
    "<REFERRING_EXPRESSION_SEGMENTATION>": 1.2,
    "<REGION_TO_SEGMENTATION>": 1.2,
}
POINTING_WEIGHTS: dict[str, float] = {
    **READING_WEIGHTS,
    "<REGION_TO_CATEGORY>": 4.0,
    "<REGION_TO_DESCRIPTION>": 1.0,
    "<OPEN_VOCABULARY_DETECTION>": 2.5,
    "<REFERRING_EXPRESSION_SEGMENTATION>": 1.6,
}
TELLING_WEIGHTS: dict[str, float] = {**POINTING_WEIGHTS, "<OCR>": 9.0, "<CAPTION>": 9.0, "<REGION_TO_CATEGORY>": 1.5}
RETELLING_WEIGHTS: dict[str, float] = {**TELLING_WEIGHTS, "<CAPTION>": 14.0}


@dataclass(frozen=True)
class Phase:
    """A part of the training: on places alone, or also on answers if the model `speaks`."""

    name: str
    speaks: bool
    questions: int
    settings: TrainSettings
    weights: dict[str, float] = field(default_factory=lambda: WEIGHTS)


_COMMON = TrainSettings(
    batch=16,
    weight_decay=0.02,
    betas=(0.9, 0.98),
    precision="bfloat16",
    shuffle=False,  # every image is a new one
    save_every=500,
    log_every=25,
)
PHASES: tuple[Phase, ...] = (
    Phase(
        "seeing",
        False,
        1,
        replace(_COMMON, steps=3000, learning_rate=1.5e-3, warmup=100, freeze=("decoder",)),
    ),
    Phase("speaking", True, 4, replace(_COMMON, steps=3300, learning_rate=1e-3, warmup=200)),
    # reading and outlines take longest to learn, so the later phases ask for them more often
    Phase("reading", True, 4, replace(_COMMON, steps=1500, learning_rate=6e-4, warmup=100), READING_WEIGHTS),
    # which of several things is meant: answers of two or three labels, which weigh little unless there are many
    Phase("pointing", True, 4, replace(_COMMON, steps=4000, learning_rate=8e-4, warmup=100), POINTING_WEIGHTS),
    # to name every thing exactly once: captions and text, which one slip spoils. This takes long; the second phase
    # starts again at a high rate, and every third question is a caption
    Phase("telling", True, 4, replace(_COMMON, steps=1300, learning_rate=6e-4, warmup=50), TELLING_WEIGHTS),
    Phase("retelling", True, 4, replace(_COMMON, steps=3000, learning_rate=8e-4, warmup=100), RETELLING_WEIGHTS),
)


class SceneSamples:
    """`count` scenes of a seed, each with some questions, drawn on access."""

    def __init__(self, seed: int, count: int, questions: int = 4, weights: Mapping[str, float] = WEIGHTS):
        self.seed, self.count, self.questions, self.weights = seed, count, questions, weights

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SceneSample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene, rng = make_scene(self.seed, index), random.Random(f"questions {self.seed}/{index}")
        pairs: list[tuple[str, str]] = []
        tasks, weights = list(self.weights), list(self.weights.values())
        while len(pairs) < self.questions:
            question = ask(rng.choices(tasks, weights)[0], scene, rng)
            if question is not None:
                pairs.append((question.prefix, question.suffix))
        return SceneSample(scene.image, tuple(pairs), f"scene {self.seed}/{index}", scene)


def nano_config(vocab_size: int) -> Florence2Config:
    """Return nano's shape: three vision stages, 12 x 12 image tokens and their mean, 3 + 3 language layers."""
    width = 160
    vision = VisionConfig(
        dim_embed=(48, 96, width),
        depths=(1, 1, 2),
        num_heads=(2, 4, 5),
        num_groups=(2, 4, 5),
        patch_size=(7, 3, 3),
        patch_stride=(4, 2, 2),
        patch_padding=(3, 1, 1),
        patch_prenorm=(False, True, True),
        window_size=6,
        projection_dim=width,
        max_position_embeddings=24,
        max_temporal_embeddings=100,
        image_feature_source=FEATURE_SOURCES[:2],
    )
    text = TextConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=3,
        encoder_attention_heads=5,
        encoder_ffn_dim=4 * width,
        decoder_layers=3,
        decoder_attention_heads=5,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=1024,
    )
    generation = {"num_beams": 3, "early_stopping": True, "forced_bos_token_id": 0, "forced_eos_token_id": 2}
    return Florence2Config(vision, text, generation)


def make_tokenizer(merges: int = 400, scenes: int = 300) -> Tokenizer:
    """Train byte-level BPE on the prompts and answers of some scenes; special tokens have BART's ids."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 256 + merges,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(scenes), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True, normalized=False, lstrip=True)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS])
    return tokenizer


def _corpus(scenes: int) -> Iterator[str]:
    """Yield sentences without locations and printed words: without merges, printed words are spelt letter by letter."""
    for task in TASKS.values():
        yield task.sentence.replace("{input}", "")
    for index in range(scenes):
        scene, rng = make_scene(TRAINING_SEED, index), random.Random(index)
        for token in ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"):
            question = ask(token, scene, rng)
            assert question is not None
            yield " ".join(word for word in question.suffix.split() if not word.strip(".,").isupper() or len(word) == 1)
    yield from COLORS


def make_model(config: Florence2Config, processor: Processor, seed: int) -> Florence2Model:
    """Make an untrained model whose tables start alike where their neighbours are neighbours in the image.

    Location tokens and image positions start as sines of many wavelengths, so the model need not learn which bins
    lie next to each other.
    """
    model = Florence2Model(config, attention="eager")  # on a CPU it trains 1.6 times faster than torch's kernel
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "convs" in name or "image_projection" in name:  # keeps the image's variance
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                # Small, as in BART: larger branches average an image's positions away, and each depthwise convolution
                # would double the variance of the stream that it is added to, which nothing normalises. The decoder
                # is trained later and must attend to different places from the start.
                small = "decoder.layers" not in name
                parameter.normal_(std=0.02 if small else parameter.shape[1] ** -0.5, generator=generator)
        shared = model.language_model.shared.weight
        first = first_location(processor)
        shared[first : first + NUM_BINS] += 0.06 * _waves(NUM_BINS, shared.shape[1], longest=2.0 * NUM_BINS)
        positions = model.multi_modal_projector.image_position_embed
        for table in (positions.row_embeddings.weight, positions.column_embeddings.weight):
            table += _waves(len(table), table.shape[1], longest=2.0 * len(table))
    return model


def first_location(processor: Processor) -> int:
    """Return the id of `<loc_0>`; the other locations follow it."""
    location = processor.tokenizer.token_id("<loc_0>")
    assert location is not None
    return location


def _waves(count: int, width: int, longest: float) -> Tensor:
    """Return (count, width) sines and cosines of wavelengths from `longest` down to 1/50 of it or 4."""
    shortest = max(longest / 50, 4.0)
    lengths = longest * (shortest / longest) ** torch.linspace(0, 1, (width + 1) // 2)
    angles = torch.arange(count)[:, None] * 2 * torch.pi / lengths
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in the folder RUN and write the checkpoint to DIR."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.train", description=main.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder; an interrupted run in it is resumed")
    options = parser.parse_args(arguments)
    options.run.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():  # `accelerate launch` or torchrun may start several processes
        processor = write_processor(options.run)
    model = make_model(nano_config(processor.tokenizer.vocab_size), processor, seed=0)
    objective = PlacesLoss(model, first_location(processor))
    try:
        for index, phase in enumerate(PHASES):
            run_phase(objective, processor, phase, index, options.run)
    except KeyboardInterrupt:
        print("Stopped. Give the same command again to resume.", file=sys.stderr)
        return 130
    if state.is_main_process:
        write_specimen(model, options.run, options.folder)
        print(options.folder)
    return 0


def run_phase(objective: PlacesLoss, processor: Processor, phase: Phase, index: int, run: Path) -> None:
    """Train or resume one phase. Each phase has its own series of scenes."""
    folder, settings = run / phase.name, phase.settings
    count = settings.steps * settings.batch
    samples = SceneSamples(TRAINING_SEED + 1000 * index, count, phase.questions, phase.weights)
    objective.speaks = phase.speaks
    objective.requires_grad_(True)  # also parts that the phase before froze

    def keep(step: int) -> dict[str, Any]:
        write_specimen(objective.model, run, folder / SNAPSHOTS / f"{step:05}")
        return {}

    collate = partial(make_scene_batch, grid=SIDE // STRIDE)
    say = partial(print, file=sys.stderr, flush=True)
    train(
        objective.model,
        processor,
        samples,
        settings,
        folder,
        after_save=keep,
        objective=objective,
        collate=collate,
        say=say,
    )


def write_specimen(model: Florence2Model, companions: Path, folder: Path) -> None:
    """Write the checkpoint as it ships: Microsoft's layout, float16, with tokenizer and preprocessor settings."""
    save_checkpoint(model, folder, "microsoft", torch.float16)
    copy_companions(companions, folder)


def write_processor(folder: Path) -> Processor:
    """Write tokenizer and preprocessor settings to `folder` and load them."""
    make_tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    size = {"height": SIDE, "width": SIDE}
    write_json(folder / "preprocessor_config.json", {**PUBLISHED_PREPROCESSOR, "size": size, "image_seq_length": 145})
    for name, text in FlorenceTokenizer(folder / "tokenizer.json").to_files("microsoft", 1024).items():
        (folder / name).write_text(text, encoding="utf-8")
    return Processor.from_folder(folder)


if __name__ == "__main__":
    sys.exit(main())
