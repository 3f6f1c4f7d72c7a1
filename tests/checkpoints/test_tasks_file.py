"""`tasks.json`: a checkpoint's own tasks, read strictly and written whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from florence2.checkpoints.files import MAX_TASKS, MAX_TASKS_BYTES, read_tasks, write_tasks
from florence2.errors import ConfigError, PromptError
from florence2.inputs.tasks import Task, TaskTable, token_task

TASKS = (
    Task("<DEPTH>", "How far away is each thing?"),
    Task("<COUNT>", "How many {input} are there?", takes="text"),
    Task("<CROP>", "What is in {input}?", "boxes", "region"),
    token_task("<VQA>"),
)


def test_written_tasks_are_read(tmp_path: Path) -> None:
    assert read_tasks(tmp_path) == ()
    write_tasks(tmp_path, TaskTable(TASKS))
    assert read_tasks(tmp_path) == TASKS
    write_tasks(tmp_path, TASKS[:1])
    assert read_tasks(tmp_path) == TASKS[:1]
    write_tasks(tmp_path, TaskTable())
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    rows = [{"token": task.token, "sentence": task.sentence} for task in TASKS[:2]]
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": rows}))
    assert read_tasks(tmp_path) == TASKS[:2]
    bare = [{"token": "<VQA>"}, {"token": "<TAGS>", "sentence": None, "answer": "boxes", "takes": "nothing"}]
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": bare}))
    assert read_tasks(tmp_path) == (token_task("<VQA>"), token_task("<TAGS>", "boxes", "nothing"))


def test_tasks_of_an_adapter_join_those_of_the_checkpoint(tmp_path: Path) -> None:
    for name, tasks in (("model", TASKS[:2]), ("adapter", TASKS[1:])):
        (tmp_path / name).mkdir()
        write_tasks(tmp_path / name, tasks)
    assert read_tasks(tmp_path / "model", tmp_path / "adapter") == TASKS
    assert read_tasks(tmp_path / "model", tmp_path) == TASKS[:2]
    write_tasks(tmp_path / "adapter", [Task("<DEPTH>", "How deep?")])
    with pytest.raises(ConfigError, match=r"adapter/tasks\.json does not fit the model: Task <DEPTH> already exists"):
        read_tasks(tmp_path / "model", tmp_path / "adapter")


GOOD = {"token": "<DEPTH>", "sentence": "How far?"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "must hold a JSON object"),
        ({}, "the file lacks 'tasks'"),
        ({"tasks": {}}, "the file.tasks must be list"),
        ({"tasks": [], "code": "x"}, "the file.code is an unknown field"),
        ({"tasks": ["<DEPTH>"]}, "must be a JSON object, not '<DEPTH>'"),
        ({"tasks": [GOOD, {**GOOD, "sentence": "How near?"}]}, "Task <DEPTH> already exists"),
        ({"tasks": [{**GOOD, "token": "<OD>"}]}, "Task <OD> already exists"),
        ({"tasks": [{**GOOD, "answer": "masks"}]}, "answer must be one of text, boxes"),
        ({"tasks": [{**GOOD, "takes": "text"}]}, "must contain '{input}'"),
        ({"tasks": [{**GOOD, "parser": "my_module:parse"}]}, r"tasks\[0\].parser is an unknown field"),
        (
            {"tasks": [{**GOOD, "token": 5}, {"sentence": "How?"}]},
            r"tasks\[0\].token must be str.*tasks\[1\] lacks 'tok",
        ),
        ({"tasks": [{"token": "<VQA>", "takes": "much"}]}, "takes must be one of nothing, text, region, anything"),
    ],
)
def test_a_file_that_is_not_a_list_of_tasks_gets_a_sentence(values: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=words) as raised:
        read_tasks(tmp_path)
    assert str(tmp_path / "tasks.json") in str(raised.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tasks.json").open("wb") as file:
        file.truncate(MAX_TASKS_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_tasks(tmp_path)
    rows = [{"token": f"<T{i}>", "sentence": "What?"} for i in range(MAX_TASKS + 1)]
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": rows[:-1]}))
    assert len(read_tasks(tmp_path)) == 1000
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": rows}))
    with pytest.raises(ConfigError, match="it has 1,001 tasks; at most 1,000 are read"):
        read_tasks(tmp_path)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="Task <OD> already exists"):
        write_tasks(tmp_path, [Task("<OD>", "Something else.")])
    assert list(tmp_path.iterdir()) == []
