"""The loss in chunks: the plain loss and its gradients up to rounding, fewer bytes, and little padding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train import grouping
from florence2.train import label_loss as module
from florence2.train.data import Batch
from florence2.train.label_loss import answer_loss, label_loss
from tests.train.steps import backward, batch_of, close


@pytest.fixture(scope="module")
def batch(processor: Processor) -> Batch:
    return batch_of(processor)


@pytest.fixture
def exact(mini: Florence2Model) -> Florence2Model:
    """In float64, where only a wrong formula makes a difference."""
    model: Florence2Model = mini.double().eval()
    return model


def plain(model: Florence2Model, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss and gradients of the specification."""
    model.zero_grad()
    features = model.encode_image(batch.pixel_values)[batch.image_index]
    loss = model.answer_loss(features, batch.input_ids, batch.labels, batch.attention_mask, reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_rows(part: nn.Module) -> list[int]:
    """The number of rows of each call of `part`, from now on."""
    rows: list[int] = []
    part.register_forward_hook(lambda *given: rows.append(len(given[2])))
    return rows


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 24])
@pytest.mark.parametrize("padding", [0.0, 0.05, 1.0])
def test_loss_and_gradients_are_those_of_the_specification(
    exact: Florence2Model, batch: Batch, chunk: int, padding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of one label and more, with every length apart, with some together, and with all."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(grouping, "PADDING", padding)
    encoded, decoded = count_rows(exact.language_model.encoder), count_rows(exact.language_model.decoder)
    loss, gradients = backward(exact, batch)
    # prompts of 8, 12, 10, 15, 13 and 8 ids; no two rows are alike in both lengths
    assert sorted(encoded) == {0.0: [1, 1, 1, 1, 2], 0.05: [3, 3], 1.0: [6]}[padding]
    assert sorted(decoded) == {0.0: [1] * 6, 0.05: [1, 2, 3], 1.0: [6]}[padding]
    expected, same = plain(exact, batch)
    assert loss == pytest.approx(expected, rel=1e-12) and close(gradients, same)


def test_float32_differs_by_rounding_alone(mini: Florence2Model, batch: Batch) -> None:
    (loss, gradients), (expected, same) = backward(mini.eval(), batch), plain(mini, batch)
    assert loss == pytest.approx(expected, rel=1e-6) and close(gradients, same, within=1e-5)


def test_an_untied_head_and_own_answers_learn_too(exact: Florence2Model, batch: Batch) -> None:
    exact.untie_head()
    exact.untie_answers()
    loss, gradients = backward(exact, batch)
    expected, same = plain(exact, batch)
    assert loss == pytest.approx(expected, rel=1e-12) and close(gradients, same)
    assert gradients["lm_head.weight"].any() and gradients["language_model.decoder.embed_tokens.weight"].any()


def random_labels(count: int = 9, size: int = 40, width: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randn(*shape, generator=generator) for shape in ((count, width), (size, width), (size,))]
    hidden, weight, bias = draw[0].requires_grad_(), draw[1].requires_grad_(), draw[2]
    return hidden, weight, bias, torch.randint(0, size, (count,), generator=generator)


def test_what_is_frozen_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no product is computed for it."""
    hidden, weight, bias, labels = random_labels()
    monkeypatch.setattr(module, "_add_product", lambda *_: pytest.fail("a product for a frozen weight"))
    loss = label_loss(hidden, weight.detach(), bias, labels)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.any()
    with torch.no_grad():
        assert torch.equal(label_loss(hidden, weight, bias, labels), loss)


def test_gradients_scale_with_the_loss_and_cannot_be_taken_twice() -> None:
    hidden, weight, bias, labels = random_labels()
    once = torch.autograd.grad(label_loss(hidden, weight, bias, labels), (hidden, weight))
    loss = 3 * label_loss(hidden, weight, bias, labels)
    thrice = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.allclose(three, 3 * one) for three, one in zip(thrice, once, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (hidden, weight))


def test_autocast_rounds_as_the_specification_does() -> None:
    hidden, weight, bias, labels = random_labels(200, 3000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = label_loss(hidden, weight, bias, labels)
        logits = F.linear(hidden, weight, bias).float()
        expected = F.cross_entropy(logits, labels, reduction="sum")
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected))
    for one, other in zip(*pairs, strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9999


def test_logits_never_stand_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients of 4,000 labels over 1,000 ids would take 16 MB each; no product is larger than a chunk."""
    monkeypatch.setattr(module, "CHUNK", 50_000)
    sizes: list[int] = []
    product = F.linear

    def seen(*given: Tensor) -> Tensor:
        result = product(*given)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(F, "linear", seen)
    hidden, weight, bias, labels = random_labels(4000, 1000, 4)
    label_loss(hidden, weight, bias, labels).backward()
    assert len(sizes) == 80 and max(sizes) == 50_000


@pytest.mark.parametrize("change", ["subclass", "instance", "class"])
def test_a_model_that_was_changed_computes_its_own_loss(
    mini: Florence2Model, batch: Batch, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(self: Any, hidden: Tensor, *_: Any) -> Tensor:
        zeros: Tensor = 0 * hidden @ self.output_weight.T
        return zeros

    changed: Any = mini.eval()
    if change == "subclass":
        changed.__class__ = type("Changed", (Florence2Model,), {"logits": logits})
    elif change == "instance":
        changed.logits = logits.__get__(changed)
    else:
        monkeypatch.setattr(Florence2Model, "logits", logits)
    found, _ = backward(changed, batch)
    uniform = torch.tensor(float(changed.config.text.vocab_size)).log().item()
    assert found / batch.num_labels == pytest.approx(uniform, rel=1e-5)


def test_a_hook_inside_the_decoder_is_called(mini: Florence2Model, batch: Batch) -> None:
    before, _ = backward(mini.eval(), batch)
    handle = mini.language_model.decoder.layers[0].register_forward_hook(lambda *given: 2 * given[2])
    after, _ = backward(mini, batch)
    handle.remove()
    assert after != before and backward(mini, batch)[0] == before


def test_a_mask_without_padding_is_left_out(mini: Florence2Model, batch: Batch) -> None:
    """Torch has faster attention without one."""
    masks: list[object] = []
    mini.eval().language_model.encoder.register_forward_hook(lambda *given: masks.append(given[1][1]))
    features = mini.encode_image(batch.pixel_values[:2])
    for ends in ([1, 1], [1, 0], [0, 0]):
        mask = torch.tensor([[1, 1, end] for end in ends])
        answer_loss(mini, features, batch.input_ids[:2, :3], batch.labels[:2], mask)
    assert [getattr(mask, "shape", None) for mask in masks] == [None, (2, 68), None]


def test_labels_that_are_ignored_at_the_end_are_not_decoded(mini: Florence2Model, batch: Batch) -> None:
    widths: list[int] = []
    mini.eval().language_model.decoder.register_forward_hook(lambda *given: widths.append(given[2].shape[1]))
    wider = replace(batch, labels=F.pad(batch.labels, (0, 40), value=-100))
    loss, _ = backward(mini, wider)
    assert max(widths) == batch.labels.shape[1] and loss == pytest.approx(backward(mini, batch)[0], rel=1e-6)


def test_every_linear_map_is_still_called(mini: Florence2Model, batch: Batch) -> None:
    """LoRA replaces them."""
    called: set[nn.Module] = set()
    maps = [part for part in mini.modules() if isinstance(part, nn.Linear)]
    for part in maps:
        part.register_forward_hook(lambda own, *_: called.add(own))
    backward(mini, batch)
    assert called == set(maps)
