"""Data parallelism beside the pipeline: the gradients of a stage are averaged over its replicas.

Once a step, when a stage has run its last W, its gradients start on their way around the replicas while
the rank's other stages go on computing; the last of these to finish waits for all of them. What is summed
are `.grad` tensors of the parameters, as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from funcstage._torch.operators import divide_all
from funcstage.errors import StructureError


@dataclass(slots=True)
class Average:
    """The gradients of a stage on their way around the replicas.

    Attributes:
        grads: the gradients, each becoming the sum over the replicas.
        works: the sums in progress.
        divisor: what to divide by when they are done.
    """

    grads: list[Tensor]
    works: list[dist.Work]
    divisor: int


class Replicas:
    """The replicas of the stages of this rank, and their gradients on the way.

    Args:
        group: the ranks that hold replicas of this rank's stages.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._running: weakref.WeakSet[Any] = weakref.WeakSet()
        self._averages: dict[Any, Average] = {}

    def replicate(self, tensors: Sequence[Tensor]) -> None:
        """Give all replicas the values of the first one."""
        source = dist.get_global_rank(self.group, 0)
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, source, group=self.group)

    def begin(self, stage: Any) -> None:
        """Say that a stage has work to do in this step."""
        self._running.add(stage)

    def drop(self, stage: Any) -> None:
        """Forget what an interrupted step left behind."""
        self._running.discard(stage)
        self._averages.pop(stage, None)

    def average(self, stage: Any, grads: Sequence[Tensor]) -> None:
        """Start to average the gradients of a stage, which has run its last W."""
        works = [dist.all_reduce(grad, group=self.group, async_op=True) for grad in grads]
        self._averages[stage] = Average(list(grads), works, dist.get_world_size(self.group))
        self._running.discard(stage)
        if not self._running:
            self._finish()

    def scale(self, stage: Any, divisor: int) -> bool:
        """Divide a stage's gradients once they have arrived; `False` if they are not on the way."""
        if stage not in self._averages:
            return False
        self._averages[stage].divisor *= divisor
        return True

    def _finish(self) -> None:
        for average in self._averages.values():
            for work in average.works:
                work.wait()
            if average.grads:
                divide_all(average.grads, average.divisor)
        self._averages.clear()


_OF_GROUP: weakref.WeakValueDictionary[dist.ProcessGroup, Replicas] = weakref.WeakValueDictionary()
"""Alive as long as stages are, which hold them."""


def replicas_of(group: dist.ProcessGroup | DeviceMesh) -> Replicas:
    """Return the replicas of a group; one object for all stages of this rank.

    Raises:
        StructureError: if it is no process group and no mesh of one dimension.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise StructureError(
                f"data_parallel must be a mesh of one dimension, got one of {group.ndim}. Take the dimension "
                'of the replicas: mesh["data"].'
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise StructureError(
            f"data_parallel must be a process group or a device mesh, got {type(group).__name__}."
        )
    return _OF_GROUP.setdefault(group, Replicas(group))
