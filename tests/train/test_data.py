"""Batches: padding, masks, and which process sees which image at which step."""

from dataclasses import replace

import pytest
import torch

from florence2.errors import ImageError, PromptError
from florence2.train.data import StepData, make_batch
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from recipes.nano.train import SceneSamples

SETTINGS = TrainSettings(steps=20, batch=4, seed=3)


def test_a_batch(processor) -> None:
    samples = [SceneSamples(1, 3)[i] for i in range(3)]
    batch = make_batch(samples, processor, 1024)
    assert batch.pixel_values.shape == (3, 3, 64, 64)
    assert batch.image_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    pairs = [pair for sample in samples for pair in sample.pairs]
    for row, (prefix, suffix) in enumerate(pairs):
        length = int(batch.attention_mask[row].sum())
        assert batch.input_ids[row, :length].tolist() == processor.prompt(prefix)
        assert set(batch.input_ids[row, length:].tolist()) <= {1}
        labels = batch.labels[row]
        kept = labels[labels != -100].tolist()
        assert kept == processor.encode(suffix) and kept[0] == 0 and kept[-1] == 2
        assert (labels[len(kept) :] == -100).all()
    assert batch.num_labels == sum(len(processor.encode(suffix)) for _, suffix in pairs)


def test_a_long_answer_is_cut(processor) -> None:
    sample = SceneSamples(1, 1)[0]
    assert make_batch([sample], processor, 5).labels.shape[1] == 5


def test_what_is_wrong_names_the_sample(processor, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"row 7: .*a\.png"):
        make_batch([Sample(tmp_path / "a.png", (("<OD>", "x"),), "row 7")], processor, 99)
    with pytest.raises(PromptError, match="a sample: .*<NOPE>"):
        make_batch([Sample(SceneSamples(1, 1)[0].image, (("<NOPE>", "x"),))], processor, 99)
    with pytest.raises(PromptError, match="without a single prompt"):
        make_batch([Sample(SceneSamples(1, 1)[0].image, ())], processor, 99)


def test_every_epoch_sees_every_sample_once(processor) -> None:
    data = StepData(SceneSamples(1, 12), processor, SETTINGS, 99)
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in data.indices(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = StepData(SceneSamples(1, 12), processor, SETTINGS, 99)
    assert again.indices(7) == epochs[2][4:8]
    other = StepData(SceneSamples(1, 12), processor, replace(SETTINGS, seed=4), 99)
    assert other.indices(0) != epochs[0][:4]


def test_processes_share_a_batch(processor) -> None:
    whole = StepData(SceneSamples(1, 12), processor, SETTINGS, 99)[5]
    parts = [StepData(SceneSamples(1, 12), processor, SETTINGS, 99, rank, 2)[5] for rank in (0, 1)]
    pixels = torch.cat([batch.pixel_values for part in parts for batch in part])
    assert pixels.shape == whole[0].pixel_values.shape
    assert sum(b.num_labels for part in parts for b in part) == whole[0].num_labels


def test_micro_batches(processor) -> None:
    data = StepData(SceneSamples(1, 12), processor, replace(SETTINGS, micro_batch=3), 99)
    assert [len(batch.pixel_values) for batch in data[0]] == [3, 1]


def test_too_few_images(processor) -> None:
    with pytest.raises(PromptError, match="3 images are fewer than one batch of 4"):
        StepData(SceneSamples(1, 3), processor, SETTINGS, 99)
    with pytest.raises(PromptError, match="cannot be shared by 5 processes"):
        StepData(SceneSamples(1, 12), processor, SETTINGS, 99, 0, 5)


def test_the_samples_that_are_still_needed(processor) -> None:
    """Of all processes, each once; an epoch leaves out the rest that fills no batch."""
    data = StepData(SceneSamples(1, 10), processor, replace(SETTINGS, steps=4), 99, 1, 2)
    later = {i for step in (2, 3) for i in data.indices(step)}
    assert data.needed(2) == sorted(later) and len(later) == 8
    assert data.needed(3) == sorted(data.indices(3)) and data.needed(4) == []
    assert StepData(SceneSamples(1, 10), processor, SETTINGS, 99).needed(0) == list(range(10))


def test_a_batch_of_stored_grids(processor) -> None:
    """It is that of the images but for their pixel values."""
    samples = [SceneSamples(1, 3)[i] for i in range(3)]
    given = {id(sample.image): torch.full((2, 3, 4), float(i)) for i, sample in enumerate(samples)}
    plain, stored = (make_batch(samples, processor, 60, read) for read in (None, lambda image: given[id(image)]))
    assert plain.grids is None and stored.grids is not None and stored.grids.shape == (3, 2, 3, 4)
    assert [float(grid[0, 0, 0]) for grid in stored.grids] == [0, 1, 2] and not stored.pixel_values.numel()
    for name in ("image_index", "input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(plain, name), getattr(stored, name))
    moved = stored.to(torch.device("meta"))
    assert moved.grids.device.type == moved.labels.device.type == "meta" and plain.to(torch.device("cpu")).grids is None
