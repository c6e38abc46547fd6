"""Hooks of a stage's parameters, which run as often as under torch's own stages, on the same gradients.

A stage that has hooks hands the gradients of each W to autograd, which runs the hooks and accumulates; the
others add them up as they come out of W. What runs is a question of the schedule, with torch too:

| backward | `Tensor.register_hook` | after the accumulation, hooks of the accumulator |
| --- | --- | --- |
| whole (GPipe, 1F1B, B of any schedule; W of the first stage) | once a microbatch | once a microbatch |
| W of any other stage | once a microbatch | never: torch only captures the gradient |

A hook sees the gradient of its microbatch, before it is divided by the number of microbatches.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from funcstage._torch.tensors import has_accumulation_hooks
from funcstage.errors import StructureError
from funcstage.state.parameter_hooks import Parameters


def accumulate(parameters: Parameters, grads: Mapping[str, Tensor | None]) -> None:
    """Add gradients into `.grad`, and run all hooks, as `backward` of the whole stage would.

    Later parameters are served first, which in chains of layers is the order of a backward.
    """
    pairs = _pairs(parameters, grads)
    if pairs:
        views, _, values = _views(pairs)
        torch.autograd.backward(views, values)


def captured(parameters: Parameters, grads: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Run the hooks of `Tensor.register_hook` alone, as `torch.autograd.grad` does.

    Returns:
        What they made of the gradients, in memory that nothing else has.
    """
    pairs = _pairs(parameters, grads)
    if not pairs:
        return {}
    views, inputs, values = _views(pairs)
    results = torch.autograd.grad(views, inputs, values)
    return {name: result.clone() for (name, _, _), result in zip(pairs, results, strict=True)}


def _pairs(
    parameters: Parameters, grads: Mapping[str, Tensor | None]
) -> list[tuple[str, nn.Parameter, Tensor]]:
    found = [(name, p, grads[name]) for name, p in parameters.items()]
    return [(name, p, grad.to(p.dtype)) for name, p, grad in found if grad is not None]


def _views(
    pairs: list[tuple[str, nn.Parameter, Tensor]],
) -> tuple[list[Tensor], list[nn.Parameter], list[Tensor]]:
    with torch.enable_grad():
        views = [parameter.view_as(parameter) for _, parameter, _ in pairs]
    return views, [parameter for _, parameter, _ in pairs], [grad for _, _, grad in pairs]


def after_accumulation(parameters: Parameters) -> list[str]:
    """Name the parameters with hooks that see `.grad` itself."""
    return [name for name, parameter in parameters.items() if has_accumulation_hooks(parameter)]


def check_shared(stage: str, names: Collection[str], shared: Collection[str], replicated: bool) -> None:
    """Refuse hooks that would see a `.grad` which is not yet a whole one.

    Args:
        stage: its name.
        names: the parameters with hooks that see `.grad`.
        shared: the parameters that other stages of the process have as well.
        replicated: whether gradients are to be averaged over replicas.

    Raises:
        StructureError: if there are any.
    """
    if names and replicated:
        raise StructureError(
            f"{stage}: {min(names)!r} has a hook that runs once its gradient is accumulated, but with "
            "`data_parallel` gradients are averaged after that, once a step. Do the hook's work after the "
            "step, or leave `data_parallel` out."
        )
    both = set(names) & set(shared)
    if both:
        raise StructureError(
            f"{stage}: {min(both)!r} has a hook that runs once its gradient is accumulated. It is also a "
            "parameter of another stage of this process, so its gradient is whole only after the step. Do "
            "the hook's work after the step; `register_hook` works."
        )


def warn_of_idle(stage: str, names: Collection[str]) -> None:
    """Say that hooks did not run, where torch's own stage leaves them out without a word."""
    warnings.warn(
        f"{stage}: hooks of {min(names)!r} that run once its gradient is accumulated "
        "(register_post_accumulate_grad_hook, hooks of AccumulateGrad) do not run where this schedule runs "
        "W apart from I. Under torch's own PipelineStage they do not either. Use a schedule without W, such "
        "as 1F1B, or do their work after the step.",
        stacklevel=2,
    )
