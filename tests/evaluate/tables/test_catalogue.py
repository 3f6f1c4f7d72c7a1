"""Every split of every table, read from synthetic files in the official layouts."""

from pathlib import Path

import pytest

from florence2.evaluate.tables.captions import References
from florence2.evaluate.tables.catalogue import TABLES, describe_files, find_split, read_table
from florence2.evaluate.tables.example import TableError
from florence2.evaluate.tables.expressions import Referent
from florence2.evaluate.tables.questions import PeopleAnswers
from recipes.nano.scene_tasks import with_article
from recipes.nano.scenes import make_scene
from recipes.nano.write_tables import QUESTION, people, references
from tests.evaluate.conftest import SEED

EVERY = [f"{name}:{split}" for name, table in TABLES.items() for split in table.splits]


@pytest.mark.parametrize("name", EVERY)
def test_every_split_is_read(name: str, data: Path) -> None:
    examples = read_table(name, data)
    assert examples
    assert all(example.image.is_file() for example in examples)
    assert len({example.id for example in examples}) == len(examples)


def test_a_table_without_a_split_is_its_first_one(data: Path) -> None:
    assert read_table("refcoco", data) == read_table("refcoco:val", data) != read_table("refcoco:testA", data)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("coco-caption", [1, 2, 4, 5, 7, 8]),
        ("coco-caption:val", [3, 6, 9]),
        ("nocaps", range(9)),
        ("textcaps", [f"{number:016x}" for number in range(1, 10)]),
    ],
)
def test_captions(name: str, ids: list[object], data: Path) -> None:
    examples = read_table(name, data)
    assert [example.id for example in examples] == [str(id) for id in ids]
    for example in examples:
        number = int(example.image.stem.rpartition("_")[2], 16 if len(example.image.stem) == 16 else 10)
        assert isinstance(example.truth, References)
        assert example.truth.references == references(make_scene(SEED, number))
        assert example.text is None


def test_domains(data: Path) -> None:
    assert {example.truth.domain for example in read_table("nocaps", data)} == {
        *("in-domain", "near-domain", "out-domain")
    }


def test_detection(data: Path) -> None:
    example = read_table("coco-detection", data)[1]
    scene = make_scene(SEED, 2)
    assert (example.truth.image_id, example.truth.width, example.truth.height) == (2, *scene.image.size)
    assert len(example.truth.objects) == len(scene.things)
    for instance, thing in zip(example.truth.objects.values(), scene.things, strict=True):
        left, top, width, height = instance.box
        assert (left, top, left + width, top + height) == pytest.approx(thing.box, abs=0.02)
        assert instance.outline == [pytest.approx([value for point in thing.outline for value in point], abs=0.01)]


@pytest.mark.parametrize("name", ["refcoco:testA", "refcoco+:testA", "refcoco-res:testA"])
def test_expressions(name: str, data: Path) -> None:
    examples = read_table(name, data)
    expected = [(thing, i) for number in (1, 5, 9) for thing in make_scene(SEED, number).things for i in range(2)]
    assert len(examples) == len(expected)
    for example, (thing, i) in zip(examples, expected, strict=True):
        assert example.text == (with_article(thing.phrase) if i else thing.phrase)
        assert isinstance(example.truth, Referent)
        assert example.truth.corners == pytest.approx(thing.box, abs=0.02)


def test_phrases(data: Path) -> None:
    first, second = read_table("flickr30k", data)[:2]
    scene = make_scene(SEED, 1)
    phrases = [with_article(thing.phrase) for thing in scene.things]
    assert first.text == " and ".join(phrases)
    assert [phrase.words for phrase in first.truth.phrases] == phrases
    assert [phrase.boxes for phrase in first.truth.phrases] == [
        [pytest.approx(thing.box, abs=0.5)] for thing in scene.things
    ]
    assert (first.id, second.id, second.text) == ("1_0", "1_1", f"An image of {phrases[0]} .")
    assert [phrase.words for phrase in second.truth.phrases] == phrases[:1]  # "An image" has no box


@pytest.mark.parametrize("name", ["vqav2", "textvqa", "vizwiz"])
def test_questions(name: str, data: Path) -> None:
    examples = read_table(name, data)
    assert [example.text for example in examples] == [QUESTION] * 9
    expected = [people(make_scene(SEED, number)) for number in range(1, 10)]
    assert [example.truth.answers for example in examples] == expected


@pytest.mark.parametrize("name", ["vqav2:test-dev", "textvqa:test", "vizwiz:test"])
def test_answers_that_are_not_published(name: str, data: Path) -> None:
    truths = [example.truth for example in read_table(name, data)]
    assert all(isinstance(truth, PeopleAnswers) and truth.answers == [] for truth in truths)


def test_unknown_names() -> None:
    with pytest.raises(TableError, match=r"Unknown table 'coco'\. Known tables: coco-caption, "):
        find_split("coco")
    with pytest.raises(TableError, match=r"refcocog has no split 'testA'\. Its splits: val, test\."):
        find_split("refcocog:testA")


def test_a_missing_file_says_where_it_is_published(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"refcoco/refs\(unc\)\.p does not exist; its owners publish it \(about"):
        read_table("refcoco", tmp_path)


def test_a_split_has_its_own_images(data: Path) -> None:
    folders = {name: {example.image.parent for example in read_table(name, data)} for name in EVERY}
    assert folders["vqav2:val"] == {data / "coco" / "val2014"}
    assert folders["vqav2:test-dev"] == {data / "coco" / "test2015"}
    assert folders["textvqa:test"] == {data / "textvqa" / "test_images"}
    assert folders["vizwiz:test"] == {data / "vizwiz" / "test"}


def test_sizes_are_in_the_unit_that_fits() -> None:
    sizes = {path: size for _, path, size, _ in describe_files()}
    assert sizes["coco/train2014/"] == "about 13.5 GB"
    assert sizes["coco/val2017/"] == "about 816 MB"
    assert sizes["flickr30k/test.txt"] == "about 0.1 MB"


def test_every_file_is_listed(data: Path) -> None:
    rows = describe_files()
    assert {row[0] for row in rows} == set(EVERY)
    assert all((data / path).exists() and size.startswith("about ") and origin for _, path, size, origin in rows)
