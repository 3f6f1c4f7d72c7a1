"""From files to a model and back: strict loading, saving, conversion between layouts.

The model uses canonical names; `layouts` has the rules between them and the names in files. `checks` has what makes
both directions strict.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence2.answers.confidence import NO_CALIBRATION, Calibration
from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.checks.calibration import (
    CALIBRATION_FILE,
    choose_calibration,
    write_calibration,
)
from florence2.checkpoints.checks.comparison import require_described
from florence2.checkpoints.checks.empty import (
    Prepare,
    empty_model,
    expected_tensors,
    fill,
    function_name,
    stored_tensors,
)
from florence2.checkpoints.checks.loading import Parts, check_loading
from florence2.checkpoints.checks.reading import NEEDS_PREPARE, compare_tensors, read_weights
from florence2.checkpoints.checks.weights import is_calibrated, of_weights
from florence2.checkpoints.config_files import config_to_files, image_config_to_json, read_config
from florence2.checkpoints.describe import stored_dtype, weights_layout
from florence2.checkpoints.files import (
    COMPANIONS,
    SAFETENSORS,
    adapter_folder,
    new_files,
    read_tasks,
    write_json,
    write_tasks,
    written_whole,
)
from florence2.checkpoints.files import checkpoint_folder as checkpoint_folder
from florence2.checkpoints.layouts import (
    DECODER_EMBEDDING,
    HEAD,
    SHARED,
    TIED_TO_SHARED,
    TRANSPOSED,
    canonical_name,
    stored_name,
)
from florence2.checkpoints.layouts import OPTIONAL as OPTIONAL
from florence2.checkpoints.tensors import WeightFiles, find_weights, is_finite, is_storable, write_safetensors
from florence2.errors import CheckpointError, ConfigError, Florence2Error
from florence2.inputs.image import ImageConfig
from florence2.inputs.tasks import Task, TaskTable
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.absent import Absent, require_complete
from florence2.model.attention import AttentionKind
from florence2.model.config import Florence2Config, Layout, change_config
from florence2.model.florence2 import Florence2Model


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    attention: AttentionKind = "sdpa",
    parts: Parts = "all",
    allow_pickle: bool = False,
    changes: Mapping[str, Any] | None = None,
    prepare: Prepare | None = None,
) -> Florence2Model:
    """Read a checkpoint of either layout into a model in eval mode.

    Weights are converted to `dtype` one by one, so that the peak of RAM is little more than the model's own size.

    Args:
        path: A folder, a weight file next to its `config.json`, or an index of shards.
        device: Where the model is put.
        dtype: The type of the weights: float32, float16, bfloat16 or float64.
        attention: "sdpa" (torch's kernel) or "eager" (written out).
        parts: The parts to read and hold: "all", "encoder" (no decoder), or "vision" (vision tower and projection).
            Using a part that was left out raises a Florence2Error.
        allow_pickle: Accept weights that exist only as a `.bin`.
        changes: New values of settings of the configuration, by dotted name; see `change_config`.
        prepare: Changes the empty model, whose names and shapes are then those that the file must hold; see `Prepare`.

    Raises:
        OptionError: A setting has a wrong value; no file was read.
        ConfigError: The configuration is missing or describes something this project does not implement.
        CheckpointError: Tensors of the wanted parts are missing, or tensors are unexpected, misshapen or not finite;
            all are listed, and nothing is loaded.
    """
    place, dtype = check_loading(device, dtype, attention, parts, exact=True)
    problems: list[Florence2Error] = []
    try:
        config = change_config(read_config(checkpoint_folder(path)), {} if changes is None else changes)
    except ConfigError as error:
        problems.append(error)
    try:
        files = find_weights(path, allow_pickle)
        headers = files.read_headers(whole_numbers=True)
    except CheckpointError as error:
        problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointError("\n".join(map(str, problems)))
    model = empty_model(config, attention, prepare)
    expected = expected_tensors(model)
    _leave_out(model, parts)
    wanted = expected_tensors(model)
    needed = [] if prepare or not config.prepared_by else [NEEDS_PREPARE.format(config.prepared_by)]
    weights = read_weights(files, headers, expected, wanted, place, dtype, prepare is not None, needed)
    for name in OPTIONAL & (wanted.keys() - weights.keys()):
        weights[name] = torch.zeros(wanted[name].shape, dtype=dtype, device=place)
    _untie(model, weights)
    if changes and change_config(model.config, changes) != model.config:
        raise CheckpointError(
            f"{files.paths[0]} holds an output projection or an embedding of answers with values of its own, so "
            "text.untied_head and text.untied_answers cannot be false; leave out the change."
        )
    fill(model, weights, place, dtype)
    return model.eval()


def _untie(model: Florence2Model, weights: Mapping[str, Tensor]) -> None:
    """Make room for the uses of the token embedding that the file holds with values of their own.

    The configuration need not say so: a `merge_and_unload` of peft leaves it as it was.
    """
    held = model.state_dict()
    for name, untie in ((HEAD, model.untie_head), (DECODER_EMBEDDING, model.untie_answers)):
        if name in weights and name not in held:
            untie()


_OUTPUT = {"lm_head": "output projection", "final_logits_bias": "output bias"}
_LEFT_OUT: dict[Parts, dict[str, str]] = {
    "all": {},
    "encoder": {"language_model.decoder": "text decoder", **_OUTPUT},
    "vision": {"language_model": "language model", **_OUTPUT},
}


def _leave_out(model: Florence2Model, parts: Parts) -> None:
    """Replace modules outside of `parts` by an `Absent`, which holds no tensors."""
    for path, name in _LEFT_OUT[parts].items():
        parent, _, attribute = path.rpartition(".")
        if getattr(model.get_submodule(parent), attribute) is not None:  # as the head of a tied model is
            setattr(model.get_submodule(parent), attribute, Absent(name, parts))


def find_misfits(files: WeightFiles, config: Florence2Config) -> list[str]:
    """List what of `files` is unexpected, misshapen or missing in a model of `config`, a sentence each."""
    headers = files.read_headers()
    layout = weights_layout(files, headers)
    targets = {name: canonical_name(name, layout) for name in headers}
    expected = expected_tensors(empty_model(config))
    return compare_tensors(headers, targets, expected, expected, layout)


def save_checkpoint(
    model: Florence2Model,
    folder: Path,
    layout: Layout = "microsoft",
    dtype: torch.dtype | None = None,
    prepare: Prepare | None = None,
) -> None:
    """Write the weights and the configuration of a model; the reference of the layout loads them.

    Tokenizer and image settings do not belong to the model; `copy_companions` copies them.
    Before anything is written, the model is compared with what `load_model` would bring back.

    Args:
        model: A complete model.
        folder: Where to write; it is created.
        layout: "microsoft" or "native", which has a `generation_config.json` in addition to `config.json`.
        dtype: The type of the stored weights; None keeps the model's.
        prepare: The function that `load_model` will be given, for a model that the configuration does not describe.

    Raises:
        CheckpointError: Something in the model would not come back, or the layout or the type has no place for a
            value; nothing is written.
        ConfigError: The layout has no place for a setting; nothing is written.
        Florence2Error: The model was loaded without some of its parts.
    """
    require_complete(model)
    require_described(model, prepare)
    if layout == "microsoft" and model.config.text.untied_answers:
        raise CheckpointError(
            "The answers of this model have a token embedding of their own, and Microsoft's layout has one for prompts "
            'and answers together; save it with the layout "native".'
        )
    dtype = dtype or _only_dtype(model)
    config = _with_vocabulary_of(layout, replace(model.config, prepared_by=prepare and function_name(prepare)))
    weights = _stored_weights(model, config.text.vocab_size, layout, dtype)
    config_json, generation_json = config_to_files(config, layout, str(dtype).removeprefix("torch."))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / SAFETENSORS, weights)
    write_json(folder / "config.json", config_json)
    if generation_json:
        write_json(folder / "generation_config.json", generation_json)


def _stored_weights(model: Florence2Model, rows: int, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of `model` as the layout stores them, with `rows` embeddings. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    for canonical, held in stored_tensors(model).items():
        tensor = _fit_rows(canonical, held, rows).to("cpu", dtype if held.is_floating_point() else held.dtype)
        if not is_storable(tensor.dtype):
            raise CheckpointError(f"{canonical} holds values of {tensor.dtype}, which no checkpoint can hold.")
        if not is_finite(tensor):
            raise CheckpointError(
                f"{canonical} does not fit into {dtype}: some values would not be finite; choose another type."
            )
        name = stored_name(canonical, layout)
        if name is not None:
            weights[name] = tensor.T if canonical in TRANSPOSED[layout] else tensor
        elif tensor.any():
            raise CheckpointError(f"{canonical} is not zero everywhere, and the {layout} layout has no place for it.")
    shared, *copies = (str(stored_name(name, layout)) for name in (SHARED, *_copied_names(model.config, layout)))
    for copy in copies:
        weights.setdefault(copy, weights[shared].clone())
    return weights


def _copied_names(config: Florence2Config, layout: Layout) -> Iterable[str]:
    """Return the uses of the token embedding under which the reference of a layout needs a copy of it.

    The transformers releases that can still run Microsoft's code do not tie its output projection. Of the native
    model, some releases take `tie_word_embeddings` for the output alone, some for the embeddings, too.
    """
    if layout == "microsoft":
        return (HEAD,)
    return sorted(TIED_TO_SHARED) if config.text.untied_head or config.text.untied_answers else ()


def _only_dtype(model: Florence2Model) -> torch.dtype:
    """Return the floating-point type of all stored tensors. Raises CheckpointError when there are several."""
    types = {tensor.dtype for tensor in stored_tensors(model).values() if tensor.is_floating_point()}
    if len(types) > 1:
        raise CheckpointError(
            f"The model has weights of several types ({', '.join(sorted(map(str, types)))}), and a checkpoint is "
            "loaded in one; give dtype."
        )
    return types.pop()


def _with_vocabulary_of(layout: Layout, config: Florence2Config) -> Florence2Config:
    """Return the configuration with the number of embedding rows that the layout has.

    The native one needs a row for its `<image>` placeholder and is published padded to a multiple of 64; Microsoft's
    ends with the tokenizer's last token.
    """
    rows, image = config.text.vocab_size, config.image_token_id
    if layout == "native" and (image is None or image >= rows):
        rows, image = _padded(rows), rows
    elif layout == "microsoft" and image is not None:
        rows, image = (image if image < rows <= _padded(image) else rows), None
    return replace(config, text=replace(config.text, vocab_size=rows), image_token_id=image)


def _padded(image_token_id: int) -> int:
    """Return the rows of the native layout: one for each token and the placeholder, to a multiple of 64."""
    return -(-(image_token_id + 1) // 64) * 64


def _fit_rows(canonical: str, tensor: Tensor, rows: int) -> Tensor:
    """Return a token embedding, an output projection or its bias with `rows` entries, others unchanged."""
    if canonical in (SHARED, HEAD, DECODER_EMBEDDING) and len(tensor) < rows:
        # With the mean of all rows, an extra logit is the mean of all logits, far below a trained model's likely ones.
        extra = tensor.mean(dim=0, dtype=torch.float32).to(tensor.dtype).expand(rows - len(tensor), -1)
        return torch.cat([tensor, extra])
    if canonical in (SHARED, HEAD, DECODER_EMBEDDING):
        return tensor[:rows]
    return tensor[:, :rows] if canonical == "final_logits_bias" else tensor


def convert_checkpoint(
    source: Path,
    folder: Path,
    layout: Layout = "microsoft",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    adapter: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    prepare: Prepare | None = None,
    tasks: Iterable[Task] = (),
) -> None:
    """Read a checkpoint of any kind and write it as safetensors, with its tokenizer, image settings and tasks.

    Args:
        source: A folder, a weight file next to its `config.json`, or an index of shards.
        folder: Where to write; it must not hold a checkpoint.
        layout: "microsoft" or "native".
        dtype: The type of the stored weights; None keeps the source's.
        allow_pickle: Accept weights that exist only as a `.bin`.
        adapter: A folder with a LoRA adapter to merge; its tasks are added to the checkpoint's.
        changes: New values of settings of the configuration; see `change_config`.
        prepare: The function that the source is loaded with; see `Prepare`.
        tasks: Further tasks of the model.

    Raises:
        CheckpointError, ConfigError: As `load_model`, `merge_adapter` and `save_checkpoint`, and for a `folder` that
            holds a checkpoint already.
        PromptError: The tasks contradict each other.
    """
    refuse_existing(folder)
    adapter = None if adapter is None else adapter_folder(adapter)
    table = TaskTable(read_tasks(checkpoint_folder(source), adapter)).declared(tasks)
    files = find_weights(source, allow_pickle)
    calibration = choose_calibration(checkpoint_folder(source), adapter, None, changes, prepare)
    model = load_model(
        source, dtype=dtype or stored_dtype(files), allow_pickle=allow_pickle, changes=changes, prepare=prepare
    )
    if adapter is not None:
        merge_adapter(model, adapter)
    with new_files(folder):
        save_checkpoint(model, folder, layout, prepare=prepare)
        copy_companions(checkpoint_folder(source), folder)
        write_tasks(folder, table)
        if calibration.tables:
            write_calibration(folder / CALIBRATION_FILE, of_weights(calibration, model))
        if layout != model.config.layout and (folder / "tokenizer.json").is_file():
            save_tokenizer(FlorenceTokenizer(folder / "tokenizer.json"), folder, layout, model.config)


def save_folder(
    model: Florence2Model,
    tokenizer: FlorenceTokenizer,
    image_config: ImageConfig,
    folder: Path,
    layout: Layout = "microsoft",
    dtype: torch.dtype | None = None,
    prepare: Prepare | None = None,
    tasks: TaskTable | None = None,
    calibration: Calibration = NO_CALIBRATION,
) -> None:
    """Write everything that `load` reads: weights, configuration, tokenizer, settings of generation and images, tasks.

    The arguments and errors are those of `save_checkpoint`; `folder` must not hold a checkpoint.
    """
    refuse_existing(folder)
    with new_files(folder):
        save_checkpoint(model, folder, layout, dtype, prepare)
        save_tokenizer(tokenizer, folder, layout, model.config)
        write_json(folder / "preprocessor_config.json", image_config_to_json(image_config, model.config.vision))
        write_tasks(folder, tasks or ())
        if calibration.tables and is_calibrated(calibration, model):
            write_calibration(folder / CALIBRATION_FILE, of_weights(calibration, model, dtype))


def save_tokenizer(tokenizer: FlorenceTokenizer, folder: Path, layout: Layout, config: Florence2Config) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for a model of `config` in a layout."""
    for name, text in tokenizer.to_files(layout, config.text.max_position_embeddings).items():
        with written_whole(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the image settings and the licence, as far as they exist."""
    for name in COMPANIONS:
        if (source / name).is_file():
            with written_whole(folder / name) as draft:
                shutil.copyfile(source / name, draft)


def refuse_existing(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds a checkpoint, so that it never mixes the files of two."""
    present = [name for name in ("config.json", SAFETENSORS, f"{SAFETENSORS}.index.json") if (folder / name).exists()]
    if present:
        raise CheckpointError(f"{folder} already holds a checkpoint ({', '.join(present)}); choose another folder.")
