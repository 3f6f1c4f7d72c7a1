"""Text <-> ids: BART's byte-level BPE from `tokenizer.json`, plus the 1,024 tokens that Florence-2 adds.

The merging itself is the `tokenizers` library's. What is Florence-2's own is the list of added tokens and its
order, which decides their ids: with BART's 50,265 tokens below them, `<loc_0>` is 50269 and `<loc_999>` 51268.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from florence2.errors import CheckpointError, PromptError
from florence2.inputs.coordinates import NUM_BINS

# The misspelt region_to_desciption is the published vocabulary's.
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
"""The native layout's placeholder for image tokens, the one token more that its tokenizers have."""
MAX_FILE_BYTES = 256 << 20


class FlorenceTokenizer:
    """A checkpoint's tokenizer. Immutable after construction; may be shared between threads."""

    def __init__(self, file: Path):
        """Read `tokenizer.json`. Raises CheckpointError when it is absent, too large, or not a tokenizer."""
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
        """The number of tokens, the added ones included: every id is below it in a checkpoint as published."""
        return max(self._backend.get_vocab().values()) + 1

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact name, such as "<loc_0>"; None when there is no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Text -> ids with `<s>` before and `</s>` behind. Added tokens in the text become their own ids.

        Raises PromptError for text with surrogates, which is what Python makes of bytes that are no Unicode.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise PromptError(f"The text {ascii(text)[:80]} holds bytes that are no Unicode; write it as UTF-8.")
        return list(self._backend.encode(text).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves out `<s>`, `<loc_5>` and such."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id on its own.

        Where one character is spread over several tokens, each of them gives U+FFFD, as in the reference.
        """
        return [self.decode([token]) for token in ids]

    def name(self, id: int) -> str:
        """What the vocabulary calls a token, which shows the parts of a character too; "[id]" for an id beyond it."""
        found: str | None = self._backend.id_to_token(id)
        return f"[{id}]" if found is None else found

    def save_native(self, folder: Path, max_length: int) -> None:
        """Write the tokenizer as transformers' own Florence-2 processor expects it: all tokens in `tokenizer.json`,
        the image placeholder among them; `max_length` is the number of the model's positions."""
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
        """Write the tokenizer without the image placeholder, for which Microsoft's layout has no embedding."""
        values = json.loads(self._backend.to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE_TOKEN]
        (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        settings = {"model_max_length": max_length}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
