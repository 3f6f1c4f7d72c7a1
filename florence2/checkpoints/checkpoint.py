"""A folder or file <-> a model: verified loading, saving, conversion between layouts.

Tensors are renamed between the two layouts by the rules of `layouts`.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.config_files import config_to_json, read_config
from florence2.checkpoints.files import COMPANIONS, SAFETENSORS, write_json
from florence2.checkpoints.files import checkpoint_folder as checkpoint_folder
from florence2.checkpoints.layouts import (
    SHARED,
    TIED_TO_SHARED,
    TRANSPOSED,
    detect_layout,
    from_canonical,
    to_canonical,
)
from florence2.checkpoints.tensors import WeightFiles, find_weights, write_safetensors
from florence2.errors import CheckpointError, ConfigError, Florence2Error
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.attention import AttentionKind
from florence2.model.config import Florence2Config, Layout
from florence2.model.florence2 import Florence2Model

OPTIONAL = frozenset(("final_logits_bias",))
"""Our names of tensors that the native layout does not have; they are zero then."""


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: AttentionKind = "sdpa",
    allow_pickle: bool = False,
) -> Florence2Model:
    """Read a checkpoint of either layout into a model in eval mode.

    `path` is a folder, a weight file with `config.json` beside it, or a shard index. Weights are converted to
    `dtype` one by one, so that the peak is the model's own size and little more. Raises ConfigError, or
    CheckpointError listing everything that is missing, unexpected, misshapen or not finite; then nothing is loaded.
    """
    problems: list[Florence2Error] = []
    try:
        config = read_config(checkpoint_folder(path))
    except ConfigError as error:
        problems.append(error)
    try:
        files = find_weights(path, allow_pickle)
        files.read_headers()
    except CheckpointError as error:
        problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointError("\n".join(map(str, problems)))
    model = _empty_model(config, attention)
    shapes = _shapes(model)
    weights = read_weights(files, shapes, device, dtype)
    if "final_logits_bias" not in weights:
        weights["final_logits_bias"] = torch.zeros(shapes["final_logits_bias"], dtype=dtype, device=device)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _empty_model(config: Florence2Config, attention: AttentionKind = "sdpa") -> Florence2Model:
    """A model of names and shapes alone."""
    with torch.device("meta"), _Unfilled():
        return Florence2Model(config, attention)


def _shapes(model: Florence2Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _Unfilled(TorchFunctionMode):
    """Leaves out the random values of new parameters. On the meta device there are none to draw, and `normal_` makes
    torch import its compiler for it, which takes as long as reading the base checkpoint."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None  # the modules do not look at what these return
        return func(*args, **(kwargs or {}))


def read_weights(
    files: WeightFiles, expected: Mapping[str, tuple[int, ...]], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors by our names, checked against the `expected` shapes. Raises CheckpointError listing all problems."""
    shapes = {name: info.shape for name, info in files.read_headers().items()}
    layout = weights_layout(files, shapes)
    targets = {name: to_canonical(name, layout) for name in shapes}
    problems = _compare(shapes, targets, expected, layout)
    weights: dict[str, Tensor] = {}
    for name, stored in files.read():
        canonical = targets[name]
        canonical = SHARED if canonical in TIED_TO_SHARED else canonical
        if canonical is None or _stored_shape(shapes[name], canonical, layout) != expected.get(canonical):
            continue  # a problem already, and perhaps of a size that nobody foresaw
        if canonical in weights:
            if not _equals(weights[canonical], stored):
                problems.append(
                    f"the token embedding is stored under several names, but {name} differs from the others"
                )
            continue
        tensor = stored.T if canonical in TRANSPOSED[layout] else stored
        tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if not _is_finite(tensor):
            problems.append(f"{name} holds values that are not finite (as {dtype})")
        weights[canonical] = tensor
    if problems:
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{files.paths[0]} does not fit its config.json; nothing was loaded:\n{listing}")
    return weights


def _compare(
    shapes: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, str | None],
    expected: Mapping[str, tuple[int, ...]],
    layout: Layout,
) -> list[str]:
    """What is unexpected, misshapen or missing, a sentence each."""
    problems = []
    for name, canonical in targets.items():
        wanted = expected.get(SHARED if canonical in TIED_TO_SHARED else canonical or "")
        shape = _stored_shape(shapes[name], canonical, layout)
        if wanted is None:
            problems.append(f"unexpected: {name} {list(shapes[name])}")
        elif shape != wanted:
            problems.append(f"misshapen: {name} is {list(shape)}, should be {list(wanted)}")
    present = {SHARED if canonical in TIED_TO_SHARED else canonical for canonical in targets.values()}
    for canonical, wanted in expected.items():
        if canonical not in present and canonical not in OPTIONAL:
            problems.append(f"missing: {from_canonical(canonical, layout)} {list(wanted)}")
    return problems


def find_misfits(files: WeightFiles, config: Florence2Config) -> list[str]:
    """What of `files` is unexpected, misshapen or missing in a model of `config`, a sentence each."""
    shapes = {name: info.shape for name, info in files.read_headers().items()}
    layout = weights_layout(files, shapes)
    targets = {name: to_canonical(name, layout) for name in shapes}
    return _compare(shapes, targets, _shapes(_empty_model(config)), layout)


def stored_names(files: WeightFiles) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor -> the names under which `files` hold it; for a tied one several, its own first.

    A name that no rule knows is listed as "unknown: NAME". Raises CheckpointError when the layout is neither.
    """
    headers = files.read_headers()
    layout = weights_layout(files, headers)
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(headers, key=lambda name: (to_canonical(name, layout) != SHARED, name)):
        canonical = to_canonical(name, layout) or f"unknown: {name}"
        canonical = SHARED if canonical in TIED_TO_SHARED else canonical
        found[canonical] = (*found.get(canonical, ()), name)
    return found


def read_stored(files: WeightFiles, names: Sequence[str]) -> Iterator[Tensor]:
    """The tensors stored under `names`, unchecked, as stored but in our orientation; each valid until the next."""
    layout = weights_layout(files, files.read_headers())
    for name, tensor in zip(names, files.read_named(names), strict=True):
        yield tensor.T if to_canonical(name, layout) in TRANSPOSED[layout] and tensor.ndim == 2 else tensor


def _stored_shape(shape: tuple[int, ...], canonical: str | None, layout: Layout) -> tuple[int, ...]:
    """The shape that a stored tensor has under our name."""
    return shape[::-1] if canonical in TRANSPOSED[layout] else shape


def _is_finite(tensor: Tensor) -> bool:
    """One pass without a temporary: NaN and infinities show in the extremes."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _equals(loaded: Tensor, stored: Tensor, rows: int = 4096) -> bool:
    """Whether `stored`, converted, is `loaded`; by parts, because the token embedding is the largest tensor."""
    return loaded.shape == stored.shape and all(
        torch.equal(loaded[i : i + rows], stored[i : i + rows].to(loaded)) for i in range(0, len(stored), rows)
    )


def weights_layout(files: WeightFiles, names: Iterable[str]) -> Layout:
    """The layout of the tensor `names` in `files`. Raises CheckpointError when it is neither of Florence-2's."""
    layout = detect_layout(names)
    if layout is None:
        some = ", ".join(list(names)[:3]) or "none at all"
        raise CheckpointError(
            f"{files.paths[0]} is in neither layout of Florence-2: no image_projection among its tensors ({some}, ...)."
        )
    return layout


def stored_dtype(files: WeightFiles) -> torch.dtype:
    """The type in which most of the values are stored."""
    counts: Counter[torch.dtype] = Counter()
    for info in files.read_headers().values():
        assert info.dtype is not None
        counts[info.dtype] += math.prod(info.shape)
    return counts.most_common(1)[0][0]


def save_checkpoint(
    model: Florence2Model, folder: Path, layout: Layout = "microsoft", dtype: torch.dtype | None = None
) -> None:
    """Write `model` to `folder`: weights, `config.json` and, in the native layout, `generation_config.json`.

    The files load in the reference of that layout. `dtype` None keeps the model's. Tokenizer and preprocessor
    settings are not the model's to write; `copy_companions` brings them. Raises CheckpointError when the layout or
    the type has no place for a value; then nothing is written.
    """
    if model.lm_head is not None:
        raise CheckpointError(
            "An adapter has changed the output projection, which both layouts share with the token embedding, so this "
            "model cannot be written; give the adapter whenever the model is loaded."
        )
    dtype = dtype or model.dtype
    config = _with_vocabulary_of(layout, model.config)
    weights: dict[str, Tensor] = {}
    for canonical, tensor in model.state_dict().items():
        tensor = _fit_rows(canonical, tensor, config.text.vocab_size).to("cpu", dtype)
        if not _is_finite(tensor):
            raise CheckpointError(
                f"{canonical} does not fit into {dtype}: some values become infinite; choose another type."
            )
        name = from_canonical(canonical, layout)
        if name is not None:
            weights[name] = tensor.T if canonical in TRANSPOSED[layout] else tensor
        elif tensor.any():
            raise CheckpointError(f"{canonical} is not zero everywhere, and the {layout} layout has no place for it.")
    if layout == "microsoft":  # its code does not tie the two under the transformers releases that can still run it
        weights["language_model.lm_head.weight"] = weights["language_model.model.shared.weight"].clone()
    config_json, generation_json = config_to_json(config, layout, str(dtype).removeprefix("torch."))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / SAFETENSORS, weights)
    write_json(folder / "config.json", config_json)
    if generation_json:
        write_json(folder / "generation_config.json", generation_json)


def _with_vocabulary_of(layout: Layout, config: Florence2Config) -> Florence2Config:
    """The configuration with the number of embedding rows that the layout has.

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
    return -(-(image_token_id + 1) // 64) * 64


def _fit_rows(canonical: str, tensor: Tensor, rows: int) -> Tensor:
    """The token embedding or its bias with `rows` entries; other tensors as they are."""
    if canonical == SHARED and len(tensor) < rows:
        # The mean of all rows: such a logit is the mean of all others, far below a trained model's likely ones.
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
    """Read a checkpoint of any kind and write it to `folder` as safetensors in `layout`, with `adapter` merged.

    `dtype` None keeps the stored type. The tokenizer and preprocessor settings beside the source come along.
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
    """Copy what belongs beside the weights, as far as it is there: tokenizer, preprocessor settings, licence."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def refuse_existing(folder: Path) -> None:
    """A folder is not to hold the files of two checkpoints. Raises CheckpointError where it would."""
    present = [name for name in ("config.json", SAFETENSORS, f"{SAFETENSORS}.index.json") if (folder / name).exists()]
    if present:
        raise CheckpointError(f"{folder} holds a checkpoint already ({', '.join(present)}); choose another folder.")
