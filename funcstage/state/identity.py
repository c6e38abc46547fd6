"""Tensors that are one to a stage's caller and several within the stage, and forwards that compare them.

A tensor that is handed in twice, or that is a parameter or buffer besides, has another stand-in in each
place, as it has a gradient for each. That `a is b` is then False, where eager says True, is seen by no mode.
A call with such tensors is therefore watched: the byte code of each function that runs tells what it compares
by identity, and what its variables hold when it returns, or what the functions that it calls have returned,
tells whether those were stand-ins of one tensor. What only the interpreter's stack has held is not seen: the
results of functions that are written in C, and what is in those. Two of these (`next(a) is next(b)`) are not
compared in such a call.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType, MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from funcstage._torch.operators import without_torch_function
from funcstage.errors import StageError
from funcstage.state.code import is_torchs_or_library
from funcstage.state.elsewhere import Views, read_instead
from funcstage.state.expressions import (
    UNKNOWN,
    Attribute,
    Changing,
    Code,
    Kind,
    Result,
    Use,
    read,
    value_of,
)
from funcstage.state.guise import own_of
from funcstage.state.profilers import resume
from funcstage.trees import describe


class Twins(NamedTuple):
    """The tensors of a call, as its caller holds them and as its forward meets them.

    Attributes:
        own: for each tensor of the state that the stage is given, and each of its module's, what it is one
            with: the module's, if it has one.
        given: the leaves of the arguments.
        repeated: whether one of these is there twice, or is of the state.
        of_module: whether the state is a module's, which holds stand-ins of its own.
        elsewhere: those of the module's that it holds in other places, too.
        views: tensors there that share memory with one of these.
    """

    own: Mapping[int, int]
    given: Sequence[Any]
    repeated: bool
    of_module: bool = False
    elsewhere: frozenset[int] = frozenset()
    views: Views = MappingProxyType({})

    @classmethod
    def of(
        cls,
        apply: Callable[..., Any],
        params: Any,
        buffers: Any,
        state: Sequence[Any],
        given: Sequence[Any],
    ) -> Twins:
        """Look for tensors that are handed in twice, or that are of the state.

        Args:
            apply: the stage function.
            params: those that it is given.
            buffers: likewise.
            state: the leaves of both.
            given: those of its arguments.
        """
        held: Any = getattr(apply, "held", tuple)()
        if not _is_repeated(given, state, held):
            return cls({}, given, False)
        return cls(_own(apply, params, buffers, held, state), given, True, bool(held))

    def with_elsewhere(
        self,
        apply: Callable[..., Any],
        params: Any,
        buffers: Any,
        elsewhere: frozenset[int],
        views: Views,
    ) -> Twins:
        """The same where some of the module's tensors, by their ids, or views of them lie in other places."""
        if not elsewhere:
            return self._replace(views=views) if views else self
        held: Any = getattr(apply, "held", tuple)()
        own = self.own or _own(apply, params, buffers, held, [])
        return self._replace(own=own, repeated=True, of_module=bool(held), elsewhere=elsewhere, views=views)


def _own(apply: Any, params: Any, buffers: Any, held: Sequence[Any], state: Sequence[Any]) -> dict[int, int]:
    own = {id(tensor): id(tensor) for tensor in (*held, *state)}
    if held:
        of_module = apply.named()
        for tree in (params, buffers):
            if isinstance(tree, Mapping):  # all else is refused in a moment
                own.update((id(tensor), id(of_module.get(name, tensor))) for name, tensor in tree.items())
    return own


def _is_repeated(given: Iterable[Any], *others: Iterable[Any]) -> bool:
    """Tell whether a tensor is there twice among leaves, or is one of others."""
    ids = [id(leaf) for leaf in given if isinstance(leaf, Tensor)]
    once = {*ids}
    return len(once) < len(ids) or not all(once.isdisjoint(map(id, each)) for each in others)


@contextmanager
def watching_identity(
    owner: str, twins: Twins, stand_ins: Sequence[Any], params: Sequence[tuple[Any, Any]]
) -> Iterator[None]:
    """Refuse a forward that asks whether tensors are one that are so in eager, but have several stand-ins.

    Args:
        owner: the stage's name.
        twins: of its call.
        stand_ins: what the forward is handed for the leaves of the arguments.
        params: the parameters and what it is handed for them.

    Raises:
        StageError: where the forward ends; names the line.
    """
    if not twins.repeated:
        with read_instead((), twins.views):
            yield
        return
    watch = _Watch(twins, stand_ins, params)
    before = sys.getprofile()
    watch.before = before if callable(before) else None
    sys.setprofile(watch.profile)
    try:
        with read_instead(twins.elsewhere, twins.views):
            yield
    finally:
        resume(before)
    if watch.found is not None:
        tensor, where = watch.found
        if tensor is None:
            raise StageError(
                f"{owner} compares by identity (at {where}) what two functions or containers have just "
                "returned, and was handed a tensor twice, or one that is its parameter or buffer too, or "
                "holds one of these in a list or the like. That is another object in each place, as it has "
                "a gradient in each, and nobody sees whether it is compared. Assign both to variables "
                "first, which are seen, or say by an argument (a flag) which tensors are one."
            )
        if watch.lies_elsewhere:
            raise StageError(
                f"{owner} compares its parameter or buffer by identity (at {where}; {describe(tensor)}), "
                "which lies in another place, too: in a list, a key, an attribute or a global, or by its id. "
                "A stage puts other tensors where its parameters and buffers are, but not there, so the "
                "answer would not be eager's. Keep names of parameters there, or submodules, and compare "
                "these."
            )
        raise StageError(
            f"{owner} compares a tensor by identity (at {where}) that it was handed twice, or that is its "
            f"parameter or buffer too ({describe(tensor)}). It is one tensor to the caller, but has a "
            "gradient in each place, and so is another object in each. Say by an argument of its own (a "
            "flag) which tensors are one."
        )


class _Watch:
    """Looks at functions that return for comparisons of stand-ins.

    Attributes:
        before: who else is told.
        found: a tensor that was compared, or None if that may have been one, and where.
        lies_elsewhere: whether that one is the module's, and lies in other places.
    """

    def __init__(self, twins: Twins, stand_ins: Sequence[Any], params: Sequence[tuple[Any, Any]]) -> None:
        own = self._own = twins.own
        pairs = [
            (own.get(id(leaf), id(leaf)), id(stand_in))
            for leaf, stand_in in (*params, *zip(twins.given, stand_ins, strict=True))
            if isinstance(leaf, Tensor)
        ]
        self._handed = {stand_in: one for one, stand_in in pairs}
        objects: dict[int, set[int]] = {}
        of_state = [(one, 0 if twins.of_module else state) for state, one in own.items()]
        for one, stand_in in (*pairs, *of_state):
            objects.setdefault(one, set()).add(stand_in)
        given = {own.get(id(leaf), id(leaf)) for leaf in twins.given if isinstance(leaf, Tensor)}
        self._elsewhere = twins.elsewhere
        self._doubles = {one for one in given if len(objects[one]) > 1} | self._elsewhere
        self.before: Any = None
        self.found: tuple[Tensor | None, str] | None = None
        self.lies_elsewhere = False
        self._results: dict[int, dict[int, Any]] = {}
        self._of_c: dict[int, set[int]] = {}  # calls of functions that are written in C

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.found is None:
            if event == "return":
                self._returns(frame, argument)
            elif event == "c_call" and _is_users(frame):
                place = read(frame.f_code).result_at(frame.f_lasti)
                if place is not None and argument not in _ANSWERING:
                    self._of_c.setdefault(id(frame), set()).add(place)
                if _is_comparing(argument):
                    operands = read(frame.f_code).call_at(frame.f_lasti) or (UNKNOWN, UNKNOWN)
                    with without_torch_function():
                        self._look_at(frame, Use(Kind.COMPARED, operands, frame.f_lineno))
            elif event == "call" and frame.f_code in _BY_IDENTITY:
                asker = _asker(frame)
                if asker is not None and _is_users(asker):
                    with without_torch_function():
                        self._note(frame.f_locals[_BY_IDENTITY[frame.f_code]], asker, asker.f_lineno)
        if self.before is not None:
            self.before(frame, event, argument)

    def _returns(self, frame: FrameType, returned: Any) -> None:
        code, caller = read(frame.f_code), frame.f_back
        if _is_users(frame):
            with without_torch_function():
                for use in code.uses:
                    if use.kind is not Kind.NAMESPACE:
                        self._look_at(frame, use)
                if _PASSED.intersection(frame.f_code.co_names):
                    self._look_for_passed(frame, code)
        self._results.pop(id(frame), None)
        self._of_c.pop(id(frame), None)
        if caller is not None:
            place = read(caller.f_code).result_at(caller.f_lasti)
            if place is not None:
                self._results.setdefault(id(caller), {})[place] = returned

    def _look_at(self, frame: FrameType, use: Use) -> None:
        results = self._results.get(id(frame), {})
        values = [value_of(operand, frame, results) for operand in use.operands]
        doubles = [value for value in values if self._is_double(value)]
        if use.kind is Kind.COMPARED:
            if all(isinstance(operand, Changing) for operand in use.operands):
                values = doubles = [frame.f_locals.get(operand.name) for operand in use.operands]
                if all(isinstance(value, Tensor) for value in values):
                    self.found = values[0], _line(frame, use.line)  # others have been there
                return
            if all(value is UNKNOWN for value in values):
                if self._doubles and all(self._may_be_tensor(frame, each) for each in use.operands):
                    self.found = None, _line(frame, use.line)
                return
            if not any(value is UNKNOWN for value in values):
                first, second = values
                same = first is second or not isinstance(first, Tensor) or not isinstance(second, Tensor)
                if same or self._one(first) != self._one(second):
                    return
        if doubles:
            self._note(doubles[0], frame, use.line)

    def _may_be_tensor(self, frame: FrameType, operand: Any) -> bool:
        """Tell whether what could not be followed may be a tensor; what a class returns is new."""
        if isinstance(operand, Result):
            return operand.offset in self._of_c.get(id(frame), ())
        if isinstance(operand, Attribute):
            holder = value_of(operand.holder, frame)
            return isinstance(getattr(type(holder), operand.name, None), property)
        return True

    def _look_for_passed(self, frame: FrameType, code: Code) -> None:
        """Look for a function that compares, handed to another that calls it, such as `map`."""
        passed = (value_of(operand, frame) for operands in code.calls.values() for operand in operands)
        if any(_is_comparing(value) for value in passed):
            tensors = (value for value in frame.f_locals.values() if self._is_double(value))
            self._note(next(tensors, None), frame, frame.f_lineno)

    def _note(self, tensor: Any, frame: FrameType, line: int | None) -> None:
        if self._is_double(tensor):
            self.found = tensor, _line(frame, line)
            self.lies_elsewhere = self._one(tensor) in self._elsewhere

    def _is_double(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self._one(value) in self._doubles

    def _one(self, tensor: Tensor) -> int:
        """What a tensor that the forward meets is one with."""
        known = self._handed.get(id(tensor))
        if known is not None:
            return known
        own = own_of(tensor)
        own = tensor if own is None else own
        return self._own.get(id(own), id(own))


def _is_users(frame: FrameType) -> bool:
    return not is_torchs_or_library(frame.f_globals.get("__name__"))


def _asker(frame: FrameType) -> FrameType | None:
    """The function that looks something up, in a table of weak references for one."""
    asker = frame.f_back
    while asker is not None and asker.f_globals.get("__name__") in _OF_WEAK_TABLES:
        asker = asker.f_back
    return asker


def _is_comparing(value: object) -> bool:
    return any(value is function for function in _COMPARING)


def _line(frame: FrameType, line: int | None) -> str:
    return f"{frame.f_code.co_filename}:{line}"


_COMPARING = operator.is_, operator.is_not
_ANSWERING = frozenset({len, hash, isinstance, issubclass, hasattr, callable})
"""Functions whose results are no tensors."""
_PASSED = frozenset(function.__name__ for function in _COMPARING)
_BY_IDENTITY: dict[CodeType, str] = {
    nn.Parameter.__hash__.__code__: "self",
    Tensor.__hash__.__code__: "self",
    WeakIdRef.__init__.__code__: "key",
}
"""Functions that tell by which tensor it is, and what they call that."""
_OF_WEAK_TABLES = frozenset({WeakIdRef.__module__, weakref.__name__, weakref.WeakSet.__module__})
