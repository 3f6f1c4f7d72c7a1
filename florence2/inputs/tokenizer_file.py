"""Read `tokenizer.json` and refuse whatever would give a token another id than the model was trained with.

Every Florence-2 checkpoint has the same kind of tokenizer: BART's byte-level BPE between `<s>` and `</s>`, and after
its words the 1,024 published tokens in one order. A file that says anything else would load and then move every box, so
it is compared with that kind, not trusted. Nothing here needs the `tokenizers` library.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence2.errors import CheckpointError, clip, shown
from florence2.inputs.coordinates import NUM_BINS
from florence2.inputs.files import LFS_POINTER, lfs_problem

# The published vocabulary misspells region_to_desciption.
ADDED_TOKENS: tuple[str, ...] = (
    "<od>",
    "</od>",
    "<ocr>",
    "</ocr>",
    *(f"<loc_{bin}>" for bin in range(NUM_BINS)),
    *(f"<{slash}{name}>" for name in ("cap", "ncap", "dcap", "grounding", "seg") for slash in ("", "/")),
    "<sep>",
    *(f"<{slash}{name}>" for name in ("region_cap", "region_to_desciption", "proposal", "poly") for slash in ("", "/")),
    "<and>",
)
BEGIN, PADDING, END, UNKNOWN, MASK = BART_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MAX_FILE_BYTES = 32 << 20
"""The largest `tokenizer.json` that is read; the published one has 1.4 MB, and 3.7 MB as transformers 5 writes it."""

_REMEDY = "Copy tokenizer.json from the checkpoint that this one was made from."
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_PUBLISHED = frozenset(ADDED_TOKENS)
_KNOWN = frozenset((*BART_TOKENS, *ADDED_TOKENS))
# The settings of the BPE model that change ids; the last value is the usual one.
_MODEL: dict[str, tuple[Any, ...]] = {
    "type": (None, "BPE"),
    "dropout": (0, None),
    "unk_token": (None, UNKNOWN),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
# Byte-level BPE writes each byte as a character: printable ones of Latin-1 as themselves, the rest from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_ALPHABET = frozenset(map(chr, [*_PRINTABLE, *range(0x100, 0x200 - len(_PRINTABLE))]))
# Words that no merge makes: special tokens, and the entries that fill BART's vocabulary up to a round number.
_WHOLE = re.compile(r"<.*>|madeupword[0-9]{4}", re.DOTALL)
_KNOWN_FILES = frozenset(
    (
        "847bbeab6174d66a88898f729d52fa8d355fafe1bea101cf960dd404581df70e",
        "d5b1f07ff1d079dc06558420506c1b00b5b9b75450001bfafd9e8ea0d8faba08",
        "ab71353737671d3e83cab335e0639b3164175b92a1e26fb15ecdd88eacaa1f1d",
        "3ad7001f773409abe6bba33eac92662611a73d72f459bda2f00d2a221dd31ce4",
        "2d6ba35a9a3286b14f521864fee17176fc7d721b62237bed7bdcc90ee71ef338",
        "9de68cefef68bcb4d012ee715aa3b8716f642c87784e384c61a330cecab72047",
    )
)
"""The SHA-256 of each `tokenizer.json` that needs no check.

The published one and nano's, then each as this package writes it in Microsoft's and in the native layout.
"""
_KNOWN_VOCABULARIES = {
    "0808d0a4a0a026bc0bf22c2fbe402a792d6a443207dad143f345ada31376d6c7": (
        "0d67c742af60436bd1150c685f55271e78642a116acae08177e0887578af2a0a"
    ),
    "ed8d0a53955cb8ddf38917c8d67cfa471a9e26b3a6b1feb5b6c17b0092ff6da7": (
        "ecc805aad30909a0a3597a2f7fdefb331aa6a15e7c26879798fed6b5ab4f85df"
    ),
}
"""By the SHA-256 of the words in the order of their ids and the merges, that of the words in the order of their text.

Nothing else would show that two words have changed places: BART's, and those of nano.
"""


class _Misfit(Exception):
    """The end of a sentence, without its full stop, about something that does not fit Florence-2."""


def read_known_file(file: Path) -> str | None:
    """Return the text of a `tokenizer.json` that is the published one or nano's, byte for byte; None for another.

    The published one holds the words and BART's tokens alone; `ADDED_TOKENS` follow in their order.
    """
    content = _read(file)
    return content.decode() if hashlib.sha256(content).hexdigest() in _KNOWN_FILES else None


def read_tokenizer_file(file: Path) -> dict[str, Any]:
    """Read a `tokenizer.json`, and check all of it.

    Returns:
        Its values in the one form that Florence-2 has: the pipeline written out, the published tokens added if the file
        had none of them, all added tokens in the order of their ids.

    Raises:
        CheckpointError: The file is missing, larger than 32 MiB or malformed, or a token would not have the id, or a
            text not the ids, that a Florence-2 model was trained with.
    """
    values = _parse(file, _read(file))
    try:
        _check_pipeline(values)
        model = {name: values["model"].get(name) for name in ("vocab", "merges", *_MODEL)}
        _check_words(model["vocab"], model["merges"])
        added = _place_tokens(model["vocab"], _read_added(values.get("added_tokens", [])))
        _check_frame(values.get("post_processor"), added)
    except _Misfit as misfit:
        raise CheckpointError(f"{file} {misfit}. {_REMEDY}") from None
    return _written_out(model, added)


def _written_out(model: Mapping[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of a `tokenizer.json` of Florence-2 with these words, merges and added tokens."""
    ids = {token["content"]: token["id"] for token in added}
    spaces = {"add_prefix_space": False, "trim_offsets": True}
    frame = {"sep": [END, ids[END]], "cls": [BEGIN, ids[BEGIN]]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **spaces, "use_regex": True},
        "post_processor": {"type": "RobertaProcessing", **frame, **spaces},
        "decoder": {"type": "ByteLevel", **spaces, "use_regex": True},
        "model": {**model, "type": "BPE", "byte_fallback": False, "ignore_merges": False},
    }


def _special_token(id: int, content: str) -> dict[str, Any]:
    """Return the entry of a special token in `added_tokens`."""
    return {"id": id, "content": content, **_FLAGS, "lstrip": content == MASK, "special": True}


def _read(file: Path) -> bytes:
    """Read a file of at most `MAX_FILE_BYTES`."""
    try:
        size = file.stat().st_size
        content = b"" if size > MAX_FILE_BYTES else file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} does not exist; copy tokenizer.json from any Florence-2 checkpoint (they all share one)."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {clip(error)}.") from None
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB, too large for a tokenizer.")
    if content.startswith(LFS_POINTER):
        raise CheckpointError(lfs_problem(file))
    return content


def _parse(file: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that a file holds."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {clip(error)}.") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{file} cannot be read as a tokenizer: it holds no object with a 'model'.")
    return values


# ---- the pipeline ---------------------------------------------------------------------------------------------------


def _check_pipeline(values: Mapping[str, Any]) -> None:
    """Refuse every step that would cut or join text in another way. Padding and truncation are turned off instead."""
    if _steps(values.get("normalizer"), "normalizers"):
        raise _Misfit(f"has the normalizer {shown(values['normalizer'])}, which changes the text; Florence-2 has none")
    for key, items, fixed in (
        ("pre_tokenizer", "pretokenizers", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
        ("decoder", "decoders", {"type": "ByteLevel"}),
    ):
        steps = _steps(values.get(key), items)
        if len(steps) != 1 or any(steps[0].get(name, True) != value for name, value in fixed.items()):
            raise _Misfit(f"has the {key} {shown(values.get(key))}; Florence-2's is {fixed}")
    for name, allowed in _MODEL.items():
        if values["model"].get(name) not in allowed:
            raise _Misfit(
                f"has a model whose {name} is {shown(values['model'][name])}; Florence-2's is {allowed[-1]!r}"
            )


def _check_frame(post_processor: Any, added: list[dict[str, Any]]) -> None:
    """Refuse a post-processor that does not put `<s>` before a text and `</s>` after it."""
    ids = {token["content"]: token["id"] for token in added}
    try:
        frames = [_frame(step) for step in _steps(post_processor, "processors") if step.get("type") != "ByteLevel"]
    except (AttributeError, IndexError, KeyError, TypeError):
        frames = []
    if frames != [([ids[BEGIN]], [ids[END]])]:
        raise _Misfit(
            f"has the post_processor {shown(post_processor)}, which does not put a text between {BEGIN} and {END}, as "
            "every prompt needs"
        )


def _steps(part: Any, items: str) -> list[dict[str, Any]]:
    """Return the steps of a part of the pipeline: none, one, or those of a sequence."""
    steps = part.get(items) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    known = [step for step in steps if step is not None] if isinstance(steps, list) else [{}]
    return [step if isinstance(step, dict) else {} for step in known]


def _frame(step: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids that a post-processor puts before and after a text."""
    if step["type"] in ("RobertaProcessing", "BertProcessing"):
        return [step["cls"][1]], [step["sep"][1]]
    if step["type"] != "TemplateProcessing":
        raise KeyError(step["type"])
    before: list[int] = []
    after: list[int] = []
    ids = before
    for piece in step["single"]:
        if "Sequence" in piece:
            ids = after
        else:
            ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return before, after


# ---- the words ------------------------------------------------------------------------------------------------------


def _check_words(words: Any, merges: Any) -> None:
    """Refuse words without an id, bytes without a word, and words and merges that do not belong together."""
    if not isinstance(words, dict) or not isinstance(merges, list):
        raise _Misfit("cannot be read as a tokenizer: its model lacks a vocab or merges")
    wrong = next((word for word, id in words.items() if type(id) is not int or not 0 <= id < MAX_FILE_BYTES), None)
    if wrong is not None:
        raise _Misfit(f"gives {shown(wrong)} the id {shown(words[wrong])}, which is not a whole number of at least 0")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_word(part, words) for part in pair) for pair in pairs
    ):
        raise _Misfit("has a merge that does not join two words of its vocabulary")
    merged = [f"{left} {right}" for left, right in pairs]
    if _digest([*sorted(words, key=words.__getitem__), *merged]) in _KNOWN_VOCABULARIES:
        return
    made = {left + right for left, right in pairs}
    if not made <= words.keys() or len(set(merged)) != len(merged):
        raise _Misfit("has a merge that makes no word of its vocabulary, or occurs twice")
    missing = sorted(_ALPHABET - words.keys())
    if missing:
        raise _Misfit(f"lacks the word {missing[0]!r}, which stands for a byte, and {len(missing) - 1} more of the 256")
    unmade = [word for word in words if word not in made and word not in _ALPHABET and not _WHOLE.fullmatch(word)]
    if unmade:
        raise _Misfit(f"has no merge that makes the word {shown(unmade[0])}, nor {len(unmade) - 1} more of its words")
    if _digest(sorted(words)) in _KNOWN_VOCABULARIES.values():
        raise _Misfit("has the words of a known Florence-2 tokenizer, but with other ids or other merges")


def _is_word(part: Any, words: Mapping[str, int]) -> bool:
    return isinstance(part, str) and part in words


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode(errors="surrogatepass")).hexdigest()


# ---- the added tokens -----------------------------------------------------------------------------------------------


def _read_added(added: Any) -> dict[str, dict[str, Any]]:
    """Return the entries of `added_tokens` by content."""
    tokens: dict[str, dict[str, Any]] = {}
    for entry in added if isinstance(added, list) else [added]:
        values = entry if isinstance(entry, dict) else {}
        content, id = values.get("content"), values.get("id")
        if not isinstance(content, str) or not content or type(id) is not int:
            raise _Misfit(f"has the added token {shown(entry)}, without an id or content")
        flags = {key: values.get(key, False) for key in (*_FLAGS, "special")}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise _Misfit(f"has settings of the added token {shown(content)} that are neither true nor false")
        if content in tokens:
            raise _Misfit(f"adds the token {shown(content)} twice")
        tokens[content] = {"id": id, "content": content, **flags}
    return tokens


def _place_tokens(words: Mapping[str, int], added: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all added tokens in the order of their ids: those of BART, the published ones, then a model's own.

    Refuse any other order, because a model was trained with this one.
    """
    stated = {**words, **{content: token["id"] for content, token in added.items()}}
    moved = [content for content in added if words.get(content, stated[content]) != stated[content]]
    if moved:
        raise _Misfit(f"gives {moved[0]!r} two ids, {words[moved[0]]} and {shown(stated[moved[0]])}")
    absent = [token for token in (*BART_TOKENS, *ADDED_TOKENS) if token not in stated]
    if set(BART_TOKENS) & set(absent) or 0 < len(absent) < len(ADDED_TOKENS):
        raise _Misfit(f"lacks the token {absent[0]!r}" + f" and {len(absent) - 1} more" * (len(absent) > 1))
    plain = words.keys() - added.keys() - _PUBLISHED
    first = len(plain | set(BART_TOKENS))
    own = sorted((content for content in added if content not in _KNOWN), key=stated.__getitem__)
    order = [*sorted(plain | set(BART_TOKENS), key=stated.__getitem__), *ADDED_TOKENS, *own]
    for place, content in enumerate(order):
        if stated.get(content, place) != place:
            raise _Misfit(_moved(content, stated[content], place, first))
    special = [_special_token(stated[content], content) for content in BART_TOKENS]
    published = [_special_token(first + place, content) for place, content in enumerate(ADDED_TOKENS)]
    _check_flags(added)
    return sorted(special, key=lambda token: token["id"]) + published + [added[content] for content in own]


def _moved(content: str, id: int, place: int, first: int) -> str:
    """Return the end of a sentence about a token that does not have the id of its place."""
    text = f"gives {shown(content)} the id {shown(id)}, but its place is {place}"
    if content in _PUBLISHED:
        return f"{text}: the {len(ADDED_TOKENS)} published tokens have consecutive ids from {first} on, in one order"
    if place < first:
        return f"{text}: its words must have the ids 0 to {first - 1}, each once"
    return (
        f"{text}: a model's own tokens come after the published ones, which end with {ADDED_TOKENS[-1]} at "
        f"{first + len(ADDED_TOKENS) - 1}; add them with florence2.extend_vocabulary"
    )


def _check_flags(added: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a published token that takes the spaces around it, or is not found inside a text."""
    for content, token in added.items():
        wrong = [key for key in ("single_word", "lstrip", "rstrip") if token[key]]
        if content in _PUBLISHED and wrong:
            raise _Misfit(f"has {wrong[0]} set for {content}, with which it would be read in another way")
