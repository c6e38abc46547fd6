"""What a step is given: tensors, which a graph reads in memory of its own, and what is baked into it.

Two steps have one signature, and so one graph, if all but the values of their tensors is alike.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec
from torch import Tensor

from funcstage import trees
from funcstage._torch.operators import copy_into_all
from funcstage.copies import CopiedByLeaves
from funcstage.state.ambient import AmbientState
from funcstage.state.content import is_plain
from funcstage.state.writes import versions


class CannotCaptureError(Exception):
    """Why a step cannot become a graph, and what to do; never seen outside: the schedule runs as ever."""


class Signature(NamedTuple):
    """What a graph was recorded for. The fields' names serve as reasons for a new one."""

    method: tuple[Any, ...]
    structure: Any
    leaves: tuple[Hashable, ...]
    ambient: AmbientState
    deterministic: bool
    looks: bytes = b""

    def agreed(self, looks: bytes) -> Signature:
        """The same, with what the ranks have agreed about its microbatches."""
        return self._replace(looks=looks)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The arguments of a step.

    Attributes:
        signature: all that is baked in.
        leaves: of the arguments.
        spec: their structure.
        tensors: those of the leaves that are tensors, each once.
    """

    signature: Signature
    leaves: list[Any]
    spec: Any
    tensors: list[Tensor]

    @classmethod
    def of(
        cls, method: tuple[Any, ...], arguments: Any, device: torch.device, root: str = "(args, kwargs)"
    ) -> Given:
        """Read the arguments of a step.

        Args:
            method: which of the schedule's methods it is, and how it is called.
            arguments: a pytree.
            device: where its tensors have to be.
            root: what errors call them.

        Raises:
            CannotCaptureError: if a leaf is neither a plain value nor a tensor on the device, or there is a
                pullback.
        """
        leaves, spec = trees.flatten(arguments)
        check_structure(spec, root)
        key = []
        places: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            reason = _unfit(leaf, device)
            if reason:
                raise CannotCaptureError(f"{trees.leaf_names(spec, root)[i]} is {reason}.")
            place = places.setdefault(id(leaf), len(places)) if isinstance(leaf, Tensor) else None
            key.append((place, _key(leaf)))
        signature = Signature(
            method, spec, tuple(key), AmbientState.now(), torch.are_deterministic_algorithms_enabled()
        )
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        return cls(signature, leaves, spec, [*tensors.values()])

    def kept(self) -> Kept:
        """Make the memory that a graph reads arguments like these from; they are in it."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = [torch.empty_like(tensor) for tensor in self.tensors]
            _copy(tensors, self.tensors)
        copies = dict(zip(map(id, self.tensors), tensors, strict=True))
        leaves = [copies.get(id(leaf), leaf) for leaf in self.leaves]
        return Kept(tensors, trees.unflatten(self.spec, leaves), versions(tensors))


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The memory that a graph reads its arguments from.

    Attributes:
        tensors: that memory.
        arguments: the arguments as the schedule is given them.
        before: how often the tensors had been written when they were made.
    """

    tensors: list[Tensor]
    arguments: Any
    before: list[int]

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Put the values of a step's arguments there."""
        with torch.inference_mode(False), torch.no_grad():
            _copy(self.tensors, tensors)

    def written(self) -> bool:
        """Whether the step writes into its arguments, which here are not the caller's."""
        return versions(self.tensors) != self.before


def fresh(value: Any, given: Iterable[tuple[Tensor, Tensor]] = ()) -> Any:
    """Copy the tensors of a result out of the graph's memory, which the next replay overwrites.

    Args:
        value: the result.
        given: the graph's arguments, each with what the caller gave, which is returned in its place.
    """
    leaves, spec = trees.flatten(value)
    copies = {id(mine): theirs for mine, theirs in given}
    made = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in copies}
    if made:
        values = [*made.values()]
        new = [torch.empty_like(leaf) for leaf in values]
        _copy(new, values)
        copies |= zip(made, new, strict=True)
    return trees.unflatten(spec, [copies.get(id(leaf), leaf) for leaf in leaves])


def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    if into:
        copy_into_all(list(into), list(tensors))


def _key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.stride(), leaf.is_conj(), leaf.is_neg()
    return (leaf,) if isinstance(leaf, enum.Enum) else (type(leaf), repr(leaf))  # 0.0 is not -0.0


@lru_cache(maxsize=256)
def check_structure(spec: PyTreeSpec, root: str) -> None:
    """Refuse pullbacks in what a step is given or returns: the values that they depend on are others then.

    Raises:
        CannotCaptureError: if there is one.
    """
    if spec.type is not None and issubclass(spec.type, CopiedByLeaves):
        raise CannotCaptureError(
            f"there is a {spec.type.__name__} in {root}, which belongs to the tensors that F ran with. Run "
            "F, I and W within the step."
        )
    for child in spec.children():
        check_structure(child, root)


def unfit_value(leaf: Any) -> str:
    """Say why something that is no tensor cannot be baked into a graph; nothing if it can."""
    plain = is_plain(leaf) or isinstance(leaf, (enum.Enum, torch.Size))
    return "" if plain else f"{trees.describe(leaf)}, which may change unnoticed. Use tensors for that"


def _unfit(leaf: Any, device: torch.device) -> str:
    if not isinstance(leaf, Tensor):
        return unfit_value(leaf)
    if type(leaf) not in (Tensor, torch.nn.Parameter):
        return f"a {type(leaf).__name__}. Pass a plain tensor"
    if leaf.is_nested or leaf.layout is not torch.strided:
        return f"{trees.describe(leaf)}. Pass a dense tensor"
    if leaf.device != device:
        return f"on {leaf.device}, but the step runs on {device}. Move it there"
    if leaf.requires_grad:
        return (
            "a tensor that requires grad, and its gradient would have to leave the step. Pass it detached if "
            "nobody needs that"
        )
    return ""


Run = Callable[[Any], Any]
"""A step as a function of its arguments."""
