"""From files to a model and back: strict loading, saving, conversion between layouts.

The model uses canonical names; `layouts` has the rules between them and the names in files.
"""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.config_files import config_to_json, read_config
from florence2.checkpoints.describe import stored_dtype, weights_layout
from florence2.checkpoints.files import COMPANIONS, SAFETENSORS, write_json
from florence2.checkpoints.files import checkpoint_folder as checkpoint_folder
from florence2.checkpoints.layouts import (
    ENCODER_EMBEDDING,
    SHARED,
    TRANSPOSED,
    from_canonical,
    to_canonical,
    untied,
)
from florence2.checkpoints.tensors import TensorInfo, WeightFiles, equals, find_weights, is_finite, write_safetensors
from florence2.devices import Parts, check_loading
from florence2.errors import CheckpointError, ConfigError, Florence2Error
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.absent import Absent, require_complete
from florence2.model.attention import AttentionKind
from florence2.model.config import Florence2Config, Layout
from florence2.model.florence2 import Florence2Model

OPTIONAL = frozenset(("final_logits_bias",))
"""Canonical names of tensors that the native layout does not have; they are zero then."""


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    attention: AttentionKind = "sdpa",
    parts: Parts = "all",
    allow_pickle: bool = False,
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

    Raises:
        OptionError: A setting has a wrong value; no file was read.
        ConfigError: The configuration is missing or describes something this project does not implement.
        CheckpointError: Tensors of the wanted parts are missing, or tensors are unexpected, misshapen or not finite;
            all are listed, and nothing is loaded.
    """
    place, dtype = check_loading(device, dtype, attention, parts, exact=True)
    problems: list[Florence2Error] = []
    try:
        config = read_config(checkpoint_folder(path))
    except ConfigError as error:
        problems.append(error)
    try:
        files = find_weights(path, allow_pickle)
        headers = files.read_headers()
    except CheckpointError as error:
        problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointError("\n".join(map(str, problems)))
    model = _empty_model(config, attention)
    expected = _shapes(model)
    _leave_out(model, parts)
    wanted = _shapes(model)
    weights = read_weights(files, headers, expected, wanted, place, dtype)
    for name in OPTIONAL & (wanted.keys() - weights.keys()):
        weights[name] = torch.zeros(wanted[name], dtype=dtype, device=place)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


_LEFT_OUT: dict[Parts, dict[str, str]] = {
    "all": {},
    "encoder": {"language_model.decoder": "text decoder", "final_logits_bias": "output bias"},
    "vision": {"language_model": "language model", "final_logits_bias": "output bias"},
}


def _leave_out(model: Florence2Model, parts: Parts) -> None:
    """Replace modules outside of `parts` by an `Absent`, which holds no tensors."""
    for path, name in _LEFT_OUT[parts].items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Absent(name, parts))


def _empty_model(config: Florence2Config, attention: AttentionKind = "sdpa") -> Florence2Model:
    """Build a model of names and shapes, without values."""
    with torch.device("meta"), _Unfilled():
        return Florence2Model(config, attention)


def _shapes(model: Florence2Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _Unfilled(TorchFunctionMode):
    """A mode in which new parameters get no random values.

    The meta device has none to draw, and `normal_` makes torch import its compiler there, which takes as long as
    reading the base checkpoint.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None  # the modules ignore the results of these functions
        return func(*args, **(kwargs or {}))


def read_weights(
    files: WeightFiles,
    headers: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    wanted: Collection[str],
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Read the `wanted` tensors by canonical name. Raises CheckpointError listing all problems.

    `headers` are those of `files`. `expected` holds the shape of every tensor of the model; the values of those that
    are not wanted are not read.
    """
    shapes = {name: info.shape for name, info in headers.items()}
    layout = weights_layout(files, shapes)
    targets = {name: to_canonical(name, layout) for name in shapes}
    problems = _compare(shapes, targets, expected, wanted, layout)
    weights: dict[str, Tensor] = {}
    for name, stored in files.read(_names_to_read(targets, wanted, complete=len(wanted) == len(expected))):
        canonical = untied(targets[name])
        assert canonical is not None
        if _stored_shape(shapes[name], canonical, layout) != expected[canonical]:
            continue  # reported already; a tensor of an unforeseen size is not worth converting
        if canonical in weights:
            if not equals(weights[canonical], stored):
                problems.append(f"the token embedding is stored under several names, but {name} has other values")
            continue
        tensor = stored.T if canonical in TRANSPOSED[layout] else stored
        # a copy, because `stored` is valid only until the next tensor is read
        tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if not is_finite(tensor):
            problems.append(f"{name} holds values that are not finite (as {dtype})")
        weights[canonical] = tensor
    if problems:
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{files.paths[0]} does not fit its config.json; nothing was loaded:\n{listing}")
    return weights


def _names_to_read(targets: Mapping[str, str | None], wanted: Collection[str], complete: bool) -> set[str]:
    """Choose the stored names whose values are read.

    For a complete model every copy of the token embedding is read, to check that they are equal. For a part of a model
    only the copies that the part uses are read, or any one where the file holds none of these.
    """
    names = {name for name, canonical in targets.items() if untied(canonical) in wanted}
    if complete:
        return names
    copies = sorted(name for name in names if untied(targets[name]) == SHARED)
    own = [name for name in copies if targets[name] in (SHARED, ENCODER_EMBEDDING)]
    return names.difference(copies).union(own or copies[:1])


def _compare(
    shapes: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, str | None],
    expected: Mapping[str, tuple[int, ...]],
    wanted: Collection[str],
    layout: Layout,
) -> list[str]:
    """List unexpected, misshapen and missing tensors, a sentence each."""
    problems = []
    for name, canonical in targets.items():
        needed = expected.get(untied(canonical) or "")
        shape = _stored_shape(shapes[name], canonical, layout)
        if needed is None:
            problems.append(f"unexpected: {name} {list(shapes[name])}")
        elif shape != needed:
            problems.append(f"misshapen: {name} is {list(shape)}, should be {list(needed)}")
    present = {untied(canonical) for canonical in targets.values()}
    for canonical, needed in expected.items():
        if canonical in wanted and canonical not in present and canonical not in OPTIONAL:
            problems.append(f"missing: {from_canonical(canonical, layout)} {list(needed)}")
    return problems


def find_misfits(files: WeightFiles, config: Florence2Config) -> list[str]:
    """List what of `files` is unexpected, misshapen or missing in a model of `config`, a sentence each."""
    shapes = {name: info.shape for name, info in files.read_headers().items()}
    layout = weights_layout(files, shapes)
    targets = {name: to_canonical(name, layout) for name in shapes}
    expected = _shapes(_empty_model(config))
    return _compare(shapes, targets, expected, expected, layout)


def _stored_shape(shape: tuple[int, ...], canonical: str | None, layout: Layout) -> tuple[int, ...]:
    """Return the shape that a stored tensor has under its canonical name."""
    return shape[::-1] if canonical in TRANSPOSED[layout] else shape


def save_checkpoint(
    model: Florence2Model, folder: Path, layout: Layout = "microsoft", dtype: torch.dtype | None = None
) -> None:
    """Write the weights and the configuration of a model; the reference of the layout loads them.

    Tokenizer and image settings do not belong to the model; `copy_companions` copies them.

    Args:
        model: A complete model.
        folder: Where to write; it is created.
        layout: "microsoft" or "native", which has a `generation_config.json` in addition to `config.json`.
        dtype: The type of the stored weights; None keeps the model's.

    Raises:
        CheckpointError: The layout or the type has no place for a value; nothing is written.
        ConfigError: The layout has no place for a setting; nothing is written.
        Florence2Error: The model was loaded without some of its parts.
    """
    require_complete(model)
    if model.lm_head is not None:
        raise CheckpointError(
            "An adapter has changed the output projection, which both layouts share with the token embedding, so this "
            "model cannot be saved; load the original checkpoint with the adapter instead."
        )
    dtype = dtype or model.dtype
    config = _with_vocabulary_of(layout, model.config)
    weights = _stored_weights(model, config.text.vocab_size, layout, dtype)
    config_json, generation_json = config_to_json(config, layout, str(dtype).removeprefix("torch."))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / SAFETENSORS, weights)
    write_json(folder / "config.json", config_json)
    if generation_json:
        write_json(folder / "generation_config.json", generation_json)


def _stored_weights(model: Florence2Model, rows: int, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of `model` as the layout stores them, with `rows` embeddings. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    for canonical, tensor in model.state_dict().items():
        tensor = _fit_rows(canonical, tensor, rows).to("cpu", dtype)
        if not is_finite(tensor):
            raise CheckpointError(
                f"{canonical} does not fit into {dtype}: some values would not be finite; choose another type."
            )
        name = from_canonical(canonical, layout)
        if name is not None:
            weights[name] = tensor.T if canonical in TRANSPOSED[layout] else tensor
        elif tensor.any():
            raise CheckpointError(f"{canonical} is not zero everywhere, and the {layout} layout has no place for it.")
    if layout == "microsoft":  # the transformers releases that can still run its code do not tie the two
        weights["language_model.lm_head.weight"] = weights["language_model.model.shared.weight"].clone()
    return weights


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
    """Return the token embedding or its bias with `rows` entries, and any other tensor unchanged."""
    if canonical == SHARED and len(tensor) < rows:
        # With the mean of all rows, an extra logit is the mean of all logits, far below a trained model's likely ones.
        extra = tensor.mean(dim=0, dtype=torch.float32).to(tensor.dtype).expand(rows - len(tensor), -1)
        return torch.cat([tensor, extra])
    if canonical == SHARED:
        return tensor[:rows]
    return tensor[:, :rows] if canonical == "final_logits_bias" else tensor


def convert_checkpoint(
    source: Path,
    folder: Path,
    layout: Layout = "microsoft",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    adapter: Path | None = None,
) -> None:
    """Read a checkpoint of any kind and write it as safetensors, with its tokenizer and image settings.

    Args:
        source: A folder, a weight file next to its `config.json`, or an index of shards.
        folder: Where to write; it must not hold a checkpoint.
        layout: "microsoft" or "native".
        dtype: The type of the stored weights; None keeps the source's.
        allow_pickle: Accept weights that exist only as a `.bin`.
        adapter: A folder with a LoRA adapter to merge.

    Raises:
        CheckpointError, ConfigError: As `load_model`, `merge_adapter` and `save_checkpoint`, and for a `folder` that
            holds a checkpoint already.
    """
    refuse_existing(folder)
    files = find_weights(source, allow_pickle)
    model = load_model(source, dtype=dtype or stored_dtype(files), allow_pickle=allow_pickle)
    if adapter is not None:
        merge_adapter(model, adapter)
    save_checkpoint(model, folder, layout)
    copy_companions(checkpoint_folder(source), folder)
    if layout != model.config.layout and (folder / "tokenizer.json").is_file():
        tokenizer = FlorenceTokenizer(folder / "tokenizer.json")
        save = tokenizer.save_native if layout == "native" else tokenizer.save_microsoft
        save(folder, model.config.text.max_position_embeddings)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the image settings and the licence, as far as they exist."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def refuse_existing(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds a checkpoint, so that it never mixes the files of two."""
    present = [name for name in ("config.json", SAFETENSORS, f"{SAFETENSORS}.index.json") if (folder / name).exists()]
    if present:
        raise CheckpointError(f"{folder} already holds a checkpoint ({', '.join(present)}); choose another folder.")
