"""Affine group norm on the CPU before torch 2.14: its backward crashes where it is not asked for dX.

The kernel for inputs in channels-last memory writes all three gradients, wanted or not, and takes the process
down where there is no memory for the first. A split backward asks for the other two alone, in W. The kernel
for contiguous inputs does as it is told, so that is the one which runs here; the output lies as it ever does.
Of all backward operations with an output mask it is the only one (`tests/engines/rules/test_group_norm.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from funcstage import trees
from funcstage._torch.operators import suggest_memory_format
from funcstage._torch.tape import saved_input
from funcstage.engines.rules.base import Call
from funcstage.errors import StructureError

GROUP_NORMS = (F.group_norm, torch.group_norm)

SURVIVES = torch.__version__ >= "2.14"
"""Whether the kernel does without dX."""


def crashes(call: Call) -> bool:
    """Tell whether the backward of a call would crash."""
    x = call.args[0] if call.args else call.kwargs.get("input")
    return isinstance(x, Tensor) and x.is_cpu and suggest_memory_format(x) != torch.contiguous_format


def contiguous_group_norm(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same call of the other kernel."""
    result: Tensor = func(input.contiguous(), *args, **kwargs)
    return result.contiguous(memory_format=suggest_memory_format(input))


def edges_to_ask_for(node: Node) -> list[Any]:
    """Places on an eager tape whose gradients a node must be asked for, besides those that are wanted."""
    x = node.next_functions[0] if node.name() == "NativeGroupNormBackward0" and not SURVIVES else (None, 0)
    return [] if x[0] is None else [x]


def refuse_without_dx(node: Node) -> None:
    """Refuse an operation of an eager tape that cannot be asked for dX, as its input requires no grad.

    Raises:
        StructureError: where its backward would take the process down, in plain torch too.
    """
    if SURVIVES or node.name() != "NativeGroupNormBackward0" or node.next_functions[0][0] is not None:
        return
    x = saved_input(node)
    if x.is_cpu and suggest_memory_format(x) != torch.contiguous_format:
        raise StructureError(
            f"A group norm on the CPU has an input in channels-last memory, {trees.describe(x)}, that "
            f"requires no grad. Its backward would crash the process in torch {torch.__version__}; torch "
            "2.14 has fixed that. Give the stage x.contiguous(), or x.requires_grad_()."
        )
