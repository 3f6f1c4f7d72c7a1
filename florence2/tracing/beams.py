"""The search step by step: what was compared, what became of it, what the rules forbade."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from florence2.generation.options import GenerationOptions
from florence2.model.config import TextConfig
from florence2.tracing.names import RULES

Fate = Literal["lives", "finished", "ended low", "dropped", "stopped", "cut"]
"""What became of a candidate. "lives": it goes on as a beam. "finished": it ended and became a hypothesis. "ended
low": it ended, but stood below the first K, which alone may finish. "dropped": K better ones went on. "stopped": it
would have gone on, but the search had what it wanted. "cut": it stood when the limit was reached, and became a
hypothesis as it was."""


@dataclass(frozen=True)
class Candidate:
    """A continuation that one step compared: beam `parent` by the id `token`.

    `sum` is the log-probability of the whole; `beam` is which beam it goes on as, None when it does not. (All beams
    are alike before the first step, so the search starts all but one at a sum of -1e9.)
    """

    token: int
    parent: int
    sum: float
    fate: Fate
    beam: int | None = None


@dataclass(frozen=True)
class Ban:
    """What one rule made impossible for one beam: `ids`, or, for a forced id, everything but `only`."""

    rule: str
    beam: int
    ids: tuple[int, ...]
    only: int | None = None


@dataclass(frozen=True)
class BeamStep:
    """One step, numbered from 0: its candidates, best first, and the rules' say before they were compared."""

    number: int
    candidates: tuple[Candidate, ...]
    bans: tuple[Ban, ...]

    @property
    def survivors(self) -> tuple[Candidate, ...]:
        """The K that stand after the step, as beams 0 to K - 1, whether or not another step came."""
        standing = [candidate for candidate in self.candidates if candidate.beam is not None]
        return tuple(sorted(standing, key=lambda candidate: candidate.beam or 0))


def read_beams(
    values: Mapping[str, Sequence[Tensor]], row: int, options: GenerationOptions, config: TextConfig
) -> tuple[BeamStep, ...]:
    """The steps of one request, `row` of its batch, from the `search.*` values of every step, until it was settled."""
    steps = []
    for number, done in enumerate(values["search.done"]):
        over = bool(done[row]) or number == len(values["search.done"]) - 1
        standing: Fate = "lives" if not over else "stopped" if done[row] else "cut"
        candidates = _read_candidates(values, number, row, standing, config.eos_token_id)
        bans = _read_bans(values, number, row, options, config.max_position_embeddings)
        steps.append(BeamStep(number, candidates, bans))
        if over:
            break
    return tuple(steps)


def _read_candidates(
    values: Mapping[str, Sequence[Tensor]], number: int, row: int, standing: Fate, end: int
) -> tuple[Candidate, ...]:
    def column(name: str) -> list[int]:
        found: list[int] = values[f"search.{name}"][number][row].tolist()
        return found

    survivors, finished = column("survivors"), column("finished")
    tokens, parents, sums = column("candidates.tokens"), column("candidates.parents"), column("candidates.sums")
    found = []
    for i, (token, parent, total) in enumerate(zip(tokens, parents, sums, strict=True)):
        beam = survivors.index(i) if i in survivors and not finished[i] else None
        fate: Fate = "finished" if finished[i] else "ended low" if token == end else "dropped"
        if beam is not None and total > float("-inf"):
            fate = standing
        found.append(Candidate(token, parent, total, fate, beam))
    return tuple(found)


def _read_bans(
    values: Mapping[str, Sequence[Tensor]], number: int, row: int, options: GenerationOptions, limit: int
) -> tuple[Ban, ...]:
    K, found = options.num_beams, []
    for rule in RULES:
        if (pairs := values.get(f"search.banned.{rule}")) is None:
            continue
        for beam in range(K):
            ids = pairs[number][pairs[number][:, 0] == row * K + beam, 1]
            if len(ids):
                found.append(Ban(rule, beam, tuple(ids.tolist())))
    last = min(options.max_new_tokens, limit) - 1
    forced = (
        ("forced_bos_token", options.forced_bos_token_id, 0),
        ("forced_eos_token", options.forced_eos_token_id, last),
    )
    for rule, id, when in forced:
        if id is not None and when == number:
            found += [Ban(rule, beam, (), id) for beam in range(K)]
    return tuple(found)


def rows_of(beams: Sequence[BeamStep], ids: Sequence[int]) -> tuple[int, ...] | None:
    """Which beam computed each of the generated `ids` of an answer, step by step; None when no beam wrote them."""
    if not 0 < len(ids) <= len(beams):
        return None
    for candidate in beams[len(ids) - 1].candidates:
        if candidate.token == ids[-1] and candidate.fate in ("finished", "cut"):
            rows, written = _walk_back(beams, len(ids) - 1, candidate)
            if written == list(ids):
                return tuple(rows)
    return None


def _walk_back(beams: Sequence[BeamStep], number: int, candidate: Candidate) -> tuple[list[int], list[int]]:
    """The rows and ids of a candidate of step `number` and all that it continues, first to last."""
    rows, ids = [candidate.parent], [candidate.token]
    for earlier in range(number - 1, -1, -1):
        before = beams[earlier].survivors[rows[0]]
        rows.insert(0, before.parent)
        ids.insert(0, before.token)
    return rows, ids
