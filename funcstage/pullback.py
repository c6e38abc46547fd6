"""The split VJP: F, I and W as functions, whatever engine runs them.

`stage_vjp` is F. It returns a `Pullback`, which is I; calling that returns a `WeightPullback`, which is
W. The two are values: linear (used once, unless asked to be retained), measurable (`nbytes`), and
pytrees of their residuals. The engines supply tapes; this file owns the contract: structures,
validation, single use and summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic

import optree
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from funcstage import trees
from funcstage.checks import (
    UNKNOWN,
    Meta,
    check_callable,
    checked_accumulators,
    chosen,
    every_differentiable,
    what_was_added,
)
from funcstage.engines.base import InputTape, Place, StageCall, WeightTape, is_differentiated
from funcstage.engines.choose import choose
from funcstage.errors import ConsumedError, LeafError, StageError, StructureError
from funcstage.functional import check_leaves
from funcstage.linear import Linear, register
from funcstage.sites import Site, operation_of
from funcstage.state.anomaly import refuse_unchecked
from funcstage.state.backward_errors import explain
from funcstage.state.captured import Captured
from funcstage.state.grad_mode import outside_inference_mode, with_gradients_on
from funcstage.state.undone import undone_if_interrupted
from funcstage.state.writes import Part, Watch, refuse_written, versions
from funcstage.tensors import added
from funcstage.trees import AnyBuffers, AnyParams, Output, PyTree, describe


class WeightPullback(Linear[WeightTape], Generic[AnyParams]):
    """W: the deferred half of a stage's backward. Returned by a `Pullback`.

    It holds the residuals that only the weight gradients need and the cotangents at the stage's sites,
    and nothing else. As a pytree (namespace "funcstage") its leaves are those tensors.
    """

    __slots__ = ("_params", "_params_spec")

    def __init__(
        self,
        tape: WeightTape | None,
        stage: str,
        params_spec: optree.PyTreeSpec,
        params: Sequence[Any],
        watches: tuple[Watch | Captured, ...],
    ) -> None:
        super().__init__(tape, stage, watches)
        self._params_spec = params_spec
        self._params = params  # the tape has them too

    @undone_if_interrupted
    @outside_inference_mode
    def __call__(self, *, retain: bool = False) -> AnyParams:
        """Compute the gradients of the parameters.

        Args:
            retain: keep the residuals for another call.

        Returns:
            A pytree with the structure of `params`; each gradient has its parameter's shape, dtype and
            device, and memory of its own. `None` for a parameter that the output does not depend on.

        Raises:
            ConsumedError: on a second call, unless the first was made with `retain=True`. One that failed in
                its midst counts.
            WrittenError: if something that it reads was written in place after F or I.
            StageError: in anomaly mode, if the stage is compiled.
        """
        tape = self._live()
        self._check_ready(tape)
        try:
            grads, left = tape.weight_vjp(retain)
            self._keep(left)
        except BaseException as error:
            if not retain:
                self._fail(tape)
            explain(error, self.stage, "W")
            raise
        return trees.unflatten(self._params_spec, grads)

    def _check_ready(self, tape: WeightTape) -> None:
        refuse_unchecked(tape.checks_nan, self.stage, "W")
        refuse_written(self._watches, tape.reads, self.stage, "W")

    def _keep(self, left: WeightTape | None) -> None:
        self._tape = left
        if left is None:
            self._params, self._watches = (), ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the stage that the output depends on, whose vjps sum up to what W computes.

        Looking at them uses nothing up. A stage without differentiated arguments (`argnums=()`) has no
        input side to be split from: it is one site for each of its outputs.

        Raises:
            ConsumedError: if the weight pullback was used.
            StageError: if the stage is compiled, so that its W is one program, or runs on DTensors.
        """
        places = self._live().sites()
        if places is None:
            raise StageError(
                f"The sites of {self.stage} cannot be told apart: its W is one program. Give stage_vjp the "
                "uncompiled stage function (`compiled.apply`), and plain tensors."
            )
        names = [".".join(map(str, path)) for path in self._params_spec.paths()]

        def site(place: Place) -> Site:
            def pull(cotangent: Tensor) -> dict[str, Tensor]:
                self._check_ready(self._live())
                grads = place.vjp(cotangent)
                return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}

            params = tuple(names[i] for i in place.reached)
            return Site(operation_of(place.node), params, tuple(place.inputs), place.cotangent, pull)

        return tuple(map(site, places))

    @undone_if_interrupted
    def _add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Compute the gradients and add them into `totals`, which are donated."""
        if torch.is_inference_mode_enabled():  # only there can be added into what was made there
            return added(totals, trees.flatten(self())[0])
        tape = self._live()
        try:
            totals = tape.add_into(totals)
            self._keep(None)
        except BaseException as error:
            self._fail(tape)
            explain(error, self.stage, "W")
            raise
        return totals

    def _metas(self) -> list[Meta | None]:
        """What the gradients look like; read when asked for, as there are many in the path of every F."""
        return [Meta.of(param) for param in self._params]

    def _signature(self) -> str:
        return f"() -> gradients of {sum(meta is not None for meta in self._metas())} parameters"

    def _rebuilt(self, tape: WeightTape | None) -> WeightPullback:
        return WeightPullback(tape, self.stage, self._params_spec, self._params, self._watches)


class Pullback(Linear[InputTape], Generic[AnyParams]):
    """I: the urgent half of a stage's backward. Returned by `stage_vjp`.

    As a pytree (namespace "funcstage") its leaves are the residuals of I and W.
    """

    __slots__ = ("_args_spec", "_output_fixed", "_output_metas", "_output_spec", "_params", "_params_spec")

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
        tape = self._live()
        cotangents = self._checked(output_grads)
        if not tape.higher and is_differentiated(cotangents):
            self._refuse_differentiated(cotangents)
        refuse_unchecked(tape.checks_nan, self.stage, "I")
        refuse_written(self._watches, lambda: tape.reads(cotangents), self.stage, "I")
        try:
            grads, weight_tape, left = tape.input_vjp(cotangents, retain)
            watches = self._watches
            if weight_tape.shares is None or weight_tape.shares:
                given = Part("output_grads", cotangents, self._output_spec)
                made = Part("input_grads", grads, self._args_spec)
                watches += (Watch.over([], [given, made], weight_tape.shares),)
            weight_pullback = WeightPullback(
                weight_tape, self.stage, self._params_spec, self._params, watches
            )
            self._tape = left
            if left is None:
                self._params, self._watches = (), ()
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
                f"output_grads of {self.stage} must have the structure of its output, {self._output_spec}; "
                f"got {spec}. Pass None at a leaf whose cotangent is zero."
            )
        for i, fixed in self._output_fixed.items():
            if type(leaves[i]) is type(fixed) and (leaves[i] is fixed or leaves[i] == fixed):
                leaves[i] = None
        for i, (leaf, meta) in enumerate(zip(leaves, self._output_metas, strict=True)):
            if leaf is not None:
                self._check_leaf(i, leaf, meta)
        return leaves

    def _check_leaf(self, i: int, leaf: object, meta: Meta | None) -> None:
        shaped = isinstance(leaf, Tensor) and not (is_lazy(leaf) or leaf.is_nested)
        if meta is not None and shaped and Meta.of(leaf) == meta:
            return
        name = trees.leaf_names(self._output_spec, "output_grads")[i]
        if meta is None:
            raise LeafError(
                f"{name} of {self.stage} must be None, as that output is no floating or complex tensor; "
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
            f"{name} of {self.stage} requires grad, or a transform of torch.func is active, but gradients "
            "of a stage that is compiled or runs on DTensors cannot be differentiated in turn. Detach the "
            "cotangent, or give stage_vjp the uncompiled `apply`."
        )

    def _one(self) -> Tensor:
        meta = self._output_metas[0]
        single = len(self._output_metas) == 1 and meta is not None and meta.shape.numel() == 1
        if not single or meta is None or meta.dtype.is_complex:
            outputs = ", ".join("no tensor gradient" if m is None else str(m) for m in self._output_metas)
            raise LeafError(
                f"output_grads of {self.stage} may be left out only where the output is one real scalar; "
                f"the output is {outputs}. Pass cotangents with the structure of the output."
            )
        return torch.ones(meta.shape, dtype=meta.dtype, device=meta.device)

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


@outside_inference_mode
@undone_if_interrupted
@with_gradients_on
def stage_vjp(
    apply: Callable[..., tuple[Output, AnyBuffers]],
    params: AnyParams,
    buffers: AnyBuffers,
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
    param_leaves, params_spec = call.of_params
    watch = tape.watch
    if watch is None:
        watch = Watch.over(
            [Part("params", param_leaves, params_spec), Part("buffers", *call.of_buffers)],
            [
                Part("args", arg_leaves, args_spec),
                Part.of("kwargs", kwargs),
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

    Args:
        pullback: from `stage_vjp`; consumed.
        output_grads: as for `Pullback.__call__`.

    Returns:
        `(input_grads, param_grads)`.
    """
    input_grads, weight_pullback = stage_backward_input(pullback, output_grads)
    return input_grads, stage_backward_weight(weight_pullback)


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
    if not isinstance(pullback, Pullback):
        raise StructureError(
            f"stage_backward_input expects the pullback that stage_vjp returns, got {describe(pullback)}. "
            "For a module that ran eagerly, use funcstage.autograd."
        )
    return pullback(output_grads)


def stage_backward_weight(
    weight_pullbacks: WeightPullback[AnyParams] | Iterable[WeightPullback[AnyParams]],
    accumulate: AnyParams | None = None,
) -> AnyParams:
    """Run W for one or many microbatches and sum.

    Args:
        weight_pullbacks: one weight pullback, or several of the same stage; consumed.
        accumulate: gradients to add into, with the structure of the parameters, `None` leaves counting
            as zero. Its tensors are donated: the sum reuses their storage. A wider dtype than the
            parameters' (float32 for bfloat16) is kept. A compiled stage's matrix products add into them
            directly, without rounding in between.

    Returns:
        The summed gradients, with the structure of the parameters; `None` where nothing contributed.

    Raises:
        ConsumedError: if a pullback was used before, or is listed twice.
        WrittenError: if something that one of them reads was written in place after F or I.
        StructureError: if pullbacks or `accumulate` differ in structure.
        LeafError: if a leaf of `accumulate` cannot take its parameter's gradient.

    These leave everything as it was. Another error, in the midst of a sum, has a note that says which
    microbatches are in `accumulate`; those and the one that failed are consumed.
    """
    pending = [weight_pullbacks] if isinstance(weight_pullbacks, WeightPullback) else list(weight_pullbacks)
    if not pending:
        raise StructureError("stage_backward_weight needs at least one weight pullback, got none.")
    _check_pending(pending)
    first = pending[0]
    total = given = checked_accumulators(first, accumulate)
    start = versions(given)
    for i, weight_pullback in enumerate(pending):
        before = versions(given)
        try:
            total = weight_pullback._add_into(total)
        except BaseException as error:
            uncounted = any(leaf is not None and leaf.is_inference() for leaf in given)
            added = UNKNOWN if uncounted else what_was_added(i, start, before, versions(given))
            error.add_note(f"This was W of {first.stage}, weight pullback {i} of {len(pending)}. {added}")
            raise
    return trees.unflatten(first._params_spec, total)


def _check_pending(pending: Sequence[WeightPullback]) -> None:
    first = pending[0]
    metas = first._metas() if isinstance(first, WeightPullback) else []
    seen: set[int] = set()
    for i, weight_pullback in enumerate(pending):
        if not isinstance(weight_pullback, WeightPullback):
            raise StructureError(
                f"stage_backward_weight expects weight pullbacks, which a pullback returns second; entry {i} "
                f"is {describe(weight_pullback)}."
            )
        if weight_pullback.consumed or id(weight_pullback) in seen:
            raise ConsumedError(
                f"Weight pullback {i} of {weight_pullback.stage} was used before or is listed twice. Call it "
                "yourself with retain=True where its gradients are needed again."
            )
        seen.add(id(weight_pullback))
        weight_pullback._check_ready(weight_pullback._live())
        if weight_pullback._params_spec != first._params_spec or weight_pullback._metas() != metas:
            raise StructureError(
                f"Weight pullback {i} ({weight_pullback.stage}) has other parameters than the first "
                f"({first.stage}); only microbatches of one stage can be summed."
            )


for _kind in (Pullback, WeightPullback):
    register(_kind)
