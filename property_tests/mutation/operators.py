"""Faults: what may be planted in a source file, as replacements of its text."""

from __future__ import annotations

import ast
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

Fault = tuple[Any, str]
"""A node of a syntax tree, and the source in its place."""


@dataclass(frozen=True)
class Mutant:
    """A source file with one fault.

    Attributes:
        file: the file, relative to the root.
        function: the qualified name of the function or class that the fault is in; empty at module level.
        old: what stood there, on one line.
        new: what stands there instead.
        kind: of fault, a key of `OPERATORS`.
        lines: the first and last line of what is replaced, and of the statement that it is a part of.
        span: the place in the file, as offsets of bytes.
        number: of those that are called the same.
    """

    file: str
    function: str
    old: str
    new: str
    kind: str
    lines: tuple[int, int]
    span: tuple[int, int]
    number: int = 1

    @property
    def name(self) -> str:
        """The same in the next version of the file, if nobody touches the place."""
        number = f" (number {self.number})" if self.number > 1 else ""
        return f"{self.file} | {self.function} | {self.old} -> {self.new}{number}"

    def source(self, text: str) -> str:
        """The file with the fault; what follows keeps its line numbers where the fault is no longer."""
        data = text.encode()
        start, end = self.span
        lost = data[start:end].count(b"\n") - self.new.count("\n")
        padding = b"\\\n" * lost if lost > 0 else b""
        return (data[:start] + self.new.encode() + padding + data[end:]).decode()


def mutants_of(file: str, text: str) -> list[Mutant]:
    """All mutants of a source file, in the order of the file."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    alike: Counter[str] = Counter()
    for place in _places(ast.parse(text), Place("", 1, len(starts))):
        for kind, operator in OPERATORS.items():
            for old, new in operator(place.node):
                span = tuple(
                    starts[line - 1] + column
                    for line, column in ((old.lineno, old.col_offset), (old.end_lineno, old.end_col_offset))
                )
                lines = place.first, place.last or old.end_lineno
                mutant = Mutant(file, place.function, _line(ast.unparse(old)), new, kind, lines, span)
                alike[mutant.name] += 1
                found.append(replace(mutant, number=alike[mutant.name]))
    return found


def sample(mutants: Iterable[Mutant], n: int, seed: int) -> list[Mutant]:
    """Draw `n` mutants, the same for the same seed, in any order."""
    mutants = list(mutants)
    return random.Random(seed).sample(mutants, min(n, len(mutants)))


class Place(NamedTuple):
    """Where a fault may lie.

    Attributes:
        function: the qualified name of the function or class around it.
        first: the first line of the statement around it.
        last: the last line of what it belongs to, where it runs before a test does: when that is imported.
        node: the place itself.
    """

    function: str
    first: int
    last: int | None
    node: Any = None


_SKIPPED = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)
"""Text for people is no matter of tests, nor are imports; that an error is raised at all is one."""
_SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "bases")


def _places(node: ast.AST, around: Place) -> Iterator[Place]:
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or field in _SKIPPED_FIELDS or _is_no_place(child):
                continue
            place = around._replace(node=child)
            if isinstance(node, ast.FunctionDef) and field == "body":
                place = place._replace(last=None)
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{around.function}.{child.name}".lstrip(".")
                place = Place(name, child.lineno, child.end_lineno, child)
            elif isinstance(child, ast.stmt) and place.last is None:
                place = place._replace(first=child.lineno)
            yield place
            if not isinstance(child, _SKIPPED):
                yield from _places(child, place)


def _is_no_place(node: Any) -> bool:
    if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
        return True
    if isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    if (
        isinstance(node, ast.keyword) and node.arg == "strict"
    ):  # of zip: a check of our own, which never fails
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring


def _line(text: str) -> str:
    return " ".join(text.split())


def _put(old: ast.AST, text: str) -> Fault:
    return old, f"({_line(text)})" if isinstance(old, ast.expr) else _line(text)


def _negated(node: Any) -> Iterator[Fault]:
    """A condition is negated, or loses its `not`."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        tests = [node.test]
    else:
        tests = node.ifs if isinstance(node, ast.comprehension) else []
    for test in tests:
        if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)) and not _has_opposite(test):
            yield _put(test, f"not ({ast.unparse(test)})")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _put(node, ast.unparse(node.operand))


_BY_SIZE = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_PAIRS = ((ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE))
_COMPARED = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


def _has_opposite(test: Any) -> bool:
    """Whether another comparison, which is a fault of its own, is the same as its negation."""
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and not isinstance(test.ops[0], _BY_SIZE)


def _other_logic(node: Any) -> Iterator[Fault]:
    """`and` for `or`, an operand less, another comparison."""
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield _put(node, ast.unparse(ast.BoolOp(other, node.values)))
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield _put(node, ast.unparse(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other_op = _COMPARED[type(node.ops[0])]()
        yield _put(node, ast.unparse(ast.Compare(node.left, [other_op], node.comparators)))


def _other_flag(node: Any) -> Iterator[Fault]:
    """Another boolean."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield _put(node, repr(not node.value))


def _uncopied(node: Any) -> Iterator[Fault]:
    """A copy or a detachment is left out."""
    copies = ("clone", "detach", "contiguous", "copy", "requires_grad_")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in copies:
        yield _put(node, ast.unparse(node.func.value))


def _off_by_one(node: Any) -> Iterator[Fault]:
    """A number or the bound of a slice is larger or smaller by one."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield _put(node, str(node.value + 1))
    if isinstance(node, ast.Slice):
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                yield _put(bound, f"{ast.unparse(bound)} - 1")


def _not_refused(node: Any) -> Iterator[Fault]:
    """An error is not raised."""
    if isinstance(node, ast.Raise):
        yield _put(node, "pass")


def _without_statement(node: Any) -> Iterator[Fault]:
    if isinstance(node, (ast.AugAssign, ast.Delete, ast.Continue, ast.Break)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield _put(node, "pass")


def _without_result(node: Any) -> Iterator[Fault]:
    if isinstance(node, ast.Return) and ast.unparse(node.value or node) not in ("return", "None", "False"):
        yield _put(node.value, "None")


def _without_context(node: Any) -> Iterator[Fault]:
    """A block runs without a context that is entered around it."""
    if isinstance(node, ast.With):
        for item in node.items:
            if item.optional_vars is None and isinstance(item.context_expr, ast.Call):
                yield _put(item.context_expr, "__import__('contextlib').nullcontext()")


def _with_fewer_elements(node: Any) -> Iterator[Fault]:
    """The last of a tuple is left out, or all of another container."""
    if isinstance(node, ast.Tuple) and len(node.elts) > 1:
        yield _put(node, f"{', '.join(map(ast.unparse, node.elts[:-1]))},")
    if isinstance(node, (ast.List, ast.Set, ast.Dict)) and ast.unparse(node) not in ("[]", "{}"):
        yield _put(node, {ast.List: "[]", ast.Set: "set()", ast.Dict: "{}"}[type(node)])
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp)):
        yield _put(node, {ast.ListComp: "[]", ast.SetComp: "set()", ast.DictComp: "{}"}[type(node)])


def _swapped(node: Any) -> Iterator[Fault]:
    """The first two arguments change places."""
    if (
        not isinstance(node, ast.Call)
        or len(node.args) < 2
        or ast.unparse(node.func) in ("isinstance", "zip")
    ):
        return
    first, second, *rest = node.args
    if ast.unparse(first) == ast.unparse(second):
        return
    if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
        yield _put(node, ast.unparse(ast.Call(node.func, [second, first, *rest], node.keywords)))


OPERATORS: dict[str, Callable[[Any], Iterator[Fault]]] = {
    "negation": _negated,
    "logic": _other_logic,
    "flag": _other_flag,
    "copy": _uncopied,
    "number": _off_by_one,
    "refusal": _not_refused,
    "statement": _without_statement,
    "result": _without_result,
    "context": _without_context,
    "element": _with_fewer_elements,
    "order": _swapped,
}
