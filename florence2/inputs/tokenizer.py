"""Convert text to ids and back: BART's byte-level BPE, plus the 1,024 tokens that Florence-2 adds.

The `tokenizers` library does the merging. The order of the added tokens decides their ids: they follow BART's 50,265
tokens, so `<loc_0>` is 50269 and `<loc_999>` is 51268. Tokens that a fine-tuned model adds follow these.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from florence2.errors import CheckpointError, PromptError, shown
from florence2.inputs.coordinates import LOCATION, NUM_BINS

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
IMAGE_TOKEN = "<image>"
"""The placeholder for image tokens. Only tokenizers of the native layout have it."""
MAX_FILE_BYTES = 256 << 20
_BART_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_NEW_TOKEN = re.compile(r"<[^<>\s]+>")
_KNOWN = frozenset((*_BART_TOKENS, *ADDED_TOKENS))


class FlorenceTokenizer:
    """A checkpoint's tokenizer. Immutable; threads may share it."""

    def __init__(self, file: Path):
        """Read a tokenizer.

        Args:
            file: The path of a `tokenizer.json`.

        Raises:
            CheckpointError: The file is missing, larger than 256 MiB, or not a tokenizer, or it gives a token another
                id than the model has been trained with.
        """
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise CheckpointError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB, too large for a tokenizer.")
            self._backend = _read_backend(file)
        except FileNotFoundError:
            raise CheckpointError(
                f"{file} does not exist; copy tokenizer.json from any Florence-2 checkpoint (they all share one)."
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001  the library raises a bare Exception for malformed files
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}.") from None
        if problem := _misplaced(self._backend):
            raise CheckpointError(f"{file} {problem}")

    def with_tokens(self, tokens: Sequence[str]) -> "FlorenceTokenizer":
        """Return another tokenizer that has more special tokens. All other tokens keep their ids.

        The ids of the new ones follow all existing ids. The placeholder `<image>` of the native layout, which this
        package never uses and which must come last, is left out; `save_native` writes it again, after the new tokens.

        Args:
            tokens: Names such as "<depth_0>": angle brackets around anything but angle brackets and white space, so
                that no other token and no ordinary text contains one.

        Raises:
            PromptError: There is nothing to add, or a name is malformed, exists already, occurs twice, or would not be
                read back.
        """
        names = [tokens] if isinstance(tokens, str) or not isinstance(tokens, Iterable) else list(tokens)
        problems = _unusable(names) or [f"{name!r} exists already" for name in names if self.token_id(name) is not None]
        if problems:
            raise PromptError(f"The vocabulary cannot be extended: {'; '.join(problems)}.")
        longer: FlorenceTokenizer = object.__new__(type(self))
        longer._backend = _rebuild(self._to_json(without_last_image=True))
        longer._backend.add_special_tokens([_special(name) for name in names])
        for name in names:
            ids = longer.encode(f"a{name}b")[1:-1]
            if longer.token_id(name) not in ids or longer.decode(ids) != f"a{name}b":
                raise PromptError(f"{name!r} would not be read back as it is written; use letters a to z and digits.")
        return longer

    @property
    def own_tokens(self) -> tuple[str, ...]:
        """The added tokens that the published tokenizer does not have, in the order of their ids."""
        added = self._backend.get_added_tokens_decoder()
        names = [added[id].content for id in sorted(added)]
        return tuple(name for name in names if name not in _KNOWN and name != IMAGE_TOKEN)

    @property
    def vocab_size(self) -> int:
        """The number of tokens including the added ones; the largest id is one less."""
        return max(self._backend.get_vocab().values()) + 1

    def token_id(self, token: str) -> int | None:
        """Return the id of a token.

        Args:
            token: The token's exact name in the vocabulary, such as "<loc_0>".

        Returns:
            The id, or None if the vocabulary does not have the token.
        """
        id: int | None = self._backend.token_to_id(token)
        return id

    def encode(self, text: str) -> list[int]:
        """Convert text to ids.

        Args:
            text: Any text. Added tokens in it, such as `<loc_5>`, become their own ids.

        Returns:
            The ids, with `<s>` first and `</s>` last.

        Raises:
            PromptError: The text contains surrogates. Python makes them from file names and arguments that are not
                valid Unicode.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise PromptError(f"The text {ascii(text)[:80]} is not valid Unicode; write it as UTF-8.")
        return list(self._backend.encode(text).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Convert ids to text.

        Args:
            ids: Token ids.
            skip_special: Leave out special tokens and all added ones: `<s>`, `<loc_5>` and so on.

        Returns:
            The text; bytes that are not valid UTF-8 become U+FFFD.
        """
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Convert each id to text on its own.

        Args:
            ids: Token ids.

        Returns:
            One text for each id. A token that is only a part of a character becomes U+FFFD, as in the reference.
        """
        return [self.decode([token]) for token in ids]

    def id_to_token(self, id: int) -> str:
        """Return a token's name in the vocabulary, which also distinguishes parts of a character.

        Args:
            id: A token id.

        Returns:
            The name, such as "Ġcar" for " car"; "[99999]" for an id outside the vocabulary.
        """
        token: str | None = self._backend.id_to_token(id)
        return f"[{id}]" if token is None else token

    def save_native(self, folder: Path, max_length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` for the Florence-2 processor of transformers.

        All added tokens and the image placeholder are in `tokenizer.json`.

        Args:
            folder: Where to write the files; it must exist.
            max_length: The number of the model's positions.
        """
        native = Tokenizer.from_str(self._backend.to_str())
        native.add_special_tokens([_special(IMAGE_TOKEN)])
        native.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "BartTokenizer",
            "model_max_length": max_length,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def save_microsoft(self, folder: Path, max_length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` in Microsoft's layout.

        The image placeholder is left out, because the layout's model has no embedding for it, unless other tokens
        follow it: they keep their ids.

        Args:
            folder: Where to write the files; it must exist.
            max_length: The number of the model's positions.
        """
        values = self._to_json(without_last_image=True)
        (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        settings = {"model_max_length": max_length}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def _to_json(self, without_last_image: bool) -> dict[str, Any]:
        """Return the values of `tokenizer.json`."""
        values: dict[str, Any] = json.loads(self._backend.to_str())
        if without_last_image and self.token_id(IMAGE_TOKEN) == self.vocab_size - 1:
            values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE_TOKEN]
        return values


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _unusable(names: Sequence[Any]) -> list[str]:
    """Return a sentence, without its full stop, for each name that cannot become a token."""
    if not names or not all(isinstance(name, str) for name in names):
        return [f"give a list of names, not {shown(names)}"]
    problems = []
    for name in dict.fromkeys(names):
        if not _NEW_TOKEN.fullmatch(name) or not name.isprintable():
            problems.append(
                f"{shown(name)} must be a name in angle brackets, such as '<depth_0>', without white space or further "
                "brackets, or it would split other text"
            )
        elif LOCATION.fullmatch(name) or name == IMAGE_TOKEN:
            problems.append(f"{name!r} has a meaning of its own in Florence-2; choose another name")
        elif names.count(name) > 1:
            problems.append(f"{name!r} occurs {names.count(name)} times")
    return problems


def _read_backend(file: Path) -> Tokenizer:
    """Read `tokenizer.json` and add the published tokens that it lacks."""
    backend = _prepared(Tokenizer.from_file(str(file)))
    added = backend.get_added_tokens_decoder()
    unknown = {id: token.content for id, token in added.items() if token.content not in _KNOWN}
    if unknown and unknown != {max(added): IMAGE_TOKEN}:
        values = json.loads(file.read_text(encoding="utf-8"))
        if min(unknown) < max(_published_ids(backend)) or _find_moved(backend, values):
            # the library numbers added tokens in the order of the file, so those that are not published must wait
            backend = _rebuild(values)
        if moved := _find_moved(backend, values):
            raise CheckpointError(
                f"{file} gives {moved['content']!r} the id {moved['id']}, but its place is "
                f"{backend.token_to_id(moved['content'])}: a model's own tokens come after the published ones, which "
                f"end with {ADDED_TOKENS[-1]} at {backend.token_to_id(ADDED_TOKENS[-1])}; add them with "
                "florence2.extend_vocabulary."
            )
    return backend


def _prepared(backend: Tokenizer) -> Tokenizer:
    """Turn off what a file may have turned on, and add the published tokens."""
    backend.no_padding()
    backend.no_truncation()
    backend.add_special_tokens([_special(token) for token in ADDED_TOKENS])
    return backend


def _rebuild(values: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer of a `tokenizer.json`, its own added tokens after the published ones, by their ids."""
    added = sorted(values["added_tokens"], key=lambda token: token["id"])
    own = [token for token in added if token["content"] not in _KNOWN]
    known = [token for token in added if token["content"] in _KNOWN]
    backend = _prepared(Tokenizer.from_str(json.dumps({**values, "added_tokens": known}, ensure_ascii=False)))
    for token in own:
        flags = {key: value for key, value in token.items() if key not in ("id", "content", "special")}
        add = backend.add_special_tokens if token["special"] else backend.add_tokens
        add([AddedToken(token["content"], special=token["special"], **flags)])
    return backend


def _find_moved(backend: Tokenizer, values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first added token of a file whose id is not the one that the file states."""
    return next(
        (token for token in values["added_tokens"] if backend.token_to_id(token["content"]) != token["id"]), None
    )


def _published_ids(backend: Tokenizer) -> list[int]:
    """Return the ids of `ADDED_TOKENS`, which `_prepared` has added."""
    ids = [backend.token_to_id(token) for token in ADDED_TOKENS]
    return [id for id in ids if id is not None]


def _misplaced(backend: Tokenizer) -> str | None:
    """Return the end of a sentence when a published token lacks an id of its own, or the locations are not in order."""
    remedy = "copy tokenizer.json from any Florence-2 checkpoint."
    ids, start = _published_ids(backend), ADDED_TOKENS.index("<loc_0>")
    for bin, id in enumerate(ids[start : start + NUM_BINS]):
        if id != ids[start] + bin:
            return (
                f"gives <loc_{bin}> the id {id}, not {ids[start] + bin}: the ids of <loc_0> to <loc_{NUM_BINS - 1}> "
                f"must be consecutive; {remedy}"
            )
    return None if len(set(ids)) == len(ids) else f"gives one id to several of the published tokens; {remedy}"
