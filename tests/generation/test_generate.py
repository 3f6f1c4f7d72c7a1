"""generate: the cached search over a real model, against the uncached specification."""

from dataclasses import replace

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


@pytest.fixture(scope="module")
def model() -> Florence2Model:
    shape = shapes()[3]
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


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
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
    shape = shapes()[3]
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


def test_forced_ids_outside_the_vocabulary_are_refused(model: Florence2Model, memory: Tensor) -> None:
    with pytest.raises(OptionError, match="99999 is outside"):
        generate(model, memory, GenerationOptions(forced_bos_token_id=99999))


def test_no_gradients_are_kept(model: Florence2Model, memory: Tensor) -> None:
    assert not generate(model, memory, GenerationOptions(max_new_tokens=3)).token_logprobs.requires_grad
