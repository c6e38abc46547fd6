"""Operators as the dispatcher knows them, the modes that see them, and a few without a public name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction as without_torch_function
from torch._library.utils import fill_defaults
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "NO_WRITES",
    "SOBOL_ENGINE_WRITES",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "Written",
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
    "sobol_engine_draw",
    "suggest_memory_format",
    "with_autocast_kernel",
    "without_torch_function",
    "writes",
    "written_by",
]

scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention
cdist = torch._VF.cdist  # type: ignore[attr-defined]
meshgrid = torch._VF.meshgrid  # type: ignore[attr-defined]
make_dual = torch._VF._make_dual
pack_padded_sequence = torch._pack_padded_sequence
pad_packed_sequence = torch._pad_packed_sequence
sobol_engine_draw = torch._sobol_engine_draw
SOBOL_ENGINE_WRITES: tuple[Callable[..., Tensor], ...] = (
    torch._sobol_engine_initialize_state_,
    torch._sobol_engine_scramble_,
    torch._sobol_engine_ff_,
)
"""What a `torch.quasirandom.SobolEngine` writes into its state by."""
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


class Written(NamedTuple):
    """Which operands a function writes into.

    Attributes:
        positions: those given by position.
        keywords: those given by name, `out` among them.
    """

    positions: tuple[int, ...] = ()
    keywords: frozenset[str] = frozenset()

    def among(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors among the operands of a call that it writes into, those in lists and tuples too."""
        found = []
        given = [args[i] for i in self.positions if i < len(args)]
        for operand in (*given, *(kwargs[name] for name in kwargs if name in self.keywords)):
            among = operand if isinstance(operand, (list, tuple)) else (operand,)
            found += [tensor for tensor in among if isinstance(tensor, Tensor)]
        return found


NO_WRITES = Written()


def written_by(function: Any) -> Written:
    """Tell which operands a function, method or operator writes into, by the schemas of its overloads.

    Most Python functions have none: they run as the operations that they consist of.
    """
    if isinstance(function, OpOverload):
        schemas: Iterable[Any] = [function._schema]
    elif isinstance(function, OpOverloadPacket):
        schemas = [getattr(function, name)._schema for name in function.overloads()]
    elif function in _CHANGED_BY_NO_VALUE:
        return NO_WRITES
    elif function in _WITHOUT_SCHEMA:
        return Written((0,), frozenset(("self", "tensor")))
    elif isinstance(function, (BuiltinFunctionType, MethodDescriptorType)):
        schemas = _schemas_of_binding(function.__name__)
    else:
        return NO_WRITES
    positions, keywords = set[int](), set[str]()
    for schema in schemas:
        written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        keywords |= {argument.name for _, argument in written}
        if any(argument.kwarg_only for _, argument in written):
            keywords.add("out")  # as Python calls the results of such an overload, however many
        else:
            positions |= {i for i, _ in written}
    if 0 in positions:
        keywords.add("input")  # as functions call what methods call self
    return Written(tuple(sorted(positions)), frozenset(keywords))


def _schemas_of_binding(name: str) -> Iterable[Any]:
    """Schemas of what a function in C++ is bound to, without those of TorchScript alone, which take lists."""
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        full_name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        if torch._C._dispatch_has_kernel(full_name):
            yield schema


_CHANGED_BY_NO_VALUE = {Tensor.requires_grad_, Tensor.retain_grad, Tensor.record_stream}
"""What their schemas call a write is into what is noted of a tensor, and none into its values."""

_WITHOUT_SCHEMA: set[Any] = {
    *(getattr(Tensor, f"__{name}__") for name in ("iadd", "isub", "imul", "idiv", "ifloordiv", "imod")),
    *(Tensor.__setitem__, Tensor.apply_, Tensor.map_, Tensor.map2_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
}
"""Functions that write into their first operand: bound by hand, or in Python and asked about as a whole."""
