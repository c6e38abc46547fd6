"""Writes into what a stage was given, refused before they happen, where no levels see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.operators import HigherOrderOperator, TorchDispatchMode, arguments_of
from funcstage.effects import refused_write
from funcstage.engines.rules import control_flow
from funcstage.errors import StageError
from funcstage.trees import PyTree


class WatchedWrites(TorchDispatchMode):
    """Refuses operations that write into the memory of given tensors."""

    supports_higher_order_operators = True

    def __init__(self, given: dict[str, PyTree]) -> None:
        """`given` has what the caller owns, by kind."""
        super().__init__()
        self._given = given
        self._owners = {
            ft.storage_key(leaf): (kind, i)
            for kind, tree in given.items()
            for i, leaf in enumerate(trees.flatten(tree)[0])
            if isinstance(leaf, Tensor)
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (name := control_flow.operator_name(func)) is not None:
            raise StageError(control_flow.refusal("The stage", name, control_flow.COMPILED))
        if not isinstance(func, HigherOrderOperator):
            for i, argument in enumerate(arguments_of(func)):
                if _is_written(argument, args):
                    self._check(func, kwargs.get(argument.name, args[i] if i < len(args) else None))
        return func(*args, **kwargs)

    def _check(self, func: Callable[..., Any], written: Any) -> None:
        for tensor in written if isinstance(written, (list, tuple)) else (written,):
            if isinstance(tensor, Tensor) and (found := self._owners.get(ft.storage_key(tensor))):
                kind, i = found
                leaves, spec = trees.flatten(self._given[kind])
                what = f"{kind} {trees.leaf_names(spec, '')[i]} ({trees.describe(leaves[i])})"
                frozen = kind == "buffer" and isinstance(leaves[i], nn.Parameter)
                raise refused_write(f"The stage writes into {what}", f", by {func}", frozen=frozen)


def _is_written(argument: Any, args: tuple[Any, ...]) -> bool:
    if argument.alias_info is not None:
        return bool(argument.alias_info.is_write)
    # Batch norm's kernels write the statistics and do not say so, in training, which comes behind them.
    # In the same place their backward has a tensor, and their kernel of eval the momentum.
    return argument.name in ("running_mean", "running_var") and len(args) > 5 and args[5] is True
