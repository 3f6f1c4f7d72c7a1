"""What mkdocs cannot do alone: pages from outside of docs, links between them, and the help of every command.

`mkdocs.yml` names this file as a hook; mkdocs calls the functions that begin with `on_`. Links of the repository's
files are relative to where they lie, so that they work there. On the site these files have other places. A link to a
file that the site does not have becomes its text.
"""

import importlib
import os
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from florence2.cli import main as cli

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
_PICTURE = re.compile(r'<picture>\s*<source .*?srcset="([^"]+)">\s*<img alt="([^"]+)" src="([^"]+)">\s*</picture>')
_BOTH = r"![\2](\3#only-light)![\2](\1#only-dark)"
"""A drawing for light and dark pages: elsewhere it follows the system, on the site the site's own switch."""
FRONT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files outside of docs with a place of their own; other pages that somebody links to go below `project/`."""
COMMANDS = "reference/command-line.md"
"""The page with the help of every command."""
ONE_FILE = "docs/florence2_minimal.py", "how-it-works/one-file.md"
"""A file of code that is a page of the site, and its place."""
_COMMENT = re.compile(r"<!--.*?-->\n?", re.S)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def site_path(path: str) -> str | None:
    """Return the place on the site of a file of the repository; None for a file that the site does not have."""
    if path in FRONT:
        return FRONT[path]
    if path == ONE_FILE[0]:
        return ONE_FILE[1]
    if not (ROOT / path).is_file():
        return None
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return f"project/{path}" if path.endswith(".md") else None


def repository_path(uri: str) -> str:
    """Return the file of the repository that a page of the site comes from."""
    front = {place: path for path, place in FRONT.items()}
    return front.get(uri) or (uri.removeprefix("project/") if uri.startswith("project/") else f"{DOCS}{uri}")


def rewrite(text: str, path: str) -> str:
    """Return the text of the repository's file `path` with links that fit its place on the site."""
    here = site_path(path)
    assert here is not None, path

    def replace(link: re.Match[str]) -> str:
        image, words, target = link.groups()
        file = linked_file(target, path)
        if file is None:  # an address, or what only looks like a link
            return link[0]
        place = site_path(file)
        anchor = "".join(target.partition("#")[1:])
        return f"{image}[{words}]({relpath(place, dirname(here) or '.')}{anchor})" if place else words

    return _LINK.sub(replace, _PICTURE.sub(_BOTH, text))


def linked_file(target: str, path: str) -> str | None:
    """Return the file of the repository that a link in the file `path` leads to; None for anything else."""
    name = target.partition("#")[0]
    file = normpath(f"{dirname(path) or '.'}/{name}")
    return file if name and ":" not in name and (ROOT / file).exists() else None


def pages_elsewhere() -> set[str]:
    """Return the pages outside of docs that can be reached by links from the site's own pages."""
    waiting = [*FRONT, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]
    found: set[str] = set()
    while waiting:
        path = waiting.pop()
        if site_path(path) is None or path in found:
            continue
        found.add(path)
        targets = [target for _, _, target in _LINK.findall((ROOT / path).read_text(encoding="utf-8"))]
        waiting += [file for target in targets if (file := linked_file(target, path)) and file.endswith(".md")]
    return {path for path in found if not path.startswith(DOCS)}


def command_line() -> str:
    """Return the page with the help of every command."""
    os.environ["COLUMNS"] = "100"  # argparse asks the environment how wide a line may be
    parts = ["# The command line\n\nThis is what `florence2 COMMAND --help` prints.\n"]
    for name, command in cli.COMMANDS.items():
        parser = importlib.import_module(command.module).build_parser()
        extra = f" It needs the extra `{command.extra}`." if command.extra else ""
        about = command.help[0].upper() + command.help[1:]
        parts.append(f"## florence2 {name}\n\n{about}.{extra}\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def one_file() -> str:
    """Return the page of the model in one file."""
    code = (ROOT / ONE_FILE[0]).read_text(encoding="utf-8")
    settings = "---\nhide: [toc]\nsearch: {exclude: true}\n---\n"  # or every word of the code would be found
    head = f"# The model in one file\n\n`{ONE_FILE[0]}`, as it is run:\n\n"
    return f'{settings}{head}```py linenums="1"\n{code}```\n'


# ---- what mkdocs calls ----------------------------------------------------------------------------------------------
def on_config(config: Any) -> Any:
    """Let "<OD>" in a page or docstring be a text: they are full of such tokens, and hold no HTML."""
    from markdown.extensions import Extension

    class NoHtml(Extension):  # type: ignore[misc]  # it comes with the site's packages alone
        def extendMarkdown(self, md: Any) -> None:
            md.preprocessors.deregister("html_block")
            md.inlinePatterns.deregister("html")

    config.markdown_extensions.append(NoHtml())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs, the help of the commands, and the one file."""
    from mkdocs.structure.files import File

    for path in sorted(pages_elsewhere()):
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, str(site_path(path)), content=text))
    files.append(File.generated(config, COMMANDS, content=command_line()))
    files.append(File.generated(config, ONE_FILE[1], content=one_file()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page."""
    uri = page.file.src_uri
    if uri in (COMMANDS, ONE_FILE[1]):
        return markdown
    return rewrite(_COMMENT.sub("", markdown), repository_path(uri))
