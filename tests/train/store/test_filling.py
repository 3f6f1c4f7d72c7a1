"""The plan of what is encoded, in several processes; the rest is seen in runs (`test_running.py`)."""

from pathlib import Path

import pytest
import torch

from florence2.errors import CheckpointError, ImageError, OptionError
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.samples import Sample
from florence2.train.store.filling import StoredGrids, StoreOptions, check_room, fill_store
from florence2.train.store.grids import GridStore
from florence2.train.store.keys import ImageKeys
from florence2.train.store.tower import FrozenTower
from tests.train.steps import SAMPLES


@pytest.fixture
def tower(mini: Florence2Model, processor: Processor) -> FrozenTower:
    return FrozenTower(mini, processor)


@pytest.fixture
def stored(tower: FrozenTower, processor: Processor, tmp_path: Path) -> StoredGrids:
    return StoredGrids(GridStore(tmp_path, tower.digest), ImageKeys(processor))


def test_what_fits_exactly_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the disk and by the limit; one byte more is refused, with sizes in their units."""
    monkeypatch.setattr("florence2.train.store.filling.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    check_room(4, 4, 250_000_000, StoreOptions(tmp_path, limit=1))
    check_room(4, 0, 10**12, StoreOptions(tmp_path, limit=1))
    with pytest.raises(OptionError, match=r"^The features of 1 of 4 images need 1\.0 GB .* the disk has 1\.0 GB free"):
        check_room(4, 1, 10**9 + 1, StoreOptions(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(b"1")
    with pytest.raises(
        OptionError, match=r"images need 1\.0 GB in .* with 0\.0 MB already there more than the limit of 1 GB"
    ):
        check_room(4, 4, 250_000_000, StoreOptions(tmp_path, limit=1))


def test_grids_are_those_of_the_images(stored, tower, processor, tmp_path) -> None:
    said: list[str] = []
    done: list[tuple[int, int]] = []
    options = StoreOptions(tmp_path)
    fill_store(
        stored, tower, processor, SAMPLES, [0, 2], options, say=said.append, progress=lambda *now: done.append(now)
    )
    assert done == [(1, 2), (2, 2)] and len(said) == 1 and len(stored.store) == 2
    for number in (0, 2):
        pixels = processor.image(SAMPLES[number].image)
        assert torch.equal(stored(SAMPLES[number].image), tower.encode(pixels)[0])
    with pytest.raises(ImageError, match="The image has changed since it was encoded"):
        stored(SAMPLES[1].image)
    fill_store(stored, tower, processor, SAMPLES, range(3), options, say=said.append)
    assert len(stored.store) == 3 and "2 are in" in said[1]


def test_images_that_are_computed_together(stored, mini, processor, tmp_path) -> None:
    """As on an accelerator: the last batch is not full."""
    tower = FrozenTower(mini, processor, at_once=2)
    done: list[tuple[int, int]] = []
    fill_store(
        stored, tower, processor, SAMPLES, range(3), StoreOptions(tmp_path), progress=lambda *now: done.append(now)
    )
    assert done == [(2, 3), (3, 3)]
    for sample in SAMPLES:
        torch.testing.assert_close(stored(sample.image), tower.encode(processor.image(sample.image))[0])


def test_processes_take_shares_of_the_first_ones_plan(stored, tower, processor, tmp_path) -> None:
    """The second process has no plan of its own, and writes its share alone."""
    plan: list[object] = []

    def first(value: object) -> object:
        plan.append(value)
        return value

    one = StoredGrids(GridStore(tmp_path / "one", tower.digest), ImageKeys(processor))
    with pytest.raises(OptionError, match="another process has written: all machines of a run must share"):
        fill_store(one, tower, processor, SAMPLES, range(3), StoreOptions(tmp_path), share=(0, 2), agree=first)
    assert len(one.store) == 2
    given = iter([plan[0], None])
    two = StoredGrids(GridStore(tmp_path / "one", tower.digest), ImageKeys(processor))
    fill_store(
        two, tower, processor, SAMPLES, range(3), StoreOptions(tmp_path), share=(1, 2), agree=lambda _: next(given)
    )
    assert len(two.store) == 3


def test_a_problem_of_the_first_process_is_raised_in_all(stored, tower, processor, tmp_path) -> None:
    problem = OptionError("no room")
    with pytest.raises(OptionError, match="no room"):
        fill_store(
            stored,
            tower,
            processor,
            SAMPLES,
            range(3),
            StoreOptions(tmp_path),
            share=(1, 2),
            agree=lambda _: (problem, {}),
        )


def test_a_bad_image_is_named_and_the_others_are_kept(stored, tower, processor, tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    samples = [*SAMPLES[:2], Sample(tmp_path / "bad.png", (("<OD>", "x"),), "line 7")]
    with pytest.raises(ImageError, match=r"line 7: .*bad\.png"):
        fill_store(stored, tower, processor, samples, range(3), StoreOptions(tmp_path))
    stored.store.refresh()
    assert len(stored.store) == 2


def test_what_is_not_finite_is_not_stored(stored, tower, processor, mini, tmp_path) -> None:
    with torch.no_grad():
        mini.vision_tower.convs[0].conv.bias[0] = float("inf")
    with pytest.raises(CheckpointError, match="not finite"):
        fill_store(stored, tower, processor, SAMPLES, [0], StoreOptions(tmp_path))
    stored.store.refresh()
    assert not len(stored.store)


def test_a_limit_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="limit of the store is 0 GB"):
        StoreOptions(tmp_path, 0)
