"""Reentrant checkpoints where they run as they come: what they keep besides their results is a constant.

Torch runs such a region without autograd at first. Its results get a gradient afterwards, but not what it has
left in lists or on modules. Here it runs with autograd, once, so that what it leaves must be cut off, and a
region that asks whether there are gradients, which has two answers in eager, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
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
from funcstage.errors import StageError
from funcstage.state.code import is_torchs_or_library
from funcstage.state.profilers import resume


class Leftovers:
    """What the reentrant regions of a run have made and not returned."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def run(self, region: Callable[[], Any]) -> Any:
        """Run a region, and note what it makes.

        Raises:
            StageError: if it asks whether gradients are on, or whether what it has made has one.
        """
        made: dict[int, Tensor] = {}
        asked = _Asked()
        with asked, _Noting(made, asked):
            result = region()
        asked.refuse()
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


class _Asked:
    """Notes where a region's own code asks what is answered otherwise without gradients and with them."""

    def __init__(self) -> None:
        self._found: tuple[str, str] | None = None
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._profile)

    def __exit__(self, *error: object) -> None:
        resume(self._before)

    def note(self, what: str, frame: FrameType) -> None:
        """Note a question, unless it is a library's, whose results do not depend on it."""
        if self._found is None and not is_torchs_or_library(frame.f_globals.get("__name__")):
            self._found = what, f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def refuse(self) -> None:
        if self._found is not None:
            what, where = self._found
            raise StageError(
                f"A reentrant checkpoint asks {what} (at {where}). Torch runs it twice, at first without "
                "gradients and then with, and so gives it two answers; here it runs once. Pass "
                "use_reentrant=False to `checkpoint`, or ask outside and pass the answer as an argument."
            )

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        # Where they are off, the region has turned them off, in both runs.
        if event == "c_call" and argument is _IS_GRAD_ENABLED and torch.is_grad_enabled():
            self.note("whether gradients are on", frame)
        if callable(self._before):
            self._before(frame, event, argument)


class _Noting(TorchFunctionMode):
    def __init__(self, made: dict[int, Tensor], asked: _Asked) -> None:
        super().__init__()
        self._made, self._asked = made, asked

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _OF_HISTORY and id(args[0]) in self._made:
            self._asked.note(f"for {_OF_HISTORY[func]} of a tensor that it has made", sys._getframe(1))
        given = {id(leaf) for leaf in trees.flatten((args, kwargs))[0]}
        for leaf in trees.flatten(result)[0]:
            if isinstance(leaf, Tensor) and not leaf.is_leaf and id(leaf) not in given:
                self._made[id(leaf)] = leaf
        return result


_TENSOR: Any = Tensor
_OF_HISTORY = {getattr(_TENSOR, name).__get__: name for name in ("requires_grad", "grad_fn", "is_leaf")}
_IS_GRAD_ENABLED: Any = torch.is_grad_enabled
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
