"""Hostile and damaged files: one sentence, and nothing of them is run."""

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from florence2.evaluate.tables.captions import read_coco_captions
from florence2.evaluate.tables.catalogue import read_table
from florence2.evaluate.tables.example import TableError
from florence2.evaluate.tables.expressions import read_expressions
from florence2.evaluate.tables.reading import check, read_json, read_plain_pickle, read_xml


class Executes:
    """Pickled, it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def sentence(error: pytest.ExceptionInfo[TableError]) -> str:
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 900
    return text


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickle_that_would_run_something(protocol: int, tmp_path: Path) -> None:
    file, trace = tmp_path / "refs.p", tmp_path / "trace"
    file.write_bytes(pickle.dumps([{"split": "val", "ref_id": Executes(trace)}], protocol))
    with pytest.raises(TableError) as error:
        read_plain_pickle(file)
    assert "nothing of it was run" in sentence(error)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",  # the registry of extensions
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"P12\n.",  # persistent
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a byte array of nine million terabytes
        b"r\xff\xff\xff\xff.",  # a place in a table of four billion
        b"]r\xff\xff\xff\xff",
        b"X\xff\xff\xff\x7fabc",
        b"I" + b"9" * 5000 + b"\n.",
        b"S'\\x",
        b"(((((((",
        b"u.",
        b"g7\n.",
        b"}b.",
        b"",
        b"junk",
    ],
)
def test_damaged_pickles(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "refs.p"
    file.write_bytes(content)
    with pytest.raises(TableError) as error:
        read_plain_pickle(file)
    sentence(error)


def test_texts_of_every_length(tmp_path: Path) -> None:
    file = tmp_path / "refs.p"
    for content in (b"\x8c\x03abc.", b"X\x03\0\0\0abc.", b"\x8d\x03\0\0\0\0\0\0\0abc."):
        file.write_bytes(b"\x80\x04" + content)
        assert read_plain_pickle(file) == "abc"


def test_pickles_of_python_2(tmp_path: Path) -> None:
    file = tmp_path / "refs.p"
    file.write_bytes(
        b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'n'\nI12\nsS'x'\nL3L\nsS'f'\nF0.5\nsS'u'\nVo\\u2019\nsa."
    )
    assert read_plain_pickle(file) == [{"sent": "café", "n": 12, "x": 3, "f": 0.5, "u": "o’"}]


@pytest.mark.parametrize(
    "content",
    [
        '<!DOCTYPE a [<!ENTITY e "text">]><annotation>&e;</annotation>',
        '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
        '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd"><annotation/>',
        '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>',
    ],
)
def test_a_document_type_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "1.xml"
    file.write_text(content)
    with pytest.raises(TableError, match="document type") as error:
        read_xml(file)
    sentence(error)


@pytest.mark.parametrize(
    "content", ["", "<a>", "<a>&e;</a>", '<?xml version="1.0" encoding="none"?><a/>', "\0", "text"]
)
def test_damaged_xml(content: str, tmp_path: Path) -> None:
    file = tmp_path / "1.xml"
    file.write_text(content)
    with pytest.raises(TableError, match="is not XML") as error:
        read_xml(file)
    sentence(error)


def test_other_files_that_are_not_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"9" * 5000):
        file.write_bytes(content)
        with pytest.raises(TableError) as error:
            read_json(file)
        sentence(error)
    for path in (tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(TableError) as error:
            read_json(path)
        sentence(error)


FILES = {
    "coco-caption": "coco/dataset_coco.json",
    "nocaps": "nocaps/nocaps_val_4500_captions.json",
    "textcaps": "textvqa/TextCaps_0.1_val.json",
    "coco-detection": "coco/annotations/instances_val2017.json",
    "refcoco": "refcoco/instances.json",
    "vqav2": "vqav2/v2_mscoco_val2014_annotations.json",
    "textvqa": "textvqa/TextVQA_0.5.1_val.json",
    "vizwiz": "vizwiz/val.json",
}
SPOILT: list[Any] = [None, True, -1, 1 << 70, float("nan"), 1e400, "", [], {}, [[]], [None]]
SPOILT += ["../../etc/passwd", "/etc/passwd", "a\0b"]


def spoil(value: Any, rng: random.Random) -> Any:
    """Return a value with one part replaced or removed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        copied = value.copy()
        key = rng.choice(list(copied)) if isinstance(copied, dict) else rng.randrange(len(copied))
        if rng.random() < 0.1:
            del copied[key]
        else:
            copied[key] = spoil(copied[key], rng)
        return copied
    return rng.choice(SPOILT)


def answered_or_refused(name: str, data: Path) -> bool:
    """Read a table; return whether it was refused, which must be in a sentence. Images stay inside their folder."""
    try:
        examples = read_table(name, data)
    except TableError as error:
        assert str(error).endswith(".")
        assert len(str(error)) < 900
        return True
    assert all(".." not in example.image.parts and example.image.is_relative_to(data) for example in examples)
    return False


@pytest.mark.parametrize("name", FILES)
def test_spoilt_json(name: str, data: Path, tmp_path: Path) -> None:
    for path in data.rglob("*"):  # links, so that the images are not copied
        target = tmp_path / path.relative_to(data)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else target.symlink_to(path)
    file = tmp_path / FILES[name]
    values, rng = json.loads(file.read_text()), random.Random(name)
    file.unlink()
    refused = 0
    for _ in range(125):
        file.write_text(json.dumps(spoil(values, rng)))
        refused += answered_or_refused(name, tmp_path)
    assert refused > 30


def _spoil_refs(change: Callable[[Any], None], data: Path, tmp_path: Path) -> str:
    shutil.copytree(data / "refcoco", tmp_path / "refcoco")
    (tmp_path / "coco").symlink_to(data / "coco")
    file = tmp_path / "refcoco" / "refs(unc).p"
    refs = pickle.loads(file.read_bytes())
    change(refs)
    file.write_bytes(pickle.dumps(refs, 2))
    with pytest.raises(TableError) as error:
        read_table("refcoco:testA", tmp_path)
    return sentence(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda refs: refs[0].pop("split"), "refs[0] lacks 'split'"),
        (lambda refs: refs[0].update(ann_id=7), "is about object 7 of image 1, which"),
        (lambda refs: refs[0].update(image_id=True), "refs[0].image_id must be a whole number, not True"),
        (lambda refs: refs[0].update(sentences=3), "refs[0].sentences must be a list, not 3"),
        (lambda refs: refs[0]["sentences"][1].update(sent=5), "sentences[1].sent must be a text, not 5"),
        (lambda refs: refs.clear(), "hold no examples"),
        (lambda refs: refs.insert(0, 5), "refs[0] must be an object, not 5"),
    ],
)
def test_spoilt_refs(change: Callable[[Any], None], words: str, data: Path, tmp_path: Path) -> None:
    assert words in _spoil_refs(change, data, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("Sentences/1.txt", "[/EN#1/people Two men", "without its end"),
        ("Sentences/1.txt", "[people Two men]", "a phrase begins with"),
        ("Annotations/1.xml", "<annotation><object><name>1</name><bndbox/></object></annotation>", "whose xmin is ''"),
        ("Annotations/1.xml", "<annotation><object><bndbox><xmin>1e9</xmin></bndbox></object></annotation>", "'1e9'"),
        ("Annotations/1.xml", '<!DOCTYPE a [<!ENTITY e "1">]><annotation>&e;</annotation>', "document type"),
        ("test.txt", "../../etc/passwd", "must be the name of an image"),
        ("test.txt", "none", "does not exist"),
        ("test.txt", "1\n2\n1\n", "names an image twice"),
        (
            "Annotations/1.xml",
            "<annotation><object><bndbox><xmin>9</xmin><ymin>2</ymin><xmax>8</xmax><ymax>2</ymax></bndbox></object>"
            "</annotation>",
            "has a box whose right or bottom comes before its left or top",
        ),
    ],
)
def test_spoilt_entities(file: str, content: str, words: str, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "flickr30k", tmp_path / "flickr30k")
    (tmp_path / "flickr30k" / file).write_text(content)
    with pytest.raises(TableError) as error:
        read_table("flickr30k", tmp_path)
    assert words in sentence(error)


def test_lists_that_hold_one_list_many_times(tmp_path: Path) -> None:
    """Ten times ten times ... of one number, 30 levels deep: no message may write that out."""
    levels = b"".join(b"(lp%d\n" % (level + 1) + b"g%d\na" % level * 10 for level in range(30))
    file = tmp_path / "refs.p"
    file.write_bytes(b"(lp0\nI1\na" + levels + b".")
    with pytest.raises(TableError) as error:
        list(read_expressions(file, tmp_path / "instances.json", tmp_path, "val"))
    sentence(error)
    with pytest.raises(TableError, match="must be an object, not a list of 10"):
        check(read_plain_pickle(file)[0], dict, "refs[0]")


@pytest.mark.parametrize("table", ["textvqa", "vizwiz"])
def test_answers_to_some_questions_alone(table: str, data: Path, tmp_path: Path) -> None:
    for path in ("textvqa", "vizwiz"):
        shutil.copytree(data / path, tmp_path / path)
    values = json.loads((tmp_path / FILES[table]).read_text())
    del (values["data"] if table == "textvqa" else values)[3]["answers"]
    (tmp_path / FILES[table]).write_text(json.dumps(values))
    with pytest.raises(TableError, match=r"has answers to only 8 of its 9 questions\.") as error:
        read_table(table, tmp_path)
    sentence(error)


def test_an_unknown_domain(data: Path, tmp_path: Path) -> None:
    values = json.loads((data / FILES["nocaps"]).read_text())
    values["images"][2]["domain"] = "in|out\n"
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(values))
    with pytest.raises(
        TableError, match=r"domain is 'in\|out\\n'; the domains are in-domain, near-domain, out-"
    ) as error:
        list(read_coco_captions(file, tmp_path))
    sentence(error)
