"""The split VJP: F, I and W as functions, whatever engine runs them.

`stage_vjp` is F. It returns a `Pullback`, which is I; calling that returns a `WeightPullback`, which is
W. The two are values: linear (used once, unless asked to be retained), measurable (`nbytes`), and
pytrees of their residuals. The engines supply tapes; this file owns the contract: structures,
validation, single use and summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar
from weakref import ref

import optree
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcstage import _functorch as ft
from funcstage import closures, eager, residuals, trees, uncompiled
from funcstage.anomaly import refuse_unchecked
from funcstage.backward_errors import explain
from funcstage.captured import Captured
from funcstage.copies import CopiedByLeaves
from funcstage.errors import ConsumedError, LeafError, StageError, StructureError
from funcstage.functional import FunctionalStage, check_leaves
from funcstage.grad_mode import outside_inference_mode, with_gradients_on
from funcstage.html import table
from funcstage.registration import WAY_OUT, holds_tensor
from funcstage.sites import Place, Site, operation_of, places_of
from funcstage.sums import added
from funcstage.trees import Buffers, Params, PyTree, describe
from funcstage.undone import undone_if_interrupted
from funcstage.writes import Part, Watch, refuse_written, versions


class Tape(Protocol):
    """What both tapes of an engine offer: their residuals, to look at, to give away and to replace."""

    @property
    def intact(self) -> bool:
        """Whether it can be run (again), after a run that failed too."""

    def leaves(self) -> list[Tensor]: ...
    def share(self) -> list[Tensor]: ...
    def with_leaves(self, leaves: Sequence[Tensor]) -> Self: ...


class WeightTape(Tape, Protocol):
    """An engine's W.

    Attributes:
        shares: the numbers of those of I's cotangents, then of its results, whose memory it may hold; None
            where any may be.
        checks_nan: whether autograd runs it, which looks for NaN in anomaly mode.
    """

    checks_nan: ClassVar[bool]

    @property
    def shares(self) -> Sequence[int] | None: ...
    def reads(self) -> Iterable[Tensor]: ...
    def pull(self, retain: bool) -> tuple[list[Tensor | None], WeightTape | None]: ...
    def add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]: ...


class InputTape(Tape, Protocol):
    """An engine's I.

    Attributes:
        watch: over what I and W may read of what the caller holds; None where that may be anything.
        captured: tensors that F has read without being handed them, where nothing else looks for writes.
        checks_nan: whether autograd runs it, which looks for NaN in anomaly mode.
        higher: whether what I and W yield can be differentiated in turn, or transformed.
    """

    checks_nan: ClassVar[bool]
    higher: ClassVar[bool]

    @property
    def watch(self) -> Watch | None: ...
    @property
    def captured(self) -> Sequence[ref[Tensor]]: ...
    def reads(self, cotangents: Sequence[Tensor | None]) -> Iterable[Tensor]: ...
    def pull(
        self, cotangents: Sequence[Tensor | None], retain: bool
    ) -> tuple[list[Tensor | None], WeightTape, InputTape | None]: ...


class Meta(NamedTuple):
    """What a cotangent must match; nothing where the leaf cannot have one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout

    @classmethod
    def of(cls, leaf: object) -> Meta | None:
        if not isinstance(leaf, Tensor) or not trees.is_differentiable(leaf):
            return None
        return cls(leaf.shape, leaf.dtype, leaf.device, leaf.layout)

    def __str__(self) -> str:
        return f"{trees.look(self)} on {self.device}"


AnyTape = TypeVar("AnyTape", bound=Tape)


class _Linear(CopiedByLeaves, Generic[AnyTape]):
    """A function that may be called once, because calling it uses up its tape."""

    __slots__ = ("_failed", "_tape", "_watches", "stage")
    _verb: ClassVar[str]

    def __init__(self, tape: AnyTape | None, stage: str, watches: tuple[Watch | Captured, ...]) -> None:
        self._tape = tape
        self._watches = watches
        self._failed = False
        self.stage = stage

    def _live(self) -> AnyTape:
        if self._tape is None:
            what = "A call of" if self._failed else "This"
            how = "failed in its midst, which" if self._failed else "was used before, and using it"
            raise ConsumedError(
                f"{what} this {type(self).__name__} of {self.stage} {how} freed its "
                f"residuals. Call it with retain=True wherever it is to be used again."
            )
        return self._tape

    def _fail(self, tape: AnyTape) -> None:
        """A run failed, or was interrupted: count as consumed if it has used up some of the tape."""
        if not tape.intact:
            self._tape, self._watches, self._failed = None, (), True

    @property
    def consumed(self) -> bool:
        """Whether it was used, so that a further call raises `ConsumedError`."""
        return self._tape is None

    @property
    def nbytes(self) -> int:
        """Bytes of the residuals, memory that several share counted once, parameters and buffers not."""
        return 0 if self._tape is None else residuals.nbytes(self._tape.leaves())

    def __repr__(self) -> str:
        if self._tape is None:
            return f"<{type(self).__name__} of {self.stage}, consumed>"
        leaves = self._tape.leaves()
        return (
            f"<{type(self).__name__} of {self.stage}, {self._signature()}, {len(leaves)} residuals, "
            f"{_readable(residuals.nbytes(leaves))}>"
        )

    def _repr_html_(self) -> str:
        leaves = [] if self._tape is None else sorted(self._tape.leaves(), key=lambda t: -t.nbytes)
        rows = [(str(tuple(t.shape)), str(t.dtype), str(t.device), f"{t.nbytes:,} B") for t in leaves]
        return table(repr(self)[1:-1], ("residual", "dtype", "device", "size"), rows, shown=12)

    def _signature(self) -> str:
        raise NotImplementedError

    def _rebuilt(self, tape: AnyTape | None) -> Self:
        raise NotImplementedError


class WeightPullback(_Linear[WeightTape]):
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
    def __call__(self, *, retain: bool = False) -> Params:
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
            grads, left = tape.pull(retain)
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
        tape = self._live()
        if not isinstance(tape, closures.WeightTape):
            raise StageError(
                f"The sites of {self.stage} cannot be told apart: its W is one program. Give stage_vjp the "
                "uncompiled stage function (`compiled.apply`), and plain tensors."
            )
        names = [".".join(map(str, path)) for path in self._params_spec.paths()]

        def site(place: Place) -> Site:
            def pull(cotangent: Tensor) -> dict[str, Tensor]:
                self._check_ready(self._live())
                grads = place.pull(cotangent)
                return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}

            params = tuple(names[i] for i in place.reached)
            return Site(operation_of(place.edge.node), params, tuple(place.inputs), place.cotangent, pull)

        return tuple(map(site, places_of(tape)))

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


class Pullback(_Linear[InputTape]):
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
    ) -> tuple[tuple[PyTree, ...], WeightPullback]:
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
        if not tape.higher and closures.is_differentiated(cotangents):
            self._refuse_differentiated(cotangents)
        refuse_unchecked(tape.checks_nan, self.stage, "I")
        refuse_written(self._watches, lambda: tape.reads(cotangents), self.stage, "I")
        try:
            grads, weight_tape, left = tape.pull(cotangents, retain)
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
    apply: Callable[..., Any],
    params: Params,
    buffers: Buffers,
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[PyTree, Buffers, Pullback]:
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
    _check_callable(apply)
    # Now, as the output may make a type known that is a leaf here.
    arg_leaves, args_spec = check_leaves("args", args)
    if kwargs:
        check_leaves("kwargs", kwargs)
    diff = _every_differentiable(arg_leaves, args_spec) if argnums is None else _chosen(args, argnums)
    linearize = getattr(apply, "linearize", None)
    tape: InputTape
    if linearize is not None:
        output, new_buffers, tape = linearize(params, buffers, args, kwargs, diff)
    elif eager.first_dtensor((params, args)) is not None:
        output, new_buffers, tape = eager.linearize(apply, params, buffers, args, kwargs, diff)
    else:
        output, new_buffers, tape = uncompiled.linearize(apply, params, buffers, args, kwargs, diff)
    output_leaves, output_spec = check_leaves("output", output)
    param_leaves, params_spec = trees.flatten(params)
    watch = tape.watch
    if watch is None:
        watch = Watch.over(
            [Part("params", param_leaves, params_spec), Part.of("buffers", buffers)],
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
        getattr(apply, "__qualname__", type(apply).__name__),
        output_spec,
        [Meta.of(leaf) for leaf in output_leaves],
        args_spec,
        params_spec,
        param_leaves,
        (watch, *captured),
        {i: leaf for i, leaf in enumerate(output_leaves) if not (leaf is None or isinstance(leaf, Tensor))},
    )
    return output, new_buffers, pullback


def stage_backward(pullback: Pullback, output_grads: PyTree = None) -> tuple[tuple[PyTree, ...], Params]:
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
    pullback: Pullback, output_grads: PyTree = None
) -> tuple[tuple[PyTree, ...], WeightPullback]:
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
    weight_pullbacks: WeightPullback | Iterable[WeightPullback], accumulate: Params | None = None
) -> Params:
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
    total = given = _checked_accumulators(first, accumulate)
    start = versions(given)
    for i, weight_pullback in enumerate(pending):
        before = versions(given)
        try:
            total = weight_pullback._add_into(total)
        except BaseException as error:
            uncounted = any(leaf is not None and leaf.is_inference() for leaf in given)
            added = _UNKNOWN if uncounted else _what_was_added(i, start, before, versions(given))
            error.add_note(f"This was W of {first.stage}, weight pullback {i} of {len(pending)}. {added}")
            raise
    return trees.unflatten(first._params_spec, total)


_UNKNOWN = "It may be in `accumulate` in part: start again from zeros."


def _what_was_added(i: int, start: list[int], before: list[int], after: list[int]) -> str:
    """What a sum that failed at weight pullback `i` has left in the accumulators."""
    if after == start:
        lost = ", and what those before it gave is lost: compute their forwards again" if i else ""
        return f"Nothing was added into `accumulate`{lost}."
    own = (
        "this one is not" if after == before else "this one is in some of its leaves, so that it is of no use"
    )
    return f"`accumulate` has those before it; {own}. What was to be added to its None leaves is lost."


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


def _checked_accumulators(pullback: WeightPullback, accumulate: Params | None) -> list[Tensor | None]:
    if accumulate is None:
        return [None] * pullback._params_spec.num_leaves
    leaves, spec = trees.flatten(accumulate)
    if spec != pullback._params_spec:
        raise StructureError(
            f"accumulate must have the structure of the parameters of {pullback.stage}, "
            f"{pullback._params_spec}; got {spec}. Use None at leaves that hold nothing yet."
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
            or not torch.can_cast(meta.dtype, leaf.dtype)
            or (leaf.dtype.itemsize == 1 and leaf.dtype != meta.dtype)
        ):
            raise LeafError(
                f"{name(i)} must be a tensor that takes a gradient of {meta}; got {describe(leaf)}. Pass "
                "zeros like the parameter, or None."
            )
        if leaf.is_inference() and not torch.is_inference_mode_enabled():
            raise LeafError(
                f"{name(i)} ({describe(leaf)}) was made in inference mode, outside of which torch adds "
                "nothing into it. Pass tensor.clone()."
            )
        if leaf.layout is torch.strided and trees.overlaps_itself(leaf):
            raise LeafError(
                f"{name(i)} ({describe(leaf)}) is an expanded tensor or a sliding window, several of "
                "whose elements share memory, so nothing can be added into it. Pass accumulate leaves "
                "with memory of their own: tensor.contiguous()."
            )
        if leaf.layout is torch.strided and leaf.numel():
            start = ft.storage_key(leaf), leaf.storage_offset()
            if starts.setdefault(start, i) != i:
                raise LeafError(
                    f"{name(i)} lies in the memory of {name(starts[start])}, so that their sums would mix. "
                    "Pass accumulate leaves with memory of their own: tensor.clone()."
                )
    return leaves


def _check_callable(apply: object) -> None:
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
        raise StructureError(f"stage_vjp expects a stage function, got {describe(apply)}.")


def differentiated_leaves(args: tuple[Any, ...], argnums: int | Sequence[int] | None) -> list[int]:
    """Return the indices, among all leaves of `args`, of those that `argnums` differentiates."""
    return _every_differentiable(*trees.flatten(args)) if argnums is None else _chosen(args, argnums)


def _every_differentiable(leaves: Sequence[Any], spec: optree.PyTreeSpec) -> list[int]:
    for i, leaf in enumerate(leaves):
        if type(leaf) is not Tensor and holds_tensor(leaf, trees.is_differentiable):
            raise StructureError(
                f"{trees.leaf_names(spec, 'args')[i]} is a {type(leaf).__qualname__}, whose tensors "
                f"would not be differentiated. {WAY_OUT}; or say by argnums which arguments are."
            )
    return [i for i, leaf in enumerate(leaves) if trees.is_differentiable(leaf)]


def _chosen(args: tuple[Any, ...], argnums: int | Sequence[int]) -> list[int]:
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


def _readable(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _flatten_linear(pullback: _Linear[Any]) -> tuple[list[Tensor], tuple[_Linear[Any], Any]]:
    tape = pullback._tape
    # The tape goes along as it is now: the pullback itself may be consumed before it is rebuilt.
    return ([], (pullback, None)) if tape is None else (tape.share(), (pullback, tape))


def _unflatten_linear(metadata: tuple[_Linear[Any], Any], leaves: Iterable[Tensor]) -> _Linear[Any]:
    pullback, tape = metadata
    return pullback._rebuilt(None if tape is None else tape.with_leaves(tuple(leaves)))


for _kind in (Pullback, WeightPullback):
    optree.register_pytree_node(
        _kind,  # type: ignore[arg-type]  # the stubs expect collections
        _flatten_linear,  # type: ignore[arg-type]
        _unflatten_linear,  # type: ignore[arg-type]
        namespace=trees.NAMESPACE,
    )
