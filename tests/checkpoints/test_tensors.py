"""Weight files: found, refused, read."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from florence2.checkpoints.tensors import WeightFiles, find_weights, write_safetensors
from florence2.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.float16)}


def read(files: WeightFiles) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in files.read()}


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_one_file_by_name_or_folder(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        files = find_weights(path)
        assert not files.pickled and {n: i.shape for n, i in files.read_headers().items()} == {
            "a": (2, 3),
            "b.weight": (4,),
        }
        assert_same(read(files))


def test_the_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    """By whom the process' umask says, not by its owner alone."""
    (tmp_path / "other").touch()
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_only_file_of_another_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "fine-tune.safetensors", TENSORS)
    assert_same(read(find_weights(tmp_path)))
    write_safetensors(tmp_path / "other.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match=r"several weight files and no index: fine-tune\.safetensors, other"):
        find_weights(tmp_path)


def test_the_umask_says_who_may_read_what_is_written(tmp_path: Path) -> None:
    """The library itself would let only the owner."""
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "model.safetensors", TENSORS)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def write_shards(folder: Path) -> Path:
    weight_map = {}
    for i, (name, tensor) in enumerate(TENSORS.items(), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for path in (tmp_path, index):
        assert_same(read(find_weights(path)))


def test_some_by_name_in_the_order_asked_for(tmp_path: Path) -> None:
    write_shards(tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        found = [tensor.clone() for tensor in find_weights(path, True).read_named(["b.weight", "a"])]
        assert torch.equal(found[0], TENSORS["b.weight"]) and torch.equal(found[1], TENSORS["a"]) and len(found) == 2


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../secret.safetensors"}, "points outside its folder"),
        ({"a": "/etc/passwd"}, "points outside its folder"),
        ({"a": "model-9.safetensors"}, "do not exist: model-9"),
        ({}, "no weight_map"),
        ({"a": 1}, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_wrong_indices_get_a_sentence(tmp_path: Path, weight_map: object, words: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=words):
        find_weights(tmp_path)


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file(TENSORS, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="a occurs in another file too"):
        find_weights(tmp_path).read_headers()


def test_pickles_only_when_asked(tmp_path: Path) -> None:
    """By the name of the folder, of the file and of an index alike."""
    file, index = tmp_path / "pytorch_model.bin", tmp_path / "index" / "pytorch_model.bin.index.json"
    torch.save(TENSORS, file)
    index.parent.mkdir()
    torch.save(TENSORS, index.parent / "a.bin")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "a.bin")}))
    torch.save(TENSORS, tmp_path / "other.pt")
    for path in (tmp_path, file, index, index.parent, tmp_path / "other.pt"):
        with pytest.raises(CheckpointError, match="only as a pickle.*--allow-pickle.*florence2 convert"):
            find_weights(path)
        files = find_weights(path, allow_pickle=True)
        assert files.pickled
        assert_same(read(files))


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    assert not find_weights(tmp_path, allow_pickle=True).pickled


def test_pickles_of_the_old_format(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(read(find_weights(tmp_path, allow_pickle=True)))


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "was-run"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (exec, (f"open({str(trap)!r}, 'w')",))

    for name, write in (
        ("zip.bin", torch.save),
        ("plain.bin", lambda value, path: path.write_bytes(pickle.dumps(value))),
    ):
        path = tmp_path / name
        write({"a": Trap()}, path)
        with pytest.raises(CheckpointError, match="cannot be read as a pickle of tensors"):
            find_weights(path, allow_pickle=True).read_headers()
    assert not trap.exists()


@pytest.mark.parametrize("content", [{"state": {"a": torch.ones(1)}}, [1], {"a": 1}])
def test_pickles_of_something_else_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="flat dict of tensors"):
        find_weights(tmp_path / "x.bin", allow_pickle=True).read_headers()


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    whole = path.read_bytes()
    for content in (whole[:-3], whole[:20], b"", b"\xff" * 100, b"{}" * 50):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            find_weights(path).read_headers()


def test_a_header_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        find_weights(path).read_headers()


def test_integers_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a does not hold plain floating-point"):
        find_weights(tmp_path).read_headers()


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        find_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights(tmp_path / "absent")


def test_large_files_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2.checkpoints.tensors._MAPPED_BYTES", 100)
    tensors = {f"t{i:02}": torch.full((30,), float(i)) for i in range(20)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    found = read(find_weights(tmp_path))
    assert len(found) == 20 and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_library_that_quotes_the_whole_file_is_cut_short(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "' + b"[" * 50_000 + b'"}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file") as raised:
        find_weights(tmp_path).read_headers()
    assert len(str(raised.value)) < 600
