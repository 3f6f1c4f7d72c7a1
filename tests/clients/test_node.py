"""The client of docs/onnx.md, as it is printed, in transformers.js.

`ONNXRUNTIME_NODE_INSTALL=skip npm ci` in `tests/clients/node` installs what it needs. That variable keeps
onnxruntime-node from fetching libraries for CUDA; its CPU library is in the package.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.clients.conftest import TASKS, Ids

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
MODULES = Path(__file__).with_name("node") / "node_modules"
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
    pytest.mark.skipif(not MODULES.is_dir(), reason="transformers.js is not installed: npm ci in tests/clients/node"),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's program, where Node finds its packages."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(MODULES)
    [program] = re.findall(r"```js\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "client.mjs").write_text(program, encoding="utf-8")
    return folder / "client.mjs"


@pytest.mark.parametrize("task", TASKS)
def test_greedy_answers_are_those_of_torch(
    task: str, client: Path, exported: Path, images: Sequence[Path], greedy: Ids
) -> None:
    done = subprocess.run(["node", client, exported, task, *images], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(answer["ids"]) for answer in answers] == greedy[task]
    assert all(re.match(r"<\w+>", task)[0] in answer["answer"] for answer in answers)


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((MODULES.parent / "package-lock.json").read_text())
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
    assert all("integrity" in package for name, package in lock["packages"].items() if name)
