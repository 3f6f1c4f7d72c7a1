"""One line of JSON a request on stderr, without images, prompts and answers."""

import json
import queue
import sys
import threading
import time
from typing import Any, TextIO

from starlette.requests import Request

from florence2.serve.work.jobs import Answered

_LONGEST_QUEUE = 10_000  # lines; whoever does not read stderr must not stop the server


def note(request: Request, **facts: Any) -> None:
    """Keep facts about a request for its line."""
    kept: dict[str, Any] = request.scope.setdefault("florence2.facts", {})
    done = facts.pop("done", None)
    kept.update(facts)
    if isinstance(done, Answered):
        kept.update(done.times.in_ms(), cached=done.cached)
        if done.answer is not None:
            kept["tokens"] = kept.get("tokens", 0) + max(0, len(done.answer.token_ids) - 1)


class RequestLog:
    """Writes lines in a thread of its own, so that a slow reader of stderr holds nothing up."""

    def __init__(self, file: TextIO | None = None):
        """Write to `file`; None is stderr."""
        self._file, self._lines = file, queue.Queue[str | None](_LONGEST_QUEUE)
        threading.Thread(target=self._write, name="florence2-log", daemon=True).start()

    def write(self, scope: Any, status: int, started: float) -> None:
        """Write the line of a request that ended."""
        facts = scope.get("florence2.facts", {})
        line = {
            "time": round(time.time(), 3),
            "id": scope.get("florence2.id"),
            "method": scope["method"],
            "route": scope.get("florence2.route", "unknown"),
            "status": facts.pop("status", status),
            "ms": round((time.monotonic() - started) * 1000, 3),
            **facts,
        }
        try:
            self._lines.put_nowait(json.dumps(line, ensure_ascii=True))
        except queue.Full:
            return

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            print(line, file=self._file or sys.stderr, flush=True)
