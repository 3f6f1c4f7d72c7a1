"""The shape of a model as frozen dataclasses, the check that a shape can be built, and changes of single settings.

One `Florence2Config` serves both layouts in which checkpoints are published; `checkpoints.config_files` reads and
writes their `config.json`. Only what the reference itself takes for granted has a default.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from florence2.errors import ConfigError, ImageError, PromptError, listing, plain, shown

Layout = Literal["microsoft", "native"]
FEATURE_SOURCES = ("spatial_avg_pool", "temporal_avg_pool", "last_frame")
ACTIVATION_NAMES = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
"""The keys of `model.attention.ACTIVATIONS`."""
GENERATION_SETTINGS = (
    "num_beams",
    "max_new_tokens",
    "min_new_tokens",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "num_return_sequences",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
"""The settings of `GenerationOptions` that a checkpoint may state."""
MAX_LAYERS = 512  # per stack; published models have 12. Keeps a hostile file from building millions of modules.
MAX_SIZE = 1 << 20  # of any one dimension; the largest published is the vocabulary of 51,328
MAX_STAGES = 8  # published models have 4
MAX_WINDOW = 64  # published models have 12; the work of an image grows with the square of the window's side
MAX_FEATURE_SOURCES = 8  # each adds its own image tokens; published models have 2
MAX_NUMBER = 1 << 53  # of any setting, so that it can become a float
MAX_PATCH = 256  # pixels of a patch, its stride and its padding; padding costs memory at once
MAX_CHANNELS = 1 << 14  # of a stage
MAX_FRAMES = 1 << 12  # rows of the one table that is computed, not read
_MOST = {"window_size": MAX_WINDOW, "dim_embed": MAX_CHANNELS, "max_temporal_embeddings": MAX_FRAMES}
_MOST |= dict.fromkeys(("patch_size", "patch_stride", "patch_padding"), MAX_PATCH)
_LEAST = {"patch_padding": 0}


@dataclass(frozen=True)
class VisionConfig:
    """DaViT and the projection after it. Tuples hold one entry per stage; sizes are in channels or pixels."""

    dim_embed: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_groups: tuple[int, ...]
    patch_size: tuple[int, ...]
    patch_stride: tuple[int, ...]
    patch_padding: tuple[int, ...]
    patch_prenorm: tuple[bool, ...]
    window_size: int
    projection_dim: int
    max_position_embeddings: int
    """Rows, and also columns, of the learned position table: the largest grid in either direction."""
    max_temporal_embeddings: int
    image_feature_source: tuple[str, ...]
    drop_path_rate: float = 0.0
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    activation_function: str = "gelu"

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (rows, columns) of positions that the last stage makes of `height` x `width` pixels."""
        for size, stride, padding in zip(self.patch_size, self.patch_stride, self.patch_padding, strict=True):
            height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        return height, width

    def image_tokens(self, height: int, width: int) -> int:
        """Return the number of image tokens of `height` x `width` pixels."""
        rows, columns = self.grid_size(height, width)
        # the mean over the grid is one token; the other ways of pooling keep one for each position
        return sum(1 if source == "spatial_avg_pool" else rows * columns for source in self.image_feature_source)


@dataclass(frozen=True)
class TextConfig:
    """BART's encoder and decoder, and the ids of its special tokens."""

    vocab_size: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    max_position_embeddings: int
    scale_embedding: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int = 2
    activation_function: str = "gelu"
    untied_head: bool = False
    """Whether the output projection has a weight of its own, not the token embedding's."""
    untied_answers: bool = False
    """Whether the tokens of answers have an embedding of their own, not that of prompts."""


@dataclass(frozen=True)
class Florence2Config:
    """Everything that `config.json` (and, in the native layout, `generation_config.json`) says.

    `generation` holds only the settings that the files state, by the names of `GenerationOptions`.
    """

    vision: VisionConfig
    text: TextConfig
    generation: Mapping[str, Any]
    layout: Layout = "microsoft"
    image_token_id: int | None = None
    """The native layout's id of its `<image>` placeholder, above the ids of the tokenizer; unused here."""
    prepared_by: str | None = None
    """The name of the function that shapes the model besides this configuration, MODULE:FUNCTION; it is only shown."""


STAGE_TUPLES = ("dim_embed", "depths", "num_heads", "num_groups", "patch_size", "patch_stride", "patch_padding")
"""The fields of `VisionConfig` that hold one whole number per stage."""


def find_problems(vision: VisionConfig, text: TextConfig) -> list[str]:
    """Return a sentence for each reason why no model of this shape can be built; none when one can."""
    activations = [
        f"{section}.activation_function is {shown(part.activation_function)}; "
        f"it must be one of {', '.join(ACTIVATION_NAMES)}"
        for section, part in (("vision_config", vision), ("text_config", text))
        if part.activation_function not in ACTIVATION_NAMES
    ]
    return _check_vision(vision) + _check_text(text, vision) + activations


def _check_vision(vision: VisionConfig) -> list[str]:
    """Return the problems of single values or, where there are none, of how the values fit together."""
    stages = len(vision.dim_embed)
    problems = [
        f"vision_config.{key} has {len(getattr(vision, key))} entries for {stages} stages, 1 to {MAX_STAGES} in number"
        for key in (*STAGE_TUPLES, "patch_prenorm")
        if len(getattr(vision, key)) != stages or not 1 <= stages <= MAX_STAGES
    ]
    for key in STAGE_TUPLES:
        problems += _out_of_range("vision_config", key, *getattr(vision, key))
    for key in ("window_size", "projection_dim", "max_position_embeddings", "max_temporal_embeddings"):
        problems += _out_of_range("vision_config", key, getattr(vision, key))
    if problems:
        return problems
    for key in ("num_heads", "num_groups"):
        parts = getattr(vision, key)
        if any(dim % part for dim, part in zip(vision.dim_embed, parts, strict=True)):
            problems.append(f"vision_config.dim_embed {list(vision.dim_embed)} is not divisible by {key} {list(parts)}")
    if sum(vision.depths) > MAX_LAYERS:
        problems.append(f"vision_config.depths ask for {sum(vision.depths)} blocks; the limit is {MAX_LAYERS}")
    if vision.dim_embed[-1] % 2:
        problems.append(f"vision_config.dim_embed ends in {vision.dim_embed[-1]}; that must be even: half for columns")
    if not 0 < vision.mlp_ratio <= MAX_LAYERS:
        problems.append(f"vision_config.mlp_ratio is {vision.mlp_ratio}; it must be above 0 and at most {MAX_LAYERS}")
    if not 0 <= vision.drop_path_rate < 1:
        problems.append(f"vision_config.drop_path_rate is {vision.drop_path_rate}; it must be 0 or more and below 1")
    unknown = [source for source in vision.image_feature_source if source not in FEATURE_SOURCES]
    if unknown or not 1 <= len(vision.image_feature_source) <= MAX_FEATURE_SOURCES:
        problems.append(
            f"vision_config.image_feature_source is {shown(list(vision.image_feature_source))}; it must name 1 to "
            f"{MAX_FEATURE_SOURCES} of {', '.join(FEATURE_SOURCES)}"
        )
    return problems


def _check_text(text: TextConfig, vision: VisionConfig) -> list[str]:
    problems = []
    for key in ("vocab_size", "d_model", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"):
        problems += _out_of_range("text_config", key, getattr(text, key))
    for side in ("encoder", "decoder"):
        heads, layers = getattr(text, f"{side}_attention_heads"), getattr(text, f"{side}_layers")
        if heads < 1 or text.d_model % heads:
            problems.append(f"text_config.d_model {text.d_model} is not divisible by {heads} {side}_attention_heads")
        if not 1 <= layers <= MAX_LAYERS:
            problems.append(f"text_config.{side}_layers is {layers}; it must be 1 to {MAX_LAYERS}")
    for key in ("dropout", "attention_dropout", "activation_dropout"):
        if not 0 <= getattr(text, key) <= 1:
            problems.append(f"text_config.{key} is {getattr(text, key)}; it must be 0 to 1")
    if vision.projection_dim != text.d_model:
        problems.append(
            f"vision_config.projection_dim {vision.projection_dim} is not text_config.d_model {text.d_model}"
        )
    for key in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(text, key) >= text.vocab_size:
            problems.append(f"text_config.{key} {getattr(text, key)} is outside the vocabulary of {text.vocab_size}")
    return problems


def _out_of_range(section: str, key: str, *sizes: int) -> list[str]:
    least, most = _LEAST.get(key, 1), _MOST.get(key, MAX_SIZE)
    wrong = [size for size in sizes if not least <= size <= most]
    return [f"{section}.{key} is {shown(size)}; it must be {least} to {most}" for size in wrong]


# ---- changes of single settings -------------------------------------------------------------------------------------


def change_config(config: Florence2Config, changes: Mapping[str, Any]) -> Florence2Config:
    """Return a configuration with some settings changed, as if its file had stated them.

    Args:
        config: The configuration to start from; it is not changed.
        changes: New values by dotted name: "vision." and a field of `VisionConfig`, "text." and a field of
            `TextConfig`, or "generation." and a generation setting, where None leaves the setting unstated. Lists
            stand for tuples.

    Raises:
        ConfigError: A name is unknown, a value is of the wrong type or out of range, or no model of the new shape can
            be built; everything that is wrong is listed.
    """
    if not isinstance(changes, Mapping):
        raise ConfigError(f'changes is {shown(changes)}; give names and values, such as {{"vision.window_size": 8}}.')
    types = _setting_types()
    problems = [_unknown_setting(str(name), types) for name in changes if name not in types]
    new = {name: _fit(name, types[name], value, problems) for name, value in changes.items() if name in types}
    generation = {**config.generation, **_section("generation", new)}
    changed = replace(
        config,
        vision=replace(config.vision, **_section("vision", new)),
        text=replace(config.text, **_section("text", new)),
        generation={name: value for name, value in generation.items() if value is not None},
    )
    if not problems:
        problems += find_problems(changed.vision, changed.text)
    if problems:
        raise ConfigError("The configuration cannot be changed this way: " + listing(problems, "; ") + ".")
    return changed


def _setting_types() -> dict[str, Any]:
    """Return the type of every setting that can be changed, by its dotted name."""
    sections = {"vision": get_type_hints(VisionConfig), "text": get_type_hints(TextConfig)}
    sections["generation"] = dict.fromkeys(GENERATION_SETTINGS, Any)  # `GenerationOptions` checks their values
    return {f"{section}.{key}": kind for section, types in sections.items() for key, kind in types.items()}


def _section(section: str, new: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{section}."
    return {name.removeprefix(prefix): value for name, value in new.items() if name.startswith(prefix)}


def _unknown_setting(name: str, known: Mapping[str, Any]) -> str:
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=2) or [
        other for other in known if difflib.get_close_matches(last, [other.partition(".")[2]])
    ]
    hint = f"the nearest is {' or '.join(near)}" if near else "names begin with vision., text. or generation."
    return f"{name!r} is an unknown setting; {hint}"


def _fit(name: str, kind: Any, value: Any, problems: list[str]) -> Any:
    """Return `value` as the type that a setting has in the configuration; note a problem where it has another."""
    value = plain(value)
    if kind is Any:
        return value
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        values = [as_kind(item, plain(each)) for each in value] if isinstance(value, list | tuple) else [None]
        if all(type(each) is item for each in values):
            return tuple(values)
        problems.append(f"{name} must be a list of {item.__name__}, not {shown(value)}")
        return ()
    value = as_kind(kind, value)
    if type(value) is not kind:
        problems.append(f"{name} must be {kind.__name__}, not {shown(value)}")
    elif kind in (int, float) and not 0 <= value <= MAX_NUMBER:
        problems.append(f"{name} must be a number from 0 to 2**53, but is {shown(value)}")
    return value


def as_kind(kind: type, value: Any) -> Any:
    """Turn a whole number into the float that is wanted; return other values, and those too large, unchanged."""
    return float(value) if kind is float and type(value) is int and abs(value) <= MAX_NUMBER else value


def check_grid(h: int, w: int, size: int) -> None:
    """Raise ImageError for a grid that is empty or larger than a table of `size` rows and columns."""
    if not (1 <= h <= size and 1 <= w <= size):
        raise ImageError(
            f"The image gives a grid of {h} x {w} positions, but this checkpoint knows 1 x 1 to {size} x {size}; "
            "use another image size."
        )


def check_positions(count: int, limit: int) -> None:
    """Raise PromptError for more positions than a table of `limit` has."""
    if count > limit:
        raise PromptError(
            f"{count} positions (image tokens count too) are more than the {limit} of this checkpoint; "
            "shorten the text."
        )
