"""`load`: an exported folder becomes a Florence2Lite that answers."""

import os
from pathlib import Path

from florence2.answers.confidence import Calibration
from florence2.asking.processor import AnswerProcessor
from florence2.checkpoints.checks.calibration import choose_calibration
from florence2.checkpoints.config_files import read_config
from florence2.errors import CheckpointError, OptionError, shown
from florence2.inputs.image import Colour, parse_colour
from florence2.lite.fitting import check_graphs, check_hashes
from florence2.lite.florence import Florence2Lite
from florence2.lite.layout import SUFFIXES
from florence2.lite.sessions import open_graphs


def load(
    folder: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    kind: str = "float32",
    background: Colour | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = None,
) -> Florence2Lite:
    """Open an exported folder as a Florence2Lite that answers.

    Args:
        folder: What `florence2 export` has written, or a published folder of the same layout.
        provider: Where onnxruntime computes: "cpu", or another of its providers, such as "cuda".
        threads: How many threads an operation may use; None is onnxruntime's own choice.
        kind: The graphs to use where the folder has several: "float32" is those without an ending; "float16", "int8",
            "uint8", "q8" and "q4" are those of published folders.
        background: The colour that transparent pixels of images show, such as "white"; None drops alpha, as the
            reference does.
        calibration: A file of `florence2 calibrate`, or a `Calibration`, in place of the folder's `confidence.json`.

    Returns:
        The model.

    Raises:
        OptionError: An argument has a wrong value, or onnxruntime is not installed.
        CheckpointError, ConfigError: Files are missing, damaged, or do not fit each other.
    """
    if kind not in SUFFIXES:
        raise OptionError(f"kind is {shown(kind)}; it must be one of {', '.join(SUFFIXES)}.")
    if background is not None:
        background = parse_colour(background)
    path = check_folder(folder)
    if not isinstance(calibration, Calibration):
        calibration = choose_calibration(path, file=None if calibration is None else Path(calibration))
    config = read_config(path)
    processor = AnswerProcessor.from_folder(path, calibration=calibration).changed(background=background)
    check_hashes(path)
    graphs = open_graphs(path, kind, provider, threads)
    check_graphs(graphs, config)
    return Florence2Lite(graphs, config, processor, os.fspath(folder))


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder. Raises CheckpointError where there is none."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"{shown(os.fspath(folder))} is not a folder; give one that `florence2 export` has written."
        )
    return path
