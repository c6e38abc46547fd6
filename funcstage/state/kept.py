"""What a forward keeps on its module: auxiliary losses, caches, lists of activations, counters.

Afterwards the module holds what eager would have left there, detached: never a wrapper of a level that is
closed, nor a tensor of a trace. By levels the forward has run, and what it left is taken out of the levels.
A trace runs it once for many calls: what it changed is undone, the tensors become results of F, and every F
makes the changes anew (`Changes`), also those of plain values, which belong to the signature.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from weakref import ref

from torch import Tensor, nn

from funcstage import forks
from funcstage._torch import functorch as ft
from funcstage._torch.operators import without_torch_function
from funcstage._torch.tensors import is_functional
from funcstage.errors import PurityError, TraceError
from funcstage.state.cells import refuse_closures
from funcstage.state.content import MARK
from funcstage.state.guise import noted_alike, notes_on
from funcstage.state.module import locked
from funcstage.state.reach import INERT, described, holders, in_slot, put_in_slot, slots_of, with_slots
from funcstage.trees import describe

if TYPE_CHECKING:
    from funcstage.state.contents import Held


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Undo all that a forward leaves behind in a module (it would be fake), submodules and hooks among it."""
    before = State(module)
    own = [
        (space, dict(space))
        for part in module.modules()
        for space in vars(part).values()
        if isinstance(space, dict)
    ]

    def put_back() -> None:
        before.restore()
        for space, values in own:
            refill(space, values)

    try:
        with forks.lent(put_back):
            yield
    finally:
        try:
            put_back()
        except BaseException:
            put_back()  # an interrupt may come in the midst of it
            raise


@contextmanager
def taken_out(module: nn.Module | None, handed: Sequence[Any], held: Held | None) -> Iterator[None]:
    """Take what a forward keeps out of the levels, once they are closed.

    Args:
        module: on which it may keep something.
        handed: objects among its arguments, such as caches, in which it may keep something too.
        held: what the module, which is locked already, holds now; where that is known.
    """
    if module is None and not handed:
        yield
        return
    replaced: list[Any] = []  # kept, for weak references to be seen that lead there

    def alive(value: Any) -> Any:
        if (new := _alive(value)) is not value:
            replaced.append(value)
        return new

    with locked(module if held is None else None):
        try:
            yield
        finally:
            with without_torch_function():
                for root in (*handed, *(() if module is None or held is not None else (module,))):
                    replace_within(root, alive)
                if held is not None:
                    held.replace_changed(alive)


@contextmanager
def detached(module: nn.Module | None, handed: Sequence[Any] = ()) -> Iterator[None]:
    """Take what a forward keeps off the tape on which it was recorded; as `taken_out`."""
    roots = (*handed, *(() if module is None else (module,)))
    if not roots:
        yield
        return
    with locked(module):
        passed: list[Any] = []
        there = [value for root in roots for holder in holders(root, passed) for value in _tensors_of(holder)]
        there += _tensors_of([value for _, _, value in slots_of(with_slots(passed))])
        known = {*map(id, there)}  # which `there` keeps from being given anew

        def off_tape(value: Any) -> Any:
            if isinstance(value, Tensor):
                is_new = (
                    value.requires_grad and id(value) not in known and not isinstance(value, nn.Parameter)
                )
                return noted_alike(value.detach(), value, off_tape) if is_new else value
            return _in_tuples(off_tape, value)

        try:
            yield
        finally:
            for root in roots:
                replace_within(root, off_tape)


def _tensors_of(holder: Any) -> Iterator[Tensor]:
    """The tensors that a container holds, by itself or in tuples."""
    for value in [*holder.values()] if isinstance(holder, dict) else [*holder]:
        yield from _within(value)


def _within(value: Any) -> Iterator[Tensor]:
    """A tensor, or those in a tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, frozenset)):
        yield from _tensors_of(value)


def objects_among(leaves: Iterable[Any]) -> list[Any]:
    """The leaves of arguments that are objects of the user's, which a forward may write into."""
    return [leaf for leaf in leaves if not isinstance(leaf, Tensor) and type(leaf) not in INERT]


def _alive(value: Any) -> Any:
    if isinstance(value, Tensor) and ft.is_dead(value):
        return noted_alike(ft.without_dead_wrappers(value).detach(), value, _alive)
    if isinstance(value, ref):
        _refuse_reference(value, ft.is_dead)
    return _in_tuples(_alive, value)


def _refuse_reference(reference: ref[Any], is_of_stage: Callable[[Tensor], Any]) -> None:
    """Refuse to keep a weak reference to a tensor in whose place another is kept."""
    tensor = reference()
    if isinstance(tensor, Tensor) and is_of_stage(tensor):
        raise PurityError(
            f"The stage keeps a weak reference to a tensor ({describe(tensor)}) that its forward has made or "
            "was handed. Another one takes its place outside of the stage, so that the reference would lead "
            "to nothing. Keep the tensor itself, or compare what it says."
        )


def _in_tuples(of: Callable[[Any], Any], value: Any) -> Any:
    """Replace what a tuple or frozenset holds, or a partial function has for arguments."""
    if type(value) is functools.partial and (args := of(value.args)) is not value.args:
        return functools.partial(value.func, *args, **value.keywords)
    if isinstance(value, (tuple, frozenset)):
        items = [of(item) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    return value


def replace_within(root: Any, of: Callable[[Any], Any]) -> None:
    """Put other tensors in place of those that lie within reach, by themselves or in tuples."""
    passed: list[Any] = []
    for holder in [*holders(root, passed)]:
        replace_in(holder, of)
    replace_in_slots(((holder, slot, None) for holder, slot, _ in slots_of(with_slots(passed))), of)


def replace_in_slots(noted: Iterable[tuple[Any, Any, Any]], of: Callable[[Any], Any]) -> None:
    """Do that in slots, where these hold something else than what was noted."""
    for holder, slot, before in noted:
        value = in_slot(holder, slot)
        if value is not before and (new := of(value)) is not value:
            put_in_slot(holder, slot, new)


def replace_in(holder: Any, of: Callable[[Any], Any]) -> None:
    """Put other tensors in place of those that a dict, list or set holds, by itself or in tuples.

    Raises:
        PurityError: if one is a key of the dict, or a parameter in the set, as which it is not found again.
    """
    if isinstance(holder, dict):
        for key, value in [*holder.items()]:
            if isinstance(key, Tensor) and of(key) is not key:
                _refuse_key(key, "a key of a dict")
            if isinstance(value, _OF_TENSORS) and (new := of(value)) is not value:
                holder[key] = new
    elif isinstance(holder, (list, deque)):
        for i, value in enumerate(holder):
            if isinstance(value, _OF_TENSORS) and (new := of(value)) is not value:
                holder[i] = new
    else:
        for value in [*holder]:
            if isinstance(value, _OF_TENSORS) and (new := of(value)) is not value:
                if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                    _refuse_key(value, "an element of a set")
                holder.discard(value)
                holder.add(new)


def _refuse_key(tensor: Tensor, what: str) -> NoReturn:
    raise PurityError(
        f"The stage keeps a tensor ({describe(tensor)}) as {what}, but another one stands for it in the next "
        "call, which would not be found there. Use a name as the key, of a parameter or a submodule, or the "
        "submodule itself."
    )


_OF_TENSORS = (Tensor, tuple, frozenset, functools.partial, ref)


class _Result(NamedTuple):
    """Stands for a tensor that F returns, with attributes that the forward has set on it."""

    number: int
    notes: dict[str, Any]


class _Before(NamedTuple):
    """Stands for what a holder had in a place before F."""

    holder: int
    place: Any


class _Write(NamedTuple):
    """New contents of a holder: of a dict what is set and what is removed, of a list that grows the end."""

    holder: int
    contents: Any
    removed: tuple[Any, ...]
    grows: bool


class Changes(NamedTuple):
    """What every F of a signature does to the module.

    Attributes:
        holders: the containers that are changed or read.
        writes: their new contents, in which stand-ins are.
        stand_ins: these.
        known: objects that were there before and are not copied.
    """

    holders: list[Any]
    writes: list[_Write]
    stand_ins: list[Any]
    known: list[Any]

    def make(self, results: Sequence[Tensor]) -> None:
        """Change the module, `results` being the tensors that F has kept."""
        memo: dict[int, Any] = {id(known): known for known in self.known}
        for stand_in in self.stand_ins:
            if isinstance(stand_in, _Result):
                value: Any = results[stand_in.number].detach()
                vars(value).update(stand_in.notes)
                setattr(value, MARK, True)
            else:
                value = self.holders[stand_in.holder][stand_in.place]
            memo[id(stand_in)] = value
        made = [copy.deepcopy(write.contents, memo) for write in self.writes]
        for write, contents in zip(self.writes, made, strict=True):
            holder = self.holders[write.holder]
            if isinstance(holder, dict):
                for key in write.removed:
                    holder.pop(key, None)
                _put(holder, contents)
            elif write.grows:
                _base(holder).extend(holder, contents)
            else:
                refill(holder, contents)


def refill(holder: Any, contents: Any) -> None:
    """Let a container hold this instead."""
    base = _base(holder)
    base.clear(holder)
    if isinstance(holder, dict):
        _put(holder, contents)
    elif isinstance(holder, set):
        set.update(holder, contents)
    else:
        base.extend(holder, contents)


def _base(holder: Any) -> Any:
    """The type whose methods do to a container what they say: a subclass may count, or check, or add."""
    return next(kind for kind in (OrderedDict, dict, list, deque, set) if isinstance(holder, kind))


def _put(holder: dict[Any, Any], contents: dict[Any, Any]) -> None:
    put = _base(holder).__setitem__
    for key, value in contents.items():
        put(holder, key, value)


class State:
    """What a module, and objects among the arguments, hold before a run that may be undone."""

    def __init__(self, module: nn.Module | None, handed: Sequence[Any] = ()) -> None:
        self._modules = [] if module is None else [*module.modules()]
        spaces = [part._modules for part in self._modules]  # what a forward puts there is made in it, too
        passed: list[Any] = []
        self._holders = [] if module is None else [*holders(module, passed), *spaces]
        self._slots = slots_of(with_slots(passed))
        own = {*map(id, self._holders)}
        others = [holder for root in handed for holder in holders(root) if id(holder) not in own]
        self._handed = [(holder, copy.copy(holder)) for holder in others]
        self._contents = [copy.copy(holder) for holder in self._holders]

    def restore(self, *, tensors_only: bool = False) -> None:
        """Put back what has changed, or of this what has got tensors."""
        for holder, contents in (*zip(self._holders, self._contents, strict=True), *self._handed):
            if differs(holder, contents) and not (tensors_only and _has_none(holder, contents)):
                refill(holder, contents)
        for holder, slot, before in self._slots:
            value = in_slot(holder, slot)
            if value is not before and _tensors_in([value], {}):
                put_in_slot(holder, slot, before)

    def changed(self) -> list[tuple[Any, Any]]:
        """The containers that hold something else now, each with what it held."""
        return [pair for pair in zip(self._holders, self._contents, strict=True) if differs(*pair)]

    def changes(self, owner: str) -> tuple[Changes, list[Tensor]] | None:
        """What was changed since, and the tensors that were left; None where nothing was.

        Raises:
            TraceError: if something was left that cannot be made anew.
        """
        if any(differs(*pair) for pair in self._handed):
            raise TraceError(
                f"{owner} writes into an object that it is handed as an argument, such as a cache. A "
                "compiled stage would do so only in its first call. Pass the tensors and return the new "
                "ones."
            )
        for holder, slot, before in self._slots:
            value = in_slot(holder, slot)
            if value is not before and _tensors_in([value], {}):
                raise TraceError(
                    f"{owner} leaves a tensor in {described(holder, slot)}, which a compiled stage cannot "
                    "make again in each call. Keep it in an attribute, a list or a dict of the module, or "
                    "return it."
                )
        pairs = [*zip(self._holders, self._contents, strict=True)]
        changed = [i for i, pair in enumerate(pairs) if differs(*pair)]
        if not changed:
            return None
        known = [*self._holders, *self._modules]
        memo: dict[int, Any] = {id(each): each for each in known}
        stand_ins: list[Any] = []
        for i, contents in enumerate(self._contents):
            places = contents.items() if isinstance(contents, dict) else enumerate(contents)
            for place, value in places:
                if isinstance(value, Tensor):
                    stand_ins.append(_Before(i, place))
                    memo[id(value)] = stand_ins[-1]
                elif id(value) not in memo and type(value) not in INERT and not isinstance(value, _COPIED):
                    known.append(value)
                    memo[id(value)] = value
        tensors: list[Tensor] = []
        writes = []
        for i in changed:
            holder, contents = pairs[i]
            removed: tuple[Any, ...] = ()
            new: Any = holder
            grows = False
            if isinstance(holder, dict):
                new = {k: v for k, v in holder.items() if k not in contents or contents[k] is not v}
                removed = tuple(contents.keys() - holder.keys())
            elif not isinstance(holder, set) and not differs([*holder][: len(contents)], [*contents]):
                grows, new = True, [*holder][len(contents) :]
            else:
                new = [*holder]
            found = _left_in(new, memo)
            left = [each for each in found if isinstance(each, Tensor)]
            if left and isinstance(holder, set):
                raise TraceError(
                    f"{owner} leaves a tensor in a set on its module, where a compiled stage would not know "
                    "it again. Keep it in a list or a dict, or return it."
                )
            for value in left:
                memo[id(value)] = stand_in = _Result(len(tensors), notes_on(value, owner))
                stand_ins.append(stand_in)
                tensors.append(value)
            for each in found:
                if isinstance(each, ref):
                    _refuse_reference(each, is_functional)
            try:
                refuse_closures([*new.values()] if isinstance(new, dict) else new, is_functional)
                writes.append(_Write(i, copy.deepcopy(new, memo), removed, grows))
            except Exception as error:
                raise TraceError(
                    f"{owner} leaves something on its module ({_names(new)}) that a compiled stage cannot "
                    f"make again in each call ({error}). Return it, or register its tensors as buffers."
                ) from error
        return Changes(self._holders, writes, stand_ins, known), tensors

    def read(self, owner: str, constants: Sequence[Tensor]) -> None:
        """Judge the tensors on the module that the trace has read.

        Raises:
            TraceError: if the stage changes them too, so that a program would go on reading the first ones.
        """
        keys = {ft.storage_key(tensor) for tensor in constants}
        for holder, contents in zip(self._holders, self._contents, strict=True):
            places = contents.items() if isinstance(contents, dict) else enumerate(contents)
            for place, value in places:
                read = [tensor for tensor in _within(value) if ft.storage_key(tensor) in keys]
                if not read:
                    continue
                now = holder.get(place) if isinstance(holder, dict) else None
                if now is not value and (isinstance(holder, dict) or differs(holder, contents)):
                    raise TraceError(
                        f"{owner} reads a tensor that it has kept on its module in an earlier call "
                        f"({place!r}), and replaces it. A compiled stage cannot do that. Register it as a "
                        "buffer (`register_buffer`), or pass it in and return it."
                    )
                for tensor in read:
                    if hasattr(tensor, MARK):
                        delattr(tensor, MARK)  # from now on it matters which one it is


def _names(contents: Any) -> str:
    return ", ".join(map(repr, contents)) if isinstance(contents, dict) else type(contents).__name__


_COPIED = (tuple, frozenset)


def differs(holder: Any, contents: Any) -> bool:
    """Tell whether a container holds other objects than these."""
    if len(holder) != len(contents):
        return True
    if isinstance(holder, dict):
        return any(key not in contents or contents[key] is not value for key, value in holder.items())
    if isinstance(holder, set):
        return {*map(id, holder)} != {*map(id, contents)}
    return any(new is not old for new, old in zip(holder, contents, strict=True))


def _has_none(holder: Any, contents: Any) -> bool:
    """Tell whether nothing that a holder has got since is a tensor."""
    values = [*holder.values()] if isinstance(holder, dict) else [*holder]
    before = contents.values() if isinstance(contents, dict) else contents
    return not _tensors_in(values, {id(value): value for value in before})


def _tensors_in(value: Any, known: dict[int, Any]) -> list[Tensor]:
    """Tensors in something that was left which were not there before, each once."""
    return [each for each in _left_in(value, known) if isinstance(each, Tensor)]


def _left_in(value: Any, known: dict[int, Any]) -> list[Any]:
    """The same with weak references."""
    found: list[Any] = []
    stack, seen = [value], set(known)
    while stack:
        each = stack.pop()
        if id(each) in seen or type(each) in INERT:
            continue
        seen.add(id(each))
        if isinstance(each, (Tensor, ref)):
            found.append(each)
        elif isinstance(each, dict):
            stack += each.values()
        elif isinstance(each, (list, tuple, set, frozenset, deque)):
            stack += each
        else:
            stack += getattr(each, "__dict__", {}).values()
            slots = [name for kind in type(each).__mro__ for name in getattr(kind, "__slots__", ())]
            stack += [getattr(each, name, None) for name in slots]
    return found
