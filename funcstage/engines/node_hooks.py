"""Hooks that a stage puts on nodes of its tape, by `grad_fn.register_hook` and `register_prehook`.

Where an operation reads a parameter, neither I nor W has all of the gradients that eager hands to a hook
which runs after it, and what that returns has to reach both: it is refused. Others, and those of tensors, run
as in eager. No mode sees a hook being put on a node, so that nodes are looked at after a run that has asked
for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from funcstage.errors import StageError
from funcstage.residuals import nodes_behind

_OF_TENSORS: Any = Tensor
READS_NODE: Any = _OF_TENSORS.grad_fn.__get__
"""How a stage gets at a node."""


def hooks_before(node: Node) -> list[Callable[..., Any]]:
    """The hooks that run before a node, found by registering one more."""
    return _registered(node.register_prehook)


def hooks_after(node: Node) -> list[Callable[..., Any]]:
    """The hooks that run after a node."""
    return _registered(node.register_hook)


def _registered(register: Callable[..., Any]) -> list[Callable[..., Any]]:
    handle = register(lambda *_: None)
    handle.remove()
    return [*(handle.hooks_dict_ref() or {}).values()]


def is_of_module(node: Node) -> bool:
    """Whether torch has made a node for the backward hooks of a module, which it hooks itself."""
    return node.name() == "BackwardHookFunctionBackward"


class Allowed(NamedTuple):
    """Which hooks of a node run as in eager: those that run before it, and those after."""

    before: bool
    after: bool


def checked_hooks(
    stage: str, edges: Iterable[GradientEdge], allowed: Callable[[Node], Allowed]
) -> list[Callable[..., Any]]:
    """The hooks on nodes behind some edges.

    Args:
        stage: its name.
        edges: where its tapes end.
        allowed: which hooks of a node run as in eager.

    Raises:
        StageError: names the first node that has others, and the hook.
    """
    found: list[Callable[..., Any]] = []
    for node in nodes_behind(edges):
        if not is_of_module(node):
            may = allowed(node)
            for hooks, right in ((hooks_before(node), may.before), (hooks_after(node), may.after)):
                if hooks and not right:
                    raise _refused(stage, node, hooks[0])
                found += hooks
    return found


def is_leaf(node: Node) -> bool:
    """Whether a node is that of a leaf, whose hooks run when a gradient is accumulated there."""
    return hasattr(node, "variable")


def _refused(stage: str, node: Node, hook: Callable[..., Any]) -> StageError:
    named = getattr(hook, "__qualname__", type(hook).__qualname__)
    return StageError(
        f"{stage} hooks {node.name()}, a node of its tape ({named}, by register_hook or register_prehook of "
        "the node). A split backward runs that node in parts, for I and for W, or not at all, so that the "
        "hook would not see all of its gradients. Hook a tensor instead: call register_hook on the output of "
        "that operation, or on the input whose gradient you want."
    )
