"""The drawings of the chapters. Each function draws the values of `recipes.book.values` and returns a figure."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
from PIL import Image

from florence2.inputs.image import open_image
from recipes.book.values import PLACE, SCENE, Values

BLUE, ORANGE, GREEN, GREY, DARK = "#2f6db5", "#e07b1a", "#2f8f4e", "#b9bec6", "#22262b"
PALE = {"word": "#dbe7f5", "location": "#fbe3c8", "mark": "#e6e8eb"}
DPI = 110


def _figure(columns: int, title: str, height: float = 3.1, widths: list[float] | None = None) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, height), layout="constrained", dpi=DPI)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=DARK)
    return figure, figure.subplots(1, columns, squeeze=False, width_ratios=widths)[0]


def _plain(axes: Axes, title: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, color=DARK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _box(axes: Axes, xyxy: Any, colour: str, label: str = "", below: bool = False) -> None:
    x1, y1, x2, y2 = xyxy
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2))
    if label:
        place = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        y, side = (y2 + 3, "top") if below else (y1 - 3, "bottom")
        axes.text(x1, y, label, fontsize=7, color="white", va=side, bbox=place)


def _scene() -> np.ndarray:
    return np.asarray(open_image(SCENE))


# ---- 1. Prompt ------------------------------------------------------------------------------------------------------
def draw_prompt(values: Values) -> Figure:
    """Draw three prompts, cut into tokens: the words of a sentence, and locations among them."""
    figure, (axes,) = _figure(1, "A task becomes a sentence, a sentence becomes ids", height=3.3)
    titles = ("<OD>, published tokenizer", "<REGION_TO_OCR> and a box, published tokenizer", "<OD>, nano's tokenizer")
    for row, title in enumerate(titles):
        top = -1.15 * row
        axes.text(0, top + 0.62, title, fontsize=8.5, color=DARK, va="bottom")
        left = 0.0
        for token, id in zip(values[f"{row}.tokens"], values[f"{row}.ids"], strict=True):
            width = 0.16 + 0.105 * max(len(token), len(str(id)))
            kind = "location" if token.startswith("<loc_") else "mark" if token in ("<s>", "</s>") else "word"
            shape = FancyBboxPatch((left, top), width, 0.55, boxstyle="round,pad=0,rounding_size=0.06")
            shape.set(facecolor=PALE[kind], edgecolor="none")
            axes.add_patch(shape)
            axes.text(left + width / 2, top + 0.37, token, fontsize=8, ha="center", va="center", family="monospace")
            axes.text(left + width / 2, top + 0.13, str(id), fontsize=6.5, ha="center", va="center", color="#5a6068")
            left += width + 0.05
    axes.set_xlim(-0.05, 12.4)
    axes.set_ylim(-2.45, 0.95)
    _plain(axes)
    return figure


# ---- 2. Pixels ------------------------------------------------------------------------------------------------------
def draw_pixels(values: Values) -> Figure:
    """Draw an image as it is, as the model sees it, one normalised channel, and what a box becomes."""
    height, width = values["image"].shape[:2]
    side = values["seen"].shape[0]
    title = f"An image of {width} x {height} is squashed to {side} x {side}; its coordinates do not mind"
    figure, axes = _figure(3, title, widths=[1.35, 1, 1.15])
    bins = np.floor(values["box"] / np.array([width, height, width, height]) * 1000).astype(int)
    axes[0].imshow(values["image"])
    _box(axes[0], values["box"], ORANGE, values["label"], below=True)
    _plain(axes[0], f"the image: x1 = {values['box'][0]:.1f} of {width} px, bin {bins[0]}")
    axes[1].imshow(values["seen"])
    seen = values["box"] * side / np.array([width, height, width, height])
    _box(axes[1], seen, ORANGE, values["label"], below=True)
    _plain(axes[1], f"what the model sees: x1 = {seen[0]:.1f} of {side} px, bin {bins[0]}")
    shown = axes[2].imshow(values["values"][0], cmap="RdBu_r", vmin=-2.2, vmax=2.2)
    figure.colorbar(shown, ax=axes[2], shrink=0.85)
    _plain(axes[2], "its red channel, normalised")
    return figure


# ---- 3. DaViT -------------------------------------------------------------------------------------------------------
def draw_davit(values: Values) -> Figure:
    """Change one position, and draw where either attention notices it, and a matrix of channels."""
    figure, axes = _figure(4, "One position is changed. Which positions notice?", widths=[1, 1, 1, 1.15])
    h, w, _ = values["shape_of_grid"]
    image = np.asarray(open_image(SCENE).resize((8 * w, 8 * h), Image.Resampling.BICUBIC))
    axes[0].imshow(image, extent=(-0.5, w - 0.5, h - 0.5, -0.5))
    for line in range(0, max(h, w) + 1, values["window"]):
        axes[0].axhline(line - 0.5, color="white", linewidth=1)
        axes[0].axvline(line - 0.5, color="white", linewidth=1)
    for number, (name, title) in enumerate(
        (("windows", "after window attention"), ("channels", "after channel attention"))
    ):
        change = values[name] / values[name].max()
        shares = f"{(values[name] > 0).mean():.0%} of all positions"
        axes[number + 1].imshow(np.log10(np.maximum(change, 1e-4)), cmap="magma", vmin=-4, vmax=0)
        _plain(axes[number + 1], f"{title}:\n{shares}")
    for each in axes[:3]:
        each.add_patch(Rectangle((PLACE[1] - 0.5, PLACE[0] - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2))
    _plain(axes[0], f"a grid of {h} x {w} in windows\nof {values['window']} x {values['window']}; one position changed")
    shown = axes[3].imshow(values["matrix"], cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes[3], shrink=0.8)
    c = len(values["matrix"])
    _plain(axes[3], f"channel attention: {c} channels\nof a group look at {c}")
    return figure


# ---- 4. Projection --------------------------------------------------------------------------------------------------
def draw_projection(values: Values) -> Figure:
    """Draw the grid of the last stage as image tokens, and the table of positions."""
    h, w = values["alike"].shape
    figure, axes = _figure(4, f"{h} x {w} positions and their mean become {h * w + 1} tokens", widths=[1, 1, 0.3, 1.15])
    axes[0].imshow(_scene(), extent=(0, w, h, 0))
    for line in range(max(h, w) + 1):
        axes[0].axhline(line, color="white", linewidth=0.6, alpha=0.8)
        axes[0].axvline(line, color="white", linewidth=0.6, alpha=0.8)
    axes[0].set_aspect("equal")
    _plain(axes[0], "the image under the last grid")
    axes[1].imshow(values["colours"])
    _plain(axes[1], f"tokens 1 to {h * w}: their three\nmain directions as red, green, blue")
    axes[2].imshow(values["mean"][None, None])
    _plain(axes[2], "token 0:\nthe mean")
    shown = axes[3].imshow(values["alike"], cmap="RdBu_r", vmin=-1, vmax=1)
    axes[3].add_patch(Rectangle((7 - 0.5, 5 - 0.5), 1, 1, fill=False, edgecolor=DARK, linewidth=2))
    figure.colorbar(shown, ax=axes[3], shrink=0.8)
    _plain(axes[3], "how alike the position embeddings are\nto that of row 5, column 7")
    return figure


# ---- 5. Encoder and decoder -----------------------------------------------------------------------------------------
def draw_attention(values: Values) -> Figure:
    """Draw where the decoder looked for a label and the four locations after it."""
    title = "Where the last decoder layer looked while it wrote one object"
    figure, axes = _figure(5, title, height=3.3)
    image = _scene()
    height, width = image.shape[:2]
    for axes_, token, weights, mean, seen, prompt in zip(
        axes, *(values[key] for key in ("tokens", "maps", "mean token", "image", "prompt")), strict=True
    ):
        axes_.imshow(image)
        shade = {"cmap": "Oranges", "extent": (0, width, height, 0), "interpolation": "bilinear"}
        axes_.imshow(weights, alpha=np.clip(weights / weights.max() * 1.2, 0, 0.9), **shade)
        _box(axes_, values["box"], "white")
        _plain(axes_, f"{token}\n{seen:.0%} on places,\n{mean:.0%} on their mean,\n{prompt:.0%} on the prompt")
        axes_.set_xlim(0, width)
        axes_.set_ylim(height, 0)
    return figure


# ---- 6. Beam search -------------------------------------------------------------------------------------------------
FATES = {"lives": BLUE, "finished": GREEN, "dropped": GREY, "ended low": GREY, "stopped": GREY, "cut": GREY}


def draw_search(values: Values) -> Figure:
    """Draw the candidates of every step as a tree: which continue, which finish, which are dropped."""
    figure, (axes,) = _figure(1, "A search with three beams, step by step", height=4.2)
    places: dict[tuple[int, int], tuple[float, float]] = {(0, 0): (0.0, 0.0)}
    axes.text(0, 0, "<s>", ha="center", va="center", fontsize=9, family="monospace", color="white", bbox=_tag(BLUE))
    ranks = np.concatenate([np.arange((values["step"] == step).sum()) for step in np.unique(values["step"])])
    for i, rank in enumerate(ranks):
        step, fate, x, y = values["step"][i], values["fate"][i], float(values["step"][i]), -float(rank)
        parent = places[(step - 1, values["parent"][i])]
        alive = fate in ("lives", "finished")
        style: dict[str, Any] = {"color": FATES[fate], "linewidth": 1.8 if alive else 0.7, "zorder": 1}
        axes.plot([parent[0], x], [parent[1], y], **style)
        text = f"{values['text'][i]}  {values['sum'][i]:.2f}"
        colour = "white" if alive else DARK
        axes.text(
            x, y, text, ha="center", va="center", fontsize=8, family="monospace", color=colour, bbox=_tag(FATES[fate])
        )
        if values["beam"][i] >= 0:
            places[(step, values["beam"][i])] = (x, y)
    for i, (name, colour) in enumerate(
        (("continues as a beam", BLUE), ("ends: a hypothesis", GREEN), ("left behind", GREY))
    ):
        axes.text(0.02, 0.2 - 0.08 * i, name, fontsize=8, transform=axes.transAxes, color="white", bbox=_tag(colour))
    axes.set_xlim(-0.35, values["step"].max() + 0.45)
    axes.set_ylim(-5.6, 0.6)
    _plain(axes)
    return figure


def _tag(colour: str) -> dict[str, Any]:
    return {"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.3"}


# ---- 7. Answers -----------------------------------------------------------------------------------------------------
def draw_answers(values: Values) -> Figure:
    """Draw boxes, quads and polygons of one scene, and the spread of one coordinate over its bins."""
    figure, axes = _figure(4, "Locations become boxes, quads and outlines", widths=[1, 1, 1, 1.45])
    image = _scene()
    for each in axes[:3]:
        each.imshow(image)
    for box, label, score in zip(values["boxes"], values["labels"], values["score"], strict=True):
        _box(axes[0], box, BLUE, f"{label} {score:.2f}", below=True)
    for quad, text in zip(values["quads"], values["texts"], strict=True):
        axes[1].add_patch(Polygon(quad.reshape(-1, 2), fill=False, edgecolor=ORANGE, linewidth=2))
        axes[1].text(quad[0], quad[1] - 4, text, fontsize=7.5, color="white", bbox=_tag(ORANGE))
    axes[2].add_patch(Polygon(values["polygon"].reshape(-1, 2), facecolor=GREEN + "66", edgecolor=GREEN, linewidth=2))
    for each, title in zip(
        axes,
        (
            "<OD>: 4 locations,\nwith the reference's score",
            "<OCR_WITH_REGION>:\n8 locations",
            "a polygon: any\neven number",
        ),
        strict=False,
    ):
        _plain(each, title)
    written, bins = values["written"], values["bins"]
    near = np.arange(max(written - 18, 0), min(written + 19, 1000))
    axes[3].bar(near, bins[near], color=[ORANGE if bin == written else GREY for bin in near], width=0.8)
    around = bins[max(written - 18, 0) : written + 19].sum()
    axes[3].set_title(
        f"x1 of the large triangle: bin {written} has {bins[written]:.2f},\nthe bins shown have {around:.2f} together",
        fontsize=9,
    )
    axes[3].tick_params(labelsize=7)
    axes[3].spines[["top", "right"]].set_visible(False)
    return figure


DRAWINGS: dict[str, Callable[[Values], Figure]] = {
    "prompt": draw_prompt,
    "pixels": draw_pixels,
    "davit": draw_davit,
    "projection": draw_projection,
    "encoder-decoder": draw_attention,
    "beam-search": draw_search,
    "answers": draw_answers,
}
