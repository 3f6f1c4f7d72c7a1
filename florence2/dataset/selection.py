"""Which tasks' rows a view shows: the ones that were named, or the only one that fits."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from florence2.dataset.index import FAILED
from florence2.dataset.views import EVERYTHING
from florence2.errors import OptionError, listing, shown

Counts = Mapping[tuple[str, str], int]


def choose_tasks(counts: Counts, view: str, kinds: Collection[str], named: Sequence[str], source: Path) -> list[str]:
    """Return the tasks, as rows name them, that a view shows.

    Args:
        counts: How many rows a folder holds of each (task, kind).
        view: The name of the view.
        kinds: The kinds of rows that it can show.
        named: Tasks that the user chose, as tokens, aliases or prompts; empty to take the only one that fits.
        source: The folder.

    Raises:
        OptionError: A named task has no rows, none fits the view, or several do and none was named.
    """
    chosen = [_find(name, counts, source) for name in named] or list(dict.fromkeys(task for task, _ in counts))
    fitting = [task for task in chosen if any((task, kind) in counts for kind in kinds)]
    if not fitting:
        raise OptionError(f"No answer in {source} fits the view {view}. The folder holds {_describe(counts)}.")
    if len(fitting) > 1 and not named and set(kinds) != EVERYTHING:
        raise OptionError(
            f"{source} holds answers to several tasks that fit the view {view}: "
            f"{_describe({key: n for key, n in counts.items() if key[0] in fitting})}. Choose with --task, as often "
            "as you like."
        )
    return chosen if set(kinds) == EVERYTHING else fitting


def _find(name: str, counts: Counts, source: Path) -> str:
    """Return a named task as rows name it. Raises OptionError for one that has no rows."""
    tasks = dict.fromkeys(task for task, _ in counts)
    found = [task for task in tasks if task == name or task.strip("<>").lower() == name.strip("<>").lower()]
    if not found:
        raise OptionError(f"{source} has no row of the task {shown(name)}. It holds {_describe(counts)}.")
    return found[0]


def _describe(counts: Counts) -> str:
    """Name tasks with their numbers of rows: "<OD> (3 rows of boxes)"."""
    kinds = {FAILED: "failed"}
    parts = [
        f"{shown(task)[1:-1] or 'no task'} ({count:,} {'row' if count == 1 else 'rows'}, {kinds.get(kind, kind)})"
        for (task, kind), count in sorted(counts.items())
    ]
    return listing(parts) if parts else "no rows"
