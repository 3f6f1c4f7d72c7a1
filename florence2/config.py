"""The shape of a checkpoint: frozen dataclasses, read from the `config.json` of either layout.

Two layouts exist. Microsoft's (`microsoft/Florence-2-*`) names the stage widths `dim_embed` and keeps the
generation settings in `text_config`; the native one of transformers (`florence-community/Florence-2-*`) says
`embed_dim` and keeps them in `generation_config.json`. Both become the same `Florence2Config`.

A size that the file does not state is an error, and so is a field that nobody here knows, because ignoring either
would run another model than the one that was trained. Only what the reference itself takes for granted has a default.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from florence2.errors import ConfigError
from florence2.strict_json import Fields, read_json, shown

Layout = Literal["microsoft", "native"]
FEATURE_SOURCES = ("spatial_avg_pool", "temporal_avg_pool", "last_frame")
MAX_LAYERS = 512  # per stack; published models have 12. Keeps a hostile file from building millions of modules.
MAX_SIZE = 1 << 20  # of any one dimension; the largest published is the vocabulary of 51,328
# Lower ones for what pads the picture or the grid, and for the one table that is computed and not read.
_MOST = {"window_size": 256, "patch_size": 256, "patch_stride": 256, "patch_padding": 256}
_MOST |= {"dim_embed": 1 << 14, "max_temporal_embeddings": 1 << 12}
_LEAST = {"patch_padding": 0}


@dataclass(frozen=True)
class VisionConfig:
    """DaViT and the projection behind it. Tuples hold one entry per stage; sizes are in channels or pixels."""

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

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """The (rows, columns) of positions that the last stage makes of `height` x `width` pixels."""
        for size, stride, padding in zip(self.patch_size, self.patch_stride, self.patch_padding, strict=True):
            height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        return height, width


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


# Fields that transformers writes beside the architecture and that change nothing of what the model computes here.
_INERT = frozenset(
    """
    _attn_implementation_autoset _attn_implementation _commit_hash _from_model_config _name_or_path
    _experts_implementation_autoset architectures attn_implementation auto_map chunk_size_feed_forward
    classif_dropout classifier_dropout dtype enable_checkpoint finetuning_task gradient_checkpointing id2label
    ignore_index init_std initializer_range is_decoder is_encoder_decoder label2id max_length
    num_hidden_layers num_labels output_attentions output_hidden_states output_logits output_scores prefix
    problem_type return_dict return_dict_in_generate sep_token_id task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version transformers.js_config
    typical_p use_bfloat16 use_cache
    """.split()
)

# Fields that would change the computation, with the only value that this project implements (and the reference uses).
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu",),
    "add_bias_logits": (False,),
    "add_cross_attention": (False, None),
    "add_final_layer_norm": (False,),
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "cross_attention_hidden_size": (None,),
    "decoder_layerdrop": (0,),
    "diversity_penalty": (0, None),
    "do_sample": (False, None),
    "encoder_layerdrop": (0,),
    "encoder_no_repeat_ngram_size": (0, None),
    "exponential_decay_length_penalty": (None,),
    "in_channels": (3,),
    "min_length": (0, None),
    "normalize_before": (False,),
    "num_beam_groups": (1, None),
    "pruned_heads": ({}, None),
    "remove_invalid_values": (False, None),
    "suppress_tokens": (None,),
    "tie_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
}

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

_ARRAYS = ("dim_embed", "depths", "num_heads", "num_groups", "patch_size", "patch_stride", "patch_padding")


def read_config(folder: Path) -> Florence2Config:
    """Read `config.json` of `folder`, in either layout. Raises ConfigError listing every problem found."""
    path = folder / "config.json"
    values = read_json(path)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    try:
        return parse_config(values, generation)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Florence2Config:
    """A `config.json` as a dict, and the `generation_config.json` beside it, -> Florence2Config.

    Microsoft's layout takes its generation settings from `text_config` and ignores `generation_config.json`, as the
    reference does; the native layout does the opposite.
    """
    problems: list[str] = []
    top = Fields("config", values, problems)
    vision_fields = Fields("vision_config", top.take("vision_config", dict), problems)
    text_fields = Fields("text_config", top.take("text_config", dict), problems)
    layout: Layout = "native" if "embed_dim" in vision_fields.values else "microsoft"
    _check_model_types(layout, top, vision_fields, text_fields, problems)
    vision = _read_vision(layout, vision_fields)
    text = _read_text(text_fields)
    stated = _take_generation(text_fields)
    if layout == "native":
        own_file = Fields("generation_config", generation or {}, problems)
        stated = _take_generation(own_file)
        # its other settings matter only where they would change the search
        own_file.values = {key: value for key, value in own_file.values.items() if key in _FIXED}
        own_file.finish(_INERT, _FIXED)
    image_token_id = top.take("image_token_id", int, None) if layout == "native" else None
    for key in ("projection_dim", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        top.values.pop(key, None)  # stated a second time; the nested objects decide, as in the reference
    for fields in (top, vision_fields, text_fields):
        fields.finish(_INERT, _FIXED)
    if not problems:
        problems += _check_vision(vision) + _check_text(text, vision)
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    return Florence2Config(vision, text, stated, layout, image_token_id)


def config_to_json(config: Florence2Config, layout: Layout, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Florence2Config -> (`config.json`, `generation_config.json`) of the wanted layout.

    `dtype` is the name of the stored type, such as "float16". The files load in the reference of that layout.
    """
    vision, text, generation = _plain(config.vision), _plain(config.text), dict(config.generation)
    ids = {key: text[key] for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    top: dict[str, Any] = {"architectures": ["Florence2ForConditionalGeneration"], "model_type": "florence2", **ids}
    top |= {"is_encoder_decoder": True}
    text |= {"activation_function": "gelu", "is_encoder_decoder": True}
    if layout == "microsoft":
        for key in ("mlp_ratio", "qkv_bias"):  # fixed at 4 and True by the code that reads this layout
            if vision.pop(key) != {"mlp_ratio": 4.0, "qkv_bias": True}[key]:
                raise ConfigError(f"vision_config.{key} other than the usual one has no place in Microsoft's layout.")
        vision |= {
            "model_type": "davit",
            "image_pos_embed": {
                "type": "learned_abs_2d",
                "max_pos_embeddings": vision.pop("max_position_embeddings"),
            },
            "visual_temporal_embedding": {
                "type": "COSINE",
                "max_temporal_embeddings": vision.pop("max_temporal_embeddings"),
            },
        }
        top |= {"projection_dim": vision["projection_dim"], "vocab_size": text["vocab_size"], "torch_dtype": dtype}
        text |= {"num_hidden_layers": text["encoder_layers"], **generation}
        return {**top, "text_config": text, "vision_config": vision}, {}
    if config.vision.image_feature_source != FEATURE_SOURCES[:2]:
        raise ConfigError(
            f"image_feature_source {list(config.vision.image_feature_source)} has no place in the native layout, "
            f"which always uses {list(FEATURE_SOURCES[:2])}."
        )
    del vision["image_feature_source"]
    vision |= {"model_type": "florence_vision", "embed_dim": vision.pop("dim_embed"), "activation_function": "gelu"}
    generation |= {**ids, "decoder_start_token_id": text["decoder_start_token_id"]}
    text |= {"model_type": "bart", "tie_word_embeddings": True}
    if config.image_token_id is not None:
        top["image_token_id"] = config.image_token_id
    return {
        **top,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "text_config": text,
        "vision_config": vision,
    }, generation


def _check_model_types(layout: Layout, top: Fields, vision: Fields, text: Fields, problems: list[str]) -> None:
    vision_type = "davit" if layout == "microsoft" else "florence_vision"
    text_types = ("florence2_language", "bart", "")
    for fields, known in ((top, ("florence2",)), (vision, (vision_type, "")), (text, text_types)):
        found = fields.values.pop("model_type", "" if fields is not top else None)
        if found not in known:
            problems.append(
                f"{fields.name}.model_type is {shown(found)}, not {known[0]!r}: not a Florence-2 checkpoint"
            )


def _read_vision(layout: Layout, fields: Fields) -> VisionConfig:
    if layout == "native":
        fields.values["dim_embed"] = fields.values.pop("embed_dim")
        positions, frames = fields, fields
        position_key, sources = "max_position_embeddings", FEATURE_SOURCES[:2]
    else:
        positions = Fields("image_pos_embed", fields.take("image_pos_embed", dict), fields.problems)
        frames = Fields("visual_temporal_embedding", fields.take("visual_temporal_embedding", dict), fields.problems)
        position_key, sources = "max_pos_embeddings", fields.take_tuple("image_feature_source", str)
        for part, known in ((positions, "learned_abs_2d"), (frames, "COSINE")):
            found = part.values.pop("type", None)
            if found != known:
                fields.problems.append(f"{part.name}.type is {shown(found)}; only {known!r} is implemented")
    config = VisionConfig(
        **{key: fields.take_tuple(key, int) for key in _ARRAYS},
        patch_prenorm=fields.take_tuple("patch_prenorm", bool),
        window_size=fields.take("window_size", int),
        projection_dim=fields.take("projection_dim", int),
        max_position_embeddings=positions.take(position_key, int),
        max_temporal_embeddings=frames.take("max_temporal_embeddings", int),
        image_feature_source=sources,
        drop_path_rate=fields.take("drop_path_rate", float, 0.0),
        mlp_ratio=fields.take("mlp_ratio", float, 4.0) if layout == "native" else 4.0,
        qkv_bias=fields.take("qkv_bias", bool, True) if layout == "native" else True,
    )
    if layout == "microsoft":
        positions.finish(_INERT, _FIXED)
        frames.finish(_INERT, _FIXED)
    return config


def _read_text(fields: Fields) -> TextConfig:
    required = {
        key: fields.take(key, int)
        for key in (
            "vocab_size",
            "d_model",
            "encoder_layers",
            "encoder_attention_heads",
            "encoder_ffn_dim",
            "decoder_layers",
            "decoder_attention_heads",
            "decoder_ffn_dim",
            "max_position_embeddings",
        )
    }
    rates = {key: fields.take(key, float, 0.0) for key in ("dropout", "attention_dropout", "activation_dropout")}
    # transformers leaves these ids out of the file where they are BART's own
    ids = {
        key: fields.take(key, int, usual)
        for key, usual in (("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2), ("decoder_start_token_id", 2))
    }
    return TextConfig(**required, **rates, **ids, scale_embedding=fields.take("scale_embedding", bool, False))


def _take_generation(fields: Fields) -> dict[str, Any]:
    """The stated generation settings; `null` means unstated, as in transformers."""
    found = {key: fields.values.pop(key) for key in GENERATION_SETTINGS if key in fields.values}
    return {key: value for key, value in found.items() if value is not None}


def _check_vision(vision: VisionConfig) -> list[str]:
    """What is wrong with each value, or, when nothing is, with how they fit."""
    stages = len(vision.dim_embed)
    problems = [
        f"vision_config.{key} has {len(getattr(vision, key))} entries for {stages} stages"
        for key in (*_ARRAYS, "patch_prenorm")
        if len(getattr(vision, key)) != stages or not stages
    ]
    for key in _ARRAYS:
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
    if unknown or not vision.image_feature_source:
        problems.append(
            f"vision_config.image_feature_source is {list(vision.image_feature_source)}; "
            f"it must name some of {', '.join(FEATURE_SOURCES)}"
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


def _plain(section: VisionConfig | TextConfig) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(section).items()}
