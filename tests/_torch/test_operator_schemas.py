"""Which operands an operation writes into, as its schemas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

from funcstage._torch.operators import written_by

FUNCTIONS = [function for functions in get_overridable_functions().values() for function in functions]
aten = torch.ops.aten


def writes_by_name(function: Any) -> bool:
    """Torch's convention, which its schemas must bear out where they are asked."""
    name = function.__name__
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def test_every_function_in_c_named_as_one_that_writes_is_known_to_write_first_of_all_into_its_first() -> None:
    in_c = [function for function in FUNCTIONS if not hasattr(function, "__code__")]
    named = [function for function in in_c if writes_by_name(function)]
    assert len(named) > 150
    assert [function for function in named if written_by(function).positions[:1] != (0,)] == []


def test_no_other_is_known_to_write_into_its_first() -> None:
    wrong = [f.__name__ for f in FUNCTIONS if written_by(f).positions[:1] == (0,) and not writes_by_name(f)]
    in_place = {
        name for name in dir(Tensor) if name.startswith("__i") and name.removeprefix("__i") in _BINARY
    }
    assert {*wrong} <= in_place | {"__setitem__"}


_BINARY = {
    *("add__", "sub__", "mul__", "div__", "truediv__", "floordiv__", "mod__", "pow__"),
    *("and__", "or__", "xor__", "lshift__", "rshift__"),
}


@torch.library.custom_op("funcstage_tests::fill", mutates_args={"into"})
def fill(value: Tensor, into: Tensor) -> None:
    into.copy_(value)


X, Y, Z = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)
CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = [
    (Tensor.add_, (X, Y), {}, [X]),
    (Tensor.add_, (X,), {"other": Y}, [X]),
    (Tensor.__iadd__, (X, Y), {}, [X]),
    (Tensor.__ixor__, (X, Y), {}, [X]),
    (Tensor.__setitem__, (X, 0, Y), {}, [X]),
    (Tensor.apply_, (X, abs), {}, [X]),
    (torch.relu_, (X,), {}, [X]),
    (torch.relu_, (), {"input": X}, [X]),
    (torch._C._nn.elu_, (X,), {}, [X]),
    (nn.init.uniform_, (), {"tensor": X, "a": 0.0}, [X]),
    (torch.add, (X, Y), {}, []),
    (torch.add, (X, Y), {"out": Z}, [Z]),
    (torch.add, (X, Y), {"out": None}, []),
    (torch.max, (X, 0), {"out": (Y, Z)}, [Y, Z]),
    (torch._foreach_add_, ([X, Y], 1.0), {}, [X, Y]),
    (aten.add_.Tensor, (X, Y), {}, [X]),
    (aten.add_, (X, Y), {}, [X]),
    (aten.add.Tensor, (X, Y), {}, []),
    (aten.add.out, (X, Y), {"out": Z}, [Z]),
    (aten.max.dim_max, (X, 0), {"max": Y, "max_values": Z}, [Y, Z]),
    (torch.ops.funcstage_tests.fill.default, (X, Y), {}, [Y]),
    (torch.ops.funcstage_tests.fill, (X,), {"into": Y}, [Y]),
    (torch.sort, (X,), {}, []),  # which is in place on lists, in TorchScript
    (F.linear, (X, Y), {}, []),
    (Tensor.requires_grad_, (X,), {}, []),
    (Tensor.record_stream, (X, None), {}, []),
    (Tensor.__invert__, (X,), {}, []),
    (Tensor.data.__get__, (X,), {}, []),  # type: ignore[attr-defined]
]


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "written"),
    CASES,
    ids=[f"{case[0].__name__}-{i}" for i, case in enumerate(CASES)],
)
def test_what_is_written_into_is_found_among_the_operands(
    function: Any, args: Any, kwargs: Any, written: list[Tensor]
) -> None:
    found = written_by(function).among(args, kwargs)
    assert [*map(id, found)] == [*map(id, written)]
