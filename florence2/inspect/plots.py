"""Plots of an explanation for papers: the attention of a token, the logit lens, the spread of a location.

Each function takes an `Explanation` or its `to_dict()` and returns a matplotlib Figure; `save_figure` writes it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from florence2.checkpoints.files import written_whole
from florence2.errors import OptionError
from florence2.inspect.page.render import decode_map

FORMATS = ("png", "svg")
_LENS_COLUMNS = 40  # more would not be legible in one figure


def plot_attention(explanation: Any, token: int, layer: int | None = None, head: int | None = None) -> Figure:
    """Plot the cross-attention of a generated token over the image.

    Args:
        explanation: An `Explanation` or its `to_dict()`.
        token: The number of the token, from 0.
        layer: A decoder layer, from 0; by default the mean over all layers.
        head: A head of that layer, from 0; by default the mean over all heads.

    Returns:
        The figure; its colour bar shows shares of a head's whole attention.

    Raises:
        OptionError: A number does not exist, or a head is given without its layer.
    """
    values = _values(explanation)
    chosen = _token(values, token)
    if head is not None and layer is None:
        raise OptionError(f"head={head} needs a layer; give layer too.")
    layers = _chosen("layer", layer, values["model"]["layers"])
    heads = _chosen("head", head, values["model"]["heads"])
    weights = np.mean([_head_map(values, chosen, one, other) for one in layers for other in heads], axis=0)
    width, height = values["image"]["width"], values["image"]["height"]
    figure = Figure(figsize=(5, max(2.0, 4 * height / width) + 0.5), layout="constrained")
    axes = figure.add_subplot()
    extent = (0, width, height, 0)
    axes.imshow(_image(values).convert("L"), cmap="gray", extent=extent)
    shown = axes.imshow(weights, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
    figure.colorbar(shown, ax=axes, label="share of the attention")
    _draw_boxes(axes, values, token)
    where = "all layers" if layer is None else f"layer {layer + 1}" + ("" if head is None else f", head {head + 1}")
    axes.set_title(_plain(f"{_shown(chosen['text'])} ({where})"))
    axes.set_axis_off()
    return figure


def plot_lens(explanation: Any, tokens: Sequence[int] | None = None) -> Figure:
    """Plot the logit lens: the prediction of each layer at each token, darker for higher probability.

    Args:
        explanation: An `Explanation` or its `to_dict()`.
        tokens: The numbers of the tokens, from 0; by default the first 40.

    Returns:
        The figure.

    Raises:
        OptionError: A number does not exist, or `tokens` is empty.
    """
    values = _values(explanation)
    numbers = range(len(values["tokens"]))[:_LENS_COLUMNS] if tokens is None else tokens
    columns = [_token(values, number) for number in numbers]
    if not columns:
        raise OptionError("tokens is empty; name at least one token of the answer.")
    best = [[guesses[0] for guesses in column["lens"]] for column in columns]
    shares = np.array([[guess["probability"] for guess in column] for column in best]).T  # (layers + 1, tokens)
    rows = len(shares)
    figure = Figure(figsize=(1.2 + 0.75 * len(columns), 0.8 + 0.3 * rows), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for x, column in enumerate(best):
        for y, guess in enumerate(column):
            colour = "white" if guess["probability"] > 0.6 else "black"
            axes.text(x, y, _plain(_shown(guess["text"])[:9]), ha="center", va="center", fontsize=7, color=colour)
    labels = [_plain(_shown(column["text"])) for column in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=45, ha="right")
    axes.set_yticks(range(rows), ["input", *map(str, range(1, rows))])
    axes.set(xlabel="token", ylabel="decoder layer")
    figure.colorbar(shown, ax=axes, label="probability")
    return figure


def plot_location_spread(explanation: Any, token: int) -> Figure:
    """Plot the distribution over location bins at a location token.

    Args:
        explanation: An `Explanation` or its `to_dict()`.
        token: The number of the token, from 0.

    Returns:
        The figure.

    Raises:
        OptionError: The token does not exist or is not a location.
    """
    values = _values(explanation)
    chosen = _token(values, token)
    if chosen["spread"] is None:
        raise OptionError(f"Token {token}, {chosen['text']!r}, is not a location; {_locations(values)}.")
    bins, shares = zip(*chosen["spread"]["bins"], strict=True)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(bins, shares, width=0.9, color=["tab:orange" if bin == chosen["location"] else "tab:blue" for bin in bins])
    mean, std = chosen["spread"]["mean"], chosen["spread"]["std"]
    axes.set_title(_plain(f"{chosen['text']}: {mean:.1f} ± {std:.1f} bins"))
    axes.set(xlabel="location bin", ylabel="probability")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its suffix (.png, .svg, .pdf).

    Args:
        figure: The figure.
        path: The file. From matplotlib 3.11 on, an SVG of equal content has equal bytes; before, the names of its clip
            paths differ.
    """
    from matplotlib import rc_context

    kind = path.suffix.removeprefix(".") or "png"
    with rc_context({"svg.hashsalt": "florence2"}), written_whole(path) as draft:
        figure.savefig(draft, dpi=200, format=kind, metadata={"Date": None} if kind == "svg" else None)


def location_tokens(explanation: Any) -> list[int]:
    """Return the numbers, from 0, of the answer's location tokens."""
    return [i for i, token in enumerate(_values(explanation)["tokens"]) if token["spread"] is not None]


def _values(explanation: Any) -> Mapping[str, Any]:
    values: Mapping[str, Any] = explanation if isinstance(explanation, Mapping) else explanation.to_dict()
    return values


def _token(values: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    tokens = values["tokens"]
    if not 0 <= number < len(tokens):
        raise OptionError(f"token is {number}; the answer has {len(tokens)} tokens, counted from 0.")
    chosen: Mapping[str, Any] = tokens[number]
    return chosen


def _chosen(name: str, number: int | None, count: int) -> Sequence[int]:
    if number is not None and not 0 <= number < count:
        raise OptionError(f"{name} is {number}; the decoder has {count} {name}s, counted from 0.")
    return range(count) if number is None else [number]


def _head_map(values: Mapping[str, Any], token: Mapping[str, Any], layer: int, head: int) -> np.ndarray:
    """Return the shares of the whole attention of one head, (h, w)."""
    attention = token["attention"]
    stored = decode_map(attention["maps"][layer][head], *values["image"]["grid"])
    weights: np.ndarray = stored * (attention["peak"][layer][head] / 255)
    return weights


def _image(values: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(values["image"]["data"].partition(",")[2])))


def _draw_boxes(axes: Axes, values: Mapping[str, Any], token: int) -> None:
    """Draw the boxes to which the token belongs."""
    for box in values["answer"].get("boxes") or ():
        first, last = box.get("tokens") or (1, 0)
        if first <= token <= last:
            x1, y1, x2, y2 = box["xyxy"]
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="cyan", linewidth=1.5)


def _locations(values: Mapping[str, Any]) -> str:
    numbers = ", ".join(map(str, location_tokens(values)))
    return f"location tokens are {numbers}" if numbers else "this answer has no location tokens"


def _shown(text: str) -> str:
    return text.strip() or repr(text)


def _plain(text: str) -> str:
    """Escape text so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")
