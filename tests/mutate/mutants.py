"""The changes: each replaces one expression or statement of a source file, and leaves all other text as it stands."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

Node = TypeVar("Node", bound=ast.AST)
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
SYMMETRIC = set("min max isinstance issubclass cast TypeVar hasattr dims equal allclose gcd promote_types".split())
"""Functions whose first two arguments may be exchanged, or whose exchange shows nothing."""
CONTRACTS = set(
    "strict stacklevel non_blocking pin_memory help metavar prog description frozen eq encoding indent stable".split()
)
"""Keywords that check our own mistakes, say something to people, make things faster, or sort as a CPU does anyway."""
FIXED = set("POSITION_OFFSET IGNORED_LABEL NUM_BINS _EXIF_ORIENTATION _NOT_STARTED".split())
"""The numbers with a name that are no choice of ours."""
DOCUMENTS = ("annotation", "returns", "decorator_list", "bases", "exc", "cause", "msg", "type_comment", "type_params")
"""Parts of a node that compute nothing that a test should look at: annotations, messages, base classes."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the bytes from `start` to `end` become `new`.

    `within` is the dotted name of the function or class around it, and `source` the text of its first line.
    """

    path: str
    line: int
    start: int
    end: int
    old: str
    new: str
    within: str
    source: str

    def apply(self, text: str) -> str:
        """Return the changed text of the file."""
        data = text.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()


def find_mutants(path: str, text: str) -> list[Mutant]:
    """Return every change of a file, in the order of its text."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    mutants = []
    for node, within in _nodes(ast.parse(text), ""):
        for place, new in _changes(node):
            start = starts[place.lineno - 1] + place.col_offset
            end = starts[place.end_lineno - 1] + place.end_col_offset
            old = text.encode()[start:end].decode()
            first = lines[place.lineno - 1].decode().strip()
            mutants.append(Mutant(path, place.lineno, start, end, old, new, within, first))
    return sorted(mutants, key=lambda mutant: (mutant.start, mutant.end, mutant.new))


def _nodes(node: ast.AST, within: str) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Yield every statement and expression that may be changed, with the name of the function around it."""
    if _is_left_alone(node) or (not within and _is_choice(node)):
        return
    if isinstance(node, ast.keyword) and node.arg == "dim" and isinstance(node.value, ast.UnaryOp):
        node = node.value  # of two axes the last is axis 1, so -1 becomes -2 and 0 alone
    elif isinstance(node, ast.stmt | ast.expr):
        yield node, within
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        within = f"{within}.{node.name}".removeprefix(".")
    for name, value in ast.iter_fields(node):
        if name not in DOCUMENTS:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _nodes(child, within)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return True  # a message, a check of our own mistakes, a name
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TypeVar":
        return True
    if isinstance(node, ast.keyword):
        return node.arg in CONTRACTS
    if isinstance(node, ast.ClassDef):
        return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_choice(node: ast.AST) -> bool:
    """Tell whether a statement gives a number its name: a size, limit or threshold that may as well be another.

    That it acts is tested by the changes of the lines that use it.
    """
    if not isinstance(node, ast.Assign):
        return False
    names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
    if not all(isinstance(name, ast.Name) for name in names):
        return False
    parts = list(ast.walk(node.value))
    is_number = all(
        isinstance(part, ast.Constant | ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop | ast.Tuple | ast.Load)
        for part in parts
    )
    return is_number and FIXED.isdisjoint(name.id for name in names if isinstance(name, ast.Name))


def _changes(node: ast.stmt | ast.expr) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Yield the parts of a node that may be replaced, and the texts that take their place."""
    if isinstance(node, ast.expr):
        yield from ((node, _written(changed)) for changed in _changes_of_expression(node))
    elif isinstance(node, ast.If):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    else:
        yield from ((node, changed) for changed in _changes_of_statement(node))


def _written(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if isinstance(node, ast.Constant | ast.Call | ast.Name | ast.Attribute) else f"({text})"


def _changes_of_statement(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Expr):
        acts = isinstance(node.value, ast.Call | ast.Yield | ast.YieldFrom)
    elif isinstance(node, ast.Assign):
        acts = isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    else:
        acts = isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Break)
    if acts:
        yield "pass"
    elif isinstance(node, ast.Continue):
        yield "break"


def _changes_of_expression(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            yield _changed(node, ops=[*node.ops[:i], COMPARISONS[type(operator)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp) and not _is_union(node):
        yield _changed(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        yield from (_without(node, i) for i in range(len(node.values)))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, _other_values(node.value))
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.IfExp):
        yield _changed(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        for i, loop in enumerate(node.generators):
            if loop.ifs:
                everything = _changed(loop, ifs=[])
                yield _changed(node, generators=[*node.generators[:i], everything, *node.generators[i + 1 :]])


def _other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1] if value > 0 else [value + 1]
    return [value * 2 if value else 1.0] if isinstance(value, float) else []


def _other_calls(node: ast.Call) -> Iterator[ast.expr]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first, second, *rest = [*node.args, None, None]
    starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
    if first and second and not starred and name not in SYMMETRIC and ast.dump(first) != ast.dump(second):
        yield _changed(node, args=[second, first, *rest[:-2]])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in CONTRACTS:
            yield _changed(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])


def _without(node: ast.BoolOp, index: int) -> ast.expr:
    rest = [*node.values[:index], *node.values[index + 1 :]]
    return rest[0] if len(rest) == 1 else _changed(node, values=rest)


def _is_union(node: ast.BinOp) -> bool:
    """Tell whether `|` joins types, as in an alias."""
    sides = [node.left, node.right]
    named = (
        isinstance(side, ast.Name | ast.Attribute) and ast.unparse(side).split(".")[-1][:1].isupper() for side in sides
    )
    none = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
    return isinstance(node.op, ast.BitOr) and (none or any(named))


def _changed(node: Node, **fields: object) -> Node:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new
