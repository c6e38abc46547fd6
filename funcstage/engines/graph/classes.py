"""Which functions ask for what cannot be lent to tensors of a trace: their very class, and all attributes.

`isinstance` is right there, but `type(x) is torch.Tensor` is not. The byte code of a function that runs tells
that it compares so, and what its variables hold when it returns tells whether that was a tensor of the trace.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from funcstage._torch.tensors import IS_PARAMETER, is_functional
from funcstage.errors import TraceError
from funcstage.state.expressions import Kind, uses_of, value_of


class Comparison(NamedTuple):
    """`type(variable.attribute) is other`, `table[type(variable)]` or the like.

    Attributes:
        variable: a local one.
        attributes: those that lead from it to what is asked for its class.
        others: what the class is compared with or looked up in, as names from a variable on, or constants.
        line: where.
    """

    variable: str
    attributes: tuple[str, ...]
    others: tuple[Any, ...]
    line: int | None


def refusal_in(frame: FrameType) -> TraceError | None:
    """What is to be said of a function that returns, if it has asked such a thing of a traced tensor."""
    where = compared_class(frame)
    if where is not None:
        return TraceError(
            f"The stage compares the class of a tensor (at {where}), which is another while it is traced. "
            "Ask isinstance(x, torch.Tensor), or isinstance(w, torch.nn.Parameter)."
        )
    where = opened_namespace(frame)
    if where is not None:
        return TraceError(
            f"The stage reads all attributes of a tensor (vars or __dict__, at {where}), which has others "
            "while it is traced. Ask for those that are meant by name: getattr(x, name, None)."
        )
    return None


def compared_class(frame: FrameType) -> str | None:
    """Where a function that returns has compared the class of a tensor of the trace, as ``file:number``."""
    for comparison in comparisons_of(frame.f_code):
        value = _followed(frame.f_locals.get(comparison.variable), comparison.attributes)
        if isinstance(value, Tensor) and is_functional(value):
            spaces = {**frame.f_builtins, **frame.f_globals, **frame.f_locals}
            if any(_may_differ(value, other, spaces) for other in comparison.others):
                return f"{frame.f_code.co_filename}:{comparison.line}"
    return None


def opened_namespace(frame: FrameType) -> str | None:
    """Where a function that returns has read all attributes of a tensor of the trace, likewise."""
    for use in uses_of(frame.f_code):
        if use.kind is Kind.NAMESPACE:
            value = value_of(use.operands[0], frame)
            if isinstance(value, Tensor) and is_functional(value):
                return f"{frame.f_code.co_filename}:{use.line}"
    return None


def refuse(refusal: TraceError | None) -> None:
    """Raise what is to be said, if anything is."""
    if refusal is not None:
        raise refusal


@functools.lru_cache(maxsize=8192)
def comparisons_of(code: CodeType) -> tuple[Comparison, ...]:
    """Where a function compares the class of something."""
    if not {"type", "__class__"} & {*code.co_names}:
        return ()
    steps = [single for step in dis.get_instructions(code) for single in _singles(step)]
    return tuple(found for i in range(len(steps)) if (found := _comparison_at(steps, i)) is not None)


def _singles(step: dis.Instruction) -> Iterator[dis.Instruction]:
    """A step of the interpreter, without those that do nothing; the two of which it is made, if it is."""
    if "_LOAD_" in step.opname:
        names = step.opname.replace("_LOAD", " LOAD").split()
        yield from (step._replace(opname=n, argval=v) for n, v in zip(names, step.argval, strict=True))
    elif step.opname not in _WITHOUT_EFFECT:
        yield step


def _comparison_at(steps: list[dis.Instruction], i: int) -> Comparison | None:
    begin = i
    called = steps[i].opname == "LOAD_GLOBAL" and steps[i].argval == "type"
    i += called
    if i >= len(steps) or steps[i].opname not in _OF_LOCALS:
        return None
    variable, positions = steps[i].argval, steps[i].positions
    attributes, i = _attributes(steps, i + 1)
    if called:
        if not (i < len(steps) and steps[i].opname == "CALL" and steps[i].arg == 1):
            return None
        i += 1
    elif attributes[-1:] == ("__class__",):
        attributes = attributes[:-1]
    else:
        return None
    line = None if positions is None else positions.lineno
    if steps[i : i + 1] and steps[i].argval == "__name__":
        i += 1
    table = _looked_up_in(steps, begin, i)
    if table:
        return Comparison(variable, attributes, (table,), line)
    others: list[Any] = []
    while i < len(steps) and steps[i].opname not in _COMPARING:
        step, i = steps[i], i + 1
        if step.opname == "CALL" and ("type",) in others:
            others.remove(("type",))
        elif step.opname in _OF_NAMES:
            names, i = _attributes(steps, i)
            others.append((step.argval, *names))
        elif step.opname == "LOAD_CONST":
            others.append(step.argval)
        elif step.opname not in _ON_THE_WAY and step.argval != "__name__":
            return None
    return Comparison(variable, attributes, tuple(others), line) if i < len(steps) else None


def _looked_up_in(steps: list[dis.Instruction], begin: int, end: int) -> tuple[str, ...] | None:
    """The table in which what is between two steps is looked up, as names."""
    names: list[str] = []
    for step in reversed(steps[:begin]):
        names.insert(0, step.argval)
        if step.opname not in _OF_ATTRIBUTES:
            break
    else:
        return None
    is_entry = end < len(steps) and (steps[end].opname == "BINARY_SUBSCR" or steps[end].argrepr == "[]")
    if step.opname not in _OF_NAMES:
        return None
    if is_entry:
        return tuple(names)
    return tuple(names[:-1]) if names[-1] == "get" else None


def _attributes(steps: list[dis.Instruction], i: int) -> tuple[tuple[str, ...], int]:
    """The attributes that are loaded one after another, and what comes then."""
    names = []
    while i < len(steps) and steps[i].opname == "LOAD_ATTR":
        names.append(steps[i].argval)
        i += 1
    return tuple(names), i


def _followed(value: Any, names: tuple[str, ...]) -> Any:
    """What attributes lead to, without running properties."""
    for name in names:
        own = getattr(value, "__dict__", {})
        held = [own, *(own.get(kind) or {} for kind in ("_parameters", "_buffers", "_modules"))]
        held += map(vars, type(value).__mro__)
        value = next((space[name] for space in held if name in space), None)
    return value


def _may_differ(tensor: Tensor, other: Any, spaces: Mapping[str, Any]) -> bool:
    """Tell whether something is or has a class of tensors, or is a tensor of another class in eager."""
    if isinstance(other, tuple):
        other = _followed(spaces.get(other[0]), other[1:])
        if isinstance(other, Tensor):
            return not is_functional(other) or _is_parameter(other) != _is_parameter(tensor)
    kinds = tuple(other) if isinstance(other, (tuple, list, set, frozenset, dict)) else (other,)
    return any(
        issubclass(kind, Tensor) if isinstance(kind, type) else isinstance(kind, str) and kind in _CLASSES
        for kind in kinds
    )


def _is_parameter(tensor: Tensor) -> bool:
    return bool(vars(tensor).get(IS_PARAMETER))


_CLASSES = (Tensor.__name__, nn.Parameter.__name__)
_WITHOUT_EFFECT = frozenset({"PRECALL", "PUSH_NULL", "CACHE", "RESUME", "NOP"})
_OF_LOCALS = frozenset({"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF"})
_OF_NAMES = _OF_LOCALS | {"LOAD_GLOBAL", "LOAD_NAME"}
_OF_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_ON_THE_WAY = frozenset({"BUILD_TUPLE", "BUILD_LIST", "BUILD_SET"})
_COMPARING = frozenset({"IS_OP", "COMPARE_OP", "CONTAINS_OP"})
