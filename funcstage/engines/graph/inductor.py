"""Lowering with TorchInductor, called directly: no Dynamo, so no guards on the call path.

All of torch's private Inductor API is imported here.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import CodeGen

from funcstage._torch.inductor import (
    BoxedBool,
    ConcatKernel,
    TensorBox,
    TracingContext,
    V,
    compile_fx_inner,
    config,
    detect_fake_mode,
    lowerings,
    make_fallback,
    register_lowering,
    select_decomp_table,
    tracing,
)
from funcstage._torch.shapes import SYMBOLIC, hint
from funcstage.engines.graph.joint import is_random
from funcstage.engines.graph.nodes import is_cheap, is_view
from funcstage.engines.graph.overlap import is_message
from funcstage.engines.graph.runners import Runner, run_as_python
from funcstage.state.ambient import autocast_off


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The decompositions that Inductor expects to have been made before it."""
    with config.patch(_OPTIONS):
        table = select_decomp_table()
    # Torch before 2.13 takes this one apart even then, into draws in another order than eager's.
    return {operation: body for operation, body in table.items() if operation is not _RRELU}


def lower(module: GraphModule, donated: Collection[str]) -> Runner:
    """Compile a program; the results keep the strides that the trace gave them.

    Args:
        module: a boxed program; left as it is.
        donated: names of the inputs that it may overwrite after their last use.

    Returns:
        The compiled program, boxed as well. Where Inductor fails, the program as it is, with a warning.
    """
    graph = Graph()
    results = graph.graph_copy(module.graph, {})
    assert isinstance(results, tuple)
    n_results = len(results)
    # Inductor leaves out what nobody reads, but a draw moves the generator on.
    unread = [_first_result(node) for node in graph.nodes if is_random(node) and not node.users]
    graph.output((*results, *unread))
    graph.set_codegen(CodeGen())
    (output,) = graph.find_nodes(op="output")
    visible = [i for i, result in enumerate(output.args[0]) if result is not None]
    output.meta["user_visible_output_idxs"] = visible
    if not any(node.op == "call_function" for node in graph.nodes):
        return module.forward
    _write_parts_in_place(graph)
    low_on_cpu = _round_as_eager(graph)
    constants = _as_inputs(graph, module)
    nodes = graph.find_nodes(op="placeholder")
    for node in nodes:
        _rename(node, node.name in donated)
    examples = [node.meta["val"] for node in nodes]
    if any(map(_hides_open_sizes, examples)):
        return run_as_python(module, donated)
    fake_mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
    assert fake_mode is not None
    if fake_mode.shape_env is None:
        fake_mode.shape_env = ShapeEnv()  # without one, Inductor looks nothing up in its cache
    wanted = [None if node is None else _strides(node.meta["val"]) for node in results]
    context = TracingContext(fake_mode)
    places = [i for i, node in enumerate(nodes) if node.name.startswith(_DONATED)]
    context.fw_metadata = _Donation(places)  # type: ignore[assignment]
    try:
        options = {**_OPTIONS, "emulate_precision_casts": low_on_cpu}
        if any(map(is_message, graph.nodes)):
            options["reorder_for_peak_memory"] = False  # it does not know of what travels meanwhile
        # Autocast is in the program already; Inductor runs operations on fake tensors to learn their dtypes.
        with autocast_off(), config.patch(options), V.set_fake_mode(fake_mode), tracing(context):
            compiled = compile_fx_inner(
                GraphModule(module, graph), examples, cudagraphs=BoxedBool(False), is_backward=True
            )
    except Exception as error:  # of many types, by where it fails
        # F may have run already, and what it holds fits either way of running I and W.
        warnings.warn(
            f"TorchInductor cannot compile a program of this stage, which therefore runs operation by "
            f"operation, as with backend='aten': {error}",
            stacklevel=2,
        )
        return run_as_python(module, donated)
    orders = _orders(wanted, getattr(compiled, "output_strides", None) or ())
    if not constants and not unread and not orders:
        return compiled

    def run(inputs: list[Tensor]) -> Any:
        inputs += constants
        found = [*compiled(inputs)[:n_results]]
        for i, order in orders.items():
            found[i] = _laid_out(found[i], order)
        return found

    return run


def _hides_open_sizes(value: Any) -> bool:
    """Whether a value has open sizes and no elements: Inductor's code (torch 2.14) never reads its sizes."""
    sizes = value.shape if isinstance(value, Tensor) else ()
    return any(isinstance(n, int) and n == 0 for n in sizes) and any(isinstance(n, SYMBOLIC) for n in sizes)


def _round_as_eager(graph: Graph) -> bool:
    """Round to low precision after each operation, also where Inductor fuses several.

    What one program has stored and what another computes again must be the same number, however each is
    fused: `x - mean(x)` of two different `x` may be anything.

    Returns:
        Whether some of it is computed on the CPU, where Inductor takes roundings before a cast back unless
        it is told not to. (Elsewhere that option would forbid fused multiplications and additions, too.)
    """
    on_cpu = False
    for node in graph.nodes:
        value = node.meta.get("val")
        low = getattr(value, "dtype", None) in (torch.bfloat16, torch.float16)
        if low and node.op == "call_function":
            node.meta["low_precision_pointwise_barrier"] = True
            node._rename(f"rounded_{node.name}")  # for Inductor's cache, which does not look at `meta`
            on_cpu |= value.is_cpu
    return on_cpu


def _strides(value: Tensor) -> list[int]:
    return [hint(stride) for stride in value.stride()]


def _orders(wanted: Sequence[list[int] | None], strides: Sequence[Any]) -> dict[int, list[int]]:
    """The results that Inductor lays out otherwise than the trace, each with its dimensions, outermost first.

    It may do so with a result that is the operand of a matrix product, too.

    Args:
        wanted: the strides of the trace, read before Inductor, whose passes note others on the nodes.
        strides: those that Inductor says it gives.
    """
    orders = {}
    for i, (trace, now) in enumerate(zip(wanted, strides, strict=False)):
        if trace is not None and now is not None and [*map(str, trace)] != [*map(str, now)]:
            orders[i] = sorted(range(len(trace)), key=trace.__getitem__, reverse=True)
    return orders


def _laid_out(result: Tensor, order: list[int]) -> Tensor:
    back = sorted(range(len(order)), key=order.__getitem__)
    return result.permute(order).contiguous().permute(back)


def _first_result(node: Node) -> Node:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return node
    with node.graph.inserting_after(node):
        first = node.graph.call_function(operator.getitem, (node, 0))
    first.meta["val"] = value[0]
    return first


def _as_inputs(graph: Graph, module: GraphModule) -> list[Tensor]:
    """Turn the tensors that the stage has captured into inputs, the last ones, and return them.

    Inductor would copy them into the program, which would then not see what is written into them.
    """
    captured: dict[str, Node] = {}
    last = (graph.find_nodes(op="placeholder") or [graph._root])[-1]
    for node in graph.find_nodes(op="get_attr"):
        if not isinstance(getattr(module, node.target), Tensor):
            continue  # a graph that an operator runs
        if node.target not in captured:
            with graph.inserting_after(last):
                captured[node.target] = last = graph.placeholder(f"primals_{node.name}")
            last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(captured[node.target])
        graph.erase_node(node)
    return [getattr(module, name) for name in captured]


class _Donation(NamedTuple):
    """The one part of AOTAutograd's metadata that is read below it, and only of backward programs."""

    bw_donated_idxs: list[int]


_DONATED = "donated_"


def _rename(node: Node, donated: bool) -> None:
    """Name an input as Inductor's memory planning expects it: it frees what is not named as below.

    The name also tells its cache, which does not look at what is donated, two such programs apart.
    """
    if donated:
        name = _DONATED + node.name
    else:
        name = node.name.replace("state_", "primals_").replace("cotangent_", "tangents_")
    node._rename(name)
    node.target = node.name


def _write_parts_in_place(graph: Graph) -> None:
    """Let concatenations whose parts are computed from the same values be written part by part.

    Inductor would make each a kernel that selects a part for every element: it reads what all parts are
    made from once for each, and fuses with nothing else that reads it. Written part by part, the two halves
    of a gated unit's gradient and the recomputed unit itself become one kernel with one read.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts = node.args[0]
        reads_once = all(map(_is_mapped, parts)) and set.intersection(*map(_sources, parts))
        if reads_once and not any(map(_is_mapped, _beyond_views(node))):
            node.target = torch.ops.funcstage.cat.default
            node.args = (parts, *(node.args[1:] or (0,)))


def _is_mapped(node: Node) -> bool:
    return is_cheap(node) and not is_view(node)


def _beyond_views(node: Node) -> Iterator[Node]:
    for user in node.users:
        if is_view(user):
            yield from _beyond_views(user)
        else:
            yield user


def _sources(node: Node) -> set[Node]:
    """The values that a node is computed from by mapping and moving elements alone."""
    sources: set[Node] = set()
    stack, seen = [node], {node}
    while stack:
        for read in stack.pop().all_input_nodes:
            if read not in seen:
                seen.add(read)
                (stack.append if is_cheap(read) else sources.add)(read)
    return sources


@torch.library.custom_op("funcstage::cat", mutates_args=())
def cat(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, whose parts Inductor computes where they belong in the result."""
    return torch.cat(parts, dim)


@cat.register_fake
def _(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim)


@register_lowering(torch.ops.funcstage.cat.default)
def _(parts: list[Any], dim: int) -> Any:
    return TensorBox(ConcatKernel.create(parts, dim % len(parts[0].get_size())))


_RRELU = torch.ops.aten.rrelu_with_noise_functional.default
if _RRELU not in lowerings:
    make_fallback(_RRELU, warn=False, override_decomp=True)

_OPTIONS = {"fallback_random": True}
"""Random numbers as eager draws them, for the same seed."""
