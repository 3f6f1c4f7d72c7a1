"""The joined model: its contracts, its loss, its independence of threads."""

import threading
from dataclasses import replace

import pytest
import torch

from florence2.checkpoints.presets import preset
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model
from tests import plain


@pytest.fixture(scope="module")
def model() -> Florence2Model:
    shape = shapes()[3]
    return make_model(shape.config, shape.seed, shape.end_bonus).double()


def test_shapes_of_the_contract(model: Florence2Model) -> None:
    features = model.encode_image(torch.randn(2, 3, 160, 224))
    assert features.shape == (2, 1 + 20 * 28, 64)
    memory = model.encode(
        features, torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    )
    assert memory.shape == (2, 561 + 4, 64)
    assert model.decode(torch.tensor([[2, 0, 9]] * 2), memory).shape == (2, 3, 51289)


@pytest.mark.parametrize("size", [(160, 224), (64, 64), (96, 40), (33, 70)])
def test_any_size_that_the_table_covers(model: Florence2Model, size: tuple[int, int]) -> None:
    grid = [-(-side // 8) for side in size]
    assert model.encode_image(torch.randn(1, 3, *size)).shape[1] == 1 + grid[0] * grid[1]


def test_a_padded_row_equals_its_single(model: Florence2Model) -> None:
    features = model.encode_image(torch.randn(2, 3, 64, 64))
    ids, mask = torch.tensor([[0, 5, 6, 7, 8, 2], [0, 9, 2, 1, 1, 1]]), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    memory = model.encode(features, ids, mask)
    single = model.encode(features[1:], ids[1:, :3])
    real = single.shape[1]
    assert torch.allclose(memory[1:, :real], single, atol=1e-10)
    memory_mask = model.memory_mask(features, mask)
    decoder_ids = torch.tensor([[2, 0, 11, 12]])
    batch = model.decode(decoder_ids.expand(2, -1), memory, memory_mask)
    assert torch.allclose(batch[1:], model.decode(decoder_ids, single), atol=1e-5)


@torch.no_grad()
def test_every_tensor_is_made_on_the_models_own_device(model: Florence2Model) -> None:
    """Whatever torch's own default is: tensors of this one, "meta", have no values."""
    pixels = torch.randn(2, 3, 64, 64)
    ids, mask, labels = (
        torch.tensor([[0, 5, 2], [0, 9, 2]]),
        torch.tensor([[1, 1, 1], [1, 1, 0]]),
        torch.ones(2, 2).long(),
    )
    parents = torch.tensor([[1, 1], [0, 1]])
    with torch.device("meta"):
        features = model.encode_image(pixels)
        memory = model.encode(features, ids, mask)
        cache = model.start_cache(memory, 2, 4)
        for _ in range(2):
            logits = model.step(labels.flatten(), cache)
            cache.reorder(parents)
        values = [model.loss(pixels, ids, labels, mask), model.decode(labels, memory), logits]
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in values)


def test_without_layers_the_model_is_its_embeddings_and_its_output() -> None:
    """scale_embedding means the answer's ids, not the prompt's; logits are hidden · embeddingᵀ + final_logits_bias."""
    tiny = preset("tiny")
    text = replace(tiny.text, vocab_size=30, encoder_layers=0, decoder_layers=0, scale_embedding=True)
    torch.manual_seed(0)
    model = plain.randomised(Florence2Model(replace(tiny, text=text)))
    model.final_logits_bias.normal_()
    encoder, decoder, table = model.language_model.encoder, model.language_model.decoder, model.language_model.shared
    features = torch.randn(1, 4, 64, dtype=torch.float64)
    prompt, answer = torch.tensor([[0, 9, 2]]), torch.tensor([[2, 0, 7, 8]])
    embeddings = torch.cat([features, table.weight[prompt]], dim=1)
    memory = model.encode(features, prompt)
    assert plain.equal(
        memory, plain.norm(embeddings + encoder.embed_positions.weight[2:9], encoder.layernorm_embedding)
    )
    embeddings = 8.0 * table.weight[answer]  # the root of 64
    hidden = plain.norm(embeddings + decoder.embed_positions.weight[2:6], decoder.layernorm_embedding)
    assert plain.equal(model.decode(answer, memory), hidden @ table.weight.T + model.final_logits_bias)


def test_loss_is_the_cross_entropy_of_shifted_labels(model: Florence2Model) -> None:
    pixels, ids = torch.randn(1, 3, 64, 64), torch.tensor([[0, 5, 2]])
    labels = torch.tensor([[0, 713, 16, 2, -100, -100]])
    memory = model.encode(model.encode_image(pixels), ids)
    logprobs = model.decode(torch.tensor([[2, 0, 713, 16, 2, 1]]), memory)[0, :4].log_softmax(-1)
    expected = -logprobs[range(4), labels[0, :4]].mean()
    assert model.loss(pixels, ids, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
def test_the_decoder_reads_padding_where_a_label_is_ignored(model: Florence2Model) -> None:
    """A hole in the middle of a row: its own label counts for nothing, and the next id follows padding."""
    pixels, ids = torch.randn(1, 3, 64, 64), torch.tensor([[0, 5, 2]])
    labels = torch.tensor([[0, 9, -100, 7, 2]])
    memory = model.encode(model.encode_image(pixels), ids)
    logprobs = model.decode(torch.tensor([[2, 0, 9, 1, 7]]), memory)[0].log_softmax(-1)
    expected = -sum(float(logprobs[place, labels[0, place]]) for place in (0, 1, 3, 4)) / 4
    assert model.loss(pixels, ids, labels).item() == pytest.approx(expected, rel=1e-6)
    read_as_end = model.decode(torch.tensor([[2, 0, 9, 2, 7]]), memory)[0].log_softmax(-1)
    assert abs(float(read_as_end[3, 7] - logprobs[3, 7])) > 1e-3


def test_padding_as_an_input_is_a_constant(model: Florence2Model) -> None:
    """Its row learns as an output alone: no other way of the ids into the model gives it a gradient."""
    copy = Florence2Model(model.config)
    copy.load_state_dict(model.state_dict())
    table = copy.language_model.shared
    memory = copy.encode(copy.encode_image(torch.randn(1, 3, 64, 64)), torch.tensor([[0, 5, 1, 2]]))
    hidden = copy.language_model.decoder(table(torch.tensor([[2, 0, 1, 9]])), memory)
    hidden.sum().backward()
    assert table.weight.grad is not None and (table.weight.grad[1] == 0).all()
    assert all((table.weight.grad[id] != 0).any() for id in (0, 2, 5, 9))


def test_loss_does_not_see_padding(model: Florence2Model) -> None:
    pixels, labels = torch.randn(1, 3, 64, 64), torch.tensor([[0, 713, 2]])
    short = model.loss(pixels, torch.tensor([[0, 5, 2]]), labels)
    padded = model.loss(pixels, torch.tensor([[0, 5, 2, 1, 1]]), labels, torch.tensor([[1, 1, 1, 0, 0]]))
    assert padded.item() == pytest.approx(short.item(), rel=1e-6)


def test_every_parameter_gets_a_gradient(model: Florence2Model) -> None:
    copy = Florence2Model(model.config)
    copy.load_state_dict(model.state_dict())
    copy.loss(torch.randn(1, 3, 64, 64), torch.tensor([[0, 5, 2]]), torch.tensor([[0, 713, 2]])).backward()
    assert [name for name, p in copy.named_parameters() if p.grad is None] == []


def test_the_embedding_is_one_tensor(model: Florence2Model) -> None:
    big = [name for name, p in model.named_parameters() if p.shape[0] == 51289]
    assert big == ["language_model.shared.weight"]


def test_half_precision_gives_float32_logits(model: Florence2Model) -> None:
    half = Florence2Model(model.config).to(torch.bfloat16).eval()
    memory = half.encode(half.encode_image(torch.randn(1, 3, 64, 64)), torch.tensor([[0, 5, 2]]))
    assert memory.dtype == torch.bfloat16 and half.decode(torch.tensor([[2]]), memory).dtype == torch.float32


def test_module_paths_are_the_documented_ones(model: Florence2Model) -> None:
    names = dict(model.named_modules())
    for path in (
        "vision_tower.blocks.1.0.spatial_block.window_attn.qkv",
        "vision_tower.convs.0.conv",
        "multi_modal_projector.image_projection",
        "language_model.decoder.layers.0.encoder_attn.q_proj",
    ):
        assert path in names


def test_one_model_serves_many_threads(model: Florence2Model) -> None:
    pixels = [torch.randn(1, 3, 64, 64, dtype=torch.float64) for _ in range(4)]
    ids, start = torch.tensor([[0, 5, 2]]), torch.tensor([[2, 0, 9, 10]])
    with torch.no_grad():
        alone = [model.decode(start, model.encode(model.encode_image(p), ids)) for p in pixels]
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            memory = model.encode(model.encode_image(pixels[i]), ids)
            cache = model.start_cache(memory, 1, 4)
            results[i] = torch.stack([model.step(start[:, t], cache) for t in range(4)], dim=1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert torch.allclose(results[i], alone[i], atol=1e-5)


def test_forward_keeps_nothing_on_the_modules(model: Florence2Model) -> None:
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    memory = model.encode(model.encode_image(torch.randn(1, 3, 64, 64)), torch.tensor([[0, 5, 2]]))
    model.step(torch.tensor([2, 2]), model.start_cache(memory, 2, 4))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_dimensions_come_from_the_configuration() -> None:
    config = shapes()[2].config
    longer = Florence2Model(replace(config, text=replace(config.text, vocab_size=777)))
    assert longer.final_logits_bias.shape == (1, 777) and longer.language_model.shared.weight.shape == (777, 48)
