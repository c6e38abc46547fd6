"""Whole parameters of those that FSDP shards: gathered before the forward, their gradients reduced after it.

FSDP does both in hooks of its modules. Here they are a function, shards -> whole parameters, and its backward
is the reduction: as parameters alone are read, all of it belongs to W.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.autograd import Function

from funcstage.errors import LeafError
from funcstage.trees import describe

if TYPE_CHECKING:
    from funcstage._torch.fsdp import Group


def is_sharded(module: nn.Module) -> bool:
    """Tell whether FSDP shards parameters of a module or its submodules."""
    return next(sharded_parts(module), None) is not None


def sharded_parts(module: nn.Module) -> Iterator[str]:
    """Yield the names of the submodules that `fully_shard` has worked on; of the module itself that is ""."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:  # what is not loaded has no instances
        yield from (name for name, part in module.named_modules() if isinstance(part, kind))


_told: ContextVar[Callable[[bool], AbstractContextManager[Any]]] = ContextVar("told", default=nullcontext)


@contextmanager
def telling(who: Callable[[bool], AbstractContextManager[Any]]) -> Iterator[None]:
    """Let somebody surround what gathers parameters, told whether they are to be gathered again for I."""
    token = _told.set(who)
    try:
        yield
    finally:
        _told.reset(token)


def show_shards(module: nn.Module) -> None:
    """Let a module hold its shards, in whose places a forward may have left whole parameters."""
    if is_sharded(module):
        from funcstage._torch.fsdp import with_shards

        with_shards(module)


class Gathering:
    """How the parameters of a module are gathered.

    Attributes:
        groups: parameters that are gathered together.
    """

    def __init__(self, module: nn.Module) -> None:
        self.groups: tuple[Group, ...] = ()
        if is_sharded(module):
            from funcstage._torch.fsdp import groups_of

            self.groups = groups_of(module)

    def whole(self, owner: str, state: Mapping[str, Tensor], reduces: bool = True) -> dict[str, Tensor]:
        """Return state with whole parameters in the place of shards.

        Args:
            owner: the name of the module.
            state: parameters and buffers.
            reduces: whether W is to reduce the gradients.

        Raises:
            LeafError: if there is anything else than a shard.
            StructureError: if FSDP was asked for other gradients than are returned.
        """
        from funcstage._torch.fsdp import check_reduces

        if reduces:
            check_reduces(owner, self.groups)
        found = dict(state)
        for group in self.groups:
            names = [parameter.name for parameter in group.parameters]
            for parameter in group.parameters:
                given = state[parameter.name]
                if not parameter.is_shard(given):
                    raise LeafError(
                        f"{owner}: {parameter.name!r} must be placed {parameter.spec.placements} over "
                        f"{parameter.spec.mesh}, as FSDP shards it; got {describe(given)}. Pass a DTensor "
                        "like the module's: call functionalize after fully_shard."
                    )
            whole = Gathered.apply(group, *(state[name] for name in names))
            found.update(zip(names, whole, strict=True))
        return found

    def around(self, module: nn.Module) -> AbstractContextManager[None]:
        """Enter this where the module's forward runs on whole parameters."""
        from funcstage._torch.fsdp import hooks_casting_only

        return hooks_casting_only(module)


class Gathered(Function):
    """(group, *shards) -> whole parameters; gradients of whole parameters -> gradients of shards."""

    @staticmethod
    def forward(ctx: Any, group: Group, *shards: Any) -> tuple[Tensor, ...]:
        ctx.group, ctx.shards = group, [shard.detach() for shard in shards]
        ctx.set_materialize_grads(False)
        with _told.get()(group.again):
            whole = tuple(group.gather(shards))
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(w for w, needs in zip(whole, needed, strict=True) if not needs))
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, *ctx.group.reduce(grads, ctx.shards)
