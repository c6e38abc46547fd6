"""Which parameters have hooks that a backward by autograd would run.

A functional stage returns gradients and writes none, so hooks have no place in it and are refused. The
pipeline stage, which does write them, runs the hooks (`pipelining/hooks.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from funcstage import forks
from funcstage._torch.tensors import has_hooks
from funcstage.errors import StructureError

Parameters = Mapping[str, nn.Parameter]
_LOOKING = forks.lock()


def hooked(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether a parameter has hooks by `register_hook` or `register_post_accumulate_grad_hook`."""
    return any(map(has_hooks, parameters))


def held_in(spaces: Iterable[dict[str, Any]]) -> list[nn.Parameter | None]:
    """The parameters in the dicts in which modules hold them, and the places that have none."""
    return [*chain.from_iterable(map(dict.values, spaces))]


def any_hooked(parameters: Sequence[torch.Tensor | None]) -> bool:
    """The same as `hooked`, within microseconds: it is asked in every F."""
    there = [p for p in parameters if p is not None]
    return any(map(_ON_GRADIENTS, there)) or any(map(_AFTER_ACCUMULATION, there))


_ON_GRADIENTS = attrgetter("_backward_hooks")
_AFTER_ACCUMULATION = attrgetter("_post_accumulate_grad_hooks")


def with_hooks_on_accumulators(parameters: Parameters) -> list[str]:
    """Name the parameters whose accumulators (`AccumulateGrad` nodes) have hooks, as DDP-like libraries use.

    Such hooks live as long as somebody holds the node. They are found by registering one more, which another
    thread that looks at the same time must not take for the user's.
    """
    with _LOOKING, torch.inference_mode(False), torch.enable_grad():
        return [name for name, parameter in parameters.items() if _has_hooks(_accumulator(parameter))]


def _accumulator(parameter: nn.Parameter) -> Any:
    grad_fn = parameter.view_as(parameter).grad_fn
    return None if grad_fn is None else grad_fn.next_functions[0][0]  # None in inference mode's tensors


def _has_hooks(node: Any) -> bool:
    for register in () if node is None else (node.register_hook, node.register_prehook):
        handle = register(lambda *_: None)
        found = len(handle.hooks_dict_ref()) > 1
        handle.remove()
        if found:
            return True
    return False


def check_no_hooks(stage: str, parameters: Parameters, *, accumulators: bool = False) -> None:
    """Refuse parameters with hooks.

    Args:
        stage: the name of the module.
        parameters: those that train.
        accumulators: whether to look at their accumulators too, which takes some microseconds each.

    Raises:
        StructureError: names the first one that has some.
    """
    names = [name for name, p in parameters.items() if hooked([p])] if hooked(parameters.values()) else []
    if accumulators:
        names += with_hooks_on_accumulators(parameters)
    if names:
        raise StructureError(
            f"{stage}: {names[0]!r} has hooks (register_hook, register_post_accumulate_grad_hook, or hooks "
            "of its AccumulateGrad), but a functional stage returns gradients instead of accumulating them, "
            "so they would not run. Remove them (handle.remove()) and apply their functions to what W "
            "returns, or use FunctionalPipelineStage, which runs them."
        )
