"""A module's state: which thread may exchange it, what it is, what stands in its place, how it is compared.

A stage puts tensors of its own into the submodules of its module, one thread at a time (`locked`). What they
hold can be read (`ModuleState`) and be held again later, where Python functions read it in a reverse pass
(`swapped`). What their code may read besides is compared from call to call (`Fingerprint`).

Each submodule belongs to one lock, and a stage takes the locks of all of its submodules, always in the order
in which they were made, so that no two stages wait for each other. Those that share nothing run side by side.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from operator import call, itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from funcstage import forks
from funcstage._torch.modules import own_cached_weights
from funcstage.state.at_once import at_once
from funcstage.state.content import content, is_plain
from funcstage.state.guise import Guise
from funcstage.state.parameter_hooks import any_hooked, held_in


class _Lock:
    """A lock with its place in the order of all."""

    def __init__(self) -> None:
        self.number = next(_NUMBERS)
        self.lock = forks.lock()


_NUMBERS = itertools.count()
_GUARD = forks.lock()
_OF_SUBMODULE: WeakKeyDictionary[nn.Module, _Lock] = WeakKeyDictionary()
_OF_STAGE: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def look_over(module: nn.Module) -> tuple[Any, ...]:
    """Find a stage's locks, by the submodules that its module has now; in the order to take them."""
    with _GUARD:
        parts = list(filter(_has_state, module.modules()))
        found = {_OF_SUBMODULE[part] for part in parts if part in _OF_SUBMODULE}
        fresh = [part for part in parts if part not in _OF_SUBMODULE]
        if fresh:
            own = _Lock()
            found.add(own)
            _OF_SUBMODULE.update(dict.fromkeys(fresh, own))
        locks = tuple(each.lock for each in sorted(found, key=lambda each: each.number))
        _OF_STAGE[module] = locks
        return locks


def _has_state(part: nn.Module) -> bool:
    """Tell whether a module may hold anything that a forward changes; torch's activations do not."""
    of_torch = type(part).__module__.startswith("torch.nn.")
    return not of_torch or bool(part._parameters or part._buffers or part._modules)


def locked(module: nn.Module | None) -> AbstractContextManager[object]:
    """Let one thread at a time put tensors into a stage's module: the others would compute with them."""
    if module is None:
        return _NOTHING
    locks = _OF_STAGE.get(module) or look_over(module)
    return locks[0] if len(locks) == 1 else _all_of(locks)


@contextmanager
def _all_of(locks: tuple[Any, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


_NOTHING = nullcontext()


class ModuleState(NamedTuple):
    """What a module holds at some moment, its submodules aside."""

    module: nn.Module
    params: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]


def state_of(modules: Iterable[nn.Module]) -> list[ModuleState]:
    """Remember what modules hold now, swapped tensors among it."""
    return [
        ModuleState(m, dict(m._parameters), dict(m._buffers), {k: vars(m)[k] for k in _STATE if k in vars(m)})
        for m in modules
    ]


def state_with(module: nn.Module | None, state: Mapping[str, Any]) -> list[ModuleState]:
    """What a module and its submodules hold with these tensors swapped in, by name."""
    if module is None:
        return []
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    swapped_for = {id(tensor): state[name] for name, tensor in named.items() if name in state}

    def instead(tensor: Tensor | None) -> Tensor | None:
        return swapped_for.get(id(tensor), tensor)

    states = state_of(module.modules())
    for part in states:
        for own in (part.params, part.buffers):
            own.update({name: instead(tensor) for name, tensor in own.items()})
        if "_flat_weights" in part.attributes:
            flat = [instead(weight) for weight in part.attributes["_flat_weights"]]
            part.attributes["_flat_weights"] = flat
            part.attributes["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in flat]
    return states


@contextmanager
def swapped(states: Sequence[ModuleState]) -> Iterator[None]:
    """Let modules hold what they held then, for as long as the context lasts."""
    before = state_of([state.module for state in states])
    held, holding = _tensors_of(before), _tensors_of(states)
    guise = Guise([held.get(place) for place in holding], [*holding.values()])
    back = chain(steps_to(before), guise.back)
    in_child = chain(steps_to(before), guise.looks)
    try:
        with forks.lent(partial(at_once, in_child)):
            guise.put_on()
            put_back(states)
            with own_cached_weights():
                yield
    finally:
        at_once(back)


def _tensors_of(states: Sequence[ModuleState]) -> dict[tuple[int, str], Any]:
    """The parameters and buffers of modules, by their places."""
    return {
        (i, name): tensor
        for i, state in enumerate(states)
        for own in (state.params, state.buffers)
        for name, tensor in own.items()
    }


@contextmanager
def locked_and_swapped(states: Sequence[ModuleState]) -> Iterator[None]:
    """Let a stage's modules hold what they held, for what reads them in a reverse pass."""
    if not states:
        yield
        return
    with locked(states[0].module), swapped(states):
        yield


def put_back(states: Sequence[ModuleState]) -> None:
    """Let modules hold again what they held, for good."""
    at_once(steps_to(states))


def steps_to(states: Sequence[ModuleState]) -> Iterator[Any]:
    """The steps by which modules come to hold again what they held: `at_once` takes them."""
    of_params = [(state.module._parameters, state.params) for state in states]
    of_buffers = [(state.module._buffers, state.buffers) for state in states]
    own: list[tuple[dict[str, Any], dict[str, Any]]] = [*of_params, *of_buffers]
    return chain(
        map(call, [space.clear for space, _ in own]),
        map(call, [space.update for space, _ in own], [values for _, values in own]),
        map(dict.update, [vars(state.module) for state in states], [state.attributes for state in states]),
    )


_STATE = ("training", "_flat_weights", "_flat_weight_refs")
"""Attributes beside parameters and buffers; the flat ones are recurrent layers' copies of their weights."""


class Fingerprint:
    """Reads what a module's code may read of it besides its parameters and buffers.

    Classes, modes, submodules, hooks and attributes, by their content (`content.py`), buffers that it did not
    have at first among these, and which parameters there are. What a module reads elsewhere, in globals or
    closures, is found out by tracing (`reads.py`).

    Args:
        modules: with all of their submodules.
        hooks: whether it matters that parameters have hooks.
    """

    def __init__(self, modules: Sequence[nn.Module], hooks: bool) -> None:
        self._modules = modules
        self._hooks_matter = hooks
        self._lent = {place for place, buffers in self._buffers() if buffers[place[-1]] is not None}
        self._collect()

    def read(self) -> tuple[Hashable, ...]:
        """What is to be compared by equality, in every detail."""
        self._collect()
        plain, rest, _ = self.glance()
        seen = set(self._ids)
        there = [
            (type(part), *[name for name, parameter in part._parameters.items() if parameter is not None])
            for part in self._parts
        ]
        return (*[content(value, seen) for value in plain], *rest, *there)

    def glance(self) -> Glance:
        """The same in a form that is made and compared faster, but not made to be kept."""
        if not all(map(operator.is_, map(vars, self._parts), self._of_parts)):
            self._collect()  # a module has another namespace
        others: list[Hashable] = []
        if self._others:
            seen = set(self._ids)
            others = [content(namespace.get(name), seen) for namespace, name in self._others]
        try:
            plain = [*chain.from_iterable(map(call, self._readers, self._read_from))]
        except KeyError:  # one attribute in place of another
            self._collect()
            return self.glance()
        parameters = held_in(self._parameters)
        hooked = self._hooks_matter and any_hooked(parameters)
        kinds = [*map(type, self._parts), *map(type, parameters)]
        hooks = chain.from_iterable(self._hooks) if any(self._hooks) else ()
        return Glance(plain, [*map(len, self._namespaces), *hooks, *others, hooked], kinds)

    def _buffers(self) -> Iterator[tuple[tuple[int, str, str], dict[str, Any]]]:
        """The places of buffers, by module and names, and what holds them."""
        for i, module in enumerate(self._modules):
            for prefix, part in module.named_modules():
                for name in part._buffers:
                    yield (i, prefix, name), part._buffers

    def _collect(self) -> None:
        parts = [part for module in self._modules for part in module.modules()]
        self._parts, self._ids = parts, [*map(id, parts)]
        self._parameters = [part._parameters for part in parts if part._parameters]
        self._of_parts = [*map(vars, parts)]
        self._namespaces = [space for part in parts for space in (vars(part), part._modules, part._buffers)]
        self._hooks = [getattr(part, kind) for part in parts for kind in _HOOKS]
        self._readers: list[Callable[[Any], Any]] = []
        self._read_from: list[dict[str, Any]] = []
        self._others = [(held, place[-1]) for place, held in self._buffers() if place not in self._lent]
        for part in parts:
            attributes = vars(part)
            own = [name for name in attributes if name not in _OF_EVERY_MODULE]
            plain = [name for name in own if is_plain(attributes[name])]
            if "training" in attributes:  # a compiled module has its original's
                plain.append("training")
            for namespace, names in ((attributes, plain), (part._modules, [*part._modules])):
                if names:  # the first one twice, as a getter of one item returns no tuple
                    self._readers.append(itemgetter(names[0], *names))
                    self._read_from.append(namespace)
            self._others += [(attributes, name) for name in own if name not in plain]


class Glance(NamedTuple):
    """The state of a module.

    Attributes:
        plain: immutable values and modules, which are unchanged if they are the same objects.
        rest: what is compared by equality.
        kinds: the classes of the modules and of their parameters, None's among these.
    """

    plain: list[Any]
    rest: list[Hashable]
    kinds: list[type]

    def agrees(self, other: Glance) -> bool:
        alike = len(self.plain) == len(other.plain) and all(map(operator.is_, self.plain, other.plain))
        return alike and self.rest == other.rest and self.kinds == other.kinds


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = set(vars(nn.Module()))
