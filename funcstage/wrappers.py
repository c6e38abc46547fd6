"""Modules that reduce or shard gradients themselves, which a functional stage would compute past: refused.

Their classes are looked up among the modules that are loaded: to import them takes seconds, and what is not
loaded has no instances.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from funcstage.errors import StructureError
from funcstage.gathered import sharded_parts
from funcstage.state.reach import reached

_UNWRAP = "Pass the module inside of it (`.module`)"
_BEFORE = "Its parameters are shards that only its own forward puts together: use `fully_shard` instead"
_ASIDE = "Call that submodule itself, and keep no wrapper of it"
_UNREPLICATED = "Pass a module that `replicate` has not worked on"

_WRAPPERS = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "FullyShardedDataParallel", _BEFORE),
    ("torch.nn.parallel", "DistributedDataParallel", "DistributedDataParallel", _UNWRAP),
    ("torch.nn.parallel", "DataParallel", "DataParallel", _UNWRAP),
    ("torch.distributed._composable.replicate", "DDP", "replicate", _UNREPLICATED),
)
"""Where a class is, what it is called, by what name its users know it, and what they can do."""


def check_unwrapped(module: nn.Module) -> None:
    """Refuse a module that is, or holds, one wrapped for data parallelism, or one of TorchScript.

    A wrapper that is no submodule, but kept in a list or an attribute of another kind, counts as well if it
    is around one: called in the forward, it would seem to be the plain submodule.

    Raises:
        StructureError: names the submodule and what wrapped it.
    """
    kinds = tuple(_loaded())
    parts = {part: name for name, part in module.named_modules()}
    for part, name in parts.items():
        if isinstance(part, torch.jit.ScriptModule):
            raise StructureError(
                f"{type(module).__name__}: {_place(name)} was made by torch.jit.script or torch.jit.trace, "
                "and no other tensors can be put in the place of its own. Pass the module that it was made "
                "of, and compile the stage with funcstage.compile."
            )
        for kind, wrapper, way_out in kinds:
            if isinstance(part, kind):
                raise _wrapped(module, name, wrapper, way_out)
    for held in reached([module]):
        if not issubclass(type(held), nn.Module) or held in parts:  # a weak proxy says that it is a module
            continue
        for kind, wrapper, _ in kinds:
            name = parts.get(getattr(held, "module", None), "") if isinstance(held, kind) else ""
            if name:
                raise _wrapped(module, name, wrapper, _ASIDE)


def _wrapped(module: nn.Module, name: str, wrapper: str, way_out: str) -> StructureError:
    return StructureError(
        f"{type(module).__name__}: {_place(name)} is wrapped by {wrapper}, whose hooks never see "
        f"the gradients that a pullback returns. {way_out}, and average the gradients that W "
        "returns over the replicas (torch.distributed.all_reduce), or give a "
        "FunctionalPipelineStage `data_parallel=`, which does that once a step."
    )


def check_alone(module: nn.Module, asked: Mapping[str, object]) -> None:
    """Refuse what a pipeline stage was asked for, and `fully_shard` does itself in its module.

    Args:
        module: of the stage.
        asked: the stage's options, which must be None then.

    Raises:
        StructureError: names the submodule that `fully_shard` has worked on, the option, and FSDP's own.
    """
    for name in sharded_parts(module):
        for option, value in asked.items():
            if value is not None:
                raise StructureError(
                    f"{type(module).__name__}: {_place(name)} was given to fully_shard (or replicate), which "
                    f"already does what {option}= asks for. Leave that out, and give {_INSTEAD[option]}."
                )


_INSTEAD = {
    "data_parallel": "fully_shard a two-dimensional mesh, of replicas and shards",
    "param_dtype": "fully_shard mp_policy=MixedPrecisionPolicy(param_dtype=...)",
    "grad_dtype": "fully_shard mp_policy=MixedPrecisionPolicy(reduce_dtype=...); its gradients end up in the "
    "parameters' dtype",
}


def _place(name: str) -> str:
    return f"its submodule {name!r}" if name else "it"


def _loaded() -> Iterator[tuple[type, str, str]]:
    for where, name, wrapper, way_out in _WRAPPERS:
        kind = getattr(sys.modules.get(where), name, None)
        if isinstance(kind, type):
            yield kind, wrapper, way_out
