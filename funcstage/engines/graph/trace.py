"""Pass 1, trace: a stage function and the shapes of its arguments -> the joint graph of F, I and W.

The stage runs once on fake tensors, which have shapes, dtypes and devices but no memory, and its
backward right after it. What is recorded below autograd is one flat graph of ATen operations. The
backward is plain reverse mode rather than `torch.func.vjp`, whose levels bring decompositions of their
own (of dropout, for one, whose masks differ from the eager ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import takewhile
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.fx import Graph, GraphModule, Node

from funcstage import dtensors, trees
from funcstage._torch import tracing as tt
from funcstage._torch.calls import current
from funcstage._torch.dynamo import uncompiled
from funcstage._torch.fx import recording, unsay
from funcstage._torch.interception import intercepting
from funcstage._torch.messages import LEAF_WRITTEN, NOT_ENTERED, says, with_contexts
from funcstage._torch.shapes import enable_python_dispatcher
from funcstage._torch.tensors import was_written
from funcstage.engines.base import StageCall
from funcstage.engines.graph import generators
from funcstage.engines.graph.asserted import Asserted, Functionalization
from funcstage.engines.graph.cumulative import averaged_in_tensors
from funcstage.engines.graph.joint import A_SIZE, Joint, Sharding
from funcstage.engines.graph.layers import Layers
from funcstage.engines.graph.recorder import Recorder
from funcstage.engines.graph.refusals import (
    check_recorded,
    impure,
    refusal_of,
    refuse_random_backward,
    refuse_trainable,
    refuse_writes,
    refusing_changes,
)
from funcstage.engines.graph.regions import Regions
from funcstage.engines.graph.separable import OWN, Separable, refuse_of_levels
from funcstage.engines.graph.sizes import Open, Sizes, open_sizes
from funcstage.engines.levels.inner_gradients import BACKWARD_CALLED
from funcstage.engines.node_hooks import Allowed, checked_hooks
from funcstage.errors import PurityError, StageError, stage_name
from funcstage.functional import checked_result
from funcstage.gathered import telling
from funcstage.state import captured
from funcstage.state.ambient import autocast_off, own_autocast_cache
from funcstage.state.argument_containers import Containers
from funcstage.state.guise import looking_alike
from funcstage.state.identity import watching_identity
from funcstage.state.kept import Changes, State, objects_among
from funcstage.state.module import state_with, swapped
from funcstage.state.overlaps import noting_written


def trace(
    call: StageCall,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    *,
    recorder: Recorder | None = None,
    overwritten: bool = False,
    open_dims: Open | None = None,
    copied: bool,
) -> Joint:
    """Trace a stage function and its backward; nothing is computed, allocated or mutated.

    Args:
        call: of the stage function. Leaves that are no tensors become constants of the graph; where `diff`
            is None, the forward alone is traced.
        decompositions: ATen operations to replace while tracing.
        recorder: entered while the stage function runs.
        overwritten: whether the stage writes into its differentiated arguments, which are then copied.
            Found out by trying.
        open_dims: dimensions of arguments whose sizes are left open.
        copied: whether layers that are alike may be traced once, where the recorder tells what they read.

    Returns:
        The joint graph, free of mutating operations.

    Raises:
        TraceError: if the stage reads values of tensors (data-dependent control flow or shapes), or
            cannot be recorded for another reason.
        PurityError: if it mutates what it was given.
    """
    with tt.without_modes():
        run = _Run(call, recorder, overwritten, open_dims, copied)
    with (
        tt.without_modes(),
        own_autocast_cache(),
        _recording(call.diff is not None),
        generators.left_alone(stage_name(call.apply)),
    ):
        try:
            with run.fake_mode, recording(), run.open_kernels():
                traced = tt.make_fx(run, decomposition_table=dict(decompositions or {}) | OWN)(*run.fakes)
        except Exception as error:
            if says(error, NOT_ENTERED):  # which an interrupt has kept from it, as is found out outside
                raise
            if run.layers.is_used:
                copied = False  # the error may be theirs
            elif isinstance(error, StageError):
                raise
            elif not overwritten and any(says(each, LEAF_WRITTEN) for each in with_contexts(error)):
                overwritten = True
            else:
                refusal = refusal_of(call.apply, error)
                if refusal is error:
                    run.state.restore(tensors_only=True)  # as eager, which has run up to here
                    run.state = State(None)
                    raise
                raise refusal from error
            traced = None
        else:
            assert traced is not None
            read = [
                getattr(traced, str(node.target), None) for node in traced.graph.find_nodes(op="get_attr")
            ]
            run.captured = [value for value in read if isinstance(value, Tensor)]
            run.state.read(stage_name(call.apply), run.captured)
        finally:
            run.layers.forget()
            run.state.restore()
            if recorder is not None:
                recorder.left_behind.empty_caches()
    if traced is None:
        if recorder is not None:
            recorder.left_behind.restore()
        options: dict[str, Any] = {"overwritten": overwritten, "open_dims": open_dims, "copied": copied}
        return trace(call, decompositions, recorder=recorder, **options)
    _name_placeholders(traced, run.n_state)
    if run.sizes is not None:
        open_sizes(traced, run.sizes, run.n_state)
    forward = _open_cotangents(call.apply, traced)
    check_recorded(call.apply, traced)
    _drop_aliases(traced.graph)
    run.regions.mark(traced.graph, forward)
    traced.recompile()
    return run.joint(traced)


class _Run:
    """One run of a stage and its backward on fake tensors, which is recorded, and what it has found.

    Attributes:
        fake_mode: of the fake tensors.
        fakes: for the tensors among the leaves of the call.
        n_state: how many of these are parameters and buffers.
        state: what the stage's module holds.
        regions: checkpointed regions.
        layers: those that may be traced once.
        captured: tensors that were read and not given.
        sharding: of the results that are DTensors.
        sizes: those that are left open.
        written: as in `Joint`.
    """

    def __init__(
        self,
        call: StageCall,
        recorder: Recorder | None,
        overwritten: bool,
        open_dims: Open | None,
        copied: bool,
    ) -> None:
        self._call, self._recorder, self._overwritten = call, recorder, overwritten
        state_leaves, self._state_spec = trees.flatten((call.params, call.buffers))
        arg_leaves, self._args_spec = trees.flatten((call.args, call.kwargs))
        self._leaves, self._specs = call.local
        self._n_leaves = len(state_leaves)
        self._n_params = len(call.of_params[0])
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.n_state = sum(i < self._n_leaves for i in self._places)
        tensors = [self._leaves[i] for i in self._places]
        self.sizes = Sizes(tensors, open_dims) if open_dims else None
        env = None if self.sizes is None else self.sizes.env
        self.fake_mode = tt.FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
        geometry = [None if self.sizes is None else self.sizes.geometry(i, t) for i, t in enumerate(tensors)]
        self.fakes = [tt.fake_like(self.fake_mode, t, g) for t, g in zip(tensors, geometry, strict=True)]
        self.state = State(call.module, objects_among(arg_leaves))
        self.regions = Regions()
        # A layer whose tensors are compared by identity must run itself.
        self._twins = call.twins_with(None)
        copied = copied and self.sizes is None and not (self._specs or self._twins.repeated)
        copied = copied and current().asked is None
        self.layers = Layers(call.module if copied else None, recorder, self.regions)
        self._found: _Found | None = None
        self.captured: list[Tensor] = []
        self.sharding: Sharding | None = None
        self.written: dict[int, list[int]] = {}

    def __call__(self, *tensors: Tensor) -> tuple[list[Tensor | None], ...]:
        """Run the stage and its backward."""
        unsay()
        call, owner = self._call, stage_name(self._call.apply)
        with Functionalization() as asserting, Separable(owner, self.regions.leftovers) as separable:
            given = [tt.to_functional(tensor) for tensor in tensors]
            values = list(self._leaves)
            for i, tensor in zip(self._places, given, strict=True):
                values[i] = tensor
            wanted = self._wanted()
            for i, first in _same_objects(self._leaves, range(self._n_leaves, len(values)), wanted):
                values[i] = values[first]
            values = dtensors.wrapped(values, self._specs)
            marked = {i: values[i].requires_grad_() for i in wanted}
            for i in wanted:
                # A leaf would run the hooks that module trackers put on leaves, which fail in a trace.
                values[i] = torch.ops.aten.alias.default(values[i])
            ends = [values[i] for i in wanted]
            for i in self._wanted_args() if self._overwritten else ():
                values[i] = values[i].clone()
            separable.given = self._named(values, wanted)
            separable.aliases = {id(marked[i]): values[i] for i in wanted}
            params, buffers = trees.unflatten(self._state_spec, values[: self._n_leaves])
            args, kwargs = trees.unflatten(self._args_spec, values[self._n_leaves :])
            containers = Containers((call.args, call.kwargs), (args, kwargs))
            lent = [*zip(self._leaves[: self._n_params], values, strict=False)]
            with (
                telling(self.regions.gathers),
                intercepting(self.regions),
                self.layers.asked(asserting.checks),
                uncompiled(),
                averaged_in_tensors(call.module),
                looking_alike(owner, call.argument_leaves, values[self._n_leaves :]),
                watching_identity(owner, self._twins, values[self._n_leaves :], lent),
                noting_written() as noted,
                self._recorder or nullcontext(),
            ):
                result = call.apply(params, buffers, *args, **kwargs)
            self._note_written(given, values, noted)
            reads_nodes = separable.reads_nodes  # of its own accord, as what follows reads them too
            output, new_buffers = checked_result(call.apply, result)
            refuse_writes(owner, containers)
            refuse_of_levels(owner, result)
            if any(leaf.grad is not None for leaf in marked.values()):
                raise PurityError(BACKWARD_CALLED)
            changes = asserting.with_checks(self.state.changes(owner))
            outputs, output_spec = trees.flatten(output)
            fresh, buffers_spec = trees.flatten(new_buffers if changes is None else (new_buffers, changes[1]))
            roots = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            roots = [] if call.diff is None else roots
            refuse_trainable(call.apply, [outputs[i] for i in roots])
            if reads_nodes:
                _check_nodes(owner, [outputs[i] for i in roots], ends)
            self.layers.check([outputs[i] for i in roots])
            constants = {i: r for i, r in enumerate([*outputs, *fresh]) if not isinstance(r, Tensor)}
            self._found = _Found(output_spec, buffers_spec, changes and changes[0], roots, constants)
            cotangents = [_cotangent_of(outputs[i]) for i in roots]
            as_they_come = [_unwrapped(leaf) for leaf in cotangents]  # a backward may write into them
            grads: list[Tensor | None] = [None] * len(values)
            if wanted:
                held = {} if call.module is None else {**buffers, **params}
                with (
                    swapped(state_with(call.module, held)),
                    autocast_off(),
                    refusing_changes(owner, call.module),
                ):
                    found = torch.autograd.grad(
                        [outputs[i] for i in roots], ends, cotangents, allow_unused=True
                    )
                for i, grad in zip(wanted, found, strict=True):
                    direct = marked[i].grad  # what custom functions add to it themselves
                    grads[i] = direct if grad is None else grad if direct is None else grad + direct
            written = next((i for i in range(self.n_state) if was_written(given[i])), None)
            if written is not None:
                leaf = self._names()[written]
                raise impure(call.apply, f"{leaf} ({trees.describe(self.fakes[written])})", leaf)
            of_args = grads[self._n_leaves : self._n_leaves + len(call.arg_leaves)]
            of_params = dtensors.placed_alike(grads[: self._n_params], self._specs)
            parts = outputs, fresh, of_args, of_params
            self.sharding = _sharding_of([*outputs, *fresh], roots, cotangents, of_args, of_params)
            return *([_unwrapped(leaf) for leaf in part] for part in parts), as_they_come

    def _note_written(self, given: list[Tensor], values: list[Any], noted: list[Tensor]) -> None:
        """Note which leaves were written into, or their copies."""
        of_copies = {*map(id, noted)}
        for place, (i, tensor) in enumerate(zip(self._places, given, strict=True)):
            is_written = id(values[i]) in of_copies
            if i >= self._n_leaves and not is_written:
                itself = [values[i]] if isinstance(values[i], tt.FunctionalTensor) else []
                is_written = any(map(was_written, (tensor, *itself)))
            if is_written:
                self.written[place] = [k for k, j in enumerate(self._places) if values[j] is values[i]]

    def joint(self, module: GraphModule) -> Joint:
        """What was recorded, with what was found."""
        found = self._found
        assert found is not None
        names = self._names()
        n_sizes = 0 if self.sizes is None else len(self.sizes)
        return Joint(
            module,
            self.n_state + n_sizes,
            len(self.fakes) - self.n_state,
            tuple(found.roots),
            found.output_spec,
            found.buffers_spec,
            found.constants,
            (*names[: self.n_state], *[A_SIZE] * n_sizes, *names[self.n_state :]),
            found.changes,
            {tensor: captured.name_of(tensor, self._call.apply) for tensor in self.captured},
            self.sharding,
            self.sizes,
            self.written,
        )

    def open_kernels(self) -> AbstractContextManager[Any]:
        """Where sizes are open, operations are taken apart in Python, which can keep them so."""
        return nullcontext() if self.sizes is None else enable_python_dispatcher()

    def _names(self) -> tuple[str, ...]:
        return _names_of(self._state_spec, self._args_spec, self._places)

    def _named(self, values: list[Any], wanted: list[int]) -> dict[int, str]:
        """Parameters, buffers and differentiated arguments, by their ids."""
        named = zip(self._places, self._names(), strict=True)
        return {id(values[i]): name for i, name in named if i < self._n_leaves or i in wanted}

    def _wanted(self) -> list[int]:
        """The leaves that are differentiated."""
        if self._call.diff is None:
            return []
        params = [i for i in range(self._n_params) if trees.is_differentiable(self._leaves[i])]
        return [*params, *self._wanted_args()]

    def _wanted_args(self) -> list[int]:
        return [self._n_leaves + i for i in self._call.diff or ()]


class _Found(NamedTuple):
    """What a run has told beside tensors.

    Attributes:
        output_spec: the structure of the output.
        buffers_spec: that of the new buffers, with what was left on the module.
        changes: how that is put there.
        roots: which leaves of the output can have a cotangent.
        constants: leaves of output and buffers that are no tensors.
    """

    output_spec: optree.PyTreeSpec
    buffers_spec: optree.PyTreeSpec
    changes: Changes | Asserted | None
    roots: list[int]
    constants: dict[int, Any]


def _check_nodes(stage: str, outputs: Iterable[Tensor], ends: Iterable[Tensor]) -> None:
    """Refuse hooks on the nodes at which the gradients of a trace are taken, which do not run."""
    at = {get_gradient_edge(end).node for end in ends}
    checked_hooks(
        stage, map(get_gradient_edge, outputs), lambda node: Allowed(node not in at, node not in at)
    )


def _same_objects(
    leaves: Sequence[Any], places: Sequence[int], apart: Sequence[int]
) -> list[tuple[int, int]]:
    """Tensors that were there before, as a forward may ask for; those `apart` are leaves of a tape."""
    first: dict[int, int] = {}
    others = [i for i in places if isinstance(leaves[i], Tensor) and i not in {*apart}]
    return [(i, j) for i in others if (j := first.setdefault(id(leaves[i]), i)) != i]


@contextmanager
def _recording(differentiated: bool) -> Iterator[None]:
    """Record a tape where gradients are asked for, whatever the caller's grad mode."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    # The first of the two sets the grad mode too.
    with (
        torch.inference_mode(inference and not differentiated),
        torch.set_grad_enabled(grad or differentiated),
    ):
        yield


def _names_of(state: optree.PyTreeSpec, args: optree.PyTreeSpec, places: Sequence[int]) -> tuple[str, ...]:
    """The names of the tensors among the leaves of `(params, buffers)` and `(args, kwargs)`."""
    roots = zip(("params", "buffers", "args", "kwargs"), (*state.children(), *args.children()), strict=True)
    names = [name for root, spec in roots for name in trees.leaf_names(spec, root)]
    return tuple(names[i] for i in places)


def _unwrapped(leaf: object) -> Tensor | None:
    (leaf,), _ = dtensors.unwrapped([leaf])
    return tt.from_functional(leaf) if isinstance(leaf, Tensor) else None


def _cotangent_of(output: Tensor) -> Tensor:
    """A stand-in for what I is given; of what is summed over ranks each has the whole gradient."""
    (local,), specs = dtensors.unwrapped([output])
    (cotangent,) = dtensors.wrapped([torch.empty_like(local)], dtensors.of_cotangents(specs))
    return cotangent


def _sharding_of(
    results: list[Any], roots: list[int], cotangents: list[Any], of_args: list[Any], of_params: list[Any]
) -> Sharding | None:
    """How DTensors among what a run has returned are sharded."""
    of_cotangents = {roots[i]: spec for i, spec in dtensors.unwrapped(cotangents)[1].items()}
    of_rest = [dtensors.unwrapped(leaves)[1] for leaves in (results, of_args, of_params)]
    if not (of_cotangents or any(of_rest)):
        return None
    return Sharding(of_rest[0], of_cotangents, *of_rest[1:])


def _open_cotangents(apply: Callable[..., Any], module: GraphModule) -> set[Node]:
    """Turn the stand-ins for the cotangents, which the trace returns last, into placeholders.

    Returns:
        The nodes before them, which are the forward's.
    """
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    stand_ins = output.args[0][-1]
    forward = set(graph.nodes)
    if stand_ins:
        forward = set(takewhile(lambda node: node is not stand_ins[0], graph.nodes))
        refuse_random_backward(apply, stand_ins[0])
    placeholders = graph.find_nodes(op="placeholder")
    anchor = placeholders[-1] if placeholders else graph._root
    for i, stand_in in enumerate(stand_ins):
        with graph.inserting_after(anchor):
            anchor = graph.placeholder(f"cotangent_{i}")
        anchor.meta["val"] = stand_in.meta["val"]
        stand_in.replace_all_uses_with(anchor)
    *results, _ = output.args[0]  # a gradient may be a cotangent itself
    output.args = (tuple(tuple(part) for part in results),)
    for stand_in in stand_ins:
        graph.erase_node(stand_in)
    return forward


def _drop_aliases(graph: Graph) -> None:
    """Below autograd, detaching is the identity."""
    for node in graph.nodes:
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _name_placeholders(module: GraphModule, n_state: int) -> None:
    for i, node in enumerate(module.graph.find_nodes(op="placeholder")):
        node._rename(f"state_{i}" if i < n_state else f"arg_{i - n_state}")
        node.target = node.name
