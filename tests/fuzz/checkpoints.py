"""Checkpoints with one spoilt file: configuration, image settings, weights, index of shards, tasks."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save, save_file

import florence2
from florence2.checkpoints.describe import describe_checkpoint
from tests.fuzz import material, values
from tests.fuzz.answers import check_answer
from tests.fuzz.worker import expect

_FORMS = (
    *("config", "config", "config", "preprocessor", "preprocessor"),
    *("tensors", "tensors", "header", "header", "bytes", "index", "tasks"),
)
_TEMPTING = {
    "window_size": (1, 2, 3, 5, 64, 256, 257, 0),
    "image_feature_source": (
        ["spatial_avg_pool"] * 15_000,
        ["last_frame"],
        ["temporal_avg_pool"] * 2,
        [],
        "last_frame",
    ),
    "max_position_embeddings": (1, 1 << 20, 1 << 40),
    "patch_size": ([256, 256], [7, 3, 3]),
    "patch_padding": ([256, 256], [0, 0]),
    "num_beams": (1, 1000, 10**40, 0, -1, True),
    "forced_bos_token_id": (1630, 1631, 5, None),
    "decoder_start_token_id": (0, 1630, 1631),
    "eos_token_id": (5, 1, 1631),
    "dropout": (10**400, 0.5, 0.1, 0, 2, -1),
    "prepared_by": ("os:system", "tests.fuzz.worker:work", 5),
    "activation_function": ("relu", "gelu_new", "__import__('os')", 5),
}


def draw(random: Random) -> tuple[str, Any]:
    """(form, the spoilt part)."""
    form = random.choice(_FORMS)
    return form, globals()[f"_draw_{form}"](random)


def _draw_config(random: Random) -> bytes:
    config = material.json_of("config.json")
    if random.random() < 0.5:
        key = random.choice(list(_TEMPTING))
        section = config[random.choice(("vision_config", "text_config"))] if random.random() < 0.9 else config
        section[key] = random.choice(_TEMPTING[key])
        return values.to_json(random, config) if random.random() < 0.1 else json.dumps(config).encode()
    return values.to_json(random, values.change_json(random, config))


def _draw_preprocessor(random: Random) -> bytes:
    settings = material.json_of("preprocessor_config.json")
    if random.random() < 0.6:
        key = random.choice(("image_mean", "image_std", "rescale_factor", "resample", "size", "image_seq_length"))
        rows = [values.number(random) for _ in range(random.choice((3, 3, 3, 2)))]
        size = {"height": random.choice((64, 63, 8, 1, 0, 8192, 10**6)), "width": random.choice((64, 8, 8192))}
        settings[key] = {"size": size}.get(key, rows if key.startswith("image_m") or key == "image_std" else rows[0])
        return json.dumps(settings).encode()
    return values.to_json(random, values.change_json(random, settings))


def _draw_tensors(random: Random) -> tuple[str, str, Any]:
    """(change, name, value) of one tensor."""
    change = random.choice(
        ("nan", "shape", "drop", "rename", "dtype", "double", "prefix", "empty", "transpose", "extra", "rows")
    )
    value = random.choice((float("nan"), float("inf"), float("-inf"), 1e38))
    return (
        change,
        random.choice(sorted(material.weights())),
        random.choice((value, values.text(random), random.randrange(7))),
    )


def _draw_header(random: Random) -> bytes:
    """A safetensors file with a changed header."""
    data = material.original("model.safetensors")
    (length,) = struct.unpack("<Q", data[:8])
    if random.random() < 0.2:
        return struct.pack("<Q", random.choice((0, length + 1, length - 1, 2**63, 2**64 - 1, len(data) * 2))) + data[8:]
    header = values.to_json(random, values.change_json(random, json.loads(data[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _draw_bytes(random: Random) -> bytes:
    if random.random() < 0.2:
        return random.choice(
            (b"", b"{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", bytes(5000))
        )
    return values.change_bytes(random, material.original("model.safetensors"), 9000)


def _draw_index(random: Random) -> tuple[bytes, int]:
    names = sorted(material.weights())
    where: dict[str, Any] = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 5}, "weight_map": where}
    if random.random() < 0.2:
        return json.dumps(index).encode(), 0
    if random.random() < 0.5:
        where[random.choice(names)] = random.choice(
            (
                "../../../../etc/passwd",
                "/etc/passwd",
                "/dev/zero",
                "a\0b",
                "",
                ".",
                "..",
                "absent.safetensors",
                5,
                None,
                "model.safetensors.index.json",
            )
        )
        return json.dumps(index).encode(), random.randrange(3)
    return values.to_json(random, values.change_json(random, index)), random.randrange(3)


def _draw_tasks(random: Random) -> bytes:
    tasks = {"tasks": [{"token": "<COUNT>", "sentence": "How many {input}?", "answer": "text", "takes": "text"}]}
    return values.to_json(random, values.change_json(random, tasks))


# ---- the checks ----------------------------------------------------------------------------------------------------


def check(case: tuple[str, Any], place: Path) -> None:
    form, spoilt = case
    folder = material.copy(place / "model")
    globals()[f"_put_{form}"](folder, spoilt)
    if form in ("header", "bytes", "index") and len(repr(spoilt)) % 2:
        json.dumps(describe_checkpoint(folder))
    f = florence2.load(folder, device="cpu")
    globals().get(f"_check_{form}", _check_weights)(f, spoilt)
    check_answer(f.run("<OD>", material.drawing(1), num_beams=1, max_new_tokens=4), f)


def _put_config(folder: Path, data: bytes) -> None:
    material.put(folder / "config.json", data)


def _put_preprocessor(folder: Path, data: bytes) -> None:
    material.put(folder / "preprocessor_config.json", data)


def _put_tasks(folder: Path, data: bytes) -> None:
    material.put(folder / "tasks.json", data)


def _put_header(folder: Path, data: bytes) -> None:
    material.put(folder / "model.safetensors", data)


_put_bytes = _put_header


def _put_index(folder: Path, spoilt: tuple[bytes, int]) -> None:
    data, kind = spoilt
    (folder / "model.safetensors").unlink()
    names = sorted(material.weights())
    for part in range(2):
        tensors = {name: material.weights()[name].clone() for i, name in enumerate(names) if i % 2 == part}
        save_file(tensors, folder / f"part-{part}.safetensors", metadata={"format": "pt"})
    if kind == 1:
        (folder / "part-0.safetensors").unlink()
        (folder / "part-0.safetensors").symlink_to("/dev/zero")
    if kind == 2:
        material.put(folder / "part-1.safetensors", (folder / "part-0.safetensors").read_bytes())
    material.put(folder / "model.safetensors.index.json", data)


def _put_tensors(folder: Path, spoilt: tuple[str, str, Any]) -> None:
    change, name, value = spoilt
    tensors = {key: tensor.clone() for key, tensor in material.weights().items()}
    tensor = tensors[name]
    if change == "nan":
        tensor.view(-1)[-1] = value if isinstance(value, float) else float("nan")
    elif change == "shape":
        tensors[name] = torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor[None]
    elif change in ("drop", "rename", "double"):
        if change != "double":
            del tensors[name]
        if change != "drop":
            tensors[str(value).encode(errors="replace").decode()] = tensor.clone()
    elif change == "dtype":
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
        tensors[name] = tensor.to(kinds[len(name) % len(kinds)])
    elif change == "prefix":
        tensors = {f"{('model.', 'module.', '_orig_mod.')[len(name) % 3]}{key}": t for key, t in tensors.items()}
    elif change == "empty":
        tensors = {} if len(name) % 2 else {name: tensor[:0]}
    elif change == "transpose":
        tensors[name] = tensor.flatten()[None] if tensor.ndim < 2 else tensor.transpose(0, 1).contiguous()
    elif change == "extra":
        tensors[f"{name}.extra"] = tensor.clone()
    else:
        tensors["language_model.model.shared.weight"] = torch.cat(
            [tensors["language_model.model.shared.weight"], torch.ones(9, 32)]
        )
    material.put(folder / "model.safetensors", save(tensors, {"format": "pt"}))


def _check_weights(f: florence2.Florence2, spoilt: Any) -> None:
    """Every weight is finite and has its shape; a copy of the embedding that differs is a head of its own."""
    wanted = {name: tensor.shape for name, tensor in material.model().model.state_dict().items()}
    held = {name: tensor.shape for name, tensor in f.model.state_dict().items() if name != "lm_head.weight"}
    expect(held == wanted, f"other shapes: {set(held.items()) ^ set(wanted.items())}")
    for name, tensor in f.model.state_dict().items():
        expect(not tensor.is_floating_point() or torch.isfinite(tensor).all(), f"{name} is not finite")


def _check_config(f: florence2.Florence2, spoilt: Any) -> None:
    f.encode_image(material.drawing(2))
    f.run("<CAPTION>", material.drawing(2), max_new_tokens=2)


def _check_preprocessor(f: florence2.Florence2, spoilt: Any) -> None:
    """Pixel values are those of a computation in float64."""
    config, image = f.processor.image_config, material.drawing(3)
    found = f.processor.image(image)[0].double()
    expect(torch.isfinite(found).all(), "pixel values are not finite")
    small = image.resize((config.width, config.height), config.resample)
    values = torch.tensor(list(small.tobytes()), dtype=torch.float64).view(config.height, config.width, 3)
    mean, std = (torch.tensor(row, dtype=torch.float64) for row in (config.mean, config.std))
    wanted = ((values * config.rescale_factor - mean) / std).permute(2, 0, 1)  # (3, H, W)
    expect(torch.allclose(found, wanted, rtol=1e-3, atol=1e-3), "pixel values differ from a plain computation")
