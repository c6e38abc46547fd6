"""Modules that reduce or shard gradients themselves, which a functional stage would compute past: refused.

Their classes are looked up among the modules that are loaded: to import them takes seconds, and what is not
loaded has no instances.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from funcstage.errors import StructureError
from funcstage.gathered import sharded_parts

_UNWRAP = "Pass the module inside of it (`.module`)"
_BEFORE = "Its parameters are shards that only its own forward puts together: use `fully_shard` instead"
_UNREPLICATED = "Pass a module that `replicate` has not worked on"

_WRAPPERS = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "FullyShardedDataParallel", _BEFORE),
    ("torch.nn.parallel", "DistributedDataParallel", "DistributedDataParallel", _UNWRAP),
    ("torch.nn.parallel", "DataParallel", "DataParallel", _UNWRAP),
    ("torch.distributed._composable.replicate", "DDP", "replicate", _UNREPLICATED),
)
"""Where a class is, what it is called, by what name its users know it, and what they can do."""


def check_unwrapped(module: nn.Module) -> None:
    """Refuse a module that is, or holds, one wrapped for data parallelism.

    Raises:
        StructureError: names the submodule and what wrapped it.
    """
    kinds = tuple(_loaded())
    for name, part in module.named_modules():
        for kind, wrapper, way_out in kinds:
            if isinstance(part, kind):
                raise StructureError(
                    f"{type(module).__name__}: {_place(name)} is wrapped by {wrapper}, whose hooks would not "
                    f"see gradients that are no work of autograd. {way_out}, and average the gradients that "
                    "W returns over the replicas (torch.distributed.all_reduce), or give a "
                    "FunctionalPipelineStage `data_parallel=`, which does that once a step."
                )


def check_unsharded(module: nn.Module) -> None:
    """Refuse a module that, or a part of which, `fully_shard` has worked on, in a pipeline stage.

    Raises:
        StructureError: names the submodule.
    """
    for name in sharded_parts(module):
        raise StructureError(
            f"{type(module).__name__}: {_place(name)} was given to fully_shard, which a schedule gathers and "
            "reduces in the midst of a step; a FunctionalPipelineStage does not take part in that. Pass "
            "the module as it was before, and average over replicas with data_parallel=, or split it "
            "without a schedule: functionalize takes it."
        )


def _place(name: str) -> str:
    return f"its submodule {name!r}" if name else "it"


def _loaded() -> Iterator[tuple[type, str, str]]:
    for where, name, wrapper, way_out in _WRAPPERS:
        kind = getattr(sys.modules.get(where), name, None)
        if isinstance(kind, type):
            yield kind, wrapper, way_out
