"""Convert text to ids and back: BART's byte-level BPE, plus the 1,024 tokens that Florence-2 adds.

The `tokenizers` library does the merging. The order of the added tokens decides their ids: they follow BART's 50,265
tokens, so `<loc_0>` is 50269 and `<loc_999>` is 51268. Tokens that a fine-tuned model adds follow these.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from florence2.errors import CheckpointError, Florence2Error, PromptError, shown
from florence2.inputs.coordinates import LOCATION
from florence2.inputs.tokenizer_file import ADDED_TOKENS as ADDED_TOKENS
from florence2.inputs.tokenizer_file import BART_TOKENS, read_known_file, read_tokenizer_file

IMAGE_TOKEN = "<image>"
"""The placeholder for image tokens. Only tokenizers of the native layout have it."""
_NEW_TOKEN = re.compile(r"<[^<>\s]+>")
_KNOWN = frozenset((*BART_TOKENS, *ADDED_TOKENS))


class FlorenceTokenizer:
    """A checkpoint's tokenizer. Immutable; threads may share it."""

    def __init__(self, file: Path):
        """Read a tokenizer.

        Args:
            file: The path of a `tokenizer.json`.

        Raises:
            CheckpointError: The file is missing, larger than 32 MiB or malformed, or it gives a token another id than a
                Florence-2 model was trained with.
        """
        known = read_known_file(file)
        self._backend = _build(read_tokenizer_file(file), file) if known is None else _build_known(known)

    def with_tokens(self, tokens: Sequence[str]) -> "FlorenceTokenizer":
        """Return another tokenizer that has more special tokens. All other tokens keep their ids.

        The ids of the new ones follow all existing ids. The placeholder `<image>` of the native layout, which this
        package never uses and which must come last, is left out; `to_files` writes it again, after the new tokens.

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
        longer = _with_backend(_copy(self.without_image_token()._backend))
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

    @cached_property
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
        with _library_errors(PromptError, f"The text {shown(text)} cannot be converted to ids"):
            return list(self._backend.encode(text).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Convert ids to text.

        Args:
            ids: Token ids.
            skip_special: Leave out special tokens and all added ones: `<s>`, `<loc_5>` and so on.

        Returns:
            The text; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            PromptError: `ids` holds something that cannot be an id; an id beyond the tokens has no text.
        """
        with _library_errors(PromptError, f"The ids {shown(ids)} cannot be converted to text"):
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

    def to_files(self, layout: str, max_length: int) -> dict[str, str]:
        """Return the texts of `tokenizer.json` and `tokenizer_config.json`, by name.

        Args:
            layout: "native" for the Florence-2 processor of transformers, with the image placeholder as the last token.
                "microsoft" leaves that out, because this layout's model has no embedding for it, unless other tokens
                follow it: they keep their ids.
            max_length: The number of the model's positions.
        """
        settings: dict[str, Any] = {"model_max_length": max_length}
        backend = self._with_image_token() if layout == "native" else self.without_image_token()._backend
        if layout == "native":
            settings["tokenizer_class"] = "BartTokenizer"
            settings["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}
        return {
            "tokenizer.json": backend.to_str(pretty=layout == "native"),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }

    def _with_image_token(self) -> Tokenizer:
        """Return the library's tokenizer with the placeholder `<image>` as the last token."""
        if self._backend.get_added_tokens_decoder().get(self.vocab_size - 1) == _special(IMAGE_TOKEN):
            return self._backend
        backend = _copy(self.without_image_token()._backend)
        backend.add_special_tokens([_special(IMAGE_TOKEN)])
        return backend

    def without_image_token(self) -> "FlorenceTokenizer":
        """Return a tokenizer without the placeholder `<image>`, if that is the last token."""
        if self.token_id(IMAGE_TOKEN) != self.vocab_size - 1:
            return self
        values: dict[str, Any] = json.loads(self._backend.to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE_TOKEN]
        return _with_backend(_build(values))


def _with_backend(backend: Tokenizer) -> FlorenceTokenizer:
    tokenizer: FlorenceTokenizer = object.__new__(FlorenceTokenizer)
    tokenizer._backend = backend
    return tokenizer


def _copy(backend: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(backend.to_str())


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


def _build(values: dict[str, Any], file: Path | str = "The tokenizer") -> Tokenizer:
    """Build the library's tokenizer from the values of a `tokenizer.json`, and check that it took every id."""
    with _library_errors(CheckpointError, f"{file} cannot be read as a tokenizer"):
        backend = Tokenizer.from_str(json.dumps(values))
    for token in values["added_tokens"]:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(f"{file} cannot be read: {token['content']!r} would not get the id {token['id']}.")
    return backend


@lru_cache(maxsize=1)  # it takes most of the time of loading a small model, and nothing changes it
def _build_known(text: str) -> Tokenizer:
    """Build the library's tokenizer from the text of a known file, which is right: checking it takes longer."""
    backend = Tokenizer.from_str(text)
    if backend.token_to_id(ADDED_TOKENS[0]) is None:
        backend.add_special_tokens([_special(name) for name in ADDED_TOKENS])
    return backend


@contextmanager
def _library_errors(error: type[Florence2Error], failure: str) -> Iterator[None]:
    """Turn whatever the library raises into one sentence; a panic of its Rust code is not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as reason:  # noqa: BLE001
        raise error(f"{failure}: {reason}.") from None
