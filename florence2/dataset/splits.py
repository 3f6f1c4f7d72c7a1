"""Parts of a dataset, such as train and val, by the hash of the id: an image stays in its part when more are added."""

import hashlib
import math
import re
from collections.abc import Mapping

from florence2.errors import OptionError, shown

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")
EXAMPLE = "train=0.9,val=0.1"


def parse_split(text: str) -> dict[str, float]:
    """Return the shares of a split, such as {"train": 0.9, "val": 0.1}. Raises OptionError."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not equals or not _NAME.fullmatch(name) or not 0 < share <= 1 or name in shares:
            raise OptionError(
                f"--split has the part {shown(part)}; give each part once, with a name of letters and digits and a "
                f"share up to 1, such as {EXAMPLE}."
            )
        shares[name] = share
    if abs(total := sum(shares.values()) - 1) > 1e-6:
        raise OptionError(f"The shares of --split sum to {total + 1:g}; they must sum to 1, such as {EXAMPLE}.")
    return shares


def choose_split(id_: str, shares: Mapping[str, float]) -> str:
    """Return the part to which an image belongs; "" without shares. It depends on the id and on the shares alone."""
    if not shares:
        return ""
    digest = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()
    place, total = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name, share in shares.items():
        total += share
        if place < total:
            return name
    return name
