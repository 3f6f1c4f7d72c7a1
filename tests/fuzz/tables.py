"""The files of benchmark tables with spoilt values and spoilt bytes, read and scored."""

import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random

from florence2.evaluate.protocols import PROTOCOLS
from florence2.evaluate.scoring import AnsweredExample, score_table
from florence2.evaluate.tables.catalogue import TABLES, find_split, read_table
from recipes.nano.write_tables import write_tables
from tests.fuzz import values
from tests.fuzz.worker import expect

Case = tuple[str, str, bytes]


@cache
def _files() -> dict[str, bytes]:
    """Every file of the tables that is not an image, whole, by its path."""
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), 3, 2)
        files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".jpg")
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def draw(random: Random) -> Case:
    table = random.choice(sorted(TABLES))
    split = random.choice(sorted(TABLES[table].splits))
    paths = tuple(file.path for file in TABLES[table].splits[split].files)
    file = random.choice([name for name in sorted(_files()) if name.startswith(paths)])
    content = _files()[file]
    if file.endswith(".json") and random.random() < 0.8:
        return f"{table}:{split}", file, values.to_json(random, values.change_json(random, json.loads(content)))
    return f"{table}:{split}", file, values.change_bytes(random, content)


def check(case: Case, place: Path) -> None:
    name, spoilt, content = case
    _, _, table, split = find_split(name)
    for file in split.files:
        for path, whole in _files().items():
            if path.startswith(file.path):
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes(content if path == spoilt else whole)
        if file.path.endswith("/"):
            (place / file.path).mkdir(parents=True, exist_ok=True)
    examples = read_table(name, place)
    for example in examples:
        inside = example.image.is_relative_to(place) and ".." not in example.image.parts
        expect(inside, f"{example.image} is outside the folder")
    count = len(PROTOCOLS[table.family][0].questions(examples[0]))
    scores = score_table(table.family, [AnsweredExample(example, [{}] * count) for example in examples])
    right = table.family in ("captions", "questions")  # an empty caption has no words, an empty answer may be true
    expect(right or all(score.value == 0 for score in scores), "no answer counts as right")
