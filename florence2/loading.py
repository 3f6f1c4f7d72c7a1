"""`load`: a checkpoint's files become a Florence2 that answers."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from florence2.answers.confidence import Calibration
from florence2.asking.requests import AnyImage as AnyImage
from florence2.asking.requests import EncodedImage as EncodedImage
from florence2.asking.requests import PreparedImage as PreparedImage
from florence2.asking.requests import Request as Request
from florence2.asking.requests import check_request as check_request
from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.checkpoint import checkpoint_folder, load_model
from florence2.checkpoints.checks.belonging import check_image_settings
from florence2.checkpoints.checks.calibration import choose_calibration
from florence2.checkpoints.checks.empty import Prepare
from florence2.checkpoints.checks.loading import Parts, check_loading
from florence2.checkpoints.hub import DEFAULT_MODEL, resolve, resolve_adapter
from florence2.errors import CheckpointError, Florence2Error, OptionError
from florence2.fast.install import install
from florence2.inputs.image import Colour, parse_colour
from florence2.model.attention import AttentionKind
from florence2.pipeline import Florence2
from florence2.processor import Processor


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    attention: AttentionKind = "sdpa",
    parts: Parts = "all",
    allow_pickle: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    prepare: Prepare | None = None,
    background: Colour | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    report: Callable[[str], None] | None = None,
) -> Florence2:
    """Load a checkpoint into a Florence2 that answers.

    A path never touches the network; a name is fetched once (see `florence2.checkpoints.hub.download`).

    Args:
        name: A short name ("base", "large", "base-ft", "large-ft", or "nano", which comes with the package), a Hub id
            OWNER/NAME, a folder, a weight file, or an index of shards.
        device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device.
        dtype: "auto" (float32 on a CPU; elsewhere float16, in which the published weights are stored), "float32",
            "float16" or "bfloat16".
        revision: A branch, tag or commit on the Hub; None is the main branch.
        local_files_only: Fetch nothing.
        attention: "sdpa" (torch's kernel) or "eager" (written out).
        parts: The parts to read and hold: "all", "encoder" (no decoder: for `model.encode`), or "vision" (vision tower
            and projection: for `encode_image`).
        allow_pickle: Accept weights that exist only as a `.bin`.
        adapter: A folder or Hub id of a LoRA adapter, which is merged into the weights (see `merge_adapter`). Its
            `tasks.json` adds to the model's tasks.
        changes: New values of the checkpoint's settings, such as `{"vision.window_size": 8,
            "text.activation_function": "silu", "generation.num_beams": 1}` (see `change_config`). They are checked
            like those of the file, and `save` writes them.
        prepare: A function that changes the empty model before the weights are read: it adds adapters, replaces
            modules, prunes heads, registers hooks. The file must hold exactly the tensors that the model then has;
            `save` writes such files (see `florence2.checkpoints.checks.empty.Prepare`).
        background: The colour that transparent pixels of images show, such as "white"; it is not saved. None drops
            alpha, as the reference does, and shows the colours that transparent pixels hide.
        calibration: A file of `florence2 calibrate`, or a `Calibration`, in place of `confidence.json` next to the
            weights, which is then not read. The latter is not used with `prepare`, and with `changes` of more than
            generation: another model's confidences are raw.
        report: Called with a line about the files to fetch, before they are fetched.

    Raises:
        OptionError: A setting has a wrong value; no file was read.
        HubError: The name means nothing, or fetching failed.
        CheckpointError, ConfigError: The files are missing, damaged, or do not fit each other; everything that is
            wrong is listed.
    """
    chosen_device, chosen_dtype = check_loading(device, dtype, attention, parts)
    if background is not None:
        background = parse_colour(background)
    if adapter is not None and parts != "all":
        raise OptionError(f'An adapter needs the whole model, but parts is "{parts}"; load with parts="all".')
    path = resolve(name, revision, local_files_only, allow_pickle, report)
    adapter_folder = None if adapter is None else resolve_adapter(adapter, local_files_only)
    problems: list[Florence2Error] = []
    try:
        if not isinstance(calibration, Calibration):
            file = None if calibration is None else Path(calibration)
            calibration = choose_calibration(checkpoint_folder(path), adapter_folder, file, changes, prepare)
        processor = Processor.from_folder(checkpoint_folder(path), adapter_folder, calibration)
        processor = processor.changed(background=background)
    except Florence2Error as error:
        problems.append(error)
    try:
        model = load_model(
            path,
            device=chosen_device,
            dtype=chosen_dtype,
            attention=attention,
            parts=parts,
            allow_pickle=allow_pickle,
            changes=changes,
            prepare=prepare,
        )
        if adapter_folder is not None:
            merge_adapter(model, adapter_folder)
    except Florence2Error as error:
        problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointError("\n".join(map(str, problems)))
    check_image_settings(model.config, processor.image_config)
    # attention="eager" selects the plain model, so nothing is swapped in
    return Florence2(model if attention == "eager" else install(model), processor, os.fspath(name), prepare)
