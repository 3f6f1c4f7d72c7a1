"""The parts that a model was loaded without."""

from typing import Any, NoReturn

from torch import nn

from florence2.errors import Florence2Error


class AbsentError(Florence2Error, AttributeError):
    """A part that was not loaded was used. It is an AttributeError too, so that `hasattr` gives False."""


class Absent(nn.Module):
    """A part that was not loaded. It has no parameters, and every use of it raises a Florence2Error."""

    def __init__(self, name: str, parts: str):
        super().__init__()
        self._name, self.parts = name, parts

    def error(self) -> Florence2Error:
        """Return the error that names the part and what to do."""
        return AbsentError(
            f'The {self._name} is missing: the model was loaded with parts="{self.parts}"; load it with parts="all".'
        )

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise self.error()

    def __getitem__(self, _: Any) -> NoReturn:
        raise self.error()

    def __getattr__(self, name: str) -> Any:
        # copy, pickle and torch ask for optional hooks, all of them with an underscore
        if name.startswith("_"):
            raise AttributeError(name)
        raise self.error()

    def extra_repr(self) -> str:
        return f'{self._name}, loaded with parts="{self.parts}"'


def find_absent(model: nn.Module) -> Absent | None:
    """Return the first part that `model` was loaded without; None when it is complete."""
    return next((module for module in model.modules() if isinstance(module, Absent)), None)


def require_complete(model: nn.Module) -> None:
    """Raise a Florence2Error when `model` was loaded without some of its parts."""
    absent = find_absent(model)
    if absent is not None:
        raise absent.error()
