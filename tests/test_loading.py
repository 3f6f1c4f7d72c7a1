"""What `florence2.load` does where nothing is said; tests/test_pipeline.py and tests/checkpoints have the rest."""

import inspect

import florence2


def test_defaults() -> None:
    """The network may be asked, code and pickles may not be run."""
    parameters = inspect.signature(florence2.load).parameters.values()
    assert {each.name: each.default for each in parameters if each.default not in (None, inspect.Parameter.empty)} == {
        "name": "base",
        "device": "auto",
        "dtype": "auto",
        "attention": "sdpa",
        "parts": "all",
        "local_files_only": False,
        "allow_pickle": False,
    }
