"""The images of tars and tables against webdataset and datasets, which read the same files."""

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import webdataset

from florence2.label.sources.opening import open_sources
from parity.recipe import make_picture

# webdataset leaves the files open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def encode(number: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    make_picture(number, 6 + number, 5).save(buffer, format=form)
    return buffer.getvalue()


def read(*paths: Path, **options: Any) -> list[tuple[str | None, Any]]:
    return [(item.source.id, item.source.content()) for item in open_sources([str(path) for path in paths], **options)]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two shards by WebDataset's own writer."""
    with webdataset.ShardWriter(f"{tmp_path}/%05d.tar", maxcount=3, verbose=0) as writer:
        for number in range(5):
            image = {"webp": encode(number, "WEBP"), "png": encode(number + 20)}
            writer.write(
                {"__key__": f"deep/{number:04}", **image, "json": {"n": number}, "mask.png": encode(number + 5)}
            )
    return sorted(tmp_path.glob("*.tar"))


def samples_of(*paths: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False))


def test_keys_and_images_in_the_order_of_webdataset(shards: list[Path]) -> None:
    expected = []
    for shard in shards:
        for sample in samples_of(shard):
            first, *further = [name for name in sample if name.endswith(("png", "webp"))]
            expected.append((f"{shard.stem}/{sample['__key__']}", sample[first]))
            expected += [(f"{shard.stem}/{sample['__key__']}.{name}", sample[name]) for name in further]
    assert read(*shards) == expected and len(expected) == 15
    masks = [
        (f"{shard.stem}/{sample['__key__']}", sample["mask.png"]) for shard in shards for sample in samples_of(shard)
    ]
    assert read(*shards, image_column="mask.png") == masks


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_seldom(tmp_path: Path, form: int) -> None:
    names = [
        "./a.b.png",
        ".png",
        "x/.y.png",
        "__meta__/a.png",
        "__x__",
        "a.PNG",
        "ü/ß.png",
        "a b/c d.e.png",
        "/a/b.png",
    ]
    names += [f"{'d' * 120}/{'f' * 90}.png"] + (
        [] if form == tarfile.USTAR_FORMAT else [f"{'é' * 150}/{'g' * 200}.png"]
    )
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(encode(number))
            tar.addfile(info, io.BytesIO(encode(number)))
    samples = samples_of(tmp_path / "x.tar")
    expected = [(sample["__key__"], sample[name]) for sample in samples for name in sample if name.endswith("png")]
    assert read(tmp_path / "x.tar") == expected and len(expected) == len(names) - 3


def test_tables_by_datasets(tmp_path: Path) -> None:
    encoded = [{"bytes": encode(number), "path": None} for number in range(7)]
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": encoded, "name": list("abcdefg")}, features=features)
    table.to_parquet(tmp_path / "x.parquet", batch_size=3)
    back = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train", cache_dir=tmp_path)
    raw = back.cast_column("image", datasets.Image(decode=False))
    assert read(tmp_path / "x.parquet", id_column="name") == [(row["name"], row["image"]["bytes"]) for row in raw]
    assert len(back) == 7 and back[3]["image"].size == (9, 5)


def test_shards_as_datasets_reads_them(shards: list[Path]) -> None:
    rows = datasets.load_dataset("webdataset", data_files=str(shards[0]), split="train", streaming=True)
    keys = [row["__key__"] for row in rows.select_columns(["__key__"])]
    assert [id for id, _ in read(shards[0], image_column="png")] == keys
