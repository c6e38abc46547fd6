"""The caller's grad mode: asking for a split backward is asking for gradients, whatever the mode.

Under `no_grad` a stage runs as it does with gradients on, and the caller records nothing of it. Inference
mode makes tensors that no tape can be recorded on, so that the three steps of the split leave it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch.functorch import current_level
from funcstage.errors import stage_name
from funcstage.state.argument_containers import Containers
from funcstage.trees import Buffers, Params

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_inference_mode(function: Function) -> Function:
    """Run a function outside of inference mode, so that what it makes are ordinary tensors."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # the caller still records nothing
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]  # with the same parameters


def unrecorded_where_off(stage_vjp: Function) -> Function:
    """Let nothing outside record F, which itself has gradients on, where they were off."""

    @wraps(stage_vjp)
    def run(apply: Any, params: Params, buffers: Buffers, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or current_level():
            return stage_vjp(apply, params, buffers, *args, **kwargs)
        given, instead = (args, kwargs), _Instead()
        params, buffers, args, kwargs = trees.map_leaves(instead, (params, buffers, args, kwargs))
        containers = Containers(given, (args, kwargs))
        with instead.handed():
            output, new_buffers, pullback = stage_vjp(apply, params, buffers, *args, **kwargs)
        containers.give_back(stage_name(apply))
        return *trees.map_leaves(_unrecorded, (output, new_buffers)), pullback

    return run  # type: ignore[return-value]  # with the same parameters


def in_ordinary_mode(stage_vjp: Function) -> Function:
    """Both of these, in one step where there is nothing to do."""
    otherwise = outside_inference_mode(unrecorded_where_off(stage_vjp))

    @wraps(stage_vjp)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return stage_vjp(*args, **kwargs)
        return otherwise(*args, **kwargs)

    return run  # type: ignore[return-value]  # with the same parameters


def as_handed(leaves: list[Any]) -> list[Any]:
    """What the caller has handed in for leaves of the arguments, of which some may not be recorded."""
    handed = _current.handed
    return [handed.get(id(leaf), leaf) for leaf in leaves] if handed else leaves


class _OfThread(threading.local):
    handed: Mapping[int, Tensor] = MappingProxyType({})


_current = _OfThread()


class _Instead:
    """Puts one tensor that is not recorded in the place of each, as often as that is there."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}
        self._handed: dict[int, Tensor] = {}

    def __call__(self, leaf: Any) -> Any:
        found = self._found.get(id(leaf))
        if found is None:
            found = _unrecorded(leaf)
            if found is not leaf:
                self._found[id(leaf)], self._handed[id(found)] = found, leaf
        return found

    @contextmanager
    def handed(self) -> Iterator[None]:
        """Answer `as_handed` by these."""
        before, _current.handed = _current.handed, self._handed
        try:
            yield
        finally:
            _current.handed = before


def _unrecorded(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf
