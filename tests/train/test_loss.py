"""The loss of a batch: padding, ignored labels, shared images, half precision. Dropout is off by default."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.data import Batch
from florence2.train.loss import LossModule
from florence2.train.samples import Sample
from tests.train.steps import SAMPLES, added, backward, batch_of, close


@pytest.fixture
def exact(mini: Florence2Model) -> Florence2Model:
    """In float64, where only a wrong formula makes a difference."""
    model: Florence2Model = mini.double().eval()
    return model


@pytest.fixture(scope="module")
def batch(processor: Processor) -> Batch:
    return batch_of(processor)


def test_a_batch_is_the_sum_of_its_singles(exact: Florence2Model, processor: Processor, batch: Batch) -> None:
    """Every label weighs the same, so means of singles count by their labels."""
    singles = [batch_of(processor, [Sample(s.image, (pair,))]) for s in SAMPLES for pair in s.pairs]
    assert len({single.num_labels for single in singles}) > 3 and batch.num_labels == sum(s.num_labels for s in singles)
    assert len({single.input_ids.shape[1] for single in singles}) > 3
    loss, gradients = backward(exact, batch)
    alone = [backward(exact, single) for single in singles]
    assert loss == pytest.approx(sum(one for one, _ in alone), rel=1e-12)
    assert close(gradients, added([one for _, one in alone]))
    assert len(gradients) == len(list(exact.parameters()))


def test_it_is_the_models_own_loss(exact: Florence2Model, batch: Batch) -> None:
    pixels = batch.pixel_values[batch.image_index]
    mean = exact.loss(pixels, batch.input_ids, batch.labels, batch.attention_mask)
    assert LossModule(exact)(batch).item() / batch.num_labels == pytest.approx(mean.item(), rel=1e-12)


def test_what_stands_in_the_padding_changes_nothing(exact: Florence2Model, batch: Batch) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, exact.config.text.vocab_size, batch.input_ids.shape, generator=generator)
    other = replace(batch, input_ids=torch.where(batch.attention_mask.bool(), batch.input_ids, noise))
    assert not torch.equal(other.input_ids, batch.input_ids)
    wider = Batch(
        batch.pixel_values,
        batch.image_index,
        F.pad(other.input_ids, (0, 3), value=7),
        F.pad(batch.attention_mask, (0, 3)),
        F.pad(batch.labels, (0, 5), value=-100),
    )
    loss, gradients = backward(exact, batch)
    for padded in (other, wider):
        found, same = backward(exact, padded)
        assert found == pytest.approx(loss, rel=1e-12) and close(same, gradients)


def test_a_label_of_minus_100_counts_for_nothing(exact: Florence2Model, processor: Processor) -> None:
    """Loss and gradients without it are those with it less those of its own log-probability."""
    batch = batch_of(processor, SAMPLES[:1])
    row, place = 0, int((batch.labels[0] != -100).sum()) - 1
    ignored = batch.labels.clone()
    ignored[row, place] = -100
    only = torch.full_like(batch.labels, -100)
    only[row, place] = batch.labels[row, place]
    loss, gradients = backward(exact, batch)
    less, fewer = backward(exact, replace(batch, labels=ignored))
    exact.zero_grad()
    memory, mask = _memory(exact, batch)
    shifted = F.pad(batch.labels[:, :-1].masked_fill(batch.labels[:, :-1] == -100, 1), (1, 0), value=2)
    logprobs = exact.decode(shifted, memory, mask)[row, place].log_softmax(-1)
    (-logprobs[batch.labels[row, place]]).backward()
    own = {name: p.grad.clone() for name, p in exact.named_parameters()}
    assert loss - less == pytest.approx(-logprobs[batch.labels[row, place]].item(), rel=1e-9)
    assert close(added([fewer, own]), gradients)


def _memory(model: Florence2Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    features = model.encode_image(batch.pixel_values)[batch.image_index]
    memory = model.encode(features, batch.input_ids, batch.attention_mask)
    return memory, model.memory_mask(features, batch.attention_mask)


def test_a_row_of_ignored_labels_adds_nothing(exact: Florence2Model, batch: Batch) -> None:
    ignored = batch.labels.clone()
    ignored[1] = -100
    kept = [i for i in range(len(ignored)) if i != 1]
    rest = Batch(
        batch.pixel_values, batch.image_index[kept], batch.input_ids[kept], batch.attention_mask[kept], ignored[kept]
    )
    loss, gradients = backward(exact, replace(batch, labels=ignored))
    expected, others = backward(exact, rest)
    assert loss == pytest.approx(expected, rel=1e-12) and close(gradients, others)
    nothing, zeros = backward(exact, replace(batch, labels=torch.full_like(batch.labels, -100)))
    assert nothing == 0 and all(not value.any() for value in zeros.values())


def test_a_shared_image_equals_the_image_repeated(exact: Florence2Model, batch: Batch) -> None:
    assert batch.image_index.tolist() == [0, 0, 1, 2, 2, 2]
    repeated = replace(batch, pixel_values=batch.pixel_values[batch.image_index], image_index=torch.arange(6))
    (loss, gradients), (expected, same) = backward(exact, batch), backward(exact, repeated)
    assert loss == pytest.approx(expected, rel=1e-12) and close(gradients, same)


def test_stored_grids_stand_for_the_vision_tower(exact: Florence2Model, batch: Batch) -> None:
    """The loss and all gradients but the tower's own."""
    with torch.no_grad():
        grids = exact.vision_tower(batch.pixel_values.double())
    loss, gradients = backward(exact, batch)
    found, same = backward(exact, replace(batch, pixel_values=torch.empty(0), grids=grids))
    rest = {name: value for name, value in gradients.items() if not name.startswith("vision_tower.")}
    assert found == pytest.approx(loss, rel=1e-12) and close(same, rest)


def test_padding_is_never_an_input_that_is_learnt(exact: Florence2Model, batch: Batch) -> None:
    """Where -100 stands inside an answer the decoder reads padding: its embedding is constant, as in BART."""
    labels = batch.labels.clone()
    labels[0, 1] = -100
    with torch.no_grad():  # neither reading nor writing it
        exact.final_logits_bias[0, 1] = -1e9
    _, gradients = backward(exact, replace(batch, labels=labels))
    assert not gradients["language_model.shared.weight"][1].any()


# ---- half precision ------------------------------------------------------------------------------------------------


def test_bfloat16_autocast_is_close_and_leaves_the_weights_alone(mini: Florence2Model, batch: Batch) -> None:
    """Measured: the loss off by 7.5e-6 of itself; 1 - cosine to float32's is 2.3e-6 for the whole gradient and at most
    1.3e-2 for one tensor. Five times that is allowed."""
    mini.eval()
    before = {name: p.detach().clone() for name, p in mini.named_parameters()}
    (loss, gradients), (rough_loss, rough) = (backward(mini, batch, autocast) for autocast in (False, True))
    assert {p.dtype for p in mini.parameters()} == {value.dtype for value in rough.values()} == {torch.float32}
    assert all(torch.equal(p, before[name]) for name, p in mini.named_parameters())
    assert 0 < abs(rough_loss - loss) / loss < 4e-5
    apart = {name: _angle(gradients[name], rough[name]) for name in gradients if not name.endswith("k_proj.bias")}
    assert max(apart.values()) < 6.4e-2
    assert 0 < _angle(*(torch.cat([g[name].flatten() for name in apart]) for g in (gradients, rough))) < 2e-5


def _angle(one: torch.Tensor, other: torch.Tensor) -> float:
    """1 - cosine, in float64. (The gradient of a key's bias is rounding alone, and has no direction.)"""
    return 1 - F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).item()
