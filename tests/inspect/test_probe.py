"""Probes, against what the features hold by construction, and against formulas."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from florence2 import Florence2
from florence2.errors import Florence2Error, OptionError
from florence2.inspect.probe import Reading, _split, collect, fit_probe, make_probe

READING = Reading("memory", "<CAPTION>", None, "mean", None)
ONLY_HELD_OUT = next(seed for seed in range(99) if 23 in _split(24, 0.25, seed)[1])


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def shades() -> list[Image.Image]:
    """Images of one grey each, in no order."""
    return [Image.new("RGB", (32, 32), (value,) * 3) for value in np.random.default_rng(1).permutation(24) * 10]


@pytest.fixture(scope="module")
def greys(shades: list[Image.Image]) -> list[float]:
    return [float(shade.getpixel((0, 0))[0]) for shade in shades]


def test_what_a_value_holds_is_found(mini: Florence2, shades: list[Image.Image], greys: list[float]) -> None:
    """The pixels' mean is the grey itself: the read-out is exact, and its weights can be used on others."""
    found = fit_probe(mini, shades, greys, "pixel_values", position=lambda x: x.mean(dim=(1, 2)), ridge=0)
    assert found.score == pytest.approx(1, abs=1e-6) and found.train_score == pytest.approx(1, abs=1e-6)
    assert found.baseline <= 0
    others = [Image.new("RGB", (32, 32), (value,) * 3) for value in (5, 105, 250)]
    assert found.predict(mini, others) == pytest.approx([5, 105, 250], abs=1e-2)


def test_what_no_value_can_hold_is_not_found(mini: Florence2, shades: list[Image.Image]) -> None:
    random = noise(3, len(shades)).tolist()
    found = fit_probe(mini, shades, random, "vision_tower", ridge=0.1)
    assert found.score < 0.3 < found.train_score


def test_classes(mini: Florence2, shades: list[Image.Image], greys: list[float]) -> None:
    names = ["dark" if grey < 80 else "middle" if grey < 160 else "light" for grey in greys]
    found = fit_probe(mini, shades, names, "multi_modal_projector.pooled", ridge=0.01)
    held = [names[i] for i in found.held_out]
    assert found.classes == ("dark", "light", "middle") and len(held) == 6
    read = found.predict(mini, [shades[i] for i in found.held_out])
    assert (
        found.score == pytest.approx(sum(a == b for a, b in zip(read, held, strict=True)) / 6) and found.score >= 5 / 6
    )
    common = max(("dark", "light", "middle"), key=[names[i] for i in found.train].count)
    assert found.baseline == pytest.approx(held.count(common) / 6)
    assert "accuracy" in str(found) and "6 held out" in str(found)


@pytest.mark.parametrize("features", [5, 40])
def test_ridge_is_the_formula(features: int) -> None:
    """However the equations are solved: the gradient of the penalised squared error vanishes."""
    x, y, rows = noise(1, 30, features), noise(2, 30, 2), list(range(20))
    found = make_probe(x, y, None, rows, range(20, 30), 3.0, READING)
    scale, mean = x[rows].std(dim=0, correction=0), x[rows].mean(dim=0)
    z, w = (x[rows] - mean) / scale, found.weight * scale[:, None]
    rest = z @ w + y[rows].mean(dim=0) - y[rows]
    assert torch.allclose(z.T @ rest + 3.0 * w, torch.zeros_like(w), atol=1e-9)
    out, truth = x[20:] @ found.weight + found.bias, y[20:]
    expected = 1 - (out - truth).square().sum(0) / (truth - truth.mean(0)).square().sum(0)
    assert found.scores == pytest.approx(expected.tolist()) and found.score == pytest.approx(float(expected.mean()))
    guess = 1 - (y[rows].mean(0) - truth).square().sum(0) / (truth - truth.mean(0)).square().sum(0)
    assert found.baseline == pytest.approx(float(guess.mean()))


def test_logistic_regression_is_at_its_minimum() -> None:
    x, rows = noise(4, 30, 6), list(range(24))
    y = torch.arange(30) % 3
    found = make_probe(x, y, ("a", "b", "c"), rows, range(24, 30), 0.5, READING)
    scale, mean = x[rows].std(dim=0, correction=0), x[rows].mean(dim=0)
    z, w = (x[rows] - mean) / scale, found.weight * scale[:, None]
    wrong = (x[rows] @ found.weight + found.bias).softmax(dim=1) - torch.nn.functional.one_hot(y[rows], 3)
    assert torch.allclose(z.T @ wrong + 0.5 * w, torch.zeros_like(w), atol=1e-5)
    assert torch.allclose(wrong.sum(dim=0), torch.zeros(3, dtype=x.dtype), atol=1e-5)


def test_how_values_are_pooled(mini: Florence2, shades: list[Image.Image]) -> None:
    images = shades[:2]
    names = {"vision_tower": (64, 32), "memory": None, "encoder.layers.0.self_attention.heads": None}
    for name in names:
        rows = [
            collect(mini, images, Reading(name, "<CAPTION>", None, how, None)) for how in ("mean", "max", 7, "last")
        ]
        for i, image in enumerate(images):
            with mini.trace(f"={name}") as t:
                mini.run("<CAPTION>", image, options=mini.options(max_new_tokens=2))
            value = t[name].double()
            if value.dim() == 3 and name == "vision_tower":
                value = value.flatten(0, 1)
            if "heads" in name:
                value = value.transpose(0, 1).flatten(1)  # (S, heads·d)
            for row, expected in zip(rows, (value.mean(0), value.amax(0), value[7], value[-1]), strict=True):
                assert torch.allclose(row[i], expected, atol=1e-6), name


def test_steps_of_the_answer(mini: Florence2, shades: list[Image.Image]) -> None:
    """Of the beams that wrote the answer."""
    options = mini.options(num_beams=2, max_new_tokens=6, min_new_tokens=4)
    found = collect(mini, shades[:2], Reading("decoder.layers.1", "<CAPTION>", None, "last", options))
    for i, image in enumerate(shades[:2]):
        with mini.trace("=decoder.layers.1") as t:
            mini.run("<CAPTION>", image, options=options)
        assert torch.allclose(found[i], t.along_answer("decoder.layers.1")[-1].double(), atol=1e-6)


def test_what_is_asked_counts(mini: Florence2, shades: list[Image.Image]) -> None:
    rows = [
        collect(mini, shades[:1], Reading("memory", "<CAPTION_TO_PHRASE_GROUNDING>", text, "last", None))
        for text in ("a car", "a dog")
    ]
    assert not torch.allclose(*rows)


def test_a_folder(mini: Florence2, shades: list[Image.Image], greys: list[float], tmp_path: Path) -> None:
    for i, shade in enumerate(shades):
        shade.save(tmp_path / f"{i:02}.png")
    targets = {f"{i:02}.png": grey for i, grey in enumerate(greys)}
    listed = fit_probe(mini, shades, greys, "vision_tower")
    for given in (targets, greys):
        found = fit_probe(mini, str(tmp_path), given, "vision_tower")
        assert torch.equal(found.weight, listed.weight) and found.score == listed.score
    assert found.predict(mini, tmp_path)[:3] == pytest.approx(found.predict(mini, shades[:3]))
    with pytest.raises(OptionError, match="No target for 1 of the folder's images, the first of them 00.png"):
        fit_probe(mini, tmp_path, {k: v for k, v in targets.items() if k != "00.png"}, "vision_tower")


def test_the_split_depends_on_the_seed_alone(mini: Florence2, shades: list[Image.Image], greys: list[float]) -> None:
    one, two, other = (fit_probe(mini, shades, greys, "vision_tower", seed=seed, held_out=0.5) for seed in (1, 1, 2))
    assert one.held_out == two.held_out != other.held_out and len(one.held_out) == 12
    assert sorted(one.train + one.held_out) == list(range(24))
    assert torch.equal(one.weight, two.weight)
    values = json.loads(json.dumps(one.to_dict()))
    assert values["score"] == one.score and np.shape(values["weight"]) == tuple(one.weight.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vision_towr"}, "The nearest names are vision_tower"),
        ({"name": "encoder.layers.*"}, "is a pattern"),
        ({"targets": [1.0]}, "24 images and 1 targets"),
        ({"targets": ["a"] * 24}, "not all the same"),
        ({"targets": ["a"] * 23 + [1.0]}, "must be texts"),
        ({"targets": [[1.0], [1.0, 2.0]] * 12}, "rows of numbers of one length"),
        ({"targets": [float("nan")] * 24}, "finite"),
        ({"targets": [1.0] * 24}, "all equal"),
        ({"targets": {"a.png": 1.0}}, "need a folder"),
        (
            {"targets": ["a"] * 23 + ["b"], "seed": ONLY_HELD_OUT},
            "All training images have the class 'a'; give more images of other",
        ),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"ridge": "1"}, "ridge is '1'"),
        ({"position": "middle"}, "position is 'middle'; it must be 'mean', 'max', 'last', a number, or a function"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"position": 64}, "position is 64; vision_tower has 64 positions"),
        ({"images": "no/such/folder"}, "is not a folder"),
    ],
)
def test_what_cannot_be_fitted(
    mini: Florence2, shades: list[Image.Image], greys: list[float], change: dict, message: str
) -> None:
    given: dict[str, Any] = {"images": shades, "targets": greys, "name": "vision_tower", **change}
    with pytest.raises(Florence2Error, match=message):
        fit_probe(mini, **given)


def test_few_or_encoded_images(mini: Florence2, shades: list[Image.Image]) -> None:
    with pytest.raises(OptionError, match="at least 4 images, not 3"):
        fit_probe(mini, shades[:3], [1, 2, 3], "vision_tower")
    encoded = [mini.encode_image(shade) for shade in shades[:5]]
    with pytest.raises(OptionError, match="vision_tower is inside the vision tower; give the image itself"):
        fit_probe(mini, encoded, [1, 2, 3, 4, 5], "vision_tower")
    assert len(fit_probe(mini, encoded, [1, 2, 3, 4, 5], "memory").train) == 3


def test_progress_goes_to_the_callback_and_nowhere_else(
    mini: Florence2, shades: list[Image.Image], greys: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[int, int]] = []
    fit_probe(mini, shades, greys, "vision_tower", progress=lambda done, total: shown.append((done, total)))
    assert shown == [(done, 24) for done in range(1, 25)] and capsys.readouterr() == ("", "")
