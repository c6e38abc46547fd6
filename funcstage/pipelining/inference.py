"""What a stage returns, and which gradients: found out on fake tensors, without memory or computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcstage import dtensors, trees
from funcstage._torch import tracing as tt
from funcstage._torch.dynamo import uncompiled
from funcstage._torch.shapes import SYMBOLIC, ShapeEnv, environment
from funcstage.dtensors import as_cotangent, zeros
from funcstage.pipelining.examples import StageFunction, example, tensors
from funcstage.pipelining.same_dtypes import SameDtypes
from funcstage.state.ambient import own_autocast_cache
from funcstage.state.kept import untouched
from funcstage.state.undone import undone_if_interrupted
from funcstage.trees import Buffers, Params, PyTree


def run_on_fakes(
    apply: StageFunction,
    module: nn.Module,
    state: tuple[Params, Buffers],
    call: tuple[Any, dict[str, Any]],
    device: torch.device,
    then: Callable[[PyTree, list[Tensor]], Any] = lambda output, inputs: output,
) -> Any:
    """Run a stage on fake tensors.

    Where it reads values of tensors, these are symbols: what it returns must not depend on them.

    Args:
        apply: the stage function.
        module: which it is of; it stays as it is.
        state: parameters and buffers.
        call: positional and keyword arguments, or examples of them.
        device: where the stage is.
        then: what to return, of the output and of the tensors among the positional arguments.

    Raises:
        tt.UNTRACEABLE: if what it returns depends on values, or which way it takes.
    """
    try:
        return _run(apply, module, state, call, device, then, None)
    except tt.UNTRACEABLE as error:
        try:
            found = _run(apply, module, state, call, device, then, environment(of_values=True))
        except Exception:  # not all operations take symbols
            raise error from None
        if any(map(_is_open, trees.flatten(found)[0])):
            raise
        return found


def _is_open(leaf: Any) -> bool:
    """Tell whether a size, or a number, is not known before values are."""
    numbers = [*leaf.shape, *leaf.stride()] if isinstance(leaf, Tensor) else [leaf]
    return any(isinstance(number, SYMBOLIC) for number in numbers)


@undone_if_interrupted
def _run(
    apply: StageFunction,
    module: nn.Module,
    state: tuple[Params, Buffers],
    call: tuple[Any, dict[str, Any]],
    device: torch.device,
    then: Callable[[PyTree, list[Tensor]], Any],
    symbols: ShapeEnv | None,
) -> Any:
    mode = tt.FakeTensorMode(allow_non_fake_inputs=True, shape_env=symbols)

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        [local], specs = dtensors.unwrapped([leaf])
        made = dtensors.wrapped([tt.fake_like(mode, local, device=device)], specs)[0]
        return made.requires_grad_(leaf.requires_grad)

    (params, buffers), (args, kwargs) = trees.map_leaves(fake, (state, call))
    with own_autocast_cache(), untouched(module), uncompiled(), mode, SameDtypes(), torch.enable_grad():
        output, _ = apply(params, buffers, *args, **kwargs)
        return then(output, tensors(args))


def input_grads(received: Sequence[Tensor | None], device: torch.device) -> Callable[..., Any]:
    """Make a `then` that returns examples of the gradients of the inputs, `None` where there is none.

    Args:
        received: examples of the gradients of the outputs; where there is none, it is placed as the output.
        device: where the stage is.
    """

    def backward(output: PyTree, inputs: list[Tensor]) -> list[Any]:
        outputs = tensors(output)
        given = received or (None,) * len(outputs)
        pairs = [(out, grad) for out, grad in zip(outputs, given, strict=True) if out.requires_grad]
        cotangents = [zeros(as_cotangent(out) if grad is None else grad, device) for out, grad in pairs]
        wanted = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad([out for out, _ in pairs], wanted, cotangents, allow_unused=True))
        return [example(next(found)) if x.requires_grad else None for x in inputs]

    return backward
