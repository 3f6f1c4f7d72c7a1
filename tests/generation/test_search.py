"""The search against exhaustive enumeration, against a slow second implementation, and rule by rule."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from florence2.generation.options import GenerationOptions
from florence2.generation.rules import ForcedId, MinNewTokens, NoRepeatNgram, RepetitionPenalty
from florence2.generation.search import search, start_search
from florence2.generation.state import Generation, SpecialIds, logit_rules
from tests.generation.tables import END, IDS, PAD, START, Run, run_on_arrays, run_on_tensors
from tests.release import keep
from tests.slow_search import Table, beam_search, greedy, log_softmax

PLAIN = GenerationOptions(
    num_beams=1,
    max_new_tokens=6,
    no_repeat_ngram_size=0,
    forced_bos_token_id=None,
    forced_eos_token_id=None,
    early_stopping=False,
)

# Logits after each id, for five ids: 0 start, 1 end, 2 padding (unlikely), 3 and 4 the words. Written by hand so that
# the likeliest first word (3) leads into a dead end of unlikely words, and 4 into a sure short sentence.
HAND = [
    [-9.0, -3.0, -9.0, 1.0, 0.8],
    [0.0, 0.0, 0.0, 0.0, 0.0],
    [-9.0, 0.0, -9.0, 0.0, 0.0],
    [-9.0, 0.1, -9.0, 0.2, 0.3],
    [-9.0, 4.0, -9.0, -1.0, -1.0],
]


def markov(logits: Any) -> Table:
    return lambda ids: list(logits[ids[-1]])


@pytest.fixture(params=[run_on_tensors, run_on_arrays], ids=["tensors", "arrays"])
def run(request: pytest.FixtureRequest) -> Run:
    """Each of the two searches."""
    found: Run = request.param
    return found


def strip(row: Tensor, length: int) -> list[int]:
    return row[: 1 + length].tolist()


def exhaustive(table: Table, limit: int, power: float) -> list[tuple[float, list[int]]]:
    """Every finished sequence of up to `limit` ids, best first."""
    found = []
    words = [0, 2, 3, 4]
    for length in range(1, limit + 1):
        for middle in itertools.product(words, repeat=length - 1):
            ids, total = [START], 0.0
            for id in (*middle, END):
                total += log_softmax(table(ids))[id]
                ids.append(id)
            found.append((total / length**power, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("power", [1.0, 0.0, 2.0])
def test_wide_beams_find_what_enumeration_finds(run: Run, power: float) -> None:
    """With as many beams as there are prefixes nothing is pruned, so the best is the best of all."""
    limit = 5
    options = replace(
        PLAIN,
        num_beams=256,
        max_new_tokens=limit,
        length_penalty=power,
        early_stopping="never",
        num_return_sequences=20,
    )
    found = run([markov(HAND)], options)
    expected = exhaustive(markov(HAND), limit, power)[:20]
    ended = [row for row, reason in enumerate(found.finish_reasons) if reason == "stop"]
    assert len(ended) >= 5
    got = [(float(found.sequence_scores[r]), strip(found.sequences[r], int(found.lengths[r]))) for r in ended]
    for (score, ids), (best_score, best_ids) in zip(got, expected, strict=False):
        assert score == pytest.approx(best_score, abs=1e-5)
        assert ids == best_ids or score == pytest.approx(best_score, abs=1e-6)


def test_the_hand_written_table(run: Run) -> None:
    """Greedy takes 3 first (logit 1.0 against 0.8); two beams see that 4 ends almost surely.

    P(4 | start) = e^0.8 / (2 e^-9 + e^-3 + e^1 + e^0.8) = 2.22554 / 4.99386 = 0.44566
    P(end | 4) = e^4 / (2 e^-9 + e^4 + 2 e^-1) = 54.59815 / 55.33416 = 0.98670
    score of "4 end" = (ln 0.44566 + ln 0.98670) / 2 = (-0.80821 - 0.01339) / 2 = -0.41080
    """
    assert run([markov(HAND)], PLAIN).sequences[0, 1] == 3
    best = run([markov(HAND)], replace(PLAIN, num_beams=2))
    assert strip(best.sequences[0], 2) == [START, 4, END]
    assert float(best.sequence_scores[0]) == pytest.approx(-0.41080, abs=1e-5)
    assert best.token_logprobs[0, :2].tolist() == pytest.approx([-0.80821, -0.01339], abs=1e-5)
    assert best.finish_reasons == ("stop",)


# Probabilities after each id: two short answers early, then a fork, and behind it a long answer without any doubt.
LATE = {
    START: {END: 0.6, 3: 0.4},
    PAD: {END: 1.0},
    3: {4: 0.55, END: 0.45},
    4: {5: 0.3, 3: 0.26, 4: 0.24, PAD: 0.2},
    5: {6: 1.0},
    6: {7: 1.0},
    7: {END: 1.0},
}


def test_never_waits_for_what_only_the_longest_length_could_redeem(run: Run) -> None:
    """Two beams, at most eight ids.

    "end": ln 0.6 = -0.511; "3 end": ln(0.4 · 0.45) / 2 = -1.715 / 2 = -0.857, the worst of two. The best candidate is
    "3 4" then, ln(0.4 · 0.55) / 2 = -1.514 / 2 = -0.757, so all but True go on. After the fork it is "3 4 5",
    ln(0.4 · 0.55 · 0.3) = -2.718: over its 3 ids -0.906, worse than -0.857, so False stops; over 8 ids -0.340, so
    "never" goes on, and "3 4 5 6 7 end" has -2.718 / 6 = -0.453, the best of all.
    """

    def table(ids: list[int]) -> list[float]:
        return [math.log(LATE[ids[-1]].get(id, 1e-9)) for id in range(8)]

    options = replace(PLAIN, num_beams=2, num_return_sequences=2, max_new_tokens=8)
    for early_stopping in (True, False):
        found = run([table], replace(options, early_stopping=early_stopping))
        assert found.sequences.tolist() == [[START, END, PAD], [START, 3, END]]
        assert found.sequence_scores.tolist() == pytest.approx([-0.5108, -0.8574], abs=1e-4)
    found = run([table], replace(options, early_stopping="never"))
    assert found.sequences.tolist() == [[START, 3, 4, 5, 6, 7, END], [START, END, *[PAD] * 5]]
    assert found.sequence_scores.tolist() == pytest.approx([-0.4530, -0.5108], abs=1e-4)


def test_never_looks_at_the_present_length_where_short_answers_score_best(run: Run) -> None:
    """Two beams, at most 40 ids, a length penalty below 0, by which a longer hypothesis scores worse.

    "end" has ln 0.1 = -2.303; "3 4 end" has ln(0.8 · 0.8 · 0.99...) · 3^0.7 = -0.446 · 2.158 = -0.963. At the limit of
    40 ids the best running sum would count 13 times, so a search that looked there would stop before it.
    """
    likely = {START: {3: 0.8, END: 0.1, 4: 0.1}, 3: {4: 0.8, END: 0.1, 5: 0.1}, 4: {END: 1.0}}

    def table(ids: list[int]) -> list[float]:
        return [math.log(likely.get(ids[-1], {END: 1.0}).get(id, 1e-9)) for id in range(6)]

    options = replace(PLAIN, num_beams=2, num_return_sequences=2, max_new_tokens=40, length_penalty=-0.7)
    found = run([table], replace(options, early_stopping="never"))
    assert [strip(found.sequences[r], int(found.lengths[r])) for r in range(2)] == [[START, 3, 4, END], [START, END]]
    assert found.sequence_scores.tolist() == pytest.approx([-0.9629, -2.3026], abs=1e-4)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_beams": 2},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": False, "length_penalty": 0.3},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 1.7},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.7},
    {"num_beams": 3, "early_stopping": False, "length_penalty": 0.0},
    {"num_beams": 5, "num_return_sequences": 5, "early_stopping": True},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": False},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": False, "length_penalty": 2.0},
    {"num_beams": 4, "num_return_sequences": 4, "early_stopping": "never", "length_penalty": 1.7},
    {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": -0.7},
    {"num_beams": 3, "no_repeat_ngram_size": 3},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "early_stopping": True},
    {"num_beams": 2, "no_repeat_ngram_size": 1},
    {"num_beams": 3, "min_new_tokens": 5, "early_stopping": True},
    {"num_beams": 3, "repetition_penalty": 1.4},
    {"num_beams": 3, "repetition_penalty": 0.7, "early_stopping": True},
    {"num_beams": 3, "forced_bos_token_id": 4, "forced_eos_token_id": END, "early_stopping": True},
    {"num_beams": 3, "forced_bos_token_id": START, "forced_eos_token_id": END, "no_repeat_ngram_size": 3},
    {"num_beams": 3, "max_new_tokens": 1, "forced_eos_token_id": END},
    {"num_beams": 3, "max_new_tokens": 2},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.4, "min_new_tokens": 4},
    {"forced_bos_token_id": 5, "forced_eos_token_id": END, "max_new_tokens": 4},
]


def random_table(seed: int, ids: int = 12, end_bonus: float = 0.8) -> Table:
    """Logits that depend on the last two ids and on the length, so that no two prefixes are alike."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (ids, ids, ids))
    by_length = rng.normal(0, 0.7, (40, ids))
    by_length[:, END] += end_bonus

    def table(past: list[int]) -> list[float]:
        before = past[-2] if len(past) > 1 else 0
        row = logits[before, past[-1]] + by_length[len(past)]
        return [float(value) for value in row.astype(np.float32)]

    return table


@pytest.mark.parametrize("seeds", keep([0], [range(5), range(5, 12)]), ids=str)
@pytest.mark.parametrize(("start", "limit", "end_bonus"), [(START, 10, 0.8), (7, 30, -1.5)], ids=["short", "long"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_equals_the_slow_search(
    run: Run, changes: dict[str, Any], start: int, limit: int, end_bonus: float, seeds: range
) -> None:
    """Short answers that start with the id 0, long ones that start with another."""
    options = replace(PLAIN, max_new_tokens=limit).changed(**changes)
    for seed in seeds:
        table = random_table(seed, end_bonus=end_bonus)
        found = run([table], options, replace(IDS, start=start))
        rows = [strip(found.sequences[r], int(found.lengths[r])) for r in range(len(found.sequences))]
        if options.num_beams == 1:
            assert rows == [greedy(table, options, start, END)]
            continue
        expected = beam_search(table, options, start, END)[: options.num_return_sequences]
        assert rows == [ids for _, ids in expected], f"seed {seed}"
        assert found.sequence_scores.tolist() == pytest.approx([score for score, _ in expected], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"num_beams": 3, "early_stopping": True}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_a_batch_gives_what_each_input_gives_alone(run: Run, changes: dict[str, Any]) -> None:
    options = replace(PLAIN, max_new_tokens=12).changed(**changes)
    tables = [random_table(seed) for seed in range(7)]
    together = run(tables, options)
    rows = options.num_return_sequences
    for i, table in enumerate(tables):
        alone = run([table], options)
        for r in range(rows):
            length = int(alone.lengths[r])
            assert int(together.lengths[i * rows + r]) == length
            assert strip(together.sequences[i * rows + r], length) == strip(alone.sequences[r], length)
            assert together.finish_reasons[i * rows + r] == alone.finish_reasons[r]
            after = together.sequences[i * rows + r, 1 + length :]
            assert (after == PAD).all() and (together.token_logprobs[i * rows + r, length:] == 0).all()


def test_scores_are_the_sums_of_the_token_log_probabilities(run: Run) -> None:
    options = replace(PLAIN, num_beams=4, num_return_sequences=4, length_penalty=0.6)
    found = run([random_table(3)], options)
    for r in range(4):
        total = float(found.token_logprobs[r].sum()) / int(found.lengths[r]) ** 0.6
        assert float(found.sequence_scores[r]) == pytest.approx(total, rel=1e-5)


def test_a_forced_end_is_a_cut_not_a_stop(run: Run) -> None:
    never_ends = markov([[0.0, -99.0, -99.0, 5.0, 4.0]] * 5)
    cut = run([never_ends], replace(PLAIN, num_beams=3, max_new_tokens=4, forced_eos_token_id=END))
    assert cut.finish_reasons == ("length",) and cut.sequences[0, -1] == END
    assert cut.token_logprobs[0, -1] == 0.0
    open_end = run([never_ends], replace(PLAIN, num_beams=3, max_new_tokens=4))
    assert open_end.finish_reasons == ("length",) and open_end.sequences[0, -1] != END
    assert run([never_ends], replace(PLAIN, max_new_tokens=4)).finish_reasons == ("length",)


def test_an_end_at_the_limit_that_nobody_forced_is_a_stop(run: Run) -> None:
    ends_third = [[-9.0, -9.0, -9.0, 5.0, -9.0]] * 3 + [[-9.0, -9.0, -9.0, -9.0, 5.0], [-9.0, 5.0, -9.0, -9.0, -9.0]]
    for beams in (1, 2):
        found = run([markov(ends_third)], replace(PLAIN, num_beams=beams, max_new_tokens=3))
        assert strip(found.sequences[0], 3) == [START, 3, 4, END] and found.finish_reasons == ("stop",)


def test_padding_ids_that_the_model_writes_are_no_padding(run: Run) -> None:
    """A model may generate the padding id in earnest; lengths do not come from looking for it."""
    writes_pad = [[-9.0, -9.0, 5.0, -9.0, -9.0]] * 2 + [
        [-9.0, -9.0, -9.0, 5.0, -9.0],
        [-9.0, 5.0, -9.0, -9.0, -9.0],
    ] * 2
    found = run([markov(writes_pad)], PLAIN)
    assert found.sequences.tolist() == [[START, PAD, 3, END]] and found.lengths.tolist() == [3]


def test_rules_stand_in_the_reference_order() -> None:
    options = GenerationOptions(repetition_penalty=1.1, min_new_tokens=2)
    kinds = [type(rule) for rule in logit_rules(options, SpecialIds())]
    assert kinds == [RepetitionPenalty, NoRepeatNgram, MinNewTokens, ForcedId, ForcedId]
    neutral = replace(PLAIN, num_beams=2)
    assert logit_rules(neutral, IDS) == []


def test_greedy_with_a_negative_penalty(run: Run) -> None:
    found = run([markov(HAND)], replace(PLAIN, length_penalty=-1))
    assert float(found.sequence_scores[0]) == pytest.approx(float(found.token_logprobs.sum() * found.lengths[0]))


def test_finished_inputs_are_left_out() -> None:
    """Four inputs that end after 1, 2, 6 and 6 ids: the rows that each step computes, for two beams."""

    def ends_after(count: int) -> Table:
        return lambda ids: [0.0, 9.0 if len(ids) >= count else -99.0, -9.0, 5.0, 4.0]

    tables, rows = [ends_after(count) for count in (1, 2, 6, 6)], []

    def step(newest: Tensor) -> Tensor:
        rows.append(len(newest))
        histories = [[START] * len(rows)] * 2
        return torch.tensor([table(ids) for table in tables for ids in histories])

    def keep(kept: Tensor) -> None:
        tables[:] = [tables[row] for row in kept]

    options = replace(PLAIN, num_beams=2, max_new_tokens=6, early_stopping=True)
    found = search(step, lambda _: None, 4, options, IDS, keep=keep)
    assert rows[0] == 8 and rows[-1] == 4 and sorted(rows, reverse=True) == rows and len(rows) > 3
    assert found.lengths.tolist()[:2] < found.lengths.tolist()[2:]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_leaving_out_what_is_done_changes_nothing(changes: dict[str, Any]) -> None:
    """Nine inputs that end at different lengths, with and without being left out when they are done."""
    tables = [markov(np.random.default_rng(seed).normal(0, 2, (7, 7)).tolist()) for seed in range(9)]
    options = replace(PLAIN, **{"max_new_tokens": 12, **changes})
    kept, left_out = (run_on_tensors(tables, options, with_keep=with_keep) for with_keep in (False, True))
    assert kept.sequences.tolist() == left_out.sequences.tolist()
    assert kept.sequence_scores.tolist() == left_out.sequence_scores.tolist()
    assert kept.lengths.tolist() == left_out.lengths.tolist() and kept.finish_reasons == left_out.finish_reasons
    assert torch.equal(kept.token_logprobs, left_out.token_logprobs)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 1}, {"sample": True, "seed": 1, "num_beams": 1}])
def test_room_grows_with_the_answer_up_to_the_limit(settings: dict[str, Any]) -> None:
    options = GenerationOptions(**{"max_new_tokens": 150, **settings})
    state = start_search(2, options, IDS, "cpu")
    assert [state.with_room_for(n).room for n in (1, 64, 65, 128, 129, 150)] == [64, 64, 128, 128, 150, 150]
    there_and_back = state.with_room_for(1).with_room(150)
    for name, value in state.tensors().items():
        assert torch.equal(there_and_back.tensors()[name], value), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5, "min_new_tokens": 3},
        {"num_beams": 2, "early_stopping": "never", "forced_bos_token_id": 3, "num_return_sequences": 2},
        {"sample": True, "seed": 1},
        {"sample": True, "top_k": 3, "top_p": 0.9},
    ],
    ids=str,
)
def test_every_tensor_is_made_on_the_device_of_the_logits(changes: dict[str, Any]) -> None:
    """Whatever torch's own default is: tensors of this one, "meta", have no values."""
    options, logits = replace(PLAIN, **changes), torch.tensor(HAND)

    def found() -> Generation:
        torch.manual_seed(0)
        return search(lambda newest: logits[newest], lambda _: None, 2, options, IDS, keep=lambda _: None)

    expected = found()
    with torch.device("meta"):
        assert torch.equal(found().sequences, expected.sequences)
