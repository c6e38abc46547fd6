"""Value and gradient of a stage function, over microbatches: for those who do not schedule I and W."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from funcstage import trees
from funcstage.batches import microbatches as cut
from funcstage.checks import check_callable
from funcstage.errors import LeafError, StructureError
from funcstage.pullback import stage_vjp
from funcstage.trees import AnyBuffers, AnyParams, Buffers, NoBuffers, Params, PyTree, describe
from funcstage.weight_pullback import stage_backward_weight


class ValueAndGrad(Protocol[AnyBuffers]):
    """What `value_and_grad` returns: a pure function."""

    def __call__(
        self, params: AnyParams, buffers: AnyBuffers | NoBuffers, *args: Any, **kwargs: Any
    ) -> tuple[Any, AnyBuffers, AnyParams]: ...


def value_and_grad(
    apply: Callable[..., tuple[Any, AnyBuffers]], *, has_aux: bool = False, microbatches: int = 1
) -> ValueAndGrad[AnyBuffers]:
    """Make a function that computes a loss, new buffers, and the gradients of the parameters.

    The counterpart of `torch.func.grad_and_value` for stage functions, with the split under the hood: each
    microbatch runs F, I and W, and gradients are summed in place.

    Args:
        apply: a stage function whose output is the loss, a real scalar; from `compile` or not.
        has_aux: whether its output is `(loss, aux)`; `aux` is any pytree, and is not differentiated.
        microbatches: into how many equal parts the tensors among the positional arguments are cut, along
            dimension 0. Keyword arguments go to every microbatch as they are.

    Returns:
        A pure function `(params, buffers, *args, **kwargs) -> (loss, new_buffers, param_grads)`, or
        `((loss, aux), new_buffers, param_grads)`. Loss and gradients are means over the microbatches; buffers
        go through these in turn. With several microbatches `aux` is a list with one entry for each. A
        parameter that the loss does not depend on has the gradient `None`.

    Raises:
        StructureError: if `apply` is no stage function, or `microbatches` no positive integer; by the
            returned function, if the output is no `(loss, aux)`.
        LeafError: by the returned function, if the loss is no real scalar, or a tensor cannot be cut.

    Example:
        >>> import torch, funcstage as fs
        >>> module, params, buffers = fs.functionalize(torch.nn.Linear(3, 1))
        >>> def loss(params, buffers, x, y):
        ...     output, buffers = module(params, buffers, x)
        ...     return torch.nn.functional.mse_loss(output, y), buffers
        >>> step = fs.value_and_grad(loss, microbatches=2)
        >>> value, buffers, grads = step(params, buffers, torch.ones(4, 3), torch.zeros(4, 1))
        >>> value.shape, {name: tuple(grad.shape) for name, grad in grads.items()}
        (torch.Size([]), {'weight': (1, 3), 'bias': (1,)})
    """
    check_callable(apply)
    if not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1:
        raise StructureError(f"microbatches must be a positive integer, got {microbatches!r}.")

    return partial(_run, _Step(apply, has_aux, microbatches))  # no function in here: it can be pickled


class _Step(NamedTuple):
    """What `value_and_grad` was given."""

    apply: Callable[..., tuple[Any, Buffers]]
    has_aux: bool
    microbatches: int


def _run(
    step: _Step, /, params: Params, buffers: Buffers, *args: PyTree, **kwargs: PyTree
) -> tuple[Any, Buffers, Params]:
    apply, has_aux, microbatches = step
    losses: list[Tensor] = []
    auxiliary: list[PyTree] = []
    grads: Params = None
    for of_microbatch in cut("args", args, microbatches):
        output, buffers, pullback = stage_vjp(apply, params, buffers, *of_microbatch, argnums=(), **kwargs)
        loss, aux = _parts(output, has_aux)
        losses.append(loss)
        auxiliary.append(aux)
        share = torch.full_like(loss, 1 / microbatches)
        cotangents = (share, trees.map_leaves(lambda _: None, aux)) if has_aux else share
        _, weight_pullback = pullback(cotangents)
        grads = stage_backward_weight(weight_pullback, accumulate=grads)
    value = torch.stack(losses).mean() if microbatches > 1 else losses[0]
    if not has_aux:
        return value, buffers, grads
    return (value, auxiliary if microbatches > 1 else auxiliary[0]), buffers, grads


def _parts(output: PyTree, has_aux: bool) -> tuple[Tensor, PyTree]:
    if has_aux and not (type(output) is tuple and len(output) == 2):
        raise StructureError(f"With has_aux=True the output must be (loss, aux), got {describe(output)}.")
    loss, aux = output if has_aux else (output, None)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise LeafError(
            f"The loss must be a real scalar, a tensor of shape [], got {describe(loss)}. Take the mean over "
            "the microbatch, or pass has_aux=True if the output is (loss, aux)."
        )
    return loss, aux
