"""Pages about hostile texts: names, prompts, answers, tensor names and settings never become elements or attributes."""

import copy
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

from florence2.answers.notebook import rows_to_html, text_to_html
from florence2.inspect.audit.checkpoint import AuditFinding, audit
from florence2.inspect.audit.page import render_audit
from florence2.inspect.explanation import explain
from florence2.inspect.out_file import write_out
from florence2.inspect.page.render import render_page
from tests.fuzz import material, values
from tests.fuzz.worker import expect

_MARK = "zqxj"
_HOSTILE = (
    *(
        f"<script>{_MARK}</script>",
        f'"><img src=x onerror={_MARK}>',
        f"' onload='{_MARK}",
        f"</style><b>{_MARK}",
        f"</script>{_MARK}",
    ),
    *(
        f"{{{{script}}}}{_MARK}",
        f"<!--{_MARK}",
        f"]]>{_MARK}",
        f"&lt;{_MARK}&gt;",
        f"\u2028{_MARK}\x00",
        f"javascript:{_MARK}",
        f"</title>{_MARK}",
    ),
    *(
        f"<svg/onload={_MARK}>",
        f"{_MARK}\ud800",
        f"\\u003c{_MARK}",
        f"</TEXTAREA>{_MARK}",
        f"<a href=//x>{_MARK}</a>",
        "\\1\\g<0>" + _MARK,
    ),
)


def draw(random: Random) -> tuple[str, list[Any]]:
    """(page, changes): where a hostile text goes, as a random number, and the text."""
    kind = random.choice(("explanation", "explanation", "audit", "notebook"))
    texts = [(random.random(), _hostile(random)) for _ in range(random.randint(1, 4))]
    return kind, texts


def _hostile(random: Random) -> str:
    text = random.choice(_HOSTILE)
    return text if random.random() < 0.7 else text + values.text(random) + random.choice(_HOSTILE)


class _Structure(HTMLParser):
    """Every element with the names of its attributes, and texts that stand in scripts, styles, or attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[tuple[str, tuple[str, ...]]] = set()
        self.inside, self.unsafe = "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add((tag, tuple(name for name, _ in attrs)))
        self.inside = tag if tag in ("script", "style") else ""
        for name, value in attrs:
            if _MARK in (value or "") and (
                name.startswith("on") or name in ("src", "href", "style", "srcdoc", "action", "content")
            ):
                self.unsafe = f"{tag} {name}={value!r}"

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside and _MARK in data:
            self.unsafe = f"in {self.inside}: {data[:100]}"

    def handle_comment(self, data: str) -> None:
        if _MARK in data:
            self.unsafe = f"in a comment: {data[:100]}"


def _parsed(page: str) -> _Structure:
    structure = _Structure()
    structure.feed(page)
    structure.close()
    return structure


@cache
def _explanation() -> dict[str, Any]:
    f = material.model()
    return explain(
        f, "<OD>", material.drawing(1), options=f.options(num_beams=2, max_new_tokens=4), name="mini"
    ).to_dict()


@cache
def _audit() -> Any:
    return audit(material.folder(), spectra=False)


@cache
def _plain(kind: str) -> frozenset[tuple[str, tuple[str, ...]]]:
    return frozenset(_parsed(_render(kind, [(0.3, "plain")])).elements)


def check(case: tuple[str, list[Any]], place: Path) -> None:
    kind, texts = case
    page = _render(kind, texts)
    if kind != "notebook":
        write_out(place / "page.html", page)
        page = (place / "page.html").read_text(encoding="utf-8")
    structure = _parsed(page)
    expect(not structure.unsafe, structure.unsafe)
    expect(structure.elements <= _plain(kind), f"new elements: {structure.elements - _plain(kind)}")


def _render(kind: str, texts: list[Any]) -> str:
    if kind == "explanation":
        return render_page(_with_texts(_explanation(), texts))
    if kind == "audit":
        return _render_audit(texts)
    whole = " ".join(text for _, text in texts)
    return rows_to_html([(whole, 0.5, (1.0, 2.0, 3.0, 4.0)), ("a", None, (1.0, 2.0, 3.0, 4.0))]) + text_to_html(whole)


def _with_texts(explanation: dict[str, Any], texts: list[Any]) -> dict[str, Any]:
    """The explanation with some of its texts replaced, except those that are data of the image."""
    changed = copy.deepcopy(explanation)
    places = [path for path in values.paths(changed, 4000) if isinstance(values.get(changed, path), str)]
    places = [path for path in places if path[-1] != "data" and "attention" not in path and "saliency" not in path]
    for where, text in texts:
        *start, key = places[int(where * len(places))]
        values.get(changed, tuple(start))[key] = text
    return changed


def _render_audit(texts: list[Any]) -> str:
    """An audit whose path, tensor names, types and findings are hostile."""
    result = _audit()
    where, text = texts[0]
    number = int(where * len(result.tensors))
    tensors = [
        replace(t, name=text, stored=(text,), dtype=text) if i == number else t for i, t in enumerate(result.tensors)
    ]
    modules = [replace(m, name=text) if i == 0 else m for i, m in enumerate(result.modules)]
    findings = (AuditFinding("shape", True, texts[-1][1]), AuditFinding("zero", False, text))
    return render_audit(
        replace(
            result, path=text, tensors=tuple(tensors), modules=tuple(modules), findings=findings, layout=texts[-1][1]
        )
    )
