"""Operators as the dispatcher knows them, the modes that see them, and a few without a public name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._C import DisableTorchFunction as without_torch_function
from torch._library.utils import fill_defaults
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "arguments_of",
    "cdist",
    "copy_into_all",
    "divide_all",
    "given_to",
    "make_dual",
    "meshgrid",
    "namespace_of",
    "pack_padded_sequence",
    "packet_of",
    "pad_packed_sequence",
    "returns_of",
    "scaled_dot_product_attention",
    "suggest_memory_format",
    "with_autocast_kernel",
    "without_torch_function",
    "writes",
]

scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention
cdist = torch._VF.cdist  # type: ignore[attr-defined]
meshgrid = torch._VF.meshgrid  # type: ignore[attr-defined]
make_dual = torch._VF._make_dual
pack_padded_sequence = torch._pack_padded_sequence
pad_packed_sequence = torch._pad_packed_sequence
copy_into_all: Callable[..., None] = torch._foreach_copy_
divide_all: Callable[..., None] = torch._foreach_div_


def arguments_of(operator: Any) -> Sequence[Any]:
    """The arguments in an operator's schema."""
    return operator._schema.arguments


def returns_of(operator: Any) -> Sequence[Any]:
    """The results in an operator's schema."""
    return operator._schema.returns


def writes(operator: Any) -> bool:
    """Tell whether an operator writes into one of its arguments."""
    return bool(operator._schema.is_mutable)


def given_to(operator: Any, args: Sequence[Any], keywords: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of an operator with the defaults of its schema filled in."""
    return fill_defaults(operator._schema, args, keywords)


def packet_of(overload: Any) -> Any:
    """What an overload is one of."""
    return overload._overloadpacket


def namespace_of(operator: Any) -> str:
    """The library that an operator belongs to."""
    name: str = operator._qualified_op_name if isinstance(operator, OpOverloadPacket) else operator.namespace
    return name.partition("::")[0]


def with_autocast_kernel(overload: Any, key: str) -> Callable[..., Any]:
    """An operator, begun at the kernel of a dispatch key."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return partial(overload.redispatch, keys)
