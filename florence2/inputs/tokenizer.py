"""Convert text to ids and back: BART's byte-level BPE, plus the 1,024 tokens that Florence-2 adds.

The `tokenizers` library does the merging. The order of the added tokens decides their ids: they follow BART's 50,265
tokens, so `<loc_0>` is 50269 and `<loc_999>` is 51268.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from florence2.errors import CheckpointError, PromptError
from florence2.inputs.coordinates import NUM_BINS

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


class FlorenceTokenizer:
    """A checkpoint's tokenizer. Immutable; threads may share it."""

    def __init__(self, file: Path):
        """Read a tokenizer.

        Args:
            file: The path of a `tokenizer.json`.

        Raises:
            CheckpointError: The file is missing, larger than 256 MiB, or not a tokenizer.
        """
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise CheckpointError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB, too large for a tokenizer.")
            self._backend = Tokenizer.from_file(str(file))
        except FileNotFoundError:
            raise CheckpointError(
                f"{file} does not exist; copy tokenizer.json from any Florence-2 checkpoint (they all share one)."
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001  the library raises a bare Exception for malformed files
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}.") from None
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS])

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
        native.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
        native.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "BartTokenizer",
            "model_max_length": max_length,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def save_microsoft(self, folder: Path, max_length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` in Microsoft's layout.

        The image placeholder is left out, because the layout's model has no embedding for it.

        Args:
            folder: Where to write the files; it must exist.
            max_length: The number of the model's positions.
        """
        values = json.loads(self._backend.to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE_TOKEN]
        (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        settings = {"model_max_length": max_length}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
