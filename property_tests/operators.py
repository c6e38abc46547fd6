"""Stages made of torch's own operators: calls of each on the sample inputs of torch's operator database.

The database is private torch API, tried with torch 2.11 and 2.13. It is imported here alone, and needs the
package `expecttest`; operators whose samples need SciPy are left out where it is not installed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from funcstage import trees
from funcstage.errors import StageError
from funcstage.testing import StageMismatch, check_stage
from funcstage.testing.reference import normal_like

# The import freezes torch.backends and points Inductor's cache elsewhere, for all tests of the process.
with patch.dict(os.environ), patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal import common_methods_invocations as database
# The database seeds random operators within the call, which no pure function does; `check_stage` seeds.
database.wrapper_set_seed = lambda function, *args, **kwargs: function(*args, **kwargs)

OPERATORS: dict[str, Any] = {op.formatted_name: op for op in database.op_db if op.supports_autograd}
"""The database's differentiable operators by name."""

ENGINES = ("closures", "aten")
ROLES = ("input", "parameter")
"""What the first tensor of a call is to the stage; the other tensors are the opposite."""

SEARCHED = 64
"""How many of an operator's samples are looked at, for each dtype, to choose from evenly."""


@dataclass(frozen=True)
class Known:
    """A case in which an engine does not do what eager does.

    Attributes:
        operator: the operator's name.
        engine: the engine's.
        message: a part of what is raised.
        reason: why.
    """

    operator: str
    engine: str
    message: str
    reason: str


_READS = "reads values of tensors, which a trace cannot express"
_SPARSE = "takes or makes sparse tensors"

KNOWN: tuple[Known, ...] = (
    *(
        Known(operator, "aten", "reads the value of a tensor", _READS)
        for operator in (
            "combinations",
            "corrcoef",
            "cov",
            "index_fill",
            "index_put",
            "istft",
            "linalg_lstsq",
            "linalg_lstsq_grad_oriented",
            "masked_select",
            "narrow",
            "nn_functional_ctc_loss",
            "nn_functional_gaussian_nll_loss",
            "repeat_interleave",
        )
    ),
    *(
        Known(operator, "aten", "reads the value of a tensor", "for complex matrices its formula " + _READS)
        for operator in ("linalg_svd", "pca_lowrank", "svd", "svd_lowrank")
    ),
    *(
        Known(operator, engine, "sparse_csr", _SPARSE)
        for operator in ("sparse_mm_reduce", "sparse_sampled_addmm")
        for engine in ENGINES
    ),
    Known("quantile", "aten", "aten.equal.default", "in torch 2.11 " + _READS),
    Known("to_sparse", "aten", "sparse_coo layout", _SPARSE),
    Known(
        "tensor_split",
        "closures",
        "Cannot access data pointer",
        "torch reads a tensor of indices by address, which no torch.func transform allows; a list works",
    ),
    Known("tensor_split", "aten", "data is not allocated", _READS),
    *(
        Known(
            f"polygamma_polygamma_n_{n}",
            "aten",
            "output has alias annotations",
            "torch does not functionalize it in place",
        )
        for n in range(5)
    ),
)
"""All that either engine does not do as eager does it."""


@dataclass(frozen=True)
class Case:
    """One call of an operator as a stage.

    Attributes:
        operator: its name.
        variant: ``"function"``, or ``"in place"`` on a copy of the first tensor.
        role: one of `ROLES`.
        call: the call on the differentiable tensors and the other ones; all else is fixed in it.
        tensors: the differentiable ones, the first one first.
        others: those that have no gradient in eager either, such as indices and running statistics.
        label: the sample's dtype and number.
    """

    operator: str
    variant: str
    role: str
    call: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    label: str

    def __str__(self) -> str:
        shapes = ", ".join(map(trees.look, self.tensors))
        return f"{self.operator} {self.variant}, sample {self.label}, first is {self.role}: {shapes}"

    @property
    def arguments(self) -> tuple[list[Tensor], list[Tensor]]:
        """The stage's inputs and its parameters."""
        first, rest = list(self.tensors[:1]), list(self.tensors[1:])
        return (first, rest) if self.role == "input" else (rest, first)

    def apply(self, params: list[Tensor], buffers: Any, *inputs: Tensor) -> tuple[Any, Any]:
        """The stage function."""
        tensors = (*inputs, *params) if self.role == "input" else (*params, *inputs)
        return self.call(tensors, buffers), buffers


def cases(name: str, samples: int) -> Iterator[Case]:
    """Make stages of an operator, in both roles.

    Args:
        name: a key of `OPERATORS`.
        samples: how many of its sample inputs to take for each dtype, evenly spread.

    Yields:
        The cases, in a fixed order and with fixed values.
    """
    op = OPERATORS[name]
    wide = [dtype for dtype in (torch.float64, torch.complex128) if op.supports_dtype(dtype, "cpu")]
    for dtype in wide or [torch.float32]:
        torch.manual_seed(0)
        random.seed(0)
        try:
            found = list(islice(op.sample_inputs("cpu", dtype, requires_grad=True), SEARCHED))
        except (ImportError, NotImplementedError, RuntimeError):
            continue  # it needs another device, or a package that is not installed
        step = max(1, -(-len(found) // samples))
        for number in range(0, len(found), step):
            sample = found[number]
            calls = [("function", op.op)]
            if op.inplace_variant is not None and not sample.broadcasts_input:
                calls.append(("in place", _on_a_copy(op.inplace_variant)))
            for variant, function in calls:
                call, tensors, others = closed(function, sample)
                label = f"{str(dtype).removeprefix('torch.')} {number}"
                for role in ROLES if tensors else ():
                    yield Case(name, variant, role, call, tensors, others, label)


def _on_a_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda first, *args, **kwargs: function(first.clone(), *args, **kwargs)


def closed(
    function: Callable[..., Any], sample: Any
) -> tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Fix everything in a call but its tensors: those that require grad, and the others."""
    given, spec = trees.flatten((sample.input, sample.args, sample.kwargs))
    is_tensor = [isinstance(leaf, Tensor) for leaf in given]
    differentiable = [i for i, leaf in enumerate(given) if is_tensor[i] and leaf.requires_grad]
    other = [i for i, leaf in enumerate(given) if is_tensor[i] and not leaf.requires_grad]

    def call(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
        leaves = list(given)
        for i, tensor in zip(differentiable, tensors, strict=True):
            leaves[i] = tensor
        for i, tensor in zip(other, others, strict=True):
            # Some operators write into statistics that they are given.
            leaves[i] = tensor.clone() if tensor.is_floating_point() else tensor
        first, args, kwargs = trees.unflatten(spec, leaves)
        return sample.output_process_fn_grad(function(first, *args, **kwargs))

    return call, tuple(given[i].detach() for i in differentiable), tuple(given[i] for i in other)


def eager(case: Case) -> list[Tensor | None]:
    """Run a case under plain autograd with a fixed random state: outputs, and gradients of its tensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves = [tensor.clone().requires_grad_() for tensor in case.tensors]
        outputs = [
            leaf for leaf in trees.flatten(case.call(leaves, case.others))[0] if isinstance(leaf, Tensor)
        ]
    generator = torch.Generator().manual_seed(0)
    pairs = [(leaf, normal_like(leaf, generator)) for leaf in outputs if leaf.requires_grad]
    if not pairs:
        return [leaf.detach() for leaf in outputs]
    seeds, cotangents = zip(*pairs, strict=True)
    return [leaf.detach() for leaf in outputs] + list(
        torch.autograd.grad(seeds, leaves, cotangents, allow_unused=True)
    )


def not_comparable(case: Case) -> str | None:
    """Say why eager autograd gives no result to compare with, if it does not."""
    try:
        first, second = eager(case), eager(case)
    except Exception as error:
        return f"eager raises {type(error).__name__}"
    if all(_same(a, b) for a, b in zip(first, second, strict=True)):
        return None
    return "eager's results differ from run to run"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def outcome(case: Case, engine: str) -> str | None:
    """Compare a case with eager: `None` where all is equal, else what was raised."""
    inputs, params = case.arguments
    try:
        # FLOPs are those of kernels, which generated stages are about.
        check_stage(
            case.apply, *inputs, params=params, buffers=list(case.others), engines=engine, flops=False
        )
    except StageMismatch as error:
        return f"mismatch: {error}"
    except StageError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def known(case: Case, engine: str, message: str) -> Known | None:
    """Find the exception that a failure is an instance of."""
    for entry in KNOWN:
        if (entry.operator, entry.engine) == (case.operator, engine) and entry.message in message:
            return entry
    return None
