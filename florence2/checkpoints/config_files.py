"""The settings files of a checkpoint: `config.json`, `generation_config.json` and `preprocessor_config.json`.

Two layouts of `config.json` exist. Microsoft's (`microsoft/Florence-2-*`) calls the stage widths `dim_embed` and keeps
the generation settings in `text_config`; the native one of transformers (`florence-community/Florence-2-*`) calls them
`embed_dim` and keeps the settings in `generation_config.json`. Both become the same `Florence2Config`.

A missing size is an error, and so is an unknown field: with either ignored, the model would differ from the one that
was trained.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from florence2.checkpoints.files import Fields, read_json
from florence2.errors import ConfigError, listing, shown
from florence2.inputs.image import MAX_SIDE, ImageConfig
from florence2.model.config import (
    FEATURE_SOURCES,
    STAGE_TUPLES,
    Florence2Config,
    Layout,
    TextConfig,
    VisionConfig,
    find_problems,
)
from florence2.model.config import GENERATION_SETTINGS as GENERATION_SETTINGS

_LARGEST_MEAN = 1_000_000  # of channels; with larger ones, and with stds near 0, pixel values overflow
_SMALLEST_STD = 1e-6

# Fields that transformers writes in addition to the architecture and that do not change what the model computes here.
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
}


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
    """Turn the values of a `config.json`, and of the `generation_config.json` next to it, into a Florence2Config.

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
    tied = {fields.name: fields.take("tie_word_embeddings", bool, True) for fields in (top, text_fields)}
    # in the native layout the text's speaks of its embeddings; whether these differ is for their values to say
    untied_head = not (tied["config"] if layout == "native" else all(tied.values()))
    text = replace(_read_text(text_fields), untied_head=untied_head)
    stated = _take_generation(text_fields)
    if layout == "native":
        own_file = Fields("generation_config", generation or {}, problems)
        stated = _take_generation(own_file)
        # its remaining settings matter only where they would change the search
        own_file.values = {key: value for key, value in own_file.values.items() if key in _FIXED}
        own_file.finish(_INERT, _FIXED)
    image_token_id = top.take("image_token_id", int, None) if layout == "native" else None
    prepared_by = top.take("prepared_by", str, None)
    for key in ("projection_dim", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        top.values.pop(key, None)  # stated twice; the nested objects decide, as in the reference
    for fields in (top, vision_fields, text_fields):
        fields.finish(_INERT, _FIXED)
    if not problems:
        problems += find_problems(vision, text)
    if problems:
        raise ConfigError(listing(problems, "; ") + ".")
    return Florence2Config(vision, text, stated, layout, image_token_id, prepared_by)


def config_to_json(config: Florence2Config, layout: Layout, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn a Florence2Config into the values of `config.json` and `generation_config.json` in the given layout.

    `dtype` is the name of the stored type, such as "float16". The reference of the layout loads the files. Raises
    ConfigError for a setting that the layout has no place for.
    """
    vision, text = _plain(config.vision), _plain(config.text)
    untied_head, untied_answers = text.pop("untied_head"), text.pop("untied_answers")
    ids = {key: text[key] for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    top: dict[str, Any] = {"architectures": ["Florence2ForConditionalGeneration"], "model_type": "florence2", **ids}
    top |= {"is_encoder_decoder": True}
    if config.prepared_by is not None:
        top["prepared_by"] = config.prepared_by
    text |= {"is_encoder_decoder": True}
    if layout == "microsoft":
        if untied_head:
            top["tie_word_embeddings"] = text["tie_word_embeddings"] = False
        vision = _microsoft_vision(vision)
        top |= {"projection_dim": vision["projection_dim"], "vocab_size": text["vocab_size"], "torch_dtype": dtype}
        text |= {"num_hidden_layers": text["encoder_layers"], **config.generation}
        return {**top, "text_config": text, "vision_config": vision}, {}
    generation = {**config.generation, **ids, "decoder_start_token_id": text["decoder_start_token_id"]}
    text |= {"model_type": "bart", "tie_word_embeddings": not (untied_head or untied_answers)}
    if config.image_token_id is not None:
        top["image_token_id"] = config.image_token_id
    top |= {"tie_word_embeddings": not untied_head, "dtype": dtype}
    return {**top, "text_config": text, "vision_config": _native_vision(vision)}, generation


def config_to_files(config: Florence2Config, layout: Layout, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the same, after checking that `parse_config` brings the configuration back.

    Raises ConfigError for a setting that would be lost or refused.
    """
    values, generation = config_to_json(config, layout, dtype)
    again = parse_config(json.loads(json.dumps(values)), json.loads(json.dumps(generation)))
    again = replace(again, text=replace(again.text, untied_answers=config.text.untied_answers))  # the weights say so
    for part in ("vision", "text", "generation", "image_token_id", "prepared_by"):
        if getattr(again, part) != getattr(config, part):
            raise ConfigError(
                f"The {layout} layout would not bring back config.{part}: it is {getattr(config, part)} and would "
                f"become {getattr(again, part)}."
            )
    return values, generation


def _microsoft_vision(vision: dict[str, Any]) -> dict[str, Any]:
    """Return a `vision_config` in Microsoft's layout."""
    # constants of the code that reads this layout
    for key, fixed in (("mlp_ratio", 4.0), ("qkv_bias", True), ("activation_function", "gelu")):
        if vision.pop(key) != fixed:
            raise ConfigError(f"A vision_config.{key} other than {fixed} has no place in Microsoft's layout.")
    positions, frames = vision.pop("max_position_embeddings"), vision.pop("max_temporal_embeddings")
    return {
        **vision,
        "model_type": "davit",
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": positions},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": frames},
    }


def _native_vision(vision: dict[str, Any]) -> dict[str, Any]:
    """Return a `vision_config` in the native layout."""
    sources, fixed = vision.pop("image_feature_source"), list(FEATURE_SOURCES[:2])
    if sources != fixed:
        raise ConfigError(
            f"image_feature_source {sources} has no place in the native layout, which always uses {fixed}."
        )
    widths = vision.pop("dim_embed")
    return {**vision, "model_type": "florence_vision", "embed_dim": widths}


def _check_model_types(layout: Layout, top: Fields, vision: Fields, text: Fields, problems: list[str]) -> None:
    vision_type = "davit" if layout == "microsoft" else "florence_vision"
    text_types = ("florence2_language", "bart", "")
    for fields, known in ((top, ("florence2",)), (vision, (vision_type, "")), (text, text_types)):
        model_type = fields.values.pop("model_type", "" if fields is not top else None)
        if model_type not in known:
            problems.append(
                f"{fields.name}.model_type is {shown(model_type)}, not {known[0]!r}: not a Florence-2 checkpoint"
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
            stated = part.values.pop("type", None)
            if stated != known:
                fields.problems.append(f"{part.name}.type is {shown(stated)}; only {known!r} is implemented")
    config = VisionConfig(
        **{key: fields.take_tuple(key, int) for key in STAGE_TUPLES},
        patch_prenorm=fields.take_tuple("patch_prenorm", bool),
        window_size=fields.take("window_size", int),
        projection_dim=fields.take("projection_dim", int),
        max_position_embeddings=positions.take(position_key, int),
        max_temporal_embeddings=frames.take("max_temporal_embeddings", int),
        image_feature_source=sources,
        drop_path_rate=fields.take("drop_path_rate", float, 0.0),
        mlp_ratio=fields.take("mlp_ratio", float, 4.0) if layout == "native" else 4.0,
        qkv_bias=fields.take("qkv_bias", bool, True) if layout == "native" else True,
        activation_function=fields.take("activation_function", str, "gelu") if layout == "native" else "gelu",
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
    # transformers omits these ids where they equal BART's own
    ids = {
        key: fields.take(key, int, usual)
        for key, usual in (("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2), ("decoder_start_token_id", 2))
    }
    return TextConfig(
        **required,
        **rates,
        **ids,
        scale_embedding=fields.take("scale_embedding", bool, False),
        activation_function=fields.take("activation_function", str, "gelu"),
    )


def _take_generation(fields: Fields) -> dict[str, Any]:
    """Take the stated generation settings; `null` means unstated, as in transformers."""
    stated = {key: fields.values.pop(key) for key in GENERATION_SETTINGS if key in fields.values}
    return {key: value for key, value in stated.items() if value is not None}


def read_image_config(folder: Path) -> ImageConfig:
    """Read `preprocessor_config.json` of `folder`, or the same settings inside `processor_config.json`."""
    path = folder / "preprocessor_config.json"
    if not path.is_file() and (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
    values = read_json(path)
    try:
        return parse_image_config(values.get("image_processor", values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_image_config(values: Mapping[str, Any]) -> ImageConfig:
    """Turn the values of a `preprocessor_config.json` into an ImageConfig. Raises ConfigError listing every problem.

    A step that is not implemented here is refused, not skipped.
    """
    problems: list[str] = []
    fields = Fields("preprocessor_config", {k: v for k, v in values.items() if v is not None}, problems)
    for step, needed in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("do_center_crop", False)):
        if fields.take(step, bool, needed) is not needed:
            problems.append(f"{step} is {not needed}; only {needed} is implemented")
    size = Fields("size", fields.take("size", dict), problems)
    config = ImageConfig(
        height=size.take("height", int),
        width=size.take("width", int),
        mean=fields.take_tuple("image_mean", float),
        std=fields.take_tuple("image_std", float),
        rescale_factor=fields.take("rescale_factor", float, 1 / 255),
        resample=fields.take("resample", int, int(Image.Resampling.BICUBIC)),
        image_seq_length=fields.take("image_seq_length", int, None),
    )
    if problems:  # what could not be read has no value to look at
        raise ConfigError(listing(problems, "; ") + ".")
    if not 0 < config.rescale_factor <= 1:
        problems.append(f"rescale_factor is {config.rescale_factor}; it must be above 0 and at most 1")
    if not all(1 <= side <= MAX_SIDE for side in (config.height, config.width)):
        problems.append(f"size is {config.height} x {config.width}; each side must be 1 to {MAX_SIDE} pixels")
    if len(config.mean) != 3 or len(config.std) != 3:
        problems.append(
            f"image_mean is {shown(config.mean)} and image_std {shown(config.std)}; they must be three numbers each"
        )
    if not all(abs(mean) <= _LARGEST_MEAN for mean in config.mean):  # false for NaN as well
        problems.append(f"image_mean is {shown(config.mean)}; its numbers must be finite, at most {_LARGEST_MEAN:,}")
    if not all(_SMALLEST_STD <= std < math.inf for std in config.std):
        problems.append(
            f"image_std is {shown(config.std)}; its numbers must be finite, and the std above 0 ({_SMALLEST_STD})"
        )
    if config.resample not in list(Image.Resampling):
        problems.append(f"resample is {config.resample}; it must be one of Pillow's filter numbers, 0 to 5")
    if problems:
        raise ConfigError(listing(problems, "; ") + ".")
    return config


def image_config_to_json(image: ImageConfig, vision: VisionConfig) -> dict[str, Any]:
    """Turn an ImageConfig into the values of `preprocessor_config.json`; the processors of both references read it."""
    rows, columns = vision.grid_size(image.height, image.width)
    tokens = [1 if source == "spatial_avg_pool" else rows * columns for source in vision.image_feature_source]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": image.height, "width": image.width},
        "resample": image.resample,
        "do_rescale": True,
        "rescale_factor": image.rescale_factor,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_center_crop": False,
        "image_seq_length": sum(tokens),
    }


def _plain(section: VisionConfig | TextConfig) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(section).items()}
