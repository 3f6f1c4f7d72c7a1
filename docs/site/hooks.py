"""What the site needs beyond the pages in `docs/`: pages that live elsewhere, and the help of every command."""

import importlib
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from florence2.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "weights/README.md": "records/weights.md",
    "weights/nano/README.md": "records/nano.md",
    "parity/RESULTS.md": "records/parity.md",
    "parity/RESULTS-remote.md": "records/parity-remote.md",
    "benchmarks/BENCHMARK-intel.md": "records/speed-intel.md",
    "benchmarks/BENCHMARK.md": "records/speed-amd.md",
    "benchmarks/COMPARE.md": "records/compare.md",
    "benchmarks/COMPARE-nano.md": "records/compare-nano.md",
    "benchmarks/SCALING.md": "records/scaling.md",
    "benchmarks/SCALING-large.md": "records/scaling-large.md",
    "benchmarks/LITE.md": "records/lite.md",
    "benchmarks/TRACES.md": "records/traces.md",
    "tests/fuzz/RESULTS.md": "records/fuzz.md",
}
"""Pages of the repository outside of `docs/`, by their paths, and where the site has them."""
COMMAND_LINE = "reference/command-line.md"
_PICTURE = re.compile(r'<picture>\s*<source .*?srcset="([^"]+)">\s*<img alt="([^"]+)" src="([^"]+)">\s*</picture>')
_BOTH = r"![\2](\3#only-light)![\2](\1#only-dark)"
"""A drawing for light and dark: GitHub follows the system, the site its own switch."""
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live elsewhere, and the reference of the command line."""
    for source, target in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = _PICTURE.sub(_BOTH, text)
        files.append(File.generated(config, target, content=rewrite(text, ROOT / source, target)))
    files.append(File.generated(config, COMMAND_LINE, content=describe_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links of a page in `docs/` to files outside of it lead to the site's pages."""
    place = page.file.src_uri
    if place in ELSEWHERE.values() or place == COMMAND_LINE:
        return markdown
    return rewrite(markdown, ROOT / "docs" / place, place)


def rewrite(text: str, source: Path, target: str) -> str:
    """Return the text of a page with links that hold where the site has it.

    Args:
        text: Markdown.
        source: The file in the repository, which its links start from.
        target: The page's path in the site.

    A link to a file that the site does not have becomes the file's path.
    """

    def link(match: re.Match[str]) -> str:
        words, goal = match.groups()
        found = _find(goal, source, target)
        if found is not None:
            return f"[{words}]({found})"
        path = os.path.relpath(source.parent / goal.partition("#")[0], ROOT)
        return words if words.strip("`") in path else f"{words} (`{path}`)"

    return _LINK.sub(link, text)


def _find(goal: str, source: Path, target: str) -> str | None:
    """Return the link from the page `target` to what `goal` means in the file `source`; None if the site lacks it."""
    path, mark, anchor = goal.partition("#")
    if not path or "://" in goal:
        return goal
    file = os.path.relpath(source.parent / path, ROOT)
    inside = file.startswith(f"docs{os.sep}") and (ROOT / file).is_file() and not file.startswith("docs/site")
    place = ELSEWHERE.get(file, file.removeprefix("docs/") if inside else None)
    return None if place is None else os.path.relpath(place, Path(target).parent) + mark + anchor


def describe_commands() -> str:
    """Return a page with the help of every command."""
    os.environ["COLUMNS"] = "100"
    parts = ["# The command line\n", "This is what `florence2 COMMAND --help` prints.\n"]
    for name, command in COMMANDS.items():
        parser = importlib.import_module(command.module).build_parser()
        extra = f" It needs the extra `{command.extra}`." if command.extra else ""
        about = command.help[0].upper() + command.help[1:]
        parts.append(f"## florence2 {name}\n\n{about}.{extra}\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)
