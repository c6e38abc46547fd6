"""What stands in for a module's tensors while its forward runs, made to look like them.

A forward may ask whether it has a `Parameter`, and read what its user has noted on one as an attribute. A
stand-in has the class and the attributes of the module's own tensor for as long as it is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from typing import Any, NamedTuple

from torch import Tensor, nn

from funcstage._torch.interception import copied_otherwise
from funcstage._torch.tensors import IS_PARAMETER, OF_DYNAMO, OF_FUNCTIONAL, is_fake, is_functional
from funcstage.errors import PurityError, TraceError
from funcstage.state.at_once import at_once
from funcstage.state.content import is_plain
from funcstage.trees import describe


class Guise:
    """Lends the looks of a module's tensors to what stands in for them.

    Args:
        owns: the tensors.
        stand_ins: what the module holds in their places, or the forward is handed.
        of_module: whether they are a module's, for `own_of`.

    Attributes:
        back: the steps by which they look again as before, in the thread that made it; `at_once` takes them.
        looks: those of them that any thread may take.
        found: the ids of those of the tensors that an operation has found in another place, and got its
            stand-in.
        viewed: those of which an operation has found a view.
    """

    def __init__(self, owns: Sequence[Any], stand_ins: Sequence[Any], *, of_module: bool = True) -> None:
        self._pairs = [
            (own, stand_in)
            for own, stand_in in zip(owns, stand_ins, strict=True)
            if stand_in is not own and isinstance(own, Tensor) and isinstance(stand_in, Tensor)
        ]
        self._of_module = of_module
        self._dressed: list[Tensor] = []
        self._had: dict[int, frozenset[str]] = {}
        self._lent: list[dict[str, Any]] = []
        self._before: list[dict[str, Any]] = []
        self._around = _current.guise
        self._stand_ins: dict[int, Tensor] | None = None
        self.found: set[int] = set()
        self.viewed: set[int] = set()
        self._copied: list[int] = []
        self._copies = copied_otherwise()
        self.looks = chain(
            map(setattr, self._dressed, repeat("__class__"), repeat(Tensor)),
            map(dict.clear, self._lent),
            map(dict.update, self._lent, self._before),
            map(dict.pop, repeat(self._copies), self._copied, repeat(None)),
        )
        own = map(setattr, (_current,) * of_module, ("guise",), (self._around,))
        self.back = chain(own, self.looks)

    def put_on(self) -> None:
        """Let the stand-ins look like what they stand for."""
        if self._of_module:
            _current.guise = self
        for own, stand_in in self._pairs:
            kind = type(own)
            if type(stand_in) is Tensor and kind is not Tensor and kind.__torch_function__ is _OF_PARAMETERS:
                self._dressed.append(stand_in)
                with suppress(TypeError):  # a class with slots
                    stand_in.__class__ = kind
            if kind is not Tensor or own.__dict__ or stand_in.__dict__:
                self._lend(own, stand_in)

    def _lend(self, own: Tensor, stand_in: Tensor) -> None:
        namespace = stand_in.__dict__
        if id(stand_in) not in self._had:
            self._had[id(stand_in)] = frozenset(namespace)
            self._before.append(namespace.copy())
            self._lent.append(namespace)
        for name, value in own.__dict__.items():
            namespace.setdefault(name, value)
        if isinstance(own, nn.Parameter) and not isinstance(stand_in, nn.Parameter):
            namespace[IS_PARAMETER] = True
        # Its class would copy the stand-in, not what it stands for.
        if isinstance(stand_in, nn.Parameter) and id(stand_in) not in self._copies:
            self._copied.append(id(stand_in))
            self._copies[id(stand_in)] = _copied

    def notes(self) -> list[Note]:
        """What the forward has noted on the stand-ins, or taken from them, which it meant for its tensors."""
        if not self._lent and not any(stand_in.__dict__ for _, stand_in in self._pairs):
            return []
        found = []
        for own, stand_in in self._pairs:
            if not own.__dict__ and stand_in.__dict__.keys() <= {IS_PARAMETER}:
                continue  # as most are: this is run for every parameter in every F
            had, traced = self._had.get(id(stand_in), frozenset()), is_functional(stand_in)
            found += [
                Note(own, name, value, traced)
                for name, value in stand_in.__dict__.items()
                if name not in had
                and name != IS_PARAMETER
                and not name.startswith(OF_DYNAMO)
                and own.__dict__.get(name, _ABSENT) is not value
            ]
            gone = own.__dict__.keys() - stand_in.__dict__.keys()
            found += [Note(own, name, _ABSENT, traced) for name in gone if id(stand_in) in self._had]
        return found

    def own(self, tensor: Any) -> Tensor | None:
        """What a tensor stands in for."""
        for own, stand_in in self._pairs:
            if stand_in is tensor:
                return own
        return None if self._around is None else self._around.own(tensor)

    def instead(self, tensor: Tensor) -> Tensor:
        """What stands in for a tensor that was found in another place; itself where nothing does."""
        if self._stand_ins is None:
            self._stand_ins = {id(own): stand_in for own, stand_in in self._pairs}
        stand_in = self._stand_ins.get(id(tensor))
        if stand_in is None:
            return tensor if self._around is None else self._around.instead(tensor)
        self.found.add(id(tensor))
        return stand_in


class Note(NamedTuple):
    """An attribute that a forward has set on a tensor of its module's or its caller's, or deleted there."""

    own: Tensor
    name: str
    value: Any
    traced: bool

    def check(self, owner: str, of: str) -> None:
        """Refuse what cannot be kept.

        Raises:
            TraceError: in a trace, which would do so only once.
            PurityError: if it may hold tensors.
        """
        does = "deletes" if self.value is _ABSENT else "sets"
        what = f"{owner} {does} an attribute, {self.name!r}, on {of} in its forward"
        if self.traced:
            raise TraceError(
                f"{what}, which a compiled stage would do in its first call alone. Set it on the module, or "
                "return it."
            )
        if self.value is not _ABSENT and not is_plain(self.value):
            raise PurityError(
                f"{what}, and it may hold tensors ({type(self.value).__qualname__}). Keep it on the module, "
                "or return it."
            )

    def keep(self) -> None:
        """Set it on the own tensor, or delete it there."""
        if self.value is _ABSENT:
            delattr(self.own, self.name)
        else:
            setattr(self.own, self.name, self.value)


def keep(notes: Sequence[Note], owner: str, name_of: Callable[[Tensor], str]) -> None:
    """Keep all notes on the tensors that they were meant for, or, if one cannot be, none."""
    for note in notes:
        note.check(owner, name_of(note.own))
    for note in notes:
        note.keep()


@contextmanager
def looking_alike(owner: str, given: Sequence[Any], stand_ins: Sequence[Any]) -> Iterator[None]:
    """Let leaves that a forward is handed look like the caller's, and those have what it notes on them.

    Raises:
        TraceError, PurityError: as `Note.check`.
    """
    guise = Guise(given, stand_ins, of_module=False)
    try:
        guise.put_on()
        yield
        notes = guise.notes()
    finally:
        at_once(guise.back)
    keep(notes, owner, lambda own: f"an argument ({describe(own)})")


def own_of(tensor: Any) -> Tensor | None:
    """The tensor of a module for which one stands in, in this thread, now."""
    guise = _current.guise
    return None if guise is None else guise.own(tensor)


def instead_of(tensor: Tensor) -> Tensor:
    """What stands in for a tensor of a module, in this thread, now."""
    guise = _current.guise
    return tensor if guise is None else guise.instead(tensor)


def note_viewed(own: int) -> None:
    """Note that an operation reads a view of a module's tensor, by its id, that was made before."""
    guise = _current.guise
    while guise is not None:
        guise.viewed.add(own)
        guise = guise._around


def noted_alike(tensor: Tensor, kept: Tensor, of: Callable[[Any], Any]) -> Tensor:
    """A tensor with the attributes that a forward has set on the one that it stands for."""
    notes = vars(kept)
    if notes:
        vars(tensor).update((name, value if value is kept else of(value)) for name, value in notes.items())
    return tensor


def notes_on(tensor: Tensor, owner: str) -> dict[str, Any]:
    """What a forward has noted on a tensor of the trace.

    Raises:
        TraceError: if that may be another in each call.
    """
    if is_fake(tensor):
        return {}  # made of tensors from outside of the trace: its attributes are torch's
    notes = {name: value for name, value in vars(tensor).items() if name not in OF_FUNCTIONAL}
    for name, value in notes.items():
        if not is_plain(value):
            raise TraceError(
                f"{owner} sets an attribute, {name!r}, on a tensor that it leaves on its module, which a "
                f"compiled stage cannot make again in each call ({type(value).__qualname__}). Keep it on the "
                "module beside the tensor."
            )
    return notes


def _copied(stand_in: Tensor, memo: Any) -> Tensor:
    kind = type(stand_in)
    with suppress(TypeError):
        stand_in.__class__ = Tensor
    try:
        copy = Tensor.__deepcopy__(stand_in, memo)
    finally:
        with suppress(TypeError):
            stand_in.__class__ = kind
    with suppress(TypeError):
        copy.__class__ = kind
    return copy


class _Current(threading.local):
    guise: Guise | None = None


_current = _Current()
_ABSENT: Any = object()
_OF_PARAMETERS = nn.Parameter.__torch_function__
