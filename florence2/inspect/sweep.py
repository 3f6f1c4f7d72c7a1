"""Ablation sweeps: every head, sub-layer or layer switched off in its turn, and what that does to the answers.

    sweep = sweep_heads(f, [("<OD>", "a.jpg"), ("<OD>", "b.jpg")], kind="cross_attention", out="heads.jsonl")
    print(sweep.sorted("locations"))

The model answers each request once as it is. Then, with one part at a time changed by `f.patched`, that answer is
given to the decoder (`florence2.inspect.forced`), and how much less probable its tokens became is the part's `drop`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from florence2.answers.answer import Answer
from florence2.bulk.sinks import Progress
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inspect.forced import (
    Case,
    Kind,
    Stage,
    answer_again,
    answer_scores,
    force_all,
    likeliest_bins,
    of_ids,
    stage_of,
)
from florence2.inspect.regions import Corners, mean_iou
from florence2.inspect.sweep_file import SweepFile, fingerprint
from florence2.inspect.table import Table, format_table
from florence2.pipeline import Florence2, Request
from florence2.tracing.names import Name, names_of, select
from florence2.tracing.patches import Patch, patched, zero, zero_heads

HeadKind = Literal["cross_attention", "self_attention", "encoder", "window", "channel"]
HEADS: Mapping[HeadKind, str] = {
    "cross_attention": "decoder.layers.*.cross_attention.heads",
    "self_attention": "decoder.layers.*.self_attention.heads",
    "encoder": "encoder.layers.*.self_attention.heads",
    "window": "vision_tower.blocks.*.*.spatial_block.window_attn.heads",
    "channel": "vision_tower.blocks.*.*.channel_block.channel_attn.heads",
}
"""The heads of each kind: the decoder's, looking at the memory or at the answer so far, the encoder's, and the vision
tower's heads within windows and groups of channels."""
Stack = Literal["decoder", "encoder", "vision"]
SUBLAYERS: Mapping[Stack, tuple[str, ...]] = {
    "decoder": ("decoder.layers.*.self_attention", "decoder.layers.*.cross_attention", "decoder.layers.*.mlp"),
    "encoder": ("encoder.layers.*.self_attention", "encoder.layers.*.mlp"),
    "vision": (
        "vision_tower.blocks.*.*.*_block.window_attn",
        "vision_tower.blocks.*.*.*_block.channel_attn",
        "vision_tower.blocks.*.*.*_block.ffn",
    ),
}
"""What each stack's layers add to the residual stream."""
LAYERS: Mapping[Stack, tuple[str, str]] = {
    "decoder": ("decoder.embedding", "decoder.layers.*"),
    "encoder": ("encoder.embedding", "encoder.layers.*"),
    "vision": ("vision_tower.convs.*", "vision_tower.blocks.*.*.*_block"),
}
"""The stream before a stack's layers, and after each."""


@dataclass(frozen=True)
class Ablation:
    """What came of switching one part off.

    `drop` is by how much the log-probability of the unablated answers' tokens fell, in nats, on average over all
    tokens that the model chose; `words` and `locations` are the same over tokens of one kind, None where there are
    none; `shift` is by how many bins (thousandths of the picture's side) the most probable location moved where the
    answers have one; `by_request` is the drop of each request. Of answers generated anew, where that was asked for:
    `changed` is the share that differ in any token, `moved` is 1 - IoU of the unablated answers' boxes with what is
    nearest to them now, `iou` is by how much the mean IoU with the expected boxes changed.
    """

    name: str
    head: int | None
    drop: float
    words: float | None
    locations: float | None
    shift: float | None
    by_request: tuple[float, ...]
    changed: float | None = None
    moved: float | None = None
    iou: float | None = None

    @property
    def part(self) -> str:
        """The part in words."""
        return self.name if self.head is None else f"{self.name.removesuffix('.heads')} head {self.head}"


Column = Literal["drop", "words", "locations", "shift", "changed", "moved", "iou"]
_COLUMNS: tuple[Column, ...] = ("drop", "words", "locations", "shift", "changed", "moved", "iou")


@dataclass(frozen=True)
class Sweep(Table):
    """The table of a sweep: a row for every part, in the order of computation until it is sorted."""

    rows: tuple[Ablation, ...]
    answers: tuple[str, ...]
    """The unablated answers, with their location tokens."""
    logprob: float
    """The mean log-probability of their tokens, from which every drop is counted."""

    def sorted(self, by: Column = "drop") -> "Sweep":
        """The rows with what matters most first: the largest, and of `iou`, which falls, the smallest.

        Raises OptionError for a column that does not exist or was not measured.
        """
        if by not in _COLUMNS:
            raise OptionError(f"{by!r} is no column of a sweep; choose one of {', '.join(_COLUMNS)}.")
        if any(getattr(row, by) is None for row in self.rows):
            raise OptionError(
                f"{by!r} was not measured in this sweep: there was nothing of it, or it was not asked for."
            )
        return replace(self, rows=tuple(sorted(self.rows, key=lambda row: getattr(row, by), reverse=by != "iou")))

    def format(self, top: int | None = None) -> str:
        """The first `top` rows, or all, as aligned text, without columns that nothing was measured for."""
        columns = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in self.rows)]
        rows = [[row.part, *(_shown(getattr(row, name)) for name in columns)] for row in self.rows[:top]]
        return "\n".join(format_table([["part", *columns], *rows]))


def sweep_heads(
    f: Florence2,
    requests: Sequence[Request],
    *,
    kind: HeadKind = "cross_attention",
    layers: Sequence[int] | None = None,
    generate: bool = False,
    expected: Sequence[Sequence[Corners]] | None = None,
    out: Path | str | None = None,
    options: GenerationOptions | None = None,
) -> Sweep:
    """Every head of a kind (see HEADS) at zero in its turn.

    `requests` are (task, picture) or (task, picture, input). `layers` are counted from 0, of the vision tower over
    all its blocks. With `generate` the requests are also asked anew; so they are with `expected`, which has the true
    boxes (left, top, right, bottom in pixels) for each request. Rows are appended to `out`, a JSON Lines file, as they
    are known, and those that it holds are not measured again, so a sweep may be stopped and started anew. `options`
    are of the search. How far the work is goes to stderr.
    Raises OptionError for what does not exist or fit, and for an `out` that belongs to another sweep.
    """
    if kind not in HEADS:
        raise OptionError(f"{kind!r} is no kind of heads; choose one of {', '.join(HEADS)}.")
    names = _chosen(_find(f, [HEADS[kind]]), layers, kind)
    parts = [
        _Part(name.name, head, {name.name: zero_heads([head])}, stage_of([name]))
        for name in names
        for head in range(_head_count(name))
    ]
    return _sweep(f, requests, parts, "heads", _Asked(generate, expected, options), out)


def sweep_blocks(
    f: Florence2,
    requests: Sequence[Request],
    *,
    stack: Stack = "decoder",
    whole: bool = False,
    layers: Sequence[int] | None = None,
    generate: bool = False,
    expected: Sequence[Sequence[Corners]] | None = None,
    out: Path | str | None = None,
    options: GenerationOptions | None = None,
) -> Sweep:
    """Every sub-layer of a stack at zero in its turn, so that it adds nothing to the residual stream.

    With `whole`, every layer is passed over instead: what comes out of it is what went in. `layers` are counted from
    0, of the vision tower over all its `spatial_block`s and `channel_block`s. The rest is as in `sweep_heads`.
    """
    if stack not in SUBLAYERS:
        raise OptionError(f"{stack!r} is no stack of layers; choose one of {', '.join(SUBLAYERS)}.")
    streams = _find(f, LAYERS[stack])
    own = {name.name for name in _find(f, LAYERS[stack][1:])}
    chosen = _chosen([name for name in streams if name.name in own], layers, stack)
    if whole:
        before = {after.name: stream.name for stream, after in itertools.pairwise(streams)}
        parts = [_Part(name.name, None, _passing(before[name.name], name.name), stage_of([name])) for name in chosen]
    else:
        kept = tuple(f"{name.name}." for name in chosen)
        inside = [name for name in _find(f, SUBLAYERS[stack]) if name.name.startswith(kept)]
        parts = [_Part(name.name, None, {name.name: zero()}, stage_of([name])) for name in inside]
    return _sweep(f, requests, parts, "layers" if whole else "sub-layers", _Asked(generate, expected, options), out)


@dataclass(frozen=True)
class _Part:
    name: str
    head: int | None
    patches: Mapping[str, Patch]
    since: Stage


@dataclass(frozen=True)
class _Asked:
    """What is measured besides the drop."""

    generate: bool
    expected: Sequence[Sequence[Corners]] | None
    options: GenerationOptions | None

    @property
    def answers(self) -> bool:
        return self.generate or self.expected is not None


def _sweep(
    f: Florence2,
    requests: Sequence[Request],
    parts: Sequence[_Part],
    things: str,
    asked: _Asked,
    out: Path | str | None,
) -> Sweep:
    if asked.expected is not None:
        _check_expected(asked.expected, len(requests))
    cases = force_all(f, requests, asked.options)
    if not any(any(case.counted) for case in cases):
        raise OptionError("The model chose no token of these answers, so there is nothing to measure.")
    columns = [column.name for column in fields(Ablation)]  # which may be others in another version
    mark = fingerprint(f, cases, asked.answers, asked.expected, columns)
    file = SweepFile(None if out is None else Path(out), mark)
    rows, progress = [], Progress(len(parts), things=things)
    with file:
        for number, part in enumerate(parts, 1):
            found = file.rows.get((part.name, part.head))
            rows.append(Ablation(**found) if found else _measure(f, cases, part, asked))
            if not found:
                file.write(asdict(rows[-1]))
            progress.show(number)
    progress.close()
    return Sweep(tuple(rows), tuple(case.answer.raw_text for case in cases), _mean(cases, [c.logprobs for c in cases]))


def _check_expected(expected: Sequence[Sequence[Corners]], count: int) -> None:
    if len(expected) != count or not all(expected):
        raise OptionError(
            f"{count} requests need as many lists of expected boxes, none of them empty; there are "
            f"{[len(boxes) for boxes in expected]} boxes."
        )
    wrong = [box for boxes in expected for box in boxes if len(box) != 4]
    if wrong:
        raise OptionError(f"The expected box {wrong[0]!r} must be left, top, right, bottom in pixels.")


def _measure(f: Florence2, cases: Sequence[Case], part: _Part, asked: _Asked) -> Ablation:
    with patched(f, part.patches):
        drops, shifts = zip(*(_drop(f, case, part.since) for case in cases), strict=True)
        now = [answer_again(f, case, part.since, asked.options) for case in cases] if asked.answers else None
    row = Ablation(
        name=part.name,
        head=part.head,
        drop=_mean(cases, drops),
        words=_mean_of(cases, drops, "word"),
        locations=_mean_of(cases, drops, "location"),
        shift=_mean_of(cases, shifts, "location"),
        by_request=tuple(_mean_of([case], [drop]) or 0.0 for case, drop in zip(cases, drops, strict=True)),
    )
    return row if now is None else _compare(row, cases, now, asked.expected)


def _drop(f: Florence2, case: Case, since: Stage) -> tuple[Tensor, Tensor]:
    """The fall of each token's log-probability, and the way of the most probable location there: (T,) each."""
    scores = answer_scores(f, case, since)
    return case.logprobs - of_ids(scores, case.answer.token_ids[1:]), (likeliest_bins(f, scores) - case.bins).abs()


def _compare(
    row: Ablation, cases: Sequence[Case], now: Sequence[Answer], expected: Sequence[Sequence[Corners]] | None
) -> Ablation:
    """With what became of the answers."""
    pairs = list(zip(cases, now, strict=True))
    changed = sum(case.answer.token_ids != answer.token_ids for case, answer in pairs) / len(pairs)
    boxed = [(case, answer) for case, answer in pairs if case.answer.boxes]
    kept = [mean_iou([box.xyxy for box in c.answer.boxes], a.boxes, a.image_size) for c, a in boxed]
    moved = 1 - sum(kept) / len(kept) if kept else None
    iou = None
    if expected is not None:
        fits = [
            mean_iou(boxes, a.boxes, a.image_size) - mean_iou(boxes, c.answer.boxes, a.image_size)
            for (c, a), boxes in zip(pairs, expected, strict=True)
        ]
        iou = sum(fits) / len(fits)
    return replace(row, changed=changed, moved=moved, iou=iou)


def _mean(cases: Sequence[Case], values: Sequence[Tensor]) -> float:
    found = _mean_of(cases, values)
    assert found is not None
    return found


def _mean_of(cases: Sequence[Case], values: Sequence[Tensor], kind: Kind | None = None) -> float | None:
    """Over all tokens of all requests that count, of one kind if given; None of none."""
    chosen = torch.cat([value[case.positions(kind)] for case, value in zip(cases, values, strict=True)])
    return float(chosen.double().mean()) if len(chosen) else None


def _find(f: Florence2, patterns: Sequence[str]) -> list[Name]:
    """The names that match, in the order of computation."""
    known = names_of(f.model.config)
    found = {name for names in select(patterns, known, exactly=True).values() for name in names}
    return [name for name in known if name.name in found]


def _chosen(names: Sequence[Name], layers: Sequence[int] | None, what: str) -> list[Name]:
    if layers is None:
        return list(names)
    found = sorted(set(layers).intersection(range(len(names)))) if isinstance(layers, Iterable) else []
    if not found or len(found) < len(set(layers)):
        raise OptionError(f"layers is {layers}; of {what} this checkpoint has the layers 0 to {len(names) - 1}.")
    return [names[int(layer)] for layer in found]


def _head_count(name: Name) -> int:
    sizes = dict(name.sizes)
    return sizes["heads"] if "heads" in name.shape else sizes["G"]


def _passing(before: str, layer: str) -> dict[str, Patch]:
    """Patches that put the stream `before` a layer in the place of what the layer makes of it."""
    held: list[Tensor] = []

    def hold(value: Tensor, name: Name, step: int) -> Tensor:  # noqa: ARG001
        held[:] = [value]
        return value

    return {before: Patch(hold, "hold"), layer: Patch(lambda value, name, step: held[0], "pass")}  # noqa: ARG005


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def read_rows(path: Path | str) -> Iterator[Ablation]:
    """The rows that a sweep has written so far."""
    yield from (Ablation(**row) for row in SweepFile.read(Path(path))[1].values())
