"""Pytrees: the one way in which funcstage flattens, compares and names the leaves of structures.

Everything goes through optree with `None` as a leaf (an absent cotangent has a place of its own) and
with the namespace "funcstage", which also sees whatever users registered globally. Types that optree does
not know are registered there when `flatten` first meets them (`registration`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Never, TypeAlias

import optree
import torch
from torch.nn.parameter import is_lazy
from typing_extensions import TypeVar

from funcstage.registration import ALWAYS_LEAVES, LEAVES, NAMESPACE, has_new, has_new_nodes

PyTree: TypeAlias = Any
Params: TypeAlias = Any
Buffers: TypeAlias = Any
Tensors: TypeAlias = dict[str, torch.Tensor]
"""Parameters or buffers of a module, by qualified name."""

AnyParams = TypeVar("AnyParams", default=Any)
AnyBuffers = TypeVar("AnyBuffers", default=Any)
NoBuffers: TypeAlias = dict[Never, Never]
"""`{}`, which would be of no other type to a type checker, though buffers of the stage's type are meant."""

Output = TypeVar("Output", default=Any)


def flatten(tree: PyTree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves of `tree` and its structure, `None` counting as a leaf."""
    known = _FLAT.get(tuple(tree)) if type(tree) is dict else None
    if known is not None:  # optree takes several times as long, as it sorts the keys
        leaves = [*map(tree.__getitem__, known.keys)]
        if ALWAYS_LEAVES.issuperset(map(type, leaves)) and _NAMES.issuperset(map(type, tree)):
            return leaves, known.spec
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    if not LEAVES.issuperset(map(type, leaves)) and has_new(leaves):
        return flatten(tree)
    if (spec.num_nodes > spec.num_leaves + 1 or spec.type not in _BUILTIN) and has_new_nodes(spec):
        return flatten(tree)
    is_new = known is None and type(tree) is dict and spec.num_leaves == len(tree) == spec.num_nodes - 1
    if is_new and _NAMES.issuperset(map(type, tree)):
        if len(_FLAT) >= _MANY:
            _FLAT.clear()
        _FLAT[tuple(tree)] = _Flat(spec.entries(), spec)
    return leaves, spec


def flatten_down_to(is_leaf: Callable[[Any], bool], tree: PyTree) -> tuple[list[Any], optree.PyTreeSpec]:
    """The same, but for nodes that are to count as leaves."""
    flatten(tree)  # for types that are new
    return optree.tree_flatten(tree, is_leaf=is_leaf, none_is_leaf=True, namespace=NAMESPACE)


class _Flat(NamedTuple):
    """What dicts of these keys, in their order, and of nothing but leaves are: parameters, as a rule.

    Attributes:
        keys: in the order of the leaves.
        spec: the structure.
    """

    keys: list[Any]
    spec: optree.PyTreeSpec


_FLAT: dict[tuple[Any, ...], _Flat] = {}
_MANY = 256
_NAMES = frozenset((str,))
_BUILTIN = frozenset((None, tuple, list, dict))


def unflatten(spec: optree.PyTreeSpec, leaves: Iterable[Any]) -> PyTree:
    """Rebuild a tree of structure `spec` from its leaves."""
    return optree.tree_unflatten(spec, leaves)


def map_leaves(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map `function` over the leaves of one or several trees of the same structure."""
    return optree.tree_map(function, tree, *rest, none_is_leaf=True, namespace=NAMESPACE)


def leaf_names(spec: optree.PyTreeSpec, root: str) -> list[str]:
    """Return one readable name a leaf, such as ``output['logits'][0]``."""
    return [accessor.codify(root) for accessor in spec.accessors()]


def is_differentiable(leaf: object) -> bool:
    """Tell whether a leaf is a tensor of a floating or complex dtype."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def is_gradient(leaf: object) -> bool:
    """Tell whether a leaf is a tensor that can be summed with other gradients."""
    return (
        isinstance(leaf, torch.Tensor)
        and not is_lazy(leaf)
        and not leaf.is_nested
        and leaf.layout in (torch.strided, torch.sparse_coo)
        and is_differentiable(leaf)
    )


def detached(leaf: Any) -> Any:
    """Return a tensor without its history, and anything else as it is."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def is_expanded(tensor: torch.Tensor) -> bool:
    """Tell whether several elements of a strided tensor share memory, so that nobody can write into it."""
    return any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Tell whether elements of a strided tensor may share memory, as those of a sliding window do."""
    reach = 0
    for stride, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (n - 1)
    return False


def mismatch(expected: optree.PyTreeSpec, got: optree.PyTreeSpec) -> str:
    """Return two structures for error messages: ``{'logits': *}; got [*, *], where each * is a leaf``."""

    def show(spec: optree.PyTreeSpec) -> str:
        if spec.is_leaf():
            return "a single leaf"
        text = str(spec).removeprefix("PyTreeSpec(")
        return text[: text.rindex(", NoneIsLeaf")]

    return f"{show(expected)}; got {show(got)}, where each * is a leaf"


def look(like: Any) -> str:
    """Return what a tensor, or anything with its dtype and shape, looks like: ``float32[2, 3]``."""
    return f"{str(like.dtype).removeprefix('torch.')}{list(like.shape)}"


def look_and_place(like: Any) -> str:
    """The same with its device, and with its layout where that is not the usual one."""
    layout = "" if like.layout is torch.strided else f", {str(like.layout).removeprefix('torch.')}"
    return f"{look(like)} on {like.device}{layout}"


def describe(leaf: object) -> str:
    """Return a short description of a leaf for error messages, such as ``float32[2, 3] on cpu``."""
    if isinstance(leaf, torch.Tensor):
        if is_lazy(leaf) or leaf.is_nested:  # which have no shape
            return f"a {'lazy' if is_lazy(leaf) else 'nested'} {type(leaf).__name__}"
        placed = getattr(leaf, "placements", None)  # of a DTensor
        kind = (
            "" if placed is None else f", a DTensor placed {placed} over {getattr(leaf, 'device_mesh', '')}"
        )
        return f"{look_and_place(leaf)}{kind}"
    return "None" if leaf is None else type(leaf).__name__
