"""What modules do not tell publicly: hooks, flat weights, what a state dict leaves out, cached weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules import module as of_all
from torch.nn.utils import parametrize

__all__ = [
    "has_hooks",
    "hooks_of",
    "hooks_of_backwards",
    "is_saved_without",
    "own_cached_weights",
    "weight_names",
]


def has_hooks(module: nn.Module) -> bool:
    """Tell whether hooks run when the module is called, or with its backward."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """The module's own tables of hooks that run when it is called, or with its backward."""
    of_forward = module._forward_pre_hooks, module._forward_hooks
    return [*of_forward, module._backward_pre_hooks, module._backward_hooks]


def hooks_of_backwards(modules: Iterable[nn.Module]) -> list[Callable[..., Any]]:
    """The hooks that run with the backward of any of these modules, those of all modules among them."""
    own = chain.from_iterable(hooks_of(part)[2:] for part in modules)
    everybodys = of_all._global_backward_pre_hooks, of_all._global_backward_hooks
    return [hook for hooks in (*own, *everybodys) for hook in hooks.values()]


def is_saved_without(module: nn.Module) -> set[str]:
    """Names of the buffers that its state dict leaves out: the module's set, not a copy."""
    return module._non_persistent_buffers_set


def weight_names(rnn: nn.Module) -> list[str]:
    """The weights of a recurrent layer, in the order in which its operation takes them."""
    return rnn._flat_weights_names  # type: ignore[return-value]


def own_cached_weights() -> AbstractContextManager[None]:
    """Within `torch.nn.utils.parametrize.cached()`, let a call have a cache of its own.

    A weight that another call has left there was computed from other tensors, on another tape.
    """
    return _own_cache() if parametrize._cache_enabled else _NOTHING


@contextmanager
def _own_cache() -> Iterator[None]:
    cache: dict[Any, Any] = parametrize._cache
    before = dict(cache)
    cache.clear()
    try:
        yield
    finally:
        cache.clear()
        if parametrize._cache_enabled:  # which another thread may have left
            cache.update(before)


_NOTHING = nullcontext()
