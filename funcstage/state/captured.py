"""Tensors that a stage reads without being handed them: globals, cells, attributes that are no buffers.

I and W may read them again, as they may what the caller holds (`writes.py`): writes are looked for here too.
What requires grad is refused, as its gradient is none of those that W returns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from types import FrameType, FunctionType, GeneratorType, MethodType
from typing import Any
from weakref import ref

from torch import Tensor, nn

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.tensors import version_of
from funcstage.errors import StageError, stage_name
from funcstage.residuals import SavedAndWritten
from funcstage.state.reach import holders


class Captured:
    """Tensors that F has captured, with the versions that they have now.

    They are not kept alive: those that the tapes read are.

    Args:
        found: those.
        apply: the stage function, which is searched for their names when they are asked for.
    """

    __slots__ = ("_apply", "_only", "_seen")

    def __init__(self, found: Iterable[ref[Tensor]], apply: Callable[..., Any]) -> None:
        self._apply = apply
        self._only: set[int] | None = None  # keys of memory that was read in any case
        alive = [(each, tensor) for each in found if (tensor := each()) is not None]
        self._seen = [(each, version_of(tensor)) for each, tensor in alive if not tensor.is_inference()]

    def written(self, reads: Callable[[], Iterable[Tensor]]) -> str | None:
        """Name a tensor that was written into and is among what `reads` lists; None as a rule."""
        changed = [
            t for each, version in self._seen if (t := each()) is not None and version_of(t) != version
        ]
        if not changed:
            return None
        try:
            keys = {ft.storage_key(t) for t in reads()} if self._only is None else self._only
        except SavedAndWritten:  # by autograd, which does not say of what
            keys = set(map(ft.storage_key, changed))
        found = next((tensor for tensor in changed if ft.storage_key(tensor) in keys), None)
        return None if found is None else f"{name_of(found, self._apply)} ({trees.look(found)})"

    def within(self, memory: Sequence[Tensor]) -> Captured:
        """Those alone that have memory in common with some tensors, whatever is read."""
        keys = {ft.storage_key(tensor) for tensor in memory}
        part = Captured((), self._apply)
        part._only = keys
        part._seen = [
            (each, version)
            for each, version in self._seen
            if (t := each()) is not None and ft.storage_key(t) in keys
        ]
        return part


def refuse_trainable(found: Iterable[Tensor], apply: Callable[..., Any]) -> None:
    """Refuse a stage that computes with a trainable tensor which it was not handed.

    Args:
        found: tensors that it has captured and computed with where gradients are recorded.
        apply: the stage function.

    Raises:
        StageError: if one of them requires grad.
    """
    for tensor in found:
        if tensor.requires_grad:
            raise StageError(
                f"{stage_name(apply)} computes with {name_of(tensor, apply)} ({trees.look(tensor)}), which "
                "requires grad and is not handed to it, so that its gradient would be lost. Read a module's "
                "parameter as the attribute under which it is registered (modules in a list are not: take an "
                "nn.ModuleList), pass anything else among the parameters or arguments, or detach it if it is "
                "a constant."
            )


def name_of(tensor: Tensor, apply: Callable[..., Any]) -> str:
    """What to call a tensor that a stage function has captured, by where it can be found."""
    return next((name for name, value in _places(apply) if value is tensor), "a tensor that was captured")


def was_there(leaf: Tensor, made: Container[int], apply: Callable[..., Any]) -> bool:
    """Tell whether a leaf of a tape that a stage function has left was there before it ran.

    Args:
        leaf: that.
        made: the ids of leaves that it was seen to make.
        apply: the stage function.
    """
    if id(leaf) in made:
        return False
    return any(value is leaf for _, value in _places(apply)) or _lasts(leaf, apply)


def _lasts(value: Any, apply: Callable[..., Any]) -> bool:
    """Tell whether a module, a class or the stage leads to a value; what a forward makes, its tape has."""
    ends = {id(apply), id(getattr(apply, "module", None))}
    behind: tuple[Any, ...] = (value,)
    seen: set[int] = set()
    for _ in range(_FAR):
        seen.update((*map(id, behind), id(behind)))  # the tuple itself is what they are asked about by
        behind = tuple(
            holder
            for holder in gc.get_referrers(*behind)
            if id(holder) not in seen and not isinstance(holder, (FrameType, GeneratorType))
        )
        if any(id(h) in ends or isinstance(h, type) or (type(h) is dict and "__spec__" in h) for h in behind):
            return True
        if not behind:
            break
    return False


_FAR = 20
"""How many objects there may be between a value and what leads to it."""


def _places(apply: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    module = getattr(apply, "module", None)
    functions = [apply]
    if isinstance(module, nn.Module):
        yield from ((f"the module's own parameter {name!r}", p) for name, p in module.named_parameters())
        for holder in holders(module):
            entries = holder.items() if isinstance(holder, dict) else enumerate(holder)
            yield from ((f"the captured tensor {place!r}", value) for place, value in entries)
        functions += [part.forward for part in module.modules()]
        for kind in {kind: None for part in module.modules() for kind in type(part).__mro__}:
            yield from ((f"the captured tensor {kind.__name__}.{name}", v) for name, v in vars(kind).items())
    for function in functions:
        if isinstance(function, MethodType):
            function = function.__func__
        if isinstance(function, FunctionType):
            for name in function.__code__.co_names:
                value = function.__globals__.get(name)
                yield f"the global {name!r}", value
                if isinstance(value, nn.Module):
                    yield from ((f"the global {name}.{key}", p) for key, p in value.named_parameters())
            for value in function.__defaults__ or ():
                yield f"a default argument of {function.__qualname__}", value
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                try:
                    yield f"the captured variable {name!r}", cell.cell_contents
                except ValueError:  # not filled yet
                    continue
