"""The parts of a page that the code writes: listings, tables of shapes, the search by hand.

A page marks such a part with `<!-- made: NAME [ARGUMENT] -->` and `<!-- /made -->`; `fill` writes what lies between.
"""

import ast
import re
from collections.abc import Callable, Sequence
from functools import cache

from florence2.checkpoints.presets import preset
from florence2.generation.options import GenerationOptions
from florence2.inputs.tasks import _PUBLISHED
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.config import Florence2Config
from florence2.pipeline import Florence2
from recipes.book.values import PUBLISHED_TOKENIZER, ROOT, SCENE, search_steps, token_text

BOOK = ROOT / "docs" / "how-it-works"
MINIMAL = "docs/florence2_minimal.py"
_MADE = re.compile(r"(<!-- made: (\S+)(?: (\S+))? -->\n).*?(<!-- /made -->)", re.S)
Rows = list[tuple[str, str, str]]


def fill(page: str, f: Florence2) -> str:
    """Return the text of a page with every marked part written again."""
    return _MADE.sub(lambda mark: f"{mark[1]}\n{BLOCKS[mark[2]](f, mark[3] or '').strip()}\n\n{mark[4]}", page)


# ---- listings -------------------------------------------------------------------------------------------------------
def listing(f: Florence2, place: str) -> str:  # noqa: ARG001
    """Return a function or class as its file has it: `name` of the minimal file, or `path::Class.name`."""
    path, _, name = place.rpartition("::")
    path = path or MINIMAL
    text = (ROOT / path).read_text(encoding="utf-8")
    node = _find(ast.parse(text), name.split("."))
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    code = "\n".join(line[indent:] for line in lines)
    return f"```py\n{code}\n```\n\nFrom [`{path}`]({_link(path)}), lines {node.lineno} to {node.end_lineno}."


def _find(node: ast.AST, names: list[str]) -> ast.ClassDef | ast.FunctionDef | ast.Assign:
    """Return the definition of a dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name == names[0]:
            return child if len(names) == 1 else _find(child, names[1:])
        if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == names[0]:
            return child
    raise KeyError(names[0])


def _link(path: str) -> str:
    return "../florence2_minimal.py" if path == MINIMAL else f"../../{path}"


# ---- shapes of base and nano, side by side --------------------------------------------------------------------------
@cache
def _published_prompt(task: str) -> int:
    return len(FlorenceTokenizer(PUBLISHED_TOKENIZER).encode(_PUBLISHED[task].sentence))


def _table(head: str, rows: Rows) -> str:
    lines = [f"| {head} | base | nano |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {base} | {nano} |" for name, base, nano in rows)])


def _both(name: str, value: Callable[[Florence2Config], object], nano: Florence2Config) -> tuple[str, str, str]:
    base, small = value(preset("base")), value(nano)
    return name, _shown(base), _shown(small)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_shown(part) for part in value)})"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _side(config: Florence2Config) -> int:
    return 768 if config == preset("base") else 192


def _grids(config: Florence2Config) -> list[tuple[int, int]]:
    """Return the grid after each stage."""
    vision, grids, side = config.vision, [], _side(config)
    for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        side = (side + 2 * padding - kernel) // stride + 1
        grids.append((side, side))
    return grids


def _tokens(config: Florence2Config) -> int:
    return config.vision.image_tokens(_side(config), _side(config))


def prompt_shapes(f: Florence2, _: str) -> str:
    """Return the sizes of a prompt."""
    nano = f.model.config
    lengths = _published_prompt("<OD>"), len(f.processor.prompt("<OD>"))
    first = 50269, f.processor.tokenizer.token_id("<loc_0>") or 0
    places = [f"{id:,} to {id + 999:,}" for id in first]
    rows: Rows = [
        ("prompt of `<OD>`", f"(1, {lengths[0]})", f"(1, {lengths[1]})"),
        _both("vocabulary V", lambda c: c.text.vocab_size, nano),
        ("ids of `<loc_0>` to `<loc_999>`", places[0], places[1]),
        _both("one token, looked up", lambda c: (c.text.d_model,), nano),
    ]
    return _table("what", rows)


def pixel_shapes(f: Florence2, _: str) -> str:
    """Return the sizes of an image."""
    nano = f.model.config
    rows = [
        _both("pixel values", lambda c: (1, 3, _side(c), _side(c)), nano),
        _both("numbers in them", lambda c: 3 * _side(c) ** 2, nano),
        _both("pixels under one place of the last grid", lambda c: _side(c) // _grids(c)[-1][0], nano),
    ]
    return _table("what", rows)


def davit_shapes(f: Florence2, _: str) -> str:
    """Return the sizes of every stage."""
    lines = ["| model | stage | convolution | grid and channels | pairs | windows | heads x d | groups x d |"]
    lines += ["| --- " * 8 + "|"]
    for name, config in (("base", preset("base")), ("nano", f.model.config)):
        v = config.vision
        for i, (h, w) in enumerate(_grids(config)):
            windows = -(-h // v.window_size) * -(-w // v.window_size)
            lines.append(
                f"| {name} | {i} | {v.patch_size[i]} x {v.patch_size[i]}, stride {v.patch_stride[i]} "
                f"| {h} x {w} x {v.dim_embed[i]:,} | {v.depths[i]} | {windows} of {v.window_size} x {v.window_size} "
                f"| {v.num_heads[i]} x {v.dim_embed[i] // v.num_heads[i]} "
                f"| {v.num_groups[i]} x {v.dim_embed[i] // v.num_groups[i]} |"
            )
    return "\n".join(lines)


def projection_shapes(f: Florence2, _: str) -> str:
    """Return the sizes of the projection."""
    nano = f.model.config
    rows = [
        _both("grid", lambda c: (1, *_grids(c)[-1], c.vision.dim_embed[-1]), nano),
        _both("position table, columns and rows each", lambda c: _half(c), nano),
        _both("pooled: mean and places", lambda c: (1, _tokens(c), c.vision.dim_embed[-1]), nano),
        _both("`image_projection`", lambda c: (c.vision.dim_embed[-1], c.text.d_model), nano),
        _both("image tokens", lambda c: (1, _tokens(c), c.text.d_model), nano),
    ]
    return _table("what", rows)


def _half(config: Florence2Config) -> tuple[int, int]:
    return config.vision.max_position_embeddings, config.vision.dim_embed[-1] // 2


def text_shapes(f: Florence2, _: str) -> str:
    """Return the sizes of encoder and decoder."""
    nano = f.model.config
    rows = [
        _both("layers of encoder, decoder", lambda c: f"{c.text.encoder_layers}, {c.text.decoder_layers}", nano),
        _both("width D", lambda c: c.text.d_model, nano),
        _both("heads x d", lambda c: f"{c.text.encoder_attention_heads} x {_head(c)}", nano),
        _both("inside the MLP", lambda c: c.text.encoder_ffn_dim, nano),
        _both("positions, of memory and answer each", lambda c: c.text.max_position_embeddings, nano),
        _both("image tokens", lambda c: (1, _tokens(c), c.text.d_model), nano),
        ("memory of `<OD>`", _memory(preset("base"), _published_prompt("<OD>")), _memory(nano, _prompt(f))),
        _both("logits of one step", lambda c: (1, c.text.vocab_size), nano),
    ]
    return _table("what", rows)


def _head(config: Florence2Config) -> int:
    return config.text.d_model // config.text.encoder_attention_heads


def _prompt(f: Florence2) -> int:
    return len(f.processor.prompt("<OD>"))


def _memory(config: Florence2Config, prompt: int) -> str:
    return _shown((1, _tokens(config) + prompt, config.text.d_model))


def search_shapes(f: Florence2, _: str) -> str:
    """Return the settings of the search and the sizes of a step."""
    nano = f.model.config
    rows = [
        _both("beams K", lambda c: _options(c).num_beams, nano),
        _both("scores of a step", lambda c: (_options(c).num_beams, c.text.vocab_size), nano),
        _both("candidates compared, 2K", lambda c: 2 * _options(c).num_beams, nano),
        _both("ids of an n-gram that may not repeat", lambda c: _options(c).no_repeat_ngram_size or "off", nano),
        _both("first id forced, last id forced", lambda c: f"{c.generation['forced_bos_token_id']}, {_last(c)}", nano),
        _both("`early_stopping`", lambda c: _options(c).early_stopping, nano),
        _both("`length_penalty`", lambda c: _options(c).length_penalty, nano),
    ]
    return _table("what", rows)


def answer_shapes(f: Florence2, _: str) -> str:
    """Return what a location is worth."""
    nano = f.model.config
    rows = [
        _both("locations in the vocabulary", lambda c: f"1,000 of {c.text.vocab_size:,}", nano),
        _both("pixels of the model's input in a bin", lambda c: _side(c) / 1000, nano),
        _both("bins across one place of the last grid", lambda c: round(1000 / _grids(c)[-1][0], 1), nano),
        _both("most tokens of an answer", lambda c: c.text.max_position_embeddings, nano),
    ]
    return _table("what", rows)


def _options(config: Florence2Config) -> GenerationOptions:
    return GenerationOptions.from_settings(config.generation)


def _last(config: Florence2Config) -> object:
    return config.generation["forced_eos_token_id"]


def letters(f: Florence2, _: str) -> str:
    """Return the letters of all chapters with their sizes."""
    nano = f.model.config
    rows = [
        ("B", "images of a batch", "", ""),
        ("H, W", *_both("rows and columns of a grid, here the last", lambda c: _grids(c)[-1], nano)),
        ("C", *_both("channels of a stage", lambda c: f"{c.vision.dim_embed[0]} to {c.vision.dim_embed[-1]:,}", nano)),
        ("G", *_both("heads or groups, in the tower and in BART", _all_heads, nano)),
        ("d", *_both("width of one, in the tower and in BART", _all_widths, nano)),
        ("N", *_both("image tokens", _tokens, nano)),
        ("S", "image and prompt tokens", *_both_prompts(f)),
        ("T", "tokens of the answer so far", "", ""),
        ("D", *_both("width of the language model", lambda c: c.text.d_model, nano)),
        ("V", *_both("vocabulary", lambda c: c.text.vocab_size, nano)),
        ("K", *_both("beams", lambda c: _options(c).num_beams, nano)),
    ]
    lines = ["| letter | means | base | nano |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _both_prompts(f: Florence2) -> tuple[str, str]:
    counts = _tokens(preset("base")) + _published_prompt("<OD>"), _tokens(f.model.config) + _prompt(f)
    return f"{counts[0]} for `<OD>`", f"{counts[1]} for `<OD>`"


def _all_heads(config: Florence2Config) -> str:
    return f"{_range(config.vision.num_heads)}; {config.text.encoder_attention_heads}"


def _all_widths(config: Florence2Config) -> str:
    tower = [dim // heads for dim, heads in zip(config.vision.dim_embed, config.vision.num_heads, strict=True)]
    return f"{_range(tower)}; {_head(config)}"


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"


def task_table(f: Florence2, _: str) -> str:  # noqa: ARG001
    """Return the published tasks: sentence and kind of answer."""
    lines = ["| task | the model reads | its answer |", "| --- | --- | --- |"]
    kinds = {"boxes_or_polygons": "boxes or polygons"}
    lines += [f"| `{t.token}` | {t.sentence} | {kinds.get(t.answer, t.answer)} |" for t in _PUBLISHED.values()]
    return "\n".join(lines)


# ---- the search by hand ---------------------------------------------------------------------------------------------
_FATES = {"lives": "beam {}", "finished": "**hypothesis**", "dropped": "", "stopped": "", "cut": "", "ended low": ""}


def search_table(f: Florence2, _: str) -> str:
    """Return every candidate of the chapter's search."""
    lines = ["| step | rank | continues | with | sum of log-probabilities | becomes |", "| --- " * 6 + "|"]
    for step in search_steps(f)[1:]:
        for rank, candidate in enumerate(step.candidates):
            fate = _FATES[candidate.fate].format(candidate.beam)
            token = f"`{token_text(f, candidate.token)}`"
            lines.append(
                f"| {step.number} | {rank} | beam {candidate.parent} | {token} | {candidate.sum:.2f} | {fate} |"
            )
    return "\n".join(lines)


def hypotheses(f: Florence2, _: str) -> str:
    """Return the hypotheses of that search and how each is scored."""
    steps, lines = (
        search_steps(f),
        ["| hypothesis | ids after the start | sum | score: sum / ids |", "| --- " * 4 + "|"],
    )
    rows = []
    for step in steps:
        for candidate in step.candidates:
            if candidate.fate == "finished":
                length = step.number + 1
                words = _words(f, step.number, candidate.parent, candidate.token)
                rows.append((candidate.sum / length, f"| `{words}` | {length} | {candidate.sum:.2f} "))
    rows.sort(reverse=True)
    return "\n".join([*lines, *(f"{row}| {score:.3f} |" for score, row in rows)])


def _words(f: Florence2, number: int, parent: int, last: int) -> str:
    """Return what a finished candidate wrote, by following its parents back."""
    steps, ids = search_steps(f), [last]
    for step in reversed(steps[:number]):
        before = next(candidate for candidate in step.candidates if candidate.beam == parent)
        ids.insert(0, before.token)
        parent = before.parent
    return "".join(token_text(f, id) for id in ids).replace("␣", " ")


def repeated_labels(f: Florence2, _: str) -> str:
    """Return the labels of one answer with the n-gram rule and without."""
    rows = [("off, as nano has it", 0), ("3, as base has it", 3)]
    lines = ["| the rule | labels of `<DENSE_REGION_CAPTION>` |", "| --- | --- |"]
    for name, size in rows:
        answer = f.run("<DENSE_REGION_CAPTION>", SCENE, no_repeat_ngram_size=size, confidence=False)
        lines.append(f"| {name} | {', '.join(box.label for box in answer.boxes)} |")
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[Florence2, str], str]] = {
    "listing": listing,
    "letters": letters,
    "tasks": task_table,
    "prompt-shapes": prompt_shapes,
    "pixel-shapes": pixel_shapes,
    "davit-shapes": davit_shapes,
    "projection-shapes": projection_shapes,
    "text-shapes": text_shapes,
    "search-shapes": search_shapes,
    "answer-shapes": answer_shapes,
    "search": search_table,
    "hypotheses": hypotheses,
    "repeated-labels": repeated_labels,
}
"""What each marked part of a page holds."""
