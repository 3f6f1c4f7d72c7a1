"""The packed step against the model's own, and when it may stand for it."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from florence2.fast import packed
from florence2.fast.packed import packed_decoder
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model


@pytest.fixture
def model() -> Florence2Model:
    shape = shapes()[1]
    return make_model(shape.config, shape.seed, shape.end_bonus)


@pytest.fixture
def memory(model: Florence2Model) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 7, model.config.text.d_model)


@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_same_logits(model: Florence2Model, memory: Tensor, beams: int) -> None:
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    fast = packed_decoder(model)
    assert fast is not None
    caches = [model.start_cache(memory, beams, 20, mask) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        ids = torch.randint(0, 51289, (2 * beams,), generator=generator)
        assert torch.allclose(fast.step(ids, caches[0]), model.step(ids, caches[1]), atol=5e-5)
        parents = torch.randint(0, beams, (2, beams), generator=generator)
        for cache in caches:
            cache.reorder(parents)


@torch.inference_mode()
def test_made_once_and_again_when_a_weight_changes(model: Florence2Model) -> None:
    first = packed_decoder(model)
    assert packed_decoder(model) is first
    model.language_model.decoder.layers[0].fc1.weight.mul_(2.0)
    second = packed_decoder(model)
    assert second is not first and packed_decoder(model) is second
    model.language_model.decoder.layers[0].fc2.weight.data = torch.zeros_like(
        model.language_model.decoder.layers[0].fc2.weight
    )
    assert packed_decoder(model) is not second


def test_a_trained_step_is_seen(model: Florence2Model, memory: Tensor) -> None:
    options = GenerationOptions(max_new_tokens=6, min_new_tokens=6, num_beams=1)
    before = generate(model, memory, options).token_logprobs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.decode(torch.tensor([[2, 0]] * 2), memory).logsumexp(-1).sum().backward()
    optimizer.step()
    assert not torch.allclose(before, generate(model, memory, options).token_logprobs, atol=1e-4)


@torch.no_grad()
def test_hooks_and_eager_attention_get_the_plain_step(model: Florence2Model, memory: Tensor) -> None:
    assert packed_decoder(Florence2Model(model.config, attention="eager").eval()) is None
    assert packed_decoder(model.double()) is None
    assert packed_decoder(model.float()) is not None
    seen = []
    handle = model.language_model.decoder.layers[0].fc1.register_forward_hook(lambda *_: seen.append(1))
    generate(model, memory, GenerationOptions(max_new_tokens=4, min_new_tokens=4))
    assert len(seen) == 4
    handle.remove()
    assert packed_decoder(model) is not None


def test_changes_that_nothing_counts_are_seen(model: Florence2Model) -> None:
    """`weight.data +=` is how adapters are merged; weights made under inference_mode have no version at all."""
    with torch.inference_mode():
        for one in (model, Florence2Model(model.config).eval()):
            first = packed_decoder(one)
            one.language_model.decoder.layers[1].fc2.weight.data[3, 5] += 1e-3
            assert first is not None and packed_decoder(one) is not first
            one.final_logits_bias.data[0, 7] += 1.0
            assert packed_decoder(one) is not None


@torch.no_grad()
def test_a_changed_embedding_or_model_gets_the_plain_step(model: Florence2Model) -> None:
    class Soft(torch.nn.Embedding):
        pass

    class Other(Florence2Model):
        pass

    assert packed_decoder(Other(model.config).eval()) is None
    handle = model.language_model.shared.register_forward_hook(lambda *_: None)
    assert packed_decoder(model) is None
    handle.remove()
    assert packed_decoder(model) is not None
    model.language_model.shared = Soft(51289, model.config.text.d_model)
    assert packed_decoder(model.eval()) is None and model not in packed._made


def test_fewer_threads_than_promised_get_the_plain_step() -> None:
    """OpenMP is told its limit before the process starts; oneDNN then leaves a part of a packed product undone."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from florence2.fast.packed import PackedLinear, _is_available\n"
        "x, weight = torch.ones(8, 512), torch.eye(512)\n"
        "print(_is_available(), torch.equal(PackedLinear(weight, None)(x), x))"
    )
    for limit, expected in (("1", "False False"), ("8", "True True")):
        environment = {**os.environ, "OMP_THREAD_LIMIT": limit}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.split() == expected.split()


@torch.no_grad()
def test_gone_with_its_model(model: Florence2Model) -> None:
    gc.collect()
    packed_decoder(model)
    count = len(packed._made)
    other = Florence2Model(model.config).eval()
    packed_decoder(other)
    assert len(packed._made) == count + 1
    del other
    gc.collect()
    assert len(packed._made) == count


def test_threads_share_one(model: Florence2Model, memory: Tensor) -> None:
    options = GenerationOptions(max_new_tokens=10)
    alone = [generate(model, memory * scale, options).sequences.tolist() for scale in (1.0, 2.0, 3.0)]
    packed._made.pop(model)
    found: dict[int, object] = {}

    def work(i: int) -> None:
        found[i] = generate(model, memory * (i + 1.0), options).sequences.tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == alone


class Shown:
    """Keeps a copy of everything, and puts twice the value in place of one name."""

    def __init__(self, doubled: str = ""):
        self.doubled = doubled
        self.values: dict[str, list[Tensor]] = {}

    def wants(self, name: str) -> bool:
        return True

    def enters(self, prefix: str) -> bool:
        return True

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self.values.setdefault(name, []).append(value.clone())
        return value * 2 if name == self.doubled else value

    def note(self, event: str, **facts: object) -> None: ...


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_shows_and_goes_on_with_what_the_plain_step_does(model: Florence2Model, memory: Tensor, beams: int) -> None:
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    fast = packed_decoder(model)
    assert fast is not None
    for doubled in ("", *(f"decoder.layers.1.{name}" for name in ("self_attention.heads", "cross_attention", "mlp"))):
        traces = [Shown(doubled), Shown(doubled)]
        caches = [model.start_cache(memory, beams, 20, mask) for _ in range(2)]
        for n in range(3):
            ids = torch.arange(2 * beams) + 100 * n
            fast.step(ids, caches[0], traces[0])
            model.step(ids, caches[1], traces[1])
        assert set(traces[0].values) == set(traces[1].values)
        assert len(traces[0].values) == 2 + 15 * model.config.text.decoder_layers
        for name, values in traces[0].values.items():
            for found, expected in zip(values, traces[1].values[name], strict=True):
                assert found.shape == expected.shape, name
                assert torch.allclose(found, expected, rtol=1e-4, atol=2e-4), name
