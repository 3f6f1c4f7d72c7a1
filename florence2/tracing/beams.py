"""The search step by step: which candidates it compared, what became of them, and which ids the rules banned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from florence2.generation.options import GenerationOptions
from florence2.model.config import TextConfig
from florence2.tracing.names import RULES

Fate = Literal["lives", "finished", "ended low", "dropped", "stopped", "cut"]
"""The outcome of a candidate.

"lives": it continues as a beam. "finished": it ended and became a hypothesis. "ended low": it ended, but ranked below
the first K, and only those may finish. "dropped": K better candidates took all beams. "stopped": it ranked among the
beams when the search had enough hypotheses. "cut": it was a beam when the length limit was reached, and became a
hypothesis unfinished."""


@dataclass(frozen=True)
class Candidate:
    """A continuation that one step compared: beam `parent` extended by the id `token`.

    `sum` is the log-probability of the whole sequence; `beam` is the beam that it continues as, or None. (All beams are
    equal before the first step, so the search starts every beam but one at a sum of -1e9.)
    """

    token: int
    parent: int
    sum: float
    fate: Fate
    beam: int | None = None


@dataclass(frozen=True)
class Ban:
    """The ids that one rule made impossible for one beam: `ids`, or for a forced id every id except `only`."""

    rule: str
    beam: int
    ids: tuple[int, ...]
    only: int | None = None


@dataclass(frozen=True)
class BeamStep:
    """One step, numbered from 0: its candidates, best first, and the bans that applied before they were compared."""

    number: int
    candidates: tuple[Candidate, ...]
    bans: tuple[Ban, ...]

    @property
    def survivors(self) -> tuple[Candidate, ...]:
        """The K candidates that are beams 0 to K - 1 after the step, even if no further step followed."""
        standing = [candidate for candidate in self.candidates if candidate.beam is not None]
        return tuple(sorted(standing, key=lambda candidate: candidate.beam or 0))


def read_beams(
    values: Mapping[str, Sequence[Tensor]], row: int, options: GenerationOptions, config: TextConfig
) -> tuple[BeamStep, ...]:
    """Return the steps of one request, `row` of its batch, until it was settled; `values` holds `search.*` per step."""
    steps = []
    for number, done in enumerate(values["search.done"]):
        settled = bool(done[row]) or number == len(values["search.done"]) - 1
        standing: Fate = "lives" if not settled else "stopped" if done[row] else "cut"
        candidates = _read_candidates(values, number, row, standing, config.eos_token_id)
        bans = _read_bans(values, number, row, options, config.max_position_embeddings)
        steps.append(BeamStep(number, candidates, bans))
        if settled:
            break
    return tuple(steps)


def _read_candidates(
    values: Mapping[str, Sequence[Tensor]], number: int, row: int, standing: Fate, end: int
) -> tuple[Candidate, ...]:
    def column(name: str) -> list[int]:
        numbers: list[int] = values[f"search.{name}"][number][row].tolist()
        return numbers

    survivors, finished = column("survivors"), column("finished")
    tokens, parents, sums = column("candidates.tokens"), column("candidates.parents"), column("candidates.sums")
    candidates = []
    for i, (token, parent, total) in enumerate(zip(tokens, parents, sums, strict=True)):
        beam = survivors.index(i) if i in survivors and not finished[i] else None
        fate: Fate = "finished" if finished[i] else "ended low" if token == end else "dropped"
        if beam is not None and total > float("-inf"):
            fate = standing
        candidates.append(Candidate(token, parent, total, fate, beam))
    return tuple(candidates)


def _read_bans(
    values: Mapping[str, Sequence[Tensor]], number: int, row: int, options: GenerationOptions, limit: int
) -> tuple[Ban, ...]:
    K, bans = options.width, []
    for rule in RULES:
        if (pairs := values.get(f"search.banned.{rule}")) is None:
            continue
        for beam in range(K):
            ids = pairs[number][pairs[number][:, 0] == row * K + beam, 1]
            if len(ids):
                bans.append(Ban(rule, beam, tuple(ids.tolist())))
    last = min(options.max_new_tokens, limit) - 1
    forced = (
        ("forced_bos_token", options.forced_bos_token_id, 0),
        ("forced_eos_token", options.forced_eos_token_id, last),
    )
    for rule, id, when in forced:
        if id is not None and when == number:
            bans += [Ban(rule, beam, (), id) for beam in range(K)]
    return tuple(bans)


def answer_rows(beams: Sequence[BeamStep], ids: Sequence[int]) -> tuple[int, ...] | None:
    """Return the beam that computed each of the generated `ids` of an answer; None when no beam wrote them."""
    if not 0 < len(ids) <= len(beams):
        return None
    for candidate in beams[len(ids) - 1].candidates:
        if candidate.token == ids[-1] and candidate.fate in ("finished", "cut"):
            rows, written = _walk_back(beams, len(ids) - 1, candidate)
            if written == list(ids):
                return tuple(rows)
    return None


def _walk_back(beams: Sequence[BeamStep], number: int, candidate: Candidate) -> tuple[list[int], list[int]]:
    """Return the rows and ids of a candidate of step `number` and of the candidates that it extends, first to last."""
    rows, ids = [candidate.parent], [candidate.token]
    for earlier in range(number - 1, -1, -1):
        before = next(candidate for candidate in beams[earlier].candidates if candidate.beam == rows[0])
        rows.insert(0, before.parent)
        ids.insert(0, before.token)
    return rows, ids
