"""The parts of every page: its sources, a policy that lets nothing else run, and a template that is filled in."""

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files


def read_part(name: str) -> str:
    """Read a source of a page from this package."""
    return (files("florence2.inspect.page") / name).read_text(encoding="utf-8")


def policy_of(style: str, script: str | None = None) -> str:
    """Return a Content-Security-Policy that allows this inline style and script only, and fetches nothing."""
    runs = "" if script is None else f"; script-src {_source_hash(script)}"
    return (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src {_source_hash(style)}{runs}"
    )


def _source_hash(text: str) -> str:
    """Return the hash by which a policy allows one inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Replace every `{{name}}` of the template, in one pass, so that inserted text is not searched.

    Half characters, which Python makes from file names that are not valid UTF-8, become escapes such as \\udcff.
    """
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], template)
    return page.encode(errors="backslashreplace").decode()
