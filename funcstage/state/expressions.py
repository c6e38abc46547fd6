"""Expressions in byte code: what a function compares by identity, and of what it reads all attributes.

No mode sees either. What is found by the byte code alone are expressions; what a function's variables hold
when it returns tells what they were.
"""

from __future__ import annotations

import builtins
import dis
import functools
import sys
from enum import Enum
from types import CodeType, FrameType
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


class _Attribute(NamedTuple):
    holder: Any
    name: str


class _Entry(NamedTuple):
    holder: Any
    key: Any


@functools.lru_cache(maxsize=8192)
def uses_of(code: CodeType) -> tuple[Use, ...]:
    """Read a code object, without those nested in it, and leave out comparisons with constants."""
    reader = _Reader()
    for step in dis.get_instructions(code):
        reader.line = step.positions.lineno if step.positions and step.positions.lineno else reader.line
        reader.read(step)
    return tuple(reader.found)


class _Reader:
    """Follows the stack of the interpreter from step to step, as far as it is plain."""

    def __init__(self) -> None:
        self.found: list[Use] = []
        self.line: int | None = None
        self._stack: list[Any] = []

    def read(self, step: dis.Instruction) -> None:
        operation, argument, stack = step.opname, step.argval, self._stack
        if operation in _NAMES:
            stack += map(_Name, argument if isinstance(argument, tuple) else (argument,))
        elif operation == "LOAD_CONST":
            stack.append(_Constant(argument))
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
            holder = self._pop()
            if not (_is_namespace(holder) and argument == "get"):
                self._leave(holder)
            of_method = operation == "LOAD_METHOD" or (sys.version_info >= (3, 12) and (step.arg or 0) & 1)
            stack.append(UNKNOWN if of_method else _Attribute(holder, argument))
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
            self._find(Kind.IDENTIFIED, _ANY)
        elif function == _ID and operands:
            self._find(Kind.IDENTIFIED, operands[0])
        if function == _VARS and operands:
            self._stack.append(_Attribute(operands[0], "__dict__"))
            return
        self._leave(*operands)
        self._stack.append(UNKNOWN)

    def _find(self, kind: Kind, *operands: Any) -> None:
        self.found.append(Use(kind, operands, self.line))

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
    return isinstance(expression, _Attribute) and expression.name == "__dict__"


def value_of(expression: Any, frame: FrameType) -> Any:
    """What an expression has come to in a function that returns, without running anybody's code.

    `UNKNOWN` where that cannot be told.
    """
    if expression is _ANY:
        return next((value for value in frame.f_locals.values() if isinstance(value, Tensor)), UNKNOWN)
    if isinstance(expression, _Constant):
        return expression.value
    if isinstance(expression, _Name):
        spaces = frame.f_locals, frame.f_globals, frame.f_builtins
        return next((space[expression.name] for space in spaces if expression.name in space), UNKNOWN)
    if isinstance(expression, _Attribute):
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

_ANY: Any = object()
_ID, _VARS = _Name(builtins.id.__name__), _Name(builtins.vars.__name__)
_NAMES = frozenset(
    {"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_FAST_LOAD_FAST", "LOAD_DEREF"}
    | {"LOAD_FAST_BORROW_LOAD_FAST_BORROW", "LOAD_GLOBAL", "LOAD_NAME"}
)
_BUILDING = frozenset({"BUILD_TUPLE", "BUILD_LIST", "BUILD_SET"})
_WITHOUT_EFFECT = frozenset({"PRECALL", "PUSH_NULL", "CACHE", "RESUME", "NOP"})
