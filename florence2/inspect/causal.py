"""Causal tracing: which values of a clean run, put into a corrupted one, bring the clean answer back.

    effects = causal_tracing(f, ("<OD>", "photo.jpg"), ("<OD>", "blurred.jpg"), ["encoder.layers.*"])
    print(effects.sorted())

The answer of the clean run is teacher-forced in both (`florence2.inspect.teacher_forcing`). After the corrupted request
it is less probable. Then one value of the corrupted run, or a group of its positions, is replaced by that of the clean
run: the part of the lost log-probability that comes back is what the value carries. After Meng et al., "Locating and
Editing Factual Associations in GPT" (NeurIPS 2022, section 2.1), with another request in place of their noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inspect.progress import ProgressCallback, ignore_progress
from florence2.inspect.table import Table, format_table
from florence2.inspect.teacher_forcing import (
    TOKEN_KINDS,
    ForcedAnswer,
    TokenKind,
    answer_logprobs,
    stage_of,
    teacher_force,
)
from florence2.model.trace import TraceBlock
from florence2.pipeline import Florence2, Request
from florence2.tracing.budget import DEFAULT_LIMIT
from florence2.tracing.names import Name, names_of
from florence2.tracing.patches import Patch, patched
from florence2.tracing.recording import Recording, Tracing
from florence2.tracing.selection import select

Groups = Mapping[str, Sequence[int]]
"""Positions by the name of their group."""
_LEAST_GAP = 1e-6


@dataclass(frozen=True)
class CausalEffect:
    """The effect of one value, or of a group of its positions, put from the clean run into the corrupted one.

    `logprob` is the resulting mean log-probability of the clean answer's tokens; `restored` is the share of the lost
    log-probability that came back: 0 for nothing, 1 for all.
    """

    name: str
    group: str
    positions: int | None
    """The number of positions; None for the whole of a value that is not split into positions."""
    logprob: float
    restored: float


@dataclass(frozen=True)
class CausalEffects(Table):
    """The table of a causal tracing.

    Attributes:
        rows: A `CausalEffect` for each value and group, in the order of computation until sorted.
        answer: The clean answer, with its location tokens.
        clean: The mean log-probability of its tokens after the clean request.
        corrupt: The same after the corrupted request.
    """

    rows: tuple[CausalEffect, ...]
    answer: str
    clean: float
    corrupt: float

    def sorted(self) -> "CausalEffects":
        """Return the table with the rows that restore most first."""
        return replace(self, rows=tuple(sorted(self.rows, key=lambda row: row.restored, reverse=True)))

    def format(self, top: int | None = None) -> str:
        """Return the first `top` rows, or all, as aligned text."""
        rows = [
            [
                row.name,
                row.group,
                "-" if row.positions is None else str(row.positions),
                f"{row.logprob:.4f}",
                f"{row.restored:.4f}",
            ]
            for row in self.rows[:top]
        ]
        ends = [
            ["(clean run)", "", "", f"{self.clean:.4f}", "1"],
            ["(corrupted run)", "", "", f"{self.corrupt:.4f}", "0"],
        ]
        return "\n".join(format_table([["name", "positions", "count", "log-prob", "restored"], *ends, *rows]))


def causal_tracing(
    f: Florence2,
    clean: Request,
    corrupt: Request,
    names: Sequence[str],
    *,
    groups: Groups | None = None,
    kind: TokenKind | None = None,
    answer: str | None = None,
    options: GenerationOptions | None = None,
    limit: int = DEFAULT_LIMIT,
    progress: ProgressCallback | None = None,
) -> CausalEffects:
    """Measure how much of the clean answer's log-probability each value of the clean run restores.

    Args:
        f: The model.
        clean: (task, image) or (task, image, input).
        corrupt: Another request, with a prompt of the same number of ids, after which the answer is less probable.
        names: Names or patterns that match them (see `florence2.tracing.names`), up to the logits.
        groups: Positions of the memory (S) and of the image tokens (N) to replace together, by a name of yours, as
            {"region": [1, 2]}. By default "image" and "prompt". Positions of the answer (T) are grouped by the kind of
            the token predicted there, "word", "location" or "special"; every other value is replaced whole, as "all".
        kind: Score tokens of this kind only; all by default.
        answer: The text to score; by default the model's own clean answer.
        options: Generation settings for the model's own answer.
        limit: A number of bytes that may be kept of the clean run.
        progress: Called as progress(done, total) after each replacement.

    Returns:
        The table, one row for each name and group.

    Raises:
        OptionError: The requests do not fit each other, the corrupted one does no harm, or a name, group or kind does
            not exist.
    """
    if kind not in (None, *TOKEN_KINDS):
        raise OptionError(f"Unknown kind of tokens {kind!r}. Known kinds: {', '.join(TOKEN_KINDS)}.")
    chosen = _choose(f, names)
    cases = _force_both(f, clean, corrupt, answer, options)
    scored = cases[0].positions(kind)
    if not scored:
        raise OptionError(f"The answer {cases[0].answer.text!r} has no token to score; give another answer or kind.")
    values = _record(f, cases[0], chosen, limit)
    ends = (float(cases[0].logprobs[scored].mean()), float(cases[1].logprobs[scored].mean()))
    _check_gap(*ends)
    work = [(name, *group) for name in chosen for group in _groups(name, cases[0], groups)]
    report, rows = progress or ignore_progress, []
    for done, (name, group, dim, positions) in enumerate(work, 1):
        patch = Patch(partial(_put, values[name.name], dim, positions), f"clean {group}")
        with patched(f, {name.name: patch}):
            logprob = float(answer_logprobs(f, cases[1], stage_of([name]))[scored].mean())
        restored = (logprob - ends[1]) / (ends[0] - ends[1])
        rows.append(CausalEffect(name.name, group, None if positions is None else len(positions), logprob, restored))
        report(done, len(work))
    return CausalEffects(tuple(rows), cases[0].answer.raw_text, *ends)


def _choose(f: Florence2, patterns: Sequence[str]) -> list[Name]:
    known = names_of(f.model.config)
    chosen = {name for names in select(patterns, known, exactly=True).values() for name in names}
    late = [name for name in chosen if name.startswith(("scores", "search."))]
    if late:
        raise OptionError(f"{late[0]} belongs to the search, which a given answer does not use; end at logits.")
    return [name for name in known if name.name in chosen]


def _force_both(
    f: Florence2, clean: Request, corrupt: Request, answer: str | None, options: GenerationOptions | None
) -> tuple[ForcedAnswer, ForcedAnswer]:
    """Force one answer after both requests. Raises OptionError for prompts of different lengths."""
    first = teacher_force(f, clean, answer, options)
    second = teacher_force(f, corrupt, first.answer, options)
    lengths = len(first.prompt_ids), len(second.prompt_ids)
    if lengths[0] != lengths[1]:
        raise OptionError(
            f"The prompts have {lengths[0]} and {lengths[1]} ids; values can only be moved between prompts of the same "
            "length."
        )
    return first, second


def _check_gap(clean: float, corrupt: float) -> None:
    if clean - corrupt < _LEAST_GAP:
        raise OptionError(
            f"After the corrupted request the answer is not less probable (log-probability {corrupt:.4f}, {clean:.4f} "
            "after the clean one), so nothing can be restored; choose another request."
        )


def _record(f: Florence2, case: ForcedAnswer, names: Sequence[Name], limit: int) -> dict[str, Tensor]:
    """Return the value of each name in the clean run."""
    exactly = [f"={name.name}" for name in names]
    image = f.processor.image_config
    tracing = Tracing(f.model.config, exactly, limit, (image.height, image.width), f.model.dtype)
    recording = Recording(tracing)

    def start() -> Recording:
        return recording

    with TraceBlock(f, start, patches=False):
        answer_logprobs(f, case, stage_of(names))
    return {name.name: recording.values[name.name][0] for name in names}


def _groups(name: Name, case: ForcedAnswer, given: Groups | None) -> Iterator[tuple[str, int, Sequence[int] | None]]:
    """Yield (group, dimension, positions) for each group of a value; the positions are None for the whole value."""
    length = case.memory.shape[1]
    image = length - len(case.prompt_ids)
    if name.when == "step":
        dim = 2 if name.shape[0] == "B" else 1  # decode() has T positions in place of K or 1
        for kind in TOKEN_KINDS:
            if own := [n for n, other in enumerate(case.kinds) if other == kind]:
                yield kind, dim, own
    elif dims := name.dims("S", "N"):
        default = {"image": range(image), "prompt": range(image, length)}
        total = length if name.shape[dims[0]] == "S" else image
        for group, positions in (given or (default if total == length else {"all": range(image)})).items():
            _check_group(group, positions, total, name)
            yield group, dims[0], positions
    else:
        yield "all", 0, None


def _check_group(group: str, positions: Sequence[int], total: int, name: Name) -> None:
    wrong = [position for position in positions if not 0 <= position < total]
    if wrong or not len(positions):
        fault = f"has the position {wrong[0]}" if wrong else "is empty"
        raise OptionError(f"The group {group!r} {fault}; {name.name} has the positions 0 to {total - 1}.")


def _put(clean: Tensor, dim: int, positions: Sequence[int] | None, value: Tensor, name: Name, step: int) -> Tensor:  # noqa: ARG001
    """Return the clean value, or the corrupted one with the clean one's entries at some positions of a dimension."""
    if positions is None or clean.shape != value.shape:  # patched() then refuses it and names both shapes
        return clean
    chosen = torch.tensor(list(positions), device=value.device)
    return value.index_copy(dim, chosen, clean.index_select(dim, chosen))
