"""The name of everything that a trace can keep or a patch can change, with its shape.

A name is the path of a module, for what that module gives, or goes on with a last part for what has no module of its
own. `describe_names(config)` prints them all; for the published sizes that is, with * for any number:

    pixel_values                      what the vision tower sees
    vision_tower.convs.*              the picture at the beginning of a stage
    vision_tower.blocks.*.*           pairs of `spatial_block` (`window_attn`) and `channel_block` (`channel_attn`)
    vision_tower                      the grid of the last stage
    multi_modal_projector.pooled      the image tokens before the projection
    multi_modal_projector             and after it
    image_tokens, prompt              what the encoder is given
    encoder.embedding, encoder.layers.*
    memory                            what the encoder gives
    decoder.embedding, decoder.layers.*
    logits, scores.*, scores          the next id: raw, after each rule, and as the search compares them
    search.*                          what the search compared and chose, kept in every trace

Within a layer, a sub-layer's name (`self_attention`, `cross_attention`, `mlp`, `ffn`) is what it adds to the residual
stream, `after_...` is the stream after it, and the layer's own name is the stream at its end. Below an attention are
`queries`, `keys`, `values`, `weights` (after the softmax) and `heads` (what each head mixed, before the heads are
joined and projected). Below an MLP is `hidden` (after the activation).

Letters of the shapes: B pictures or prompts, K beams, H W pixels, h w the grid of a stage, C channels there, windows
of M positions, heads of d channels, G groups of c channels, X channels inside an MLP, N image tokens, P prompt ids,
S = N + P positions of the memory, D model, V vocabulary, t steps so far. Names "per step" are recorded once for every
token of the answer, for K beams; `Florence2Model.decode`, which computes a whole sequence at once, has its T
positions where they have their K beams or the 1 of one position.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from florence2.errors import OptionError
from florence2.model.config import Florence2Config, VisionConfig

When = Literal["picture", "prompt", "answer", "step"]
"""How often a name is recorded: for every picture, for every prompt, at the answer's start, at every step of it."""
Kind = Literal["model", "float32", "int64", "bool"]
RULES = ("repetition_penalty", "no_repeat_ngram", "min_new_tokens", "forced_bos_token", "forced_eos_token")
"""The rules of the logits by name, in the order in which they act (`florence2.generation.rules`)."""


@dataclass(frozen=True)
class Name:
    """One intermediate: its name, its shape in letters ("B·K" is a product), and what it is.

    `kind` is the type of its elements, "model" for that of the weights; `sizes` are the letters that the checkpoint
    fixes; `stage` is the stage of the vision tower whose grid h and w are.
    """

    name: str
    shape: tuple[str, ...]
    what: str
    when: When
    kind: Kind
    sizes: tuple[tuple[str, int], ...] = ()
    stage: int = -1

    @property
    def searched(self) -> bool:
        """Whether it is a decision of the search, which every trace keeps and no patch can change."""
        return self.name.startswith("search.")

    @property
    def own_shape(self) -> tuple[str, ...]:
        """The shape of what a run holds of it: one request alone, its steps stacked, in letters."""
        without = (part.removeprefix("B·").replace("t·K", "steps") for part in self.shape if part not in ("B", "1"))
        return (*(("steps",) if self.when == "step" else ()), *without)

    def shape_for(self, letters: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers."""
        known = {**letters, **dict(self.sizes)}
        return tuple(_product(part, known) for part in self.shape)


def _product(part: str, letters: Mapping[str, int]) -> int:
    size = 1
    for letter in part.split("·"):
        size *= int(letter) if letter.isdigit() else letters[letter]
    return size


def names_of(config: Florence2Config) -> list[Name]:
    """Every name of a checkpoint's runs, in the order in which they are computed."""
    return [*_picture_names(config), *_prompt_names(config), *_answer_names(config)]


def describe_names(config: Florence2Config) -> str:
    """The names as a table of text, layers that are alike as one line with * in place of their numbers."""
    lines: dict[str, tuple[str, str, str]] = {}
    for name in names_of(config):
        pattern = starred(name.name)
        when = "per step" if name.when == "step" else f"per {name.when}"
        lines.setdefault(pattern, (f"({', '.join(name.shape)})", when, name.what))
    return "\n".join(f"{pattern:62} {shape:30} {when:11} {what}" for pattern, (shape, when, what) in lines.items())


def starred(name: str) -> str:
    """A name with * in place of every number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def select(patterns: Iterable[str], names: Sequence[Name], exactly: bool = False) -> dict[str, list[str]]:
    """Each pattern -> the names that it selects.

    In a pattern `*` is one part between dots, or some of it, and `**` any number of parts. It selects what it matches
    and all that is below, `decoder.layers.0.cross_attention` with its weights; with "=" before it, or `exactly`, only
    what it matches. Raises OptionError, naming the nearest, for a pattern that selects nothing.
    """
    found: dict[str, list[str]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"A name or pattern is text, as 'decoder.layers.*', not {str(pattern)[:60]!r}.")
        alone = exactly or pattern.startswith("=")
        parts = pattern.removeprefix("=").split(".")
        found[pattern] = [name.name for name in names if _matches(parts, name.name.split("."), alone)]
        if not found[pattern]:
            raise OptionError(_unknown(pattern.removeprefix("="), names, exactly))
    return found


def _matches(pattern: Sequence[str], parts: Sequence[str], alone: bool) -> bool:
    if not pattern:
        return not parts or not alone
    if pattern[0] == "**":
        return any(_matches(pattern[1:], parts[skip:], alone) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:], alone)


def _unknown(pattern: str, names: Sequence[Name], exactly: bool) -> str:
    known = {name.name for name in names}
    if not exactly:  # modules that give nothing themselves, but have names below them
        known |= {
            ".".join(parts[:end]) for parts in (name.split(".") for name in known) for end in range(1, len(parts))
        }
    near = difflib.get_close_matches(pattern, sorted(known | set(map(starred, known))), n=4, cutoff=0.5)
    nearest = f"the nearest are {', '.join(near)}" if near else "none is like it"
    return (
        f"No intermediate of this checkpoint is called {pattern!r}; {nearest}. "
        "florence2.inspect.describe_names(config) lists all."
    )


def pooled_spans(vision: VisionConfig, grid: tuple[int, int]) -> dict[str, slice]:
    """Where each of `image_feature_source` stands among the image tokens: "spatial_avg_pool" is one token, the mean
    over the grid, the others a token for each of its h·w positions, row by row."""
    spans, start = {}, 0
    for source in vision.image_feature_source:
        length = 1 if source == "spatial_avg_pool" else grid[0] * grid[1]
        spans[source] = slice(start, start + length)
        start += length
    return spans


def picture_letters(vision: VisionConfig, shape: Sequence[int], stage: int) -> dict[str, int]:
    """What the letters are for pixel values of `shape` (B, 3, H, W), at a stage of the vision tower."""
    B, _, H, W = shape
    grids, size = [], (H, W)
    for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        size = ((size[0] + 2 * padding - kernel) // stride + 1, (size[1] + 2 * padding - kernel) // stride + 1)
        grids.append(size)
    h, w = grids[stage]
    spans = pooled_spans(vision, grids[-1])
    windows = -(-h // vision.window_size) * -(-w // vision.window_size)
    return {"B": B, "H": H, "W": W, "h": h, "w": w, "windows": windows, "N": max(span.stop for span in spans.values())}


def _picture_names(config: Florence2Config) -> Iterator[Name]:
    vision = config.vision
    yield Name("pixel_values", ("B", "3", "H", "W"), "the normalised pixels", "picture", "model")
    for stage, depth in enumerate(vision.depths):
        sizes = (("C", vision.dim_embed[stage]), ("X", int(vision.dim_embed[stage] * vision.mlp_ratio)))
        grid, tower = ("B", "h", "w", "C"), "vision_tower"
        what = "the picture at the beginning of a stage"
        yield Name(f"{tower}.convs.{stage}", grid, what, "picture", "model", sizes, stage)
        for i in range(depth):
            for kind in ("spatial", "channel"):
                yield from _block_names(vision, f"{tower}.blocks.{stage}.{i}.{kind}_block", stage, kind, sizes)
    last = (("C", vision.dim_embed[-1]), ("D", vision.projection_dim))
    yield Name("vision_tower", ("B", "h", "w", "C"), "the grid of the last stage", "picture", "model", last)
    projector, before = "multi_modal_projector", ("B", "N", "C")
    yield Name(f"{projector}.pooled", before, "image tokens before the projection", "picture", "model", last)
    yield Name(projector, ("B", "N", "D"), "image tokens", "picture", "model", last)


def _block_names(
    vision: VisionConfig, path: str, stage: int, kind: str, sizes: tuple[tuple[str, int], ...]
) -> Iterator[Name]:
    grid = ("B", "h", "w", "C")
    attention = "window_attn" if kind == "spatial" else "channel_attn"

    def name(last: str, shape: tuple[str, ...], what: str, more: tuple[tuple[str, int], ...] = ()) -> Name:
        return Name(path + last, shape, what, "picture", "model", (*sizes, *more), stage)

    yield name(".conv1", grid, "residual stream after the first convolution")
    yield from _vision_attention(vision, f"{path}.{attention}", stage, kind)
    yield name(f".{attention}", grid, "what the attention adds")
    yield name(".after_attention", grid, "residual stream after the attention")
    yield name(".conv2", grid, "residual stream after the second convolution")
    yield name(".ffn.hidden", ("B", "h", "w", "X"), "inside the MLP, after the activation")
    yield name(".ffn", grid, "what the MLP adds")
    yield name("", grid, "residual stream after the block")


def _vision_attention(vision: VisionConfig, path: str, stage: int, kind: str) -> Iterator[Name]:
    channels = vision.dim_embed[stage]
    if kind == "spatial":
        heads = vision.num_heads[stage]
        sizes = [("heads", heads), ("d", channels // heads), ("M", vision.window_size**2)]
        shapes: list[tuple[str, ...]] = [("B·windows", "heads", "M", end) for end in ("d", "M", "d")]
        what = "attention of a window's positions to its positions"
    else:
        groups = vision.num_groups[stage]
        sizes = [("G", groups), ("c", channels // groups)]
        shapes = [("B", "G", "h", "w", "c"), ("B", "G", "c", "c"), ("B", "G", "h·w", "c")]
        what = "attention of a group's channels to its channels"

    def name(last: str, shape: tuple[str, ...], what: str) -> Name:
        return Name(f"{path}.{last}", shape, what, "picture", "model", tuple(sizes), stage)

    for last in ("queries", "keys", "values"):
        yield name(last, shapes[0], last)
    yield name("weights", shapes[1], what)
    yield name("heads", shapes[2], "what each head or group mixed")


def _prompt_names(config: Florence2Config) -> Iterator[Name]:
    text, stream = config.text, ("B", "S", "D")
    heads = text.encoder_attention_heads
    sizes = (("D", text.d_model), ("heads", heads), ("d", text.d_model // heads), ("X", text.encoder_ffn_dim))

    def name(path: str, shape: tuple[str, ...], what: str) -> Name:
        return Name(path, shape, what, "prompt", "model", sizes)

    yield name("image_tokens", ("B", "N", "D"), "image tokens as the encoder is given them")
    yield name("prompt", ("B", "P", "D"), "embeddings of the prompt's ids")
    yield name("encoder.embedding", stream, "input of the first layer")
    for i in range(text.encoder_layers):
        path = f"encoder.layers.{i}"
        yield from _attention(f"{path}.self_attention", sizes, "prompt", "S", "S", "prompt")
        yield name(f"{path}.self_attention", stream, "what the attention adds")
        yield name(f"{path}.after_self_attention", stream, "residual stream after the attention")
        yield name(f"{path}.mlp.hidden", ("B", "S", "X"), "inside the MLP, after the activation")
        yield name(f"{path}.mlp", stream, "what the MLP adds")
        yield name(path, stream, "residual stream after the layer")
    yield name("memory", stream, "what the encoder gives: the last layer's stream")


def _attention(
    path: str, sizes: tuple[tuple[str, int], ...], when: When, T: str, S: str, keys_when: When
) -> Iterator[Name]:
    """What is below an attention of `T` queries to `S` keys, of which `keys_when` says when they are recorded."""
    own = "K" if keys_when == "step" else S  # a step computes the keys of its own position alone

    def name(last: str, shape: tuple[str, ...], what: str, at: When) -> Name:
        return Name(f"{path}.{last}", shape, what, at, "model", sizes)

    yield name("queries", ("B", "heads", T, "d"), "queries", when)
    yield name("keys", ("B", "heads", own, "d"), "keys", keys_when)
    yield name("values", ("B", "heads", own, "d"), "values", keys_when)
    yield name("weights", ("B", "heads", T, S), "attention, after the softmax", when)
    yield name("heads", ("B", "heads", T, "d"), "what each head mixed, before they are joined", when)


def _answer_names(config: Florence2Config) -> Iterator[Name]:
    text, stream = config.text, ("B·K", "1", "D")
    heads = text.decoder_attention_heads
    sizes = (("D", text.d_model), ("heads", heads), ("d", text.d_model // heads), ("X", text.decoder_ffn_dim))

    def name(path: str, shape: tuple[str, ...], what: str) -> Name:
        return Name(path, shape, what, "step", "model", sizes)

    yield name("decoder.embedding", stream, "input of the first layer")
    for i in range(text.decoder_layers):
        path = f"decoder.layers.{i}"
        yield from _attention(f"{path}.self_attention", sizes, "step", "K", "t·K", "step")
        yield name(f"{path}.self_attention", stream, "what the attention to the answer so far adds")
        yield name(f"{path}.after_self_attention", stream, "residual stream after that")
        yield from _attention(f"{path}.cross_attention", sizes, "step", "K", "S", "answer")
        yield name(f"{path}.cross_attention", stream, "what the attention to the memory adds")
        yield name(f"{path}.after_cross_attention", stream, "residual stream after that")
        yield name(f"{path}.mlp.hidden", ("B·K", "1", "X"), "inside the MLP, after the activation")
        yield name(f"{path}.mlp", stream, "what the MLP adds")
        yield name(path, stream, "residual stream after the layer")
    yield from _score_names(config.text.vocab_size)


def _score_names(vocabulary: int) -> Iterator[Name]:
    scores, candidates, V = ("B·K", "V"), ("B", "candidates"), (("V", vocabulary),)
    yield Name("logits", scores, "logits of the next id", "step", "float32", V)
    for rule in RULES:
        what = "after this rule: logits if greedy, else log-probabilities"
        yield Name(f"scores.{rule}", scores, what, "step", "float32", V)
    yield Name("scores", scores, "log-probabilities by which candidates are compared", "step", "float32", V)
    for rule in RULES[:3]:  # of the others everything else would be listed
        what = "(row of B·K, id) that this rule made impossible"
        yield Name(f"search.banned.{rule}", ("bans", "2"), what, "step", "int64")
    yield Name("search.candidates.tokens", candidates, "the best continuations, 2·K of beams", "step", "int64")
    yield Name("search.candidates.parents", candidates, "the beam that each continues", "step", "int64")
    yield Name("search.candidates.sums", candidates, "its summed log-probability", "step", "float32")
    yield Name("search.finished", candidates, "which became hypotheses", "step", "bool")
    yield Name("search.survivors", ("B", "K"), "the candidates that go on as the beams 0 to K - 1", "step", "int64")
    yield Name("search.done", ("B",), "which answers are settled after this step", "step", "bool")
