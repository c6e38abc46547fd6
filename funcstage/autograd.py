"""The split backward of a stage that already ran: the reference's three verbs, on an eager autograd tape.

For code that calls `module(x)` and wants the input's gradient now and the weights' later, with the signatures
of `torch.distributed.pipelining._backward`. It stands beside the two engines of `stage_vjp` and shares only
the errors with them. How it splits:

A node of the tape is on the *input side* if it leads to an input of the stage, and on the *weight side* if it
leads to a weight and to no input. A *site* is an input-side node with an edge into the weight side: a matrix
product, say. I is one engine run towards the inputs, which notes the cotangents that arrive at the sites. W
calls each site by itself, towards its weight-side edges only, and lets the engine take the weight side from
there to the weights. So no operation runs twice, and W never walks what leads to an input: from one site to
the next it would repeat I, and count a tied weight twice (the reference does the one to avoid the other).
Where no input requires grad all is weight side: I does nothing and W is the whole backward.

Not split are operations whose one kernel yields both gradients (fused recurrent layers, a Python
`autograd.Function`): they run in I and in W. A checkpointed region is recomputed for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from funcstage._torch.tape import Edge, call_node, conform, during_backward, output_shapes
from funcstage.engines.node_hooks import hooks_after
from funcstage.engines.rules.group_norm import edges_to_ask_for
from funcstage.errors import ConsumedError, LeafError, StructureError
from funcstage.param_groups import Site, param_groups_of

__all__ = ["Site", "stage_backward", "stage_backward_input", "stage_backward_weight"]

Gradients = tuple[torch.Tensor | None, ...]
"""One gradient per value, `None` where there is none."""


def stage_backward(
    stage_output: Any,
    output_grads: Any,
    input_values: Sequence[Any],
    outputs_with_grads_idxs: Sequence[int] | None = None,
) -> Gradients:
    """Whole backward of a stage: return the gradients of its inputs, accumulate those of its weights.

    Args:
        stage_output: a tensor, or nested tuples, lists and dicts of them. What requires no grad is skipped.
        output_grads: the gradients, nested alike. `None` at a scalar means one, at another tensor or a
            container that nothing flows back from it; `None` as a whole is for scalars, a loss.
        input_values: the stage's inputs, of any type.
        outputs_with_grads_idxs: use only these entries of `stage_output` and `output_grads`.

    Returns:
        The `.grad` of each input, which is reset to `None`; `None` where an input is not a tensor or has no
        gradient.

    Raises:
        StructureError, LeafError: `output_grads` does not match `stage_output`. Nothing is written.

    Source: `stage_backward` of `torch.distributed.pipelining._backward`.
    """
    if outputs_with_grads_idxs is not None:
        stage_output = [stage_output[i] for i in outputs_with_grads_idxs]
        output_grads = [output_grads[i] for i in outputs_with_grads_idxs]
    outputs, cotangents = [], []
    for where, output, cotangent in _flowing(stage_output, output_grads):
        if cotangent is None:
            if output.numel() != 1:
                raise LeafError(
                    f"{where}: expected a gradient of shape {tuple(output.shape)}, got None. Only a scalar "
                    "output may leave it out: pass the gradient that the next stage returned."
                )
            cotangent = torch.ones_like(output)
        outputs.append(output)
        cotangents.append(cotangent)
    inputs = [value if _wants_grad(value) else None for value in _as_list(input_values)]
    for value in inputs:
        if value is not None:
            value.retain_grad()  # a no-op but for inputs that are not leaves
    if outputs:
        torch.autograd.backward(outputs, cotangents)
    gradients = tuple(None if value is None else value.grad for value in inputs)
    for value in inputs:
        if value is not None:
            value.grad = None
    return gradients


def stage_backward_input(
    stage_outputs_or_loss: Any,
    output_grads: Any,
    input_values: Sequence[Any],
    weights: Iterable[torch.Tensor],
) -> tuple[Gradients, list[dict[str, Any]]]:
    """I: the gradients of a stage's inputs, and what W needs later.

    The outputs are left as they are. Dropping them before W frees what the tape holds above the topmost
    site; what lies below lives until W. The cotangents in `param_groups` are held, not copied, and may be
    `output_grads` and the returned gradients themselves: do not write into those before W.

    Args:
        stage_outputs_or_loss: as in `stage_backward`.
        output_grads: as in `stage_backward`, except that `None` as a whole means ones for every output.
        input_values: the stage's inputs, of any type; an input's own history is not walked.
        weights: the weights that W shall have gradients for.

    Returns:
        The gradients of the inputs, also accumulated in their `.grad`, with `None` where an input is not a
        tensor, requires no grad or is not reached; and `param_groups`, dicts that have no weight or site in
        common: "params" (the weights' gradient accumulators), "intermediates" (`Site`s) and "grads" (for each
        site a tuple, one cotangent or `None` per output of its operation). "grads" may be replaced.

    Raises:
        StructureError, LeafError: `output_grads` does not match `stage_outputs_or_loss`. Nothing is written.

    Source: `stage_backward_input` of `torch.distributed.pipelining._backward`; the split is that of
    Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241).
    """
    outputs = [
        (output, torch.ones_like(output) if cotangent is None else cotangent)
        for _, output, cotangent in _flowing(stage_outputs_or_loss, output_grads)
    ]
    values = _as_list(input_values)
    inputs = [value for value in values if _wants_grad(value)]
    roots = [(get_gradient_edge(output), cotangent) for output, cotangent in outputs]
    reached, param_groups = divided(roots, inputs, [*_by_node(_as_list(weights))])

    gradients = {id(value): gradient for value, gradient in zip(inputs, reached, strict=True)}
    for value in {id(value): value for value in inputs}.values():
        if value.is_leaf or value.retains_grad:
            # not in place: what is in `.grad` may be a cotangent that waits for its own W
            value.grad = _add(value.grad, gradients[id(value)])
    return tuple(gradients.get(id(value)) for value in values), param_groups


def divided(
    roots: Sequence[tuple[GradientEdge, torch.Tensor]],
    inputs: Sequence[torch.Tensor | GradientEdge],
    weights: Sequence[Node],
) -> tuple[Gradients, list[dict[str, Any]]]:
    """Run I over places of a tape: `stage_backward_input`, which accumulates nothing.

    Args:
        roots: where the tape begins, each with its cotangent.
        inputs: where its input side ends.
        weights: where its weight side does.

    Returns:
        The gradients of the inputs, and the `param_groups`.
    """
    edges = (get_gradient_edge(value) if isinstance(value, torch.Tensor) else value for value in inputs)
    input_edges = {edge[:2] for edge in edges}
    param_groups = param_groups_of([root for root, _ in roots], input_edges, weights)

    # An output that depends on weights only is a site, and has its cotangent already.
    sites = [site for group in param_groups for site in group["intermediates"]]
    weight_side = {site.node for site in sites if not site.weight_edges}
    cotangents: dict[Node, Gradients] = {}
    above: list[tuple[GradientEdge, torch.Tensor]] = []
    for root, cotangent in roots:
        node, number, _ = root
        if node in weight_side and (node, number) not in input_edges:
            arrived = list(cotangents.get(node, (None,) * len(output_shapes(node))))
            arrived[number] = _add(arrived[number], cotangent)
            cotangents[node] = tuple(arrived)
        else:
            above.append((root, cotangent))

    reached: Gradients = (None,) * len(inputs)
    if above and inputs:
        handles: list[RemovableHandle] = []
        try:
            for site in sites:
                if site.weight_edges:
                    handles.append(site.node.register_prehook(partial(cotangents.__setitem__, site.node)))
            ends, grad_outputs = zip(*above, strict=True)
            reached = torch.autograd.grad(
                ends,
                inputs,  # type: ignore[arg-type]  # the stubs know edges or tensors, not both
                grad_outputs,
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
    for group in param_groups:
        group["grads"] = [cotangents.get(site.node) for site in group["intermediates"]]
    return reached, param_groups


def stage_backward_weight(
    weights: Iterable[torch.Tensor], param_groups: Sequence[dict[str, Any]], retain_graph: bool = False
) -> Gradients:
    """W: accumulate in `.grad` the weights' gradients that `stage_backward_input` left for later.

    It issues its kernels on the current stream, so let that be the stream the forward ran on.

    Args:
        weights: the weights given to `stage_backward_input`, in any order.
        param_groups: what it returned, from one microbatch or from several, concatenated. A caller may
            replace a group's "grads": one tuple per intermediate, `None` where there is no gradient. Where
            the intermediate has one output, the entries of a longer tuple are summed; where it has
            several there is one entry per output, and the missing ones are `None`.
        retain_graph: keep the groups, to be used again. Otherwise "intermediates" and "grads" are deleted
            from each, and with them what they keep alive.

    Returns:
        Each weight's `.grad` after the call; `None` where a weight has no gradient.

    Raises:
        ConsumedError: an earlier call used a group already.
        StructureError, LeafError: a group or its "grads" is not as above. Nothing is consumed or written.

    Source: `stage_backward_weight` of `torch.distributed.pipelining._backward`, which returns what `.grad`
    was *before* the call.
    """
    weights = _as_list(weights)
    by_node = _by_node(weights)
    wanted: dict[Node, torch.Tensor] = {}
    arrived: list[tuple[Site, Gradients]] = []
    for i, group in enumerate(param_groups):
        _check_group(f"param_groups[{i}]", group, by_node)
        wanted.update((node, by_node[node]) for node in group["params"])
        for j, (site, grads) in enumerate(zip(group["intermediates"], group["grads"], strict=True)):
            cotangents = _per_output(f"param_groups[{i}]['grads'][{j}]", site.node, grads)
            if any(cotangent is not None for cotangent in cotangents):
                arrived.append((site, cotangents))

    begins = beginnings(arrived)
    if begins:
        torch.autograd.backward(
            tuple(GradientEdge(*edge) for edge in begins),
            tuple(begins.values()),
            retain_graph=retain_graph,
            inputs=tuple(wanted.values()),
        )
    if not retain_graph:
        for group in param_groups:
            del group["intermediates"], group["grads"]
    return tuple(weight.grad for weight in weights)


def beginnings(arrived: Sequence[tuple[Site, Gradients]]) -> dict[Edge, torch.Tensor]:
    """Call sites: return the gradient at each edge where the weight side begins, summed over the sites.

    Args:
        arrived: the sites, each with a cotangent or `None` per output of its operation.
    """
    begins: dict[Edge, torch.Tensor] = {}

    def call_sites() -> None:
        for site, cotangents in arrived:
            if site.weight_edges:
                gradients: Sequence[torch.Tensor | None] = call_node(site.node, cotangents)
                for hook in hooks_after(site.node):  # in W too, as the reference runs them
                    changed = hook(tuple(gradients), cotangents)
                    gradients = gradients if changed is None else changed
                for slot, edge in site.weight_edges:
                    begin(edge, gradients[slot], cotangents)

    def begin(edge: Edge, gradient: torch.Tensor | None, cotangents: Gradients) -> None:
        if gradient is not None:
            conformed = conform(gradient, edge, not_sharing=cotangents)
            begins[edge] = begins[edge] + conformed if edge in begins else conformed

    for site, cotangents in arrived:
        if not site.weight_edges:
            for number, cotangent in enumerate(cotangents):
                begin((site.node, number), cotangent, cotangents)
    called = [site for site, _ in arrived if site.weight_edges]
    if called:
        # one run for all sites: a checkpointed region is recomputed once per run
        edges = [edge for site in called for _, edge in site.weight_edges]
        edges += [edge for site in called for edge in edges_to_ask_for(site.node)]
        during_backward(edges, call_sites)
    return begins


def _flowing(output: Any, cotangent: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Path, output and cotangent of each output that gradients flow from; `None` only if given as a whole."""
    for where, tensor, grad in _pair("output_grads", output, ... if cotangent is None else cotangent):
        if grad is ...:
            yield where, tensor, None
        elif grad is None and tensor.numel() == 1:
            yield where, tensor, torch.ones_like(tensor)
        elif grad is not None:
            _check_shape(where, grad, tensor.shape)
            yield where, tensor, grad


def _pair(where: str, output: Any, cotangent: Any) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Each tensor that requires grad beside its cotangent; `...` above is `...` at every leaf below."""
    if isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield where, output, cotangent
    elif isinstance(output, (tuple, list, dict)) and cotangent is not None:
        entries = dict(output) if isinstance(output, dict) else dict(enumerate(output))
        if cotangent is ...:
            below: dict[Any, Any] = dict.fromkeys(entries, ...)
        elif isinstance(output, dict) and isinstance(cotangent, dict):
            below = cotangent
        elif not isinstance(output, dict) and isinstance(cotangent, (tuple, list)):
            below = dict(enumerate(cotangent))
        else:
            expected = f"expected a {type(output).__name__} like the output"
            raise StructureError(f"{where}: {expected}, got {_kind(cotangent)}")
        if below.keys() != entries.keys():
            raise StructureError(
                f"{where}: expected entries {[*entries]} like the output, got {[*below]}. Pass None for an "
                "output whose gradient is zero."
            )
        for key, entry in entries.items():
            yield from _pair(f"{where}[{key!r}]", entry, below[key])


def _check_shape(where: str, grad: Any, shape: torch.Size) -> None:
    if not isinstance(grad, torch.Tensor):
        raise StructureError(
            f"{where}: expected a tensor or None, got {_kind(grad)}. Pass a tensor that looks like the "
            "output, or None for zero."
        )
    if grad.shape != shape:
        raise LeafError(
            f"{where}: expected a gradient of shape {tuple(shape)}, like the output that it belongs to, got "
            f"shape {tuple(grad.shape)}. Reshape or expand the gradient first."
        )


def _check_group(where: str, group: Any, weights: dict[Node, torch.Tensor]) -> None:
    if not isinstance(group, dict) or "params" not in group:
        raise StructureError(
            f"{where}: expected a dict from stage_backward_input, got {_kind(group)}. Pass the param_groups "
            "that it returned."
        )
    if "intermediates" not in group:
        raise ConsumedError(
            f"{where}: an earlier stage_backward_weight used this group and freed it. Pass retain_graph=True "
            "to that call to use the group again."
        )
    if "grads" not in group:
        raise StructureError(
            f'{where}: expected an entry "grads", got {[*group]}. Pass the groups of stage_backward_input; '
            'their "grads" may be replaced, not removed.'
        )
    sites, grads = group["intermediates"], group["grads"]
    if not isinstance(grads, (tuple, list)) or len(grads) != len(sites):
        raise StructureError(
            f"{where}['grads']: expected a list of {len(sites)}, a tuple per intermediate, got "
            f"{_kind(grads)}. Keep one entry for each."
        )
    for k, node in enumerate(group["params"]):
        if node not in weights:
            shape = tuple(output_shapes(node)[0])
            raise StructureError(
                f"{where}['params'][{k}]: `weights` lacks this weight of shape {shape}, so its gradient "
                "would be lost. Pass the weights that stage_backward_input was given."
            )


def _per_output(where: str, node: Node, grads: Any) -> Gradients:
    """A site's entry of "grads" as one cotangent per output of its operation."""
    shapes = output_shapes(node)
    if grads is None:  # as stage_backward_input leaves it for a site that no gradient arrived at
        return (None,) * len(shapes)
    if not isinstance(grads, (tuple, list)) or not grads:
        raise StructureError(
            f"{where}: expected a tuple of one or more tensors or None, got {_kind(grads)}. Pass one entry "
            "for each output of the operation."
        )
    if len(shapes) > 1 and len(grads) > len(shapes):
        raise StructureError(
            f"{where}: expected at most {len(shapes)} entries, one for each output of {node.name()}, got "
            f"{len(grads)}. Leave out the others."
        )
    cotangents: list[torch.Tensor | None] = [None] * len(shapes)
    for k, grad in enumerate(grads):
        number = k if len(shapes) > 1 else 0
        if grad is not None:
            _check_shape(f"{where}[{k}]", grad, shapes[number])
            cotangents[number] = _add(cotangents[number], grad)
    return tuple(cotangents)


def _add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _by_node(weights: Sequence[Any]) -> dict[Node, torch.Tensor]:
    for i, weight in enumerate(weights):
        if not isinstance(weight, torch.Tensor):
            raise StructureError(
                f"weights[{i}]: expected a tensor, got {_kind(weight)}. Pass the parameters themselves, as "
                "module.parameters() lists them."
            )
    return {get_gradient_edge(weight).node: weight for weight in weights if weight.requires_grad}


def _wants_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _as_list(values: Any) -> list[Any]:
    """A bare tensor is one value; iterated it would be its rows."""
    return [values] if isinstance(values, torch.Tensor) else list(values)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else repr(value)
