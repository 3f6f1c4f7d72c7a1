"""Audits and comparisons as text for people: what is wrong first, then a table by layer, then single tensors."""

from collections.abc import Iterator, Sequence

from florence2.inspect.audit import Audit, Finding, TensorAudit
from florence2.inspect.difference import Difference, TensorDifference

_SHORT = {"float16": "f16", "float32": "f32", "float64": "f64", "bfloat16": "bf16"}

_LEGEND = (
    "dead: rows, columns and scales of at most a thousandth of the tensor's median; largest s: singular value;",
    "rank used: effective rank as a share of the full one, mean over the layer's maps",
)


def format_audit(audit: Audit, top: int) -> str:
    """A checkpoint, with its `top` most noteworthy findings and tensors."""
    return "\n".join([*_head(audit), *_findings(audit.findings, top), "", *_modules(audit), *_extremes(audit, top)])


def format_difference(found: Difference, top: int) -> str:
    """What differs between two checkpoints, with the `top` most changed tensors."""
    lines = ["A: " + _head(found.a)[0], *_head(found.a)[1:], *_findings(found.a.findings, top)]
    lines += ["B: " + _head(found.b)[0], *_head(found.b)[1:], *_findings(found.b.findings, top)]
    return "\n".join([*lines, "", *_verdict(found), *_config(found), *_unmatched(found, top), *_changes(found, top)])


def _head(audit: Audit) -> list[str]:
    types = ", ".join(audit.dtypes)
    sizes = f"{audit.parameters:,} parameters in {len(audit.tensors):,} tensors"
    return [f"{audit.path}: {audit.layout} layout, {types}, {sizes}", f"sha256 of the weights: {audit.sha256}"]


def _findings(findings: Sequence[Finding], top: int) -> list[str]:
    """Problems in full number, notes up to `top` of each kind."""
    lines: list[str] = []
    for problem, title in ((True, "problems, for which loading refuses it"), (False, "to know")):
        chosen = [finding for finding in findings if finding.problem is problem]
        kinds = dict.fromkeys(finding.kind for finding in chosen)
        lines += [f"{title}:"] if chosen else []
        for kind in kinds:
            messages = [finding.message for finding in chosen if finding.kind == kind]
            lines += [f"  {message}" for message in messages[:top]]
            if len(messages) > top:
                lines.append(f"  and {len(messages) - top:,} more of this kind (--top, or --json for all)")
    return lines or ["no problems"]


def _modules(audit: Audit) -> list[str]:
    head = ["layer", "tensors", "parameters", "type", "norm", "zeros", "not finite", "dead", "largest s", "rank used"]
    rows = [
        [
            module.name,
            str(module.tensors),
            f"{module.parameters:,}",
            "+".join(_SHORT[dtype] for dtype in module.dtypes),
            _number(module.norm),
            _share(module.zeros, module.parameters),
            _count(module.non_finite),
            _count(module.dead),
            _number(module.largest),
            "-" if module.effective_rank is None else f"{module.effective_rank:.0%}",
        ]
        for module in audit.modules
    ]
    return [*format_table([head, *rows]), "", *_LEGEND]


def _extremes(audit: Audit, top: int) -> Iterator[str]:
    """The tensors at the ends of the scales; nothing without spectra."""
    maps = [(tensor, tensor.spectrum) for tensor in audit.tensors if tensor.spectrum is not None]
    if not maps or not top:
        return
    head = ["shape", "std", "largest s", "stable rank", "effective rank"]
    largest = sorted(maps, key=lambda pair: -pair[1].largest)[:top]
    yield from ["", *format_table([["largest singular values", *head], *(_map_row(tensor) for tensor, _ in largest)])]
    lowest = sorted(maps, key=lambda pair: pair[1].effective_rank / pair[1].side)[:top]
    yield from ["", *format_table([["least of its rank used", *head], *(_map_row(tensor) for tensor, _ in lowest)])]


def _map_row(tensor: TensorAudit) -> list[str]:
    spectrum = tensor.spectrum
    assert spectrum is not None
    ranks = [f"{spectrum.stable_rank:.1f}", f"{spectrum.effective_rank:.1f} of {spectrum.side}"]
    return [tensor.name, _shape(tensor.shape), _number(tensor.values.std), _number(spectrum.largest), *ranks]


def _verdict(found: Difference) -> list[str]:
    if found.same:
        types = "" if found.a.dtypes.keys() == found.b.dtypes.keys() else ", in another type"
        return [f"The two hold the same weights{types}: {len(found.tensors):,} tensors are equal value by value."]
    return [f"{found.identical:,} of {len(found.tensors):,} tensors that both have are equal value by value."]


def _config(found: Difference) -> list[str]:
    if found.a.config is None or found.b.config is None:
        return ["The configurations were not compared: one cannot be read."]
    if not found.config:
        return ["The configurations are equal."]
    return ["configuration:", *(f"  {change.field}: {change.a} -> {change.b}" for change in found.config)]


def _unmatched(found: Difference, top: int) -> list[str]:
    """What has no counterpart, or only part of one."""
    lines = []
    for title, names in (("only in A", found.only_a), ("only in B", found.only_b), ("of other sizes", found.misfits)):
        more = f" and {len(names) - top:,} more" if len(names) > top else ""
        lines += [f"{title}, not compared: {', '.join(names[:top])}{more}"] if names else []
    for tensor in found.tensors:
        if tensor.shapes[0] != tensor.shapes[1]:
            a, b, common = (_shape(shape) for shape in (*tensor.shapes, tensor.compared))
            lines.append(f"{tensor.name} is {a} in A and {b} in B; the common {common} was compared")
    return lines


def _changes(found: Difference, top: int) -> Iterator[str]:
    if found.identical == len(found.tensors):
        return
    head = ["equal", "changed", "relative", "cosine", "largest |a-b|", "rank of change"]
    rows = []
    for layer in found.layers:
        change, ratio = layer.change, f"{layer.identical}/{layer.tensors}"
        numbers = [_number(change.relative), _cosine(change.cosine), _number(change.maximum)]
        rank = "-" if layer.rank_99 is None else str(layer.rank_99)
        rows.append([layer.name, ratio, _share(change.changed, layer.parameters), *numbers, rank])
    yield from ["", *format_table([["layer", *head], *rows])]
    if top:
        most = [_tensor_row(tensor) for tensor in found.most_changed(top)]
        yield from ["", *format_table([["most changed", "shape", *head[1:], "stable rank"], *most])]
    yield "\nrank of change: how many singular values hold 99 % of the change's square (of a layer, its largest)"


def _tensor_row(tensor: TensorDifference) -> list[str]:
    change, spectrum = tensor.change, tensor.spectrum
    numbers = [_number(change.relative), _cosine(change.cosine), _number(change.maximum)]
    ranks = (
        ["-", "-"] if spectrum is None else [f"{spectrum.rank_99} of {spectrum.side}", f"{spectrum.stable_rank:.1f}"]
    )
    return [tensor.name, _shape(tensor.compared), _share(change.changed, tensor.parameters), *numbers, *ranks]


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left, the others to the right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _share(count: int, total: int) -> str:
    """A percentage that is 0 or 100 only when it is exactly that."""
    if count in (0, total):
        return "100%" if count else "0"
    return f"{min(max(100 * count / total, 0.01), 99.99):.2f}%"


def _count(count: int) -> str:
    return f"{count:,}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"
