"""What a trace cannot record, or has recorded and must not: said by the stage's leaf or line."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from funcstage._torch import functorch as ft
from funcstage._torch import tracing as tt
from funcstage._torch.messages import (
    FUNCTIONAL_WRITES_REAL,
    LEAF_WRITTEN,
    NESTED_IN_TRACE,
    NO_STRIDES,
    NO_VALUES,
    ORDERED_EFFECT,
    PLAIN_AMONG_DTENSORS,
    SAVED_WRITTEN,
    is_raised_by_stage,
    says,
)
from funcstage._torch.operators import OpOverload, writes
from funcstage._torch.pytree import tree_leaves
from funcstage.dtensors import unwrapped
from funcstage.effects import refused_write
from funcstage.engines.graph.blame import line_of
from funcstage.engines.graph.joint import is_random
from funcstage.engines.rules import control_flow
from funcstage.errors import PurityError, TraceError, stage_name
from funcstage.residuals import leaves_behind
from funcstage.state.argument_containers import WAY_OUT, Containers
from funcstage.state.captured import refuse_trainable as refuse_captured
from funcstage.state.kept import State


class ReadsValue(TraceError):
    """A stage reads the value of a tensor, which no trace knows; parts of it may not."""


class Shown(Exception):
    """A stage writes a tensor out as text, in which a trace has no values."""


SHOWING = {Tensor.__repr__, Tensor.__format__}


def refuse_random_backward(apply: Callable[..., Any], first: Node) -> None:
    """What is drawn after the forward would be drawn at other times than in eager."""
    node = first
    while node.op != "output":
        if is_random(node) and "backward" not in str(node.target):  # attention's is given its seed
            raise TraceError(
                f"{stage_name(apply)} draws random numbers in its backward ({node.target}). A compiled stage "
                "would draw them at another time than eager does. Draw them in the forward."
            )
        node = node.next


def check_recorded(apply: Callable[..., Any], module: GraphModule) -> None:
    """Refuse what a graph cannot express: mutation, and tensors left over from other traces."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), tt.FakeTensor):
            raise TraceError(
                f"{stage_name(apply)} reads a tensor of another trace: one that it kept in an earlier call, "
                "which a pure function cannot do, or one of a trace inside, as torch.func.linearize makes. "
                "Return what is kept as a buffer."
            )
        if isinstance(node.target, OpOverload) and writes(node.target):
            raise TraceError(
                f"{stage_name(apply)} calls {node.target}, which writes in place and cannot be traced. Use "
                "an operator that returns its result."
            )
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                layout = str(value.layout).removeprefix("torch.")
                raise TraceError(
                    f"{stage_name(apply)} makes a tensor of {layout} layout ({node.target}), and a trace "
                    "loses its gradients. Keep it dense."
                )
        if node.target is torch.ops.aten._efficientzerotensor.default:
            node.target = torch.ops.aten.zeros.default  # which has memory, as a gradient must


def refuse_writes(owner: str, containers: Containers) -> None:
    """Refuse a stage that has written into a list, or the like, among its arguments."""
    for each in containers.changed():
        raise TraceError(
            f"{owner} writes into {each.name}, a {type(each.given).__qualname__}. A compiled stage would do "
            f"so only in its first call. {WAY_OUT}"
        )


def refuse_trainable(apply: Callable[..., Any], outputs: list[Tensor]) -> None:
    """Refuse a stage whose outputs depend on trainable tensors which it was not handed."""
    leaves = leaves_behind(outputs)
    real = (leaf for leaf in leaves if not isinstance(ft.innermost(unwrapped([leaf])[0][0]), TRACED))
    refuse_captured(real, apply)


@contextmanager
def refusing_changes(owner: str, module: nn.Module | None) -> Iterator[None]:
    """Refuse a backward that leaves something on its module: programs would do that only while traced."""
    before = State(module)
    yield
    changed = [_where(*pair) for pair in before.changed()]
    if changed:
        raise TraceError(
            f"{owner} changes its module in its backward ({changed[0]}), by a hook or a custom function. A "
            "compiled stage would do so only while it is traced. Do it in the forward, or leave the stage "
            "uncompiled."
        )


def _where(holder: Any, contents: Any) -> str:
    if not isinstance(holder, dict):
        return f"a {type(holder).__name__}"
    keys = [key for key in {**holder, **contents} if holder.get(key, holder) is not contents.get(key, holder)]
    return ", ".join(map(repr, keys))


def warn_of_changes(owner: str) -> None:
    """Say why a stage is traced in every call."""
    warnings.warn(
        f"{owner} changes in its forward what it reads there (an array, an object with slots, a global), so "
        "that it has been traced in every call. Keep plain values in attributes, lists and dicts of the "
        "module, register tensors as buffers, or pass in what changes and return it.",
        stacklevel=3,
    )


def warn_of_parts(refusal: ReadsValue) -> None:
    """Say which stage runs uncompiled but for some of its parts, and why."""
    warnings.warn(
        f"{refusal} It runs uncompiled, except for those of its submodules that can be traced. "
        "fullgraph=True raises this as an error, fullgraph=False silences it.",
        stacklevel=2,
    )


def impure(
    apply: Callable[..., Any], which: str = "a tensor that it was given", leaf: str = ""
) -> PurityError:
    """The refusal of a write into something given, a leaf where its name is known."""
    module = getattr(apply, "module", None)
    parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    frozen = leaf in {f"buffers[{name!r}]" for name in parameters}
    return refused_write(f"{stage_name(apply)} writes into {which}", frozen=frozen)


def captured(owner: str, which: str) -> PurityError:
    return PurityError(
        f"{owner} writes in place into a tensor that it captured from outside ({which}). A compiled stage "
        "would not repeat the write. Register the tensor as a buffer (in __init__; where the first call does "
        "so, call the module once before functionalize), or update a clone of it."
    )


def refusal_of(apply: Callable[..., Any], error: Exception) -> Exception:
    """Say where the trace stopped; errors that the stage itself raises are passed on."""
    if isinstance(error, RuntimeError) and says(error, LEAF_WRITTEN):
        # What is given are views of leaves; a leaf is one that the stage has made itself.
        return error if str(error).startswith("a leaf") else impure(apply)
    name = control_flow.operator_behind(error)
    if name is not None:
        return TraceError(control_flow.refusal(stage_name(apply), name))
    if says(error, FUNCTIONAL_WRITES_REAL):
        return captured(stage_name(apply), f"at {line_of(error)}")
    if is_raised_by_stage(error) and error.__context__ is None:
        return error  # another may be its answer to a limit of the trace
    where = line_of(error)
    owner = stage_name(apply)
    names = {
        m: f"{owner}.{n}" if n else owner for n, m in getattr(apply, "module", nn.Module()).named_modules()
    }
    for frame, _ in traceback.walk_tb(error.__traceback__):
        holder = frame.f_locals.get("self")
        owner = names.get(holder, owner) if _is_module(holder) else owner
    reason = str(error).partition("\n")[0].removesuffix(".") or type(error).__name__
    if says(reason, NESTED_IN_TRACE):
        reason = "it makes a nested tensor; compute on padded tensors with a mask, or on packed values"
    if says(reason, ORDERED_EFFECT):
        reason = (
            f"it calls {reason.rpartition(' ')[2]}, which a graph cannot hold in its place in time; the "
            "collectives of torch.distributed._functional_collectives return new tensors"
        )
    if says(reason, PLAIN_AMONG_DTENSORS):
        reason = (
            f"{reason}. Is it handed all of its DTensors? A sharded module belongs into an attribute or an "
            "nn.ModuleList, not into a list"
        )
    if reason.endswith(NO_STRIDES):
        layout = reason.removesuffix(NO_STRIDES)
        reason = f"it reads a tensor in a compressed sparse layout ({layout}); use tensor.to_dense()"
    if says(reason, SAVED_WRITTEN):
        reason = (
            "it overwrites in place what it has read before and what a gradient needs, such as a buffer that "
            "it reads and updates several times; clone it where it is read, or assign the new value"
        )
    kind = TraceError
    if isinstance(error, (*tt.UNTRACEABLE, Shown)) or says(reason, NO_VALUES):
        kind, reason = ReadsValue, f"it reads the value of a tensor ({reason})"
        if torch.is_anomaly_enabled() and where is None:
            kind = TraceError
            reason = "anomaly mode looks at the values of gradients; turn it off around compiled stages"
    at = "" if where is None else f", at {where}"
    return kind(f"{owner} cannot be traced{at}: {reason}.")


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


TRACED = (tt.FunctionalTensor, tt.FakeTensor)
