"""A stage as plain eager autograd runs it: what every engine is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from funcstage import trees
from funcstage._torch.tensors import version_of
from funcstage.checks import differentiated_leaves
from funcstage.engines.graph.compile import CompiledStage
from funcstage.errors import StructureError
from funcstage.functional import FunctionalStage, checked_result, functionalize
from funcstage.pullback import Pullback, stage_vjp
from funcstage.testing.copies import copied, left_alone
from funcstage.testing.counting import FlopCounter, UncountableError, counted, counted_in_eager
from funcstage.testing.prices import Price, Prices
from funcstage.testing.report import EngineReport, Flops
from funcstage.testing.seeding import seeded
from funcstage.testing.sites import Readers
from funcstage.testing.tolerances import (
    Difference,
    Rounding,
    compare,
    dtypes_on_tape,
    nodes_on_tape,
    tolerance_of,
)
from funcstage.trees import Buffers, Params, PyTree

COMPARED = ("output", "new buffers", "gradient of args", "gradient of params")
"""The names of the results, in the order in which they are kept."""


_TRIALS = 8
"""How often eager runs with further rounding where a leaf differs."""


_ROUNDINGS = 8
"""How many times as far as rounding moves eager's a result may be away."""


class _Eager(NamedTuple):
    """The results of plain autograd."""

    output: PyTree
    buffers: Buffers
    input_grads: PyTree
    param_grads: Params
    dtypes: set[torch.dtype]


class _Forward(NamedTuple):
    """An eager forward and what it is differentiated by."""

    output: PyTree
    buffers: Buffers
    inputs: list[Tensor]
    params: list[Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """The stage under test with its arguments."""

    name: str
    stage: FunctionalStage
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    argnums: int | Sequence[int] | None
    diff: list[int]

    @classmethod
    def of(
        cls,
        given: nn.Module | FunctionalStage | Callable[..., Any],
        params: Params,
        buffers: Buffers,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        argnums: int | Sequence[int] | None,
    ) -> Subject:
        if isinstance(given, (nn.Module, FunctionalStage)):
            if params is not None or buffers is not None:
                raise StructureError(
                    "check_stage takes params and buffers only with a stage function. Leave them out."
                )
            module = given if isinstance(given, nn.Module) else None
            if module is not None:
                _check_arguments(module, args, kwargs)
            stage = functionalize(given) if isinstance(given, nn.Module) else given
        elif not callable(given):
            raise StructureError(
                f"check_stage expects an nn.Module or a stage function, got {trees.describe(given)}."
            )
        elif params is None and isinstance(getattr(given, "module", None), nn.Module):
            name = getattr(given, "__qualname__", "the module")
            raise StructureError(
                f"check_stage got a stage function of {name} without its parameters. Pass the module itself, "
                "or check_stage(apply, x, params=params, buffers=buffers)."
            )
        else:
            module = None
            stage = FunctionalStage(
                given, {} if params is None else params, {} if buffers is None else buffers
            )
        name = getattr(stage.apply, "__qualname__", type(stage.apply).__name__)
        args, kwargs = trees.map_leaves(trees.detached, (args, kwargs))
        return cls(name, stage, module, args, kwargs, argnums, differentiated_leaves(args, argnums))

    def forward(
        self, rounding: Rounding | None = None, trained: bool = True, watching: Readers | Prices | None = None
    ) -> _Forward:
        """Run the stage under plain autograd, on copies; these may be rounded, not trained, or watched."""
        leaves, spec = trees.flatten(self.args)
        leaves = [_twin(leaf) for leaf in leaves]
        if rounding is not None:
            leaves = [rounding(leaf) for leaf in leaves]
        inputs = [leaves[i].requires_grad_() for i in self.diff]
        for i in self.diff:
            leaves[i] = _Twin.apply(leaves[i])
        args, kwargs = trees.unflatten(spec, leaves), trees.map_leaves(_twin, self.kwargs)
        if self.module is None:
            params, buffers = trees.map_leaves(_twin, (self.stage.params, self.stage.buffers))
            if rounding is not None:
                params = trees.map_leaves(rounding, params)
            for leaf in trees.flatten(params)[0]:
                if trained and trees.is_differentiable(leaf):
                    leaf.requires_grad_()
            with self._watching(watching, None, args, params):
                output, buffers = self.stage.apply(params, buffers, *args, **kwargs)
        else:
            module = copied(self.module)
            if not trained:
                module.requires_grad_(False)
            if rounding is not None:
                for parameter in module.parameters():
                    parameter.data = rounding(parameter.data)
            named = dict(module.named_parameters())
            params = {name: p for name, p in named.items() if p.requires_grad}
            with self._watching(watching, module, args, params):
                output = module(*args, **kwargs)
            buffers = dict(module.named_buffers()) | {n: p for n, p in named.items() if not p.requires_grad}
        return _Forward(output, buffers, inputs, trees.flatten(params)[0])

    def _watching(
        self, watching: Readers | Prices | None, module: nn.Module | None, args: PyTree, params: Params
    ) -> AbstractContextManager[object]:
        if watching is None:
            return nullcontext()
        if isinstance(watching, Prices):
            leaves = trees.flatten(args)[0]
            watching.watch([leaves[i] for i in self.diff], _trainable(trees.flatten(params)[0]))
        else:
            watching.watch(
                [*tensors_by_name(COMPARED[2], args), *tensors_by_name(COMPARED[3], params)], module
            )
        return watching

    def held(self) -> list[tuple[str, Tensor]]:
        """Name every tensor of the caller's."""
        named = [
            *tensors_by_name("params", self.stage.params),
            *tensors_by_name("buffers", self.stage.buffers),
            *tensors_by_name("args", self.args),
            *tensors_by_name("kwargs", self.kwargs),
        ]
        if self.module is not None:
            for name, p in self.module.named_parameters():
                named.append((f"module parameter {name}", p.detach()))
                if p.grad is not None:
                    named.append((f"module.{name}.grad", p.grad))
            named += [(f"module buffer {name}", b) for name, b in self.module.named_buffers()]
        return named

    def code(self) -> nn.Module | None:
        """The module whose code the stage runs, if it is one."""
        module: nn.Module | None = getattr(self.stage.apply, "module", self.module)
        return module

    def accelerators(self) -> list[torch.device]:
        """The devices other than the CPU that hold tensors of the stage."""
        return sorted({t.device for _, t in self.held() if t.device.type not in ("cpu", "meta")}, key=str)

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all that takes part."""
        dtypes = {leaf.dtype for _, leaf in self.held()}
        for device in {leaf.device.type for _, leaf in self.held()}:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                dtypes.add(torch.get_autocast_dtype(device))
        return dtypes


class Reference:
    """What eager autograd makes of the subject with its randomness fixed, and what lies within rounding."""

    def __init__(
        self,
        subject: Subject,
        output_grads: PyTree | Callable[[PyTree], PyTree],
        seed: int,
        tolerance: float | None,
    ) -> None:
        self.subject = subject
        self.output_grads = output_grads
        self.seed = seed
        self.given_tolerance = tolerance
        self.expected = self.eager()
        self.dtypes = subject.dtypes() | self.expected.dtypes
        self.tolerance = tolerance_of(self.dtypes) if tolerance is None else tolerance

    @contextmanager
    def seeded(self, offset: int = 0) -> Iterator[None]:
        """Fix the random state inside and give it back afterwards."""
        with (
            seeded(self.seed + offset, self.subject.accelerators()),
            left_alone(self.subject.code(), (self.subject.args, self.subject.kwargs)),
        ):
            yield

    def seeded_backward(self) -> AbstractContextManager[None]:
        """Fix the random state for a backward, which may draw, too."""
        return seeded(self.seed, self.subject.accelerators())

    def cotangents(self, output: PyTree, offset: int = 0) -> PyTree:
        """The caller's cotangents, or normally distributed ones; `None` where there can be none."""
        if callable(self.output_grads):
            return self.output_grads(trees.map_leaves(trees.detached, output))
        if self.output_grads is not None:
            return self.output_grads
        generator = torch.Generator().manual_seed(self.seed + offset)
        return trees.map_leaves(lambda leaf: normal_like(leaf, generator), output)

    def eager(self, rounding: Rounding | None = None) -> _Eager:
        """Run plain autograd, with rounding added to operands, cotangents and every operation if given."""
        with rounding or nullcontext():
            with self.seeded():
                forward = self.subject.forward(rounding)
            checked_result(self.subject.stage.apply, (forward.output, forward.buffers))
            outputs, cotangents = self.differentiated(forward)
            # Those of the forward: a checkpointed region that runs again updates them once more.
            buffers = trees.map_leaves(_kept, forward.buffers)
            if rounding is not None:
                cotangents = [rounding(cotangent) for cotangent in cotangents]
            with self.seeded_backward():
                found = _grad(outputs, forward.inputs + _trainable(forward.params), cotangents)
        leaves, args_spec = trees.flatten(self.subject.args)
        input_grads: list[Tensor | None] = [None] * len(leaves)
        for i, grad in zip(self.subject.diff, found, strict=False):
            input_grads[i] = grad
        rest = iter(found[len(forward.inputs) :])
        param_grads = [next(rest) if _requires_grad(leaf) else None for leaf in forward.params]
        return _Eager(
            trees.map_leaves(trees.detached, forward.output),
            buffers,
            trees.unflatten(args_spec, input_grads),
            trees.unflatten(trees.flatten(self.subject.stage.params)[1], param_grads),
            dtypes_on_tape(outputs),
        )

    def explained(self, leaves: list[Difference]) -> list[Difference]:
        """Widen tolerances to what rounding does to eager; name the readers of what differs even so."""
        if self.given_tolerance is None:
            leaves = self._conditioned(leaves)
        if all(leaf.accepted for leaf in leaves):
            return leaves
        readers = Readers()
        with self.seeded():
            self.subject.forward(watching=readers)
        return [
            leaf if leaf.accepted else replace(leaf, readers=tuple(readers.found.get(leaf.leaf, ())))
            for leaf in leaves
        ]

    def _conditioned(self, leaves: list[Difference]) -> list[Difference]:
        """Widen the tolerances to a multiple of what further rounding does to eager."""
        # Of a leaf that changes from run to run by itself, a perturbed run says nothing.
        again = self._compared(self.eager(), self.tolerance)
        reproduced = {leaf.leaf for leaf in again if leaf.accepted}
        moved: dict[str, float] = {}
        for trial in range(_TRIALS):
            for leaf in self._compared(self.eager(Rounding(trial)), 0.0):
                moved[leaf.leaf] = max(moved.get(leaf.leaf, 0.0), leaf.absolute)
        return [
            leaf.widened(_ROUNDINGS * moved.get(leaf.leaf, 0.0))
            if leaf.leaf in reproduced
            else replace(leaf, reproduced=False)
            for leaf in leaves
        ]

    def _compared(self, eager: _Eager, tolerance: float) -> list[Difference]:
        """Compare another run of eager with the first."""
        report = EngineReport("eager")
        for what, got, wanted in zip(COMPARED, eager[:4], self.expected[:4], strict=True):
            compare_trees(report, what, got, wanted, tolerance)
        return report.leaves

    def differentiated(self, forward: _Forward) -> tuple[list[Tensor], list[Tensor]]:
        """Pair the outputs that have a gradient with their cotangents."""
        leaves, spec = trees.flatten(forward.output)
        grads = self.cotangents(forward.output)
        if grads is None and spec.num_leaves == 1:
            grads = trees.unflatten(spec, [torch.ones_like(leaf) for leaf in leaves])
        pairs = [
            (leaf, grad)
            for leaf, grad in zip(leaves, trees.flatten(grads)[0], strict=True)
            if grad is not None and _requires_grad(leaf)
        ]
        return [leaf for leaf, _ in pairs], [grad for _, grad in pairs]

    def split(self, apply: Callable[..., Any], offset: int = 0) -> tuple[PyTree, Buffers, Pullback]:
        """Run F."""
        s = self.subject
        with self.seeded(offset):
            return stage_vjp(apply, *s.stage[1:], *s.args, argnums=s.argnums, **s.kwargs)

    def another_microbatch(self, apply: Callable[..., Any]) -> None:
        """Run F, I and W once more with other random numbers, and forget the results."""
        output, _, pullback = self.split(apply, offset=1)
        pullback(self.cotangents(output, offset=1))[1]()

    def flops(self, apply: Callable[..., Any]) -> tuple[Flops, list[Price]]:
        """Count eager's FLOPs and those of F, I and W; where these are more, find what has its price."""
        flops = self._flops(apply)
        if not any(flops.problems()):
            return flops, []
        # Recurrent kernels of libraries are not among the operations that are counted; their steps are.
        with ExitStack() as stack:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            if self.subject.accelerators():
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            flops = self._flops(apply)
            return flops, self._prices() if any(flops.problems()) else []

    def _flops(self, apply: Callable[..., Any]) -> Flops:
        with self.seeded():
            forward, eager_forward = counted_in_eager(self.subject.forward)
        outputs, cotangents = self.differentiated(forward)
        params = _trainable(forward.params)
        eager_backward = counted_in_eager(lambda: _grad(outputs, forward.inputs + params, cotangents))[1]
        # With nothing to train, rather than by asking for less: a custom autograd.Function knows only that.
        frozen = self._frozen()
        outputs, cotangents = self.differentiated(frozen)
        eager_input = counted_in_eager(lambda: _grad(outputs, frozen.inputs, cotangents))[1]
        if is_inductor(apply):
            s = self.subject
            with self.seeded():
                plan = apply.plan(*s.stage[1:], *s.args, argnums=s.argnums, **s.kwargs)
            of_f, of_i, of_w = (phase.flops for phase in (plan.forward, plan.input_grad, plan.weight_grad))
        else:
            (_, _, pullback), of_f = counted(lambda: self.split(apply))
            grads = self.cotangents(forward.output)
            (_, weight_pullback), of_i = counted(lambda: pullback(grads))
            of_w = counted(weight_pullback)[1]
        return Flops(eager_forward, eager_backward, eager_input, of_f, of_i, of_w)

    def _frozen(self) -> _Forward:
        """Run the forward with nothing to train, which it may not expect."""
        try:
            with self.seeded():
                return self.subject.forward(trained=False)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise UncountableError(
                f"without trainable parameters, {type(error).__name__}: {reason}"
            ) from error

    def _prices(self) -> list[Price]:
        """Find the operations of the stage that the README says to cost more."""
        with FlopCounter() as counter:
            prices = Prices(counter)
            with self.seeded():
                forward = self.subject.forward(watching=prices)
            outputs, cotangents = self.differentiated(forward)
            prices.watch_functions(outputs)
            _grad(outputs, forward.inputs + _trainable(forward.params), cotangents)
        return prices.found


class _Twin(torch.autograd.Function):
    """The identity, into memory of its own: what the stage may overwrite without touching a leaf."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # a gradient that is absent stays so
        return _twin(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


class Snapshot:
    """Some tensors as they are now: their values and versions."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._kept = [(name, tensor, _version(tensor), tensor.clone()) for name, tensor in named]

    def changes(self) -> Iterator[str]:
        """Name the tensors that were written since."""
        for name, tensor, version, value in self._kept:
            if _version(tensor) != version:
                yield f"{name} was mutated in place"
            elif not compare(name, tensor.detach(), value.detach(), 0.0).accepted:
                yield f"{name} was mutated behind its version counter"


def compare_trees(report: EngineReport, what: str, got: PyTree, expected: PyTree, tolerance: float) -> None:
    got_leaves, got_spec = trees.flatten(got)
    leaves, spec = trees.flatten(expected)
    if got_spec != spec:
        report.problems.append(f"{what}: expected the structure {trees.mismatch(spec, got_spec)}")
        return
    for name, ours, eagers in zip(trees.leaf_names(spec, what), got_leaves, leaves, strict=True):
        report.leaves.append(compare(name, ours, eagers, tolerance))


def is_inductor(apply: Callable[..., Any]) -> TypeGuard[CompiledStage]:
    return isinstance(apply, CompiledStage) and apply.backend == "inductor"


def _check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that the module's forward does not take, before anything is copied."""
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise StructureError(
            f"check_stage cannot call {type(module).__name__} with these arguments: {error}. Pass what the "
            "module is called with after it: check_stage(module, x, mask=mask) runs module(x, mask=mask)."
        ) from None
    except ValueError:  # a forward that tells nothing of its arguments
        pass


def _grad(outputs: list[Tensor], wanted: list[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor | None]:
    if not outputs or not wanted:
        return [None] * len(wanted)
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes_on_tape(outputs)):
        # Reentrant checkpoints cannot be asked for less than everything.
        for leaf in wanted:
            leaf.grad = None
        torch.autograd.backward(outputs, cotangents)
        return [leaf.grad for leaf in wanted]
    grads: Sequence[Tensor | None] = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return grads


def normal_like(leaf: object, generator: torch.Generator) -> Tensor | None:
    """Return a normally distributed cotangent for an output leaf, `None` where there can be none."""
    if not isinstance(leaf, Tensor) or not trees.is_differentiable(leaf):
        return None
    wide = torch.complex128 if leaf.is_complex() else torch.float64
    return torch.randn(leaf.shape, dtype=wide, generator=generator).to(leaf.device, leaf.dtype)


def _kept(leaf: Any) -> Any:
    """Copy a tensor that is going to be written; pass on everything else."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _twin(leaf: Any) -> Any:
    """Copy a tensor with its memory's layout (gaps and repetitions too); pass on everything else."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    if leaf.layout is not torch.strided or leaf.is_conj() or leaf.is_neg():
        return leaf.clone()
    storage = leaf.untyped_storage().clone()
    return leaf.new_empty(0).set_(storage, leaf.storage_offset(), leaf.shape, leaf.stride())


def tensors_by_name(root: str, tree: PyTree) -> list[tuple[str, Tensor]]:
    leaves, spec = trees.flatten(tree)
    names = trees.leaf_names(spec, root)
    return [(n, leaf) for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)]


def _requires_grad(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _trainable(params: list[Any]) -> list[Tensor]:
    return [leaf for leaf in params if _requires_grad(leaf)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else version_of(tensor)
