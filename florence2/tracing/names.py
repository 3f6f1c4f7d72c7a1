"""The names of everything that a trace can keep or a patch can change, with their shapes.

A name is the path of the module that computes the value. A value without a module of its own has a last part that says
what it is. `describe_names(config)` prints all names; for the published sizes they are, with * for any number:

    pixel_values                      the input of the vision tower
    vision_tower.convs.*              the image at the start of a stage
    vision_tower.blocks.*.*           pairs of `spatial_block` (`window_attn`) and `channel_block` (`channel_attn`)
    vision_tower                      the grid of the last stage
    multi_modal_projector.pooled      the image tokens before the projection
    multi_modal_projector             the image tokens after it
    image_tokens, prompt              the two inputs of the encoder
    encoder.embedding, encoder.layers.*
    memory                            the output of the encoder
    decoder.embedding, decoder.layers.*
    logits, scores.*, scores          the next id: raw, after each rule, and as the search compares candidates
    search.*                          what the search compared and chose; every trace keeps these

Within a layer, a sub-layer's name (`self_attention`, `cross_attention`, `mlp`, `ffn`) is what it adds to the residual
stream, `after_...` is the stream after it, and the layer's own name is the stream at its end. Below an attention are
`queries`, `keys`, `values`, `weights` (after the softmax) and `heads` (the output of each head, before the heads are
joined and projected). Below an MLP are `before` and `hidden`, the values before and after the activation.

Letters of the shapes: B images or prompts, K beams, H W pixels, h w the grid of a stage, C its channels, windows
of M positions, heads of d channels, G groups of c channels, X channels inside an MLP, N image tokens, P prompt ids,
S = N + P positions of the memory, D model, V vocabulary, t steps so far. Names "per step" are recorded once for every
token of the answer, for K beams. `Florence2Model.decode` computes a whole sequence at once: its values have T
positions in place of the K beams, or in place of the 1 of a single position.

In the text stacks some names differ from the paths of their modules; `module_of` gives the path for a name. A module of
your own may record other names; `f.trace` and `f.patched` take them with `unknown="allow"`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from florence2.model.config import Florence2Config, VisionConfig

When = Literal["image", "prompt", "answer", "step"]
"""How often a name is recorded: once for every image, every prompt, at the start of the answer, or at every step."""
ElementType = Literal["model", "float32", "int64", "bool"]
"""The type of a value's elements; "model" is that of the weights."""
RULES = ("repetition_penalty", "no_repeat_ngram", "min_new_tokens", "forced_bos_token", "forced_eos_token")
"""The rules of the logits by name, in the order in which they act (`florence2.generation.rules`)."""


@dataclass(frozen=True)
class Name:
    """One intermediate value: its name, its shape in letters ("B·K" is a product), and a description.

    `dtype` is the type of its elements; `sizes` are the letters that the checkpoint fixes; `stage` is the stage of the
    vision tower whose grid h and w are.
    """

    name: str
    shape: tuple[str, ...]
    description: str
    when: When
    dtype: ElementType
    sizes: tuple[tuple[str, int], ...] = ()
    stage: int = -1

    @property
    def searched(self) -> bool:
        """Whether it is a decision of the search, which every trace keeps and no patch can change."""
        return self.name.startswith("search.")

    @property
    def grows(self) -> bool:
        """Whether it has a dimension over the answer so far, which is longer at every step."""
        return any("t" in part.split("·") for part in self.shape)

    @property
    def own_shape(self) -> tuple[str, ...]:
        """The shape of the value in `run[name]`, in letters: one request alone, its steps stacked."""
        without = (part.removeprefix("B·").replace("t·K", "steps") for part in self.shape if part not in ("B", "1"))
        return (*(("steps",) if self.when == "step" else ()), *without)

    def dims(self, *letters: str) -> list[int]:
        """Return the dimensions whose whole size is one of these letters or products."""
        return [dim for dim, part in enumerate(self.shape) if part in letters]

    def shape_for(self, letters: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape in numbers."""
        known = {**letters, **dict(self.sizes)}
        return tuple(_product(part, known) for part in self.shape)


def _product(part: str, letters: Mapping[str, int]) -> int:
    size = 1
    for letter in part.split("·"):
        size *= int(letter) if letter.isdigit() else letters[letter]
    return size


def names_of(config: Florence2Config) -> list[Name]:
    """Return every name of a checkpoint's runs, in the order in which they are computed."""
    return [*_image_names(config), *_prompt_names(config), *_answer_names(config)]


def describe_names(config: Florence2Config) -> str:
    """Describe every name that `f.trace` and `f.patched` accept, as a table.

    Args:
        config: The checkpoint's configuration, `f.model.config`.

    Returns:
        One line for each name, with * in place of numbers: name, shape in letters (see `florence2.tracing.names`), how
        often it is recorded, a description and, in brackets, the module whose output it is (see `module_of`).
    """
    lines: dict[str, str] = {}
    for name in names_of(config):
        pattern, module = starred(name.name), module_of(starred(name.name))
        shape, when = f"({', '.join(name.shape)})", "per step" if name.when == "step" else f"per {name.when}"
        text = f"{name.description} [{module}]" if module else name.description
        lines.setdefault(pattern, f"{pattern:62} {shape:30} {when:11} {text}")
    return "\n".join(lines.values())


def starred(name: str) -> str:
    """Return a name with * in place of every number."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", name)


_VISION_MODULE = re.compile(
    r"vision_tower(\.convs\.[0-9*]+|\.blocks\.[0-9*]+\.[0-9*]+\.(spatial|channel)_block(\.(window|channel)_attn|\.ffn)?)?"
)
_LAYER = re.compile(r"((?:en|de)coder\.layers\.[0-9*]+)\.?(.*)")
_IN_LAYER = {
    "": "",
    "self_attention": ".self_attn",
    "after_self_attention": ".self_attn_layer_norm",
    "cross_attention": ".encoder_attn",
    "after_cross_attention": ".encoder_attn_layer_norm",
    "mlp.before": ".fc1",
    "mlp": ".fc2",
}
_IN_LAYER |= {
    f"{attention}.{value}": f"{_IN_LAYER[attention]}.{letter}_proj"
    for attention in ("self_attention", "cross_attention")
    for value, letter in (("queries", "q"), ("keys", "k"), ("values", "v"))
}
_OUTSIDE_LAYERS = {
    "multi_modal_projector": "multi_modal_projector",
    "prompt": "language_model.shared",
    "encoder.embedding": "language_model.encoder.layernorm_embedding",
    "memory": "language_model.encoder",
    "decoder.embedding": "language_model.decoder.layernorm_embedding",
}


def module_of(name: str) -> str | None:
    """Return the path of the module whose output a value is.

    `f.model.get_submodule(path)` is the module, where hooks and tools that know only modules find the same numbers.
    Queries, keys and values are split into heads after their projection, so there the shapes differ.

    Args:
        name: A name that `describe_names` lists; a number may be "*".

    Returns:
        The path within a `Florence2Model`, such as "language_model.decoder.layers.0.encoder_attn" for
        "decoder.layers.0.cross_attention"; None for a value that is not the output of a module of its own.
    """
    if _VISION_MODULE.fullmatch(name):
        return name
    block = name.removesuffix(".ffn.before")
    if _VISION_MODULE.fullmatch(block):
        return f"{block}.ffn.fc1"
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _IN_LAYER:
        return f"language_model.{layer[1]}{_IN_LAYER[layer[2]]}"
    return _OUTSIDE_LAYERS.get(name)


def pooled_spans(vision: VisionConfig, grid: tuple[int, int]) -> dict[str, slice]:
    """Return where the tokens of each `image_feature_source` are among the image tokens.

    "spatial_avg_pool" is one token, the mean over the grid; every other source has a token for each of the grid's h·w
    positions, row by row.
    """
    spans, start = {}, 0
    for source in vision.image_feature_source:
        length = 1 if source == "spatial_avg_pool" else grid[0] * grid[1]
        spans[source] = slice(start, start + length)
        start += length
    return spans


def image_letters(vision: VisionConfig, shape: Sequence[int], stage: int) -> dict[str, int]:
    """Return the size of each letter for pixel values of `shape` (B, 3, H, W), at a stage of the vision tower."""
    B, _, H, W = shape
    grids, size = [], (H, W)
    for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        size = ((size[0] + 2 * padding - kernel) // stride + 1, (size[1] + 2 * padding - kernel) // stride + 1)
        grids.append(size)
    h, w = grids[stage]
    spans = pooled_spans(vision, grids[-1])
    windows = -(-h // vision.window_size) * -(-w // vision.window_size)
    return {"B": B, "H": H, "W": W, "h": h, "w": w, "windows": windows, "N": max(span.stop for span in spans.values())}


def _image_names(config: Florence2Config) -> Iterator[Name]:
    vision = config.vision
    yield Name("pixel_values", ("B", "3", "H", "W"), "the normalised pixels", "image", "model")
    for stage, depth in enumerate(vision.depths):
        sizes = (("C", vision.dim_embed[stage]), ("X", int(vision.dim_embed[stage] * vision.mlp_ratio)))
        grid, tower = ("B", "h", "w", "C"), "vision_tower"
        text = "the image at the start of a stage"
        yield Name(f"{tower}.convs.{stage}", grid, text, "image", "model", sizes, stage)
        for i in range(depth):
            for kind in ("spatial", "channel"):
                yield from _block_names(vision, f"{tower}.blocks.{stage}.{i}.{kind}_block", stage, kind, sizes)
    last = (("C", vision.dim_embed[-1]), ("D", vision.projection_dim))
    yield Name("vision_tower", ("B", "h", "w", "C"), "the grid of the last stage", "image", "model", last)
    projector, before = "multi_modal_projector", ("B", "N", "C")
    yield Name(f"{projector}.pooled", before, "image tokens before the projection", "image", "model", last)
    yield Name(projector, ("B", "N", "D"), "image tokens", "image", "model", last)


def _block_names(
    vision: VisionConfig, path: str, stage: int, kind: str, sizes: tuple[tuple[str, int], ...]
) -> Iterator[Name]:
    grid = ("B", "h", "w", "C")
    attention = "window_attn" if kind == "spatial" else "channel_attn"

    def name(last: str, shape: tuple[str, ...], text: str, more: tuple[tuple[str, int], ...] = ()) -> Name:
        return Name(path + last, shape, text, "image", "model", (*sizes, *more), stage)

    yield name(".conv1", grid, "residual stream after the first convolution")
    yield from _vision_attention(vision, f"{path}.{attention}", stage, kind)
    yield name(f".{attention}", grid, "what the attention adds")
    yield name(".after_attention", grid, "residual stream after the attention")
    yield name(".conv2", grid, "residual stream after the second convolution")
    yield name(".ffn.before", ("B", "h", "w", "X"), "inside the MLP, before the activation")
    yield name(".ffn.hidden", ("B", "h", "w", "X"), "inside the MLP, after the activation")
    yield name(".ffn", grid, "what the MLP adds")
    yield name("", grid, "residual stream after the block")


def _vision_attention(vision: VisionConfig, path: str, stage: int, kind: str) -> Iterator[Name]:
    channels = vision.dim_embed[stage]
    if kind == "spatial":
        heads = vision.num_heads[stage]
        sizes = [("heads", heads), ("d", channels // heads), ("M", vision.window_size**2)]
        shapes: list[tuple[str, ...]] = [("B·windows", "heads", "M", end) for end in ("d", "M", "d")]
        text = "attention of a window's positions to its positions"
    else:
        groups = vision.num_groups[stage]
        sizes = [("G", groups), ("c", channels // groups)]
        shapes = [("B", "G", "h", "w", "c"), ("B", "G", "c", "c"), ("B", "G", "h·w", "c")]
        text = "attention of a group's channels to its channels"

    def name(last: str, shape: tuple[str, ...], text: str) -> Name:
        return Name(f"{path}.{last}", shape, text, "image", "model", tuple(sizes), stage)

    for last in ("queries", "keys", "values"):
        yield name(last, shapes[0], last)
    yield name("weights", shapes[1], text)
    yield name("heads", shapes[2], "output of each head or group")


def _prompt_names(config: Florence2Config) -> Iterator[Name]:
    text, stream = config.text, ("B", "S", "D")
    heads = text.encoder_attention_heads
    sizes = (("D", text.d_model), ("heads", heads), ("d", text.d_model // heads), ("X", text.encoder_ffn_dim))

    def name(path: str, shape: tuple[str, ...], text: str) -> Name:
        return Name(path, shape, text, "prompt", "model", sizes)

    yield name("image_tokens", ("B", "N", "D"), "image tokens at the input of the encoder")
    yield name("prompt", ("B", "P", "D"), "embeddings of the prompt's ids")
    yield name("encoder.embedding", stream, "input of the first layer")
    for i in range(text.encoder_layers):
        path = f"encoder.layers.{i}"
        yield from _attention(f"{path}.self_attention", sizes, "prompt", "S", "S", "prompt")
        yield name(f"{path}.self_attention", stream, "what the attention adds")
        yield name(f"{path}.after_self_attention", stream, "residual stream after the attention")
        yield name(f"{path}.mlp.before", ("B", "S", "X"), "inside the MLP, before the activation")
        yield name(f"{path}.mlp.hidden", ("B", "S", "X"), "inside the MLP, after the activation")
        yield name(f"{path}.mlp", stream, "what the MLP adds")
        yield name(path, stream, "residual stream after the layer")
    yield name("memory", stream, "output of the encoder: the last layer's stream")


def _attention(
    path: str, sizes: tuple[tuple[str, int], ...], when: When, T: str, S: str, keys_when: When
) -> Iterator[Name]:
    """Yield the names below an attention of `T` queries to `S` keys; `keys_when` says when the keys are recorded."""
    own = "K" if keys_when == "step" else S  # a step computes the keys of its own position only

    def name(last: str, shape: tuple[str, ...], text: str, at: When) -> Name:
        return Name(f"{path}.{last}", shape, text, at, "model", sizes)

    yield name("queries", ("B", "heads", T, "d"), "queries", when)
    yield name("keys", ("B", "heads", own, "d"), "keys", keys_when)
    yield name("values", ("B", "heads", own, "d"), "values", keys_when)
    yield name("weights", ("B", "heads", T, S), "attention, after the softmax", when)
    yield name("heads", ("B", "heads", T, "d"), "output of each head, before they are joined", when)


def _answer_names(config: Florence2Config) -> Iterator[Name]:
    text, stream = config.text, ("B·K", "1", "D")
    heads = text.decoder_attention_heads
    sizes = (("D", text.d_model), ("heads", heads), ("d", text.d_model // heads), ("X", text.decoder_ffn_dim))

    def name(path: str, shape: tuple[str, ...], text: str) -> Name:
        return Name(path, shape, text, "step", "model", sizes)

    yield name("decoder.embedding", stream, "input of the first layer")
    for i in range(text.decoder_layers):
        path = f"decoder.layers.{i}"
        yield from _attention(f"{path}.self_attention", sizes, "step", "K", "t·K", "step")
        yield name(f"{path}.self_attention", stream, "what the attention to the answer so far adds")
        yield name(f"{path}.after_self_attention", stream, "residual stream after that")
        yield from _attention(f"{path}.cross_attention", sizes, "step", "K", "S", "answer")
        yield name(f"{path}.cross_attention", stream, "what the attention to the memory adds")
        yield name(f"{path}.after_cross_attention", stream, "residual stream after that")
        yield name(f"{path}.mlp.before", ("B·K", "1", "X"), "inside the MLP, before the activation")
        yield name(f"{path}.mlp.hidden", ("B·K", "1", "X"), "inside the MLP, after the activation")
        yield name(f"{path}.mlp", stream, "what the MLP adds")
        yield name(path, stream, "residual stream after the layer")
    yield from _score_names(config.text.vocab_size)


def _score_names(vocabulary: int) -> Iterator[Name]:
    scores, candidates, V = ("B·K", "V"), ("B", "candidates"), (("V", vocabulary),)
    yield Name("logits", scores, "logits of the next id", "step", "float32", V)
    for rule in RULES:
        text = "after this rule: logits if greedy, else log-probabilities"
        yield Name(f"scores.{rule}", scores, text, "step", "float32", V)
    yield Name("scores", scores, "log-probabilities by which candidates are compared", "step", "float32", V)
    for rule in RULES[:3]:  # a forced id bans every other id, which would be too long a list
        text = "(row of B·K, id) that this rule made impossible"
        yield Name(f"search.banned.{rule}", ("bans", "2"), text, "step", "int64")
    yield Name("search.candidates.tokens", candidates, "the best continuations, 2·K of beams", "step", "int64")
    yield Name("search.candidates.parents", candidates, "the beam that each continues", "step", "int64")
    yield Name("search.candidates.sums", candidates, "its summed log-probability", "step", "float32")
    yield Name("search.finished", candidates, "which became hypotheses", "step", "bool")
    yield Name("search.survivors", ("B", "K"), "the candidates that become beams 0 to K - 1", "step", "int64")
    yield Name("search.done", ("B",), "which answers are settled after this step", "step", "bool")
