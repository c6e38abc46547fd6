"""What the trace of a layer depends on, in a form in which two layers can be compared.

Objects are compared by their content (`state/content.py`), but for the layer's own modules and tensors, which
count by where they are in it, and the tensors that it is given likewise. So two layers that differ in nothing
but which they are say the same. What cannot be said so that it could be compared makes a layer unlike any.

Numbers and strings in which layers differ, such as which of them one is, are said apart: they do not matter
unless the layer that is traced reads them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcstage._torch.functorch import saving_hooks
from funcstage._torch.modes import dispatch_modes, function_modes
from funcstage._torch.modules import has_hooks
from funcstage._torch.namespaces import tells_reads
from funcstage._torch.settings import any_hook_of_all_modules
from funcstage._torch.tensors import OF_FUNCTIONAL
from funcstage._torch.tracing import FunctionalTensor
from funcstage.state.ambient import AmbientState
from funcstage.state.content import PLAIN, exactly, is_opaque, reader_of


class Unlike(Exception):
    """A layer is not surely like another one, so that it has to be traced itself."""


class Description(NamedTuple):
    """What the trace of a layer's call depends on.

    Attributes:
        said: what two layers must agree in.
        apart: what attributes say in which they may differ, by their module's number and their names.
        tensors: that it is made of and that it is given, each once.
    """

    said: Hashable
    apart: dict[tuple[int, str], Hashable]
    tensors: list[Tensor]


def description(module: nn.Module, arguments: Any, apart: Sequence[Set[str]]) -> Description:
    """Describe a call of a layer.

    Args:
        module: the layer.
        arguments: what it is given.
        apart: for each of its modules, the attributes that are said apart.

    Raises:
        Unlike: if it cannot be described.
    """
    speaker = _Speaker(module, arguments)
    parts, own = [], {}
    for i, (part, names) in enumerate(zip(speaker.parts, apart, strict=True)):
        parts.append((type(part), speaker.said(_without(names, vars(part)))))
        own.update({(i, name): _plain(part, name) for name in names})
    given = speaker.said(arguments)
    looks = [speaker.looks(tensor) for tensor in speaker.tensors]
    return Description((parts, given, looks), own, speaker.tensors)


def differing(layers: Sequence[nn.Module]) -> list[Set[str]]:
    """For each module of layers of one structure, the plain attributes in which not all of them agree."""
    return [_differing(parts) for parts in zip(*(layer.modules() for layer in layers), strict=True)]


def _differing(parts: Sequence[nn.Module]) -> Set[str]:
    spaces = [*map(vars, parts)]
    found = set()
    for name in vars(parts[0]).keys() - _OF_EVERY_MODULE:
        values = [space.get(name, _ABSENT) for space in spaces]
        plain = all(type(value) in PLAIN for value in values)
        if plain and len({*map(exactly, values)}) > 1 and tells_reads(type(parts[0]), name):
            found.add(name)
    return found


def _without(names: Set[str], space: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in space.items() if name not in names} if names else space


def _plain(part: nn.Module, name: str) -> Hashable:
    value = vars(part).get(name, _ABSENT)
    if type(value) not in PLAIN:
        raise Unlike("what others have as a number or string is none")
    return exactly(value)


_ABSENT = object()
_OF_EVERY_MODULE = vars(nn.Module()).keys()


def surroundings() -> tuple[Any, ...]:
    """What the trace of a layer depends on besides the layer, and what it reads elsewhere.

    Raises:
        Unlike: if hooks run with all modules or on what autograd saves, or writes are not noted.
    """
    if saving_hooks() is not None or any_hook_of_all_modules():
        raise Unlike("hooks run with whatever is called or saved")
    if torch.is_inference_mode_enabled():
        raise Unlike("nobody notes what is written")
    return AmbientState.now(), dispatch_modes(), *map(_One, function_modes())


class _One:
    """Compares an object by identity."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _One) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]


class _Speaker:
    def __init__(self, module: nn.Module, arguments: Any) -> None:
        self.parts = [*module.modules()]
        self.tensors: list[Tensor] = []
        self._known: dict[int, Hashable] = {id(part): ("module", i) for i, part in enumerate(self.parts)}
        self._seen: dict[int, tuple[int, Any]] = {}
        for part in self.parts:
            if has_hooks(part):
                raise Unlike("it has hooks")
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                self._add(tensor)
        for tensor in _tensors_in(arguments):
            self._add(tensor)

    def _add(self, tensor: Tensor | None) -> None:
        if tensor is None or id(tensor) in self._known:
            return
        if type(tensor) is not FunctionalTensor:
            raise Unlike("a tensor is none of the trace")
        self._known[id(tensor)] = ("tensor", len(self.tensors))
        self.tensors.append(tensor)

    def said(self, value: Any) -> Hashable:
        """What a value says."""
        kind = type(value)
        if kind in PLAIN:
            return exactly(value)
        key = id(value)
        if key in self._known:
            return self._known[key]
        if key in self._seen:
            return "again", self._seen[key][0]
        if isinstance(value, (nn.Module, Tensor)) or is_opaque(value):
            raise Unlike("it holds what is not its own")
        self._seen[key] = len(self._seen), value
        head, parts = reader_of(kind)(value)
        return (
            head,
            *[(name, self.said(part)) if type(name) is str else self.said(part) for name, part in parts],
        )

    def looks(self, tensor: Tensor) -> Hashable:
        """What a forward may ask of a tensor."""
        if tensor.is_conj() or tensor.is_neg():
            raise Unlike("a tensor is conjugated or negated lazily")
        noted = {name: note for name, note in vars(tensor).items() if name not in OF_FUNCTIONAL}
        kind = tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, tensor.is_leaf
        return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), *kind, self.said(noted))


def all_in(value: Any) -> Iterator[Any]:
    """What an argument of a layer is and holds, in order."""
    yield value
    if type(value) in (tuple, list, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from all_in(each)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)
    elif type(value) not in PLAIN:
        raise Unlike(f"it is given a {type(value).__qualname__}")
