"""Derived parameters: what is computed from the parameters alone runs once a step, not once a microbatch.

A cast to bfloat16, a weight norm, a LoRA merge: `derive` runs it before the first microbatch, all
microbatches compute with the result, and after the last W the pullback carries their summed gradients to the
parameters. It is a stage without inputs, and split as one: all of its backward is W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcstage import trees
from funcstage.checks import Meta
from funcstage.copies import CopiedByLeaves
from funcstage.errors import LeafError, StructureError
from funcstage.pullback import Pullback, stage_vjp
from funcstage.trees import AnyParams, Output, Params, PyTree, describe


class DerivedPullback(CopiedByLeaves, Generic[AnyParams]):
    """From gradients of derived parameters to those of the parameters. Returned by `derive`.

    Linear like the pullbacks of a stage: it can be used once, unless `retain=True` is passed. As a
    pytree (namespace "funcstage") its leaves are its residuals.
    """

    __slots__ = ("_metas", "_passed", "_pullback", "_spec")

    def __init__(
        self,
        pullback: Pullback,
        spec: optree.PyTreeSpec,
        metas: Sequence[Meta | None],
        passed: Sequence[int | None],
    ) -> None:
        self._pullback = pullback
        self._spec = spec
        self._metas = metas  # of the derived parameters
        self._passed = passed  # which parameter a derived one is, if it is one as it came

    def __call__(self, derived_grads: PyTree, *, retain: bool = False) -> AnyParams:
        """Compute the gradients of the parameters.

        Args:
            derived_grads: gradients with the structure of the derived parameters, such as
                `stage_backward_weight` sums over microbatches; a `None` leaf is zero. They may be wider than
                the derived parameters (float32 sums for bfloat16): through casts, and where a parameter
                passed as it came, they go unrounded; elsewhere they are cast first, as autograd does.
            retain: keep the residuals for another call.

        Returns:
            A pytree with the structure of `params`; `None` for a parameter that no derived parameter with a
            gradient depends on, and at leaves that cannot have one. A parameter that passed as it came has
            the gradient that was given, not a copy.

        Raises:
            ConsumedError: on a second call, unless the first was made with `retain=True`.
            StructureError: if `derived_grads` has another structure than the derived parameters.
            LeafError: if a gradient cannot be that of its derived parameter.
        """
        grads = self._checked(derived_grads)
        through: list[Tensor | None] = [
            None
            if grad is None or place is not None or source is None
            else grad.to(source.device, source.dtype)
            for grad, place, source in zip(grads, self._passed, self._pullback._output_metas, strict=True)
        ]
        weight_pullback = self._pullback(through, retain=retain)[1]
        totals, spec = trees.flatten(weight_pullback())
        for grad, place in zip(grads, self._passed, strict=True):
            if grad is not None and place is not None:
                total = totals[place]
                totals[place] = grad if total is None else grad + total
        return trees.unflatten(spec, totals)

    @property
    def consumed(self) -> bool:
        """Whether it was used, so that a further call raises `ConsumedError`."""
        return self._pullback.consumed

    @property
    def nbytes(self) -> int:
        """Bytes of the residuals, memory that several share counted once, parameters not."""
        return self._pullback.nbytes

    def __repr__(self) -> str:
        of = f"{type(self).__name__} of {self._pullback.stage}"
        return f"<{of}, consumed>" if self.consumed else f"<{of}, {self.nbytes} B of residuals>"

    def _checked(self, derived_grads: PyTree) -> list[Tensor | None]:
        leaves, spec = trees.flatten(derived_grads)
        if spec != self._spec:
            raise StructureError(
                f"derived_grads of {self._pullback.stage} must have the structure of the derived parameters, "
                f"{trees.mismatch(self._spec, spec)}. Pass None at a leaf whose gradient is zero."
            )
        for i, (leaf, meta) in enumerate(zip(leaves, self._metas, strict=True)):
            if leaf is None or (meta is not None and _fits(leaf, meta)):
                continue
            name = trees.leaf_names(spec, "derived_grads")[i]
            expected = "None, as that leaf has no gradient" if meta is None else f"a gradient of {meta}"
            raise LeafError(
                f"{name} of {self._pullback.stage} must be {expected}; got {describe(leaf)}. Its dtype may "
                "be wider than the derived parameter's."
            )
        return leaves


def derive(
    make: Callable[[AnyParams], Output], params: AnyParams
) -> tuple[Output, DerivedPullback[AnyParams]]:
    """Compute derived parameters once for all microbatches, with a pullback for their gradients.

    What `make` computes runs once, and so does its backward, when the pullback is called with the gradients
    of the derived parameters, summed over the microbatches of a step. Derive again after each optimizer step.

    Args:
        make: a pure function from parameters to a pytree of parameters of any structure: casts, weight
            norms, merged adapters, the parameters of several stages of which two have the same embedding.
            Leaves may pass through unchanged.
        params: a pytree of tensors; its floating and complex leaves are differentiated.

    Returns:
        `(derived_params, pullback)`, where `pullback(derived_grads)` returns `param_grads`.

    Raises:
        StructureError: if `make` is no function, or returns no tensor.
        PurityError: if `make` mutates its parameters.

    Example:
        >>> import torch, funcstage as fs
        >>> apply, params, buffers = fs.functionalize(torch.nn.Linear(3, 2))
        >>> low, pullback = fs.derive(lambda p: {name: w.bfloat16() for name, w in p.items()}, params)
        >>> pending = []
        >>> for x in torch.ones(2, 4, 3, dtype=torch.bfloat16):  # two microbatches, one cast
        ...     output, buffers, stage_pullback = fs.stage_vjp(apply, low, buffers, x)
        ...     pending.append(stage_pullback(torch.ones_like(output))[1])
        >>> grads = pullback(fs.stage_backward_weight(pending))
        >>> grads["weight"].dtype, grads["bias"].tolist()
        (torch.float32, [8.0, 8.0])
    """
    if not callable(make):
        raise StructureError(
            f"derive expects a function of the parameters, got {describe(make)}. Pass one that returns a "
            "pytree of tensors."
        )
    given, _ = trees.flatten(params)
    passed: list[int | None] = []
    spec: optree.PyTreeSpec

    def apply(params: Params, _: list[Any]) -> tuple[list[Any], list[Any]]:
        nonlocal spec
        places = {id(leaf): i for i, leaf in enumerate(trees.flatten(params)[0])}
        with _Casts() as casts:
            leaves, spec = trees.flatten(make(params))
        passed[:] = [places.get(id(leaf)) for leaf in leaves]
        # What is differentiated are the values before their casts, where wide gradients can enter.
        return [casts.source(leaf) for leaf in leaves], leaves

    apply.__qualname__ = getattr(make, "__qualname__", type(make).__name__)
    none: list[Any] = []
    _, derived, pullback = stage_vjp(apply, params, none)
    leaves = [leaf if i is None else given[i] for leaf, i in zip(derived, passed, strict=True)]
    metas = [Meta.of(leaf) for leaf in leaves]
    return trees.unflatten(spec, leaves), DerivedPullback(pullback, spec, metas, passed)


_CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.half, Tensor.bfloat16, Tensor.float, Tensor.double}


class _Casts(TorchFunctionMode):
    """Notes the casts that round and do nothing else: to dtypes that hold no more than the original's."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and isinstance(result, Tensor) and result is not args[0]:
            source = args[0]
            if (
                trees.is_differentiable(result)
                and torch.promote_types(source.dtype, result.dtype) == source.dtype
            ):
                # The result is kept as well, or another tensor might get its id.
                self._sources[id(result)] = result, self.source(source)
        return result

    def source(self, leaf: Any) -> Any:
        """Return what a value was before its casts."""
        return self._sources[id(leaf)][1] if id(leaf) in self._sources else leaf


def _fits(grad: object, like: Meta) -> bool:
    return (
        isinstance(grad, Tensor)
        and trees.is_gradient(grad)
        and (grad.shape, grad.device) == (like.shape, like.device)
        and (
            grad.dtype == like.dtype
            or (grad.dtype.itemsize > 1 and torch.promote_types(grad.dtype, like.dtype) == grad.dtype)
        )
    )


def _flatten(pullback: Any) -> tuple[tuple[Pullback], DerivedPullback]:
    return (pullback._pullback,), pullback


def _unflatten(pullback: Any, children: Iterable[Pullback]) -> Any:
    (inner,) = children
    return DerivedPullback(inner, pullback._spec, pullback._metas, pullback._passed)


_KIND: Any = DerivedPullback
optree.register_pytree_node(_KIND, _flatten, _unflatten, namespace=trees.NAMESPACE)
