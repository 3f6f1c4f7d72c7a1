"""A short run of every class of spoilt input; `python -m tests.fuzz` runs longer."""

import random
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import engine, faults, values
from tests.fuzz.classes import CLASSES, share_out
from tests.fuzz.engine import Key, Worker
from tests.release import keep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and time are read from /proc")

CASES = {
    "parsing": 20,
    "prompts": 30,
    "images": 30,
    "checkpoints": 10,
    "tokenizers": 8,
    "adapters": 12,
    "training": 20,
    "pickles": 8,
    "commands": 8,
    "pages": 5,
    "sources": 20,
    "journals": 6,
    "shards": 6,
    "datasets": 20,
    "tables": 20,
    "runs": 1,
    "threads": 1,
}
"""Cases of each class in the default suite, about 10 s in all."""

MIXED = (
    *("prompts", "images", "checkpoints", "tokenizers", "adapters", "training", "pickles"),
    *("sources", "datasets", "tables"),
)
"""The classes in which some cases must be refused and others accepted, or the checks would see one side alone."""


FAST = [wanted for wanted in faults.OUTCOMES if wanted != "memory"]
"""Outcomes that are there at once; a gigabyte takes two seconds."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("fuzz"))
    yield worker
    worker.close()


@pytest.mark.parametrize("name", CLASSES)
def test_spoilt_input_is_refused_in_a_sentence_or_answered_rightly(name: str, worker: Worker) -> None:
    results = [worker.run(Key(name, 0, i)) for i in range(CASES[name])]
    failures = [f"{result.outcome} {result.key}\n    {result.note}" for result in results if result.failed]
    assert not failures, "\n".join(failures)
    if name in MIXED:
        assert {result.outcome for result in results} == {"refused", "accepted"}


@pytest.mark.parametrize("wanted", keep(FAST, faults.OUTCOMES))
def test_each_outcome_is_noticed(wanted: str, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    if wanted == "hang":
        monkeypatch.setattr(engine, "HANG_SECONDS", 0.5)
    result = worker.run(Key("faults", 0, _index(wanted)))
    assert result.note.splitlines()[0] == repr(wanted)
    assert result.outcome == wanted.split()[0]


def test_the_faults_have_every_outcome() -> None:
    assert {wanted.split()[0] for wanted in faults.OUTCOMES} == set(engine.OUTCOMES)


def _index(wanted: str) -> int:
    """The number of the first faulty case with a known outcome."""
    return next(i for i in range(500) if faults.draw(random.Random(f"faults/0/{i}")) == wanted)


def test_a_case_is_the_same_each_time() -> None:
    def draw() -> object:
        generator = random.Random("prompts/3/5")
        return [values.plain(generator), values.change_bytes(generator, bytes(100)), values.text(generator)]

    assert repr(draw()) == repr(draw())


def test_cases_are_shared_out_by_weight() -> None:
    counts = share_out(sum(CLASSES.values()), list(CLASSES))
    assert counts == CLASSES
    assert share_out(1, ["runs"]) == {"runs": 1}
    assert CASES.keys() == CLASSES.keys()


@pytest.mark.parametrize(("wanted", "code"), [("accepted", 0), ("silent", 1)])
def test_the_command_repeats_one_case_and_fails_with_it(
    wanted: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CLASSES, "faults", 1)
    index = _index(wanted)
    assert command.main(["faults", "--first", str(index), "--cases", "1", "--jobs", "1", "--verbose"]) == code
    shown = capsys.readouterr().out
    assert shown.startswith(f"{wanted.upper()} python -m tests.fuzz faults --seed 0 --first {index} --cases 1\n")
    assert "| faults | 1 |" in shown


def test_the_command_names_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["nothing"]) == 2
    assert "Known classes: parsing, prompts" in capsys.readouterr().err


def test_results_are_written_as_a_table() -> None:
    rows = list(command.lines({"pages": Counter(accepted=1200), "runs": Counter(silent=1, refused=2)}))
    assert rows[0].startswith("| class | cases | refused | accepted | escape | silent | hang | memory | crash |")
    assert rows[2] == "| pages | 1,200 | 0 | 1,200 | 0 | 0 | 0 | 0 | 0 |"
    assert rows[4] == "| all | 1,203 | 2 | 1,200 | 0 | 1 | 0 | 0 | 0 |"
