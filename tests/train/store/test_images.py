"""An evaluation through the store gives the same answers and encodes nothing twice."""

from pathlib import Path

import pytest
import torch

from florence2.errors import ConfigError, ImageError, OptionError, OutputError
from florence2.pipeline import Florence2
from florence2.train.evaluate import answer_samples, evaluate
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.store import grids
from florence2.train.store.filling import StoreOptions
from florence2.train.store.images import StoredImages
from florence2.train.trainer import train
from parity.recipe import make_picture
from tests.full_disk import files_of_at_most

PAIRS = (("<OD>", "cat<loc_1><loc_2><loc_500><loc_600>"), ("<CAPTION>", "A cat."))


@pytest.fixture
def f(mini, processor) -> Florence2:
    return Florence2(mini.eval(), processor)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two files, one image of each kind besides, and a file that is not an image."""
    for n in range(2):
        make_picture(n, 70, 50).save(tmp_path / f"{n}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = [tmp_path / "0.png", str(tmp_path / "1.png"), make_picture(2, 40, 60), tmp_path / "bad.png"]
    return [Sample(image, PAIRS, f"image {n}") for n, image in enumerate(images)]


def count_encoded(f: Florence2) -> list[int]:
    calls: list[int] = []
    f.model.vision_tower.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    return calls


def answers(f: Florence2, samples: list[Sample], stored: StoredImages | None) -> list[object]:
    options = f.options(num_beams=1, max_new_tokens=8)
    outcomes = [each for sample in answer_samples(f, samples, 2, options, stored) for each in sample]
    return [str(o.error) if o.pair is None else (o.pair[1].raw_text, o.pair[1].image_size) for o in outcomes]


def test_the_answers_are_the_same(f, samples, tmp_path) -> None:
    """A bad image fails only its own questions. The second time nothing is encoded but one image, to compare it."""
    plain = answers(f, samples, None)
    calls = count_encoded(f)
    assert answers(f, samples, StoredImages(f, StoreOptions(tmp_path / "s"))) == plain and calls == [1] * 3
    assert answers(f, samples, StoredImages(f, StoreOptions(tmp_path / "s"))) == plain and calls == [1] * 4
    assert len(plain) == 8 and sum(isinstance(each, str) for each in plain) == 2


def test_it_reads_what_a_run_has_stored(f, processor, samples, tmp_path) -> None:
    """Whose language model and projection have changed since."""
    store = StoreOptions(tmp_path / "s")
    settings = TrainSettings(steps=2, batch=3, workers=0, freeze=("vision",), learning_rate=1e-2, warmup=0)
    train(f.model, processor, samples[:3], settings, tmp_path / "run", store=store)
    plain = answers(f, samples[:3], None)
    calls = count_encoded(f)
    assert answers(f, samples[:3], StoredImages(f, store)) == plain and len(calls) == 1


def test_metrics_pass_through_it(f, samples, tmp_path) -> None:
    options = f.options(num_beams=1, max_new_tokens=8)
    stored = StoredImages(f, StoreOptions(tmp_path / "s"))
    assert evaluate(f, samples[:2], options=options, stored=stored) == evaluate(f, samples[:2], options=options)
    with pytest.raises(ImageError, match=r"image 3: "):
        evaluate(f, samples, options=options, stored=stored)


def test_changed_code_is_noticed(f, samples, tmp_path) -> None:
    answers(f, samples[:1], StoredImages(f, StoreOptions(tmp_path / "s")))
    f.model.vision_tower.register_forward_hook(lambda *values: torch.zeros_like(values[2]))
    with pytest.raises(ConfigError, match="code has changed"):
        evaluate(f, samples[:1], stored=StoredImages(f, StoreOptions(tmp_path / "s")))


def test_its_folder_is_bounded(f, samples, tmp_path) -> None:
    """What is stored already counts, and needs no room again."""
    folder = tmp_path / "new" / "s"
    answers(f, samples[:1], StoredImages(f, StoreOptions(folder)))
    with pytest.raises(OptionError, match="of 2 of 3 images need"):
        evaluate(f, samples[:3], stored=StoredImages(f, StoreOptions(folder, limit=1e-5)))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        StoredImages(f, StoreOptions(tmp_path / "file" / "s"))


def test_a_full_disk_costs_no_answer(f, samples, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(grids, "SHARD_BYTES", 1)
    plain, stored = answers(f, samples, None), StoredImages(f, StoreOptions(tmp_path / "s"))
    with files_of_at_most(20):
        assert answers(f, samples, stored) == plain
    assert not list((tmp_path / "s").rglob("*.safetensors"))
