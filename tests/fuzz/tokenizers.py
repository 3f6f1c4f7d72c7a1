"""Tokenizers with spoilt ids, vocabularies, parts and bytes: what is accepted gives the ids that the model knows."""

import json
from pathlib import Path
from random import Random
from typing import Any

import florence2
from florence2.inputs.tokenizer import ADDED_TOKENS
from tests.fuzz import material, values
from tests.fuzz.answers import check_answer
from tests.fuzz.worker import expect

_TEXTS = (
    "",
    "a red circle",
    "Zürich  ist\nschön!",
    "<loc_0><loc_999>cat<sep>",
    " lead",
    "What does the image describe?",
)
_TOKENIZER_PARTS = {
    "normalizer": (
        {"type": "Lowercase"},
        {"type": "NFKC"},
        {"type": "Prepend", "prepend": ""},
        {"type": "Prepend", "prepend": "x"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    ),
    "pre_tokenizer": (
        None,
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        {"type": "Split", "pattern": {"Regex": "((a|b)+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True},
    ),
    "post_processor": (
        None,
        {
            "type": "RobertaProcessing",
            "sep": ["</s>", 2000],
            "cls": ["<s>", 0],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        {
            "type": "RobertaProcessing",
            "sep": ["</s>", 0],
            "cls": ["<s>", 2],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
    "decoder": (
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Fuse"},
    ),
    "truncation": (
        {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        {"direction": "Left", "max_length": 0, "strategy": "OnlyFirst", "stride": 9},
    ),
    "padding": (
        {
            "strategy": {"Fixed": 20},
            "direction": "Left",
            "pad_to_multiple_of": 8,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
        {
            "strategy": {"Fixed": 1 << 40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    ),
}
_MODEL_PARTS = {
    "dropout": (0.5, 1.0, 0.0, 2),
    "unk_token": ("<unk>", "cat", None),
    "continuing_subword_prefix": ("##", "", None),
    "end_of_word_suffix": ("</w>", "", None),
    "fuse_unk": (True,),
    "byte_fallback": (True,),
    "ignore_merges": (True,),
    "type": ("WordPiece", "Unigram", "WordLevel", "BPE", None),
    "vocab": ({}, {"a": 0}, None),
}


def draw(random: Random) -> bytes:
    """The bytes of tokenizer.json."""
    tokenizer = material.json_of("tokenizer.json")
    kind = random.randrange(7)
    if kind == 0:
        part = random.choice(list(_TOKENIZER_PARTS))
        tokenizer[part] = random.choice(_TOKENIZER_PARTS[part])
    elif kind == 1:
        part = random.choice(list(_MODEL_PARTS))
        tokenizer["model"][part] = random.choice(_MODEL_PARTS[part])
    elif kind == 2:
        _change_added(random, tokenizer["added_tokens"])
    elif kind == 3:
        _change_vocabulary(random, tokenizer["model"]["vocab"])
    elif kind == 4:
        del tokenizer["model"]["merges"], tokenizer["model"]["vocab"]  # few paths lead into what is left
        tokenizer = values.change_json(random, tokenizer)
        original = material.json_of("tokenizer.json")["model"]
        if isinstance(tokenizer, dict) and isinstance(tokenizer.get("model"), dict):
            tokenizer["model"] = {**{key: original[key] for key in ("merges", "vocab")}, **tokenizer["model"]}
    elif kind == 5:
        return values.to_json(random, tokenizer)
    else:
        return values.change_bytes(random, material.original("tokenizer.json"), 2000)
    return json.dumps(tokenizer, ensure_ascii=False).encode("utf-8", "replace")


def _change_added(random: Random, added: list[dict[str, Any]]) -> None:
    i, j = random.randrange(len(added)), random.randrange(len(added))
    kind = random.randrange(7)
    if kind == 0:
        del added[i]
    elif kind == 1:
        added[i]["content"], added[j]["content"] = added[j]["content"], added[i]["content"]
    elif kind == 2:
        added.insert(j, dict(added[i]))
    elif kind == 3:
        added[i]["id"] = random.choice((added[j]["id"], -1, 2**31, 1631, 5000))
    elif kind == 4:
        added[i]["content"] = random.choice((values.text(random), "<loc_1000>", "a", "", "<IMAGE>"))
    elif kind == 5:
        added[i][random.choice(("normalized", "lstrip", "rstrip", "single_word", "special"))] ^= True
    else:
        added.append({**added[i], "id": len(added) * 2, "content": random.choice(("<extra>", "a", " ", "<loc_1000>"))})


def _change_vocabulary(random: Random, vocabulary: dict[str, int]) -> None:
    """Ids twice, missing, negative or far beyond; not two words exchanged, which nobody can see."""
    names = list(vocabulary)
    kind = random.randrange(4)
    if kind == 0:
        for name in random.sample(names, random.choice((1, 20))):
            vocabulary[name] = vocabulary[random.choice(names)]
    elif kind == 1:
        vocabulary[random.choice(names)] = random.choice((2**31, 10_000, 1700))
    elif kind == 2:
        del vocabulary[random.choice(("<s>", "</s>", "<pad>", "<unk>", "a", "Ġ", random.choice(names)))]
    else:
        for name in names:
            vocabulary[name] += 1


def check(case: bytes, place: Path) -> None:
    folder = material.copy(place / "model")
    material.put(folder / "tokenizer.json", case)
    f = florence2.load(folder, device="cpu")
    _check_ids(f, case)
    check_answer(f.run("<OD>", material.drawing(1), num_beams=1, max_new_tokens=4), f)


def _check_ids(f: florence2.Florence2, spoilt: bytes) -> None:
    """The tokens that the model was trained with keep their ids, and texts too where the vocabulary is the same."""
    tokenizer, right = f.processor.tokenizer, material.model().processor.tokenizer
    for token in ("<s>", "<pad>", "</s>", *ADDED_TOKENS):
        expect(tokenizer.token_id(token) == right.token_id(token), f"{token} has the id {tokenizer.token_id(token)}")
        ids = tokenizer.encode(token)
        expect(ids == [0, right.token_id(token), 2], f"{token} becomes {ids}")
    model = json.loads(spoilt).get("model", {})
    before = material.json_of("tokenizer.json")["model"]
    for text in _TEXTS:
        ids = tokenizer.encode(text)
        expect(all(0 <= id < 1631 for id in ids) and ids[0] == 0 and ids[-1] == 2, f"{text!r} becomes {ids}")
        expect(tokenizer.decode(ids[1:-1]) == text, f"{text!r} is read back as {tokenizer.decode(ids[1:-1])!r}")
        if (model.get("vocab"), model.get("merges")) == (before["vocab"], before["merges"]):
            expect(ids == right.encode(text), f"{text!r} becomes {ids}, not {right.encode(text)}")
