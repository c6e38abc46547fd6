"""What the README lists as "Right, but at a price": operations of a stage whose work the split may do twice.

Where a split takes more FLOPs than eager backward, `check_stage` looks whether these explain it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from funcstage import trees
from funcstage._torch.functorch import is_functorch_wrapped_tensor
from funcstage._torch.operators import written_by
from funcstage.testing.counting import FlopCounter
from funcstage.testing.tolerances import nodes_on_tape

_BACKWARD = 3
"""How many times an operation's forward FLOPs its backward may take: two products for one, and one again."""


class Price(NamedTuple):
    """An operation that may cost more than it does in eager.

    Attributes:
        operation: its name.
        why: what the README says of it.
        flops: how many may be added; unbounded (`None`) where it only moves work from W to I.
    """

    operation: str
    why: str
    flops: int | None


class Prices(TorchFunctionMode):
    """While it is entered, notes the operations with a price.

    Args:
        counter: of FLOPs, entered around it.

    Attributes:
        found: the operations.
    """

    def __init__(self, counter: FlopCounter) -> None:
        super().__init__()
        # The tensors are held, as their ids would be given away with their memory.
        self._of_inputs: dict[int, Tensor] = {}
        self._of_params: dict[int, Tensor] = {}
        self._counter = counter
        self.found: list[Price] = []

    def watch(self, inputs: Iterable[Tensor], params: Iterable[Tensor]) -> None:
        """Tell the tensors by which the input side differentiates from the parameters."""
        self._of_inputs = {id(t): t for t in inputs}
        self._of_params = {id(t): t for t in params}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        operands = [t for t in trees.flatten((args, dict(kwargs or {})))[0] if isinstance(t, Tensor)]
        by_input = [t for t in operands if id(t) in self._of_inputs]
        by_params = [t for t in operands if id(t) in self._of_params and id(t) not in self._of_inputs]
        before = self._counter.total
        result = function(*args, **(kwargs or {}))
        flops = self._counter.total - before
        for leaf in trees.flatten(result)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                # What is neither came out of something that hides its operands, such as autograd.Function.
                unknown = not by_input and not by_params
                (self._of_inputs if by_input or unknown else self._of_params)[id(leaf)] = leaf
        name = getattr(function, "__name__", str(function))
        writes = written_by(function).positions == (0,)
        if any(map(is_functorch_wrapped_tensor, operands)):
            self.found.append(Price(name, "a torch.func transform inside the stage", 2 * _BACKWARD * flops))
        elif by_params and by_input:
            if function in _CHAINS and len(operands) > 2:
                why = f"one {name} over more than two operands"
                self.found.append(Price(name, why, _BACKWARD * flops))
            elif function in _ATTENTION:
                self.found.append(Price(name, "attention to what is made of parameters", _BACKWARD * flops))
        if function in _UNCOUNTED:
            sides = max((side for t in operands for side in t.shape[-2:]), default=1)
            hidden = 2 * 2 * sides * max(t.numel() for t in operands)
            self.found.append(
                Price(name, "products inside of eager's kernel are counted in a trace alone", hidden)
            )
        if by_params and writes and id(operands[0]) not in map(id, by_params):
            self.found.append(Price(name, "parameters written in place into an activation", None))
        return result

    def watch_functions(self, outputs: Iterable[Tensor]) -> None:
        """Note what those whose backward is one for all gradients take in the backward that comes next."""
        for node in nodes_on_tape(outputs):
            name = node.name().removesuffix("Backward0")
            if isinstance(node, BackwardCFunction):
                name = type(node).__name__.removesuffix("Backward")
                self._watch(node, name, "an autograd.Function that ignores needs_input_grad")
            elif name in _OF_ONE_FORMULA:
                self._watch(node, name, "one formula yields all gradients")

    def _watch(self, node: Any, name: str, why: str) -> None:
        before: list[int] = []

        def enter(_: Any) -> None:
            before.append(self._counter.total)

        def leave(*_: Any) -> None:
            flops = self._counter.total - before.pop()
            if flops:
                self.found.append(Price(name, why, flops))

        node.register_prehook(enter)
        node.register_hook(leave)


_CHAINS = (torch.einsum, torch.linalg.multi_dot, torch.chain_matmul)
_UNCOUNTED = (torch.linalg.pinv, torch.pinverse, torch.linalg.lu_solve)
"""Of which a trace has the two products that eager's kernels make."""
_OF_ONE_FORMULA = {"EuclideanDist", "LinalgHouseholderProduct", "Ormqr"}
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
