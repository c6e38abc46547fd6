"""Engine 1: the split by two nested `torch.func` levels, without tracing.

The stage runs once, under an outer gradient level that wraps the differentiated inputs and an inner one
that wraps the parameters. An operation that reads a parameter (a *site*) runs under both: from its one
kernel launch the inner level records the weight side and the outer level the input side. Its output
then leaves the inner level, so that no later operation continues the weight side of this one; what
remains there, the inner tape from the site's output to the parameters, is the closure retained for W.
All other operations run under the outer level alone. In the terms of `torch.func.vjp`: the outer level
is one vjp over the inputs; the inner one is a vjp over the parameters for every site, with the sites
sharing a level instead of opening one each, which saves most of the host time.

I is one reverse pass over the outer tape that also yields the cotangent at every site's output; W is
one reverse pass over the inner tape from the sites' outputs, seeded with those cotangents. A value made
of parameters alone (a transposed or normalised weight, an embedded token) never leaves the inner level:
its gradient is W's business throughout. With no differentiated input there is no outer level, nothing
for I to do, and W is the whole backward (`first_stage.py` divides it when asked to).
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch.dynamo import uncompiled
from funcstage._torch.interception import intercepting
from funcstage._torch.modes import gradients
from funcstage.engines.base import Linearized, StageCall, is_differentiated
from funcstage.engines.levels.explain import explaining, refuse_saved_tensor_hooks
from funcstage.engines.levels.first_reads import FirstReads
from funcstage.engines.levels.mode import Split
from funcstage.engines.levels.regions import Rerunnable
from funcstage.engines.levels.reverse import Entries, Origin
from funcstage.engines.levels.tape import InputTape
from funcstage.functional import checked_result
from funcstage.residuals import (
    Switchboard,
    saving_outside,
)
from funcstage.state import captured, kept
from funcstage.state.argument_containers import Containers, are_among
from funcstage.state.contents import Held
from funcstage.state.guise import looking_alike
from funcstage.state.identity import watching_identity
from funcstage.state.module import ModuleState, state_with
from funcstage.trees import Buffers


def linearize(call: StageCall, *, rerun: bool = False, held: Held | None = None) -> Linearized[InputTape]:
    """Run a stage function once and retain what its two reverse passes need.

    Args:
        call: of the stage function.
        rerun: whether this is a checkpointed region that is run again. Regions inside of it are not run
            again in turn, as nothing is computed a third time.
        held: what the module behind the stage holds now, where that is known.

    Returns:
        The output and the new buffers, free of wrappers, and the tape.

    Raises:
        PurityError: if the stage mutates a tensor that it was given or has captured.
        StageError: if saved-tensor hooks are in use, or a captured tensor requires grad.
        TakesGradients: if the stage takes gradients inside itself, and a plain tape can be used instead.
    """
    apply = call.apply
    param_leaves, params_spec = call.of_params
    arg_leaves, args_spec = call.arg_leaves, call.args_spec
    kwarg_leaves, kwargs_spec = call.of_kwargs
    state = call.state
    higher = is_differentiated(param_leaves) or is_differentiated(arg_leaves)
    inputs: Entries = []
    switchboard = Switchboard()
    with ExitStack() as stack:
        handed = kept.objects_among((*arg_leaves, *kwarg_leaves))
        stack.enter_context(kept.taken_out(call.module, handed, held))
        stack.enter_context(explaining(call.given, higher or rerun))
        transformed = ft.current_level() > 0
        if transformed:
            stack.enter_context(saving_outside(switchboard))
        else:
            refuse_saved_tensor_hooks(stack)
            if not higher:  # kernels look at the mode under all levels, the fused LSTM's for one
                stack.enter_context(gradients(on=True))
        outer = None
        if call.diff:
            outer = stack.enter_context(ft.grad_level())
            stack.enter_context(gradients(on=True))
            arg_leaves = list(arg_leaves)
            inputs = ft.wrap_leaves(arg_leaves, call.diff, outer)
        inner = stack.enter_context(ft.grad_level())
        stack.enter_context(gradients(on=True))
        param_leaves = list(param_leaves)
        wanted = [i for i, leaf in enumerate(param_leaves) if trees.is_differentiable(leaf)]
        weights = ft.wrap_leaves(param_leaves, wanted, inner)
        mode = Split(outer, inner, call.given, [*arg_leaves, *kwarg_leaves])
        mode.alone = not (transformed or higher or rerun)
        if mode.alone:
            mode.rerunnable = Rerunnable(call.module, state, switchboard, linearize)
            if outer is None:
                mode.first_reads = FirstReads([*arg_leaves, *kwarg_leaves])
        stage_args, stage_kwargs = trees.unflatten(args_spec, arg_leaves), call.kwargs
        containers = None
        if are_among(args_spec) or are_among(kwargs_spec):
            stage_kwargs = trees.unflatten(kwargs_spec, kwarg_leaves)
            containers = Containers((call.args, call.kwargs), (stage_args, stage_kwargs))
        looks = looking_alike(call.name, call.arg_leaves, arg_leaves)
        pairs = zip(call.of_params[0], param_leaves, strict=True)
        twins = call.twins_with(held)
        watch = watching_identity(call.name, twins, [*arg_leaves, *kwarg_leaves], [*pairs])
        with mode, looks, intercepting(mode), uncompiled(), watch:
            result = apply(
                trees.unflatten(params_spec, param_leaves), call.buffers, *stage_args, **stage_kwargs
            )
        output, new_buffers = checked_result(apply, result)
        output_leaves, output_spec = trees.flatten(output)
        exits = [mode.leave(leaf).of(type(leaf)) for leaf in output_leaves]
        mode.check_nodes(call.name, exits)
        buffer_leaves, buffers_spec = trees.flatten(new_buffers)
        new_buffers = trees.unflatten(buffers_spec, [mode.leave(leaf).value for leaf in buffer_leaves])
    output = trees.unflatten(output_spec, (exit.value for exit in exits))
    if mode.alone and any(isinstance(exit.value, Tensor) and exit.value.requires_grad for exit in exits):
        captured.refuse_trainable(mode.captured(), apply)
    captured.refuse_trainable(mode.trainable, apply)
    if containers is not None:
        containers.give_back(call.name)
    modules = _held(call, new_buffers) if mode.calls_back and not mode.had_regions else []
    origin = Origin(
        len(arg_leaves), len(param_leaves), state, switchboard, modules, weights, higher, mode.had_apart
    )
    tape = InputTape(
        origin,
        roots=[(i, exit.outer) for i, exit in enumerate(exits) if exit.outer is not None],
        inputs=inputs,
        sites=mode.sites,
        derived=[(i, exit.inner) for i, exit in enumerate(exits) if exit.inner is not None],
        hooked=mode.hooked,
        shared=False,
        home={},
        captured=[*mode.plain.values()],
        first_reads=[] if mode.first_reads is None or mode.hooked else [*mode.first_reads.edges],
    )
    return Linearized(output, new_buffers, tape)


def _held(call: StageCall, new_buffers: Buffers) -> list[ModuleState]:
    """What the modules of a stage hold, for functions of its own that run in the reverse passes.

    Regions borrow the module themselves, in threads of autograd's.
    """
    if not (isinstance(call.params, dict) and isinstance(new_buffers, dict)):
        return []
    return state_with(call.module, {**new_buffers, **call.params})
