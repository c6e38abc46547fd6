"""FlexAttention under the levels of `torch.func`, which have no rule for it.

It runs below all levels, compiled as it should be on an accelerator, and keeps a tape of its own there. The
levels see one custom function of query, key, value and what `score_mod` and `mask_mod` read. What they read
has no gradient uncompiled, where Dynamo is not there to find it: neither on a plain tape nor in torch itself.
Private: the operator behind `flex_attention`, and its arguments.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.dynamo import compiled_again, disable_cache_limit
from funcstage._torch.operators import HigherOrderOperator
from funcstage.engines.levels.checkpoint import StandIns, modules_in
from funcstage.engines.rules import custom_functions
from funcstage.engines.rules.base import Rule, traced
from funcstage.errors import StageError
from funcstage.state.module import state_of, swapped


def rules(operator: Any) -> tuple[Rule, ...]:
    """The rules of the operator behind `flex_attention`."""
    return (
        Rule(lambda call: not call.traced, lambda *args: attend(operator, args)),
        Rule(traced, partial(run_compiled, operator, backend="eager"), whole=True),
    )


def refuse_differentiated(function: Any, args: Sequence[Any]) -> None:
    """Refuse a call of the operator whose functions read what requires grad, if it is one.

    Raises:
        StageError: says what they read.
    """
    if _is_operator(function, "flex_attention"):
        _read_by([args[3], args[4][-1]], args[0])


def is_flex_attention_backward(function: Any) -> bool:
    """Tell whether something is the operator behind its backward."""
    return _is_operator(function, "flex_attention_backward")


def _is_operator(function: Any, name: str) -> bool:
    return isinstance(function, HigherOrderOperator) and function.name() == name


def attend(operator: Any, args: Sequence[Any]) -> Any:
    """Run the operator behind `flex_attention` at all the levels that it concerns.

    Args:
        operator: the operator.
        args: its arguments: query, key and value, `[batch, heads, tokens, width]` each, `score_mod`, the
            block mask's parts, which end in `mask_mod`, and the options.

    Returns:
        Output, log-sum-exp of the scores, and their maximum, as the operator does.
    """
    query, key, value, score_mod, mask, *rest = args
    functions = [score_mod, mask[-1]]
    read = _read_by(functions, query)
    call = _Call(operator, functions, mask[:-1], rest, read)
    return custom_functions.applied(_Attention, (call, query, key, value, *read))


class _Call:
    """The operator with all of its arguments but the tensors that may have gradients."""

    def __init__(
        self,
        operator: Any,
        functions: list[Any],
        mask: tuple[Any, ...],
        rest: list[Any],
        read: list[Tensor],
    ) -> None:
        self._operator = operator
        self._functions = functions
        self._mask = mask
        self._rest = rest
        self._read = read

    def run(self, query: Tensor, key: Tensor, value: Tensor, *read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run it below the levels."""
        instead = {id(tensor): here for tensor, here in zip(self._read, read, strict=True)}
        states = state_of(modules_in(self._functions))
        for state in states:
            for tensors in (state.params, state.buffers):
                tensors.update({name: instead.get(id(tensor), tensor) for name, tensor in tensors.items()})
        score_mod, mask_mod = (_with_cells(function, instead) for function in self._functions)
        with swapped(states):
            return run_compiled(
                self._operator,
                query,
                key,
                value,
                score_mod,
                (*self._mask, mask_mod),
                *self._rest,
                backend="eager" if query.device.type == "cpu" else "inductor",
            )


def run_compiled(operator: Any, *args: Any, backend: str) -> Any:
    """Run the operator through Dynamo, which finds what `score_mod` and `mask_mod` read."""

    def attention(*args: Any) -> Any:  # as Dynamo takes no operator
        return operator(*args)

    with compiled_again(), disable_cache_limit():
        # The last two of its arguments are what Dynamo finds, and it wants to find them itself.
        return torch.compile(attention, fullgraph=True, backend=backend)(*args[:7])


def run_dense_backward(operator: Any, *args: Any) -> Any:
    """Run the operator behind the backward without compiling it.

    It looks at `requires_grad` to tell which gradients are wanted of what `score_mod` reads, which in a
    program nothing has.
    """
    *rest, read, constant = args
    marked = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in read]
    return operator(*rest, tuple(marked), constant)


class _Attention(custom_functions.HasOwnTape, Function):
    """Attention with its own tape, which stays until the levels' tapes go."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            ctx.leaves = [
                tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(tensors, ctx.needs_input_grad[1:], strict=True)
            ]
            ctx.results = call.run(*ctx.leaves)
        output, logsumexp, maximum = (result.detach() for result in ctx.results)
        ctx.mark_non_differentiable(maximum)
        ctx.set_materialize_grads(False)
        return output, logsumexp, maximum

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        wanted = [i for i, wanted in enumerate(ctx.needs_input_grad[1:]) if wanted]
        given = [i for i, cotangent in enumerate(cotangents[:2]) if cotangent is not None]
        found = torch.autograd.grad(
            [ctx.results[i] for i in given],
            [ctx.leaves[i] for i in wanted],
            [cotangents[i] for i in given],
            retain_graph=True,
            allow_unused=True,
        )
        grads: list[Tensor | None] = [None] * len(ctx.leaves)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        return None, *grads


def _read_by(functions: Sequence[Callable[..., Any]], query: Tensor) -> list[Tensor]:
    """The wrapped tensors that the functions read, found by calling them once.

    Raises:
        StageError: if one requires grad.
    """
    found: dict[int, Tensor] = {}

    def note(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) in own:
            return leaf
        if ft.requires_grad(leaf):
            raise StageError(
                f"FlexAttention's score_mod or mask_mod reads {trees.describe(leaf)}, which requires grad "
                "and would get no gradient in a stage that runs uncompiled. Compile the stage, "
                "funcstage.compile(apply), which gives it one, or let them read it detached."
            )
        if ft.level_of(leaf) > 0:
            found[id(leaf)] = leaf
        return leaf

    with torch.no_grad():
        index = torch.zeros((), dtype=torch.int32, device=query.device)
        score = torch.zeros((), dtype=query.dtype, device=query.device)
        own = {id(index), id(score)}
        score_mod, mask_mod = functions
        with StandIns(note):
            score_mod(score, index, index, index, index)
            mask_mod(index, index, index, index)
    return list(found.values())


def _with_cells(function: Any, instead: dict[int, Tensor]) -> Any:
    """The same function over other tensors in its closure."""
    if not isinstance(function, types.FunctionType) or not function.__closure__:
        return function
    contents = [cell.cell_contents for cell in function.__closure__]
    cells = tuple(types.CellType(instead.get(id(content), content)) for content in contents)
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
