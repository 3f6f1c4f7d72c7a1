"""The logit lens: at the last layer the model's own logits, elsewhere the projection of the stream."""

from typing import Any

import pytest
import torch
from PIL import Image

from florence2 import Florence2
from florence2.errors import OptionError
from florence2.inspect import Tracing, logit_lens
from florence2.inspect.lens import project


@pytest.fixture(scope="module")
def traced(deep: Florence2, images: list[Image.Image]) -> Any:
    options = deep.options(max_new_tokens=8, min_new_tokens=5, num_return_sequences=3)
    with deep.trace("=decoder.embedding", "=decoder.layers.*", "=logits") as t:
        deep.run("<OD>", images[0], options=options)
    return t


@torch.no_grad()
def test_the_last_layer_projected_is_exactly_the_logits(deep: Florence2) -> None:
    memory = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    recording = Tracing(deep.model.config, ["=decoder.layers.*"]).start()
    logits = deep.model.decode(torch.tensor([[2, 0, 51, 52]]), memory, trace=recording)
    assert torch.equal(project(deep.model, recording.values["decoder.layers.3"][0]), logits)


@pytest.mark.parametrize("alternative", [0, 2])
def test_by_its_formula(deep: Florence2, traced: Any, alternative: int) -> None:
    lens, ids = logit_lens(deep.model, traced.run, 4, alternative), torch.tensor(traced.run.answer_ids(alternative))
    T = len(ids)
    assert lens.ids.shape == lens.probabilities.shape == (T, 5, 4) and lens.written.shape == lens.ranks.shape == (T, 5)
    names = ["decoder.embedding", *(f"decoder.layers.{i}" for i in range(4))]
    weight, bias = deep.model.language_model.shared.weight.detach(), deep.model.final_logits_bias[0]
    for depth, name in enumerate(names):
        stream = traced.along_answer(name, alternative).double()
        expected = (stream @ weight.double().T + bias).softmax(-1)
        assert torch.allclose(lens.probabilities[:, depth].double(), expected.gather(1, lens.ids[:, depth]), atol=1e-5)
        assert torch.allclose(lens.probabilities[:, depth].double(), expected.topk(4).values, atol=1e-5)
        written = expected.gather(1, ids[:, None])
        assert torch.allclose(lens.written[:, depth].double(), written[:, 0], atol=1e-5)
        order = expected.argsort(-1, descending=True)
        for n in (1, T - 1):
            assert int(order[n, lens.ranks[n, depth]]) == int(ids[n])
    own = traced.along_answer("logits", alternative).softmax(-1)
    assert torch.allclose(lens.probabilities[:, 4], own.topk(4).values, atol=1e-5)


@pytest.mark.parametrize("k", [0, 51290, 2.0])
def test_a_number_that_cannot_be(deep: Florence2, traced: Any, k: Any) -> None:
    with pytest.raises(OptionError, match="it must be 1 to 51289, the size of the vocabulary"):
        logit_lens(deep.model, traced.run, k)
