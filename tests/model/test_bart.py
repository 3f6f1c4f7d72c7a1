"""Encoder and decoder; cached against uncached, beam by beam."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from florence2.checkpoints.presets import preset
from florence2.errors import PromptError
from florence2.model.bart import EncoderLayer, LanguageModel
from florence2.model.cache import DecoderCache, Itself
from florence2.model.config import TextConfig
from parity.cases import shapes
from tests import plain


@pytest.fixture
def config() -> TextConfig:
    return replace(shapes()[2].config.text, vocab_size=200, max_position_embeddings=40)


@pytest.fixture
def language(config: TextConfig) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config).double().eval()


def decode_cached(language: LanguageModel, ids: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """One beam, token by token: hidden states (B, T, D)."""
    cache = DecoderCache(language.decoder, memory, 1, ids.shape[1], mask)
    steps = [language.decoder.step(language.shared(ids[:, t : t + 1]), cache) for t in range(ids.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("masked", [False, True])
def test_cached_equals_uncached(language: LanguageModel, masked: bool) -> None:
    ids, memory = torch.randint(0, 200, (3, 17)), torch.randn(3, 11, 48, dtype=torch.float64)
    mask = torch.arange(11) < torch.tensor([[11], [7], [3]]) if masked else None
    whole = language.decoder(language.shared(ids), memory, mask)
    assert torch.allclose(decode_cached(language, ids, memory, mask), whole, atol=1e-12)


def test_beams_that_cross_and_cross_again(language: LanguageModel) -> None:
    """At every step beams take over each other's past at random; each must equal its own history decoded afresh."""
    torch.manual_seed(1)
    B, K, T = 2, 4, 15
    memory = torch.randn(B, 9, 48, dtype=torch.float64)
    cache = DecoderCache(language.decoder, memory, K, T)
    history = torch.zeros(B, K, 0, dtype=torch.long)
    for _ in range(T):
        parents = torch.randint(0, K, (B, K))
        if history.shape[2]:
            history = history.gather(1, parents[:, :, None].expand_as(history))
            cache.reorder(parents)
        newest = torch.randint(0, 200, (B, K, 1))
        history = torch.cat([history, newest], dim=2)
        found = language.decoder.step(language.shared(newest.view(B * K, 1)), cache)
        afresh = language.decoder(language.shared(history.flatten(0, 1)), memory.repeat_interleave(K, 0))[:, -1:]
        assert torch.allclose(found, afresh, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_cache_keeps_some_inputs(language: LanguageModel, beams: int, masked: bool) -> None:
    """The inputs that are left, in another order, continue with their own keys, values, masks and beams."""
    torch.manual_seed(2)
    memory, ids = torch.randn(3, 7, 48, dtype=torch.float64), torch.randint(0, 200, (3, beams, 5))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]]) if masked else None
    cache, kept = DecoderCache(language.decoder, memory, beams, 5, mask), torch.tensor([2, 0])
    for t in range(3):
        language.decoder.step(language.shared(ids[:, :, t].reshape(-1, 1)), cache)
    assert cache.own[0] is not None
    before = [tensor[kept, :, : 3 * beams].clone() for tensor in cache.own[0]]
    cache.keep(kept)
    assert [torch.equal(now[:, :, : 3 * beams], old) for now, old in zip(cache.own[0], before, strict=True)] == [
        True
    ] * 2
    for t in (3, 4):
        found = language.decoder.step(language.shared(ids[kept][:, :, t].reshape(-1, 1)), cache)
        rows = ids[kept][:, :, : t + 1].flatten(0, 1)
        looks = None if mask is None else mask[kept].repeat_interleave(beams, 0)
        whole = language.decoder(language.shared(rows), memory[kept].repeat_interleave(beams, 0), looks)
        assert torch.allclose(found, whole[:, -1:], atol=1e-12)


@pytest.mark.parametrize("parents", [[0, 0], [1, 0], [1, 1], [0, 1]])
def test_two_beams_are_reordered(language: LanguageModel, parents: list[int]) -> None:
    memory, ids = torch.randn(1, 7, 48, dtype=torch.float64), torch.tensor([[3, 4, 5], [6, 7, 8]])
    cache = DecoderCache(language.decoder, memory, 2, 3)
    for t in range(2):
        language.decoder.step(language.shared(ids[:, t : t + 1]), cache)
    cache.reorder(torch.tensor([parents]))
    found = language.decoder.step(language.shared(ids[:, 2:]), cache)
    rows = torch.cat([ids[parents, :2], ids[:, 2:]], dim=1)
    assert torch.allclose(found, language.decoder(language.shared(rows), memory.expand(2, -1, -1))[:, -1:], atol=1e-12)


def test_memory_is_projected_once_per_picture_not_per_beam(language: LanguageModel) -> None:
    cache = DecoderCache(language.decoder, torch.randn(2, 9, 48, dtype=torch.float64), 5, 8)
    assert {tuple(t.shape) for projected in cache.projected for t in projected[:2]} == {(2, 3, 9, 16)}


def test_two_caches_of_one_model_do_not_meet(language: LanguageModel) -> None:
    ids, memory = torch.randint(0, 200, (1, 6)), torch.randn(2, 5, 48, dtype=torch.float64)
    first, second = (DecoderCache(language.decoder, memory[i : i + 1], 1, 6) for i in range(2))
    for t in range(6):  # in turns
        a = language.decoder.step(language.shared(ids[:, t : t + 1]), first)
        b = language.decoder.step(language.shared(ids[:, t : t + 1]), second)
    alone = decode_cached(language, ids, memory[1:], None)
    assert torch.allclose(b, alone[:, -1:], atol=1e-12) and not torch.allclose(a, b)


def test_encoder_padding_changes_nothing(language: LanguageModel) -> None:
    embeddings = torch.randn(1, 9, 48, dtype=torch.float64)
    padded = torch.cat([embeddings, torch.randn(1, 4, 48, dtype=torch.float64)], dim=1)
    mask = torch.arange(13)[None] < 9
    assert torch.allclose(language.encoder(padded, mask)[:, :9], language.encoder(embeddings), atol=1e-12)


def test_causality(language: LanguageModel) -> None:
    ids, memory = torch.randint(0, 200, (1, 10)), torch.randn(1, 5, 48, dtype=torch.float64)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 200
    a, b = (language.decoder(language.shared(x), memory) for x in (ids, changed))
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])


def test_positions_have_an_offset_of_two_and_an_end(language: LanguageModel) -> None:
    positions = language.decoder.embed_positions
    assert positions.weight.shape == (42, 48)
    assert torch.equal(positions(0, 3), positions.weight[2:5]) and torch.equal(positions(39, 1), positions.weight[41:])
    with pytest.raises(PromptError, match="41 positions .* are more than the 40 of this checkpoint"):
        positions(40, 1)


def test_scaled_embeddings_in_the_decoder_only(config: TextConfig, language: LanguageModel) -> None:
    scaled = LanguageModel(replace(config, scale_embedding=True)).double().eval()
    scaled.load_state_dict(language.state_dict())
    x, memory = torch.randn(1, 4, 48, dtype=torch.float64), torch.randn(1, 5, 48, dtype=torch.float64)
    assert torch.allclose(scaled.decoder(x, memory), language.decoder(x * 48**0.5, memory), atol=1e-12)
    assert torch.equal(scaled.encoder(x), language.encoder(x))


@pytest.fixture
def little() -> TextConfig:
    return replace(
        preset("tiny").text,
        vocab_size=20,
        d_model=12,
        encoder_layers=0,
        encoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_layers=0,
        decoder_attention_heads=3,
        decoder_ffn_dim=28,
        max_position_embeddings=10,
    )


def embedded(x: Tensor, stack: Any, scale: float = 1.0, start: int = 0) -> Tensor:
    return plain.norm(x * scale + stack.embed_positions.weight[2 + start :][: x.shape[1]], stack.layernorm_embedding)


def attended(x: Tensor, attn: Any, seen: Tensor, heads: int, looks: Tensor) -> Tensor:
    query, key, value = plain.linear(x, attn.q_proj), plain.linear(seen, attn.k_proj), plain.linear(seen, attn.v_proj)
    return plain.linear(plain.attention(query, key, value, heads, looks), attn.out_proj)


@pytest.mark.parametrize("scaled", [False, True])
def test_without_layers_a_stack_is_its_embedding(little: TextConfig, scaled: bool) -> None:
    """LN(scale · x + positions); the encoder never scales."""
    scale = 12**0.5 if scaled else 1.0
    torch.manual_seed(2)
    model = plain.randomised(LanguageModel(replace(little, scale_embedding=scaled)))
    x, memory = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    assert plain.equal(model.encoder(x), embedded(x, model.encoder))
    assert plain.equal(model.decoder(x, memory), embedded(x, model.decoder, scale))
    assert plain.equal(
        model.decoder.embed(x, model.decoder.embed_positions(3, x.shape[1])), embedded(x, model.decoder, scale, start=3)
    )


def test_encoder_layer_from_its_weights(little: TextConfig) -> None:
    torch.manual_seed(3)
    layer = plain.randomised(EncoderLayer(little, "sdpa"))
    x, real = torch.randn(2, 5, 12, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [2]])
    y = plain.norm(x + attended(x, layer.self_attn, x, 2, real[:, None]), layer.self_attn_layer_norm)
    found = layer(x, Itself(real[:, None, None]))
    assert plain.equal(found, plain.norm(y + plain.mlp(y, layer), layer.final_layer_norm))


def test_decoder_layer_from_its_weights(little: TextConfig) -> None:
    torch.manual_seed(4)
    decoder = plain.randomised(LanguageModel(replace(little, decoder_layers=1))).decoder
    x, memory = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    past, real = torch.ones(4, 4).tril().bool(), torch.arange(5) < torch.tensor([[5], [2]])
    layer: Any = decoder.layers[0]
    y = embedded(x, decoder)
    y = plain.norm(y + attended(y, layer.self_attn, y, 3, past), layer.self_attn_layer_norm)
    y = plain.norm(y + attended(y, layer.encoder_attn, memory, 3, real[:, None]), layer.encoder_attn_layer_norm)
    assert plain.equal(decoder(x, memory, real), plain.norm(y + plain.mlp(y, layer), layer.final_layer_norm))


def test_eager_is_the_same(config: TextConfig, language: LanguageModel) -> None:
    eager = LanguageModel(config, attention="eager").double().eval()
    eager.load_state_dict(language.state_dict())
    ids, memory = torch.randint(0, 200, (2, 6)), torch.randn(2, 5, 48, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for model in (language, eager):
        cache = DecoderCache(model.decoder, memory, 3, 4, mask)
        model.result = model.decoder.step(model.shared(ids.view(-1)[:6, None]), cache)  # type: ignore[assignment]
    assert torch.allclose(language.result, eager.result, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(
        language.decoder(language.shared(ids), memory, mask), eager.decoder(eager.shared(ids), memory, mask)
    )


def test_dropout_acts_in_training_alone(config: TextConfig) -> None:
    model = LanguageModel(replace(config, dropout=0.3, attention_dropout=0.2, activation_dropout=0.1))
    x = torch.randn(1, 4, 48)
    assert torch.equal(model.eval().encoder(x), model.encoder(x))
    torch.manual_seed(0)
    first = model.train().encoder(x)
    assert not torch.allclose(first, model.encoder(x))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("rates", "acts_on"),
    [({"activation_dropout": 1.0}, "mlp"), ({"attention_dropout": 1.0}, "attention"), ({"dropout": 1.0}, "output")],
    ids=lambda value: str(value),
)
def test_each_rate_of_dropout_acts_in_its_place(
    little: TextConfig, part: str, rates: dict[str, float], acts_on: str
) -> None:
    """At rate 1 its place is 0, so that only a bias is left of it; all else is as it is outside training."""
    torch.manual_seed(5)
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = replace(little, encoder_layers=1, decoder_layers=1, **{**off, **rates})
    model = plain.randomised(LanguageModel(config)).train()
    x, memory = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    stack: Any = getattr(model, part)
    layer: Any = stack.layers[0]
    found = model.encoder(x) if part == "encoder" else model.decoder(x, memory)
    past = None if part == "encoder" else torch.ones(4, 4).tril().bool()
    parts = [(layer.self_attn, layer.self_attn_layer_norm, None, past)]
    if part == "decoder":
        parts.append((layer.encoder_attn, layer.encoder_attn_layer_norm, memory, None))
    y = embedded(x, stack) * (acts_on != "output")
    for attn, norm, source, looks in parts:
        added = attended(y, attn, y if source is None else source, attn.heads, looks)
        added = attn.out_proj.bias.expand_as(y) if acts_on == "attention" else added
        y = plain.norm(y + added * (acts_on != "output"), norm)
    added = layer.fc2.bias.expand_as(y) if acts_on == "mlp" else plain.mlp(y, layer)
    assert plain.equal(found, plain.norm(y + added * (acts_on != "output"), layer.final_layer_norm))


def test_a_cache_raises_at_its_end(language: LanguageModel) -> None:
    cache = DecoderCache(language.decoder, torch.randn(1, 5, 48, dtype=torch.float64), 1, 2)
    for _ in range(2):
        language.decoder.step(language.shared(torch.tensor([[3]])), cache)
    with pytest.raises(PromptError, match="room for 2 positions"):
        language.decoder.step(language.shared(torch.tensor([[3]])), cache)


def test_heads_may_be_pruned(language: LanguageModel) -> None:
    """Attention of fewer heads, as wide as before: cached and uncached decoding still agree."""
    for layer in language.decoder.layers:
        for attn in (layer.self_attn, layer.encoder_attn):
            for name in ("q_proj", "k_proj", "v_proj"):
                part = getattr(attn, name)
                smaller = torch.nn.Linear(48, 32).double()
                smaller.weight.data, smaller.bias.data = part.weight.data[:32], part.bias.data[:32]
                setattr(attn, name, smaller)
            attn.out_proj.weight.data = attn.out_proj.weight.data[:, :32]
            attn.heads = 2
    ids, memory = torch.randint(0, 200, (2, 5)), torch.randn(2, 7, 48, dtype=torch.float64)
    whole = language.decoder(language.shared(ids), memory)
    assert torch.allclose(decode_cached(language, ids, memory, None), whole, atol=1e-12)


def test_hooks_of_attention_modules_fire(language: LanguageModel) -> None:
    seen = []
    handles = [
        part.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        for part in (language.decoder.layers[0].self_attn, language.decoder.layers[0].encoder_attn)
    ]
    ids, memory = torch.randint(0, 200, (2, 3)), torch.randn(2, 5, 48, dtype=torch.float64)
    decode_cached(language, ids, memory, None)
    language.decoder(language.shared(ids), memory)
    for handle in handles:
        handle.remove()
    assert seen == [(2, 1, 48)] * 6 + [(2, 3, 48)] * 2


def test_a_cache_goes_with_its_last_reference(language: LanguageModel) -> None:
    """Without waiting for the garbage collector: it holds as much as the weights of several layers."""
    cache = DecoderCache(language.decoder, torch.randn(1, 5, 48, dtype=torch.float64), 1, 2)
    language.decoder.step(language.shared(torch.tensor([[3]])), cache)
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()
