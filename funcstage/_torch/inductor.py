"""The parts of TorchInductor that lower a graph without Dynamo."""

from __future__ import annotations

from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.ir import ConcatKernel, TensorBox
from torch._inductor.lowering import lowerings, make_fallback, register_lowering
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V

__all__ = [
    "BoxedBool",
    "ConcatKernel",
    "TensorBox",
    "TracingContext",
    "V",
    "compile_fx_inner",
    "config",
    "detect_fake_mode",
    "lowerings",
    "make_fallback",
    "register_lowering",
    "select_decomp_table",
    "tracing",
]
