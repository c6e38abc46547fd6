"""A module during a step: what its microbatches share, and what is noticed when it is changed in between.

The stage reads its module once a step. Whoever changes it between two microbatches (a loss function, a hook,
a callback) means the later ones, as torch's own stage takes them. Values that are written in place are read
again; another structure is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funcstage.pipelining.binding import Places
from funcstage.state.writes import versions


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a module looks like.

    Attributes:
        module: the module.
        children: of each part, its submodules, and what they are now.
        tensors: of each parameter the name, where it is looked up and as what, itself, whether it is trained,
            and the address of its memory where that is comparable.
        copied: the parameters that the stage computes with a copy of, and how often they were written.
    """

    module: nn.Module
    children: list[tuple[dict[str, Any], list[Any]]]
    tensors: list[tuple[str, dict[str, Any], str, Any, bool, int | None]]
    copied: tuple[list[Tensor], list[int]]

    @classmethod
    def of(cls, module: nn.Module, parts: list[nn.Module], places: Places, copied: bool) -> Snapshot:
        """Look at a module.

        Args:
            module: the module.
            parts: it and its submodules.
            places: where its parameters hang, those that train and those that do not.
            copied: whether the stage computes with copies of them.
        """
        tensors: list[tuple[str, dict[str, Any], str, Any, bool, int | None]] = []
        for name, (owner, attribute) in places.items():
            found = owner._parameters.get(attribute)
            if found is not None:
                look = name, owner._parameters, attribute, found, found.requires_grad, _address(found)
                tensors.append(look)
        children = [(part._modules, list(part._modules.values())) for part in parts if part._modules]
        copies: list[Tensor] = [look[3] for look in tensors] if copied else []
        return cls(module, children, tensors, (copies, versions(copies)))

    def change(self, module: object) -> str:
        """Say what is no longer as it was; nothing if it is."""
        if module is not self.module:
            return "the stage was given another module"
        for children, were in self.children:
            if list(children.values()) != were:
                return "a submodule was replaced"
        for name, owned, attribute, before, trained, address in self.tensors:
            now = owned.get(attribute)
            if now is not before:
                return f"parameter {name!r} was replaced"
            if now.requires_grad is not trained:
                return f"parameter {name!r} was {'frozen' if trained else 'thawed'}"
            if address is not None and now.data_ptr() != address:
                return f"parameter {name!r} was given other memory"
        return ""

    def written(self) -> bool:
        """Whether a parameter was written into that the stage has copied."""
        copied, before = self.copied
        return bool(copied) and versions(copied) != before


@dataclass(slots=True, eq=False)
class OwnedBuffers:
    """The buffers of a module that a forward can write, and how often they were when the stage last did."""

    buffers: Mapping[str, Any]
    counts: list[int]

    @classmethod
    def of(cls, places: Places) -> OwnedBuffers:
        """Look at the buffers."""
        buffers = {name: owner._buffers.get(attribute) for name, (owner, attribute) in places.items()}
        return cls(buffers, versions(list(buffers.values())))

    def changed(self, places: Places) -> bool:
        """Whether somebody else has written or replaced one."""
        if not places:
            return False
        now = OwnedBuffers.of(places)
        return now.counts != self.counts or any(
            now.buffers[name] is not buffer for name, buffer in self.buffers.items()
        )


def _address(tensor: Tensor) -> int | None:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.data_ptr() if plain and not tensor.is_meta else None
