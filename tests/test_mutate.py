"""Mutation testing itself: the changes that it makes, the tests that it chooses, and what it calls killed."""

from pathlib import Path

import pytest

from tests.mutate import __main__ as command
from tests.mutate import selection
from tests.mutate.equivalent import EQUIVALENT, Equivalent, is_equivalent
from tests.mutate.mutants import Mutant, find_mutants
from tests.mutate.running import Checkout, Clock, is_killed, run_all
from tests.mutate.selection import sources

ROOT = Path(__file__).parents[1]
PATH = "florence2/room/steps.py"
STEPS = '''"""Steps."""

LIMIT = 5


def clip(value: int, least: int = 0) -> int:
    """Return the value between two ends."""
    if value > LIMIT:
        return LIMIT
    return max(value, least)
'''
TEST = """from florence2.room.steps import clip


def test_clip():
    assert (clip(9), clip(4), clip(-3), clip(-3, least=-1)) == (5, 4, 0, -1)
"""


def changed(text: str) -> set[str]:
    """What may take the place of something in a file, as "old -> new"."""
    return {f"{mutant.old} -> {mutant.new}" for mutant in find_mutants("x.py", text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = a < b", {"a < b -> (a <= b)"}),
        ("y = a + b", {"a + b -> (a - b)"}),
        ("def f(x=2, y=True): ...", {"2 -> 3", "2 -> 1", "True -> False"}),
        ("y = a and b", {"a and b -> (a or b)", "a and b -> a", "a and b -> b"}),
        ("y = not a", {"not a -> a"}),
        ("if a: pass", {"a -> (not (a))"}),
        ("y = f(a, b, c, k=v)", {"f(a, b, c, k=v) -> f(b, a, c, k=v)", "f(a, b, c, k=v) -> f(a, b, c)"}),
        ("x.append(a)\nn += a", {"x.append(a) -> pass", "n += a -> pass"}),
        ("if a:\n    raise E(1, 2)", {"a -> (not (a))", "raise E(1, 2) -> pass"}),
        ("y = [a for a in b if c]", {"[a for a in b if c] -> ([a for a in b])"}),
        ("y = f(a, dim=-1)", {"f(a, dim=-1) -> f(a)", "1 -> 2", "1 -> 0"}),
        ("y = a if b else c", {"a if b else c -> (c if b else a)"}),
    ],
)
def test_the_changes_of(text: str, expected: set[str]) -> None:
    assert changed(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        '"""1 < 2"""',
        "LIMIT = 2 << 30",
        "LEAST, MOST = 1, 2 << 30",
        "x: Literal[1]\n",
        "def f(x: 'int' = a) -> g(1, 2): ...",
        "y = f'{a + 1}'",
        "assert a < 1",
        "y = f(a, strict=True)",
        "@dataclass(frozen=True)\nclass A: ...",
        "Kind = Tensor | None",
        "class A(Protocol):\n    def f(self, n=1): ...",
        "if TYPE_CHECKING:\n    x = 1",
        "y = min(a, b)",
    ],
)
def test_what_no_test_can_see_is_left_alone(text: str) -> None:
    assert changed(text) == set()


def test_a_change_touches_nothing_else() -> None:
    text = "é = 'ü'  # two bytes each\ny = é +  b  # kept\n"
    (mutant,) = [mutant for mutant in find_mutants("x.py", text) if mutant.new == "(é - b)"]
    assert mutant.apply(text) == "é = 'ü'  # two bytes each\ny = (é - b)  # kept\n"
    assert (mutant.line, mutant.within, mutant.source) == (2, "", "y = é +  b  # kept")


@pytest.mark.release
def test_every_mutant_of_the_core_can_be_compiled() -> None:
    """One in fifty of them: the text that is put in place is whole wherever it stands."""
    for path in sources(ROOT, []):
        text = (ROOT / path).read_text(encoding="utf-8")
        for mutant in find_mutants(path, text)[::50]:
            compile(mutant.apply(text), path, "exec")


def test_the_sample_depends_on_the_seed_alone() -> None:
    first, again, other = (command.draw(ROOT, ["florence2/generation"], seed, 20) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 20
    assert all(mutant.path.startswith("florence2/generation/") for mutant in first)
    assert not any(map(is_equivalent, first))


def test_a_known_equivalent_is_found_by_its_text_and_not_by_its_place() -> None:
    mutant = Mutant("a.py", 9, 0, 5, "x < 1", "(x <= 1)", "f.inner", "if x < 1:")
    assert Equivalent("a.py", "r", source="if x < 1:").covers(mutant)
    assert Equivalent("a.py", "r", within="f").covers(mutant) and Equivalent("a.py", "r", new="(x <= 1)").covers(mutant)
    for other in ({"source": "if x:"}, {"within": "f.in"}, {"old": "1"}, {"new": "0"}):
        assert not Equivalent("a.py", "r", **other).covers(mutant)
    assert not Equivalent("b.py", "r").covers(mutant)
    assert all(entry.reason and (entry.source or entry.within) for entry in EQUIVALENT)


@pytest.mark.release
def test_the_mirror_is_asked_first_then_who_imports_it() -> None:
    assert selection.tests_of(ROOT, "florence2/generation/rules.py")[0] == "tests/generation/test_rules.py"
    runner = selection.tests_of(ROOT, "florence2/runner.py")
    assert {"tests/test_stream.py", "tests/test_pipeline.py"} <= {*runner}
    assert (
        selection.tests_of(ROOT, "florence2/checkpoints/checks/belonging.py")[0]
        == "tests/checkpoints/test_belonging.py"
    )
    assert selection.tests_of(ROOT, "florence2/__main__.py") == ["tests/test_launch.py"]
    # which imports the public name alone
    assert selection.tests_of(ROOT, "florence2/generation/generate.py")[1] == "tests/generation/test_stepper.py"
    assert "tests/fast/cuda/recorded/test_lane.py" in selection.tests_of(ROOT, "florence2/generation/state.py")


@pytest.mark.release
def test_every_file_has_tests() -> None:
    for path in sources(ROOT, []):
        chosen = selection.tests_of(ROOT, path)
        assert chosen and all((ROOT / test).exists() for test in chosen) and len(set(chosen)) == len(chosen), path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package of one module with its test. With the `__init__` files it goes before an installed florence2."""
    files = {PATH: STEPS, "tests/room/test_steps.py": TEST}
    files |= dict.fromkeys(
        (f"{folder}/__init__.py" for folder in ("florence2", "florence2/room", "tests", "tests/room")), ""
    )
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.release
def test_killed_and_alive(project: Path) -> None:
    """The test has no value of exactly the limit, so the comparison may change; all else is seen."""
    mutants = find_mutants(PATH, STEPS)
    assert [(mutant.old, mutant.new) for mutant in mutants] == [
        ("0", "1"),
        ("value > LIMIT", "(not (value > LIMIT))"),
        ("value > LIMIT", "(value >= LIMIT)"),
    ]
    seen: list[tuple[str, bool]] = []

    def report(mutant: Mutant, killed: bool) -> None:
        seen.append((mutant.new, killed))

    survivors = run_all(mutants, lambda mutant: selection.tests_of(project, mutant.path), project, 2, report)
    assert [mutant.new for mutant in survivors] == ["(value >= LIMIT)"]
    assert sorted(seen) == [("(not (value > LIMIT))", True), ("(value >= LIMIT)", False), ("1", True)]
    assert (project / PATH).read_text() == STEPS


@pytest.mark.release
def test_a_mutant_that_hangs_is_killed_and_the_file_is_as_before(project: Path, tmp_path: Path) -> None:
    copy, clock = Checkout(project, tmp_path / "copy"), Clock(seconds={"tests/room/test_steps.py": 0.0})
    start = STEPS.index("return max")
    endless = Mutant(PATH, 9, start, start + len("return max(value, least)"), "", "while True: pass", "clip", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.mutate.running.LEAST", 1.0)
        assert is_killed(endless, ["tests/room/test_steps.py"], copy, clock)
    assert (copy.folder / PATH).read_text() == STEPS


def test_tests_that_fail_without_mutants_are_an_error(project: Path) -> None:
    (project / "tests/room/test_steps.py").write_text("def test_no():\n    assert False\n")
    with pytest.raises(RuntimeError, match=r"test_steps.py fails without any mutant; mend that first"):
        run_all(
            find_mutants(PATH, STEPS)[:1], lambda mutant: selection.tests_of(project, PATH), project, 1, lambda *_: None
        )


@pytest.mark.release
def test_tests_that_have_just_passed_are_run_on_the_mutants_alone(project: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    test = project / "tests/room/test_steps.py"
    test.write_text(f"{TEST}\n\nwith open({str(runs)!r}, 'a') as file:\n    file.write('run\\n')\n")
    mutants = find_mutants(PATH, STEPS)[1:2]

    def tests(_: Mutant) -> list[str]:
        return ["tests/room/test_steps.py"]

    assert run_all(mutants, tests, project, 1, lambda *_: None, passed=True) == []
    assert runs.read_text() == "run\n"
    assert run_all(mutants, tests, project, 1, lambda *_: None) == []
    assert runs.read_text() == "run\n" * 3


def test_the_list_names_mutants_and_their_tests(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--count", "3", "--seed", "5", "--only", "florence2/generation/topk.py"]) == 0
    out = capsys.readouterr().out
    assert out.count("florence2/generation/topk.py:") == 3 and "tests/generation/test_topk.py" in out and "\n+" in out


@pytest.mark.parametrize(("alive", "code"), [(3, 0), (4, 1)])
def test_fewer_than_95_in_100_killed_is_exit_code_1(
    alive: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_all", lambda mutants, *_: mutants[:alive])
    assert command.main(["--count", "60", "--only", "florence2/answers"]) == code
    out = capsys.readouterr().out
    assert f"{60 - alive} of 60 mutants killed" in out and out.count(" lives\n") == alive
