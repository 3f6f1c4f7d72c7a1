"""`python -m benchmarks compare` on a checkout and a changed one, and the arithmetic of its table."""

import io
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.__main__ import main
from benchmarks.compare import Round, format_comparison
from benchmarks.machine import name_checkout

ROOT = Path(__file__).parent.parent.parent
WORDS = "--rounds 1 --repeats 1 --batch 2 --mixed 3 --tokens 10 --threads 1".split()


def measured(seconds: list[float], tokens: list[list[int]]) -> dict[str, object]:
    return {"seconds": {"load": seconds}, "bytes": {"peak memory, one answer": 2**20}, "tokens": tokens}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, list[dict[str, Any]]]:
    """The exit code, the table and what the processes measured; the new checkout answers in two beams, not in three."""
    other, results = tmp_path_factory.mktemp("other"), []
    shutil.copytree(ROOT / "florence2", other / "florence2", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "florence2" / "__init__.py").open("a") as file:
        file.write(
            "\nfrom florence2.pipeline import Florence2 as F\n_options = F.options\n"
            "F.options = lambda f, **c: _options(f, **c | {'num_beams': 2})\n"
        )
    run = compare._run_worker

    def measure(*given: Any) -> dict[str, Any]:
        results.append(run(*given))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as table:
        patch.setattr(compare, "_run_worker", measure)
        code = main(["compare", str(ROOT), str(other), *WORDS])
    return code, table.getvalue(), results


@pytest.mark.release
def test_other_tokens_are_noticed(compared: tuple[int, str, list[dict[str, Any]]]) -> None:
    code, table, _ = compared
    assert code == 1 and "**Tokens differ; the times do not count.**" in table
    clocks = "import, beyond torch's own|load|image file to answer|four tasks, one image|batch of 2, per image"
    clocks += "|3 mixed questions, each|vision tower|encoder|first step|decode step"
    clocks += "|peak memory, one answer|peak memory, batch of 2"
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[2:] == clocks.split("|")


@pytest.mark.release
def test_the_same_tokens_let_the_times_count(
    compared: tuple[int, str, list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what one process measured, twice."""
    monkeypatch.setattr(compare, "_run_worker", lambda *_: compared[2][0])
    assert main(["compare", str(ROOT), str(ROOT), *WORDS, "--output", str(tmp_path / "c.md")]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "c.md").read_text() == table.rstrip("\n") + "\n" and "All tokens are the same." in table


def test_ratios_are_taken_within_a_round() -> None:
    """The second round ran on a machine half as fast."""
    rounds = [
        Round(measured([3.0, 1.0, 2.0], []), measured([1.0], [])),
        Round(measured([4.0], []), measured([2.0], [])),
        Round(measured([2.0], []), measured([1.5], [])),
    ]
    load, memory = format_comparison(rounds).splitlines()[2:]
    assert [cell.strip() for cell in load.split("|")[1:-1]] == ["load", "2 s (2–4)", "1.5 s (1–2)", "0.50"]
    assert [cell.strip() for cell in memory.split("|")[2:-1]] == ["1 MiB", "1 MiB", "1.00"]


def test_a_checkout_is_named_by_its_commit(tmp_path: Path) -> None:
    assert name_checkout(tmp_path) == f"the folder {tmp_path.name}"

    def git(*words: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD")
    assert name_checkout(tmp_path) == f"commit {commit}"
    (tmp_path / "file").write_text("two")
    assert name_checkout(tmp_path) == f"commit {commit} with changes"


def test_what_is_not_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path), str(ROOT)]) == 2
    assert "is not a checkout: florence2/__init__.py is missing." in capsys.readouterr().err


def test_too_few_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(ROOT), str(ROOT), "--tokens", "8"]) == 2
    assert capsys.readouterr().err == "benchmarks: --tokens is 8; it must be at least 9.\n"


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--help"], 0), (["bench"], 2)])
def test_the_commands_are_listed(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    printed = "".join(capsys.readouterr())
    assert all(name in printed for name in ("speed", "scaling", "traces", "compare"))
