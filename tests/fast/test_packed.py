"""Packed weights: the same products, and never those of a weight that has changed."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from florence2.fast import packed
from florence2.fast.install import install, uninstall
from florence2.fast.packed import Fingerprint, Packed, PackedWeights, in_force, pack, packed_product
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model
from tests.conftest import few_words
from tests.release import keep

SHAPE = few_words(shapes()[1])


@pytest.fixture(autouse=True)
def _everything_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack every weight, whatever this machine's clock says."""
    monkeypatch.setattr(packed, "_measure_gain", lambda weights, rows: 2.0)
    monkeypatch.setattr(packed, "_gains", {})


@pytest.fixture(scope="module")
def original() -> Florence2Model:
    """Without packed weights. Copy it before you change it."""
    return make_model(SHAPE.config, SHAPE.seed, SHAPE.end_bonus)


@pytest.fixture
def model(original: Florence2Model) -> Florence2Model:
    return install(copy.deepcopy(original))


@pytest.fixture
def memory(model: Florence2Model) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 7, model.config.text.d_model)


OPTIONS = GenerationOptions(max_new_tokens=6, min_new_tokens=6, num_beams=2)


@torch.no_grad()
def test_a_packed_product_is_the_plain_one() -> None:
    weight, bias, x = torch.randn(80, 48), torch.randn(80), torch.randn(6, 1, 48)
    torch.testing.assert_close(PackedWeights([weight])(x, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_same_logits(model: Florence2Model, original: Florence2Model, memory: Tensor, beams: int) -> None:
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    caches = [one.start_cache(memory, beams, 20, mask) for one in (model, original)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        ids = torch.randint(0, 999, (2 * beams,), generator=generator)
        assert torch.allclose(model.step(ids, caches[0]), original.step(ids, caches[1]), atol=5e-5)
        parents = torch.randint(0, beams, (2, beams), generator=generator)
        for cache in caches:
            cache.reorder(parents)


@torch.inference_mode()
def test_packed_weights_are_what_runs(model: Florence2Model, memory: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    product = PackedWeights.__call__

    def count(self: PackedWeights, x: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(1)
        return product(self, x, bias)

    monkeypatch.setattr(PackedWeights, "__call__", count)
    cache = model.start_cache(memory, 2, 4)
    model.step(torch.tensor([2] * 4), cache)
    text = model.config.text
    assert len(calls) == 6 * text.decoder_layers + 1  # q, k and v together, three projections, the MLP; the output
    uninstall(model).step(torch.tensor([2] * 4), model.start_cache(memory, 2, 4))
    assert len(calls) == 6 * text.decoder_layers + 1


def _swap_rows(weight: Tensor) -> None:
    weight[[0, 1]] = weight[[1, 0]]


def _swap_two(weight: Tensor) -> None:
    weight[3, 4], weight[3, 5] = weight[3, 5].clone(), weight[3, 4].clone()


VALUES: dict[str, Callable[[Tensor], object]] = {
    "scaled": lambda weight: weight.mul_(2.0),
    "one value": lambda weight: weight[3, 5].add_(1e-3),
    "one bit": lambda weight: weight.view(torch.int32)[3, 5].bitwise_xor_(1),
    "by .data": lambda weight: weight.data.add_(1e-3),
    "one value by .data": lambda weight: weight.data[3, 5].add_(1e-3),
    "rows reversed": lambda weight: weight.copy_(weight.flip(0)),
    "rows reversed by .data": lambda weight: weight.data.copy_(weight.flip(0)),
    "columns reversed": lambda weight: weight.copy_(weight.flip(1)),
    "rows rolled": lambda weight: weight.copy_(weight.roll(8, 0)),
    "columns rolled": lambda weight: weight.copy_(weight.roll(16, 1)),
    "both reversed": lambda weight: weight.copy_(weight.flip(0, 1)),
    "two rows exchanged": _swap_rows,
    "two rows exchanged by .data": lambda weight: _swap_rows(weight.data),
    "two values exchanged": _swap_two,
    "two values exchanged by .data": lambda weight: _swap_two(weight.data),
    "a sign in two places": lambda weight: weight.data[2:4, 6].neg_(),
    "NaN": lambda weight: weight.data[0, 0].fill_(float("nan")),
    "columns of two halves exchanged": lambda weight: weight.data.copy_(weight.roll(weight.shape[1] // 2, 1)),
}


@pytest.mark.parametrize("shape", [(48, 48), (160, 96), (300, 7), (51, 33)])
@pytest.mark.parametrize("change", VALUES)
@torch.no_grad()
def test_every_change_of_values_changes_the_fingerprint(shape: tuple[int, int], change: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    before = Fingerprint.of(weight)
    assert before == Fingerprint.of(weight)
    VALUES[change](weight)
    assert before != Fingerprint.of(weight)
    assert before != Fingerprint.of(torch.randn(shape))


PARTS = ["decoder.layers.0.self_attn.q_proj", "decoder.layers.1.fc2", "shared"]
FELT = [name for name in VALUES if name not in ("NaN", "one bit")]
PAIRS = [(change, part) for change in FELT for part in PARTS]
TURNS = [3 * place + place % 3 for place in range(len(FELT))]
"""Every change once, with the parts in turn."""


@pytest.mark.parametrize(("change", "part"), keep(TURNS, PAIRS))
@torch.no_grad()
def test_a_changed_weight_never_gives_the_old_answer(
    model: Florence2Model, memory: Tensor, change: str, part: str
) -> None:
    before = generate(model, memory, OPTIONS)
    VALUES[change](model.language_model.get_submodule(part).weight)  # type: ignore[arg-type]
    fast, plain = generate(model, memory, OPTIONS), generate(uninstall(model), memory, OPTIONS)
    torch.testing.assert_close(fast.sequences, plain.sequences)
    torch.testing.assert_close(fast.token_logprobs, plain.token_logprobs, atol=2e-4, rtol=1e-3)
    assert before.token_logprobs.shape != plain.token_logprobs.shape or not torch.equal(
        before.token_logprobs, plain.token_logprobs
    )


@pytest.mark.parametrize("way", ["in place", "by .data", "replaced"])
@torch.no_grad()
def test_a_changed_bias_of_the_output_never_gives_the_old_answer(
    model: Florence2Model, memory: Tensor, way: str
) -> None:
    before = generate(model, memory, OPTIONS)
    bias = torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(0)) * 5
    if way == "replaced":
        model.final_logits_bias = bias
    else:
        (model.final_logits_bias if way == "in place" else model.final_logits_bias.data).copy_(bias)
    fast, plain = generate(model, memory, OPTIONS), generate(uninstall(model), memory, OPTIONS)
    assert fast.sequences.tolist() == plain.sequences.tolist() != before.sequences.tolist()
    torch.testing.assert_close(fast.token_logprobs, plain.token_logprobs, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_change_between_two_steps_is_seen(model: Florence2Model, memory: Tensor) -> None:
    """By the count that torch keeps; what leaves no count is seen by the next generation."""
    cache = model.start_cache(memory, 2, 4)
    weight = model.language_model.decoder.layers[0].fc1.weight
    assert isinstance(weight, Tensor)
    x = torch.randn(4, 1, weight.shape[1])
    with in_force(cache.packed):  # type: ignore[attr-defined]
        assert packed_product(x, weight, None) is not None
        weight.mul_(2.0)
        assert packed_product(x, weight, None) is None
    assert packed_product(x, weight, None) is None


@torch.no_grad()
def test_weights_of_one_input_are_multiplied_together() -> None:
    """The first computes the product of all; another input, or another order, gets products of its own."""
    weights, biases = [torch.randn(48, 32) for _ in range(3)], [torch.randn(48), None, torch.randn(48)]
    both, x, y = Packed([PackedWeights(weights)]), torch.randn(4, 1, 32), torch.randn(4, 1, 32)
    for weight, bias in zip(weights, biases, strict=True):
        found = both.product(x, weight, bias)
        assert found is not None
        torch.testing.assert_close(found, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    assert both.product(y, weights[1], None) is None and both.product(x.clone(), weights[2], None) is None
    weights[1].mul_(2.0)
    assert both.product(x, weights[0], None) is not None and both.product(x, weights[1], None) is None


@torch.no_grad()
def test_copies_are_kept_until_their_weight_changes() -> None:
    owner, groups = nn.Linear(1, 1), [[torch.randn(80, 48)], [torch.randn(48, 48), torch.randn(48, 48)]]
    first = pack(owner, groups, 4)
    assert first is not None
    second = pack(owner, groups, 4)
    assert second is not None and second.copies == first.copies and len(first.copies) == 2
    groups[1][1].mul_(2.0)
    third = pack(owner, groups, 4)
    assert third is not None and third.copies[0] is first.copies[0] and third.copies[1] is not first.copies[1]


@pytest.mark.parametrize("gain", [2.0, 1.0])
@pytest.mark.parametrize("rows", [1, 4, 100])
@torch.no_grad()
def test_weights_are_packed_where_it_gains(rows: int, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once for each number of rows, up to powers of two, and set of shapes."""
    measured = []

    def measure(groups: list[list[Tensor]], rows: int) -> float:
        measured.append((rows, len(groups)))
        return gain

    monkeypatch.setattr(packed, "_measure_gain", measure)
    owner, groups = nn.Linear(1, 1), [[torch.randn(80, 48)], [torch.randn(48, 80)], [torch.randn(80, 48)]]
    for _ in range(2):
        found = pack(owner, groups, rows)
        if rows > 64 or gain == 1.0:
            assert found is None
        else:
            assert found is not None and [[copy.weights[0]()] for copy in found.copies] == groups
    assert measured == ([(rows, 3)] if rows <= 64 else [])
    pack(owner, groups[1:], rows)
    assert measured == ([(rows, 3), (rows, 2)] if rows <= 64 else [])
    for similar in (5, 6, 8, 9):  # one measurement serves 5 to 8 rows
        pack(owner, groups, similar)
    assert [rows for rows, _ in measured[-2:]] == [5, 9]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    assert pack(nn.Linear(1, 1), [[torch.randn(80, 48).to(dtype)]], 4) is None


def test_the_clock_is_read_on_real_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with torch.no_grad():
        assert (
            0.01 < packed._measure_gain([[torch.randn(80, 48)], [torch.randn(48, 80)], [torch.randn(80, 48)]], 4) < 100
        )


@pytest.mark.release
@pytest.mark.parametrize("limit", ["1", "8"])
def test_fewer_threads_than_promised_get_the_plain_step(limit: str) -> None:
    """OpenMP's limit holds from the start of the process; some versions of oneDNN then leave a part undone.

    Packed weights are used exactly where their products are right, whatever this version does.
    """
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from florence2.fast.packed import PackedWeights, is_available\n"
        "x, weight = torch.ones(8, 512), torch.eye(512)\n"
        "print(is_available(), torch.equal(PackedWeights([weight])(x, None), x))"
    )
    environment = {**os.environ, "OMP_THREAD_LIMIT": limit}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    used, right = done.stdout.split()
    assert used == right and (limit == "1" or used == "True")


def test_nothing_is_packed_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed.is_available()
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_has_mkldnn", False)
        assert not packed.is_available()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not packed.is_available()


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN's, whose last thread was missing: the second half of the columns is not written."""

    def half(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        out = F.linear(x, plain)
        out[:, out.shape[1] // 2 :] = 0.0
        return out

    plain = torch.linspace(-1, 1, 512 * 256).view(512, 256)
    packed._is_right.cache_clear()
    assert packed.is_available()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", half)
    packed._is_right.cache_clear()
    try:
        assert not packed.is_available()
        assert pack(nn.Linear(1, 1), [[torch.randn(80, 48)]], 4) is None
    finally:
        packed._is_right.cache_clear()


@torch.no_grad()
def test_gone_with_its_model(model: Florence2Model, memory: Tensor) -> None:
    gc.collect()
    generate(model, memory, OPTIONS)
    count = len(packed._kept)
    other = install(Florence2Model(model.config)).eval()
    generate(other, memory, OPTIONS)
    assert len(packed._kept) == count + 1
    del other
    gc.collect()
    assert len(packed._kept) == count


def test_threads_share_one(model: Florence2Model, memory: Tensor) -> None:
    options = GenerationOptions(max_new_tokens=10)
    alone = [generate(model, memory * scale, options).sequences.tolist() for scale in (1.0, 2.0, 3.0)]
    packed._kept.pop(model)
    found: dict[int, object] = {}

    def work(i: int) -> None:
        found[i] = generate(model, memory * (i + 1.0), options).sequences.tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == alone


@pytest.mark.parametrize(
    "change",
    [
        lambda w: setattr(w, "data", w.data * 1.5),
        lambda w: setattr(w, "data", w.data.t().contiguous().t()),
        lambda w: w.mul_(1.5),
    ],
)
@torch.no_grad()
def test_other_values_between_two_steps_are_seen(
    model: Florence2Model, original: Florence2Model, memory: Tensor, change: Callable[[Tensor], object]
) -> None:
    plain = copy.deepcopy(original)
    ids, logits = torch.tensor([5, 6]), []
    for one in (model, plain):
        cache = one.start_cache(memory, 1, 4)
        one.step(ids, cache)
        change(one.language_model.decoder.layers[0].fc1.weight)  # type: ignore[arg-type]
        logits.append(one.step(ids, cache))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


class Loud(Tensor):
    """A weight with products of its own, as quantisation libraries have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(Tensor) if isinstance(a, Loud) else a for a in args]
        return F.linear(plain[0], plain[1] * 1.5, *plain[2:]) if func is F.linear else func(*plain, **(kwargs or {}))


def _odd(part: nn.Linear, name: str) -> None:
    out = part.out_features
    if name == "expanded bias":
        part.bias = nn.Parameter(torch.ones(1).expand(out))
    elif name == "strided bias":
        part.bias = nn.Parameter(torch.linspace(-1, 1, 2 * out)[::2])
    elif name == "bias of one":
        part.bias = nn.Parameter(torch.ones(1))
    elif name == "subclass":
        weight = part.weight.detach().as_subclass(Loud)
        del part.weight
        part.weight = weight
    elif name == "view of another":
        part.weight = nn.Parameter(part.weight.detach().clone().t().contiguous().t())


@pytest.mark.parametrize("name", ["expanded bias", "strided bias", "bias of one", "subclass", "view of another"])
@torch.no_grad()
def test_tensors_that_onednn_would_read_otherwise(model: Florence2Model, memory: Tensor, name: str) -> None:
    _odd(model.language_model.decoder.layers[0].fc1, name)  # type: ignore[arg-type]
    fast = generate(model, memory, OPTIONS)
    plain = generate(uninstall(model), memory, OPTIONS)
    torch.testing.assert_close(fast.token_logprobs, plain.token_logprobs, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_layer_without_neurons(model: Florence2Model, memory: Tensor) -> None:
    layer = model.language_model.decoder.layers[0]
    layer.fc1.weight = nn.Parameter(layer.fc1.weight[:0])  # type: ignore[union-attr, index]
    layer.fc1.bias = nn.Parameter(layer.fc1.bias[:0])  # type: ignore[union-attr, index]
    layer.fc2.weight = nn.Parameter(layer.fc2.weight[:, :0])  # type: ignore[union-attr, index]
    fast = generate(model, memory, OPTIONS)
    plain = generate(uninstall(model), memory, OPTIONS)
    torch.testing.assert_close(fast.token_logprobs, plain.token_logprobs, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_an_input_that_is_changed_between_two_projections(model: Florence2Model, memory: Tensor) -> None:
    attention = model.language_model.decoder.layers[0].self_attn
    keys_values = attention.keys_values  # type: ignore[union-attr]

    def louder(x: Tensor, *rest: object) -> object:
        return keys_values(x.mul_(1.5), *rest)  # type: ignore[operator]

    attention.keys_values = louder  # type: ignore[union-attr, assignment]
    fast = generate(model, memory, OPTIONS)
    plain = generate(uninstall(model), memory, OPTIONS)
    torch.testing.assert_close(fast.token_logprobs, plain.token_logprobs, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_cache_can_be_copied(model: Florence2Model, memory: Tensor) -> None:
    cache = model.start_cache(memory, 1, 4)
    model.step(torch.tensor([5, 6]), cache)
    other = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    expected = model.step(torch.tensor([7, 8]), cache)
    torch.testing.assert_close(model.step(torch.tensor([7, 8]), other), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_torchs_modes_get_the_plain_products(model: Florence2Model, memory: Tensor) -> None:
    class Louder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out * 1.2 if func is F.linear else out

    with Louder():
        fast = generate(model, memory, OPTIONS)
        plain = generate(uninstall(model), memory, OPTIONS)
    torch.testing.assert_close(fast.token_logprobs, plain.token_logprobs, atol=2e-4, rtol=1e-3)
