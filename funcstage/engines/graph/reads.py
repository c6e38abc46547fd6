"""What a stage reads that is neither handed to it nor an attribute of its module, and whether it changed.

`Recorder` watches a stage while it is traced: each Python function that runs tells by its byte code
(`code.py`) which globals, attributes of modules and classes, cells and defaults it can load. `Reads` is the
list of these places. Programs are good for as long as all of them say (`content.py`) what they said when
they were read first; a `Watch` tells that within microseconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from funcstage._torch import tracing as tt
from funcstage._torch.operators import without_torch_function
from funcstage._torch.tensors import version_of
from funcstage.state.content import content, is_one_of_its_kind, is_plain, parts_of


class Place(NamedTuple):
    """Where something was read.

    Attributes:
        label: what to call it.
        owner: a namespace, or a weak reference to a function, a class or a tensor whose values were read.
        name: of the value in the namespace, of an attribute, or the number of a function's cell.
    """

    label: str
    owner: Any
    name: Any

    def is_gone(self) -> bool:
        """Tell whether the function or tensor does not exist any more."""
        return isinstance(self.owner, weakref.ref) and self.owner() is None

    def value(self) -> Any:
        """What is there now."""
        if not isinstance(self.owner, weakref.ref):
            return self.owner.get(self.name, ABSENT)
        owner = self.owner()
        if isinstance(owner, FunctionType):
            if isinstance(self.name, str):
                return getattr(owner, self.name)
            return _in_cell(owner, self.name)
        if isinstance(owner, type):
            return getattr(owner, self.name)
        return owner if isinstance(owner, Tensor) else ABSENT


class Space(NamedTuple):
    """A namespace in which names were looked up.

    Attributes:
        label: what to call it.
        entries: it.
        names: those that are looked up, whether or not they are there.
        library: whether it is one of a library, of which only functions, classes and plain values are read.
    """

    label: str
    entries: Mapping[str, Any]
    names: set[str]
    library: bool

    def now(self) -> Hashable:
        """Which of the names are there and which are not: two traces may have missed different ones."""
        there = self.entries.keys()
        return frozenset(self.names & there), frozenset(self.names - there)


class Reads:
    """The places that a trace has read, in the order in which it came upon them.

    Attributes:
        places: they.
        spaces: namespaces of the user's, in which what is not there may appear.
        known: ids of objects that are watched elsewhere.
    """

    def __init__(
        self,
        places: dict[tuple[int, Any], Place],
        said: list[Hashable],
        spaces: Iterable[Space],
        known: set[int],
    ) -> None:
        """`said` is what the places said when they were read first."""
        self.places = [*places.values()]
        self.spaces = [space for space in spaces if not space.library]
        self.known = known
        self._keys = [*places]
        self._said = said

    def is_like(self, other: Reads) -> bool:
        """Tell whether the same places were read, in the same order, and the same names looked up."""
        one, another = ([(id(s.entries), s.names) for s in reads.spaces] for reads in (self, other))
        return self._keys == other._keys and one == another

    def now(self) -> Said:
        """What all of it says at present."""
        found = [
            # A function that is gone is not called any more; what held it says so.
            (place.label, said if place.is_gone() else said_by(place, self.known))
            for place, said in zip(self.places, self._said, strict=True)
        ]
        return *found, *((f"the names in {space.label}", space.now()) for space in self.spaces)


Said: TypeAlias = tuple[tuple[str, Hashable], ...]
"""What was read, with labels."""


def said_by(place: Place, known: set[int]) -> Hashable:
    """What a place says."""
    value = place.value()
    return _numbers(value) if place.name == VALUES else content(value, set(known))


def reach(places: Iterable[Place], known: set[int]) -> bool:
    """Tell whether places hold objects that are watched elsewhere, in whatever is in them."""
    pending = [place.value() for place in places if place.name != VALUES]
    seen = set[int]()
    while pending:
        value = pending.pop()
        if id(value) in known:
            return True
        if id(value) not in seen and not is_plain(value):
            seen.add(id(value))
            pending += [part for _, part in parts_of(value)]
    return False


class Watch:
    """Tells whether places say what they say when it is made, several times faster than reading them would.

    What cannot change is compared by identity, all of a namespace at once; containers and objects by content.
    """

    def __init__(self, reads: Reads) -> None:
        self._known = reads.known
        named: dict[int, tuple[Any, list[str]]] = {}
        functions: dict[int, FunctionType] = {}
        self._cells: list[Any] = []
        self._tensors: list[Tensor] = []
        self._classes: list[type] = []
        self._described: list[tuple[Callable[[Any], Any], Any]] = []  # classes and functions, by their names
        sized: dict[int, Any] = {id(space.entries): space.entries for space in reads.spaces}
        for place in reads.places:
            owner = place.owner() if isinstance(place.owner, weakref.ref) else place.owner
            if owner is None:
                continue  # it is not called any more, and what held it is watched
            elif isinstance(owner, Tensor):
                self._tensors.append(owner)
            elif place.name in OF_CODE and isinstance(owner, (type, FunctionType)):
                self._described.append((attrgetter(place.name), owner))
            elif isinstance(owner, type):
                self._classes.append(owner)
            elif isinstance(owner, FunctionType) and isinstance(place.name, str):
                functions[id(owner)] = owner
            elif isinstance(owner, FunctionType):
                self._cells.append((owner.__closure__ or ())[place.name])
            elif place.name in owner:
                named.setdefault(id(owner), (owner, []))[1].append(place.name)
            else:
                sized[id(owner)] = owner
        self._owners = [owner for owner, _ in named.values()]
        self._readers = [itemgetter(names[0], *names) for _, names in named.values()]  # a tuple of one, too
        self._functions = [*functions.values()]
        self._sized = [*sized.values()]
        self._bases = [*map(_BASES, self._classes)]
        self._values = self._read()
        self._bare = [v for v in self._values if isinstance(v, FunctionType) and not v.__dict__]
        bare = {*map(id, self._bare)}
        deep = {
            id(value): i
            for i, value in enumerate(self._values)
            if not (id(value) in bare or is_plain(value) or is_one_of_its_kind(value))
        }
        self._deep = [*deep.values()]
        self._said = self._say(self._values)

    def unchanged(self) -> bool:
        """Tell whether all of it is as it was."""
        try:
            values = self._read()
        except (KeyError, ValueError):  # a name or the value of a cell is gone
            return False
        before = self._values
        alike = len(values) == len(before) and all(map(is_, values, before))
        alike = alike and all(map(is_, map(_BASES, self._classes), self._bases))
        return alike and self._say(values) == self._said

    def _read(self) -> list[Any]:
        return [
            *chain.from_iterable(map(call, self._readers, self._owners)),
            *map(_IN_CELL, self._cells),
            *chain.from_iterable(map(_OF_FUNCTIONS, self._functions)),
        ]

    def _say(self, values: list[Any]) -> list[Hashable]:
        said = [
            *map(len, self._sized),
            *(read(owner) for read, owner in self._described),
            any(map(_NAMESPACE, self._bare)),
            *map(_version, self._tensors),
        ]
        if self._deep:
            seen = set(self._known)
            said += [content(values[i], seen) for i in self._deep]
        return said


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
"""Stands for the value of a name that is not there."""


def _in_cell(function: FunctionType, i: int) -> Any:
    cells = function.__closure__ or ()
    try:
        return cells[i].cell_contents
    except (IndexError, ValueError):
        return ABSENT


def _numbers(tensor: Any) -> Hashable:
    """The values of a tensor, exactly."""
    if not isinstance(tensor, Tensor):
        return content(tensor, set())
    with without_torch_function(), tt.without_modes():
        values = tensor.detach().cpu().resolve_conj().resolve_neg()
        said = values.contiguous().view(torch.uint8).numpy() if values.dim() else values.item()
        return tuple(tensor.shape), content(said, set())


def _version(tensor: Tensor) -> Hashable:
    """The values of a small tensor, which is faster than looking whether they were written; else that."""
    if tensor.is_inference() or (tensor.is_cpu and tensor.numel() <= _FEW):
        return _numbers(tensor)
    return version_of(tensor), tensor.data_ptr()


OF_CODE = frozenset({"__name__", "__qualname__", "__module__", "__doc__"})
"""What classes and functions tell of their source."""

VALUES = ""
"""Stands for the values of a tensor among the names of places."""


_FEW = 4096


_IN_CELL = attrgetter("cell_contents")


_OF_FUNCTIONS = attrgetter("__code__", "__defaults__", "__kwdefaults__")


_NAMESPACE = attrgetter("__dict__")


_BASES = attrgetter("__mro__")
