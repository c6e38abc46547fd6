"""The passes on their own, and what a new release of torch could bring that they do not know."""

import itertools
import operator
import random
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import funcstage as fs
from funcstage.engines.base import StageCall
from funcstage.engines.graph import compile
from funcstage.engines.graph.crossing import _cut, _movable
from funcstage.engines.graph.decompose import DECOMPOSED, decompose
from funcstage.engines.graph.mincut import nbytes
from funcstage.engines.graph.nodes import is_view
from funcstage.engines.graph.partition import partition
from funcstage.engines.graph.plan import Phase
from funcstage.engines.graph.trace import trace

SERVES_INPUTS_ALONE = {
    # attention: query, key and value are activations
    "_cudnn_attention_backward",
    "_efficient_attention_backward",
    "_flash_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_fused_attention_overrideable_backward",
    # image and grid are activations
    "_grid_sampler_2d_cpu_fallback_backward",
    "cudnn_grid_sampler_backward",
    # the matrix products of a cell are operations of their own
    "_thnn_fused_gru_cell_backward",
    "_thnn_fused_lstm_cell_backward_impl",
    # sums over the batch that the input gradient needs as well
    "batch_norm_backward_reduce",
    # elementwise, with a scale for a parameter
    "_fake_quantize_learnable_per_channel_affine_backward",
    "_fake_quantize_learnable_per_tensor_affine_backward",
}
SERVES_WEIGHTS_ALONE = {"_weight_norm_interface_backward", "mkldnn_linear_backward_weights"}
NEVER_TRACED = {"matmul_backward"}
"""Of nested tensors, which are refused."""
TRACED_APART = {
    "mkldnn_rnn_layer_backward",
    "_cudnn_rnn_backward",
    "miopen_rnn_backward",
    "lstm_mps_backward",
}
"""Recurrent layers, which are traced step by step."""


def backward_operations() -> dict[str, Any]:
    """ATen's backward operations with more than one result that can turn up in a trace, by name."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if name == schema.name or "backward" not in name or len(schema.returns) < 2:
            continue
        operation = getattr(getattr(torch.ops.aten, name), schema.overload_name or "default")
        composite = operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        if not composite and not any(argument.is_out for argument in schema.arguments):
            found[name] = operation
    return found


def test_every_backward_operation_with_several_gradients_is_known() -> None:
    known = SERVES_INPUTS_ALONE | SERVES_WEIGHTS_ALONE | NEVER_TRACED | TRACED_APART
    known |= {operation._schema.name.removeprefix("aten::") for operation in DECOMPOSED}
    for name, operation in backward_operations().items():
        masked = any(argument.name == "output_mask" for argument in operation._schema.arguments)
        assert masked or name in known, f"teach funcstage.engines.graph.decompose about {operation}"


def test_the_walk_finds_the_operations_that_it_is_for() -> None:
    assert {"convolution_backward", "native_layer_norm_backward"} <= backward_operations().keys()


def joint_of(module: nn.Module, x: Tensor) -> Any:
    apply, params, buffers = fs.functionalize(module)
    return decompose(trace(StageCall.of(apply, params, buffers, (x,), {}, [0]), DECOMPOSED, copied=False))


def test_gradients_of_norms_are_summed_where_their_terms_are_at_hand() -> None:
    joint = joint_of(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)), torch.randn(2**16, 8))
    parts = partition(joint, "min_cut")
    small = [name for name in parts.from_input if parts.nbytes[name] == 8 * 4]
    assert small, parts.nbytes
    assert parts.summed == {*small}
    parts = partition(joint, "min_cut", sites=True)
    assert not parts.summed
    assert all(parts.nbytes[name] > 8 * 4 for name in parts.from_input)


class Scaled(nn.Module):
    """A norm whose scales alone are trained, and a product behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(256), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


@pytest.mark.parametrize("remat", ["min_cut", "full"])
def test_w_maps_what_is_held_anyway_rather_than_i_writes_it(remat: Any) -> None:
    parts = partition(joint_of(Scaled(), torch.randn(32, 256)), remat)
    assert {*parts.for_weight} > {"arg_0", "rsqrt", "cotangent_0"}, "rather than the product of the first two"
    large = [name for name in parts.from_input if parts.nbytes[name] == 32 * 256 * 4]
    assert len(large) == 2, "the cotangent and its product with the weight"
    assert sum(parts.nbytes[name] for name in parts.for_weight) <= (3 + 1 / 64) * 32 * 256 * 4


class Selective(nn.Module):
    """A region that has a product saved and, as its policy may say, what follows that is cheap, too."""

    def __init__(self, *saved: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.saved = saved

    def forward(self, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, [*self.saved])
        return checkpoint(
            lambda x: self.last(self.first(x).tanh().sin()), x, use_reentrant=False, context_fn=contexts
        )


@pytest.mark.parametrize("remat", ["none", "min_cut", "full", lambda node: False])
@pytest.mark.parametrize("saved", [(), ("mm",), ("tanh",), ("mm", "sin")])
def test_what_a_region_is_to_save_crosses_and_nothing_else_of_it(saved: tuple[str, ...], remat: Any) -> None:
    aten = torch.ops.aten
    module = Selective(*[getattr(aten, name).default for name in saved])
    parts = partition(joint_of(module, torch.randn(4, 8)), remat)
    crossing = {name.partition("_")[0] for name in parts.after_forward}
    assert crossing == {"arg", *saved}, parts.after_forward


def test_an_operand_that_i_makes_of_what_is_held_is_not_made_again_by_w() -> None:
    parts = partition(joint_of(nn.Sequential(nn.GELU(), nn.Linear(8, 8)), torch.randn(4, 8)), "min_cut")
    weight = [node.target for node in parts.weight_grad.module.graph.nodes]
    assert torch.ops.aten.gelu.default not in weight
    assert parts.after_forward == ("arg_0",)


def test_the_programs_mutate_nothing() -> None:
    parts = partition(
        joint_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.ones(2, 4)), "none"
    )
    for program in (parts.forward, parts.input_grad, parts.weight_grad):
        targets = [node.target for node in program.module.graph.nodes if node.op == "call_function"]
        assert not any(target._schema.is_mutable for target in targets if hasattr(target, "_schema"))


def planned(module: nn.Module, x: Tensor, remat: Any) -> Any:
    apply, params, buffers = fs.functionalize(module)
    return fs.compile(apply, backend="aten", remat=remat).plan(params, buffers, x)


def test_where_i_computes_everything_again_w_is_given_its_matrix_products() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    plan = planned(module, torch.randn(2, 4), "full")
    assert plan.input_grad.recomputed_flops > 0
    assert plan.weight_grad.recomputed_flops == 0


def test_the_gradient_of_a_learned_slope_is_computed_apart_from_that_of_its_input() -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.PReLU(3), nn.Linear(3, 3)))
    programs = fs.compile(apply, backend="aten").programs(params, buffers, torch.randn(4, 3))
    assert not any(
        "prelu_kernel_backward" in node.name for program in programs for node in program.graph.nodes
    )


def test_what_stands_for_operations_with_several_gradients_computes_them() -> None:
    aten = torch.ops.aten
    x, grad, weight = torch.randn(4, 3), torch.randn(4, 3), torch.randn(3)
    x[0] = 0
    stand_in = DECOMPOSED[aten._prelu_kernel_backward.default]
    for ours, theirs in zip(
        stand_in(grad, x, weight), aten._prelu_kernel_backward(grad, x, weight), strict=True
    ):
        assert torch.equal(ours, theirs)
    _, mean, invstd = aten.native_batch_norm(x, weight, weight, None, None, True, 0.1, 1e-3)
    expected = aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, invstd, True, 1e-3, [True, True, True]
    )
    for operation in (aten.cudnn_batch_norm_backward.default, aten.miopen_batch_norm_backward.default):
        found = DECOMPOSED[operation](x, grad, weight, None, None, mean, invstd, 1e-3)
        assert all(map(torch.equal, found, expected))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_constant_that_a_forward_makes_is_no_residual() -> None:
    assert planned(Weighted(), torch.randn(2, 4), "none").forward_to_input == 0


def test_a_plan_is_a_data_frame_with_a_row_for_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def frame(rows: Any, columns: Any) -> Any:
        given.append((rows, columns))
        return given

    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=frame))
    plan = planned(nn.Linear(4, 4), torch.randn(2, 4), "none")
    assert plan.to_pandas() is given
    rows = [("F", *plan.forward), ("I", *plan.input_grad), ("W", *plan.weight_grad)]
    assert given == [(rows, ["program", *Phase._fields])]


class DropoutInAttention(nn.Module):
    """Attention that draws in its kernel, whose backward is given the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.5)[0]
        return attended


def test_attention_with_dropout_runs_in_f_and_its_backward_in_i() -> None:
    apply, params, buffers = fs.functionalize(DropoutInAttention().to("meta"))
    x = torch.empty(2, 8, 16, device="meta")
    programs = fs.compile(apply, backend="aten").programs(params, buffers, x)
    found = [
        [node.target for node in program.graph.nodes if "attention" in str(node.target)]
        for program in programs
    ]
    forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert found == [[forward], [torch.ops.aten._scaled_dot_product_efficient_attention_backward.default], []]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_inductors_programs_agree_with_eager(training: bool) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8))
    apply, params, buffers = fs.functionalize(module.train(training))
    fast = compile(apply)
    x, cotangent = torch.randn(4, 8), torch.randn(4, 8)
    results = []
    for stage in (apply, fast):
        torch.manual_seed(1)
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        (dx,), weight_pullback = pullback(cotangent)
        results.append([output, dx, *weight_pullback().values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Cut(NamedTuple):
    """A problem that the partition has to solve; for the fields see `_cut`."""

    nodes: list[Node]
    demand: list[Node]
    again: set[Node]
    free: set[Node]
    unsaved: set[Node]

    def computable(self, node: Node) -> bool:
        entry = node.target is operator.getitem
        return node in self.again and (not entry or node.args[0] in self.again)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Random graphs of values of random sizes, views of them, and operations with several results."""
    graph = Graph()
    nodes: list[Node] = []
    tensors: list[Node] = []
    random = draw(st.randoms(use_true_random=True))  # evenly spread: Hypothesis' own choices are mostly small

    def some(nodes: list[Node], most: int) -> list[Node]:
        return random.sample(nodes, min(len(nodes), random.randint(1, most)))

    def add(target: Any, args: tuple[Any, ...], value: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta["val"] = value
        nodes.append(node)
        if isinstance(value, Tensor):
            tensors.append(node)
        return node

    def tensor() -> Tensor:
        return torch.empty(random.randint(1, 6), dtype=torch.uint8, device="meta")

    for _ in range(draw(st.integers(1, 40))):
        kind = random.choice(["value", "value", "value", "view", "pair"])
        reads = some(tensors[-8:], 3)
        if kind == "view" and reads:
            add(torch.ops.aten.view.default, (reads[0], [-1]), reads[0].meta["val"].view(-1))
        elif kind == "pair":
            pair = add(divmod, (reads,), (tensor(), tensor()))
            for i in range(2):
                add(operator.getitem, (pair, i), pair.meta["val"][i])
        else:
            add(operator.add, (reads,), tensor())
    again = {node for node in nodes if random.random() < 0.8}
    free = {node for node in tensors if not node.all_input_nodes and random.random() < 0.2}
    return Cut(nodes, some(tensors, 10), again, free, again if random.random() < 0.2 else set())


def least_bytes(cut: Cut) -> float:
    """The minimum cut of the whole graph: every node split in two, infinite edges along the data flow."""
    flow = nx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    for node in cut.nodes:
        computable = cut.computable(node)
        if isinstance(node.meta["val"], Tensor) and not (computable and node in cut.unsaved):
            flow.add_edge((node, "in"), (node, "out"), capacity=nbytes(node))
        else:
            flow.add_edge((node, "in"), (node, "out"))
        for read in node.all_input_nodes:
            if computable and read not in cut.free:
                flow.add_edge((read, "out"), (node, "in"))
        if not computable and node not in cut.free:
            flow.add_edge("source", (node, "in"))
    for node in cut.demand:
        if node not in cut.free:
            flow.add_edge((node, "out"), "sink")
    return nx.minimum_cut_value(flow, "source", "sink")


@settings(deadline=None)
@given(cuts())
def test_residuals_take_as_few_bytes_as_any_from_which_the_far_side_can_be_computed(cut: Cut) -> None:
    saved = _cut(cut.demand, cut.again, cut.free, cut.unsaved)
    assert sum(map(nbytes, saved)) == least_bytes(cut)
    at_hand = {*saved, *cut.free}
    for node in cut.nodes:
        if cut.computable(node) and at_hand.issuperset(node.all_input_nodes):
            at_hand.add(node)
    assert at_hand.issuperset(cut.demand)
    assert all(isinstance(node.meta["val"], Tensor) for node in saved)
    assert not any(node in cut.unsaved and cut.computable(node) for node in saved)
    assert saved == [node for node in cut.nodes if node in set(saved)]
    for node in saved:  # a view costs what it looks into costs, which serves others as well
        assert not (is_view(node) and cut.computable(node)) or node.args[0] in cut.free | cut.unsaved


def cut_of(seed: int) -> Cut:
    """A graph of so few values that all cuts can be tried, many of which cost the same."""
    rng = random.Random(seed)
    graph = Graph()
    nodes: list[Node] = []
    for _ in range(rng.randrange(2, 8)):
        reads = rng.sample(nodes, rng.randrange(min(len(nodes), 2) + 1))
        if len(reads) == 1 and rng.random() < 0.3:
            node = graph.call_function(torch.ops.aten.view.default, (reads[0], [-1]))
            node.meta["val"] = reads[0].meta["val"].view(-1)
        else:
            node = graph.call_function(operator.add, (reads,))
            node.meta["val"] = torch.empty(rng.randrange(1, 4), dtype=torch.uint8, device="meta")
        nodes.append(node)
    again = {node for node in nodes if rng.random() < 0.9}
    free = {node for node in nodes if not node.all_input_nodes and rng.random() < 0.2}
    return Cut(nodes, rng.sample(nodes, rng.randrange(1, min(len(nodes), 3) + 1)), again, free, set())


@pytest.mark.parametrize("seed", range(150))
def test_of_residuals_of_as_few_bytes_those_are_saved_that_leave_least_to_compute(seed: int) -> None:
    cut = cut_of(seed)

    def left(saved: set[Node]) -> set[Node] | None:
        """What the far side computes, views apart; None where it cannot."""
        stack, found = [node for node in cut.demand if node not in cut.free], set[Node]()
        while stack:
            node = stack.pop()
            if node in saved or node in found:
                continue
            if not cut.computable(node):
                return None
            found.add(node)
            stack += [read for read in node.all_input_nodes if read not in cut.free]
        return {node for node in found if not is_view(node)}

    subsets = (set(s) for k in range(len(cut.nodes) + 1) for s in itertools.combinations(cut.nodes, k))
    possible = [(sum(map(nbytes, s)), computed) for s in subsets if (computed := left(s)) is not None]
    least = min(held for held, _ in possible)
    saved = {*_cut(cut.demand, cut.again, cut.free, cut.unsaved)}
    assert sum(map(nbytes, saved)) == least
    computed = left(saved)
    assert computed is not None
    assert all(len(computed) <= len(other) for held, other in possible if held == least)


MIB = 2**20


@pytest.mark.parametrize("seed", range(60))
def test_what_i_may_compute_for_w_is_mapped_and_summed_and_belongs_to_a_sum_that_saves_a_mebibyte(
    seed: int,
) -> None:
    rng = random.Random(seed)
    graph = Graph()
    aten = torch.ops.aten
    nodes: list[Node] = []
    kinds: dict[Node, str] = {}
    for _ in range(rng.randrange(3, 14)):
        kind = rng.choice(["map", "map", "sum", "mean", "product", "given"]) if nodes else "given"
        reads = rng.sample(nodes, rng.randrange(1, min(len(nodes), 2) + 1)) if kind != "given" else []
        target = {
            "map": aten.add.Tensor,
            "sum": aten.sum.dim_IntList,
            "mean": aten.mean.dim,
            "product": aten.mm.default,
        }
        node = (
            graph.placeholder(f"p{len(nodes)}")
            if kind == "given"
            else graph.call_function(target[kind], (*reads,))
        )
        small = rng.choice([8, 1024])
        size = {"sum": small, "mean": small}.get(kind, rng.choice([MIB - 1, MIB, MIB + 8, MIB + 1024]))
        node.meta["val"] = torch.empty(size, dtype=torch.uint8, device="meta")
        nodes.append(node)
        kinds[node] = kind
    deferred = {node for node in nodes if kinds[node] != "given" and rng.random() < 0.8}

    def may_move(node: Node) -> bool:
        mapped = node in deferred and kinds[node] in ("map", "sum", "mean")
        return mapped and all(map(may_move, (read for read in node.all_input_nodes if read in deferred)))

    def saves(node: Node) -> int:
        return sum(map(nbytes, node.all_input_nodes)) - nbytes(node)

    large = {n for n in nodes if kinds[n] in ("sum", "mean") and may_move(n) and saves(n) >= MIB}

    def is_behind(later: Node, earlier: Node) -> bool:
        return later is earlier or any(is_behind(read, earlier) for read in later.all_input_nodes)

    expected = {
        n for n in nodes if may_move(n) and any(is_behind(n, big) or is_behind(big, n) for big in large)
    }
    assert _movable(graph, deferred) == expected
