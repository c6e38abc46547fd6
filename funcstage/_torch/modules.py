"""What a module does not tell publicly: its hooks, what its state dict leaves out, its flat weights."""

from __future__ import annotations

from torch import nn

__all__ = ["has_hooks", "is_saved_without", "weight_names"]


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
