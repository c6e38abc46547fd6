"""What the constructor of a pipeline stage refuses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from funcstage._torch.pipelining import (
    OptimizedModule,
)
from funcstage.errors import LeafError, StageError, StructureError
from funcstage.pipelining.examples import LossFunction, requires_grad
from funcstage.trees import describe
from funcstage.wrappers import check_unwrapped


def check_group(group: dist.ProcessGroup | None) -> None:
    if group is None and not dist.is_initialized():
        raise StageError(
            "A pipeline stage needs a process group: call torch.distributed.init_process_group() first, in "
            "each of the processes that torchrun starts, or pass group=. In one process without a group, "
            "funcstage.pipelining.pipeline_value_and_grad runs all stages."
        )


def check_position(stage_index: int, num_stages: int) -> None:
    if not 0 <= stage_index < num_stages:
        raise LeafError(
            f"stage_index must be one of the {num_stages} stages, 0 to {num_stages - 1}; got {stage_index}."
        )


def check_module(module: nn.Module, device: torch.device) -> None:
    if not isinstance(module, nn.Module):
        raise StructureError(
            f"submodule must be an nn.Module, got {describe(module)}. Put a function into the forward of one."
        )
    for part in module.modules():
        if isinstance(part, OptimizedModule):
            raise StructureError(
                "submodule was given to torch.compile, whose backward cannot be split. Pass the module that "
                "it was made from, and compile=True."
            )
    check_unwrapped(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # Modules on the meta device get their memory later.
        same = tensor.device.type == device.type and device.index in (None, tensor.device.index)
        if not same and not tensor.is_meta:
            raise LeafError(
                f"{type(module).__name__}: {name!r} is {describe(tensor)}, but the stage's device is "
                f"{device}. Move it: module.to({str(device)!r})."
            )


def check_param_dtype(dtype: object) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LeafError(f"param_dtype must be a floating dtype, such as torch.bfloat16; got {dtype!r}.")


def check_loss(loss_fn: LossFunction | None) -> None:
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise StructureError(
            f"loss_fn must be a function of output and target, got {describe(loss_fn)}. Pass one that "
            "returns a scalar, such as torch.nn.functional.mse_loss."
        )
    if isinstance(loss_fn, nn.Module) and any(map(requires_grad, loss_fn.parameters())):
        raise StructureError(
            f"loss_fn has parameters to train ({type(loss_fn).__name__}). Make it a part of the last stage's "
            "module, or give it to the schedule only."
        )
