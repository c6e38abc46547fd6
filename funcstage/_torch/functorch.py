"""The functorch internals that the levels engine stands on; nothing else imports them.

`torch.func.vjp` opens a level, wraps its primals in it, runs the function and closes the level; its
closure is `torch.autograd.grad` over the wrapped outputs. The engine does the same with two levels and
sends every operation through the ones that it concerns, which takes these functions one by one.
`tests/_torch/test_private_api.py` says so when they move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _grad_decrement_nesting,
    _grad_increment_nesting,
    _wrap_for_grad,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
    set_inplace_requires_grad_allowed,
)
from torch._C._functorch import (
    _unwrap_for_grad as unwrap,
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
    unwrap_if_dead as _unwrap_if_dead,
)
from torch.autograd.graph import saved_tensors_hooks

__all__ = [
    "close_to",
    "current_level",
    "differentiating_above",
    "down_to",
    "drop_saving_hooks",
    "grad_level",
    "innermost",
    "is_dead",
    "level_of",
    "make_leaf",
    "one_level_down",
    "pop_layer",
    "push_layer",
    "refuse_saving",
    "refusing_to_save",
    "requires_grad",
    "saving_hooks",
    "saving_refused",
    "saving_through",
    "storage_key",
    "under_one_dead_wrapper",
    "unwrap",
    "without_dead_wrappers",
    "wrap",
    "wrap_leaf",
    "wrap_leaves",
]


def current_level() -> int:
    """Return the level of the innermost open transform, 0 where there is none."""
    interpreter = peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


def differentiating_above(level: int) -> bool:
    """Tell whether a transform that takes derivatives is open above `level`."""
    stack = get_interpreter_stack() or ()
    return any(t.level() > level and t.key() in (TransformType.Grad, TransformType.Jvp) for t in stack)


def make_leaf(tensor: Tensor) -> Tensor:
    """Make a tensor of a level a leaf that requires grad there, and return it."""
    set_inplace_requires_grad_allowed(True)
    try:
        return tensor.requires_grad_()
    finally:
        set_inplace_requires_grad_allowed(False)


def wrap_leaf(tensor: Tensor, level: int) -> Tensor:
    """Wrap a tensor at `level` as a leaf that requires grad there."""
    return make_leaf(_wrap_for_grad(tensor, level))


def wrap_leaves(leaves: list[Any], wanted: Iterable[int], level: int) -> list[tuple[int, Tensor]]:
    """Wrap those that are wanted in place, likewise; return them with their numbers."""
    wrapped = []
    set_inplace_requires_grad_allowed(True)
    try:
        for i in wanted:
            leaves[i] = _wrap_for_grad(leaves[i], level).requires_grad_()
            wrapped.append((i, leaves[i]))
    finally:
        set_inplace_requires_grad_allowed(False)
    return wrapped


def wrap(tensor: Tensor, level: int) -> Tensor:
    """Wrap a tensor at `level` as a constant."""
    return _wrap_for_grad(tensor, level)


# These are no generators: one that is broken off while it is entered ends later, when nobody expects it.


class grad_level:  # used as torch's
    """Open a level; entering tells its number."""

    def __enter__(self) -> int:
        self._level: int = _grad_increment_nesting()
        return self._level

    def __exit__(self, *error: object) -> None:
        close_to(self._level - 1)


class down_to:
    """Leave the levels above `level` for a while."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._layers: list[Any] = []

    def __enter__(self) -> None:
        while current_level() > self._level:
            self._layers.append(pop_layer())

    def __exit__(self, *error: object) -> None:
        while self._layers:
            push_layer(self._layers.pop())


class refusing_to_save:
    """Refuse saved-tensor hooks with a message.

    Raises:
        RuntimeError: where there are some.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._before = saving_refused()

    def __enter__(self) -> None:
        refuse_saving(self._message)

    def __exit__(self, *error: object) -> None:
        refuse_saving(self._before)


def close_to(level: int) -> None:
    """Close the levels above `level`, which were left open."""
    while current_level() > level:
        _grad_decrement_nesting()


saving_refused: Callable[[], str | None] = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
"""What is said to those who ask for saved-tensor hooks, where they are refused."""


def refuse_saving(message: str | None) -> None:
    """Refuse saved-tensor hooks with this message, or none."""
    if message is None:
        torch._C._autograd._saved_tensors_hooks_enable()
    else:
        torch._C._autograd._saved_tensors_hooks_disable(message)


def requires_grad(tensor: Tensor) -> bool:
    """Tell whether a tensor requires grad at any level."""
    while not tensor.requires_grad:
        below = one_level_down(tensor)
        if below is tensor:
            return False
        tensor = below
    return True


def innermost(tensor: Tensor) -> Tensor:
    """Return the tensor under all functorch wrappers, dead or alive."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def one_level_down(tensor: Tensor) -> Tensor:
    """Return the tensor under the outermost wrapper, or the tensor itself where there is none."""
    return get_unwrapped(tensor) if is_functorch_wrapped_tensor(tensor) else tensor


def is_dead(tensor: Tensor) -> bool:
    """Tell whether a tensor's outermost wrapper is of a level that was closed."""
    return is_functorch_wrapped_tensor(tensor) and _unwrap_if_dead(tensor) is not tensor


def without_dead_wrappers(tensor: Tensor) -> Tensor:
    """Return the tensor under the wrappers of closed levels."""
    while (inner := _unwrap_if_dead(tensor)) is not tensor:
        tensor = inner
    return tensor


def under_one_dead_wrapper(tensor: Tensor) -> Tensor:
    """Return the tensor under all but the innermost of the wrappers of closed levels."""
    while (inner := _unwrap_if_dead(tensor)) is not _unwrap_if_dead(inner):
        tensor = inner
    return tensor


class saving_through:
    """Let saved tensors go through hooks, also inside the transforms that torch.func refuses them in."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Any]) -> None:
        self._hooks = saved_tensors_hooks(pack, unpack)
        self._before = saving_refused()

    def __enter__(self) -> None:
        refuse_saving(None)
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__()
        if self._before is not None:
            refuse_saving(self._before)


saving_hooks: Callable[[], Any] = partial(torch._C._autograd._top_saved_tensors_default_hooks, True)
"""The innermost hooks of saved tensors."""


def drop_saving_hooks(down_to: Any) -> None:
    """Take away the hooks of saved tensors within these."""
    while (top := saving_hooks()) is not None and top != down_to:
        torch._C._autograd._pop_saved_tensors_default_hooks()


def storage_key(tensor: Tensor) -> int:
    """Return what two tensors have in common exactly when they share memory (while both are alive)."""
    tensor = innermost(tensor)
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.untyped_storage()._cdata
