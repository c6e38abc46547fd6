"""The split VJP: F, I and W as functions, whatever engine runs them.

`stage_vjp` is F. It returns a `Pullback`, which is I; calling that returns a `WeightPullback`, which is
W. The two are values: linear (used once, unless asked to be retained), measurable (`nbytes`), and
pytrees of their residuals. The engines supply tapes; this file owns the contract: structures,
validation, single use and summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic

import optree
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from funcstage import trees
from funcstage.checks import (
    Meta,
    asking_for_stage_functions,
    check_callable,
    chosen,
    every_differentiable,
    ones_like,
)
from funcstage.engines.base import InputTape, StageCall, is_differentiated
from funcstage.engines.choose import choose
from funcstage.errors import LeafError, StructureError
from funcstage.functional import check_leaves
from funcstage.linear import Linear, register
from funcstage.state.anomaly import refuse_unchecked
from funcstage.state.backward_errors import explain
from funcstage.state.captured import Captured
from funcstage.state.grad_mode import in_ordinary_mode, outside_inference_mode
from funcstage.state.undone import undone_if_interrupted
from funcstage.state.writes import Part, Watch, refuse_written
from funcstage.trees import AnyBuffers, AnyParams, NoBuffers, Output, PyTree, describe, is_differentiable
from funcstage.weight_pullback import WeightPullback, stage_backward_weight


class Pullback(Linear[InputTape], Generic[AnyParams]):
    """I: the urgent half of a stage's backward. Returned by `stage_vjp`.

    As a pytree (namespace "funcstage") its leaves are the residuals of I and W.
    """

    __slots__ = ("_args_spec", "_output_fixed", "_output_metas", "_output_spec", "_params_spec")

    def __init__(
        self,
        tape: InputTape | None,
        stage: str,
        output_spec: optree.PyTreeSpec,
        output_metas: list[Meta | None],
        args_spec: optree.PyTreeSpec,
        params_spec: optree.PyTreeSpec,
        params: Sequence[Any],
        watches: tuple[Watch | Captured, ...],
        output_fixed: dict[int, Any],
    ) -> None:
        super().__init__(tape, stage, watches)
        self._output_fixed = output_fixed  # leaves that are no tensors, which a cotangent may repeat
        self._output_spec = output_spec
        self._output_metas = output_metas
        self._args_spec = args_spec
        self._params_spec = params_spec
        self._params = params

    @undone_if_interrupted
    @outside_inference_mode
    def __call__(
        self, output_grads: PyTree = None, *, retain: bool = False
    ) -> tuple[tuple[PyTree, ...], WeightPullback[AnyParams]]:
        """Compute the gradients of the inputs, and leave those of the weights for later.

        Args:
            output_grads: cotangents with the structure of the stage's output, each with its leaf's
                shape, dtype and device. A `None` leaf is zero. `None` as a whole means one, where the
                output is a single real number.
            retain: keep the residuals for another call.

        Returns:
            The input gradients, one entry for each positional argument with that argument's structure,
            `None` at leaves that are not differentiated or that the output does not depend on; and the
            weight pullback.

        Raises:
            ConsumedError: on a second call, unless the first was made with `retain=True`. One that failed in
                its midst counts.
            WrittenError: if something that it reads was written in place after F.
            StructureError: if `output_grads` has another structure than the output.
            LeafError: if a cotangent has another shape, dtype or device than its output, or is to be
                differentiated or transformed and the stage is compiled or runs on DTensors.
            StageError: in anomaly mode, if the stage is compiled.
        """
        return self._run(output_grads, retain)

    @undone_if_interrupted
    @outside_inference_mode
    def _at_once(self, output_grads: PyTree = None) -> tuple[tuple[PyTree, ...], WeightPullback[AnyParams]]:
        """Compute the gradients of the inputs, to be followed by W at once, which may be done by then."""
        return self._run(output_grads, retain=False, at_once=True)

    def _run(
        self, output_grads: PyTree, retain: bool, at_once: bool = False
    ) -> tuple[tuple[PyTree, ...], WeightPullback[AnyParams]]:
        tape = self._live().at_once() if at_once else self._live()
        cotangents = self._checked(output_grads)
        if not tape.higher and is_differentiated(cotangents):
            self._refuse_differentiated(cotangents)
        refuse_unchecked(tape.checks_nan, self.stage, "I")
        refuse_written(self._watches, lambda: tape.reads(cotangents), self.stage, "I")
        tape = self._taken("I", retain)
        try:
            with self._turn.taken():
                tape = self._live()
                if at_once:
                    self._tape = tape = tape.at_once()  # in its place, as I frees what the tape holds
                grads, weight_tape, left = tape.input_vjp(cotangents, retain)
                watches = self._watches
                if weight_tape.shares is None or weight_tape.shares:
                    given = Part("output_grads", cotangents, self._output_spec)
                    made = Part("input_grads", grads, self._args_spec)
                    watches += (Watch.over([], [given, made], weight_tape.shares),)
                weight_pullback = WeightPullback(
                    weight_tape, self.stage, self._params_spec, self._params, watches
                )
                self._left(tape, left)
        except BaseException as error:
            if not retain:
                self._fail(tape)
            explain(error, self.stage, "I")
            raise
        return trees.unflatten(self._args_spec, grads), weight_pullback

    def _checked(self, output_grads: PyTree) -> list[Tensor | None]:
        if output_grads is None and self._output_spec.num_leaves:
            return [self._one()]
        leaves, spec = trees.flatten(output_grads)
        if spec != self._output_spec:
            raise StructureError(
                f"output_grads of {self.stage} must have the structure of its output, "
                f"{trees.mismatch(self._output_spec, spec)}. Pass None at a leaf whose cotangent is zero."
            )
        for i, fixed in self._output_fixed.items():
            if type(leaves[i]) is type(fixed) and (leaves[i] is fixed or leaves[i] == fixed):
                leaves[i] = None
        for i, (leaf, meta) in enumerate(zip(leaves, self._output_metas, strict=True)):
            if leaf is not None:
                if meta is None and self._is_of_packed(i, leaf):
                    leaves[i] = None
                    continue
                self._check_leaf(i, leaf, meta)
        return leaves

    def _is_of_packed(self, i: int, leaf: object) -> bool:
        """Tell whether it is the sizes or indices of a packed sequence, which torch makes none without."""
        accessor = self._output_spec.accessors()[i]
        return bool(accessor) and accessor[-1].type is PackedSequence and not is_differentiable(leaf)

    def _check_leaf(self, i: int, leaf: object, meta: Meta | None) -> None:
        shaped = isinstance(leaf, Tensor) and not (is_lazy(leaf) or leaf.is_nested)
        if meta is not None and shaped and Meta.of(leaf) == meta:
            return
        name = trees.leaf_names(self._output_spec, "output_grads")[i]
        if meta is None:
            raise LeafError(
                f"{name} of {self.stage} must be None, because that output is no floating or complex tensor; "
                f"got {describe(leaf)}."
            )
        if not isinstance(leaf, Tensor):
            raise StructureError(f"{name} of {self.stage} must be a tensor, {meta}; got {describe(leaf)}.")
        raise LeafError(
            f"{name} of {self.stage} must match its output, {meta}; got {describe(leaf)}. Reshape, cast or "
            "move the cotangent first."
        )

    def _refuse_differentiated(self, cotangents: Sequence[Tensor | None]) -> None:
        leaves = enumerate(cotangents)
        i = next((i for i, leaf in leaves if leaf is not None and leaf.requires_grad), 0)
        name = trees.leaf_names(self._output_spec, "output_grads")[i] if cotangents else "output_grads"
        raise LeafError(
            f"{name} of {self.stage} requires grad, or a transform of torch.func is active. Gradients of a "
            "stage that is compiled or runs on DTensors cannot be differentiated again. Detach the "
            "cotangent, or give stage_vjp the uncompiled `apply`."
        )

    def _one(self) -> Tensor:
        if not any(self._output_metas):
            raise LeafError(
                f"The output of {self.stage} holds no floating or complex tensor, so that it has no "
                "gradient, and there is nothing for I and W to do. Return the tensor that the loss is made "
                "of as well."
            )
        meta = self._output_metas[0] if len(self._output_metas) == 1 else None
        if meta is None or meta.shape.numel() != 1 or meta.dtype.is_complex:
            outputs = ", ".join("without gradient" if m is None else str(m) for m in self._output_metas)
            raise LeafError(
                f"output_grads of {self.stage} may be left out only where the output is one real scalar; "
                f"the output is {outputs}. Pass cotangents with the structure of the output."
            )
        return ones_like(meta)

    def _signature(self) -> str:
        return f"output_grads -> ({self._args_spec.num_children} input gradients, weight pullback)"

    def _rebuilt(self, tape: InputTape | None) -> Pullback:
        return Pullback(
            tape,
            self.stage,
            self._output_spec,
            self._output_metas,
            self._args_spec,
            self._params_spec,
            self._params,
            self._watches,
            self._output_fixed,
        )


@asking_for_stage_functions
@undone_if_interrupted
@in_ordinary_mode
def stage_vjp(
    apply: Callable[..., tuple[Output, AnyBuffers]],
    params: AnyParams,
    buffers: AnyBuffers | NoBuffers,
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Output, AnyBuffers, Pullback[AnyParams]]:
    """Run a stage forward (F) and return its output, its new buffers and its pullback (I, then W).

    The vector-Jacobian product is split exactly: F runs the stage once, I computes what the input
    gradients need and W the rest of the backward, and no matrix product is computed in both.

    Args:
        apply: a stage function `apply(params, buffers, *args, **kwargs) -> (output, new_buffers)`, from
            `functionalize`, from `compile`, or hand-written.
        params: a pytree of tensors; its floating and complex leaves are differentiated.
        buffers: a pytree of tensors that are not differentiated.
        *args: positional arguments, any pytrees.
        argnums: which positional arguments are differentiated: an index, several, or `()` for none (a
            first stage that is fed with tokens). `None` means each with a floating or complex tensor.
        **kwargs: keyword arguments, never differentiated.

    Returns:
        `(output, new_buffers, pullback)`.

    Raises:
        StructureError: if `apply` is no stage function, or `argnums` names an argument that has nothing
            to differentiate.
        PurityError: if `apply` mutates what it was given or has captured.

    Example:
        >>> import torch, funcstage as fs
        >>> apply, params, buffers = fs.functionalize(torch.nn.Linear(3, 2))
        >>> x = torch.ones(4, 3)
        >>> output, buffers, pullback = fs.stage_vjp(apply, params, buffers, x)
        >>> (dx,), weight_pullback = pullback(torch.ones(4, 2))
        >>> {name: tuple(grad.shape) for name, grad in weight_pullback().items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    check_callable(apply)
    # Now, as the output may make a type known that is a leaf here.
    arg_leaves, args_spec = check_leaves("args", args)
    if kwargs:
        check_leaves("kwargs", kwargs)
    diff = every_differentiable(arg_leaves, args_spec) if argnums is None else chosen(args, argnums)
    call = StageCall(apply, params, buffers, args, kwargs, diff, arg_leaves, args_spec)
    output, new_buffers, tape = choose(call)(call)
    output_leaves, output_spec = check_leaves("output", output)
    param_leaves, params_spec = call.flat[0]
    watch = tape.watch
    if watch is None:
        watch = Watch.over(
            [Part("params", param_leaves, params_spec), Part("buffers", *call.flat[1])],
            [
                Part("args", arg_leaves, args_spec),
                Part("kwargs", *call.flat[3]),
                Part("output", output_leaves, output_spec),
                Part.of("new_buffers", new_buffers),
            ],
        )
    captured = (Captured(tape.captured, apply),) if tape.captured else ()
    pullback = Pullback(
        tape,
        call.name,
        output_spec,
        [Meta.of(leaf) for leaf in output_leaves],
        args_spec,
        params_spec,
        param_leaves,
        (watch, *captured),
        {i: leaf for i, leaf in enumerate(output_leaves) if not (leaf is None or isinstance(leaf, Tensor))},
    )
    return output, new_buffers, pullback


def stage_backward(
    pullback: Pullback[AnyParams], output_grads: PyTree = None
) -> tuple[tuple[PyTree, ...], AnyParams]:
    """Run a stage's whole backward, I and then W.

    Of a compiled stage that sends messages, as tensor-parallel ones do, both are one program here, so that
    W's products run while I's messages travel.

    Args:
        pullback: from `stage_vjp`; consumed.
        output_grads: as for `Pullback.__call__`.

    Returns:
        `(input_grads, param_grads)`.
    """
    _check_pullback(pullback)
    input_grads, weight_pullback = input_before_weights(pullback, output_grads)
    return input_grads, stage_backward_weight(weight_pullback)


def input_before_weights(
    pullback: Pullback[AnyParams], output_grads: PyTree = None
) -> tuple[tuple[PyTree, ...], WeightPullback[AnyParams]]:
    """I, which W follows at once: of a compiled stage that sends messages, it has computed W's results."""
    return pullback._at_once(output_grads)


def stage_backward_input(
    pullback: Pullback[AnyParams], output_grads: PyTree = None
) -> tuple[tuple[PyTree, ...], WeightPullback[AnyParams]]:
    """Run I: the same as `pullback(output_grads)`.

    Args:
        pullback: from `stage_vjp`; consumed.
        output_grads: as for `Pullback.__call__`.

    Returns:
        `(input_grads, weight_pullback)`.
    """
    _check_pullback(pullback)
    return pullback(output_grads)


def _check_pullback(pullback: object) -> None:
    if not isinstance(pullback, Pullback):
        raise StructureError(
            f"stage_backward_input expects the pullback that stage_vjp returns, got {describe(pullback)}. "
            "For a module that ran eagerly, use funcstage.autograd."
        )


register(Pullback)
