"""`florence2 train DATA --model base --out DIR`: the grammar and the checks; `run` does the work."""

import argparse
import math
from collections.abc import Sequence

from florence2.cli.main import naming_options
from florence2.cli.options.arguments import check_at_least, check_model
from florence2.cli.options.groups import add_model
from florence2.cli.options.values import path_argument
from florence2.errors import OptionError
from florence2.train.settings import TrainSettings

PARTS = ("vision", "projection", "encoder", "decoder", "embeddings", "language")
"""The keys of `florence2.train.freeze.PARTS`, which needs torch."""
_MAX_EPOCHS = 1_000_000


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 train",
        description="Check the data, fine-tune a checkpoint, and write the checkpoint or adapter, the log and the "
        "learning curve. Ctrl-C saves the run; the same command resumes it.",
    )
    add_data(parser)
    _add_run(parser)
    add_model(parser)
    _add_schedule(parser)
    _add_weights(parser)
    _add_augmentation(parser)
    _add_computing(parser)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add which data to use; shared with `evaluate`."""
    parser.add_argument(
        "data", type=path_argument, metavar="DATA", help="JSON Lines of image, prefix, suffix; or a COCO .json file"
    )
    add_data_options(parser)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add how a data file is read."""
    parser.add_argument(
        "--task", action="append", default=[], help="task to make of a COCO file; repeatable (default: its usual one)"
    )
    parser.add_argument(
        "--images", type=path_argument, metavar="DIR", help="folder of the images (default: that of DATA)"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="output folder; an unfinished run there is resumed"
    )
    parser.add_argument(
        "--validation",
        type=path_argument,
        metavar="DATA",
        help="data to evaluate the model on whenever the run is saved",
    )
    parser.add_argument("--check", action="store_true", help="only report which parts of DATA would be lost or cut")


def add_store(parser: argparse.ArgumentParser, default: str) -> None:
    """Add where the features of a frozen vision tower are kept; shared with `evaluate`."""
    parser.add_argument(
        "--store",
        type=path_argument,
        metavar="DIR",
        help="folder for the features of images that were encoded once, for later epochs, runs and evaluations "
        f"({default})",
    )
    parser.add_argument(
        "--store-limit", type=float, metavar="GB", help="disk space that --store may take (default: 50)"
    )


def check_store(options: argparse.Namespace, has_own: bool = False) -> None:
    """Raise OptionError for values that cannot be meant; a command that `has_own` folder needs no `--store`."""
    if options.store_limit is not None and options.store is None and not has_own:
        raise OptionError("--store-limit bounds the folder of --store; give --store DIR too, or leave it out.")
    if options.store_limit is not None and not 0 < options.store_limit < math.inf:
        raise OptionError(f"--store-limit is {options.store_limit}; it must be above 0 and finite.")
    if options.store is not None and options.store.exists() and not options.store.is_dir():
        raise OptionError(f"--store {options.store} is a file; features need a folder.")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default: 3)")
    parser.add_argument("--steps", type=int, help="number of updates, instead of --epochs")
    parser.add_argument("--batch", type=int, default=8, help="images per update, over all processes (default: 8)")
    parser.add_argument("--micro-batch", type=int, help="images computed at once (default: all of the batch)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="peak learning rate (default: 1e-5)")
    parser.add_argument(
        "--warmup", type=int, help="updates before the peak learning rate (default: a tenth of all, at most 100)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.01, help="weight decay of AdamW (default: 0.01)")
    parser.add_argument("--clip", type=float, default=1.0, help="maximum norm of the gradient (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of shuffling, dropout and adapters (default: 0)")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="PART",
        help=f"parts that do not train: {', '.join(PARTS)}, or module paths",
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter of this rank, not the weights")
    parser.add_argument("--lora-alpha", type=float, help="scale of the adapter (default: twice the rank)")
    parser.add_argument(
        "--lora-names",
        choices=("canonical", "native", "microsoft"),
        default="canonical",
        help="module naming in the adapter file: match the model that peft will load it into (default: canonical; "
        "florence2 itself reads all three)",
    )


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flip",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="mirror this share of the samples; never where text is read, or left or right is named (default: 0)",
    )
    parser.add_argument(
        "--shrink",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="shrink images at random, at most to this share of their size, on the mean colour (default: 1)",
    )
    parser.add_argument(
        "--colour",
        type=float,
        default=0.0,
        metavar="X",
        help="change brightness, contrast and saturation by random factors from 1-X to 1+X (default: 0)",
    )


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16"),
        help="type of the computation; the weights stay float32 (default: float32)",
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="use less memory, for up to a third more time"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the language model's layers, for GPUs; no faster on a CPU"
    )
    parser.add_argument(
        "--save-every", type=int, default=500, help="updates between saves; the end is saved too (default: 500)"
    )
    parser.add_argument("--log-every", type=int, default=10, help="updates between lines of the log (default: 10)")
    add_store(parser, "default: features in --out, if the vision tower is frozen and images are seen again")
    parser.add_argument("--no-store", action="store_true", help="encode every image in every epoch")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare images (default: 1)")


def main(arguments: Sequence[str]) -> int:
    """Check the data, train, and write the output folder.

    Returns:
        1 if `--check` finds labels that would be lost or cut, otherwise 0.

    Raises:
        Florence2Error: The data, the model or an option cannot be used.
    """
    options = build_parser().parse_args(arguments)
    _check(options)
    path = check_model(options)
    from florence2.train.run import run  # which needs torch

    return run(options, path)


def check_data(options: argparse.Namespace, *names: str) -> None:
    """Raise OptionError for a path among the options that does not exist; shared with `evaluate`."""
    for name in names:
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise OptionError(f"{path} does not exist; check the path.")


def training_settings(options: argparse.Namespace, count: int) -> TrainSettings:
    """Return the settings of a run over `count` samples. Raises ConfigError for values out of range."""
    steps = max(1, round(options.epochs * count / options.batch)) if options.steps is None else options.steps
    warmup = options.warmup if options.warmup is not None else min(100, steps // 10)
    names = """
        batch micro_batch learning_rate weight_decay clip seed flip shrink colour precision gradient_checkpointing
        compile log_every workers
    """
    given = {name: getattr(options, name) for name in names.split()}
    given |= {"steps": steps, "warmup": warmup, "save_every": options.save_every}
    with naming_options({name: f"--{name.replace('_', '-')}" for name in given}):
        return TrainSettings(freeze=tuple(options.freeze), **given)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot work before torch is imported."""
    if options.out is None and not options.check:
        raise OptionError("Where should the run go? Give --out DIR, or --check to only check the data.")
    if not 0 < options.epochs <= _MAX_EPOCHS:
        raise OptionError(f"--epochs is {options.epochs}; it must be above 0 and at most {_MAX_EPOCHS:,}.")
    check_at_least(options, 1, "batch", "lora")
    if options.lora is None and (options.lora_alpha is not None or options.lora_names != "canonical"):
        raise OptionError("--lora-alpha and --lora-names describe an adapter; give --lora RANK too, or leave them out.")
    if options.lora_alpha is not None and not 0 < options.lora_alpha < math.inf:
        raise OptionError(f"--lora-alpha is {options.lora_alpha}; it must be above 0 and finite.")
    if options.no_store and (options.store is not None or options.store_limit is not None):
        raise OptionError("--no-store keeps no features; leave it out, or --store and --store-limit.")
    check_store(options, has_own=True)
    training_settings(options, count=1)
    check_data(options, "data", "images", "validation")
