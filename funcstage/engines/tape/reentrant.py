"""Reentrant checkpoints where they run as they come: what they keep besides their results is a constant.

Torch runs such a region without autograd at first. Its results get a gradient afterwards, but not what it has
left in lists or on modules. Here it runs with autograd, once, so that what it leaves must be cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage.effects import MARKS, refuse_effects
from funcstage.engines.levels.first_reads import FirstReads
from funcstage.engines.node_hooks import READS_NODE
from funcstage.engines.rules.base import Call
from funcstage.engines.rules.flex import refuse_differentiated
from funcstage.engines.rules.group_norm import GROUP_NORMS, SURVIVES, contiguous_group_norm, crashes


class Leftovers:
    """What the reentrant regions of a run have made and not returned."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def run(self, region: Callable[[], Any]) -> Any:
        """Run a region, and note what it makes."""
        made: dict[int, Tensor] = {}
        with _Noting(made):
            result = region()
        for leaf in trees.flatten(result)[0]:
            made.pop(id(leaf), None)
        self._tensors |= made
        return result

    def cut(self, operands: Any) -> Any:
        """The operands of an operation, those of them without history that a region has left."""
        if not self._tensors:
            return operands
        return trees.map_leaves(lambda x: x.detach() if id(x) in self._tensors else x, operands)


class OneTape(TorchFunctionMode):
    """The mode of a run on one tape, plain or recorded: cuts leftovers off, and refuses effects.

    Args:
        leftovers: of the reentrant regions.
        first_reads: where data meets parameters, if anybody asks.

    Attributes:
        hooked: whether the stage has put hooks on tensors.
        reads_nodes: whether the stage has asked for nodes of the tape, which it may put hooks on.
        leaves: what it was seen to mark as requiring grad, or to make so, as `nn.Parameter` is not.
    """

    def __init__(self, leftovers: Leftovers, first_reads: FirstReads | None = None) -> None:
        super().__init__()
        self._leftovers = leftovers
        self._first_reads = first_reads
        self.hooked = False
        self.reads_nodes = False
        self.leaves: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self._leftovers.cut((args, kwargs or {}))
        refuse_effects(func, args, kwargs)
        self.reads_nodes = self.reads_nodes or func == READS_NODE
        self.hooked = self.hooked or func in _HOOKS
        result = self.run(func, args, kwargs)
        if self._first_reads is not None and not ft.current_level():
            self._first_reads.note(args, kwargs, result)
        if func in MARKS or func is Tensor.__deepcopy__ or kwargs.get("requires_grad"):
            self.leaves.append(args[0] if func in MARKS else result)
        return result

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation."""
        if func in GROUP_NORMS and not SURVIVES and crashes(Call(args, kwargs, traced=False, split=True)):
            return contiguous_group_norm(func, *args, **kwargs)
        refuse_differentiated(func, args)
        return func(*args, **kwargs)


class _Noting(TorchFunctionMode):
    def __init__(self, made: dict[int, Tensor]) -> None:
        super().__init__()
        self._made = made

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in trees.flatten((args, kwargs))[0]}
        for leaf in trees.flatten(result)[0]:
            if isinstance(leaf, Tensor) and not leaf.is_leaf and id(leaf) not in given:
                self._made[id(leaf)] = leaf
        return result


_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
