"""What a pipeline stage reads its module for: the function, where its tensors hang, and what it is made of.

Modules are changed between steps: submodules are replaced, parametrized or frozen, tensors replaced, moved or
cast, buffers grown. Tensors are read in every step. All else is read anew when it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcstage import trees
from funcstage._torch.operators import copy_into_all
from funcstage.dtensors import placement
from funcstage.functional import function_of
from funcstage.trees import Buffers, PyTree


class Place(NamedTuple):
    """Where a tensor hangs in a module."""

    owner: nn.Module
    attribute: str

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Place:
        path, _, attribute = name.rpartition(".")
        return cls(module.get_submodule(path), attribute)

    def put(self, buffer: Any) -> None:
        """Let the module have another buffer there, as an assignment in its forward would."""
        setattr(self.owner, self.attribute, buffer)


Places = Mapping[str, Place]


def read(places: Places) -> dict[str, Any]:
    """Return what hangs at the places now."""
    return {name: getattr(owner, attribute) for name, (owner, attribute) in places.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """A module as a function, and the places of its tensors.

    Attributes:
        apply: the stage function.
        trainable: the parameters that train.
        updated: the buffers that a forward can write.
        constant: the other buffers, and the frozen parameters.
        structure: what the module was made of.
    """

    apply: Callable[..., tuple[PyTree, Buffers]]
    trainable: Places
    updated: Places
    constant: Places
    structure: Structure

    @classmethod
    def of(cls, module: nn.Module) -> Binding:
        """Read a module."""
        apply, params, buffers = function_of(module)
        places = {name: Place.of(module, name) for name in (*params, *buffers)}
        # Nobody can write into an expanded tensor.
        updated = {name for name, buffer in module.named_buffers() if not trees.is_expanded(buffer)}
        return cls(
            apply,
            {name: places[name] for name in params},
            {name: places[name] for name in buffers if name in updated},
            {name: places[name] for name in buffers if name not in updated},
            Structure.of(module),
        )

    def buffers_registered(self) -> bool:
        """Whether a forward has registered or deleted buffers since the module was read."""
        return [len(part._buffers) for part in self.structure.parts] != self.structure.buffer_counts


@dataclass(frozen=True, slots=True)
class Structure:
    """What a module is made of; equal for the same modules with tensors that look and train alike.

    Attributes:
        parts: the module and its submodules, held so that no other object takes the identity of one.
        key: all that is compared.
        buffer_counts: how many buffers each part has.
    """

    parts: list[nn.Module]
    key: tuple[Any, ...]
    buffer_counts: list[int]

    @classmethod
    def of(cls, module: nn.Module) -> Structure:
        """Look at a module."""
        numbers: dict[int, int] = {}  # of tensors, by which ties are seen whatever the tensors are
        nth = numbers.setdefault
        parts = list(module.modules())
        key = [
            (
                id(part),
                type(part),
                tuple((name, id(child)) for name, child in part._modules.items()),
                tuple(
                    (
                        name,
                        numbers.setdefault(id(p), len(numbers)),
                        p.shape,
                        p.dtype,
                        p.device,
                        p.requires_grad,
                    )
                    for name, p in part._parameters.items()
                    if p is not None
                ),
                tuple(
                    (name, nth(id(b), len(numbers)), b.shape, b.dtype, b.requires_grad, trees.is_expanded(b))
                    for name, b in part._buffers.items()
                    if b is not None
                ),
            )
            for part in parts
        ]
        return cls(parts, tuple(key), [len(part._buffers) for part in parts])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def same_modules(self, other: Structure) -> bool:
        """Whether the modules are the same, whatever their tensors."""
        return [entry[:3] for entry in self.key] == [entry[:3] for entry in other.key]


def update(places: Places, before: Buffers, after: Buffers) -> bool:
    """Write the buffers that a forward has changed into the module.

    Args:
        places: where they hang.
        before: what the forward was given.
        after: what it returned.

    Returns:
        Whether some have another shape or dtype now, so that the module must be read anew.
    """
    changed = {name: place for name, place in places.items() if after[name] is not before[name]}
    owned = read(changed)
    same = [name for name, buffer in owned.items() if _fits(buffer, after[name])]
    with torch.no_grad():
        placed = [name for name in same if placement(owned[name]) or placement(after[name])]
        for name in placed:  # DTensors, which are not copied all at once
            owned[name].copy_(after[name])
        plain = [name for name in same if name not in placed]
        if plain:
            copy_into_all([owned[name] for name in plain], [after[name] for name in plain])
        for name in changed.keys() - set(same):
            value = after[name]
            changed[name].put(value.clone() if isinstance(value, Tensor) else value)
    return len(same) < len(changed)


def _fits(buffer: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and buffer.shape == value.shape and buffer.dtype == value.dtype
