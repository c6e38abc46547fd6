"""Expressions in byte code: what a function compares by identity, and of what it reads all attributes.

No mode sees either. What is found by the byte code alone are expressions; what a function's variables hold
when it returns tells what they were.
"""

from __future__ import annotations

import builtins
import dis
import functools
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from types import CodeType, FrameType, MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor


class Kind(Enum):
    """What a function does with operands.

    `COMPARED`: two, by `is`. `SOUGHT`: one, by `in`. `IDENTIFIED`: one, by `id`. `NAMESPACE`: the attributes
    of one are counted, listed or written as a dict, other than by name.
    """

    COMPARED = "is"
    SOUGHT = "in"
    IDENTIFIED = "id"
    NAMESPACE = "__dict__"


class Use(NamedTuple):
    """What a function does somewhere.

    Attributes:
        kind: what.
        operands: as expressions, for `value_of`.
        line: where.
    """

    kind: Kind
    operands: tuple[Any, ...]
    line: int | None


class _Name(NamedTuple):
    name: str


class _Constant(NamedTuple):
    value: Any


class Attribute(NamedTuple):
    holder: Any
    name: str


class _Entry(NamedTuple):
    holder: Any
    key: Any


class Result(NamedTuple):
    """What a call returns, by its place in the code."""

    offset: int


class Changing(NamedTuple):
    """What a variable held for a while, which is assigned anew."""

    name: str


class Code(NamedTuple):
    """What is read of a code object, without those nested in it.

    Attributes:
        uses: what it does with operands, other than comparisons with constants.
        calls: the operands of its calls, by their places.
        results: the calls of which it compares what they return.
    """

    uses: tuple[Use, ...]
    calls: Mapping[int, tuple[Any, ...]]
    results: frozenset[int]

    def call_at(self, place: int) -> tuple[Any, ...] | None:
        """The operands of the call at which a function is; up to Python 3.11 it is a few bytes behind it."""
        before = [offset for offset in self.calls if offset <= place < offset + _CALL_SIZE]
        return self.calls[max(before)] if before else None

    def result_at(self, place: int) -> int | None:
        """The call at which a function is, if it compares what that returns."""
        return next((offset for offset in self.results if offset <= place < offset + _CALL_SIZE), None)


def uses_of(code: CodeType) -> tuple[Use, ...]:
    """What a code object does with operands."""
    return read(code).uses


@functools.lru_cache(maxsize=8192)
def read(code: CodeType) -> Code:
    """Read a code object."""
    reader, steps = _Reader(), [*dis.get_instructions(code)]
    for step in steps:
        reader.line = step.positions.lineno if step.positions and step.positions.lineno else reader.line
        reader.read(step)
    changes = _Changes(steps)
    uses = [
        use._replace(operands=tuple(changes.seen_at(place, operand) for operand in use.operands))
        if use.kind is Kind.COMPARED
        else use
        for place, use in reader.found
    ]
    compared = [operand for use in uses for operand in use.operands if use.kind is Kind.COMPARED]
    compared += [operand for operands in reader.calls.values() for operand in operands]
    results = frozenset(operand.offset for operand in compared if isinstance(operand, Result))
    return Code(tuple(uses), reader.calls, results)


class _Changes:
    """Which variables a function assigns anew after it has compared them, in a loop for one."""

    def __init__(self, steps: Sequence[dis.Instruction]) -> None:
        self._stores = [
            (step.offset, name)
            for step in steps
            if "STORE_" in step.opname
            for name in (step.argval if isinstance(step.argval, tuple) else (step.argval,))
        ]
        backward = [s for s in steps if "JUMP" in s.opname and type(s.argval) is int and s.argval < s.offset]
        self._loops = [(step.argval, step.offset) for step in backward]

    def seen_at(self, place: int, operand: Any) -> Any:
        """An operand as it can be told when the function returns."""
        if not isinstance(operand, _Name):
            return operand
        around = [(start, end) for start, end in self._loops if start <= place <= end]
        start = min((start for start, _ in around), default=place)
        changes = any(offset >= start and name == operand.name for offset, name in self._stores)
        return Changing(operand.name) if changes else operand


class _Reader:
    """Follows the stack of the interpreter from step to step, as far as it is plain."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Use]] = []
        self.calls: dict[int, tuple[Any, ...]] = {}
        self.line: int | None = None
        self._place = 0
        self._stack: list[Any] = []

    def read(self, step: dis.Instruction) -> None:
        operation, argument, stack = step.opname, step.argval, self._stack
        self._place = step.offset
        if operation in _NAMES:
            stack += map(_Name, argument if isinstance(argument, tuple) else (argument,))
        elif operation == "STORE_FAST_LOAD_FAST":
            self._clear()
            stack.append(_Name(argument[1]))
        elif operation == "LOAD_CONST":
            stack.append(_Constant(argument))
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
            holder = self._pop()
            if not (_is_namespace(holder) and argument == "get"):
                self._leave(holder)
            of_method = operation == "LOAD_METHOD" or (sys.version_info >= (3, 12) and (step.arg or 0) & 1)
            stack.append(UNKNOWN if of_method else Attribute(holder, argument))
        elif operation == "BINARY_SUBSCR" or (operation == "BINARY_OP" and step.argrepr == "[]"):
            key, holder = self._pop(), self._pop()
            if not isinstance(key, _Constant):
                self._leave(key, holder)
            stack.append(_Entry(holder, key))
        elif operation == "CONTAINS_OP":
            container, sought = self._pop(), self._pop()
            if not (_is_namespace(container) and isinstance(sought, _Constant)):
                self._leave(container)
            self._find(Kind.SOUGHT, sought)
            stack.append(UNKNOWN)
        elif operation == "IS_OP":
            second, first = self._pop(), self._pop()
            if not (isinstance(first, _Constant) or isinstance(second, _Constant)):
                self._find(Kind.COMPARED, first, second)
            stack.append(UNKNOWN)
        elif operation == "CALL":
            self._call(step.arg or 0)
        elif operation in _BUILDING or operation in ("COMPARE_OP", "BINARY_OP"):
            self._leave(*[self._pop() for _ in range(step.arg or 0 if operation in _BUILDING else 2)])
            stack.append(UNKNOWN)
        elif operation not in _WITHOUT_EFFECT:
            self._clear()

    def _call(self, count: int) -> None:
        operands = [self._pop() for _ in range(count)]
        function = self._pop()
        if _ID in operands:  # passed on, to map for one
            self._find(Kind.IDENTIFIED, ANY)
        elif function == _ID and operands:
            self._find(Kind.IDENTIFIED, operands[0])
        if function == _VARS and operands:
            self._stack.append(Attribute(operands[0], "__dict__"))
            return
        self._leave(*operands)
        self.calls[self._place] = tuple(operands)
        self._stack.append(Result(self._place))

    def _find(self, kind: Kind, *operands: Any) -> None:
        self.found.append((self._place, Use(kind, operands, self.line)))

    def _pop(self) -> Any:
        return self._stack.pop() if self._stack else UNKNOWN

    def _leave(self, *expressions: Any) -> None:
        """Let go of expressions for a purpose that is not followed."""
        for expression in expressions:
            if _is_namespace(expression):
                self._find(Kind.NAMESPACE, expression.holder)

    def _clear(self) -> None:
        self._leave(*self._stack)
        self._stack.clear()


def _is_namespace(expression: Any) -> bool:
    return isinstance(expression, Attribute) and expression.name == "__dict__"


def value_of(expression: Any, frame: FrameType, results: Mapping[int, Any] = MappingProxyType({})) -> Any:
    """What an expression has come to in a function that returns, without running anybody's code.

    `UNKNOWN` where that cannot be told. `results` has what its calls have returned, by their places.
    """
    if expression is ANY:
        return next((value for value in frame.f_locals.values() if isinstance(value, Tensor)), UNKNOWN)
    if isinstance(expression, Result):
        return results.get(expression.offset, UNKNOWN)
    if isinstance(expression, _Constant):
        return expression.value
    if isinstance(expression, _Name):
        spaces = frame.f_locals, frame.f_globals, frame.f_builtins
        return next((space[expression.name] for space in spaces if expression.name in space), UNKNOWN)
    if isinstance(expression, Attribute):
        return _attribute(value_of(expression.holder, frame), expression.name)
    if isinstance(expression, _Entry):
        holder, key = value_of(expression.holder, frame), value_of(expression.key, frame)
        if type(holder) in (list, tuple, dict) and isinstance(key, int | str):
            try:
                return holder[key]
            except LookupError:
                return UNKNOWN
    return UNKNOWN


def _attribute(holder: Any, name: str) -> Any:
    own = {} if isinstance(holder, Tensor) else getattr(holder, "__dict__", {})
    held = [own, *(own.get(kind) or {} for kind in ("_parameters", "_buffers", "_modules"))]
    return next((space[name] for space in held if name in space), UNKNOWN)


UNKNOWN: Any = object()
"""What an expression is that is not followed."""

ANY: Any = object()
"""Any tensor among the variables."""

_ID, _VARS = _Name(builtins.id.__name__), _Name(builtins.vars.__name__)
_CALL_SIZE = 2 + 2 * 4
"""Bytes of a call, with the space behind it in which the interpreter remembers what it has called."""
_NAMES = frozenset(
    {"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_FAST_LOAD_FAST", "LOAD_DEREF"}
    | {"LOAD_FAST_BORROW_LOAD_FAST_BORROW", "LOAD_GLOBAL", "LOAD_NAME"}
)
_BUILDING = frozenset({"BUILD_TUPLE", "BUILD_LIST", "BUILD_SET"})
_WITHOUT_EFFECT = frozenset({"PRECALL", "PUSH_NULL", "CACHE", "RESUME", "NOP"})
