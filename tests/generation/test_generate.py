"""generate: the cached search over a real model, against the uncached specification."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import florence2
from florence2.errors import OptionError
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.generation.search import search
from florence2.generation.state import SpecialIds
from florence2.model.florence2 import Florence2Model
from parity.cases import SETTINGS, shapes
from parity.recipe import make_model
from tests.conftest import few_words
from tests.release import keep
from tests.slow_search import search_slowly


@pytest.fixture(scope="module")
def model() -> Florence2Model:
    shape = few_words(shapes()[3])
    return make_model(shape.config, shape.seed, shape.end_bonus)


@pytest.fixture(scope="module")
def memory(model: Florence2Model) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.encode(model.encode_image(torch.randn(2, 3, 64, 64)), torch.tensor([[0, 713, 16, 2]] * 2))


def search_uncached(model: Florence2Model, memory: Tensor, options: GenerationOptions) -> florence2.Generation:
    """The same search, every step decoding every beam's whole sequence again."""
    K = options.num_beams
    repeated = memory.repeat_interleave(K, 0)
    past = torch.zeros(len(repeated), 0, dtype=torch.long)

    def step(newest: Tensor) -> Tensor:
        nonlocal past
        past = torch.cat([past, newest[:, None]], dim=1)
        with torch.no_grad():
            return model.decode(past, repeated)[:, -1]

    def reorder(parents: Tensor) -> None:
        nonlocal past
        past = (
            past.view(-1, K, past.shape[1]).gather(1, parents[:, :, None].expand(-1, -1, past.shape[1])).flatten(0, 1)
        )

    return search(step, reorder, len(memory), options, SpecialIds())


@pytest.mark.parametrize("changes", keep(range(0, len(SETTINGS), 3), SETTINGS), ids=str)
def test_cached_equals_uncached(model: Florence2Model, memory: Tensor, changes: dict) -> None:  # type: ignore[type-arg]
    options = GenerationOptions().changed(**changes)
    cached, uncached = generate(model, memory, options), search_uncached(model, memory, options)
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    assert cached.finish_reasons == uncached.finish_reasons
    assert torch.allclose(cached.token_logprobs, uncached.token_logprobs, atol=1e-3)


def test_one_pass_scores_what_was_generated(model: Florence2Model, memory: Tensor) -> None:
    """Decoding a finished sequence in one pass gives each id the log-probability it had when it was chosen."""
    options = GenerationOptions(num_beams=4, max_new_tokens=20, no_repeat_ngram_size=0, forced_bos_token_id=None)
    found = generate(model, memory, options)
    for row in range(2):
        length = int(found.lengths[row])
        ids = found.sequences[row : row + 1, : 1 + length].clone()
        with torch.no_grad():
            logprobs = model.decode(ids[:, :-1], memory[row : row + 1]).log_softmax(-1)[0]
        again = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        cut = found.finish_reasons[row] == "length"
        assert torch.allclose(again[: length - cut], found.token_logprobs[row, : length - cut], atol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_longer_than_the_positions_ends_with_length(beams: int) -> None:
    """Positions for 12 ids: 12 can be generated, whatever was asked for, and the last is the forced end."""
    shape = few_words(shapes()[3])
    config = replace(shape.config, text=replace(shape.config.text, max_position_embeddings=12))
    model = make_model(config, 3, end_bonus=-50.0)
    memory = torch.randn(1, 5, 64)
    for asked in (12, 13, 5000):
        found = generate(model, memory, GenerationOptions(num_beams=beams, max_new_tokens=asked))
        assert found.lengths.tolist() == [12] and found.finish_reasons == ("length",)
        assert found.sequences[0, -1] == 2
    short = generate(model, memory, GenerationOptions(num_beams=beams, max_new_tokens=11))
    assert short.lengths.tolist() == [11]


def test_special_ids_come_from_the_model(model: Florence2Model, memory: Tensor) -> None:
    text = replace(model.config.text, decoder_start_token_id=5, pad_token_id=7)
    other = Florence2Model(replace(model.config, text=text))
    other.load_state_dict(model.state_dict())
    found = generate(other.eval(), memory, GenerationOptions(max_new_tokens=12))
    assert (found.sequences[:, 0] == 5).all()


def make_words_model(end_bonus: float, **special: int) -> Florence2Model:
    """A model of 60 words in float64, so that rounding decides nothing."""
    shape = shapes()[1]
    model = make_model(replace(shape.config, text=replace(shape.config.text, vocab_size=60)), shape.seed, end_bonus)
    other = Florence2Model(replace(model.config, text=replace(model.config.text, **special)))
    other.load_state_dict(model.state_dict())
    return other.double().eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_end_and_are_padded_by_the_ids_of_the_model(beams: int) -> None:
    """The one answer ends early by the model's end id, and its padding follows; the other is longer."""
    model = make_words_model(-50.0, eos_token_id=6, pad_token_id=7, decoder_start_token_id=4)
    with torch.no_grad():
        model.final_logits_bias[0, 6] = 6.0
        model.final_logits_bias[0, 7] = -50.0
    memory = torch.randn(4, 5, model.config.text.d_model, generator=torch.Generator().manual_seed(0)).double() * 3
    options = GenerationOptions(num_beams=beams, max_new_tokens=25, forced_bos_token_id=None, forced_eos_token_id=None)
    found = generate(model, memory, options)
    assert [row[: 1 + n] for row, n in zip(found.sequences.tolist(), found.lengths.tolist(), strict=True)] == (
        search_slowly(model, memory, options)
    )
    assert len(set(found.lengths.tolist())) > 1 and "stop" in found.finish_reasons
    for row, length, reason in zip(found.sequences.tolist(), found.lengths.tolist(), found.finish_reasons, strict=True):
        assert (row[length] == 6) == (reason == "stop") and 6 not in row[:length]
        assert row[0] == 4 and set(row[1 + length :]) <= {7}


@pytest.mark.parametrize(
    "changes",
    keep(
        [0, 2],
        [
            {"num_beams": 1},
            {"num_beams": 3, "num_return_sequences": 3, "early_stopping": False},
            {"num_beams": 4, "num_return_sequences": 4, "early_stopping": "never", "length_penalty": -0.5},
            {"num_beams": 2, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 1.5},
        ],
    ),
    ids=str,
)
def test_equals_an_independent_search(changes: dict[str, Any]) -> None:
    """The other side shares neither the search nor the rules nor the cache."""
    model = make_words_model(1.0)
    memory = torch.randn(3, 5, model.config.text.d_model, generator=torch.Generator().manual_seed(1)).double() * 3
    options = GenerationOptions(max_new_tokens=22, no_repeat_ngram_size=2, repetition_penalty=1.2).changed(**changes)
    found = generate(model, memory, options)
    assert [row[: 1 + n] for row, n in zip(found.sequences.tolist(), found.lengths.tolist(), strict=True)] == (
        search_slowly(model, memory, options)
    )


def test_forced_ids_outside_the_vocabulary_are_refused(model: Florence2Model, memory: Tensor) -> None:
    with pytest.raises(OptionError, match="99999 is outside"):
        generate(model, memory, GenerationOptions(forced_bos_token_id=99999))
    size = model.config.text.vocab_size
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        with pytest.raises(OptionError, match=f"{size} is outside this model's vocabulary of {size} ids"):
            generate(model, memory, GenerationOptions(max_new_tokens=2).changed(**{name: size}))
    assert generate(model, memory, GenerationOptions(max_new_tokens=2, forced_bos_token_id=size - 1)).sequences[
        0, 1
    ] == (size - 1)


def test_finished_inputs_are_left_out_of_the_cache(model: Florence2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that each step decodes become fewer, and the answers are those of each input alone."""
    memory = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(3)) * 3
    options = GenerationOptions(num_beams=2, max_new_tokens=40)
    alone = [generate(model, memory[i : i + 1], options) for i in range(6)]
    rows, step = [], model.step

    def count(ids: Tensor, *rest: Any) -> Tensor:
        rows.append(len(ids))
        return step(ids, *rest)

    monkeypatch.setattr(model, "step", count)
    found = generate(model, memory, options)
    lengths = [int(one.lengths[0]) for one in alone]
    assert len(set(lengths)) > 1 and found.lengths.tolist() == lengths
    assert rows[0] == 12 and rows[-1] < 12 and sorted(rows, reverse=True) == rows
    for i, one in enumerate(alone):
        assert found.sequences[i, : 1 + lengths[i]].tolist() == one.sequences[0].tolist()
        assert torch.allclose(found.token_logprobs[i, : lengths[i]], one.token_logprobs[0], atol=1e-3)


def test_no_gradients_are_kept(model: Florence2Model, memory: Tensor) -> None:
    assert not generate(model, memory, GenerationOptions(max_new_tokens=3)).token_logprobs.requires_grad
