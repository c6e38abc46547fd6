"""Parts of the trace on their own: modes, arguments that are one object, regions, cotangents."""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode

import funcstage as fs
from funcstage.engines.graph.joint import CHECKPOINTED
from funcstage.engines.graph.regions import Regions
from funcstage.engines.graph.trace import _drop_aliases, _recording, _same_objects

MODES: dict[str, Callable[[], Any]] = {
    "gradients": contextlib.nullcontext,
    "none": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_trace_with_a_backward_records_a_tape_and_one_without_has_the_callers_mode(mode: str) -> None:
    with MODES[mode]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with _recording(True):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (True, False)
        with _recording(False):
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_arguments_that_are_one_object_are_so_unless_they_are_differentiated() -> None:
    x, y = torch.ones(2), torch.ones(2)
    leaves = [x, 1, 1, x, y, x, y, None, None, x]
    assert _same_objects(leaves, range(1, 9), []) == [(5, 3), (6, 4)]
    assert _same_objects(leaves, range(10), [5]) == [(3, 0), (6, 4), (9, 0)]
    assert _same_objects(leaves, range(10), [0, 3, 4]) == [(9, 5)]


def test_a_stage_sees_whether_two_of_its_arguments_are_one() -> None:
    def apply(params: Any, buffers: Any, x: Tensor, y: Tensor, z: Tensor) -> Any:
        return (x * 2 if y is z else x * 3 if x is y else x * 5) * params["w"], buffers

    fast = fs.compile(apply, backend="aten")
    x, y = torch.ones(2), torch.ones(2)
    for args, argnums in (((x, y, y), 0), ((y, y, x), ()), ((x, y, x), ())):
        found, expected = (
            fs.stage_vjp(f, {"w": torch.ones(2)}, {}, *args, argnums=argnums)[0] for f in (fast, apply)
        )
        assert torch.equal(found, expected)


class Captures(nn.Module):
    """Casts a parameter that is nobody's, under an autocast of its own that keeps what it casts."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
            return torch.mm(x, CAPTURED)


CAPTURED = nn.Parameter(torch.ones(2, 2))


def test_what_a_trace_has_cast_is_not_in_the_callers_autocast_cache() -> None:
    fast = fs.compile(fs.functionalize(Captures()).apply, backend="aten")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(fs.StageError, match="CAPTURED"):
            fs.stage_vjp(fast, {}, {}, torch.ones(2, 2))
        assert torch.equal(torch.mm(torch.ones(2, 2), CAPTURED), torch.full((2, 2), 2.0).bfloat16())


class Seeing(TorchDispatchMode):
    """Notes the operations that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_trace_computes_nothing_that_modes_around_it_would_see() -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    fast = fs.compile(apply, backend="aten")
    seen = []
    for _ in range(2):  # traced first
        with Seeing() as mode:
            fs.stage_vjp(fast, params, buffers, torch.ones(2, 2))
        seen.append([each for each in mode.seen if each is not torch.ops.aten.ones.default])
    assert seen[0] == seen[1] != []


@pytest.mark.parametrize("seed", range(40))
def test_all_of_a_region_is_computed_again_but_what_is_read_outside_or_kept(seed: int) -> None:
    rng = random.Random(seed)
    graph = Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    of: dict[Node, int | None] = dict.fromkeys(nodes)
    for _ in range(rng.randrange(3, 15)):
        node = graph.call_function(operator.add, tuple(rng.choices(nodes, k=2)))
        of[node] = rng.choice([None, 0, 1])
        nodes.append(node)
    of[nodes[0]] = 0  # what is no operation is not computed at all
    forward = set(nodes[: rng.randrange(2, len(nodes) + 1)])
    parts = [rng.sample(nodes, rng.randrange(3)) for _ in range(4)]
    graph.output(tuple(map(tuple, parts)))
    kept = set(rng.sample(nodes, 2))
    regions = Regions()
    regions._policies = [None, lambda node: node in kept]
    gathered = rng.choice(nodes)
    for node, region in of.items():
        if region is not None:
            node.meta["region"] = region
    if gathered.meta.get("region") is None:
        gathered.meta["gathered"] = True
    regions.mark(graph, forward)
    for node, region in of.items():
        if node.op != "call_function":
            expected = None
        elif region is None:
            expected = True if node is gathered else None
        else:
            outside = any(user in forward and of[user] != region for user in node.users if user in of)
            saved = region == 1 and node in kept
            expected = not (outside or saved or node in parts[0] or node in parts[1])
        assert node.meta.get(CHECKPOINTED) is expected


def test_below_autograd_there_are_no_detached_values_and_no_aliases() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    detached = graph.call_function(torch.ops.aten.detach.default, (x,))
    again = graph.call_function(torch.ops.aten.alias.default, (detached,))
    y = graph.call_function(torch.ops.aten.sin.default, (again,))
    graph.output((y, again))
    _drop_aliases(graph)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]
    assert y.args == (x,)
    assert graph.find_nodes(op="output")[0].args == ((y, x),)
