"""The callable of Ray's actors, without Ray: batches of arrays in, tables out."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import florence2
from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.dataset.tables import COLUMNS, schema, to_table
from florence2.errors import OptionError, PromptError
from florence2.ray import Labeler
from parity.recipe import make_picture

SCENE = Path(florence2.__file__).parents[1] / "docs" / "scene.png"
FEW = {"max_new_tokens": 6, "loading": {"device": "cpu"}}


@pytest.fixture(scope="module")
def labeler() -> Labeler:
    return Labeler("nano", "od", **FEW)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    make_picture(number, 40, 30).save(buffer, format="PNG")
    return buffer.getvalue()


def arrays(**columns: list[Any]) -> dict[str, np.ndarray]:
    batch = {name: np.empty(len(values), object) for name, values in columns.items()}
    for name, values in columns.items():
        batch[name][:] = values
    return batch


def test_the_rows_are_those_of_a_run(labeler: Labeler, tmp_path: Path) -> None:
    """They have the types of the Parquet view, also where a column holds nothing."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    table = labeler(arrays(bytes=[png(1), b"not an image", None], path=list(map(str, paths)), n=[1, 2, 3]))
    assert table.schema.names == [*COLUMNS, "path", "n"] and table.select(COLUMNS).schema == schema()
    good, broken, absent = table.to_pylist()
    answer = florence2.load("nano", device="cpu").run("<OD>", png(1), max_new_tokens=6)
    row = Row(Source(str(paths[0]), paths[0], "", str(paths[0])), TaskQuestion("<OD>"), answer)
    assert good == {**to_table([row.to_dict()]).to_pylist()[0], "path": str(paths[0]), "n": 1}
    assert broken["error"].startswith("The") and broken["kind"] is None and broken["place"] == str(paths[1])
    assert absent["error"] == f"{paths[2]} has no image: the column bytes holds None."
    assert [row["id"] for row in table.to_pylist()] == list(map(str, paths)) and absent["n"] == 3


def test_structs_and_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    labeler = Labeler("nano", "od", image_column="image", **FEW)
    path = str(tmp_path / "a.png")
    values = [{"bytes": png(1), "path": "x"}, {"bytes": None, "path": path}, path, {"bytes": None, "path": None}, 5]
    rows = labeler(arrays(image=values, id=[1, "b", "c", "d", "e"])).to_pylist()
    assert [row["id"] for row in rows] == ["1", "b", "c", "d", "e"]
    assert rows[0]["text"] == rows[1]["text"] == rows[2]["text"] is not None
    assert rows[3]["error"] == "d has no image: the column image holds None." and "holds 5" in rows[4]["error"]
    assert rows[0]["place"].startswith("sha256:") and rows[0]["image"] == "1"


def test_columns_of_arrays_are_handed_on(labeler: Labeler) -> None:
    batch = arrays(bytes=[png(1), png(2)], name=["a", "b"]) | {"vector": np.arange(6).reshape(2, 3)}
    with pytest.raises(
        OptionError, match="has no column id or path; name one with id_column. Its columns: bytes, name"
    ):
        labeler(batch)
    table = Labeler("nano", "od", id_column="name", **FEW)(batch)
    assert table["vector"].to_pylist() == [[0, 1, 2], [3, 4, 5]] and table["id"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"path": ["a"]}, "has no column 'bytes'. Its columns: path"),
        ({"bytes": [b""], "path": ["a"], "text": ["mine"]}, "columns of the same names, text; rename those first"),
    ],
)
def test_wrong_columns(labeler: Labeler, columns: dict[str, list[Any]], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        labeler(arrays(**columns))


def test_an_empty_batch_has_all_columns(labeler: Labeler) -> None:
    assert labeler(arrays(bytes=[], path=[])).schema.names == [*COLUMNS, "path"]


def test_regions_below_a_confidence_are_left_out() -> None:
    few = Labeler("nano", "od", min_confidence=1.0, loading={"device": "cpu"})
    (row,) = few(arrays(bytes=[SCENE.read_bytes()], id=["a"])).to_pylist()
    assert row["boxes"] == [] and row["left_out"] > 0 and row["min_confidence"] == 1.0


def test_a_pickle_holds_the_arguments_alone(labeler: Labeler) -> None:
    data = pickle.dumps(labeler)
    assert len(data) < 1000
    batch = arrays(bytes=[png(1)], id=["a"])
    assert pickle.loads(data)(batch) == labeler(batch)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"task": "<X>"}, PromptError, "Unknown task"),
        ({"task": "<CAPTION_TO_PHRASE_GROUNDING>"}, PromptError, "needs a text"),
        ({"task": "od", "text": "x"}, PromptError, "takes no input"),
        ({"num_beams": 0}, OptionError, "num_beams"),
        ({"min_confidence": 2}, OptionError, "from 0 to 1"),
        ({"batch_size": 0}, OptionError, "batch_size"),
    ],
)
def test_wrong_arguments_fail_at_once(arguments: dict[str, Any], error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Labeler("nano", **{"task": "od", "loading": {"device": "cpu"}, **arguments})


def test_the_driver_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; import florence2.ray; assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
