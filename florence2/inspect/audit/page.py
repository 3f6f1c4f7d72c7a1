"""Render an audit, or the comparison of two checkpoints, as one HTML page without scripts and network."""

import html
from collections.abc import Mapping, Sequence

from florence2.inspect.audit.checkpoint import Audit, AuditFinding, TensorAudit, group_by_layer
from florence2.inspect.audit.difference import Difference
from florence2.inspect.audit.text import (
    LEGEND,
    LEGEND_OF_CHANGES,
    changed_rows,
    describe_ties,
    describe_unmatched,
    describe_verdict,
    layer_rows,
    module_rows,
    show_count,
    show_number,
    show_shape,
    show_share,
)
from florence2.inspect.page.parts import fill, policy_of, read_part

Bars = Mapping[int, Sequence[float | None]]
"""The lengths of the bars under the cells of a column, one for each row, by the number of the column."""


def render_audit(result: Audit | Difference, top: int = 10) -> str:
    """Render the page: problems first, then every layer, then its tensors in sections that unfold.

    Args:
        result: An audit or a comparison.
        top: For a comparison, the number of most changed tensors in a table of their own, and of tensors without a
            counterpart to name.

    Returns:
        The HTML.
    """
    title, body = _page_of_two(result, top) if isinstance(result, Difference) else _page_of_one(result)
    style = read_part("page.css") + read_part("audit.css")
    parts = {"policy": policy_of(style), "style": style, "title": html.escape(title), "body": "\n".join(body)}
    return fill(read_part("audit.html"), parts)


# ---- one checkpoint -----------------------------------------------------------------------------------------------


def _page_of_one(audit: Audit) -> tuple[str, list[str]]:
    names = {name: f"layer-{i}" for i, name in enumerate(group_by_layer(audit.tensors))}
    modules = audit.modules
    bars: Bars = {
        2: [module.parameters for module in modules],
        4: [module.norm for module in modules],
        8: [module.largest for module in modules],
        9: [module.effective_rank for module in modules],
    }
    bad = [module.non_finite > 0 for module in modules]
    body = [_facts(audit), _findings(audit.findings), _parts(audit), "<h2>Layers</h2>"]
    body += [_table(module_rows(audit), bars, bad, links=names), *(_quiet(line) for line in LEGEND)]
    body += ["<h2>Tensors</h2>", _quiet("Each layer unfolds. Hashes are cut to 16 digits; --json has all digits.")]
    for name, tensors in group_by_layer(audit.tensors).items():
        table = _table(_tensor_rows(tensors), bad=[tensor.non_finite > 0 for tensor in tensors])
        body.append(_folded(name, len(tensors), table, names[name]))
    return f"Audit of {audit.path}", body


def _facts(audit: Audit) -> str:
    """Return the facts about the whole checkpoint."""
    types = ", ".join(f"{name} ({count:,})" for name, count in audit.dtypes.items())
    facts = {
        "checkpoint": audit.path,
        "layout": audit.layout,
        "types": types,
        "parameters": f"{audit.parameters:,} in {len(audit.tensors):,} tensors",
        "ties": describe_ties(audit),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}<dt>sha256 of the weights</dt><dd><code>{audit.sha256}</code></dd></dl>"


def _findings(findings: Sequence[AuditFinding]) -> str:
    problems = [finding.message for finding in findings if finding.problem]
    notes = [finding.message for finding in findings if not finding.problem]
    if not problems:
        said = "<p>No problems.</p>"
    else:
        said = (
            f'<section class="problems"><h3>Problems: loading refuses this checkpoint</h3>{_list(problems)}</section>'
        )
    if notes:
        said += f"<details{' open' if len(notes) <= 20 else ''}><summary>Notes: {len(notes):,}</summary>"
        said += f"{_list(notes)}</details>"
    return said


def _parts(audit: Audit) -> str:
    rows = [["part", "parameters", "share"]]
    rows += [[name, f"{count:,}", show_share(count, audit.parameters)] for name, count in audit.parts.items()]
    return f"<h2>Parts</h2>{_table(rows, {2: list(audit.parts.values())})}"


def _tensor_rows(tensors: Sequence[TensorAudit]) -> list[list[str]]:
    head = ["tensor", "shape", "type", "norm", "mean", "std", "minimum", "maximum", "zeros", "NaN", "infinite"]
    rows = [[*head, "dead rows", "dead columns", "largest s", "stable rank", "effective rank", "sha256"]]
    for tensor in tensors:
        v, s = tensor.values, tensor.spectrum
        numbers = [show_number(value) for value in (v.norm, v.mean, v.std, v.minimum, v.maximum)]
        counts = [show_share(v.zeros, tensor.parameters), show_count(v.nan), show_count(v.infinite)]
        dead = [show_count(tensor.dead_rows.count), show_count(tensor.dead_columns.count)]
        ranks = (
            ["-", "-", "-"]
            if s is None
            else [show_number(s.largest), f"{s.stable_rank:.1f}", f"{s.effective_rank:.1f} of {s.side}"]
        )
        shape = show_shape(tensor.shape)
        rows.append([tensor.name, shape, tensor.dtype, *numbers, *counts, *dead, *ranks, tensor.sha256[:16]])
    return rows


# ---- two checkpoints ----------------------------------------------------------------------------------------------


def _page_of_two(difference: Difference, top: int) -> tuple[str, list[str]]:
    names = {name: f"layer-{i}" for i, name in enumerate(group_by_layer(difference.tensors))}
    body = [f'<p class="verdict">{html.escape(line)}</p>' for line in describe_verdict(difference)]
    for letter, audit in (("A", difference.a), ("B", difference.b)):
        body += [f"<h2>{letter}</h2>", _facts(audit), _findings(audit.findings)]
    body += ["<h2>Configuration</h2>", _config(difference)]
    if unmatched := describe_unmatched(difference, top):
        body += ["<h2>Not compared, or only in part</h2>", _list(unmatched), _quiet("--json has all names.")]
    body += ["<h2>Layers</h2>", _layers(difference, names), _quiet(LEGEND_OF_CHANGES)]
    if top and (most := difference.most_changed(top)):
        bars: Bars = {3: [tensor.change.relative for tensor in most]}
        body += ["<h2>Most changed</h2>", _table(changed_rows("tensor", most), bars)]
    body.append("<h2>Tensors</h2>")
    for name, tensors in group_by_layer(difference.tensors).items():
        relative: Bars = {3: [tensor.change.relative for tensor in tensors]}
        body.append(_folded(name, len(tensors), _table(changed_rows("tensor", tensors), relative), names[name]))
    return f"Comparison of {difference.a.path} and {difference.b.path}", body


def _layers(difference: Difference, names: Mapping[str, str]) -> str:
    bars: Bars = {3: [layer.change.relative for layer in difference.layers]}
    return _table(
        layer_rows(difference), bars, [layer.change.non_finite > 0 for layer in difference.layers], links=names
    )


def _config(difference: Difference) -> str:
    if difference.a.config is None or difference.b.config is None:
        return "<p>Not compared: one of them cannot be read.</p>"
    if not difference.config:
        return "<p>Equal.</p>"
    return _table(
        [["field", "A", "B"], *([change.field, str(change.a), str(change.b)] for change in difference.config)]
    )


# ---- pieces -------------------------------------------------------------------------------------------------------


def _table(
    rows: Sequence[Sequence[str]],
    bars: Bars | None = None,
    bad: Sequence[bool] = (),
    links: Mapping[str, str] | None = None,
) -> str:
    """Return a table of texts, the heading first; `bad` rows stand out; first cells in `links` link to that id."""
    lengths = {column: _scaled(values) for column, values in (bars or {}).items()}
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = []
    for number, (name, *cells) in enumerate(rows[1:]):
        first = html.escape(name)
        if links and name in links:
            first = f'<a href="#{links[name]}">{first}</a>'
        rest = [f"<td>{html.escape(cell)}{_bar(lengths, i, number)}</td>" for i, cell in enumerate(cells, 1)]
        kind = ' class="bad"' if any(bad[number : number + 1]) else ""
        body.append(f'<tr{kind}><th scope="row">{first}</th>{"".join(rest)}</tr>')
    label = html.escape(f"Table by {rows[0][0]}")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _scaled(values: Sequence[float | None]) -> list[float]:
    """Scale values to 0..100 of the largest."""
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    return [100 * (value or 0.0) / top for value in values]


def _bar(lengths: Mapping[int, Sequence[float]], column: int, row: int) -> str:
    if column not in lengths:
        return ""
    width = f"{lengths[column][row]:.1f}"
    return (
        '<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width}" height="1"/></svg>'
    )


def _folded(name: str, count: int, table: str, id: str) -> str:
    """Return a section that unfolds at a click, or when a link leads to the id inside of it."""
    return f'<details><summary>{html.escape(name)} ({count:,})</summary><div id="{id}">{table}</div></details>'


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _quiet(text: str) -> str:
    return f'<p class="quiet">{html.escape(text)}</p>'
