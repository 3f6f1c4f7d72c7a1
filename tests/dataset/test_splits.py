"""Parts of a dataset: by the hash of the id, whatever else is in it."""

import pytest

from florence2.dataset.splits import choose_split, parse_split
from florence2.errors import OptionError


def test_shares_are_kept() -> None:
    shares = parse_split("train=0.7, val=0.2,test=.1")
    assert shares == {"train": 0.7, "val": 0.2, "test": 0.1}
    parts = [choose_split(f"{i}.jpg", shares) for i in range(5000)]
    for name, share in shares.items():
        assert parts.count(name) / 5000 == pytest.approx(share, abs=0.02)


def test_the_part_of_an_id_never_changes() -> None:
    """These are recorded: another hash would move images of datasets that exist from train to val."""
    shares = {"train": 0.5, "val": 0.5}
    assert [choose_split(f"{i}.jpg", shares) for i in range(8)] == "train train val val val train train val".split()
    assert choose_split("\ud800", shares) in shares and choose_split("a", {}) == ""
    assert choose_split("a", {"all": 1.0}) == "all"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", "has the part 'train'"),
        ("train=x,val=0.1", "has the part 'train=x'"),
        ("train=0.9,train=0.1", "has the part 'train=0.1'"),
        ("train=1,val=0", "has the part 'val=0'"),
        ("../x=1", "has the part '../x=1'"),
        ("train=nan", "has the part 'train=nan'"),
        ("train=0.9,val=0.2", "sum to 1.1; they must sum to 1"),
        ("", "has the part ''"),
    ],
)
def test_wrong_splits(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_split(text)
