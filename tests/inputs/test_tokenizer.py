"""Text <-> ids."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from florence2.errors import CheckpointError, PromptError
from florence2.inputs.tokenizer import ADDED_TOKENS, FlorenceTokenizer
from florence2.inputs.tokenizer_file import MAX_FILE_BYTES
from parity.recipe import GOLDEN
from parity.records import read_record
from tests.release import keep


@pytest.fixture(scope="module")
def tokenizer() -> FlorenceTokenizer:
    return FlorenceTokenizer(GOLDEN / "tokenizer.json")


def save(tokenizer: FlorenceTokenizer, layout: str, folder: Path) -> None:
    for name, text in tokenizer.to_files(layout, 1024).items():
        (folder / name).write_text(text, encoding="utf-8")


def test_recorded_strings_both_ways(tokenizer: FlorenceTokenizer) -> None:
    for record in read_record("tokens.json")["strings"]:
        assert tokenizer.encode(record["text"]) == record["ids"]
        assert tokenizer.decode(record["ids"]) == record["decoded"]
        assert tokenizer.decode(record["ids"], skip_special=True) == record["decoded_skip"]


def test_ids_of_the_added_tokens(tokenizer: FlorenceTokenizer) -> None:
    assert len(ADDED_TOKENS) == 1024 == len(set(ADDED_TOKENS))
    assert [tokenizer.token_id(token) for token in ADDED_TOKENS] == list(range(50265, 51289))
    assert tokenizer.token_id("<loc_0>") == 50269 and tokenizer.token_id("<loc_999>") == 51268
    assert tokenizer.token_id("<loc_1000>") is None
    assert tokenizer.vocab_size == 51289


@pytest.mark.parametrize(
    "text", ["", " ", "a", "é日本🙂", "<loc_5> and </s>", "x" * 5000, "a\x00b", "\u2028", "👩‍👩‍👧"]
)
def test_any_text_survives(tokenizer: FlorenceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == f"<s>{text}</s>"


def test_pieces_are_the_texts_of_single_tokens(tokenizer: FlorenceTokenizer) -> None:
    ids = tokenizer.encode("a car<loc_7>日")
    assert tokenizer.token_texts(ids) == ["<s>", "a", " car", "<loc_7>", "�", "�", "</s>"]
    assert "".join(tokenizer.token_texts(tokenizer.encode("plain text"))) == "<s>plain text</s>"


def test_a_tokenizer_that_has_the_tokens_already_keeps_its_ids(tmp_path: Path, tokenizer: FlorenceTokenizer) -> None:
    save(tokenizer, "native", tmp_path)
    again = FlorenceTokenizer(tmp_path / "tokenizer.json")
    assert again.token_id("<loc_0>") == 50269 and again.token_id("<image>") == 51289 and again.vocab_size == 51290
    save(again, "microsoft", tmp_path)
    back = FlorenceTokenizer(tmp_path / "tokenizer.json")
    assert back.token_id("<image>") is None and back.vocab_size == 51289
    assert back.encode("<OD> a <mask> b") == tokenizer.encode("<OD> a <mask> b")


def test_names_of_the_parts_of_a_character(tokenizer: FlorenceTokenizer) -> None:
    parts = [tokenizer.id_to_token(id) for id in tokenizer.encode("🙂")[1:-1]]
    assert len(parts) > 1 and all(part and "\ufffd" not in part for part in parts)
    assert tokenizer.id_to_token(50269) == "<loc_0>" and tokenizer.id_to_token(99999) == "[99999]"


def test_padding_and_truncation_set_in_the_file_are_off(tmp_path: Path) -> None:
    values = json.loads((GOLDEN / "tokenizer.json").read_text())
    values["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    values["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    values["padding"] |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert len(FlorenceTokenizer(tmp_path / "tokenizer.json").encode("one two three four five six")) == 8


def test_unusable_files_get_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match="copy tokenizer.json from any Florence-2 checkpoint"):
        FlorenceTokenizer(path)
    path.write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        FlorenceTokenizer(path)
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(CheckpointError, match="too large"):
        FlorenceTokenizer(path)


def test_text_that_is_not_unicode_gets_a_sentence(tokenizer: FlorenceTokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        tokenizer.encode("a \udcff")


# ---- tokens of a model's own -----------------------------------------------------------------------------------------


def write(path: Path, added: Iterable[tuple[int, str]], keep: int = 50265, **model: Any) -> FlorenceTokenizer:
    """Write the recorded tokenizer with the added tokens below the id `keep` and others; read it."""
    values = json.loads((GOLDEN / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < keep]
    values["added_tokens"] += [{"id": id, "content": content, **flags} for id, content in added]
    values["model"]["vocab"] |= model.get("vocab", {})
    path.write_text(json.dumps(values))
    return FlorenceTokenizer(path)


def test_new_tokens_follow_all_others(tokenizer: FlorenceTokenizer, tmp_path: Path) -> None:
    """In both layouts, after native's <image> was left out and written again."""
    before = tokenizer.encode("a<near>")
    new = tokenizer.with_tokens(["<near>", "<far>"])
    assert [new.token_id(token) for token in (*ADDED_TOKENS, "<near>", "<far>")] == list(range(50265, 51291))
    assert new.encode("a <near>b<loc_3>") == [*new.encode("a ")[:-1], 51289, *new.encode("b<loc_3>")[1:]]
    assert new.decode(new.encode("a <near>b")) == "<s>a <near>b</s>" and new.decode([51289], skip_special=True) == ""
    assert tokenizer.encode("a<near>") == before and tokenizer.vocab_size == 51289 and tokenizer.own_tokens == ()
    save(new, "native", tmp_path)
    native = FlorenceTokenizer(tmp_path / "tokenizer.json")
    assert native.own_tokens == ("<near>", "<far>") and native.token_id("<image>") == 51291
    longer = native.with_tokens(["<between>"])
    assert longer.token_id("<between>") == 51291 and longer.token_id("<image>") is None
    save(longer, "microsoft", tmp_path)
    assert FlorenceTokenizer(tmp_path / "tokenizer.json").own_tokens == ("<near>", "<far>", "<between>")


@pytest.mark.release
def test_an_image_token_between_others_keeps_its_id(tmp_path: Path) -> None:
    """As transformers numbers tokens that are added to the native layout."""
    first = FlorenceTokenizer(GOLDEN / "tokenizer.json").token_id(ADDED_TOKENS[-1])
    tokenizer = write(tmp_path / "tokenizer.json", [(first + 1, "<image>"), (first + 2, "<near>")], keep=60000)
    save(tokenizer, "microsoft", tmp_path)
    again = FlorenceTokenizer(tmp_path / "tokenizer.json")
    for one in (tokenizer, again, again.with_tokens(["<far>"])):
        assert [one.token_id(name) for name in ("<image>", "<near>")] == [51289, 51290]


def test_own_tokens_of_a_file_without_the_published_ones(tmp_path: Path) -> None:
    """Loaded at the ids that the file states, whatever their order in it."""
    tokenizer = write(tmp_path / "tokenizer.json", [(51290, "<far>"), (51289, "<near>")])
    assert tokenizer.own_tokens == ("<near>", "<far>") and tokenizer.token_id("<loc_0>") == 50269


@pytest.mark.parametrize(
    ("added", "words"),
    keep(
        [0, 3],
        [
            (
                [(50265, "<near>")],
                "gives '<near>' the id 50265, but its place is 51289: a model's own tokens come after",
            ),
            ([(51290, "<near>")], "gives '<near>' the id 51290, but its place is 51289"),
            ([(51289, "<near>"), (51290, "<near>")], "adds the token '<near>' twice"),
            ([(50265, "<loc_1>"), (50266, "<loc_0>")], "lacks the token '<od>' and 1021 more"),
        ],
    ),
)
def test_ids_that_a_model_was_not_trained_with_are_refused(
    added: list[tuple[int, str]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / "tokenizer.json", added)


def test_two_tokens_of_one_id_are_refused(tmp_path: Path) -> None:
    ids = {token: 50265 + place for place, token in enumerate(ADDED_TOKENS)} | {"</od>": 50265}
    with pytest.raises(CheckpointError, match="gives '</od>' the id 50265, but its place is 50266"):
        write(tmp_path / "tokenizer.json", [(id, token) for token, id in ids.items()])


def test_the_rows_that_pad_a_table_have_no_text(tokenizer: FlorenceTokenizer) -> None:
    assert tokenizer.decode([713, 51289]) == tokenizer.decode([713])


def test_the_published_file_is_built_once_and_nothing_changes_it() -> None:
    one, other = FlorenceTokenizer(GOLDEN / "tokenizer.json"), FlorenceTokenizer(GOLDEN / "tokenizer.json")
    assert one._backend is other._backend
    size = other.vocab_size
    longer = one.with_tokens(["<own>"])
    one.to_files("native", 1024)
    assert longer.vocab_size == size + 1
    assert other.vocab_size == size and other.token_id("<own>") is None and other.token_id("<image>") is None
