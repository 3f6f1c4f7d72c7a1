"""LoRA adapters with spoilt settings, patterns and matrices, merged into the tiny model."""

import copy
import json
import struct
from functools import cache
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save

from florence2.checkpoints.adapters import merge_adapter
from florence2.model.florence2 import Florence2Model
from tests.fuzz import material, values
from tests.fuzz.worker import expect

_PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
_PATTERNS = (
    *(
        "(|.)" * 38 + "x",
        "(a|a?)" * 30,
        "(.?){40}x",
        ".*.*.*.*.*x",
        "(a+)+$",
        "[a-z]*[a-z]*[a-z]*[a-z]*!",
        "(?=.*){99}",
    ),
    *(
        "(\\w|\\w\\w)*$",
        "(?:.|.)*(?:.|.)*x",
        "a" * 10_000,
        "(" * 500,
        "[",
        "",
        "q_proj",
        ".*q_proj",
        "layers.0.*",
        "\\d+",
    ),
    *(
        "^.*self_attn\\.(q|v)_proj",
        "(|q)" * 12,
        "(x?)" * 25,
        "(((((((((a?)?)?)?)?)?)?)?)?)?",
        "\\",
        "(?i)Q_PROJ",
        "(.|.|.){30}",
    ),
)
_KEYS = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "modules_to_save"),
    *("target_modules", "peft_type", "init_lora_weights", "layers_to_transform", "fan_in_fan_out", "lora_bias"),
)


def draw(random: Random) -> tuple[bytes, bytes, bool]:
    """(adapter_config.json, adapter_model.safetensors, whether nothing is wrong with them)."""
    kind = random.randrange(8)
    config, tensors = json.dumps(_PLAIN).encode(), _matrices(random)
    if kind == 0:
        return config, save(tensors), True
    if kind <= 2:
        patterns = {random.choice(_PATTERNS): random.choice((2, 2, 4, 0, -1, values.number(random))) for _ in range(2)}
        return (
            json.dumps({**_PLAIN, random.choice(("rank_pattern", "alpha_pattern")): patterns}).encode(),
            save(tensors),
            False,
        )
    if kind == 3:
        return values.to_json(random, {**_PLAIN, random.choice(_KEYS): values.plain(random)}), save(tensors), False
    if kind == 4:
        return values.to_json(random, values.change_json(random, _PLAIN)), save(tensors), False
    if kind == 5:
        return config, values.change_bytes(random, save(tensors), 900), False
    if kind == 6:
        return config, _changed_header(random, save(tensors)), False
    return config, save(_changed(random, tensors)), False


def _matrices(random: Random) -> dict[str, torch.Tensor]:
    """Matrices of rank 2 for a few modules."""
    generator = torch.Generator().manual_seed(random.randrange(1000))
    tensors = {}
    for path in random.sample(linear_modules(), random.randint(1, 4)):
        rows, columns = material.model().model.get_submodule(path).weight.shape
        prefix = random.choice(("base_model.model.", "base_model.model.", "")) + path
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return tensors


@cache
def linear_modules() -> list[str]:
    """The paths of the linear maps of the language model."""
    named = material.model().model.named_modules()
    return [name for name, module in named if isinstance(module, torch.nn.Linear) and name.startswith("language_model")]


def _changed_header(random: Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = values.to_json(random, values.change_json(random, json.loads(data[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _changed(random: Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = random.choice(list(tensors))
    tensor = tensors[name]
    kind = random.randrange(8)
    if kind == 0:
        tensor[0, 0] = random.choice((float("nan"), float("inf"), 3e38))
    elif kind == 1:
        tensors[name] = tensor[:, :-1].contiguous()
    elif kind == 2:
        del tensors[name]
    elif kind == 3:
        new = values.text(random).encode(errors="replace").decode()  # safetensors writes valid Unicode alone
        tensors[new or "x"] = tensors.pop(name)
    elif kind == 4:
        tensors[name] = tensor.to(
            random.choice((torch.int64, torch.float16, torch.float64, torch.bool, torch.float8_e4m3fn))
        )
    elif kind == 5:
        tensors[name.replace("lora_", "lora_embedding_").removesuffix(".weight")] = tensor.clone()
    elif kind == 6:
        part = random.choice(
            (
                "lm_head",
                "language_model.lm_head",
                "language_model.shared",
                "language_model.encoder.embed_positions",
                "vision_tower.convs.0.proj",
            )
        )
        tensors |= {
            f"base_model.model.{part}.lora_A.weight": torch.ones(2, 32),
            f"base_model.model.{part}.lora_B.weight": torch.ones(1631, 2),
        }
    else:
        tensors[
            f"{name.split('.lora_')[0]}.{random.choice(('base_layer.weight', 'lora_magnitude_vector', 'bias'))}"
        ] = torch.ones(32)
    return tensors


def check(case: tuple[bytes, bytes, bool], place: Path) -> None:
    config, weights, sound = case
    material.put(place / "adapter_config.json", config)
    material.put(place / "adapter_model.safetensors", weights)
    model = copy.deepcopy(material.model().model)
    try:
        merge_adapter(model, place)
    except Exception:
        expect(not _changes(model), "the adapter was refused, but the model has changed")
        expect(not sound, "a sound adapter was refused")
        raise
    for name, tensor in model.state_dict().items():
        before = material.model().model.state_dict().get(name, model.language_model.shared.weight)
        expect(tensor.shape == before.shape and torch.isfinite(tensor).all(), f"{name} is misshapen or not finite")
    if sound:
        _check_sum(model, weights)


def _changes(model: Florence2Model) -> list[str]:
    before = material.model().model.state_dict()
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


def _check_sum(model: Florence2Model, weights: bytes) -> None:
    """Every weight is W + 2 B A, and all others are unchanged."""
    from safetensors.torch import load

    matrices = {name.removeprefix("base_model.model."): tensor.double() for name, tensor in load(weights).items()}
    for name, before in material.model().model.state_dict().items():
        path = name.removesuffix(".weight")
        wanted = before.double()
        if f"{path}.lora_A.weight" in matrices:
            wanted = wanted + 2 * matrices[f"{path}.lora_B.weight"] @ matrices[f"{path}.lora_A.weight"]
        expect(
            torch.allclose(model.state_dict()[name].double(), wanted, rtol=1e-4, atol=1e-4), f"{name} is not W + 2 B A"
        )
