"""What a module holds of its own, by name: entries that are None are among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["own_buffers", "own_modules", "own_parameters"]


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters that hang on the module itself: its dictionary, not a copy."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that hang on the module itself: its dictionary, not a copy."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that hang on the module itself: its dictionary, not a copy."""
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Tell whether hooks run when the module is called, or with its backward."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(hooks) or bool(module._backward_hooks or module._backward_pre_hooks)


def is_saved_without(module: nn.Module) -> set[str]:
    """Names of the buffers that its state dict leaves out: the module's set, not a copy."""
    return module._non_persistent_buffers_set


def weight_names(rnn: nn.Module) -> list[str]:
    """The weights of a recurrent layer, in the order in which its operation takes them."""
    return rnn._flat_weights_names  # type: ignore[return-value]
