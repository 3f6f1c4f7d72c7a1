"""Names that the table does not have: those that a module of one's own records."""

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from florence2 import Florence2, GenerationOptions
from florence2.errors import OptionError
from florence2.model.bart import DecoderLayer, EncoderLayer
from florence2.model.davit import Mlp
from florence2.model.trace import NO_TRACE, Trace
from florence2.tracing.patches import at, from_run, replace, scale, zero
from florence2.tracing.selection import NotRecordedWarning
from tests.traced import PROMPTS

ADAPTER = "decoder.layers.0.mlp.adapter"


class AdaptedDecoderLayer(DecoderLayer):
    """Records what an adapter after the MLP adds, its shape per head, and a table."""

    adapter: nn.Linear

    def add_mlp(self, x: Tensor, trace: Trace) -> Tensor:
        out = super().add_mlp(x, trace)
        added = trace("mlp.adapter", self.adapter(out))
        trace("mlp.parts", added.unflatten(-1, (4, -1)))  # (B·K, 1, 4, D / 4)
        trace("mlp.table", self.adapter.weight)
        return out + added


class AdaptedEncoderLayer(EncoderLayer):
    """Records what an adapter after the MLP adds."""

    adapter: nn.Linear

    def add_mlp(self, x: Tensor, trace: Trace) -> Tensor:
        out = super().add_mlp(x, trace)
        return out + trace("mlp.adapter", self.adapter(out))


class AdaptedMlp(Mlp):
    """Records its output under another name, and a sum (B,)."""

    def forward(self, x: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        out = trace("own", super().forward(x, trace))
        trace("sum", out.sum(dim=(1, 2, 3)))
        return out


@pytest.fixture(scope="module")
def adapted(small: Florence2) -> Florence2:
    """A model with adapters in both stacks and a changed MLP in the tower."""
    f = Florence2(copy.deepcopy(small.model), small.processor)
    text: Any = f.model.language_model
    torch.manual_seed(1)
    for layer, kind in ((text.decoder.layers[0], AdaptedDecoderLayer), (text.encoder.layers[0], AdaptedEncoderLayer)):
        layer.__class__ = kind
        layer.adapter = nn.Linear(64, 64).requires_grad_(False).eval()
    blocks: Any = f.model.vision_tower.blocks
    blocks[0][0].spatial_block.ffn.__class__ = AdaptedMlp
    return f


IMAGE = "vision_tower.blocks.0.0.spatial_block.ffn"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_recorded_name_is_read_like_any_other(adapted: Florence2, images: list[Image.Image], num_beams: int) -> None:
    options = adapted.options(num_beams=num_beams, max_new_tokens=6, min_new_tokens=6)
    with adapted.trace(ADAPTER, "=decoder.layers.0", f"={IMAGE}", f"{IMAGE}.own", unknown="allow") as t:
        adapted.run("<OD>", images[0], options=options)
    assert t.names == [IMAGE, "decoder.layers.0", f"{IMAGE}.own", ADAPTER]
    assert [t[name].shape for name in t.names] == [t[name].shape for name in (IMAGE, "decoder.layers.0") * 2]
    assert torch.equal(t[f"{IMAGE}.own"], t[IMAGE])
    layer: Any = adapted.model.language_model.decoder.layers[0]
    value, stream = t.along_answer(ADAPTER), t.along_answer("decoder.layers.0")
    assert value.shape == stream.shape == (len(t.run.answer_ids()), 64)
    assert torch.allclose(layer.adapter(stream - value), value, atol=1e-4)


def test_patterns_select_recorded_names_too(adapted: Florence2, images: list[Image.Image]) -> None:
    few = adapted.options(max_new_tokens=4, min_new_tokens=4, num_beams=3)
    with adapted.trace("**.adapter", "decoder.layers.0.mlp", f"{IMAGE}.s*", unknown="allow") as t:
        adapted.run("<OD>", images[0], options=few)
    own = [name for name in t.names if name not in t.known]
    assert own == [
        f"{IMAGE}.sum",
        "encoder.layers.0.mlp.adapter",
        ADAPTER,
        f"{ADAPTER[:-7]}parts",
        f"{ADAPTER[:-7]}table",
    ]
    assert t[f"{ADAPTER[:-7]}parts"].shape == (4, 3, 4, 16) and t[f"{IMAGE}.sum"].shape == ()
    assert t["encoder.layers.0.mlp.adapter"].shape == (t.run.prompt_span.stop, 64)
    # a value without a batch is the same for all requests
    layer: Any = adapted.model.language_model.decoder.layers[0]
    assert torch.equal(t[f"{ADAPTER[:-7]}table"][0], layer.adapter.weight)
    with adapted.trace("decoder.layers.0.mlp") as plain:
        adapted.run("<OD>", images[0], options=few)
    assert ADAPTER not in plain.names, "names that the table does not have are kept only where they are allowed"


def test_a_run_of_a_batch_holds_what_it_holds_alone(adapted: Florence2, images: list[Image.Image]) -> None:
    options = adapted.options(num_beams=2, max_new_tokens=5, min_new_tokens=5)
    names = (ADAPTER, "encoder.layers.0.mlp.adapter", f"{IMAGE}.own")
    requests = [(task, images[i % 2], text) for i, (task, text) in enumerate(PROMPTS)]
    with adapted.trace(*names, unknown="allow") as together:
        adapted.run_batch(requests, options=options)
    for i in (1, 2):
        with adapted.trace(*names, unknown="allow") as alone:
            adapted.run_batch(requests[i : i + 1], options=options)
        for name in names:
            assert together.runs[i][name].shape == alone[name].shape
            assert torch.allclose(together.runs[i][name], alone[name], atol=1e-3, rtol=1e-3), name


def test_patches_change_it(adapted: Florence2, images: list[Image.Image], beams: GenerationOptions) -> None:
    def traced(patches: Any) -> Any:
        with adapted.patched(patches, unknown="allow"), adapted.trace(ADAPTER, "logits", unknown="allow") as t:
            adapted.run("<OD>", images[0], options=beams)
        return t

    plain, off = traced({}), traced({ADAPTER: zero()})
    assert plain[ADAPTER].any() and not off[ADAPTER].any() and not torch.equal(plain["logits"], off["logits"])
    without = Florence2(copy.deepcopy(adapted.model), adapted.processor)
    nn.init.zeros_(without.model.get_submodule("language_model.decoder.layers.0.adapter").weight)
    nn.init.zeros_(without.model.get_submodule("language_model.decoder.layers.0.adapter").bias)
    with without.trace("logits") as t:
        without.run("<OD>", images[0], options=beams)
    assert torch.equal(t["logits"], off["logits"])
    assert torch.equal(traced({ADAPTER: from_run(off)})["logits"], off["logits"])
    assert torch.equal(traced({"decoder.layers.*.mlp.ad*": replace(torch.zeros(64))})["logits"], off["logits"])
    first = traced({ADAPTER: at(zero(), steps=[0])})[ADAPTER]
    assert not first[0].any() and first[1].any()
    prompt = traced({"encoder.layers.0.mlp.adapter": at(zero(), positions=[3])})
    assert not torch.equal(prompt["logits"], plain["logits"])
    image = traced({f"{IMAGE}.own": scale(0.5)})
    assert not torch.equal(image["logits"], plain["logits"])


def test_without_permission_it_is_refused_with_the_nearest_names(adapted: Florence2) -> None:
    nearest = "called 'decoder.layers.0.mlp.adapter'. The nearest names are .*decoder.layers.0.mlp.* unknown=\"allow\""
    with pytest.raises(OptionError, match=nearest), adapted.trace(ADAPTER):
        raise AssertionError
    with pytest.raises(OptionError, match=nearest):
        adapted.patched({ADAPTER: zero()})
    for wrong in ("yes", True, None):
        with pytest.raises(OptionError, match='unknown is .*; it must be "refuse" or "allow"'):
            adapted.patched({ADAPTER: zero()}, unknown=wrong)


def test_a_name_that_nobody_recorded_is_reported(adapted: Florence2, images: list[Image.Image]) -> None:
    few = adapted.options(max_new_tokens=2, num_beams=1)
    with (
        pytest.warns(NotRecordedWarning, match="The trace of 'decoder.layers.0.mlpp' keeps nothing"),
        adapted.trace("decoder.layers.0.mlpp", ADAPTER, unknown="allow") as t,
    ):
        adapted.run("<OD>", images[0], options=few)
    with pytest.raises(OptionError, match="called 'decoder.layers.0.mlpp'. The nearest names"):
        t["decoder.layers.0.mlpp"]
    with (
        pytest.warns(NotRecordedWarning, match="The patch of 'decoder.layers.0.mlpp' changed nothing"),
        adapted.patched({"decoder.layers.0.mlpp": zero(), ADAPTER: scale(1.0)}, unknown="allow"),
    ):
        adapted.run("<OD>", images[0], options=few)


def test_the_limit_holds_for_what_cannot_be_predicted(adapted: Florence2, images: list[Image.Image]) -> None:
    with (
        pytest.raises(OptionError, match="The trace holds .* more than the limit"),
        adapted.trace("encoder.layers.0.mlp.adapter", limit=100_000, unknown="allow"),
    ):
        adapted.run("<OD>", images[0], options=adapted.options(max_new_tokens=1))


def test_values_that_cannot_be_stacked(adapted: Florence2, images: list[Image.Image]) -> None:
    """One whose shape changes from step to step, and one that is recorded twice in a step."""
    layer: Any = adapted.model.language_model.decoder.layers[0]
    seen: list[int] = []

    def odd(x: Tensor, trace: Trace) -> Tensor:
        seen.append(1)
        trace("growing", x.expand(-1, len(seen), -1))
        trace("twice", x)
        out: Tensor = type(layer).add_mlp(layer, trace("twice", x), trace)
        return out

    layer.add_mlp = odd
    try:
        with adapted.trace("decoder.layers.0.growing", "decoder.layers.0.twice", unknown="allow") as t:
            options = adapted.options(max_new_tokens=3, min_new_tokens=3, num_beams=1, confidence=False)
            adapted.run("<OD>", images[0], options=options)
    finally:
        del layer.add_mlp
    with pytest.raises(OptionError, match="changes from step to step; read run.batched"):
        t["decoder.layers.0.growing"]
    assert [len(value[0]) for value in t.run.batched("decoder.layers.0.growing")] == [1, 2, 3]
    with pytest.raises(OptionError, match="was recorded 6 times in a run of 3 steps"):
        t["decoder.layers.0.twice"]
