"""The user's own function that a command line names as MODULE:FUNCTION; whatever goes wrong in it is one sentence."""

import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from florence2.errors import Florence2Error, OptionError, clip

_BETWEEN = {
    __file__,
    importlib.__file__,
    *(f"<frozen importlib.{part}>" for part in ("_bootstrap", "_bootstrap_external")),
}

_FILE_NAME = " It is the name of a module: leave out '.py'."


def find_function(name: str) -> Callable[[object], None]:
    """Import a function, given as MODULE:FUNCTION; the current folder is searched first, as by `python -m`.

    Args:
        name: The module and the function.

    Returns:
        The function. It raises an OptionError with the place and the message of whatever error it raises, other than
        a Florence2Error.

    Raises:
        OptionError: The module or the function does not exist, or the module cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name or module_name.startswith("."):
        raise OptionError(f"--prepare is {name!r}; give MODULE:FUNCTION, such as my_changes:insert_adapters.")
    module = _import(name, module_name)
    try:
        function = getattr(module, function_name, None)
    except Exception as error:  # noqa: BLE001  a module may look its names up with code of its own
        raise OptionError(f"--prepare {name}: {module_name} raised {_describe(error)}.") from None
    if not callable(function):
        place = getattr(module, "__file__", None) or module_name
        raise OptionError(f"--prepare {name}: {place} has no function {function_name}.")
    return _guarded(name, function)


def _import(name: str, module_name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise OptionError(
                f"--prepare {name}: {module_name} imports {error.name}, which is not installed."
            ) from None
        raise OptionError(
            f"--prepare {name}: the module {module_name} was not found, neither in the current folder nor among the "
            f"installed packages.{_FILE_NAME if module_name.endswith('.py') else ''}"
        ) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  importing runs the user's code
        raise OptionError(f"--prepare {name}: importing {module_name} raised {_describe(error)}.") from None


def _guarded(name: str, function: Callable[[object], object]) -> Callable[[object], None]:
    """Return the function with its errors as OptionErrors, under its own name."""

    @functools.wraps(function if hasattr(function, "__qualname__") else type(function))
    def guarded(model: object) -> None:
        try:
            result = function(model)
        except Florence2Error:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  it is the user's code
            raise OptionError(f"--prepare {name}: the function raised {_describe(error)}.") from None
        if inspect.isgenerator(result) or inspect.iscoroutine(result):
            result.close()
            raise OptionError(
                f"--prepare {name}: the function is a generator or a coroutine, so calling it changes nothing; give a "
                "plain function."
            )

    return guarded


def _describe(error: BaseException) -> str:
    """Return type, message and place of an error of the user's code: "KeyError: 'x' (my_changes.py, line 3)"."""
    # unlike str(error), this does not fail where the message itself cannot be made
    text = " ".join("".join(traceback.format_exception_only(type(error), error)).split())
    text = text[max(0, text.find(type(error).__name__)) :]  # a SyntaxError begins with the line
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _BETWEEN]
    frames = [frame for frame in frames if frame.filename == frames[0].filename]  # the user's file calls others
    places = [(frame.filename, frame.lineno) for frame in frames if not frame.filename.startswith("<")]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        places.append((error.filename or "", error.lineno))
    place = f" ({Path(places[-1][0]).name}, line {places[-1][1]})" if places else ""
    return f"{clip(text)}{place}"
