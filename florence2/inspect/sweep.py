"""Ablation sweeps: switch off every head, sub-layer or layer, one at a time, and measure the effect on the answers.

    sweep = ablate_heads(f, [("<OD>", "a.jpg"), ("<OD>", "b.jpg")], kind="cross_attention", out="heads.jsonl")
    print(sweep.sorted("locations"))

The model answers each request once without changes. Then one part at a time is changed by `f.patched`, and the answer
is teacher-forced (`florence2.inspect.teacher_forcing`): the fall of its tokens' log-probability is the part's `drop`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from florence2.answers.answer import Answer
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inspect.ablation import Ablation, Sweep
from florence2.inspect.progress import ProgressCallback, ignore_progress
from florence2.inspect.regions import Corners, mean_iou
from florence2.inspect.sweep_file import SweepFile, fingerprint
from florence2.inspect.teacher_forcing import (
    ForcedAnswer,
    Stage,
    TokenKind,
    answer_again,
    answer_scores,
    likeliest_bins,
    of_ids,
    stage_of,
    teacher_force_all,
)
from florence2.pipeline import Florence2, Request
from florence2.tracing.names import Name, names_of
from florence2.tracing.patches import Patch, patched, zero, zero_heads
from florence2.tracing.selection import select

HeadKind = Literal["cross_attention", "self_attention", "encoder", "window", "channel"]
HEADS: Mapping[HeadKind, str] = {
    "cross_attention": "decoder.layers.*.cross_attention.heads",
    "self_attention": "decoder.layers.*.self_attention.heads",
    "encoder": "encoder.layers.*.self_attention.heads",
    "window": "vision_tower.blocks.*.*.spatial_block.window_attn.heads",
    "channel": "vision_tower.blocks.*.*.channel_block.channel_attn.heads",
}
"""The heads of each kind: the decoder's, attending to the memory or to the answer so far, the encoder's, and the vision
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
"""The names of what each stack's layers add to the residual stream."""
LAYERS: Mapping[Stack, tuple[str, str]] = {
    "decoder": ("decoder.embedding", "decoder.layers.*"),
    "encoder": ("encoder.embedding", "encoder.layers.*"),
    "vision": ("vision_tower.convs.*", "vision_tower.blocks.*.*.*_block"),
}
"""The names of the stream before a stack's layers, and after each."""


def ablate_heads(
    f: Florence2,
    requests: Sequence[Request],
    *,
    kind: HeadKind = "cross_attention",
    layers: Sequence[int] | None = None,
    generate: bool = False,
    expected: Sequence[Sequence[Corners]] | None = None,
    out: Path | str | None = None,
    options: GenerationOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Sweep:
    """Set every head of one kind to zero, one at a time, and measure the effect on the answers.

    Args:
        f: The model.
        requests: (task, image) or (task, image, input) each.
        kind: "cross_attention", "self_attention", "encoder", "window" or "channel"; see `HEADS`.
        layers: Layers from 0, for the vision tower over all its blocks; all by default.
        generate: Also generate new answers, for `Ablation.changed` and `moved`.
        expected: For each request its true boxes, (left, top, right, bottom) in pixels, for `Ablation.iou`. New answers
            are then generated too.
        out: A JSON Lines file to which each row is appended once known. Rows that it already holds are not measured
            again, so a stopped sweep resumes.
        options: Generation settings; the model's defaults if omitted.
        progress: Called as progress(done, total) after each head.

    Returns:
        The table, one row for each head.

    Raises:
        OptionError: An argument does not exist or fit, or `out` belongs to another sweep.
    """
    if kind not in HEADS:
        raise OptionError(f"Unknown kind of heads {kind!r}. Known kinds: {', '.join(HEADS)}.")
    names = _chosen(_find(f, [HEADS[kind]]), layers, kind)
    parts = [
        _Part(name.name, head, {name.name: zero_heads([head])}, stage_of([name]))
        for name in names
        for head in range(_head_count(name))
    ]
    return _sweep(f, requests, parts, _Measures(generate, expected, options), out, progress)


def ablate_blocks(
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
    progress: ProgressCallback | None = None,
) -> Sweep:
    """Switch off every sub-layer or layer of a stack, one at a time, and measure the effect on the answers.

    Args:
        f: The model.
        requests: (task, image) or (task, image, input) each.
        stack: "decoder", "encoder" or "vision".
        whole: Skip whole layers, so that the output of a layer is its input. By default single sub-layers are set to
            zero, so that they add nothing to the residual stream.
        layers: Layers from 0, for the vision tower over all its `spatial_block`s and `channel_block`s; all by default.
        generate: As in `ablate_heads`.
        expected: As in `ablate_heads`.
        out: As in `ablate_heads`.
        options: As in `ablate_heads`.
        progress: As in `ablate_heads`.

    Returns:
        The table, one row for each part.

    Raises:
        OptionError: An argument does not exist or fit, or `out` belongs to another sweep.
    """
    if stack not in SUBLAYERS:
        raise OptionError(f"Unknown stack of layers {stack!r}. Known stacks: {', '.join(SUBLAYERS)}.")
    streams = _find(f, LAYERS[stack])
    own = {name.name for name in _find(f, LAYERS[stack][1:])}
    chosen = _chosen([name for name in streams if name.name in own], layers, stack)
    if whole:
        before = {after.name: stream.name for stream, after in itertools.pairwise(streams)}
        parts = [_Part(name.name, None, _skipping(before[name.name], name.name), stage_of([name])) for name in chosen]
    else:
        kept = tuple(f"{name.name}." for name in chosen)
        inside = [name for name in _find(f, SUBLAYERS[stack]) if name.name.startswith(kept)]
        parts = [_Part(name.name, None, {name.name: zero()}, stage_of([name])) for name in inside]
    return _sweep(f, requests, parts, _Measures(generate, expected, options), out, progress)


@dataclass(frozen=True)
class _Part:
    name: str
    head: int | None
    patches: Mapping[str, Patch]
    since: Stage


@dataclass(frozen=True)
class _Measures:
    """The measures in addition to the drop."""

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
    measures: _Measures,
    out: Path | str | None,
    progress: ProgressCallback | None,
) -> Sweep:
    if measures.expected is not None:
        _check_expected(measures.expected, len(requests))
    cases = teacher_force_all(f, requests, measures.options)
    if not any(any(case.counted) for case in cases):
        raise OptionError("The model chose no token of these answers, so nothing can be measured.")
    columns = [column.name for column in fields(Ablation)]  # another version may have other columns
    mark = fingerprint(f, cases, measures.answers, measures.expected, columns)
    report, rows = progress or ignore_progress, []
    with SweepFile(None if out is None else Path(out), mark) as file:
        for done, part in enumerate(parts, 1):
            known = file.rows.get((part.name, part.head))
            rows.append(Ablation(**known) if known else _measure(f, cases, part, measures))
            if not known:
                file.write(asdict(rows[-1]))
            report(done, len(parts))
    return Sweep(tuple(rows), tuple(case.answer.raw_text for case in cases), _mean(cases, [c.logprobs for c in cases]))


def _check_expected(expected: Sequence[Sequence[Corners]], count: int) -> None:
    if len(expected) != count or not all(expected):
        raise OptionError(
            f"{count} requests need {count} lists of expected boxes, none of them empty; the given lists have "
            f"{[len(boxes) for boxes in expected]} boxes."
        )
    wrong = [box for boxes in expected for box in boxes if len(box) != 4]
    if wrong:
        raise OptionError(f"The expected box {wrong[0]!r} must be left, top, right, bottom in pixels.")


def _measure(f: Florence2, cases: Sequence[ForcedAnswer], part: _Part, measures: _Measures) -> Ablation:
    with patched(f, part.patches):
        drops, shifts = zip(*(_drop(f, case, part.since) for case in cases), strict=True)
        now = [answer_again(f, case, part.since, measures.options) for case in cases] if measures.answers else None
    row = Ablation(
        name=part.name,
        head=part.head,
        drop=_mean(cases, drops),
        words=_mean_of(cases, drops, "word"),
        locations=_mean_of(cases, drops, "location"),
        shift=_mean_of(cases, shifts, "location"),
        by_request=tuple(_mean_of([case], [drop]) or 0.0 for case, drop in zip(cases, drops, strict=True)),
    )
    return row if now is None else _compare(row, cases, now, measures.expected)


def _drop(f: Florence2, case: ForcedAnswer, since: Stage) -> tuple[Tensor, Tensor]:
    """Return the fall of each token's log-probability, and by how many bins the likeliest location moved: (T,) each."""
    scores = answer_scores(f, case, since)
    return case.logprobs - of_ids(scores, case.answer.token_ids[1:]), (likeliest_bins(f, scores) - case.bins).abs()


def _compare(
    row: Ablation, cases: Sequence[ForcedAnswer], now: Sequence[Answer], expected: Sequence[Sequence[Corners]] | None
) -> Ablation:
    """Add the columns that compare the new answers with the unablated ones."""
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


def _mean(cases: Sequence[ForcedAnswer], values: Sequence[Tensor]) -> float:
    mean = _mean_of(cases, values)
    assert mean is not None
    return mean


def _mean_of(cases: Sequence[ForcedAnswer], values: Sequence[Tensor], kind: TokenKind | None = None) -> float | None:
    """Return the mean over all counted tokens of all requests, of one kind if given; None without any."""
    chosen = torch.cat([value[case.positions(kind)] for case, value in zip(cases, values, strict=True)])
    return float(chosen.double().mean()) if len(chosen) else None


def _find(f: Florence2, patterns: Sequence[str]) -> list[Name]:
    """Return the names that match, in the order of computation."""
    known = names_of(f.model.config)
    matching = {name for names in select(patterns, known, exactly=True).values() for name in names}
    return [name for name in known if name.name in matching]


def _chosen(names: Sequence[Name], layers: Sequence[int] | None, group: str) -> list[Name]:
    if layers is None:
        return list(names)
    chosen = sorted(set(layers).intersection(range(len(names)))) if isinstance(layers, Iterable) else []
    if not chosen or len(chosen) < len(set(layers)):
        raise OptionError(f"layers is {layers}; for {group} this checkpoint has the layers 0 to {len(names) - 1}.")
    return [names[int(layer)] for layer in chosen]


def _head_count(name: Name) -> int:
    sizes = dict(name.sizes)
    return sizes["heads"] if name.dims("heads") else sizes["G"]


def _skipping(before: str, layer: str) -> dict[str, Patch]:
    """Return patches that replace the stream after a layer by the stream `before` it."""
    held: list[Tensor] = []

    def hold(value: Tensor, name: Name, step: int) -> Tensor:  # noqa: ARG001
        held[:] = [value]
        return value

    return {before: Patch(hold, "hold"), layer: Patch(lambda value, name, step: held[0], "skip")}  # noqa: ARG005


def read_rows(path: Path | str) -> Iterator[Ablation]:
    """Yield the rows that a sweep has written so far."""
    yield from (Ablation(**row) for row in SweepFile.read(Path(path))[1].values())
