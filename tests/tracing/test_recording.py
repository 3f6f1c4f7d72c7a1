"""What a trace holds: against formulas, against the uncached decoder, against the same run without it."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from florence2 import Florence2, GenerationOptions, load
from florence2.errors import OptionError
from florence2.inspect import Tracing
from florence2.tracing.beams import BeamStep
from florence2.tracing.names import RULES, Name
from florence2.tracing.runs import _rows
from florence2.tracing.selection import NotRecordedWarning
from recipes.nano.scenes import make_scene
from tests import plain
from tests.release import keep
from tests.traced import PROMPTS

LAYER = "decoder.layers.0"


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=atol)


def choices(step: BeamStep) -> list[tuple[int, int, str]]:
    return [(candidate.token, candidate.parent, candidate.fate) for candidate in step.candidates]


@pytest.fixture(scope="module")
def traced(small: Florence2, images: list[Image.Image]) -> Any:
    """One run with three beams, everything kept. Do not change it."""
    options = small.options(max_new_tokens=12, min_new_tokens=6, num_return_sequences=3)
    with small.trace("**") as t:
        small.run(*PROMPTS[0][:1], images[0], options=options)
    return t


@pytest.mark.parametrize("settings", ["beams", "greedy"])
def test_the_traced_run_gives_the_same_answers(
    small: Florence2, images: list[Image.Image], settings: str, request: pytest.FixtureRequest
) -> None:
    options: GenerationOptions = request.getfixturevalue(settings)
    requests = [(task, images[i % 2], text) for i, (task, text) in enumerate(PROMPTS)]
    plain_answers = small.run_batch(requests, options=options)
    with small.trace("**") as t:
        answers = small.run_batch(requests, options=options)
    assert [a.token_ids for a in answers] == [a.token_ids for a in plain_answers]
    assert len({a.token_ids for a in answers}) > 1 and len({len(run.prompt_ids) for run in t.runs}) == 3
    for found, expected in zip(answers, plain_answers, strict=True):
        assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-4)
        assert found.finish_reason == expected.finish_reason
    assert [run.answer for run in t.runs] == answers


@pytest.mark.parametrize("beams", keep([1], [1, 3]))
def test_on_the_specimen_tokens_are_the_same_with_everything_kept(beams: int) -> None:
    f, scene = load("nano"), make_scene(8, 0)
    quiet = {f"scores.{rule}" for rule in RULES[:3]}  # that are off in its settings
    options = f.options(num_beams=beams, max_new_tokens=60)
    for task in ("<OD>", "<OCR_WITH_REGION>", "<MORE_DETAILED_CAPTION>"):
        untraced = f.run(task, scene.image, options=options)
        with f.trace("**") as t:
            traced = f.run(task, scene.image, options=options)
        assert traced.token_ids == untraced.token_ids and len(untraced.token_ids) > 2
        assert traced.token_logprobs == pytest.approx(untraced.token_logprobs, abs=1e-4)
        wanted = {name.name for name in t.selected if not name.searched}
        assert set(t.names) == wanted - quiet


@pytest.mark.parametrize("settings", ["beams", "greedy"])
def test_a_run_of_a_batch_holds_what_it_holds_alone(
    small: Florence2, images: list[Image.Image], settings: str, request: pytest.FixtureRequest
) -> None:
    options: GenerationOptions = request.getfixturevalue(settings)
    requests = [(task, images[i % 2], text) for i, (task, text) in enumerate(PROMPTS)]
    names: tuple[str, ...] = (
        "memory",
        "encoder.layers.0.self_attention.weights",
        f"{LAYER}.cross_attention.weights",
        LAYER,
        "prompt",
    )
    names += (f"{LAYER}.self_attention.weights", "scores.no_repeat_ngram", "vision_tower.blocks.1.0.spatial_block")
    with small.trace(*names) as together:
        small.run_batch(requests, options=options)
    assert len(together.images) == 2
    for i, one in list(enumerate(requests))[1:3]:  # a padded prompt, and the longest
        with small.trace(*names) as alone:
            small.run_batch([one], options=options)
        run = together.runs[i]
        assert [choices(step) for step in run.beams] == [choices(step) for step in alone.beams]
        assert run.rows() == alone.run.rows() and run.image_size == alone.run.image_size
        for name in names:
            assert close(run[name], alone[name], atol=1e-4), name


def test_what_the_answer_saw_is_what_the_uncached_decoder_sees(small: Florence2, traced: Tracing) -> None:
    names = [name.name for name in traced.selected if name.name.startswith("decoder.") and name.when == "step"]
    for alternative in range(3):
        ids = traced.run.answer_ids(alternative)
        assert len(ids) > 5 and len(traced.run.rows(alternative)) == len(ids)
        recording = Tracing(small.model.config, ["decoder", "logits"]).start()
        with torch.no_grad():
            small.model.decode(torch.tensor([(2, *ids[:-1])]), traced["memory"][None], trace=recording)
        for name in [*names, "logits"]:
            expected = recording.values[name][0][0]  # (heads, T, ...) or (T, ...)
            if "heads" in traced.known[name].shape:
                expected = expected.transpose(0, 1)
            assert close(traced.along_answer(name, alternative), expected, atol=1e-4), name
    assert len({traced.run.rows(alternative) for alternative in range(3)}) == 3


def test_scores_along_the_answer_are_its_log_probabilities(traced: Tracing) -> None:
    scores = traced.along_answer("scores")
    found = [float(scores[n, id]) for n, id in enumerate(traced.run.answer_ids())]
    assert found == pytest.approx(traced.run.answer.token_logprobs, abs=1e-6)


@pytest.mark.parametrize(
    "path", ["encoder.layers.0.self_attention", f"{LAYER}.cross_attention", f"{LAYER}.self_attention"]
)
def test_attention_by_its_formula(traced: Tracing, path: str) -> None:
    """softmax(q kᵀ / √d) v, head by head; keys of the decoder's own attention are those of the steps before."""

    def value(last: str) -> Tensor:
        name = f"{path}.{last}"
        if "K" not in traced.known[name].own_shape:
            return traced[name]
        return traced.along_answer(name).transpose(0, 1)  # (heads, T, ...)

    queries, keys, values = value("queries"), value("keys"), value("values")
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    if path == f"{LAYER}.self_attention":
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), float("-inf"))
    weights = scores.softmax(-1)
    assert close(value("weights"), weights)
    assert close(value("heads"), weights @ values)


def test_heads_joined_and_projected_are_what_the_attention_adds(small: Florence2, traced: Tracing) -> None:
    layer = small.model.language_model.decoder.layers[0]
    mixed = traced.along_answer(f"{LAYER}.cross_attention.heads").flatten(1)  # (T, D)
    added = traced.along_answer(f"{LAYER}.cross_attention")
    before, after = (traced.along_answer(f"{LAYER}.after_{name}_attention") for name in ("self", "cross"))
    with torch.no_grad():
        assert close(plain.linear(mixed, layer.encoder_attn.out_proj), added)
        assert close(plain.norm(before + added, layer.encoder_attn_layer_norm), after)
        hidden, mlp = traced.along_answer(f"{LAYER}.mlp.hidden"), traced.along_answer(f"{LAYER}.mlp")
        assert close(plain.linear(hidden, layer.fc2), mlp)
        assert close(plain.norm(after + mlp, layer.final_layer_norm), traced.along_answer(LAYER))


@pytest.mark.parametrize("stage", [0, 1])
def test_windows_and_channel_groups_by_their_formulas(small: Florence2, traced: Tracing, stage: int) -> None:
    for kind, attention in (("spatial", "window_attn"), ("channel", "channel_attn")):
        path = f"vision_tower.blocks.{stage}.0.{kind}_block"
        block = small.model.vision_tower.blocks[stage][0].get_submodule(f"{kind}_block")
        query, key, value = (traced[f"{path}.{attention}.{last}"] for last in ("queries", "keys", "values"))
        if kind == "channel":  # the tokens are channels, the features positions
            query, key, value = (x.flatten(1, 2).transpose(-1, -2) for x in (query, key, value))  # (G, c, h·w)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        mixed = weights @ value
        assert close(traced[f"{path}.{attention}.weights"], weights)
        assert close(traced[f"{path}.{attention}.heads"], mixed if kind == "spatial" else mixed.transpose(-1, -2), 1e-4)
        with torch.no_grad():
            before, added = traced[f"{path}.conv1"], traced[f"{path}.{attention}"]
            queries = plain.linear(plain.norm(before, block.norm1), block.get_submodule(attention).qkv)
            assert close(traced[f"{path}.after_attention"], before + added)
            assert close(traced[f"{path}.ffn"], plain.linear(traced[f"{path}.ffn.hidden"], block.ffn.fc2), 1e-4)
            assert close(traced[path], traced[f"{path}.conv2"] + traced[f"{path}.ffn"])
        if kind == "channel":
            own = queries.unflatten(2, (3, traced.known[f"{path}.{attention}.weights"].shape_for({"B": 1})[1], -1))
            assert close(traced[f"{path}.{attention}.queries"], own[:, :, 0].permute(2, 0, 1, 3), 1e-4)


def test_tokens_before_and_after_the_projection(small: Florence2, traced: Tracing) -> None:
    projector = small.model.multi_modal_projector
    pooled = traced["multi_modal_projector.pooled"]
    with torch.no_grad():
        after = plain.norm(pooled @ projector.image_projection.weight.T, projector.image_proj_norm)
    assert close(traced["multi_modal_projector"], after) and torch.equal(
        traced["image_tokens"], traced.run.encoded.features[0]
    )
    assert close(pooled[0], pooled[traced.run.grid_span].mean(0))


def test_where_things_are(small: Florence2, traced: Tracing) -> None:
    run = traced.run
    h, w = run.image_grid
    assert (h, w) == (20, 28) == traced.images[0].grid and run.image_size == (320, 200)
    assert run.image_tokens == 1 + h * w and run.grid_span == slice(1, 1 + h * w)
    assert list(run.prompt_ids) == small.processor.prompt("<OD>")
    assert traced["memory"][run.prompt_span].shape == (len(run.prompt_ids), 64) and run.prompt_span.stop == len(
        traced["memory"]
    )
    embedded = small.model.language_model.shared.weight[list(run.prompt_ids)]
    assert torch.equal(traced["prompt"], embedded)
    grid = traced["vision_tower"]
    assert grid.shape[:2] == (h, w)
    assert traced.images[0].find("vision_tower").shape == ("B", "h", "w", "C")


def test_the_beams_add_up(small: Florence2, traced: Tracing) -> None:
    scores, beams = traced["scores"], traced.beams
    sums = [0.0, -1e9, -1e9]
    for step in beams:
        assert len(step.candidates) == 6
        for candidate in step.candidates:
            expected = sums[candidate.parent] + float(scores[step.number, candidate.parent, candidate.token])
            assert candidate.sum == pytest.approx(expected, rel=1e-6, abs=1e-4)
        found = [candidate.sum for candidate in step.candidates]
        assert found == sorted(found, reverse=True)
        total = (scores[step.number] + torch.tensor(sums)[:, None]).flatten()
        assert found == pytest.approx(total.topk(6).values.tolist(), rel=1e-6, abs=1e-4)
        standing = step.survivors
        assert [candidate.beam for candidate in standing] == [0, 1, 2]
        assert [c.sum for c in standing] == sorted((c.sum for c in standing), reverse=True)
        sums = [candidate.sum for candidate in standing]
    lived = {candidate.fate for step in beams[:-1] for candidate in step.candidates}
    last = {candidate.fate for candidate in beams[-1].candidates}
    assert "lives" in lived and not lived & {"stopped", "cut"} and "lives" not in last


def test_fates_of_an_answer_that_ends(small: Florence2, images: list[Image.Image]) -> None:
    """Every finished hypothesis ended; the search stopped once three had."""
    with small.trace() as t:
        answer = small.run("<OD>", images[0], options=small.options(max_new_tokens=40))
    ended = [c for step in t.beams for c in step.candidates if c.token == 2]
    assert answer.finish_reason == "stop" and {c.fate for c in ended} <= {"finished", "ended low", "dropped"}
    assert sum(c.fate == "finished" for c in ended) >= 3
    assert t.beams[-1].survivors and {c.fate for c in t.beams[-1].survivors} == {"stopped"}
    finished = {c.fate for step in t.beams for c in step.candidates if c.token != 2}
    assert "finished" not in finished


def test_bans_by_rule(small: Florence2, images: list[Image.Image], beams: GenerationOptions) -> None:
    """Bigrams must not repeat: an id is banned just when it followed the newest one before."""
    options = beams.changed(no_repeat_ngram_size=2, max_new_tokens=16, min_new_tokens=15)
    with small.trace("scores") as t:
        small.run("<OD>", images[0], options=options)
    first = t.beams[0].bans
    assert {(ban.rule, ban.only) for ban in first} == {("forced_bos_token", 0), ("min_new_tokens", None)}
    assert {ban.rule for ban in t.beams[15].bans} >= {"forced_eos_token"} and len(t.beams) == 16
    past: list[tuple[int, ...]] = [(2,), (2,), (2,)]
    seen = 0
    for step in t.beams:
        bans = {(ban.rule, ban.beam): set(ban.ids) for ban in step.bans if ban.only is None}
        for beam, ids in enumerate(past):
            repeats = {b for a, b in pairwise(ids) if a == ids[-1]}
            assert bans.get(("no_repeat_ngram", beam), set()) == repeats
            seen += len(repeats)
            ends = {2} - repeats if step.number < 15 else set()
            assert bans.get(("min_new_tokens", beam), set()) == ends
        past = [(*past[c.parent], c.token) for c in step.survivors]
    assert seen > 0


def test_scores_after_each_rule(small: Florence2, images: list[Image.Image], greedy: GenerationOptions) -> None:
    with small.trace("logits", "scores") as t:
        small.run("<CAPTION>", images[0], options=greedy)
    ids = t.run.answer_ids()
    logits, penalised = t.along_answer("logits"), t.along_answer("scores.repetition_penalty")
    for n in range(len(ids)):
        past = sorted({2, *ids[:n]})
        expected = logits[n].clone()
        expected[past] = torch.where(expected[past] < 0, expected[past] * 1.2, expected[past] / 1.2)
        assert torch.allclose(penalised[n], expected)
    short = t.along_answer("scores.min_new_tokens")
    assert (short[:4, 2] == float("-inf")).all() and (short[4:, 2] > float("-inf")).all()
    final = t.along_answer("scores.forced_eos_token").log_softmax(-1)
    assert torch.equal(t.along_answer("scores"), final)
    assert [int(row.argmax()) for row in final] == list(ids)


def test_only_what_is_named_is_kept(small: Florence2, images: list[Image.Image], beams: GenerationOptions) -> None:
    with small.trace("=decoder.layers.*", "memory") as t:
        small.run("<OD>", images[0], options=beams)
    assert t.names == ["memory", LAYER]
    held = [value for values in t.run.values.values() for value in values]
    assert t.bytes == sum(value.nbytes for value in held)
    assert all(value.untyped_storage().nbytes() <= value.nbytes for value in held)
    with pytest.raises(OptionError, match="'logits' was not kept; name it"):
        t["logits"]
    with pytest.raises(OptionError, match="called 'decoder.layers.0.mlpp'. The nearest names are decoder.layers.0.mlp"):
        t["decoder.layers.0.mlpp"]
    with pytest.raises(OptionError, match="is a pattern; ask for one name at a time"):
        t["decoder.layers.*"]
    with pytest.raises(OptionError, match="'search.done' is part of the search; read it from `beams`"):
        t["search.done"]
    with pytest.raises(OptionError, match="'memory' is not computed for every token"):
        t.along_answer("memory")
    with pytest.raises(OptionError, match="alternative is 1; those of this run are 0 to 0"):
        t.along_answer(LAYER, alternative=1)
    with (
        pytest.warns(
            NotRecordedWarning, match="The trace of 'scores.min_new_tokens' keeps nothing: no run in its block"
        ),
        small.trace("scores.min_new_tokens") as t,
    ):
        small.run("<OD>", images[0], options=beams.changed(min_new_tokens=0))
    with pytest.raises(
        OptionError, match="was not recorded in this run: either the rule that it belongs to is off, or"
    ):
        t["scores.min_new_tokens"]


def test_several_runs_and_images(small: Florence2, images: list[Image.Image], beams: GenerationOptions) -> None:
    outside = small.encode_image(images[1])
    with small.trace("memory", "vision_tower") as t:
        small.run("<OD>", images[0], options=beams)
        small.run("<OD>", outside, options=beams)
    assert len(t.runs) == 2 and len(t.images) == 1
    assert torch.equal(t["vision_tower"], t.runs[0]["vision_tower"])
    assert "vision_tower" in t.runs[0].names and "vision_tower" not in t.runs[1].names
    with pytest.raises(OptionError, match=r"holds 2 runs, not one; choose with t.runs\[number\]"):
        t["memory"]
    with pytest.raises(OptionError, match="image was encoded outside of the trace"):
        t.runs[1]["vision_tower"]
    assert t.runs[1].image_grid == (20, 28)  # that of every image of this checkpoint
    with small.trace("memory") as empty:
        pass
    with pytest.raises(OptionError, match="holds no runs; run the model within its block"):
        empty["memory"]


def test_only_this_object_in_this_block(small: Florence2, images: list[Image.Image], beams: GenerationOptions) -> None:
    other = Florence2(small.model, small.processor)
    with small.trace("memory") as t, pytest.raises(ZeroDivisionError):
        other.run("<OD>", images[0], options=beams)
        raise ZeroDivisionError
    small.run("<OD>", images[0], options=beams)
    assert t.runs == [] and t.images == []


def test_nested_traces_each_keep_their_own(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions
) -> None:
    with small.trace("memory") as outer:
        with small.trace(f"{LAYER}.cross_attention.weights") as inner:
            small.run("<OD>", images[0], options=beams)
        small.run("<CAPTION>", images[0], options=beams)
    assert len(outer.runs) == 2 and len(inner.runs) == 1
    assert "memory" not in inner.names and "memory" in outer.names


def test_threads_and_tasks_do_not_see_each_other(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions
) -> None:
    ready = threading.Barrier(2)

    def work(i: int) -> Any:
        with small.trace("memory") as t:
            ready.wait(timeout=60)  # both blocks are open
            small.run("<OD>", images[i], options=beams)
        return t

    async def tasks() -> list[Any]:
        async def task(i: int) -> Any:
            with small.trace("memory") as t:
                await asyncio.sleep(0)
                small.run("<OD>", images[i], options=beams)
            return t

        return list(await asyncio.gather(task(0), task(1)))

    with ThreadPoolExecutor(2) as pool:
        found = [list(pool.map(work, range(2))), asyncio.run(tasks())]
    for pair in found:
        assert [run.image_size for t in pair for run in t.runs] == [(320, 200), (100, 200)]
    with small.trace("memory") as t:
        thread = threading.Thread(target=lambda: small.run("<OD>", images[0], options=beams))
        thread.start()
        thread.join()
    assert t.runs == []


def test_values_can_be_learnt_from(small: Florence2, images: list[Image.Image], beams: GenerationOptions) -> None:
    with small.trace("=decoder.layers.*", "memory") as t:
        small.run("<OD>", images[0], options=beams)
    for name in (LAYER, "memory"):
        weight = torch.zeros(64, requires_grad=True)
        (t[name] @ weight).sum().backward()
        assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_gradients_pass_a_trace(small: Florence2) -> None:
    """Given to the model itself, with gradients on, what is kept keeps its graph."""
    recording = Tracing(small.model.config, ["memory", "logits", "pixel_values"]).start()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    memory = small.model.encode(small.model.encode_image(pixels, recording), torch.tensor([[0, 7, 2]]), trace=recording)
    small.model.decode(torch.tensor([[2, 0]]), memory, trace=recording)
    recording.values["logits"][0][0, -1, 5].backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_a_value_without_a_batch_is_given_whole() -> None:
    value, shapes = torch.arange(6), {"B": [2, 3], "B·K": [2, 3], "N": list(range(6)), "": list(range(6))}
    for letter, expected in shapes.items():
        known = Name("x", (letter,) if letter else (), "text", "image", "model")
        assert _rows(value, known, 1, 3).tolist() == expected
