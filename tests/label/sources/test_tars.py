"""Tars by `tarfile`: the images and keys in them, and what hostile ones cost."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from florence2.errors import ImageError
from florence2.inputs.image import open_image
from florence2.label.sources import tars
from florence2.label.sources.item import Item
from florence2.label.sources.opening import open_sources
from tests.label.sources.conftest import PackTar, measured

Png = Callable[[int], bytes]


def items(*paths: Path, **options) -> list[Item]:
    return list(open_sources([str(path) for path in paths], **options))


def ids(*paths: Path, **options) -> list[str | None]:
    return [item.source.id for item in items(*paths, **options)]


def info(name: str, kind: bytes, **values) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for attribute, value in values.items():
        setattr(info, attribute, value)
    return info


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_their_keys(pack: PackTar, png: Png, form: int) -> None:
    deep = f"{'d' * 90}/{'e' * 60}"
    members = {
        "a.jpg": png(1),
        "a.json": b"{}",
        "a.mask.PNG": png(2),
        "notes.txt": b"x",
        "./sub/b.c.png": png(3),
        f"{deep}.png": png(4),
        ".hidden.png": b"",
        "__meta__/x.png": b"",
        "without": b"",
    }
    if form != tarfile.USTAR_FORMAT:
        members[f"ünï/{'n' * 300}.png"] = png(5)
    path = pack("x.tar", members, format=form)
    found = items(path)
    keys = ["a", "a.mask.PNG", "./sub/b", deep, f"ünï/{'n' * 300}"]
    assert [item.source.id for item in found] == keys[: len(found)] and len(found) >= 4
    assert [item.source.content() for item in found] == [png(number) for number in range(1, len(found) + 1)]
    assert found[1].source.place == f"{path}::a.mask.PNG" and found[1].source.name == f"{path}::a.mask.PNG"
    assert all(item.questions is None and item.error is None for item in found)
    assert items(path) == found


def test_extensions_choose_members(pack: PackTar, png: Png) -> None:
    path = pack("x.tar", {"a.left.png": png(1), "a.right.png": png(2), "b.jpg": png(3), "b.left.png": png(4)})
    assert ids(path, image_column="right.png") == ["a"]
    assert ids(path, image_column="left.PNG;jpg") == ["a", "b", "b.left.png"]
    (item,) = items(path, image_column="webp")
    assert item.error == f"{path} holds no member with the extension webp."


def test_several_tars_have_ids_of_their_own(pack: PackTar, png: Png) -> None:
    one, two = pack("00000.tar", {"k.png": png(1)}), pack("00001.tar", {"k.png": png(2), "k.jpg": png(3)})
    assert ids(one, two) == ["00000/k", "00001/k", "00001/k.jpg"]
    pattern = one.with_name("{00000..00001}.tar")
    assert ids(pattern) == ids(one, two) == ids(one.with_name("*.tar"))
    assert ids(pattern, shard=(2, 2)) == ["00001/k", "00001/k.jpg"] and ids(pattern, shard=(3, 3)) == []


def test_a_single_tar_is_split_by_its_images(pack: PackTar, png: Png) -> None:
    path = pack("x.tar", [(f"{number}.png", png(number)) for number in range(5)] + [("1.jpg", png(5))])
    assert [ids(path, shard=(part, 2)) for part in (1, 2)] == [["0", "2", "4"], ["1", "3", "1-2"]]


def test_names_that_repeat_are_numbered(pack: PackTar, png: Png) -> None:
    path = pack("x.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3)), ("a.png", png(4))])
    found = items(path)
    assert [item.source.id for item in found] == ["a", "b", "a-2", "a.png"]
    assert len({item.source.place for item in found}) == 4
    assert [item.source.content() for item in found] == [png(number) for number in (1, 2, 3, 4)]


def test_names_that_lead_elsewhere_are_only_names(pack: PackTar, png: Png, tmp_path: Path) -> None:
    path = pack("x.tar", {"../up.png": png(1), "/etc/root.png": png(2), "a/../../b.png": png(3)})
    before = sorted(tmp_path.rglob("*"))
    found = items(path)
    assert [item.source.content() for item in found] == [png(1), png(2), png(3)]
    assert [item.source.stem for item in found] == ["up", "etc/root", "a/b"]
    assert sorted(tmp_path.rglob("*")) == before


def test_members_that_are_not_files_are_one_error_each(pack: PackTar, png: Png) -> None:
    kinds = {
        "link.png": info("link.png", tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard.png": info("hard.png", tarfile.LNKTYPE, linkname="a.png", size=10**9),  # a link has no data
        "device.png": info("device.png", tarfile.CHRTYPE),
        "pipe.png": info("pipe.png", tarfile.FIFOTYPE),
        "folder.png": info("folder.png", tarfile.DIRTYPE),
    }
    path = pack("x.tar", [("a.png", png(1)), *kinds.items(), ("b.png", png(2))])
    found = items(path)
    assert [item.source.id for item in found] == ["a", "link", "hard", "device", "pipe", "b"]
    problems = [item.error for item in found]
    assert problems[0] is problems[5] is None and found[5].source.content() == png(2)
    assert problems[1] == f"{path}::link.png is a link to '/etc/passwd', and links in a tar are not followed."
    assert "device or another special file" in problems[3] and "special" in problems[4]
    with pytest.raises(ImageError, match="are not followed"):
        found[1].source.content()


def test_a_tar_that_is_cut_off(pack: PackTar, png: Png) -> None:
    path = pack("x.tar", {"a.png": png(1), "b.png": png(2), "c.png": png(3)})
    whole = path.read_bytes()
    blocks = -(-len(png(1)) // 512) * 512
    second = 512 + blocks
    sentences = {
        second + 512 + 30: ["a", "b"],  # in an image
        second + 100: ["a", str(path)],  # in a header
        second: ["a", str(path)],  # between two members
        0: [str(path)],
    }
    for length, expected in sentences.items():
        path.write_bytes(whole[:length])
        found = items(path)
        assert [item.source.id for item in found] == expected, length
        assert [item.error is None for item in found] == [True] * (len(found) - 1) + [False]
        assert "cut off" in found[-1].error
    path.write_bytes(whole)
    (first, *_) = items(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="has become shorter since a.png"):
        first.source.content()
    path.unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        first.source.content()


@pytest.mark.parametrize("place", [0, 512 + 1024])
def test_damage_ends_a_tar_and_no_other(pack: PackTar, png: Png, place: int) -> None:
    damaged, good = pack("a.tar", {"a.png": bytes(1000), "b.png": png(2)}), pack("b.tar", {"c.png": png(3)})
    data = bytearray(damaged.read_bytes())
    data[place : place + 8] = b"\x1f\x8bgarbage"[:8]
    damaged.write_bytes(data)
    found = items(damaged, good)
    assert [item.source.id for item in found] == [*(["a/a"] if place else []), str(damaged), "b/c"]
    assert found[-2].error.startswith(f"{damaged} is not a tar, or is damaged at byte {place + 512:,}")


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, png: Png) -> None:
    path = tmp_path / "x.tar"
    size = tars.MAX_MEMBER_BYTES + 1
    with path.open("wb") as file:  # a hole in the file
        file.write(info("huge.png", tarfile.REGTYPE, size=size).tobuf())
        file.seek(size + 511 - (size + 511) % 512, os.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(info("b.png", tarfile.REGTYPE, size=len(png(1))), io.BytesIO(png(1)))
    huge, small = items(path)
    assert huge.error == f"{path}::huge.png has 268,435,457 bytes; the limit is 256 MiB."
    assert small.source.content() == png(1)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, png: Png) -> None:
    path = tmp_path / "x.tar"
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        with path.open("wb") as file:
            file.write(info("a", kind, size=8 << 30).tobuf(format=tarfile.GNU_FORMAT))
            file.seek(8 << 30, os.SEEK_CUR)
            with tarfile.open(fileobj=file, mode="w") as tar:
                for number in (1, 2):
                    data = png(number)
                    tar.addfile(info(f"{number}.png", tarfile.REGTYPE, size=len(data)), io.BytesIO(data))
        (first, second), most = measured(lambda: items(path))
        assert most < 2 << 20
        assert first.error == f"{path}::1.png has a header of 8,589,934,592 bytes; the limit is 1 MiB."
        assert second.source.content() == png(2)


@pytest.mark.release
def test_a_million_members_do_not_fill_the_memory(tmp_path: Path) -> None:
    """Here 3,000, the same for each: their ids are all that stays."""
    path, total = tmp_path / "x.tar", 3_000
    header = bytearray(info("0000000.png", tarfile.REGTYPE).tobuf())
    with path.open("wb") as file:
        for number in range(total):
            header[:7] = b"%07d" % number
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header)
        file.write(bytes(1024))
    sources = iter(open_sources([str(path)]))
    next(sources)
    count, most = measured(lambda: sum(1 for _ in sources))
    assert count == total - 1 and most < 150 * total  # two tables of hashes, one of them as it grows


def pax(name: str, records: bytes) -> bytes:
    return info("x", tarfile.XHDTYPE, size=len(records)).tobuf() + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    "records",
    [
        b"nonsense\n",
        b"99 path=x\n",
        b"-1 path=x\n",
        b"11 path=b.p",
        b"12 size=-99\n",
        b"0 \n",
        b"8 size=\n",
        b"1" * 500,
    ],
)
def test_damaged_pax_headers(tmp_path: Path, records: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(pax("x", records) + info("a.png", tarfile.REGTYPE).tobuf() + bytes(1024))
    (item,) = items(path)
    assert "damaged" in item.error


def test_sparse_files_are_one_error_each(tmp_path: Path, png: Png) -> None:
    path = tmp_path / "x.tar"
    old = bytearray(info("old.png", tarfile.GNUTYPE_SPARSE, size=512).tobuf(format=tarfile.GNU_FORMAT))
    old[482] = 1  # another block of the map follows
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    new = pax("x", b"22 GNU.sparse.major=1\n") + info("new.png", tarfile.REGTYPE, size=512).tobuf() + bytes(512)
    good = info("good.png", tarfile.REGTYPE, size=len(png(1))).tobuf() + png(1) + bytes(-len(png(1)) % 512)
    path.write_bytes(bytes(old) + bytes(512) + bytes(512) + new + good + bytes(1024))
    first, second, third = items(path)
    assert "stored as a sparse file" in first.error and "stored as a sparse file" in second.error
    assert third.error is None and open_image(third.source.content()).size == (7, 5)


def test_a_tar_without_images_says_so(pack: PackTar) -> None:
    path = pack("x.tar", {"a.txt": b"x"})
    (item,) = items(path)
    assert item.error == f"{path} holds no image." and item.source.place == str(path)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "X.TAR.ZST"])
def test_compressed_tars_are_refused(name: str) -> None:
    with pytest.raises(ImageError, match="is compressed; unpack it to a .tar first"):
        open_sources([name])


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ImageError, match="not a regular file"):
        open_sources([str(tmp_path / "x.tar")])
    with pytest.raises(ImageError, match="y.tar does not exist"):
        open_sources([str(tmp_path / "y.tar")])
