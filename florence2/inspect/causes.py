"""Causal tracing: which values of a clean run, put into a corrupted one, bring the clean answer back.

    found = trace_causes(f, ("<OD>", "photo.jpg"), ("<OD>", "blurred.jpg"), ["encoder.layers.*", "decoder.layers.*"])
    print(found.sorted())

The clean run's answer is given to both (`florence2.inspect.forced`). It is less probable after the corrupted request;
then the clean run's value is put in the place of the corrupted run's at one name and one group of positions, and how
much of the lost log-probability comes back is what that value carries. After Meng et al., "Locating and Editing
Factual Associations in GPT" (NeurIPS 2022, section 2.1), with another request in the place of their noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from florence2.bulk.sinks import Progress
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inspect.forced import KINDS, Case, Kind, answer_logprobs, force, stage_of
from florence2.inspect.table import Table, format_table
from florence2.model.trace import TraceBlock
from florence2.pipeline import Florence2, Request
from florence2.tracing.budget import DEFAULT_LIMIT
from florence2.tracing.names import Name, names_of, select
from florence2.tracing.patches import Patch, patched
from florence2.tracing.recording import Recording, Tracing

Groups = Mapping[str, Sequence[int]]
"""Positions by name."""
_LEAST_GAP = 1e-6


@dataclass(frozen=True)
class Cause:
    """One value, or a group of its positions, put from the clean run into the corrupted one.

    `logprob` is then the mean log-probability of the clean answer's tokens; `restored` is how much of what the
    corruption took came back: 0 nothing, 1 all.
    """

    name: str
    group: str
    positions: int | None
    """How many; None for the whole of a value that is not taken apart."""
    logprob: float
    restored: float


@dataclass(frozen=True)
class Causes(Table):
    """The table of a causal tracing, in the order of computation until it is sorted."""

    rows: tuple[Cause, ...]
    answer: str
    """The clean answer, with its location tokens."""
    clean: float
    """Its tokens' mean log-probability after the clean request."""
    corrupt: float
    """The same after the corrupted one."""

    def sorted(self) -> "Causes":
        """The rows that restore most first."""
        return replace(self, rows=tuple(sorted(self.rows, key=lambda row: row.restored, reverse=True)))

    def format(self, top: int | None = None) -> str:
        """The first `top` rows, or all, as aligned text."""
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


def trace_causes(
    f: Florence2,
    clean: Request,
    corrupt: Request,
    names: Sequence[str],
    *,
    groups: Groups | None = None,
    kind: Kind | None = None,
    answer: str | None = None,
    options: GenerationOptions | None = None,
    limit: int = DEFAULT_LIMIT,
) -> Causes:
    """How much of the clean answer's log-probability each value of the clean run restores in the corrupted run.

    `clean` and `corrupt` are (task, picture) or (task, picture, input), with prompts of the same number of ids.
    `names` are names or patterns that match them (see `florence2.tracing.names`), up to the logits. Positions are
    taken together in groups: of the memory (S) "image" and "prompt"; of the answer (step by step, T) what is foretold
    there, "word", "location" and "special"; of everything else "all". `groups` has others for the memory and the
    image tokens (N), counted alike, as "region": [1, 2, ...]. `kind` counts tokens of one kind only; `answer` is
    scored in the place of the model's own; `limit`, in bytes, is what may be kept of the clean run. How far the work
    is goes to stderr. Raises OptionError for requests that do not fit each other, or of which the corrupted one does
    no harm, and for what does not exist.
    """
    if kind not in (None, *KINDS):
        raise OptionError(f"{kind!r} is no kind of tokens; choose one of {', '.join(KINDS)}.")
    chosen = _choose(f, names)
    true = force(f, clean, answer, options)
    false = force(f, corrupt, true.answer, options)
    _check_prompts(true, false)
    scored = true.positions(kind)
    if not scored:
        raise OptionError(f"The answer {true.answer.text!r} has no token to score; choose another answer or kind.")
    values = _record(f, true, chosen, limit)
    ends = float(true.logprobs[scored].mean()), float(false.logprobs[scored].mean())
    if ends[0] - ends[1] < _LEAST_GAP:
        raise OptionError(
            f"After the corrupted request the answer is no less probable (log-probability {ends[1]:.4f}, was "
            f"{ends[0]:.4f}), so there is nothing to restore; choose another request."
        )
    work = [(name, *group) for name in chosen for group in _groups(name, true, groups)]
    progress, rows = Progress(len(work), things="patches"), []
    for number, (name, group, dim, positions) in enumerate(work, 1):
        patch = Patch(partial(_put, values[name.name], dim, positions), f"clean {group}")
        with patched(f, {name.name: patch}):
            found = float(answer_logprobs(f, false, stage_of([name]))[scored].mean())
        restored = (found - ends[1]) / (ends[0] - ends[1])
        rows.append(Cause(name.name, group, None if positions is None else len(positions), found, restored))
        progress.show(number)
    progress.close()
    return Causes(tuple(rows), true.answer.raw_text, *ends)


def _choose(f: Florence2, patterns: Sequence[str]) -> list[Name]:
    known = names_of(f.model.config)
    found = {name for names in select(patterns, known, exactly=True).values() for name in names}
    late = [name for name in found if name.startswith(("scores", "search."))]
    if late:
        raise OptionError(f"{late[0]} is of the search, and an answer that is given is not searched; end at logits.")
    return [name for name in known if name.name in found]


def _check_prompts(clean: Case, corrupt: Case) -> None:
    lengths = len(clean.prompt_ids), len(corrupt.prompt_ids)
    if lengths[0] != lengths[1]:
        raise OptionError(
            f"The prompts have {lengths[0]} and {lengths[1]} ids; values can only be moved between prompts of one "
            "length."
        )


def _record(f: Florence2, case: Case, names: Sequence[Name], limit: int) -> dict[str, Tensor]:
    """What the clean run has at each name."""
    exactly = [f"={name.name}" for name in names]
    tracing = Tracing(f.model.config, exactly, limit, (1, 3, *_pixels(case, f)), f.model.dtype)
    recording = Recording(tracing)

    def start() -> Recording:
        return recording

    with TraceBlock(f, start, patches=False):
        answer_logprobs(f, case, stage_of(names))
    return {name.name: recording.values[name.name][0] for name in names}


def _pixels(case: Case, f: Florence2) -> tuple[int, int]:
    if case.prepared is not None:
        return case.prepared.pixel_values.shape[2], case.prepared.pixel_values.shape[3]
    return f.processor.image_config.height, f.processor.image_config.width


def _groups(name: Name, case: Case, given: Groups | None) -> Iterator[tuple[str, int, Sequence[int] | None]]:
    """(words, dimension, positions) of each group of a value; no positions for the whole of it."""
    length = case.memory.shape[1]
    image = length - len(case.prompt_ids)
    if name.when == "step":
        dim = 2 if name.shape[0] == "B" else 1  # where one position of a step is T of them
        for kind in KINDS:
            if own := [n for n, found in enumerate(case.kinds) if found == kind]:
                yield kind, dim, own
    elif "S" in name.shape or "N" in name.shape:
        dim, total = (name.shape.index("S"), length) if "S" in name.shape else (name.shape.index("N"), image)
        usual = {"image": range(image), "prompt": range(image, length)} if total == length else {"all": range(image)}
        for words, positions in (given or usual).items():
            _check(words, positions, total, name)
            yield words, dim, positions
    else:
        yield "all", 0, None


def _check(words: str, positions: Sequence[int], total: int, name: Name) -> None:
    wrong = [position for position in positions if not 0 <= position < total]
    if wrong or not len(positions):
        what = f"position {wrong[0]}" if wrong else "no position"
        raise OptionError(f"The group {words!r} has {what}; {name.name} has the positions 0 to {total - 1}.")


def _put(clean: Tensor, dim: int, positions: Sequence[int] | None, value: Tensor, name: Name, step: int) -> Tensor:  # noqa: ARG001
    """The corrupted run's value with the clean one's, or with that at some positions of a dimension."""
    if positions is None or clean.shape != value.shape:  # which patched() refuses with both shapes
        return clean
    chosen = torch.tensor(list(positions), device=value.device)
    return value.index_copy(dim, chosen, clean.index_select(dim, chosen))
