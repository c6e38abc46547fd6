"""What a module is made of, and the places in which it holds tensors: a stage lends it others for a call."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import chain, compress
from operator import getitem, is_, itemgetter, setitem
from typing import Any

import torch
from torch import Tensor, nn

from funcstage import forks
from funcstage._torch import functorch as ft
from funcstage._torch.operators import without_torch_function
from funcstage._torch.tensors import is_functional, version_of, was_written
from funcstage.errors import PurityError
from funcstage.state.at_once import at_once
from funcstage.state.elsewhere import reads_instead
from funcstage.state.guise import Guise, keep
from funcstage.state.module import put_back, state_of
from funcstage.state.parameter_hooks import any_hooked
from funcstage.trees import map_leaves


class Parts:
    """The submodules of a module, looked at in every call, and their places for tensors.

    Attributes:
        module: the whole.
        names: of the places, as in a state dict.
        recurrent: those submodules that are recurrent layers, by their names.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = dict(module.named_modules())
        self._parts = [*named.values()]
        self._namespaces = [*map(vars, self._parts)]
        self._kinds = [*map(type, self._parts)]
        self._spaces = [*chain.from_iterable(map(_SPACES, self._namespaces))]
        parameters, submodules = self._spaces[::3], self._spaces[2::3]
        self._structure = [(space, dict(space)) for space in submodules]
        self._empty_places = [(space, [k for k in space if space[k] is None]) for space in parameters]
        self._parameters = [space for space in parameters if space]
        self._submodules = [space for space in submodules if space]
        self._empty = [space for space in (*parameters, *submodules) if not space]
        self._is = self._now()
        self._children = self._now_children()

        places = [
            (part, space, key, f"{prefix}.{key}" if prefix else key)
            for prefix, part in named.items()
            for space in (part._parameters, part._buffers)
            for key in space
            if space[key] is not None  # what its forward fills is the module's to keep
        ]
        self.names = [name for *_, name in places]
        self._names = frozenset(self.names)
        self._is_parameter = [space is part._parameters for part, space, *_ in places]
        self._owners = [part for part, *_ in places]
        self._holders, self._keys = [space for _, space, *_ in places], [key for *_, key, _ in places]
        self._holding = [*{id(part): vars(part) for part in self._owners}.values()]
        self._held_by = [*chain.from_iterable(map(_TENSORS, self._holding))]
        self.recurrent = {prefix: part for prefix, part in named.items() if isinstance(part, nn.RNNBase)}

    def __reduce__(self) -> Any:
        """Look at the copy of the module anew: what lies in its namespaces is its own to copy."""
        return Parts, (self.module,)

    def unchanged(self) -> bool:
        """Tell whether classes, submodules and the names of parameters are what they were."""
        return (
            all(map(is_, chain.from_iterable(map(_SPACES, self._namespaces)), self._spaces))
            and not any(self._empty)
            and self._now() == self._is
            and all(map(is_, self._now_children(), self._children))
            and [*map(type, self._parts)] == self._kinds
        )

    def _now(self) -> tuple[list[Any], ...]:
        return (
            [*map(len, self._parameters)],
            [*map(len, self._submodules)],
            [*chain.from_iterable(self._parameters)],
            [parameter is None for space in self._parameters for parameter in space.values()],
        )

    def _now_children(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._submodules))]

    def held(self) -> list[Tensor | None]:
        """The tensors in the places; None where one was taken away since."""
        return [*map(dict.get, self._holders, self._keys)]

    def any_hooked(self) -> bool:
        """Tell whether a parameter has hooks that a backward by autograd would run."""
        return any_hooked([*chain.from_iterable(map(dict.values, self._parameters))])

    def call_with(self, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module while it holds these tensors, as `torch.func.functional_call` does.

        `state` is by the names of the places; afterwards it has what the module has left there.
        """
        holders, keys = self._holders, self._keys
        try:
            before = [*map(getitem, holders, keys)]
        except KeyError:  # a buffer was taken away since, which its forward will miss
            before = []
        if not (before and self._names.issuperset(state)):
            with forks.lent(partial(put_back, state_of(self._parts))):
                return torch.func.functional_call(self.module, state, args, kwargs, tie_weights=False)
        lent = [*map(state.get, self.names, before)]
        guise = Guise(before, lent)
        back = chain(map(setitem, holders, keys, before), guise.back)
        in_child = chain(map(setitem, holders, keys, before), guise.looks)
        try:
            with forks.lent(partial(at_once, in_child)):
                guise.put_on()
                for holder, key, tensor in zip(holders, keys, lent, strict=True):
                    holder[key] = tensor
                output = self.module(*args, **kwargs)
                if (instead := reads_instead()) is not None:
                    output = map_leaves(instead, output)
                notes = guise.notes()
                left = self._take_back(before, guise)
        except BaseException:  # an interrupt may come while the tensors are exchanged
            try:
                self._take_back(before, guise)
            except BaseException:  # and others now, as a handler that is put back may raise again
                at_once(back)
                raise
            raise
        self._check_parameters(before, lent, left)
        if guise.found or guise.viewed:
            self._check_found(guise, before, lent, left)
        named = list(zip(self.names, before, strict=True))
        keep(notes, type(self.module).__name__, lambda own: next(repr(name) for name, t in named if t is own))
        places = zip(self.names, left, strict=True)
        state.update((name, now) for name, now in places if name in state and now is not _GONE)
        return output

    def _check_parameters(self, before: list[Any], lent: list[Any], left: list[Any]) -> None:
        """Refuse a forward that has exchanged parameters for others, or made new ones.

        The stage's are those that it is given: others would get no gradients, or be forgotten.
        """
        of = self._is_parameter
        if not all(map(is_, compress(lent, of), compress(left, of))):
            with without_torch_function():
                for name, own, now in compress(zip(self.names, lent, left, strict=True), of):
                    if now is not own and not _is_alias(now, own):
                        raise PurityError(
                            f"{type(self.module).__name__} exchanges its parameter {name!r} in its forward, "
                            "but a stage's parameters are those that it is given. Compute a new tensor and "
                            "leave the parameter; make state that lasts across calls a buffer."
                        )
        if self.unchanged():
            return
        known = {*map(id, before)}
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in known:
                self._put_back_structure(known)
                raise PurityError(
                    f"{type(self.module).__name__} sets a parameter on its module, {name!r}, in its forward, "
                    "but a stage's parameters are those that it is given. Set it in __init__; where the "
                    "first call does so, call the module once before functionalize."
                )

    def _check_found(self, guise: Guise, before: list[Any], lent: list[Any], left: list[Any]) -> None:
        """Refuse a forward that changes a buffer for which it has also found another place, or a view there.

        What lies there would not be told.
        """
        owner = type(self.module).__name__
        for name, own, stand_in, now in zip(self.names, before, lent, left, strict=True):
            if id(own) in guise.found and now is not stand_in:
                raise PurityError(
                    f"{owner} assigns its buffer {name!r} anew in its forward, and finds the one "
                    "before it in another place, too: in a list, a key, an attribute or a global. "
                    "Read it as the attribute under which it is registered, or keep a clone there."
                )
            if id(own) in guise.viewed and (now is not stand_in or _is_written(stand_in)):
                raise PurityError(
                    f"{owner} changes its buffer {name!r} in its forward, and reads a view of it that was "
                    "made before. A stage changes a copy, so that the view would not show it. "
                    "Make the view in the forward."
                )

    def _put_back_structure(self, known: set[int]) -> None:
        """Take away parameters and submodules that were not there, and put back those that were."""
        for space, empty in self._empty_places:
            for name in [name for name, parameter in space.items() if id(parameter) not in known]:
                del space[name]
            space.update(dict.fromkeys(empty))
        for space, submodules in self._structure:
            space.clear()
            space.update(submodules)

    def _take_back(self, before: list[Any], guise: Guise) -> list[Any]:
        """Let all places hold what they held before; return what they have held by now."""
        at_once(guise.back)
        holders, keys = self._holders, self._keys
        if all(map(is_, chain.from_iterable(map(_TENSORS, self._holding)), self._held_by)):
            with suppress(KeyError):  # the forward has moved a tensor
                left = [*map(getitem, holders, keys)]
                for holder, key, tensor in zip(holders, keys, before, strict=True):
                    holder[key] = tensor
                return left
        return [*map(_exchanged, self._owners, keys, before)]


def _is_alias(now: Any, own: Any) -> bool:
    """Tell whether a forward has put back what it found, as another object."""
    return isinstance(now, Tensor) and now.shape == own.shape and ft.storage_key(now) == ft.storage_key(own)


def _is_written(stand_in: Tensor) -> bool:
    return was_written(stand_in) if is_functional(stand_in) else version_of(stand_in) > 0


def _exchanged(owner: nn.Module, key: str, tensor: Any) -> Any:
    """Let a module hold a tensor wherever it has one of this name by now; return that."""
    for holder in (owner._parameters, owner._buffers):
        if key in holder:
            now = holder[key]
            holder[key] = tensor
            return now
    now = getattr(owner, key, _GONE)
    setattr(owner, key, tensor)
    return now


_GONE: Any = object()
_SPACES = itemgetter("_parameters", "_buffers", "_modules")
_TENSORS = itemgetter("_parameters", "_buffers")
