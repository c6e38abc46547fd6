"""Pass 1, trace: a stage function and the shapes of its arguments -> the joint graph of F, I and W.

The stage runs once on fake tensors, which have shapes, dtypes and devices but no memory, and its
backward right after it. What is recorded below autograd is one flat graph of ATen operations. The
backward is plain reverse mode rather than `torch.func.vjp`, whose levels bring decompositions of their
own (of dropout, for one, whose masks differ from the eager ones).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from funcstage import _functorch as ft
from funcstage import closures, control_flow, recurrent, trees
from funcstage._dynamo import uncompiled
from funcstage._interception import intercepting
from funcstage.argument_containers import WAY_OUT, Containers
from funcstage.captured import name_of
from funcstage.checkpointing import Call
from funcstage.composites import in_order, opened
from funcstage.effects import MARKS, refuse_effects, refused_mark
from funcstage.errors import PurityError, StageError, TraceError
from funcstage.flex import is_flex_attention, run_compiled
from funcstage.functional import checked_result
from funcstage.graph import _torch as tt
from funcstage.graph import generators, norms
from funcstage.graph._fx import recording, unpatch
from funcstage.graph.blame import is_raised_by_stage, line_of
from funcstage.group_norm import contiguous_group_norm, crashes
from funcstage.inner_gradients import BACKWARD_CALLED
from funcstage.kept import Changes, State, objects_among
from funcstage.reentrant import Leftovers
from funcstage.trees import Buffers, Params


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """The joint graph of a stage and its backward, with what its inputs and outputs are.

    The graph's placeholders are the tensor leaves of (params, buffers), of (args, kwargs) and the
    cotangents, in this order. Its output is a tuple of four tuples: output leaves, leaves of the new
    buffers, input gradients and parameter gradients, each a node or `None`.

    Attributes:
        module: the graph; every tensor node carries its fake value in `meta["val"]`.
        n_state: how many placeholders are parameters and buffers.
        n_args: how many are arguments.
        cotangents: for each cotangent placeholder, the index of its output leaf.
        output_spec: the structure of the output.
        buffers_spec: the structure of the new buffers.
        constants: leaves of output and new buffers that are no tensors, by position among both.
        changes: what F does to the module, if anything; the new buffers are then a pair, of which the second
            part is the tensors that stay on the module.
        given: what the placeholders of state and arguments are called by those who gave them.
        captured: tensors that the graph reads and are no placeholders, with their names.
    """

    module: GraphModule
    n_state: int
    n_args: int
    cotangents: tuple[int, ...]
    output_spec: optree.PyTreeSpec
    buffers_spec: optree.PyTreeSpec
    constants: dict[int, Any]
    given: tuple[str, ...]
    changes: Changes | None = None
    captured: dict[Tensor, str] = field(default_factory=dict)

    @property
    def placeholders(self) -> list[Node]:
        return self.module.graph.find_nodes(op="placeholder")

    @property
    def results(self) -> tuple[Sequence[Node | None], ...]:
        """Output leaves, new buffers, input gradients, parameter gradients."""
        (output,) = self.module.graph.find_nodes(op="output")
        return output.args[0]


def trace(
    apply: Callable[..., Any],
    params: Params,
    buffers: Buffers,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    diff: Sequence[int] | None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    *,
    recorder: AbstractContextManager[Any] | None = None,
    overwritten: bool = False,
) -> Joint:
    """Trace a stage function and its backward; nothing is computed, allocated or mutated.

    Args:
        apply: the stage function.
        params: its parameters; floating and complex leaves are differentiated.
        buffers: its buffers.
        args: its positional arguments.
        kwargs: its keyword arguments. Leaves that are no tensors become constants of the graph.
        diff: indices of the differentiated leaves of `args`; `None` traces the forward alone.
        decompositions: ATen operations to replace while tracing.
        recorder: entered while the stage function runs.
        overwritten: whether the stage writes into its differentiated arguments, which are then copied.
            Found out by trying.

    Returns:
        The joint graph, free of mutating operations.

    Raises:
        TraceError: if the stage reads values of tensors (data-dependent control flow or shapes), or
            cannot be recorded for another reason.
        PurityError: if it mutates what it was given.
    """
    state_leaves, state_spec = trees.flatten((params, buffers))
    arg_leaves, args_spec = trees.flatten((args, kwargs))
    leaves = [*state_leaves, *arg_leaves]
    n_leaves, n_params, n_args = len(state_leaves), len(trees.flatten(params)[0]), len(trees.flatten(args)[0])
    wanted_args = [n_leaves + i for i in diff or ()]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    n_state = sum(i < n_leaves for i in places)
    fake_mode = tt.FakeTensorMode(allow_non_fake_inputs=True)
    with tt.without_modes():
        fakes = [tt.fake_like(fake_mode, leaves[i]) for i in places]
    note: dict[str, Any] = {}
    state = State(getattr(apply, "module", None), objects_among(arg_leaves))
    regions = _Regions()
    module: nn.Module | None = getattr(apply, "module", None)

    def differentiable(i: int) -> bool:
        return trees.is_differentiable(leaves[i])

    def joint(*tensors: Tensor) -> tuple[list[Tensor | None], ...]:
        unpatch()
        with _Functionalization(), _Separable(_name(apply), regions.leftovers) as separable:
            given = [tt.to_functional(tensor) for tensor in tensors]
            values = list(leaves)
            for i, tensor in zip(places, given, strict=True):
                values[i] = tensor
            wanted = [] if diff is None else [*filter(differentiable, range(n_params)), *wanted_args]
            marked = {i: values[i].requires_grad_() for i in wanted}
            for i in wanted:
                # A leaf would run the hooks that module trackers put on leaves, which fail in a trace.
                values[i] = torch.ops.aten.alias.default(values[i])
            named = zip(places, _names_of(state_spec, args_spec, places), strict=True)
            separable.given = {id(values[i]): name for i, name in named if i < n_leaves or i in wanted}
            ends = [values[i] for i in wanted]
            for i in wanted_args if overwritten else ():
                values[i] = values[i].clone()
            stage_params, stage_buffers = trees.unflatten(state_spec, values[:n_leaves])
            stage_args, stage_kwargs = trees.unflatten(args_spec, values[n_leaves:])
            containers = Containers((args, kwargs), (stage_args, stage_kwargs))
            with intercepting(regions), uncompiled(), nullcontext() if recorder is None else recorder:
                result = apply(stage_params, stage_buffers, *stage_args, **stage_kwargs)
            output, new_buffers = checked_result(apply, result)
            for each in containers.changed():
                raise TraceError(
                    f"{_name(apply)} writes into {each.name}, a {type(each.given).__qualname__}, which a "
                    f"compiled stage would do in its first call alone. {WAY_OUT}"
                )
            if any(leaf.grad is not None for leaf in marked.values()):
                raise PurityError(BACKWARD_CALLED)
            outputs, note["output"] = trees.flatten(output)
            note["changes"] = state.changes(_name(apply))
            if note["changes"] is not None:
                new_buffers = new_buffers, note["changes"][1]
            fresh, note["buffers"] = trees.flatten(new_buffers)
            results = [*outputs, *fresh]
            note["constants"] = {i: r for i, r in enumerate(results) if not isinstance(r, Tensor)}
            roots = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            roots = [] if diff is None else roots
            note["roots"] = roots
            cotangents = [torch.empty_like(outputs[i].detach()) for i in roots]
            as_they_come = [_unwrapped(leaf) for leaf in cotangents]  # a backward may write into them
            grads: list[Tensor | None] = [None] * len(values)
            if roots and wanted:
                with (
                    tt.lent(module, {**stage_buffers, **stage_params} if module is not None else {}),
                    tt.autocast_off(),
                ):
                    found = torch.autograd.grad(
                        [outputs[i] for i in roots],
                        ends,
                        cotangents,
                        allow_unused=True,
                    )
                for i, grad in zip(wanted, found, strict=True):
                    direct = marked[i].grad  # what custom functions add to it themselves
                    grads[i] = direct if grad is None else grad if direct is None else grad + direct
            if any(map(tt.was_written, given[:n_state])):
                raise _impure(apply)
            parts = (
                outputs,
                fresh,
                grads[n_leaves : n_leaves + n_args],
                grads[:n_params],
            )
            return *([_unwrapped(leaf) for leaf in part] for part in parts), as_they_come

    with (
        tt.without_modes(),
        tt.own_autocast_cache(),
        _recording(diff is not None),
        generators.left_alone(_name(apply)),
    ):
        try:
            with fake_mode, recording():
                traced = tt.make_fx(joint, decomposition_table=dict(decompositions or {}) | _OWN)(*fakes)
        except StageError:
            raise
        except Exception as error:
            if overwritten or _LEAF_WRITTEN not in str(error):
                refusal = _refusal(apply, error)
                if refusal is error:
                    state.restore(tensors_only=True)  # as eager, which has run up to here
                    state = State(None)
                    raise
                raise refusal from error
            traced, captured = None, []
        else:
            assert traced is not None
            read = [
                getattr(traced, str(node.target), None) for node in traced.graph.find_nodes(op="get_attr")
            ]
            captured = [value for value in read if isinstance(value, Tensor)]
            state.read(_name(apply), captured)
        finally:
            state.restore()
    if traced is None:
        return trace(
            *(apply, params, buffers, args, kwargs, diff, decompositions), recorder=recorder, overwritten=True
        )
    _name_placeholders(traced, n_state)
    forward = _open_cotangents(apply, traced)
    _check_recorded(apply, traced)
    _drop_aliases(traced.graph)
    regions.mark(traced.graph, forward)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return Joint(
        traced,
        n_state,
        len(fakes) - n_state,
        tuple(note["roots"]),
        note["output"],
        note["buffers"],
        note["constants"],
        _names_of(state_spec, args_spec, places),
        note["changes"][0] if note["changes"] else None,
        {tensor: name_of(tensor, apply) for tensor in captured},
    )


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
    return tt.from_functional(leaf) if isinstance(leaf, Tensor) else None


def _name(apply: Callable[..., Any]) -> str:
    return getattr(apply, "__qualname__", type(apply).__name__)


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
        _refuse_random_backward(apply, stand_ins[0])
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


def _refuse_random_backward(apply: Callable[..., Any], first: Node) -> None:
    """What is drawn after the forward would be drawn at other times than in eager."""
    node = first
    while node.op != "output":
        if is_random(node) and "backward" not in str(node.target):  # attention's is given its seed
            raise TraceError(f"{_name(apply)} draws random numbers in its backward ({node.target}).")
        node = node.next


class _Functionalization(tt.FunctionalTensorMode):
    """Without the checks that raise where a matrix is singular, an effect that a graph of functions lacks."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._linalg_check_errors.default:
            return None
        if isinstance(func, tt.HigherOrderOperator):
            # Their rules are looked up by the very type of the mode.
            return func.python_key_table[tt.FunctionalTensorMode](self, *args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Regions:
    """Notes the checkpointed regions of a stage while it is traced.

    They are recorded once, as everything else is; that they are to be computed again is for the partition.
    """

    def __init__(self) -> None:
        self._policies: list[tt.Policy | None] = []
        self._open = False
        self.leftovers = Leftovers()

    def checkpoint(self, call: inspect.BoundArguments) -> Any:
        asked = Call.of(call)
        if asked.is_constant(lambda tensor: tensor.requires_grad):
            with torch.no_grad():
                return asked.run()
        if self._open or not torch.is_grad_enabled():
            return asked.run()
        context = asked.context_fn()[0]
        policy = tt.policy_of(context)
        before = tt.last_recorded()
        self._open = True
        try:
            with nullcontext() if policy else context:
                result = self.leftovers.run(asked.run) if asked.reentrant else asked.run()
        finally:
            self._open = False
        node = tt.last_recorded()
        while node is not before:
            node.meta[_REGION] = len(self._policies)
            node = node.prev
        self._policies.append(policy)
        return result

    def custom_function(self, apply: Callable[..., Any], function: type[Function], args: Any) -> Any:
        return apply(*args)

    def mark(self, graph: Graph, forward: set[Node]) -> None:
        """Mark all nodes of regions, apart those that the forward reads from outside or policies save."""
        (output,) = graph.find_nodes(op="output")
        results = {node for part in output.args[0][:2] for node in part}
        for node in graph.nodes:
            region = node.meta.get(_REGION)
            if region is not None and node.op == "call_function":
                policy = self._policies[region]
                saved = policy is not None and policy(node)
                leaves = any(user in forward and user.meta.get(_REGION) != region for user in node.users)
                node.meta[CHECKPOINTED] = not (saved or leaves or node in results)


def is_random(node: Node) -> bool:
    """Tell whether a node draws random numbers; attention is one that may and does not, without dropout."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return target is tt.draw_and_save
    names = [argument.name for argument in target._schema.arguments]
    if "dropout_p" not in names:
        return True
    i = names.index("dropout_p")
    return bool(node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", 0))


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


def _check_recorded(apply: Callable[..., Any], module: GraphModule) -> None:
    """Refuse what a graph cannot express: mutation, and tensors left over from other traces."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), tt.FakeTensor):
            raise TraceError(
                f"{_name(apply)} keeps a tensor of an earlier call and reads it in this one, which a pure "
                f"function cannot do. Return the value as a buffer."
            )
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise TraceError(f"{_name(apply)} calls {node.target}, which writes in place.")
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                layout = str(value.layout).removeprefix("torch.")
                raise TraceError(
                    f"{_name(apply)} makes a tensor of {layout} layout ({node.target}), whose gradients a "
                    f"trace loses."
                )
        if node.target is torch.ops.aten._efficientzerotensor.default:
            node.target = torch.ops.aten.zeros.default  # which has memory, as a gradient must


def _impure(apply: Callable[..., Any]) -> PurityError:
    return PurityError(
        f"{_name(apply)} writes in place into a tensor that it was given. A stage function mutates nothing: "
        "work on a clone, or return the new value as a buffer."
    )


def _captured(owner: str, which: str) -> PurityError:
    return PurityError(
        f"{owner} writes in place into a tensor that it has captured from outside ({which}), which a program "
        "would not do again. Register the tensor as a buffer, or update a clone of it."
    )


def _refusal(apply: Callable[..., Any], error: Exception) -> Exception:
    """Say where the trace stopped; errors that the stage itself raises are passed on."""
    if isinstance(error, RuntimeError) and _LEAF_WRITTEN in str(error):
        # What is given are views of leaves; a leaf is one that the stage has made itself.
        return error if str(error).startswith("a leaf") else _impure(apply)
    name = control_flow.operator_behind(error)
    if name is not None:
        return TraceError(control_flow.refusal(_name(apply), name))
    if "mutating a non-functional tensor" in str(error):
        return _captured(_name(apply), f"at {line_of(error)}")
    if is_raised_by_stage(error):
        return error
    where = line_of(error)
    owner = _name(apply)
    names = {
        m: f"{owner}.{n}" if n else owner for n, m in getattr(apply, "module", nn.Module()).named_modules()
    }
    for frame, _ in traceback.walk_tb(error.__traceback__):
        holder = frame.f_locals.get("self")
        owner = names.get(holder, owner) if _is_module(holder) else owner
    reason = str(error).partition("\n")[0] or type(error).__name__
    if any(sign in reason for sign in ("shape_env must not be None", "_nested_tensor_from", "NestedTensor")):
        reason = "it makes a nested tensor; compute on padded tensors with a mask, or on packed values"
    if isinstance(error, tt.UNTRACEABLE):
        reason = f"it reads the value of a tensor ({reason})"
        if torch.is_anomaly_enabled() and where is None:
            reason = "anomaly mode looks at the values of gradients; turn it off around compiled stages"
    at = "" if where is None else f", at {where}"
    return TraceError(f"{owner} cannot be traced{at}: {reason}.")


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


class _Separable(TorchFunctionMode):
    """Replaces what would be recorded as one operation that cannot be separated or replayed.

    Recurrent layers are traced step by step, as their fused kernels yield all gradients at once. Linear
    algebra is traced without its checks, so that of a singular matrix the results are not finite. Batch
    norm is traced without cuDNN, whose operation writes the running statistics and does not say so.
    """

    def __init__(self, owner: str, leftovers: Leftovers) -> None:
        super().__init__()
        self.owner = owner
        self.given: dict[int, str] = {}  # state and differentiated arguments, by their ids
        self._leftovers = leftovers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self._leftovers.cut((args, kwargs or {}))
        refuse_effects(func, args, kwargs)
        if func in MARKS:
            self._mark(*args, **kwargs)
        if closures._is_in_place(func, kwargs):
            target = kwargs.get("out", args[0] if args else None)
            if isinstance(target, Tensor) and not isinstance(ft.innermost(target), _TRACED):
                raise _captured(self.owner, trees.describe(target))  # which is real, and would be written
        generators.check_kept(args, kwargs)
        if crashes(func, args, kwargs):
            return contiguous_group_norm(func, args, kwargs)
        if func in (F.batch_norm, F.instance_norm):
            body = opened(func)
            assert body is not None
            with self:
                return body(*args, **kwargs)
        if func is torch.batch_norm:
            return norms.batch_norm(*args, **kwargs)
        if func is torch.instance_norm:
            return norms.instance_norm(*args, **kwargs)
        if is_flex_attention(func):
            return run_compiled(func, *args, backend="eager")
        if func in _RECURRENT:
            return _RECURRENT[func](*in_order(args, kwargs))
        return func(*args, **kwargs)

    def _mark(self, tensor: Tensor, requires_grad: bool = True) -> None:
        if id(tensor) in self.given and tensor.requires_grad != requires_grad:
            raise refused_mark(f"{self.given[id(tensor)]} ({trees.describe(tensor)})", requires_grad)


@torch.library.custom_op("funcstage::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def bernoulli(like: Tensor, p: float) -> Tensor:
    """`torch.empty_like(like).bernoulli_(p)`: ATen's functional form draws in another order."""
    return torch.empty_like(like).bernoulli_(p)


@bernoulli.register_fake
def _(like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like)


def _bernoulli(like: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Any:
    if generator is not None:
        return NotImplemented
    return torch.ops.funcstage.bernoulli.default(like, p)


CHECKPOINTED = "checkpointed"
"""Tells, in a node's `meta`, whether the stage wants it to be computed again for the backward, or held."""

_REGION = "region"
_TRACED = (tt.FunctionalTensor, tt.FakeTensor)
_OWN = {torch.ops.aten.bernoulli.p: _bernoulli}
_LEAF_WRITTEN = "leaf Variable that requires grad"  # in autograd's message
_RECURRENT = {
    torch.lstm: recurrent.stacked(recurrent.lstm_step),
    torch.gru: recurrent.stacked(recurrent.gru_step),
    torch.rnn_tanh: recurrent.stacked(recurrent.tanh_step),
    torch.rnn_relu: recurrent.stacked(recurrent.relu_step),
}
