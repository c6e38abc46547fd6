"""What is refused before anything runs or is consumed: stage functions, argnums, accumulators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import optree
import torch
from torch import Tensor, nn

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage.dtensors import mesh_of
from funcstage.errors import LeafError, StructureError
from funcstage.functional import FunctionalStage
from funcstage.registration import holds_tensor, way_out
from funcstage.trees import describe

if TYPE_CHECKING:
    from funcstage.weight_pullback import WeightPullback


Function = TypeVar("Function", bound=Callable[..., Any])


class Meta(NamedTuple):
    """What a cotangent must match; nothing where the leaf cannot have one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    mesh: Any = None
    """That of a DTensor."""

    @classmethod
    def of(cls, leaf: object) -> Meta | None:
        if not isinstance(leaf, Tensor) or not trees.is_differentiable(leaf):
            return None
        return cls(leaf.shape, leaf.dtype, leaf.device, leaf.layout, mesh_of(leaf))

    def __str__(self) -> str:
        what = trees.look_and_place(self)
        return what if self.mesh is None else f"a DTensor, {what} over {self.mesh}"


def ones_like(meta: Meta) -> Tensor:
    """The cotangent of an output that is a single number."""
    if meta.mesh is not None:
        from funcstage._torch.dtensor import one

        return one(meta.shape, meta.dtype, meta.device, meta.mesh)
    return torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)


UNKNOWN = "It may be in `accumulate` in part: start again from zeros."


def what_was_added(i: int, start: list[int], before: list[int], after: list[int]) -> str:
    """What a sum that failed at weight pullback `i` has left in the accumulators."""
    if after == start:
        lost = ", and what those before it gave is lost: compute their forwards again" if i else ""
        return f"Nothing was added into `accumulate`{lost}."
    own = "this one is not" if after == before else "this one is there in part, so start again from zeros"
    return f"`accumulate` has those before it; {own}. What was to be added to its None leaves is lost."


def checked_accumulators(pullback: WeightPullback, accumulate: Any) -> list[Tensor | None]:
    if accumulate is None:
        return [None] * pullback._params_spec.num_leaves
    leaves, spec = trees.flatten(accumulate)
    if spec != pullback._params_spec:
        raise StructureError(
            f"accumulate must have the structure of the parameters of {pullback.stage}, "
            f"{trees.mismatch(pullback._params_spec, spec)}. Use None at leaves that hold nothing yet."
        )

    def name(i: int) -> str:
        return trees.leaf_names(spec, "accumulate")[i]

    starts: dict[Any, int] = {}
    for i, (leaf, meta) in enumerate(zip(leaves, pullback._metas(), strict=True)):
        if leaf is None:
            continue
        if meta is None:
            raise LeafError(
                f"{name(i)} must be None, as that parameter has no gradient; got {describe(leaf)}."
            )
        if (
            not trees.is_gradient(leaf)
            or leaf.shape != meta.shape
            or leaf.device != meta.device
            or mesh_of(leaf) != meta.mesh
            or not torch.can_cast(meta.dtype, leaf.dtype)
            or (leaf.dtype.itemsize == 1 and leaf.dtype != meta.dtype)
        ):
            raise LeafError(
                f"{name(i)} must be a tensor that takes a gradient of {meta}; got {describe(leaf)}. Pass "
                "zeros like the parameter, or None."
            )
        if leaf.is_inference() and not torch.is_inference_mode_enabled():
            raise LeafError(
                f"{name(i)} ({describe(leaf)}) was made in inference mode, and torch cannot add into it "
                "outside of that. Pass tensor.clone()."
            )
        if leaf.layout is torch.strided and trees.overlaps_itself(leaf):
            raise LeafError(
                f"{name(i)} ({describe(leaf)}) has elements that share memory, as an expanded tensor or a "
                "sliding window does, so nothing can be added into it. Pass accumulate leaves with memory "
                "of their own: tensor.contiguous()."
            )
        if leaf.layout is torch.strided and leaf.numel():
            start = ft.storage_key(leaf), leaf.storage_offset()
            if starts.setdefault(start, i) != i:
                raise LeafError(
                    f"{name(i)} lies in the memory of {name(starts[start])}, so their sums would mix. Pass "
                    "accumulate leaves with memory of their own: tensor.clone()."
                )
    return leaves


def checked_parts(parts: object) -> int:
    """In how many pieces W is to be split."""
    if not isinstance(parts, bool | Tensor):
        with suppress(TypeError):
            count = operator.index(parts)  # type: ignore[arg-type]  # what it raises is meant
            if count > 0:
                return count
    got = repr(parts) if isinstance(parts, bool | int | float | str) else describe(parts)
    raise StructureError(
        f"split takes the number of pieces, a whole number of 1 or more; got {got}. Pass 1 for W as a whole."
    )


def asking_for_stage_functions(function: Function) -> Function:
    """Say what a module is to be made into, before Python says that arguments are missing."""

    @wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if 0 < len(args) < 3:  # the stage function, its parameters and its buffers
            check_callable(args[0])
        return function(*args, **kwargs)

    return ask  # type: ignore[return-value]  # with the same parameters


def check_callable(apply: object) -> None:
    if isinstance(apply, nn.Module):
        raise StructureError(
            f"stage_vjp expects a stage function, got the module {type(apply).__name__}: take "
            "apply, params, buffers = funcstage.functionalize(module) first."
        )
    if isinstance(apply, FunctionalStage):
        raise StructureError(
            "stage_vjp expects a stage function, got a whole FunctionalStage: unpack it into "
            "apply, params, buffers."
        )
    if not callable(apply):
        raise StructureError(
            f"stage_vjp expects a stage function, got {describe(apply)}. Pass apply(params, buffers, *args) "
            "-> (output, new_buffers), which functionalize makes of a module."
        )


def differentiated_leaves(args: tuple[Any, ...], argnums: int | Sequence[int] | None) -> list[int]:
    """Return the indices, among all leaves of `args`, of those that `argnums` differentiates."""
    return every_differentiable(*trees.flatten(args)) if argnums is None else chosen(args, argnums)


def every_differentiable(leaves: Sequence[Any], spec: optree.PyTreeSpec) -> list[int]:
    for i, leaf in enumerate(leaves):
        if type(leaf) is not Tensor and holds_tensor(leaf, trees.is_differentiable):
            raise StructureError(
                f"{trees.leaf_names(spec, 'args')[i]} is a {type(leaf).__qualname__}, which is no pytree, "
                f"so tensors in it would not be differentiated. {way_out(leaf)}, or use argnums to say which "
                "arguments are."
            )
    return [i for i, leaf in enumerate(leaves) if trees.is_differentiable(leaf)]


def chosen(args: tuple[Any, ...], argnums: int | Sequence[int]) -> list[int]:
    chosen = _checked_argnums(argnums, len(args))
    diff: list[int] = []
    offset = 0
    for position, arg in enumerate(args):
        leaves = trees.flatten(arg)[0]
        if position in chosen:
            found = [offset + i for i, leaf in enumerate(leaves) if trees.is_differentiable(leaf)]
            if not found:
                what = (
                    describe(arg) if len(leaves) == 1 else f"a {type(arg).__name__} of {len(leaves)} leaves"
                )
                raise StructureError(
                    f"argnums names positional argument {position}, which has no floating or complex tensor "
                    f"to differentiate: it is {what}. Leave it out of argnums."
                )
            diff += found
        offset += len(leaves)
    return diff


def _checked_argnums(argnums: int | Sequence[int], n_args: int) -> set[int]:
    several = isinstance(argnums, Iterable) and not isinstance(argnums, Tensor)
    numbers: Iterable[Any] = argnums if several else (argnums,)  # type: ignore[assignment]
    chosen: set[int] = set()
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            raise StructureError(
                f"argnums must be an int or several, got {number!r} ({describe(number)}). Pass the positions "
                "of the arguments to differentiate, such as (0, 2); () for none."
            )
        if not -n_args <= number < n_args:
            raise StructureError(
                f"argnums names positional argument {number}, but the stage was given {n_args} positional "
                "argument(s). Keyword arguments are never differentiated: pass it by position."
            )
        chosen.add(number % n_args)
    return chosen
