"""LoRA adapters: two files, read and merged into a model without peft.

LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) learns a low-rank change of a weight, W + scale · B A. DoRA
(Liu et al., ICML 2024, https://arxiv.org/abs/2402.09353) then scales each row to a learnt length. Once merged, neither
costs anything at inference. An adapter may also hold whole tensors, which take the place of the model's
(`modules_to_save`, biases). It may name modules as Microsoft's code does, as transformers' native model does, or
canonically, with or without peft's prefix; the rules of `layouts` cover them all.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from florence2.checkpoints.files import ADAPTER_CONFIG, MAX_NUMBER, Fields, adapter_folder, read_json
from florence2.checkpoints.files import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from florence2.checkpoints.layouts import (
    DECODER_EMBEDDING,
    ENCODER_EMBEDDING,
    HEAD,
    SHARED,
    from_canonical,
)
from florence2.checkpoints.merging.arithmetic import find_foreign, find_infinite, merged
from florence2.checkpoints.merging.plan import USES, make_plan, misfits
from florence2.checkpoints.tensors import WeightFiles
from florence2.errors import CheckpointError, ConfigError, listing, shown
from florence2.model.absent import require_complete
from florence2.model.config import Layout
from florence2.model.florence2 import Florence2Model, Head

_Value = TypeVar("_Value")
MAX_NAMES = 10_000
"""The most entries of a rank_pattern or alpha_pattern; a model has some hundred modules."""
MAX_PATTERNS = 16
"""The most of these entries that are regular expressions and not plain names."""
_NAME = re.compile(r"[\w.-]{1,200}")
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|(?:\.|\[[\w-]+\])[*+]?|\\d\+?|\([\w-]+(?:\|[\w-]+){0,19}\))+\$?", re.ASCII)
_REPEATED = re.compile(r"[.\]][*+]")

# Fields of peft that say how an adapter was trained or found its modules; they do not change what it computes.
_INERT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config
    exclude_modules inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config
    megatron_config megatron_core peft_version qalora_group_size revision runtime_config target_modules
    task_type
    """.split()
)
_OFF = (False, None)
_NONE: tuple[Any, ...] = (None, [], {})
_FIXED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "all", "lora_only"),  # biases are in the file, under their names
    "fan_in_fan_out": _OFF,
    # all other initialisations change the base weights too, so their A and B fit no published checkpoint
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(("lora_bias", "use_bdlora", "use_qalora"), _OFF),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config", "velora_config"), _NONE),
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication"), _NONE),
    **dict.fromkeys(("target_parameters", "trainable_token_indices"), _NONE),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The ranks and scales of an adapter, from its `adapter_config.json`.

    `ranks` and `alphas` hold exceptions from `rank` and `alpha`: regular expressions for the end of a module's name.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dora: bool = False
    keeps_ties: bool = False
    """Whether peft kept the uses of the token embedding equal (`ensure_weight_tying`)."""
    saved: tuple[str, ...] = ()
    """The ends of the names of modules that were trained whole, so that the file must hold them."""

    def __post_init__(self) -> None:
        wrong = [rank for rank in (self.rank, *self.ranks.values()) if not 1 <= rank <= MAX_NUMBER]
        if wrong:
            raise ConfigError(f"every rank must be at least 1 and at most 2**53, but one is {shown(wrong[0])}")

    def rank_of(self, module: str) -> int:
        """Return the rows of A for the module of that name."""
        return _first_match(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        return _first_match(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def merge_adapter(model: Florence2Model, folder: Path) -> None:
    """Add a LoRA or DoRA adapter to a model in place, computed in float32 and stored in the model's type.

    An adapter that changes one use of the token embedding alone unties it: that of the output projection (`lm_head`,
    which the common recipes for Florence-2 include), of prompts (`shared`) or of answers (`decoder.embed_tokens`).
    The encoder's `embed_tokens` is read by neither reference, and by none here.

    Args:
        model: A complete model of the checkpoint that the adapter was trained on.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`, as peft saves them; or one of these files.

    Raises:
        ConfigError: The adapter is not LoRA, rsLoRA or DoRA.
        CheckpointError: Something does not fit the model; everything is listed, and nothing is merged.
        Florence2Error: The model was loaded without some of its parts.
    """
    require_complete(model)
    folder = adapter_folder(folder)
    config = read_adapter_config(folder)
    files = WeightFiles((_weights_file(folder),), pickled=False)
    modules = _with_all_uses(model)
    plan = make_plan(modules, files.read_headers(), config, files.paths[0])
    stored = {name: tensor.clone() for name, tensor in files.read()}
    with torch.no_grad():
        problems = find_foreign(modules, stored) + find_infinite(modules, plan, stored)
        if problems:
            raise misfits(files.paths[0], problems)
        uses: dict[str, Tensor] = {}
        for name, old, new in merged(modules, plan, stored):
            if name in USES:
                uses[name] = new
            else:
                old.copy_(new)
        _set_uses(model, uses)


def _with_all_uses(model: Florence2Model) -> dict[str, nn.Module]:
    """Return the modules of a model, with one that stands for each use of the token embedding that is tied."""
    modules = dict(model.named_modules())
    shared = model.language_model.shared
    for name in (ENCODER_EMBEDDING, DECODER_EMBEDDING):
        stand_in = nn.Embedding(shared.num_embeddings, shared.embedding_dim, _weight=shared.weight.detach())
        modules.setdefault(name.removesuffix(".weight"), stand_in)
    modules.setdefault(HEAD.removesuffix(".weight"), Head(model.output_weight.detach()))
    return modules


def _set_uses(model: Florence2Model, new: Mapping[str, Tensor]) -> None:
    """Give the uses of the token embedding their `new` values; only those that differ from it become untied."""
    shared = model.language_model.shared.weight
    prompts = new.get(SHARED, shared)
    own = model.language_model.decoder.embed_tokens
    answers = new.get(DECODER_EMBEDDING, shared if own is None else own.weight)
    output = new.get(HEAD, model.output_weight)
    if own is not None:
        own.weight.copy_(answers)
    elif not torch.equal(answers, prompts):
        model.untie_answers(answers.detach().clone())
    if model.lm_head is not None:
        model.lm_head.weight.copy_(output)
    elif not torch.equal(output, prompts):
        model.untie_head(output.detach().clone())
    shared.copy_(prompts)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read `adapter_config.json` strictly. Raises ConfigError listing everything that is not implemented here."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{folder} is not an adapter: it holds no {ADAPTER_CONFIG}, which peft saves.")
    problems: list[str] = []
    fields = Fields("adapter", read_json(folder / ADAPTER_CONFIG), problems)
    method = fields.take("peft_type", str)
    if method != "LORA":
        raise ConfigError(f"{folder / ADAPTER_CONFIG} is of the type {shown(method)}; only LORA can be merged.")
    settings: dict[str, Any] = {
        "rank": fields.take("r", int),
        "alpha": fields.take("lora_alpha", float),
        "rslora": fields.take("use_rslora", bool, False),
        "ranks": _take_patterns(fields, "rank_pattern", int),
        "alphas": _take_patterns(fields, "alpha_pattern", float),
        "dora": _take_flag(fields, "use_dora"),
        "keeps_ties": _take_flag(fields, "ensure_weight_tying"),
        "saved": fields.take_tuple("modules_to_save", str) if fields.values.get("modules_to_save") else (),
    }
    fields.values.pop("modules_to_save", None)  # an empty list, or null
    # an unknown setting of a later peft is harmless while it is off
    off = {key for key, value in fields.values.items() if not value}
    fields.finish(_INERT | (off - _FIXED.keys()), _FIXED)
    try:
        config = AdapterConfig(**settings)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} cannot be merged: {listing(problems, '; ')}.")
    return config


def name_module(path: str, layout: Layout) -> str | None:
    """Return the name that the layout's reference has for a canonical path; None where it has no such module."""
    name = from_canonical(f"{path}.weight", layout)
    return name.removesuffix(".weight") if name is not None and name.endswith(".weight") else None


def _take_flag(fields: Fields, key: str) -> bool:
    """Take a switch that may be missing or null."""
    if fields.values.get(key, 0) is None:
        del fields.values[key]
    flag: bool = fields.take(key, bool, False)
    return flag


def _take_patterns(fields: Fields, key: str, kind: type) -> dict[str, Any]:
    """Take a table from patterns to numbers; null stands for an empty one."""
    if fields.values.get(key, 0) is None:
        del fields.values[key]
    inner = Fields(f"{fields.name}.{key}", fields.take(key, dict, {}), fields.problems)
    patterns = {pattern: inner.take(pattern, kind) for pattern in list(inner.values)}
    real = [pattern for pattern in patterns if not _NAME.fullmatch(pattern)]
    unfit = [pattern for pattern in real if not _is_harmless(pattern)]
    fields.problems += [f"{inner.name} has the pattern {shown(pattern)}; write names of modules" for pattern in unfit]
    if len(patterns) > MAX_NAMES or len(real) > MAX_PATTERNS:
        fields.problems.append(
            f"{inner.name} has {len(patterns):,} entries, {len(real):,} of them patterns; the limits are {MAX_NAMES:,} "
            f"and {MAX_PATTERNS}"
        )
    return patterns


def _is_harmless(pattern: str) -> bool:
    """Return whether matching is quick: a malicious regular expression can take years.

    Few parts may repeat, few have alternatives, and none inside another, so that few ways exist to match a name.
    """
    return (
        len(pattern) <= 200
        and _PATTERN.fullmatch(pattern) is not None
        and len(_REPEATED.findall(pattern)) <= 2
        and pattern.count(r"\d+") <= 3
        and pattern.count("(") <= 2
    )


def _first_match(patterns: Mapping[str, _Value], module: str, otherwise: _Value) -> _Value:
    """Return the value of the first pattern that matches the whole name, or its end after a dot, as peft does."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))]
    ends = {module[start:] for start in starts}
    for pattern, value in patterns.items():
        if pattern in ends:
            return value
        if not _NAME.fullmatch(pattern) and any(re.compile(pattern).fullmatch(module, start) for start in starts):
            return value
    return otherwise


def _weights_file(folder: Path) -> Path:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_WEIGHTS}; if it holds an adapter_model.bin, load it with peft and save it again."
        )
    return folder / ADAPTER_WEIGHTS
