"""Format audits and comparisons as text: problems first, then a table by layer, then single tensors."""

from collections.abc import Iterator, Sequence

from florence2.inspect.audit.checkpoint import Audit, AuditFinding, TensorAudit
from florence2.inspect.audit.difference import Difference, TensorDifference
from florence2.inspect.table import format_table

_SHORT = {"float16": "f16", "float32": "f32", "float64": "f64", "bfloat16": "bf16"}

LEGEND = (
    "dead: rows, columns and scales below a thousandth of the tensor's median norm; largest s: largest singular value;",
    "rank used: effective rank as a share of the full rank, averaged over the layer's maps",
)


LEGEND_OF_CHANGES = (
    "rank of change: the number of singular values with 99 % of the change's squared norm (for a layer, its largest)"
)
_CHANGE = ("changed", "relative", "cosine", "largest |a-b|", "rank of change")


def format_audit(audit: Audit, top: int) -> str:
    """Format the audit of a checkpoint, with its `top` most noteworthy findings and tensors."""
    return "\n".join([*_head(audit), *_findings(audit.findings, top), "", *_modules(audit), *_extremes(audit, top)])


def format_difference(difference: Difference, top: int) -> str:
    """Format the comparison of two checkpoints, with the `top` most changed tensors."""
    lines = ["A: " + _head(difference.a)[0], *_head(difference.a)[1:], *_findings(difference.a.findings, top)]
    lines += ["B: " + _head(difference.b)[0], *_head(difference.b)[1:], *_findings(difference.b.findings, top)]
    return "\n".join(
        [
            *lines,
            "",
            *describe_verdict(difference),
            *_config(difference),
            *describe_unmatched(difference, top),
            *_changes(difference, top),
        ]
    )


def _head(audit: Audit) -> list[str]:
    types = ", ".join(audit.dtypes)
    sizes = f"{audit.parameters:,} parameters in {len(audit.tensors):,} tensors"
    parts = ", ".join(
        f"{name} {count:,} ({show_share(count, audit.parameters)})" for name, count in audit.parts.items()
    )
    return [
        f"{audit.path}: {audit.layout} layout, {types}, {sizes}",
        f"sha256 of the weights: {audit.sha256}",
        f"parameters: {parts}",
        f"ties: {describe_ties(audit)}",
    ]


def describe_ties(audit: Audit) -> str:
    """Describe which tensors are stored under several names, and whether these are equal."""
    broken = any(finding.kind == "tie" for finding in audit.findings)
    if not audit.tied:
        own = any(tensor.name == "lm_head.weight" for tensor in audit.tensors)
        output = "the output map has a weight of its own" if own else "the output map is the token embedding"
        return f"none; every tensor has one name, and {output}"
    state = "not all equal, see the problems" if broken else "equal bit for bit"
    return "; ".join(f"{name} is stored as {', '.join(names)}, {state}" for name, names in audit.tied.items())


def _findings(findings: Sequence[AuditFinding], top: int) -> list[str]:
    """Return up to `top` problems and notes of each kind."""
    lines: list[str] = []
    for problem, title in ((True, "problems; loading refuses this checkpoint"), (False, "notes")):
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
    return [*format_table(module_rows(audit)), "", *LEGEND]


def module_rows(audit: Audit) -> list[list[str]]:
    """Return the table by layer, the heading first."""
    head = ["layer", "tensors", "parameters", "type", "norm", "zeros", "not finite", "dead", "largest s", "rank used"]
    rows = [
        [
            module.name,
            str(module.tensors),
            f"{module.parameters:,}",
            "+".join(_SHORT[dtype] for dtype in module.dtypes),
            show_number(module.norm),
            show_share(module.zeros, module.parameters),
            show_count(module.non_finite),
            show_count(module.dead),
            show_number(module.largest),
            "-" if module.effective_rank is None else f"{module.effective_rank:.0%}",
        ]
        for module in audit.modules
    ]
    return [head, *rows]


def _extremes(audit: Audit, top: int) -> Iterator[str]:
    """Yield tables of the tensors with extreme spectra; nothing without spectra."""
    maps = [(tensor, tensor.spectrum) for tensor in audit.tensors if tensor.spectrum is not None]
    if not maps or not top:
        return
    head = ["shape", "std", "largest s", "stable rank", "effective rank"]
    largest = sorted(maps, key=lambda pair: -pair[1].largest)[:top]
    yield from ["", *format_table([["largest singular values", *head], *(_map_row(tensor) for tensor, _ in largest)])]
    lowest = sorted(maps, key=lambda pair: pair[1].effective_rank / pair[1].side)[:top]
    yield from ["", *format_table([["lowest rank used", *head], *(_map_row(tensor) for tensor, _ in lowest)])]


def _map_row(tensor: TensorAudit) -> list[str]:
    spectrum = tensor.spectrum
    assert spectrum is not None
    ranks = [f"{spectrum.stable_rank:.1f}", f"{spectrum.effective_rank:.1f} of {spectrum.side}"]
    return [
        tensor.name,
        show_shape(tensor.shape),
        show_number(tensor.values.std),
        show_number(spectrum.largest),
        *ranks,
    ]


def describe_verdict(difference: Difference) -> list[str]:
    """Describe in one sentence how many tensors are equal."""
    if difference.same:
        types = "" if difference.a.dtypes.keys() == difference.b.dtypes.keys() else ", in different types"
        return [f"Both hold the same weights{types}: {len(difference.tensors):,} tensors are equal value by value."]
    return [f"{difference.identical:,} of {len(difference.tensors):,} comparable tensors are equal value by value."]


def _config(difference: Difference) -> list[str]:
    if difference.a.config is None or difference.b.config is None:
        return ["The configurations were not compared: one of them cannot be read."]
    if not difference.config:
        return ["The configurations are equal."]
    return ["configuration:", *(f"  {change.field}: {change.a} -> {change.b}" for change in difference.config)]


def describe_unmatched(difference: Difference, top: int) -> list[str]:
    """Return lines about tensors without a counterpart, of other sizes, or with values that cannot be compared."""
    lines = []
    for title, names in (
        ("only in A", difference.only_a),
        ("only in B", difference.only_b),
        ("of other sizes", difference.misfits),
    ):
        more = f" and {len(names) - top:,} more" if len(names) > top else ""
        lines += [f"{title}, not compared: {', '.join(names[:top])}{more}"] if names else []
    for tensor in difference.tensors:
        if tensor.shapes[0] != tensor.shapes[1]:
            a, b, common = (show_shape(shape) for shape in (*tensor.shapes, tensor.compared))
            lines.append(f"{tensor.name} is {a} in A and {b} in B; the common {common} was compared")
        if count := tensor.change.non_finite:
            lines.append(f"{tensor.name}: {count:,} values are not finite in A or B and are left out")
    return lines


def _changes(difference: Difference, top: int) -> Iterator[str]:
    if difference.identical == len(difference.tensors):
        return
    yield from ["", *format_table(layer_rows(difference))]
    if top:
        yield from ["", *format_table(changed_rows("most changed", difference.most_changed(top)))]
    yield f"\n{LEGEND_OF_CHANGES}"


def layer_rows(difference: Difference) -> list[list[str]]:
    """Return the table of changes by layer, the heading first."""
    rows = [["layer", "equal", *_CHANGE]]
    for layer in difference.layers:
        change, ratio = layer.change, f"{layer.identical}/{layer.tensors}"
        numbers = [show_number(change.relative), show_cosine(change.cosine), show_number(change.maximum)]
        rank = "-" if layer.rank_99 is None else str(layer.rank_99)
        rows.append([layer.name, ratio, show_share(change.changed, layer.parameters), *numbers, rank])
    return rows


def changed_rows(title: str, tensors: Sequence[TensorDifference]) -> list[list[str]]:
    """Return a table of changes by tensor, the heading first."""
    return [[title, "shape", *_CHANGE, "stable rank"], *(_tensor_row(tensor) for tensor in tensors)]


def _tensor_row(tensor: TensorDifference) -> list[str]:
    change, spectrum = tensor.change, tensor.spectrum
    numbers = [show_number(change.relative), show_cosine(change.cosine), show_number(change.maximum)]
    ranks = (
        ["-", "-"] if spectrum is None else [f"{spectrum.rank_99} of {spectrum.side}", f"{spectrum.stable_rank:.1f}"]
    )
    return [tensor.name, show_shape(tensor.compared), show_share(change.changed, tensor.parameters), *numbers, *ranks]


def show_number(value: float | None) -> str:
    """Format a number with four digits, None as a dash."""
    return "-" if value is None else f"{value:.4g}"


def show_cosine(value: float | None) -> str:
    """Format a cosine with six decimals, None as a dash."""
    return "-" if value is None else f"{value:.6f}"


def show_share(count: int, total: int) -> str:
    """Format a percentage that is 0 or 100 only when it is exactly that."""
    if count in (0, total):
        return "100%" if count else "0"
    return f"{min(max(100 * count / total, 0.01), 99.99):.2f}%"


def show_count(count: int) -> str:
    """Format a count with digits in groups of three."""
    return f"{count:,}"


def show_shape(shape: Sequence[int]) -> str:
    """Format a shape as "64 x 3", that of a scalar as "1"."""
    return " x ".join(map(str, shape)) or "1"
