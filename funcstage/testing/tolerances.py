"""How far two gradients of the same stage may lie apart, stated once.

The split runs eager's kernels on eager's operands, so results are bitwise equal wherever a gradient is a
single term, and the reports count how many are. Where a tensor is used several times, its gradient is a
sum whose terms may be added in another order (I and W each see a part of them), and every addition may
round by half a unit in the last place of the largest term. A tolerance is therefore a small multiple of
the machine epsilon, relative to the largest magnitude in the leaf: cancellation makes single elements
small, but not the terms that they are sums of. What counts is the coarsest dtype that a value passed
through, not the dtype that it ends in: under autocast a float32 weight receives a sum of bfloat16 terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from funcstage._torch.operators import TorchDispatchMode, returns_of
from funcstage._torch.pytree import tree_map
from funcstage._torch.tape import dtypes_into
from funcstage.residuals import nodes_behind
from funcstage.trees import describe, is_differentiable

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-11,
    torch.complex128: 1e-11,
    torch.float32: 2e-5,
    torch.complex64: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
"""Largest accepted error, relative to the largest magnitude in the leaf."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One compared leaf.

    Attributes:
        leaf: its name, such as ``gradient of params['0.weight']``.
        absolute: the largest absolute error; infinite where NaN or infinity lie in other places.
        relative: the same relative to the largest magnitude of the expected leaf.
        tolerance: the largest relative error accepted; 0 for what must be equal.
        complaint: what is wrong other than values (structure, shape, `None`), if anything.
        readers: the operations of the stage that read the leaf, noted where it is not accepted.
        reproduced: whether eager gives the same twice, as far as that was tried.
    """

    leaf: str
    absolute: float = 0.0
    relative: float = 0.0
    tolerance: float = 0.0
    complaint: str = ""
    readers: tuple[str, ...] = ()
    reproduced: bool = True

    @property
    def accepted(self) -> bool:
        """Whether the leaf is equal within its tolerance."""
        return not self.complaint and self.relative <= self.tolerance

    def __str__(self) -> str:
        readers = f"; read by {', '.join(self.readers)}" if self.readers else ""
        if not self.reproduced:
            readers += "; eager itself gives another value in each run"
        if self.complaint:
            return f"{self.leaf}: {self.complaint}{readers}"
        return (
            f"{self.leaf}: max abs error {self.absolute:.3g}, max rel error {self.relative:.3g} "
            f"(tolerance {self.tolerance:.3g}){readers}"
        )

    def widened(self, by: float) -> Difference:
        """Return it with a tolerance that is larger by an absolute error."""
        if self.complaint or self.absolute == 0 or by == 0:
            return self
        # Relative to the same magnitude as the error is, which is nothing where eager's leaf is zero.
        magnitude = self.absolute / self.relative
        more = by / magnitude if magnitude else math.inf if self.absolute <= by else 0.0
        return replace(self, tolerance=self.tolerance + more)


def compare(name: str, got: object, expected: object, tolerance: float) -> Difference:
    """Compare a leaf with eager's: shape, dtype, device, whether it is `None`, and values.

    Args:
        name: the leaf's name in messages.
        got: ours.
        expected: eager's. What is not a tensor is compared with ``==``, or by its contents where it has none;
            tensors on the meta device are equal where their shapes and dtypes are.
        tolerance: relative to the largest magnitude of `expected`.
    """
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        same = _says_the_same(got, expected, set())
        return Difference(name, complaint="" if same else f"expected {_show(expected)}, got {_show(got)}")
    if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
        return Difference(name, complaint=f"expected {describe(expected)}, got {describe(got)}")
    if got.layout is not torch.strided or expected.layout is not torch.strided:
        got, expected = got.to_dense(), expected.to_dense()
    if got.dtype is torch.complex32:  # which torch does not compare
        got, expected = got.to(torch.complex64), expected.to(torch.complex64)
    if got.is_meta or torch.equal(got, expected):  # on the meta device there are no values
        return Difference(name, tolerance=tolerance)
    if not (got.is_floating_point() or got.is_complex()):
        return Difference(name, complaint=f"{int((got != expected).sum())} of {got.numel()} elements differ")
    wide = torch.complex128 if got.is_complex() else torch.float64
    got, expected = got.detach().to(wide), expected.detach().to(wide)
    finite = expected.isfinite()
    errors = (got - expected).abs()
    same_where_not_finite = (got == expected) | (got.isnan() & expected.isnan())
    errors = torch.where(finite, errors, torch.where(same_where_not_finite, 0.0, torch.inf))
    absolute = float(errors.nan_to_num(nan=torch.inf).max()) if errors.numel() else 0.0
    magnitudes = expected.abs()[finite]
    magnitude = float(magnitudes.max()) if magnitudes.numel() else 0.0
    relative = 0.0 if absolute == 0 else absolute / magnitude if magnitude else float("inf")
    return Difference(name, absolute, relative, tolerance)


def _says_the_same(got: Any, expected: Any, seen: set[int]) -> bool:
    """Compare what two runs have made anew; objects without an ``==`` of their own by what they hold."""
    if got is expected or id(got) in seen:
        return True
    seen.add(id(got))
    if type(got) is not type(expected):
        return False
    if isinstance(got, Tensor):
        return torch.equal(got, expected)
    if isinstance(got, dict):
        return [*got] == [*expected] and all(_says_the_same(got[key], expected[key], seen) for key in got)
    if isinstance(got, (list, tuple)):
        pairs = zip(got, expected, strict=False)
        return len(got) == len(expected) and all(_says_the_same(*pair, seen) for pair in pairs)
    if type(got).__eq__ is object.__eq__:
        return _says_the_same(_held_by(got), _held_by(expected), seen)
    if getattr(got, "shape", None) != getattr(expected, "shape", None):
        return False
    same = got == expected
    return bool(same.all() if hasattr(same, "all") else same)  # of an array, all elements


def _held_by(value: object) -> dict[str, Any]:
    """The attributes of an object."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    inside = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**inside, **getattr(value, "__dict__", {})}


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    """Return the tolerance of the coarsest of some dtypes; dtypes without one do not count."""
    return max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def dtypes_on_tape(outputs: Sequence[Tensor]) -> set[torch.dtype]:
    """Collect the dtypes of all values that an eager tape differentiates, casts inside it included."""
    dtypes = {output.dtype for output in outputs}
    for node in nodes_on_tape(outputs):
        dtypes.update(dtypes_into(node))
    return dtypes


def nodes_on_tape(outputs: Iterable[Tensor]) -> set[Node]:
    """Collect the nodes of an eager tape."""
    return set(nodes_behind(get_gradient_edge(output) for output in outputs if output.grad_fn is not None))


class Rounding(TorchDispatchMode):
    """While it is entered, moves every result of an operation by up to a unit in its last place, at random.

    How far results move is how far rounding may take them: Monte Carlo arithmetic (Parker 1997, "Monte Carlo
    arithmetic: exploiting randomness in floating-point arithmetic").

    Args:
        seed: of the moves.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, leaf: Any) -> Any:
        """Return a rounded copy of a floating or complex tensor, and everything else as it is."""
        return self._moved(leaf) if is_differentiable(leaf) and leaf.dtype in TOLERANCES else leaf

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        # What is a view, or was written in place, has neighbours that must see the same values.
        if any(value.alias_info is not None for value in returns_of(function)):
            return results
        return tree_map(self, results)

    def _moved(self, leaf: Tensor) -> Tensor:
        moves = 2 * torch.rand(leaf.shape, dtype=torch.float64, generator=self.generator) - 1
        factors = (1 + torch.finfo(leaf.dtype).eps * moves).to(leaf.device)
        wide = torch.complex128 if leaf.is_complex() else torch.float64
        return (leaf.to(wide) * factors).to(leaf.dtype)


def _show(value: object) -> str:
    return describe(value) if value is None or isinstance(value, Tensor) else repr(value)
