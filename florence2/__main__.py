"""The program `florence2`, also as `python -m florence2`: signals and streams are in order before anything is imported.

A run may be stopped at any time, also while torch is imported, and its streams may be closed, full, or a pipe that
nobody reads; none of it ends in a traceback.
"""

import importlib
import os
import signal
import sys
import time
from types import FrameType
from typing import Any, TextIO

from florence2.errors import OptionError

EXIT_STOPPED = 130
_SECONDS_APART = 1.0  # a launcher may forward the signal that the terminal sent to every process already
_IMPORTS = "<frozen importlib._bootstrap>"


def launch(module: str = "florence2.cli.main") -> int:
    """Run the command line of this process, the `main` of a `module`; return the exit code."""
    stop = _Stop()
    open_streams()
    try:
        code: int = importlib.import_module(module).main()
        return code
    except KeyboardInterrupt:
        return EXIT_STOPPED
    finally:
        stop.restore()


class _Stop:
    """The handler of Ctrl-C and SIGTERM. Signals that are ignored, as in a script's background jobs, stay so."""

    def __init__(self) -> None:
        self._first: float | None = None
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        self._numbers = [number for number, handler in defaults.items() if signal.getsignal(number) is handler]
        for number in self._numbers:
            signal.signal(number, self._handle)
        sys.unraisablehook = _show_unraisable

    def restore(self) -> None:
        """Let a signal end the process at once, as nothing is left to do but to shut down."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Raise KeyboardInterrupt; during an import, and for a second signal, end the process at once.

        Modules that are being imported turn the exception into another one, or into printed tracebacks.
        """
        now = time.monotonic()
        if self._first is None and not _is_importing(frame):
            self._first = now
            raise KeyboardInterrupt
        if self._first is None or now - self._first >= _SECONDS_APART:
            _quit()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != _IMPORTS:
        frame = frame.f_back
    return frame is not None


def _show_unraisable(event: "sys.UnraisableHookArgs") -> None:
    """End the process when a finalizer swallowed the KeyboardInterrupt; show anything else as usual."""
    if issubclass(event.exc_type, KeyboardInterrupt):
        _quit()
    sys.__unraisablehook__(event)


def _quit() -> None:
    try:
        os.write(2, b"\nflorence2: stopped.\n")
    finally:
        os._exit(EXIT_STOPPED)


# ---- streams -------------------------------------------------------------------------------------------------------


def open_streams() -> None:
    """Replace stdout and stderr by streams that can be written whatever the shell did to them."""
    number = 0
    while number < 3:  # a new file gets the lowest free number, which must not be that of a closed stream
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    sys.stdout = ResultStream(sys.stdout or _nowhere())
    sys.stderr = WordStream(sys.stderr or _nowhere())


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123  for the rest of the process


class _Stream:
    """A text stream. All other attributes are those of the stream that it replaces."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Write buffered text."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:  # noqa: ARG002
        """Send all further output nowhere: the rest in the buffer would fail again at the end of the process."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


class WordStream(_Stream):
    """Stderr. Words for people that cannot be written are lost; they end nothing."""


class ResultStream(_Stream):
    """Stdout. Results that cannot be written are an error; a reader that has closed its pipe is a BrokenPipeError."""

    def _fail(self, error: OSError) -> None:
        super()._fail(error)
        if isinstance(error, BrokenPipeError):
            raise error
        raise OptionError(f"stdout cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    sys.exit(launch())
