"""What a tensor does not tell publicly: how often it was written, and whose memory it has."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch import _is_functional_tensor as is_functionalized

__all__ = [
    "IS_PARAMETER",
    "OF_DYNAMO",
    "OF_FUNCTIONAL",
    "READS_BASE",
    "READS_WHETHER_VIEW",
    "has_hooks",
    "hooks_of",
    "indices_and_values",
    "is_fake",
    "is_functional",
    "is_functionalized",
    "is_symbolic_zero",
    "memory_key_of",
    "memory_of",
    "users_of",
    "version_of",
]

IS_PARAMETER = "_is_param"
"""The attribute by which `nn.Parameter` takes instances of other classes for its own."""

OF_DYNAMO = "_dynamo_"
"""What the names of attributes begin with that Dynamo sets on tensors."""

OF_FUNCTIONAL = frozenset({"elem", "_inference_mode_base"})
"""Attributes that every tensor of a trace has."""

READS_BASE: Any = Tensor._base.__get__  # type: ignore[union-attr]
"""What a mode is told of that is asked what a tensor is a view of."""

READS_WHETHER_VIEW: Any = Tensor._is_view
"""What a mode is told of that is asked whether a tensor is a view."""

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor's memory was written; inference tensors do not count."""


def memory_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata


def memory_key_of(storage: torch.UntypedStorage) -> int:
    """The same, of a storage."""
    return storage._cdata


users_of: Callable[[int], int] = torch._C._storage_Use_Count
"""How many tensors and storages hold a piece of memory."""


def is_functional(tensor: Tensor) -> bool:
    """Tell whether it is one of a trace, without importing what makes those."""
    return getattr(type(tensor), "_mode_key", None) is torch._C._TorchDispatchModeKey.FUNCTIONAL


def was_written(tensor: Any) -> bool:
    """Tell whether an in-place operation changed one of a trace."""
    return bool(torch._functionalize_has_data_mutation(tensor.elem))  # type: ignore[attr-defined]


def is_fake(tensor: Tensor) -> bool:
    """Tell whether it has a shape and no values, likewise."""
    return getattr(type(tensor), "_mode_key", None) is torch._C._TorchDispatchModeKey.FAKE


def is_symbolic_zero(tensor: Tensor) -> bool:
    """Tell whether it is a gradient of zeros without memory."""
    return tensor._is_zerotensor()


def indices_and_values(tensor: Tensor) -> list[Tensor]:
    """The parts of a sparse tensor, coalesced or not."""
    return [tensor._indices(), tensor._values()]


def has_accumulation_hooks(parameter: Tensor) -> bool:
    """Tell whether a parameter has hooks that run after gradients were added."""
    return bool(parameter._post_accumulate_grad_hooks)


def has_hooks(parameter: Tensor) -> bool:
    """Tell whether a parameter has hooks that a backward by autograd would run."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def hooks_of(tensor: Tensor) -> tuple[int, ...]:
    """Which hooks of a tensor a backward by autograd would run, by their identities."""
    kinds = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return tuple(id(hook) for kind in kinds for hook in (kind or {}).values())
