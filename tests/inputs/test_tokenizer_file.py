"""`tokenizer.json`: a file that would shift an id is refused, every form of Florence-2's own is read."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from florence2.checkpoints.hub import resolve
from florence2.errors import CheckpointError, PromptError
from florence2.inputs import tokenizer
from florence2.inputs.tokenizer import ADDED_TOKENS, FlorenceTokenizer
from florence2.inputs.tokenizer_file import MAX_FILE_BYTES, read_known_file
from parity.cases import random_text
from parity.recipe import GOLDEN
from tests.release import keep

Change = Callable[[dict[str, Any]], object]
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {
        "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
        "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
    },
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture(scope="module")
def nano() -> FlorenceTokenizer:
    return FlorenceTokenizer(resolve("nano") / "tokenizer.json")


def changed(tmp_path: Path, change: Change) -> Path:
    """nano's tokenizer.json with its values changed in place."""
    values = json.loads((resolve("nano") / "tokenizer.json").read_text())
    change(values)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    return path


def added(values: dict[str, Any], content: str) -> dict[str, Any]:
    return next(token for token in values["added_tokens"] if token["content"] == content)


def swap(one: str, other: str) -> Change:
    """Exchange the ids of two added tokens, in the order of the file too, as the library would number them."""

    def change(values: dict[str, Any]) -> None:
        a, b = added(values, one), added(values, other)
        a["content"], b["content"] = other, one

    return change


def without(*contents: str) -> Change:
    def change(values: dict[str, Any]) -> None:
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in contents]

    return change


def renumbered(*contents: str) -> Change:
    """Leave tokens out and move all later ids down, so that file and vocabulary agree with each other."""

    def change(values: dict[str, Any]) -> None:
        without(*contents)(values)
        for id, token in enumerate(sorted(values["added_tokens"], key=lambda token: token["id"])):
            token["id"] = id if token["id"] < 4 else 606 + id - 4

    return change


def exchange_words(values: dict[str, Any]) -> None:
    words = values["model"]["vocab"]
    words["Ġa"], words["Ġt"] = words["Ġt"], words["Ġa"]


def give_one_id_to_many(values: dict[str, Any]) -> None:
    for word in list(values["model"]["vocab"])[50:80]:
        values["model"]["vocab"][word] = 5


def in_other_words(values: dict[str, Any]) -> None:
    """The same in a vocabulary that nobody knows."""
    word = list(values["model"]["vocab"])[-1]
    values["model"]["merges"] = [pair for pair in values["model"]["merges"] if "".join(pair) != word]
    del values["model"]["vocab"][word]
    give_one_id_to_many(values)


def set_flag(content: str, flag: str) -> Change:
    return lambda values: added(values, content).update({flag: True})


REFUSED: dict[str, tuple[Change, str]] = {
    "one location missing": (without("<loc_5>"), "lacks the token '<loc_5>'"),
    "and the rest moved": (renumbered("<loc_5>"), "lacks the token '<loc_5>'"),
    "a task's token missing": (renumbered("<and>"), "lacks the token '<and>'"),
    "locations exchanged": (swap("<loc_3>", "<loc_700>"), "gives '<loc_3>' the id 1311, but its place is 614"),
    "published tokens exchanged": (swap("<od>", "<sep>"), "gives '<od>' the id 1621"),
    "a location twice": (
        lambda values: values["added_tokens"].append({**added(values, "<loc_5>"), "id": 1631}),
        "adds the token '<loc_5>' twice",
    ),
    "an own token before the published": (
        lambda values: added(values, "<od>").update(content="<mine>"),
        "lacks the token '<od>'",
    ),
    "a gap": (lambda values: values["added_tokens"].append({"id": 1640, "content": "<mine>"}), "its place is 1631"),
    "an id as text": (lambda values: added(values, "<loc_5>").update(id="616"), "without an id"),
    "a content that is no text": (lambda values: added(values, "<loc_5>").update(content=5), "without an id or"),
    "an empty content": (lambda values: added(values, "<loc_5>").update(content=""), "without an id or content"),
    "an endless id": (lambda values: added(values, "<loc_5>").update(id=10**400), "the id 1000"),
    "two ids": (lambda values: added(values, "<pad>").update(id=3), "gives '<pad>' two ids, 1 and 3"),
    "begin missing": (renumbered("<mask>"), "lacks the token '<mask>'"),
    "one id for many words": (give_one_id_to_many, "the words of a known Florence-2 tokenizer"),
    "and other words": (in_other_words, "its words must have the ids 0 to 605, each once"),
    "words exchanged": (exchange_words, "the words of a known Florence-2 tokenizer"),
    "a word missing": (lambda values: values["model"]["vocab"].pop("Ġdescriptions"), "merge that makes no word"),
    "a word more": (lambda values: values["model"]["vocab"].update(xyz=606), "no merge that makes the word 'xyz'"),
    "a byte missing": (lambda values: values["model"]["vocab"].pop("~"), "lacks the word '~', which stands for a byte"),
    "an id that is no number": (lambda values: values["model"]["vocab"].update({"~": 1.5}), "the id 1.5"),
    "an id of 400 digits": (lambda values: values["model"]["vocab"].update({"~": 10**400}), "gives '~' the id 1000"),
    "an id at the limit": (lambda values: values["model"]["vocab"].update({"~": MAX_FILE_BYTES}), "gives '~' the id"),
    "an id below 0": (lambda values: values["model"]["vocab"].update({"~": -1}), "gives '~' the id -1"),
    "no merges": (lambda values: values["model"].update(merges=[]), "no merge that makes the word"),
    "one merge fewer": (lambda values: values["model"]["merges"].pop(7), "no merge that makes the word"),
    "merges in another order": (lambda values: values["model"]["merges"].reverse(), "other ids or other merges"),
    "a broken merge": (lambda values: values["model"]["merges"].append(["a"]), "does not join two words"),
    "words as a list": (lambda values: values["model"].update(vocab=["a"]), "lacks a vocab"),
    "dropout": (lambda values: values["model"].update(dropout=0.1), "dropout is 0.1"),
    "word pieces": (lambda values: values["model"].update(type="WordPiece"), "type is 'WordPiece'"),
    "ends of words": (lambda values: values["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is"),
    "no frame": (lambda values: values.update(post_processor=None), "does not put a text between"),
    "half a frame": (
        lambda values: values.update(post_processor={**TEMPLATE, "single": TEMPLATE["single"][:2]}),
        "does not put a text between",
    ),
    "a frame of other ids": (
        lambda values: values["post_processor"].update(cls=["<s>", 2000]),
        "does not put a text between",
    ),
    "a frame without ids": (lambda values: values.update(post_processor={"type": "BertProcessing"}), "post_processor"),
    "a frame that is a list": (lambda values: values.update(post_processor=[1]), "post_processor"),
    "no pre_tokenizer": (lambda values: values.update(pre_tokenizer=None), "has the pre_tokenizer None"),
    "a prefix": (lambda values: values["pre_tokenizer"].update(add_prefix_space=True), "has the pre_tokenizer"),
    "no splitting": (lambda values: values["pre_tokenizer"].update(use_regex=False), "has the pre_tokenizer"),
    "white space": (lambda values: values.update(pre_tokenizer={"type": "Whitespace"}), "has the pre_tokenizer"),
    "no decoder": (lambda values: values.update(decoder=None), "has the decoder None"),
    "lower case": (lambda values: values.update(normalizer={"type": "Lowercase"}), "has the normalizer"),
    "a pattern that panics": (
        lambda values: values.update(
            normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        ),
        "has the normalizer",
    ),
    "a location that swallows spaces": (set_flag("<loc_5>", "lstrip"), "has lstrip set for <loc_5>"),
    "a location that is a word": (set_flag("<loc_5>", "single_word"), "has single_word set for <loc_5>"),
    "a flag that is no flag": (lambda values: added(values, "<loc_5>").update(special=3), "neither true nor false"),
    "added tokens as text": (lambda values: values.update(added_tokens="<od>"), "has the added token '<od>'"),
    "no model": (lambda values: values.pop("model"), "cannot be read as a tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_whatever_would_shift_an_id_is_refused(case: str, tmp_path: Path) -> None:
    change, words = REFUSED[case]
    with pytest.raises(CheckpointError) as error:
        FlorenceTokenizer(changed(tmp_path, change))
    assert words in str(error.value) and len(str(error.value).replace(str(tmp_path), "")) < 500


ACCEPTED: dict[str, Change] = {
    "as it is": lambda values: None,
    "without any published token": without(*ADDED_TOKENS),
    "in another order": lambda values: values["added_tokens"].reverse(),
    "a template": lambda values: values.update(post_processor=TEMPLATE),
    "a sequence": lambda values: values.update(
        post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL]},
        normalizer={"type": "Sequence", "normalizers": []},
    ),
    "cut and filled up": lambda values: values.update(
        truncation={"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    ),
    "merges as texts": lambda values: values["model"].update(
        merges=[" ".join(pair) for pair in values["model"]["merges"]]
    ),
    "not special": lambda values: [token.update(special=False, normalized=True) for token in values["added_tokens"]],
    "a token of its own": lambda values: values["added_tokens"].append({"id": 1631, "content": "<mine>"}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_every_form_of_the_one_tokenizer_gives_the_same_ids(case: str, tmp_path: Path, nano: FlorenceTokenizer) -> None:
    tokenizer = FlorenceTokenizer(changed(tmp_path, ACCEPTED[case]))
    for text in ("", "a red circle<loc_5> <loc_999>and more of it", " <od></s>é🙂"):
        ids = nano.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == nano.decode(ids)
        assert tokenizer.decode(ids, skip_special=True) == nano.decode(ids, skip_special=True)


def test_the_published_words_are_known(tmp_path: Path) -> None:
    """BART's too: with two of its ids exchanged, it does not load."""
    values = json.loads((GOLDEN / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    words["Ġcar"], words["Ġcat"] = words["Ġcat"], words["Ġcar"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="words of a known Florence-2 tokenizer"):
        FlorenceTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'{"model": 1}', b"9" * 5000])
def test_files_that_are_no_tokenizer_get_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        FlorenceTokenizer(tmp_path / "tokenizer.json")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1355256\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(CheckpointError, match="is a Git LFS pointer.*git lfs pull"):
        FlorenceTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("ids", [["x"], [-1], [2**40], [None], [1.5]])
def test_ids_that_are_none_get_a_sentence(ids: list[Any], nano: FlorenceTokenizer) -> None:
    with pytest.raises(PromptError, match="cannot be converted to text"):
        nano.decode(ids)


def test_an_id_that_the_library_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads((resolve("nano") / "tokenizer.json").read_text())
    values["added_tokens"][-1]["id"] += 1
    with pytest.raises(CheckpointError, match="The tokenizer cannot be read: '.*' would not get the id 1631"):
        tokenizer._build(values)


class Panic(BaseException):
    """Stands for the library's PanicException, which is not an Exception either."""


class Panicking:
    """A library that fails."""

    def __init__(self, error: BaseException):
        self.error = error

    def encode(self, text: str) -> None:
        raise self.error

    decode: Any = encode


def test_a_panic_of_the_library_becomes_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FlorenceTokenizer(resolve("nano") / "tokenizer.json")
    monkeypatch.setattr(tokenizer, "_backend", Panicking(Panic("index out of bounds")))
    with pytest.raises(PromptError, match="'a' cannot be converted to ids: index out of bounds"):
        tokenizer.encode("a")
    monkeypatch.setattr(tokenizer, "_backend", Panicking(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


FILES = [(folder, layout) for folder in (GOLDEN, resolve("nano")) for layout in (None, "microsoft", "native")]


@pytest.mark.parametrize(("folder", "layout"), keep([0, 2, 3, 4], FILES))
def test_a_known_file_is_read_as_if_it_had_been_checked(folder: Path, layout: str | None, tmp_path: Path) -> None:
    """Byte for byte the published one or nano's, or either as written here; with a blank more it is looked through."""
    file, copy = folder / "tokenizer.json", tmp_path / "tokenizer.json"
    if layout is not None:
        text = FlorenceTokenizer(file).to_files(layout, 1024)["tokenizer.json"]
        file = tmp_path / "written.json"
        file.write_text(text)
    copy.write_bytes(file.read_bytes() + b" ")
    assert read_known_file(file) is not None and read_known_file(copy) is None
    known, checked = FlorenceTokenizer(file), FlorenceTokenizer(copy)
    assert known._backend.get_vocab() == checked._backend.get_vocab()
    added = [each._backend.get_added_tokens_decoder() for each in (known, checked)]
    # `normalized` may differ: there is nothing that normalises
    assert added[0].keys() == added[1].keys()
    for id, token in added[0].items():
        other = added[1][id]
        assert (token.content, token.special) == (other.content, other.special)
        assert (token.lstrip, token.rstrip, token.single_word) == (other.lstrip, other.rstrip, other.single_word)
    rng = random.Random(3)
    for text in [random_text(rng) for _ in range(300)]:
        ids = known.encode(text)
        assert ids == checked.encode(text)
        assert known.decode(ids) == checked.decode(ids) and known.decode(ids, True) == checked.decode(ids, True)
