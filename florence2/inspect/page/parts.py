"""What every page is made of: its sources, a policy that lets nothing else run, a template filled in once."""

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files


def read_part(name: str) -> str:
    """A source of a page, which lies beside this file."""
    return (files("florence2.inspect.page") / name).read_text(encoding="utf-8")


def policy_of(style: str, script: str | None = None) -> str:
    """The Content-Security-Policy of a page with this inline style and script: no other runs, none is fetched."""
    runs = "" if script is None else f"; script-src {_source_hash(script)}"
    return (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src {_source_hash(style)}{runs}"
    )


def _source_hash(text: str) -> str:
    """What a policy calls this one inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def fill(template: str, parts: Mapping[str, str]) -> str:
    """The template with every `{{name}}` replaced, in one pass: what is put in is not searched."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], template)
