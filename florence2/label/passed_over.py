"""The files in folders that were not taken, counted by their endings: there may be millions."""

from pathlib import Path


class PassedOver:
    """A callback that counts paths, and names one of each kind."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, tuple[int, str]] = {}

    def __call__(self, path: Path) -> None:
        """Count one path."""
        self.count += 1
        ending = path.suffix.lower()
        count, name = self._kinds.get(ending, (0, path.name))
        if ending in self._kinds or len(self._kinds) < 100:
            self._kinds[ending] = count + 1, name

    def describe(self) -> str:
        """Return "3 files in folders were passed over: 2 .txt (a.txt, ...), 1 .zip (b.zip)."."""
        ordered = sorted(self._kinds.items(), key=lambda kind: -kind[1][0])[:6]
        kinds = ", ".join(
            f"{count} {ending or 'without an ending'} ({name}{', ...' if count > 1 else ''})"
            for ending, (count, name) in ordered
        )
        were = "file in folders was" if self.count == 1 else "files in folders were"
        return f"{self.count} {were} passed over: {kinds}."
