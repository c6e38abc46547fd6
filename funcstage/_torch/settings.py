"""Torch's global settings: those that a stage, its trace or its lowering may read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from functools import partial
from operator import call
from typing import Any

import torch
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.overrides import _len_torch_function_stack

is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled


def default_device() -> torch.device | None:
    """The default device where one was set, as `torch.get_default_device` says, which is slow."""
    return torch.get_default_device() if _len_torch_function_stack() else None


def any_hook_of_all_modules() -> bool:
    """Tell whether hooks run with every module."""
    forward = _global_forward_hooks or _global_forward_pre_hooks
    return bool(forward or _global_backward_hooks or _global_backward_pre_hooks)


def global_flags() -> tuple[Hashable, ...]:
    """The settings; equal ones let a stage do the same."""
    return (
        *map(call, _FLAGS),
        *_global_forward_hooks,
        *_global_forward_pre_hooks,
        *_global_backward_hooks,
        *_global_backward_pre_hooks,
        *torch._C._get_sdp_priority_order(),
    )


_EINSUM: Any = torch.backends.opt_einsum


def _loss_is_parallel() -> bool:
    """Whether a `loss_parallel()` is open, by which DTensors compute cross entropies otherwise."""
    module = sys.modules.get("torch.distributed.tensor.parallel.loss")
    return module is not None and _LOG_SOFTMAX in module.DTensor._op_dispatcher._custom_op_handlers


_LOG_SOFTMAX = torch.ops.aten._log_softmax.default
_FLAGS: tuple[Callable[[], Hashable], ...] = (
    torch.get_default_dtype,
    _loss_is_parallel,
    torch.is_inference_mode_enabled,
    *[
        partial(torch._C._get_fp32_precision_getter, of, part)
        for of in ("cuda", "mkldnn")
        for part in ("all", "matmul", "conv", "rnn")
    ],
    torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
    torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
    torch._C._get_cublas_allow_fp16_accumulation,
    torch._C._get_math_sdp_allow_fp16_bf16_reduction,
    torch._C._get_deterministic_algorithms,
    torch._C._get_deterministic_algorithms_warn_only,
    torch._C._get_deterministic_fill_uninitialized_memory,
    torch.is_anomaly_enabled,
    torch.is_anomaly_check_nan_enabled,
    torch.get_num_threads,
    torch.backends.mha.get_fastpath_enabled,
    *[  # an attribute that is found behind a `__getattr__` takes a microsecond
        partial(vars(place).get, name) for place in (_EINSUM, _EINSUM.m) for name in ("enabled", "strategy")
    ],
    torch._C._get_cudnn_enabled,
    torch._C._get_cudnn_benchmark,
    torch._C._get_cudnn_deterministic,
    torch._C._get_mkldnn_enabled,
    torch._C._get_mkldnn_deterministic,
    torch._C._get_flash_sdp_enabled,
    torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled,
    torch._C._get_cudnn_sdp_enabled,
    torch._C._get_overrideable_sdp_enabled,
)
