"""W as a value: what `Pullback` returns second, and the verb that runs W for many microbatches and sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, Never, overload

import optree
import torch
from torch import Tensor

from funcstage import trees
from funcstage.checks import UNKNOWN, Meta, checked_accumulators, checked_parts, what_was_added
from funcstage.dtensors import unwrapped
from funcstage.engines.base import AddedDirectly, Place, Summed, WeightTape
from funcstage.errors import ConsumedError, StageError, StructureError
from funcstage.linear import Linear, register
from funcstage.sites import Site
from funcstage.state.anomaly import refuse_unchecked
from funcstage.state.backward_errors import explain
from funcstage.state.captured import Captured
from funcstage.state.grad_mode import outside_inference_mode
from funcstage.state.undone import undone_if_interrupted
from funcstage.state.writes import Watch, refuse_written, versions
from funcstage.tensors import added
from funcstage.trees import AnyParams, describe
from funcstage.updating import Update, Updating


class WeightPullback(Linear[WeightTape], Generic[AnyParams]):
    """W: the deferred half of a stage's backward. Returned by a `Pullback`.

    It holds the residuals that only the weight gradients need and the cotangents at the stage's sites,
    and nothing else. As a pytree (namespace "funcstage") its leaves are those tensors.
    """

    __slots__ = ("_params_spec",)

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
        self._params = params

    @undone_if_interrupted
    @outside_inference_mode
    def __call__(self, *args: Never, retain: bool = False) -> AnyParams:
        """Compute the gradients of the parameters.

        Args:
            *args: none; the cotangents came with I.
            retain: keep the residuals for another call.

        Returns:
            A pytree with the structure of `params`; each gradient has its parameter's shape, dtype and
            device, and memory of its own. `None` for a parameter that the output does not depend on.

        Raises:
            StructureError: if it is given an argument.
            ConsumedError: on a second call, unless the first was made with `retain=True`. One that failed in
                its midst counts.
            WrittenError: if something that it reads was written in place after F or I.
            StageError: in anomaly mode, if the stage is compiled.
        """
        if args:
            raise StructureError(
                f"W of {self.stage} takes no argument: its cotangents came with I. Call weight_pullback() "
                "without; pass output_grads to the pullback that returned it."
            )
        tape = self._live()
        self._check_ready(tape)
        tape = self._taken("W", retain)
        try:
            with self._turn.taken():
                tape = self._live()
                grads, left = tape.weight_vjp(retain)
                self._left(tape, left)
        except BaseException as error:
            if not retain:
                self._fail(tape)
            explain(error, self.stage, "W")
            raise
        return trees.unflatten(self._params_spec, grads)

    def _check_ready(self, tape: WeightTape) -> None:
        refuse_unchecked(tape.checks_nan, self.stage, "W")
        refuse_written(self._watches, tape.reads, self.stage, "W")

    @undone_if_interrupted
    @outside_inference_mode
    def split(self, parts: int) -> tuple[WeightPullback[AnyParams], ...]:
        """Divide W in pieces: weight pullbacks that sum up to this one, which is consumed.

        A parameter's gradient is whole in one piece and `None` in the others, so that pieces may run in any
        order, each where there is time for it: the gradients are those of the whole, bit for bit where the
        same kernels run. Operations that reach a parameter together are in one piece, and the pieces cost
        about the same. What several pieces need is freed with the last of them.

        What several pieces would have to compute and is not cheap runs at once: nothing in most stages, the
        chain of cotangents where no argument is differentiated.

        Args:
            parts: how many pieces at most, 1 or more. There are fewer where there is less to divide: at
                least one, and no empty ones beside it.

        Returns:
            The pieces, in the order of the stage. `stage_backward_weight` sums some of them or all, of one
            microbatch or of many.

        Raises:
            ConsumedError: if the weight pullback was used or split before.
            WrittenError: if something that it reads was written in place after F or I.
            StructureError: if `parts` is no whole number, or less than 1.

        Example:
            >>> import torch, funcstage as fs
            >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
            >>> apply, params, buffers = fs.functionalize(module)
            >>> output, buffers, pullback = fs.stage_vjp(apply, params, buffers, torch.ones(5, 3))
            >>> _, weight_pullback = pullback(torch.ones(5, 2))
            >>> first, second = weight_pullback.split(2)
            >>> [name for name, grad in second().items() if grad is not None]
            ['1.weight', '1.bias']
        """
        parts = checked_parts(parts)
        tape = self._live()
        self._check_ready(tape)
        tape = self._taken("W")
        try:
            with self._turn.taken():
                tape = self._live()
                tapes = tape.split(parts)
                pieces = tuple(map(self._rebuilt, tapes))
                self._left(tape, None)
        except BaseException as error:
            self._fail(tape)
            explain(error, self.stage, "W")
            raise
        self._gone = (
            "was split, and its pieces have its residuals. Use those. If you need the whole too, split a "
            "copy of it, copy.copy(weight_pullback)."
        )
        return pieces

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the stage that the output depends on, whose vjps sum up to what W computes.

        Looking at them uses nothing up. Those of a compiled stage are read off its program W. Where no
        argument is differentiated, each look runs the chain of cotangents, and then W does.

        Raises:
            ConsumedError: if the weight pullback was used or split.
            WrittenError: if something that it reads was written in place after F or I.
            StageError: if the stage runs on DTensors, if it is compiled and I has summed gradients already,
                or if its own backward calls backward(), which adds some of them.
        """
        tape = self._live()
        self._check_ready(tape)
        tape = self._at_hand("W")
        names = [".".join(map(str, path)) for path in self._params_spec.paths()]
        try:
            found = tape.sites()
            places = None if found is None else list(found)
        except Summed as summed:
            params = ", ".join(names[i] for i in summed.reached)
            raise StageError(
                f"I of {self.stage} has already summed the gradients of {params}, to save memory until W, so "
                "their sites are gone. fs.compile(apply, sites=True) leaves all sums to W."
            ) from None
        except AddedDirectly as added:
            params = ", ".join(names[i] for i in added.reached)
            raise StageError(
                f"The backward of an operation in {self.stage} calls backward(), which has added to the "
                f"gradients of {params} past their sites. Let it call torch.autograd.grad and return what "
                "that yields."
            ) from None
        if places is None:
            raise StageError(
                f"The sites of {self.stage} cannot be told apart: it runs on DTensors. Give stage_vjp plain "
                "tensors: the sites of a stage before parallelize_module or fully_shard."
            )

        def site(place: Place) -> Site:
            def pull(cotangent: Tensor) -> dict[str, Tensor]:
                self._check_ready(self._live())
                grads = place.vjp(cotangent)
                return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}

            params = tuple(names[i] for i in place.reached)
            return Site(place.name, params, tuple(place.inputs), place.cotangent, pull)

        return tuple(map(site, places))

    @undone_if_interrupted
    def _add_into(self, totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Compute the gradients and add them into `totals`, which are donated."""
        if torch.is_inference_mode_enabled():  # only there can be added into what was made there
            return added(totals, trees.flatten(self())[0])
        tape = self._taken("W")
        try:
            with self._turn.taken():
                tape = self._live()
                totals = tape.add_into(totals)
                self._left(tape, None)
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


@overload
def stage_backward_weight(
    weight_pullbacks: WeightPullback[AnyParams] | Iterable[WeightPullback[AnyParams]],
    accumulate: AnyParams | None = None,
    *,
    update: None = None,
    state: None = None,
) -> AnyParams: ...


@overload
def stage_backward_weight(
    weight_pullbacks: WeightPullback[AnyParams] | Iterable[WeightPullback[AnyParams]],
    accumulate: AnyParams | None = None,
    *,
    update: Update,
    state: Any = None,
) -> tuple[AnyParams, Any]: ...


def stage_backward_weight(
    weight_pullbacks: WeightPullback[AnyParams] | Iterable[WeightPullback[AnyParams]],
    accumulate: AnyParams | None = None,
    *,
    update: Update | None = None,
    state: Any = None,
) -> AnyParams | tuple[AnyParams, Any]:
    """Run W for one or many microbatches and sum.

    Args:
        weight_pullbacks: one weight pullback, or several of the same stage; consumed.
        accumulate: gradients to add into, with the structure of the parameters, `None` leaves counting
            as zero. Its tensors are donated: the sum reuses their storage. A wider dtype than the
            parameters' (float32 for bfloat16) is kept. A compiled stage's matrix products add into them
            directly, without rounding in between.
        update: an optimizer's step for one parameter, `update(param, grad, state) -> (param, state)`. It is
            called as soon as the last of `weight_pullbacks` that has a share of the gradient, or reads the
            parameter, has run; the gradient is let go then. It may write into all three and return `None`.
            With pieces (`WeightPullback.split`), the first ones of all microbatches before the second ones,
            no more than one piece's gradients exist at a time.
        state: for `update`, a tree that has a state for each parameter in that one's place; `None` where
            that is left out.

    Returns:
        The summed gradients, with the structure of the parameters; `None` where nothing contributed. With
        `update`, instead, the parameters and the states; those without a gradient are as they were.

    Raises:
        ConsumedError: if a pullback was used before, or is listed twice.
        WrittenError: if something that one of them reads was written in place after F or I.
        StructureError: if pullbacks, `accumulate` or `state` differ in structure, or `update` is no function.
        LeafError: if a leaf of `accumulate` cannot take its parameter's gradient.

    These leave everything as it was. Another error, in the midst of a sum, has a note that says which
    microbatches are in `accumulate`, and what was updated; those and the one that failed are consumed.

    Example:
        >>> import torch, funcstage as fs
        >>> apply, params, buffers = fs.functionalize(torch.nn.Linear(3, 2))
        >>> output, buffers, pullback = fs.stage_vjp(apply, params, buffers, torch.ones(4, 3))
        >>> _, weight_pullback = pullback(torch.ones(4, 2))
        >>> def descend(param, grad, steps):
        ...     return param - 0.1 * grad, steps + 1
        >>> steps = {"weight": 0, "bias": 0}
        >>> params, steps = fs.stage_backward_weight(weight_pullback, update=descend, state=steps)
        >>> steps
        {'weight': 1, 'bias': 1}
    """
    pending = [weight_pullbacks] if isinstance(weight_pullbacks, WeightPullback) else list(weight_pullbacks)
    if not pending:
        raise StructureError(
            "stage_backward_weight needs at least one weight pullback, got none. Pass one, or an iterable "
            "of them."
        )
    _check_pending(pending)
    first = pending[0]
    total = given = checked_accumulators(first, accumulate)
    updating = _updating(pending, update, state)
    counted = [*given, *unwrapped(given)[0]]  # writes go through a DTensor, or into what this rank has
    start = versions(counted)
    for i, weight_pullback in enumerate(pending):
        before = versions(counted)
        try:
            total = weight_pullback._add_into(total)
            if updating is not None:
                updating.apply(i, total)
        except BaseException as error:
            uncounted = any(leaf is not None and leaf.is_inference() for leaf in given)
            added = UNKNOWN if uncounted else what_was_added(i, start, before, versions(counted))
            error.add_note(f"This was W of {first.stage}, weight pullback {i} of {len(pending)}. {added}")
            if updating is not None:
                error.add_note(str(updating))
            raise
    return trees.unflatten(first._params_spec, total) if updating is None else updating.results()


def _updating(pending: Sequence[WeightPullback], update: object, state: Any) -> Updating | None:
    if update is None:
        if state is not None:
            raise StructureError("state is what update is called with: pass update too, or leave state out.")
        return None
    tapes = [weight_pullback._live() for weight_pullback in pending]
    first = pending[0]
    reached = [{*tape.reached()} for tape in tapes]
    reads = (tape.reads() for tape in tapes)
    return Updating.of(update, state, first._params_spec, first._params, reached, [*reads])


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
            if weight_pullback._gone:
                weight_pullback._live()  # says where to
            raise ConsumedError(
                f"Weight pullback {i} of {weight_pullback.stage} was used before or is listed twice. If you "
                "need its gradients again, call it yourself with retain=True."
            )
        seen.add(id(weight_pullback))
        weight_pullback._check_ready(weight_pullback._live())
        if weight_pullback._params_spec != first._params_spec or weight_pullback._metas() != metas:
            raise StructureError(
                f"Weight pullback {i} ({weight_pullback.stage}) has other parameters than the first "
                f"({first.stage}); only microbatches of one stage can be summed."
            )


register(WeightPullback)
