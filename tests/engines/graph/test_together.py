"""I and W as one program: the same gradients, and what W computes stands beside the messages of I."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from both_ways import stage_of
from pipeline_ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.fx import Graph, GraphModule
from torch.nn import functional as F

import funcstage as fs
from funcstage.engines.graph import programs
from funcstage.engines.graph.overlap import awaits_message, is_message
from funcstage.engines.graph.together import handing_on, together
from funcstage.pipelining import FunctionalPipelineStage
from tests.support.graph_programs import program_of, ran

pytestmark = pytest.mark.timeout(600)

WIDTH, HIDDEN = 4, 8


class Block(nn.Module):
    """A perceptron on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def by_columns(module: nn.Module) -> nn.Module:
    for block in module.children():
        parallelize_module(block, mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return module


def in_sequence(module: nn.Module) -> nn.Module:
    split = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=False)
    for block in module.children():
        plan = {
            "": split,
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(block, mesh(), plan)
    return module


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {"columns": by_columns, "sequence": in_sequence}


class Lowered(list[GraphModule]):
    """The programs that are lowered while it is entered, in order; what they return has its names."""

    def __enter__(self) -> Lowered:
        self.step = programs.Programs._step

        def step(self_: Any, program: Any, *args: Any, **kwargs: Any) -> Any:
            results = program.module.graph.output_node().args[0]
            assert [node is None for node in results] == [name is None for name in program.results]
            self.append(program.module)
            return self.step(self_, program, *args, **kwargs)

        programs.Programs._step = step  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        programs.Programs._step = self.step  # type: ignore[method-assign]


def full(leaf: Any) -> Any:
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def spans(graph: Graph) -> list[tuple[str, bool]]:
    """Each message whose result is waited for, in order: is there a product between it and that wait?"""
    names = [node.name for node in graph.nodes]
    sent = [wait.all_input_nodes[0] for wait in graph.nodes if awaits_message(wait)]
    found = []
    for message in sorted(sent, key=lambda node: names.index(node.name)):
        between = names[names.index(message.name) : names.index(min(message.users).name)]
        found.append((message.name, any(name.startswith("mm") for name in between)))
    return found


def beside_eager(rank: int, group: Any, kind: str, engine: str, diff: bool) -> list[list[tuple[str, bool]]]:
    """Three microbatches by `stage_backward`, beside the whole module; what its programs compute when."""
    whole = blocks()
    apply, params, buffers = fs.functionalize(KINDS[kind](blocks()))
    stage = stage_of(apply, engine)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
        given = x.clone().requires_grad_()
        whole.zero_grad()
        expected = whole(given)
        expected.sin().sum().backward()
        here = distribute_tensor(x, mesh(), [Shard(1)]) if kind == "sequence" else x
        output, _, pullback = fs.stage_vjp(stage, params, buffers, here, argnums=(0,) if diff else ())
        with Lowered() as lowered:
            (dx,), grads = fs.stage_backward(pullback, output.cos())
        found += [spans(module.graph) for module in lowered if any(map(is_message, module.graph.nodes))]
        torch.testing.assert_close(full(output), expected.detach())
        if diff:
            torch.testing.assert_close(full(dx), given.grad)
        for name, parameter in whole.named_parameters():
            assert getattr(grads[name], "placements", None) == getattr(params[name], "placements", None)
            torch.testing.assert_close(full(grads[name]), parameter.grad)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("diff", [True, False], ids=["of inputs too", "of parameters alone"])
@pytest.mark.parametrize("engine", ["aten", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_at_once_is_one_program_in_which_sums_travel_beside_products(
    kind: str, engine: str, diff: bool
) -> None:
    for programs_that_send in run(2, beside_eager, kind, engine, diff):
        (found,) = programs_that_send
        sums = "all_reduce" if kind == "columns" else "reduce_scatter"
        assert [beside for name, beside in found if name.startswith(sums)] == [True, True]


def apart(rank: int, group: Any) -> list[tuple[str, bool]]:
    apply, params, buffers = fs.functionalize(by_columns(blocks()))
    compiled = fs.compile(apply, backend="aten")
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    return spans(compiled.programs(params, buffers, x).input_grad.graph)


@pytest.mark.slow
def test_in_an_i_of_its_own_they_travel_beside_none() -> None:
    for found in run(2, apart):
        assert [beside for _, beside in found] == [False, False]


class Twice(nn.Module):
    """Two outputs, of which one may have no cotangent."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = by_columns(blocks())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.blocks
        y = first(x)
        return y, second(y)


def with_absent(rank: int, group: Any, dynamic: bool) -> int:
    """Cotangents that are absent, batches of other sizes, and gradients that are added into others."""
    whole = blocks()
    apply, params, buffers = fs.functionalize(Twice())
    compiled = fs.compile(apply, backend="aten", dynamic=dynamic)
    for rows, absent in ((3, 1), (4, 0), (4, 1), (5, 2)):
        torch.manual_seed(rows)
        x = torch.randn(rows, 6, WIDTH, dtype=torch.float64, requires_grad=True)
        whole.zero_grad()
        y = whole[0](x)
        outputs = [y, whole[1](y)]
        kept = [i for i in range(2) if i != absent]
        torch.autograd.backward([outputs[i] for i in kept], [outputs[i].detach().cos() for i in kept])
        found, _, pullback = fs.stage_vjp(compiled, params, buffers, x.detach())
        given = tuple(output.cos() if i in kept else None for i, output in enumerate(found))
        (dx,), grads = fs.stage_backward(pullback, given)
        torch.testing.assert_close(dx, x.grad)
        for name, parameter in whole.named_parameters():
            grad = grads[f"blocks.{name}"]
            assert (grad is None) == (parameter.grad is None), name
            torch.testing.assert_close(full(grad), parameter.grad)
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_cotangents_may_be_absent_and_sizes_open(dynamic: bool) -> None:
    assert run(2, with_absent, dynamic) == [1, 1]


def written(rank: int, group: Any) -> list[str]:
    """Write what W alone reads between F and both, see nothing consumed, and take it back."""
    apply, params, buffers = fs.functionalize(by_columns(blocks()[:1]))  # type: ignore[arg-type]
    params = {**params, "in": torch.randn(WIDTH, WIDTH, dtype=torch.float64)}

    def stage(params: Any, buffers: Any, x: Tensor) -> Any:
        own = {name: p for name, p in params.items() if name != "in"}
        return apply(own, buffers, F.linear(x, params["in"]))

    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    compiled = fs.compile(stage, backend="aten", fullgraph=True)
    output, _, pullback = fs.stage_vjp(compiled, params, buffers, x)
    x.add_(1)
    with pytest.raises(fs.WrittenError) as error:
        fs.stage_backward(pullback, output)
    assert not pullback.consumed
    return [str(error.value)]


@pytest.mark.slow
def test_what_w_alone_reads_must_not_be_written_before() -> None:
    for (message,) in run(2, written):
        assert "args[0]" in message


def offloaded(rank: int, group: Any) -> int:
    """Residuals that were away, and values that somebody else holds, too."""
    apply, params, buffers = fs.functionalize(by_columns(blocks()))
    compiled = fs.compile(apply, backend="aten")
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    output, _, pullback = fs.stage_vjp(compiled, params, buffers, x)
    again = copy.copy(pullback)
    (wanted,), weight_pullback = pullback(output)
    expected = weight_pullback()
    (dx,), grads = fs.stage_backward(fs.offload(again), output)
    torch.testing.assert_close(dx, wanted)
    torch.testing.assert_close(*({n: full(g) for n, g in each.items()} for each in (grads, expected)))
    return 1


@pytest.mark.slow
def test_pullbacks_that_were_copied_or_away_run_at_once_too() -> None:
    assert run(2, offloaded) == [1, 1]


def piped(rank: int, group: Any) -> list[list[tuple[str, bool]]]:
    """A step of 1F1B by one stage, which has gradients to add to from its second microbatch on."""
    alone = [dist.new_group([each]) for each in range(2)][rank]
    whole, module = blocks(), by_columns(blocks())
    stage = FunctionalPipelineStage(module, 0, 1, "cpu", group=alone, compile={"backend": "aten"})
    x, target = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with Lowered() as lowered:
        Schedule1F1B(stage, 3, loss_fn=F.mse_loss).step(x, target=target)
    for rows, wanted in zip(x.chunk(3), target.chunk(3), strict=True):
        (F.mse_loss(whole(rows), wanted) / 3).backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(full(module.get_parameter(name).grad), parameter.grad)
    return [spans(each.graph) for each in lowered if any(map(is_message, each.graph.nodes))]


@pytest.mark.slow
def test_b_of_a_pipelines_stage_is_one_program() -> None:
    for of_f, of_b in run(2, piped):
        assert len(of_f) == 2
        assert [beside for _, beside in of_b] == [True, True]


def of_inputs(a: Tensor, b: Tensor, cotangent: Tensor) -> list[Tensor | None]:
    """The gradient of an input, none of another, and what W reads."""
    scaled = cotangent * torch.tensor([1.0, 2.0, 3.0])
    return [scaled @ a, None, scaled.sin(), b.exp()]


def of_weights(a: Tensor, b: Tensor, cotangent: Tensor, one: Tensor, two: Tensor) -> list[Tensor | None]:
    return [one @ b, None, two * torch.tensor([1.0, 2.0, 3.0]) + cotangent, two]


def test_i_and_w_in_one_compute_what_both_do_with_constants_and_what_one_hands_to_the_other() -> None:
    given = [torch.randn(3, 3) for _ in range(3)]
    *input_grads, one, two = of_inputs(*given)
    expected = [*input_grads, None, None, *of_weights(*given, one, two)]  # type: ignore[arg-type]
    first = program_of(of_inputs, *given)
    second = program_of(of_weights, *given, one, two)  # type: ignore[arg-type]
    assert first.inputs == second.inputs[:3]
    joint = SimpleNamespace(module=second.module, placeholders=[], n_state=0)
    joined = together(joint, first, second, second.inputs[3:], first.inputs[2:])  # type: ignore[arg-type]
    found = ran(joined, dict(zip(first.inputs, given, strict=True)))
    assert [name is not None for name in joined.results] == [each is not None for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)  # type: ignore[arg-type]
    rest, names = handing_on(second)
    assert rest.inputs == (names[0], *names[2:])
    handed = dict(zip(names, expected[4:], strict=True))
    again = ran(rest, handed)  # type: ignore[arg-type]
    assert all(ours is theirs for ours, theirs in zip(again, handed.values(), strict=True))
