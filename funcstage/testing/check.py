"""`check_stage`: does the split of this very stage equal eager backward?

The stage runs once under plain autograd, on copies of everything, and once split by each engine, with the
same random state and cotangents. What is compared is all that the contract promises: outputs, buffers,
the gradients and which of them are absent, FLOPs, purity, single use, and that W may be run late.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from funcstage._torch.functorch import is_functorch_wrapped_tensor
from funcstage.engines.graph import compile
from funcstage.errors import ConsumedError, StageError, StructureError
from funcstage.functional import FunctionalStage
from funcstage.pullback import Pullback
from funcstage.testing.counting import UncountableError
from funcstage.testing.reference import (
    COMPARED,
    Reference,
    Snapshot,
    Subject,
    compare_trees,
    is_inductor,
    memory,
    tensors_by_name,
)
from funcstage.testing.report import EngineReport, StageMismatch, StageReport
from funcstage.trees import Buffers, Params, PyTree
from funcstage.weight_pullback import WeightPullback

Engine: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
"""An engine: a function from a stage function to one, such as `funcstage.compile`."""


ENGINES: dict[str, Engine] = {
    "closures": lambda apply: apply,
    "aten": functools.partial(compile, backend="aten", fullgraph=True),
    "inductor": functools.partial(compile, backend="inductor", fullgraph=True),
}
"""The engines of funcstage by name."""


def check_stage(
    module_or_apply: nn.Module | FunctionalStage | Callable[..., Any],
    *args: Any,
    engines: str | Engine | Sequence[str | Engine] = tuple(ENGINES),
    params: Params = None,
    buffers: Buffers = None,
    argnums: int | Sequence[int] | None = None,
    output_grads: PyTree | Callable[[PyTree], PyTree] = None,
    flops: bool = True,
    tolerance: float | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> StageReport:
    """Compare a stage's split backward with plain eager autograd, on these arguments.

    The module is never run itself, only a copy of it and its functional form; nothing that is passed in is
    mutated, and random states are left as they were. Tensors on the meta device have no values: of these,
    structures, shapes, dtypes, which gradients are absent, and FLOPs are compared.

    Args:
        module_or_apply: an `nn.Module`, what `functionalize` returned, or a stage function
            `apply(params, buffers, *args, **kwargs) -> (output, new_buffers)`.
        *args: positional arguments of the stage.
        engines: what splits the stage: ``"closures"`` (the stage function as it is), ``"aten"`` and
            ``"inductor"`` (`funcstage.compile` with that backend and `fullgraph=True`, the last one needing a
            C++ compiler or Triton), or a function from a stage function to one; one of them, or several.
        params: the parameters of a stage function; only with one.
        buffers: its buffers; only with one.
        argnums: which positional arguments are differentiated, as for `stage_vjp`.
        output_grads: cotangents with the structure of the output (`None` leaves are zero), or a function
            that makes them from the output; drawn from a normal distribution if left out.
        flops: whether to count FLOPs as well, which runs everything a second time. More than eager's are a
            mismatch, unless what the README lists as "Right, but at a price" explains them; that, and fewer,
            is noted in the report. For Inductor, the programs that it was given are counted, as its kernels
            cannot be looked into.
        tolerance: largest error relative to the largest magnitude of a leaf; by default that of the
            coarsest dtype that took part (`funcstage.testing.TOLERANCES`), and where a stage is so
            ill-conditioned that one more rounding after every operation moves eager's own results by more,
            a multiple of that.
        seed: for the random state of the stage and for the cotangents.
        **kwargs: keyword arguments of the stage. For a stage whose own keyword is one of the names
            above, pass a function that calls it.

    Returns:
        A `StageReport`. An engine that raises a `StageError` for the stage, as those of `funcstage.compile`
        do for control flow that depends on values, is listed in its `refusals`.

    Raises:
        StageMismatch: an `AssertionError` that lists every leaf that differs, by how much, and which
            operations of the stage read it.
        StageError: if every engine raises one (the first is raised), or the call is wrong.
        StructureError: if the arguments are not those of the module's forward.

    Example:
        >>> import torch
        >>> from funcstage.testing import check_stage
        >>> print(check_stage(torch.nn.Linear(3, 2), torch.ones(4, 3), engines=("closures", "aten")))
        Linear
          closures: 4 leaves compared, 4 bitwise equal
            FLOPs: F 48 + I 48 + W 48 = eager 144
            residuals: 48 B before I, 80 B before W
          aten: 4 leaves compared, 4 bitwise equal
            FLOPs: F 48 + I 48 + W 48 = eager 144
            residuals: 48 B before I, 80 B before W
    """
    chosen = _chosen(engines)
    subject = Subject.of(module_or_apply, params, buffers, args, kwargs, argnums)
    reference = Reference(subject, output_grads, seed, tolerance)
    report = StageReport(subject.name)
    for name, engine in chosen.items():
        found = report.engines[name] = EngineReport(name)
        try:
            _check_engine(found, reference, engine(subject.stage.apply), flops)
        except StageError as refusal:
            found.refusal = refusal
    if len(report.refusals) == len(chosen):
        raise next(iter(report.refusals.values()))
    if report.complaints():
        raise StageMismatch(report)
    return report


def _chosen(engines: str | Engine | Sequence[str | Engine]) -> dict[str, Engine]:
    chosen: dict[str, Engine] = {}
    for engine in [engines] if isinstance(engines, str) or callable(engines) else engines:
        if isinstance(engine, str):
            if engine not in ENGINES:
                raise StructureError(
                    f"check_stage: there is no engine {engine!r}; expected one of {', '.join(ENGINES)}, or a "
                    f"function from a stage function to one."
                )
            chosen[engine] = ENGINES[engine]
        else:
            chosen[getattr(engine, "__qualname__", str(engine))] = engine
    if not chosen:
        raise StructureError(f"check_stage: engines is empty; name at least one of {', '.join(ENGINES)}.")
    return chosen


def _check_engine(report: EngineReport, reference: Reference, apply: Callable[..., Any], flops: bool) -> None:
    """Split the stage by one engine, and compare all that the contract promises."""
    subject, expected = reference.subject, reference.expected
    given = Snapshot(subject.held())
    output, new_buffers, pullback = reference.split(apply)
    _check_free(report, "output", output)
    _check_free(report, "new buffers", new_buffers)
    cotangents = reference.cotangents(output)
    passed = Snapshot([*tensors_by_name("output", output), *tensors_by_name("output_grads", cotangents)])
    report.input_nbytes = pullback.nbytes
    with reference.seeded_backward():
        input_grads, weight_pullback = pullback(cotangents)
        report.weight_nbytes = weight_pullback.nbytes
        reference.another_microbatch(apply)
        param_grads = weight_pullback()
    results = (output, new_buffers, input_grads, param_grads)
    for what, got, wanted in zip(COMPARED, results, expected[:4], strict=True):
        compare_trees(report, what, got, wanted, reference.tolerance)
    if not all(leaf.accepted for leaf in report.leaves):
        report.leaves = reference.explained(report.leaves)
    report.problems += [*given.changes(), *passed.changes()]
    if any(tensor.is_meta for _, tensor in tensors_by_name("output", output)):
        report.notes.append("values were not compared, as the output is on the meta device and has none")
    _check_single_use(report, pullback, cotangents, weight_pullback)
    _check_own_memory(report, param_grads, [*subject.held(), *tensors_by_name("output_grads", cotangents)])
    if flops:
        _check_flops(report, reference, apply)
        if is_inductor(apply) and report.flops is not None:
            report.notes.append("FLOPs are those of the programs that TorchInductor was given")


def _check_flops(report: EngineReport, reference: Reference, apply: Callable[..., Any]) -> None:
    try:
        with reference.seeded_backward():
            report.flops, prices = reference.flops(apply)
    except UncountableError as error:
        report.notes.append(f"FLOPs were not counted, as eager does not run while they are ({error})")
    else:
        report.problems += report.flops.problems(prices)
        report.notes += report.flops.notes(prices)


def _check_free(report: EngineReport, what: str, tree: PyTree) -> None:
    for name, leaf in tensors_by_name(what, tree):
        if is_functorch_wrapped_tensor(leaf):
            report.problems.append(f"{name} is still wrapped by a transform")
        elif leaf.requires_grad:
            report.problems.append(f"{name} still requires grad, so it keeps a tape alive")


def _check_single_use(
    report: EngineReport, pullback: Pullback, cotangents: PyTree, weight_pullback: WeightPullback
) -> None:
    for used, call in (
        (pullback, lambda: pullback(cotangents)),
        (weight_pullback, lambda: weight_pullback()),
    ):
        kind = type(used).__name__
        try:
            call()
        except ConsumedError:
            pass
        else:
            report.problems.append(f"the {kind} could be used twice")
        if used.nbytes:
            report.problems.append(f"the {kind} still holds {used.nbytes} B after its use")


def _check_own_memory(report: EngineReport, param_grads: Params, held: list[tuple[str, Tensor]]) -> None:
    owners = {memory(tensor): name for name, tensor in held if tensor.numel()}
    for name, grad in tensors_by_name("gradient of params", param_grads):
        if grad.numel() and grad.layout is torch.strided and not grad.is_meta:
            owner = owners.setdefault(memory(grad), name)
            if owner != name:
                report.problems.append(f"{name} shares its memory with {owner}")
