"""The mode under which a stage is recorded: it opens what would hide the split from the graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch import interception
from funcstage._torch.tensors import READS_BASE, READS_WHETHER_VIEW
from funcstage.dtensors import unwrapped
from funcstage.effects import MARKS, refused_mark
from funcstage.engines.graph import generators
from funcstage.engines.graph.blame import is_asked_by_stage
from funcstage.engines.graph.refusals import SHOWING, TRACED, Shown, captured
from funcstage.engines.rules.base import Call
from funcstage.engines.rules.dtypes import refuse_complex
from funcstage.engines.rules.table import known
from funcstage.engines.tape.reentrant import Leftovers, OneTape
from funcstage.errors import TraceError
from funcstage.state.guise import own_of


class Separable(OneTape):
    """Replaces what would be recorded as one operation that cannot be separated or replayed.

    Recurrent layers are traced step by step, as their fused kernels yield all gradients at once. Batch
    norm is traced without cuDNN, whose operation writes the running statistics and does not say so. A linear
    layer keeps the dtype that eager gives it, also inside of attention.
    """

    def __init__(self, owner: str, leftovers: Leftovers) -> None:
        super().__init__(leftovers)
        self.owner = owner
        self.given: dict[int, str] = {}  # state and differentiated arguments, by their ids
        self.aliases: dict[int, Tensor] = {}  # of the leaves that stand for them, by their ids
        self._within = interception.current().depth > 0  # the run of another stage, of which this is a part

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an operation."""
        if func in MARKS:
            self._mark(*args, **kwargs)
        if func in SHOWING and is_asked_by_stage():
            raise Shown(func.__name__)
        if func is Tensor.is_set_to:
            raise TraceError(
                f"{self.owner} asks whether a tensor is set to another (is_set_to). Those of a trace have "
                "no memory to tell by: compare them by `is`."
            )
        if func in _OF_LEAVES and id(args[0]) in self.given:
            return self._of_leaf(func, args[0])
        if func == READS_BASE:
            base = func(*args)
            return self.aliases.get(id(base), base)
        if func == _READ_DATA and not isinstance(ft.innermost(unwrapped([args[0]])[0][0]), TRACED):
            func = Tensor.detach  # the same of what is captured, which no mode of the trace takes `.data` of
        operation = known(func)
        for target in operation.written.among(args, kwargs):
            (local,), _ = unwrapped([target])
            if not isinstance(ft.innermost(local), TRACED):
                raise captured(self.owner, trees.describe(target))  # which is real, and would be written
            refuse_complex(getattr(func, "__name__", ""), target, *args, *kwargs.values())
        generators.check_kept(args, kwargs)
        if self._within:
            refuse_of_levels(self.owner, (args, kwargs))
        rule = operation.instead(Call(args, kwargs, traced=True, split=True))
        if rule is None:
            return func(*args, **kwargs)
        with nullcontext() if rule.whole else self:
            return rule.body(*args, **kwargs)

    def _of_leaf(self, func: Any, leaf: Tensor) -> Any:
        """What eager says of a parameter or argument, which here is an alias of another leaf."""
        if func == _GRAD and own_of(leaf) is not None:
            raise TraceError(
                f"{self.owner} reads the `.grad` of a parameter ({self.given[id(leaf)]}), which changes from "
                "call to call. Pass it as an argument."
            )
        return _OF_LEAVES[func]

    def _mark(self, tensor: Tensor, requires_grad: bool = True) -> None:
        if id(tensor) in self.given and tensor.requires_grad != requires_grad:
            raise refused_mark(f"{self.given[id(tensor)]} ({trees.describe(tensor)})", requires_grad)


_READ_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


def refuse_of_levels(owner: str, operands: Any) -> None:
    """Refuse to take for a constant what the stage around a part has computed and did not hand it."""
    for leaf in trees.flatten(operands)[0]:
        if not isinstance(leaf, Tensor) or isinstance(ft.innermost(leaf), TRACED):
            continue
        if ft.innermost(leaf) is not leaf and not ft.is_dead(leaf):
            raise TraceError(
                f"{owner} reads a tensor ({trees.describe(leaf)}) that the stage around it has computed, "
                "but was not given it. Pass it as an argument."
            )


_TENSOR: Any = Tensor
_GRAD = _TENSOR.grad.__get__
_OF_LEAVES = {
    _TENSOR.is_leaf.__get__: True,
    _TENSOR.grad_fn.__get__: None,
    _TENSOR.output_nr.__get__: 0,
    _TENSOR.retains_grad.__get__: False,
    READS_BASE: None,
    READS_WHETHER_VIEW: False,
    _GRAD: None,
}


@torch.library.custom_op("funcstage::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def bernoulli(like: Tensor, p: float) -> Tensor:
    """`torch.empty_like(like).bernoulli_(p)`: ATen's functional form draws in another order."""
    return torch.empty_like(like).bernoulli_(p)


@bernoulli.register_fake
def _(like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like)


def _bernoulli(like: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Any:
    if generator is not None:
        return NotImplemented
    return torch.ops.funcstage.bernoulli.default(like, p)


OWN = {torch.ops.aten.bernoulli.p: _bernoulli}
