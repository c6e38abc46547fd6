"""The functorch internals that the closures engine stands on; nothing else imports them.

`torch.func.vjp` opens a level, wraps its primals in it, runs the function and closes the level; its
closure is `torch.autograd.grad` over the wrapped outputs. The engine does the same with two levels and
sends every operation through the ones that it concerns, which takes these functions one by one.
Tried with torch 2.11.0 and 2.13.0; `tests/test_private_api.py` says so when they move.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import (
    _unwrap_for_grad as unwrap,
)
from torch._C._functorch import (
    _wrap_for_grad,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
    set_inplace_requires_grad_allowed,
)
from torch._C._functorch import (
    maybe_get_level as level_of,
)
from torch._C._functorch import (
    pop_dynamic_layer_stack as pop_layer,
)
from torch._C._functorch import (
    push_dynamic_layer_stack as push_layer,
)
from torch._C._functorch import (
    unwrap_if_dead,
)
from torch._functorch.eager_transforms import grad_increment_nesting as grad_level

__all__ = [
    "current_level",
    "grad_level",
    "innermost",
    "level_of",
    "make_leaf",
    "pop_layer",
    "push_layer",
    "storage_key",
    "unwrap",
    "unwrap_if_dead",
    "wrap_leaf",
]


def current_level() -> int:
    """Return the level of the innermost open transform, 0 where there is none."""
    interpreter = peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


def make_leaf(tensor: Tensor) -> Tensor:
    """Make a tensor of the current level a leaf that requires grad there, and return it."""
    set_inplace_requires_grad_allowed(True)
    try:
        return tensor.requires_grad_()
    finally:
        set_inplace_requires_grad_allowed(False)


def wrap_leaf(tensor: Tensor, level: int) -> Tensor:
    """Wrap a tensor at `level` (the current one) as a leaf that requires grad there."""
    return make_leaf(_wrap_for_grad(tensor, level))


def innermost(tensor: Tensor) -> Tensor:
    """Return the tensor under all functorch wrappers, dead or alive."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def storage_key(tensor: Tensor) -> int:
    """Return what two tensors have in common exactly when they share memory (while both are alive)."""
    tensor = innermost(tensor)
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.untyped_storage()._cdata
