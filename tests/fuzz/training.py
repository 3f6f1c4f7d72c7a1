"""Training data with spoilt lines, and the files of a run spoilt before it is resumed."""

import contextlib
import io
import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from florence2.errors import Florence2Error
from florence2.inputs.image import open_image
from florence2.model.florence2 import Florence2Model
from florence2.train.check import check_samples
from florence2.train.checkpoints import load_state
from florence2.train.data import make_batch
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.sources import read_samples
from florence2.train.trainer import train
from tests.fuzz import material, values
from tests.fuzz.worker import expect

_ROWS: tuple[dict[str, Any], ...] = (
    {"image": "a.png", "prefix": "<CAPTION>", "suffix": "a red circle"},
    {"image": "a.png", "prefix": "<OD>", "suffix": "circle<loc_5><loc_6><loc_70><loc_800>"},
    {
        "image": "b.png",
        "prefix": "<OD>",
        "boxes": [{"label": "cup", "box": [1, 2, 30, 20]}, {"label": "é", "box": [0, 0, 48, 32]}],
    },
    {"image": "b.png", "prefix": "<REGION_PROPOSAL>", "boxes": [{"box": [10, 2, 40, 14]}]},
    {
        "image": "a.png",
        "prefix": "<OCR_WITH_REGION>",
        "quads": [{"label": "EXIT", "quad": [5, 5, 40, 8, 39, 30, 4, 7]}],
    },
    {
        "image": "b.png",
        "prefix": "<REGION_TO_SEGMENTATION>",
        "region": [1, 2, 30, 20],
        "polygons": [[2, 2, 28, 5, 20, 18]],
    },
    {"image": "b.png", "prefix": "<REFERRING_EXPRESSION_SEGMENTATION>the cup", "polygons": [[2, 2, 28, 5, 20, 18]]},
)
_COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 32}, {"id": 2, "file_name": "b.png"}],
    "categories": [{"id": 7, "name": "cup"}, {"id": 8, "name": "a red circle"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 7,
            "bbox": [1, 2, 20, 20],
            "segmentation": [[2, 2, 28, 5, 20, 18]],
            "iscrowd": 0,
        },
        {"id": 2, "image_id": 2, "category_id": 8, "bbox": [0.5, 2.5, 40, 20], "iscrowd": 0, "segmentation": []},
        {
            "id": 3,
            "image_id": 1,
            "category_id": 8,
            "bbox": [0, 0, 48, 32],
            "iscrowd": 1,
            "segmentation": {"size": [2, 2], "counts": []},
        },
    ],
}
_CAPTIONS = {"images": _COCO["images"], "annotations": [{"id": 1, "image_id": 1, "caption": "a red circle"}]}
_OPTIMIZERS: tuple[Any, ...] = (*({}, [], {"state": {}, "param_groups": []}, {"state": {0: 5}, "param_groups": [{}]}),)
_STATES: tuple[dict[str, Any], ...] = (
    *({"step": step} for step in (1.5, -1, float("nan"), 10**400, "1", None, True, 0, 2, 3, 99)),
    *({"optimizer": optimizer} for optimizer in _OPTIMIZERS),
    *({"parameters": {}}, {"parameters": []}, {"parameters": None}),
    *({key: None} for key in ("step", "parameters", "optimizer")),
    {"extra": 5},
)


def draw(random: Random) -> tuple[str, Any]:
    """(form, spoilt part)."""
    form = random.choice(("rows", "rows", "rows", "coco", "coco", "log", "settings", "state", "state", "samples"))
    if form == "rows":
        lines = [json.dumps(random.choice(_ROWS)).encode() for _ in range(3)]
        lines[random.randrange(3)] = values.to_json(random, values.change_json(random, random.choice(_ROWS)))
        return form, random.choice((b"\n", b"\r\n", b"\n\n")).join(lines)
    if form == "coco":
        tasks = random.choice(
            ((), (), ("<OD>", "<REGION_TO_CATEGORY>", "<REGION_TO_SEGMENTATION>"), ("<CAPTION>",), ("x",))
        )
        return form, (
            values.to_json(random, values.change_json(random, random.choice((_COCO, _COCO, _CAPTIONS)))),
            tasks,
        )
    if form == "log":
        row = values.to_json(random, values.change_json(random, {"step": 1, "loss": 2.5, "norm": 1.0}))
        return form, random.choice(
            (row, row + b"\n", b'{"step": 1}\n' + row + b"\n", b"\xff\xfe\n", b"[" * 9999 + b"\n", b'{"step": 1, "lo')
        )
    if form == "settings":
        return form, values.change_json(random, {"steps": 2, "batch": 2, "seed": 0, "learning_rate": 1e-4}, 1)
    if form == "samples":
        return form, (values.anything(random), values.text(random), values.text(random))
    kind = random.randrange(4)
    if kind == 0:
        return form, values.change_bytes(random, finished_run()["state.pt"], 4000)
    if kind == 1:
        return form, _odd_tensor(random)
    return form, random.choice(_STATES)


def _odd_tensor(random: Random) -> dict[str, Any]:
    """A state with one tensor of another shape, type or value, or another name."""
    state = torch.load(io.BytesIO(finished_run()["state.pt"]), weights_only=True)
    if random.random() < 0.5:
        held = state["parameters"]
        name = random.choice(sorted(held))
    else:
        held = state["optimizer"]["state"][random.choice(sorted(state["optimizer"]["state"]))]
        name = random.choice(sorted(held))
    odd = (
        torch.ones(2, 3),
        held[name].half(),
        held[name] * float("nan"),
        5,
        None,
        torch.ones(0),
        held[name].to_sparse(),
    )
    held[name] = random.choice(odd)
    if random.random() < 0.2:
        held["other"] = held.pop(name)
    return {key: state[key] for key in ("parameters", "optimizer")}


_SETTINGS = TrainSettings(
    steps=2, batch=2, learning_rate=1e-4, warmup=1, save_every=1, log_every=1, workers=0, freeze=("vision", "encoder")
)


def _samples() -> list[Sample]:
    return [
        Sample(material.drawing(i), (("<CAPTION>", f"a circle {i}"), ("<OD>", "c<loc_1><loc_2><loc_3><loc_4>")))
        for i in range(2)
    ]


def _train(folder: Path, settings: TrainSettings) -> Florence2Model:
    import copy

    f = material.model()
    model = copy.deepcopy(f.model)
    with contextlib.redirect_stderr(io.StringIO()):
        train(model, f.processor, _samples(), settings, folder)
    return model


@cache
def finished_run() -> dict[str, bytes]:
    """The files of a run of one step, which asks for two."""
    import tempfile
    from dataclasses import replace

    folder = Path(tempfile.mkdtemp())
    _train(folder, replace(_SETTINGS, steps=1))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    settings = json.loads(files["settings.json"])
    return {**files, "settings.json": json.dumps({**settings, "steps": 2}).encode()}


@cache
def right_end() -> dict[str, torch.Tensor]:
    """The weights after an undisturbed resumption."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    for name, data in finished_run().items():
        (folder / name).write_bytes(data)
    return _train(folder, _SETTINGS).state_dict()


def check(case: tuple[str, Any], place: Path) -> None:
    form, spoilt = case
    if form == "samples":
        _check_samples([Sample(spoilt[0], ((spoilt[1], spoilt[2]),))])
    elif form in ("rows", "coco"):
        _check_data(form, spoilt, place)
    else:
        _check_resumed(form, spoilt, place / "run")


def _check_data(form: str, spoilt: Any, place: Path) -> None:
    data, tasks = (spoilt, ()) if form == "rows" else spoilt
    file = material.put(place / f"data.json{'l' * (form == 'rows')}", data)
    for name in ("a.png", "b.png"):
        material.drawing(len(name)).save(place / name)
    samples = read_samples(file, tasks=tasks)
    expect(samples and all(sample.pairs for sample in samples), "data without a question was accepted")
    _check_samples(samples)


def _check_samples(samples: list[Sample]) -> None:
    f = material.model()
    str(check_samples(samples, f.processor, 256, 180))
    batch = make_batch(samples, f.processor, 256)
    ids = torch.cat([batch.input_ids.flatten(), batch.labels[batch.labels != -100]])
    expect(int(ids.min()) >= 0 and int(ids.max()) < 1631, f"ids from {int(ids.min())} to {int(ids.max())}")
    expect(torch.isfinite(batch.pixel_values).all(), "pixel values are not finite")
    for sample in samples:
        open_image(sample.image)


def _check_resumed(form: str, spoilt: Any, folder: Path) -> None:
    """A resumed run is refused, or ends with the same weights, a whole log and a state that did not go back."""
    files = dict(finished_run())
    if form == "log":
        files["log.jsonl"] = spoilt
    elif form == "settings":
        files["settings.json"] = json.dumps(spoilt).encode()
    elif isinstance(spoilt, bytes):
        files["state.pt"] = spoilt
    else:
        state = {**torch.load(io.BytesIO(files["state.pt"]), weights_only=True), **spoilt}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        files["state.pt"] = buffer.getvalue()
    for name, data in files.items():
        material.put(folder / name, data)
    try:
        model = _train(folder, _SETTINGS)
    except Florence2Error:
        expect((folder / "state.pt").read_bytes() == files["state.pt"], "refused, but the state was overwritten")
        raise
    saved = load_state(folder)
    expect(saved is not None and saved.step == 2, f"the run ends at step {saved and saved.step} of 2")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    expect(form == "state" or rows[-1]["step"] == 2, f"the log ends with {rows[-1]}")
    expect(all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()), "weights are not finite")
    if form in ("log", "settings"):
        for name, tensor in model.state_dict().items():
            expect(torch.equal(tensor, right_end()[name]), f"{name} differs from an undisturbed run")
