"""Sizes that vary between calls of a compiled stage: one trace serves them, and results are eager's."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcstage as fs
from funcstage.engines.graph import CompiledStage
from funcstage.engines.graph.runners import run_as_python

LENGTHS = (5, 9, 4, 7, 2, 12)


class Attention(nn.Module):
    """Heads, a causal mask that is given or not, and a gated unit."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 32), nn.Linear(16, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Scaled(nn.Module):
    """Numbers made from the length: as a float, a slice, a tensor's size, and in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.positions = nn.Parameter(torch.randn(64, 4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        n = x.shape[1]
        y = (x + self.positions[:n]) @ self.weight * n**-0.5
        ramp = torch.arange(n, dtype=x.dtype)[:, None] / n
        return {"y": F.pad(y * ramp, (0, 0, 1, n // 2)), "length": n, "mean": y.sum(1) / n}


class Branching(nn.Module):
    """Takes another way where the length is even."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.sin() if x.shape[1] % 2 == 0 else y.exp()


class Sum(nn.Module):
    """Two inputs whose lengths are one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.linear(x)
        return z * y, z.square()


def call(function: Callable[..., Any], module: nn.Module, *args: Tensor, seed: int = 0) -> None:
    """Compare a call through a stage function with eager: outputs, buffers and gradients, to the last bit."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    params = {name: p.detach() for name, p in module.named_parameters()}
    torch.manual_seed(seed)
    output, buffers, pullback = fs.stage_vjp(function, params, before, *args)
    after = torch.get_rng_state()
    inputs = [arg.clone().requires_grad_(arg.is_floating_point()) for arg in args]
    torch.manual_seed(seed)
    expected = module(*inputs)
    assert torch.equal(after, torch.get_rng_state())
    got, right = (torch.utils._pytree.tree_leaves(tree) for tree in (output, expected))
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    for name, buffer in module.named_buffers():
        assert torch.equal(buffers[name], buffer)
    tensors = [leaf for leaf in right if isinstance(leaf, Tensor)]
    cotangents = [torch.randn_like(leaf) for leaf in tensors]
    seeds = iter(cotangents)
    grads = [next(seeds) if isinstance(leaf, Tensor) else None for leaf in got]
    structure = torch.utils._pytree.tree_structure(output)
    dx, weight_pullback = pullback(torch.utils._pytree.tree_unflatten(grads, structure))
    torch.autograd.backward(tensors, cotangents)
    for ours, given in zip(dx, inputs, strict=True):
        assert (ours is None) == (given.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, given.grad, rtol=0, atol=0)
    weights = weight_pullback()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(weights[name], parameter.grad, rtol=0, atol=0)
        parameter.grad = None


STAGES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "attention": (Attention, lambda n: (torch.randn(2, n, 8),)),
    "attention with a mask": (Attention, lambda n: (torch.randn(2, n, 8), torch.rand(n, n) < 0.9)),
    "any batch and length": (Attention, lambda n: (torch.randn(n // 2 + 2, n, 8),)),
    "numbers": (Scaled, lambda n: (torch.randn(2, n, 4),)),
    "two inputs": (Sum, lambda n: (torch.randn(n, 4), torch.randn(n, 4))),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        lambda n: (torch.randn(2, 3, n + 2, n + 3),),
    ),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 1)),
        lambda n: (torch.randn(2, 3, n, n + 1).to(memory_format=torch.channels_last),),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)),
        lambda n: (torch.randint(10, (2, n)),),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 2)),
        lambda n: (torch.randn(n, 4),),
    ),
    "transposed": (lambda: nn.Linear(4, 3), lambda n: (torch.randn(4, n).t(),)),
    "part of a larger tensor": (lambda: nn.Linear(4, 3), lambda n: (torch.randn(2, 30, 4)[:, :n],)),
    "expanded": (lambda: nn.Linear(4, 3), lambda n: (torch.randn(1, 4).expand(n, 4),)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("stage", STAGES)
def test_lengths_that_vary_share_a_trace(stage: str, dynamic: bool | None) -> None:
    make, arguments = STAGES[stage]
    torch.manual_seed(0)
    module = make()
    compiled = fs.compile(fs.functionalize(module).apply, backend="aten", dynamic=dynamic)
    for seed, n in enumerate(LENGTHS):
        call(compiled, module, *arguments(n), seed=seed)
    assert len(compiled._traced) <= (1 if dynamic else 3)


def test_sizes_of_one_and_none_are_traced_apart() -> None:
    module = Attention()
    compiled = fs.compile(fs.functionalize(module).apply, backend="aten", dynamic=True)
    for n in (5, 1, 6, 1):
        call(compiled, module, torch.randn(2, n, 8))
    assert len(compiled._traced) == 2
    linear = nn.Linear(4, 4)
    compiled = fs.compile(fs.functionalize(linear).apply, backend="aten", dynamic=True)
    for n in (5, 0, 1, 7):
        call(compiled, linear, torch.randn(n, 4))
    assert len(compiled._traced) == 3


def test_a_length_that_takes_another_way_is_traced_for_it() -> None:
    module = Branching()
    compiled = fs.compile(fs.functionalize(module).apply, backend="aten", dynamic=True)
    for n in (4, 5, 6, 7, 8):
        call(compiled, module, torch.randn(2, n, 4))
    assert len(compiled._traced) == 2


def test_lengths_that_were_one_and_no_longer_are_are_no_match() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = self.linear(x)
            return z * y if len(x) == len(y) else z + y.sum(0)

    module = Broadcast()
    compiled = fs.compile(fs.functionalize(module).apply, backend="aten", dynamic=True)
    for n, m in ((5, 5), (6, 6), (6, 3), (4, 7), (9, 9)):
        call(compiled, module, torch.randn(n, 4), torch.randn(m, 4))


@pytest.mark.parametrize("options", [{"dynamic": False}, {"cuda_graphs": True}], ids=str)
def test_without_dynamic_and_for_cuda_graphs_each_length_is_traced_apart(options: dict[str, bool]) -> None:
    module = nn.Linear(4, 4)
    compiled = fs.compile(fs.functionalize(module).apply, backend="aten", **options)
    for n in (5, 6, 7):
        call(compiled, module, torch.randn(n, 4))
    assert len(compiled._traced) == 3


def test_what_reads_values_is_refused_as_for_one_length() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)[x.sum(-1) > 0]

    apply, params, buffers = fs.functionalize(Counts())
    compiled = fs.compile(apply, backend="aten", dynamic=True, fullgraph=True)
    with (
        pytest.warns(UserWarning, match="cannot be traced with open sizes"),
        pytest.raises(fs.StageError, match="value of a tensor"),
    ):
        fs.stage_vjp(compiled, params, buffers, torch.randn(5, 4))


@pytest.mark.parametrize("absent", [0, 1])
def test_absent_cotangents_of_any_length(absent: int) -> None:
    module = Sum()
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten", dynamic=True)
    for n in LENGTHS:
        x, y = torch.randn(n, 4), torch.randn(n, 4)
        cotangents = [torch.randn(n, 4), torch.randn(n, 4)]
        cotangents[absent] = None  # type: ignore[call-overload]
        results = []
        for function in (compiled, apply):
            _, _, pullback = fs.stage_vjp(function, params, buffers, x, y)
            dx, weight_pullback = pullback(tuple(cotangents))
            results.append((dx, weight_pullback()))
        torch.testing.assert_close(results[0], results[1])


def test_w_of_any_length_is_split_summed_and_retained() -> None:
    module = Attention()
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten", dynamic=True)
    sums = []
    for function in (compiled, apply):
        torch.manual_seed(0)
        held = []
        for n in LENGTHS:
            output, _, pullback = fs.stage_vjp(function, params, buffers, torch.randn(2, n, 8))
            held.append(pullback(torch.randn_like(output))[1])
        total = fs.stage_backward_weight(held[:3])
        again = held[3](retain=True)
        torch.testing.assert_close(held[3](), again)
        pieces = held[4].split(3)
        sums.append(fs.stage_backward_weight([held[5], *pieces], accumulate=total))
    torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize("remat", ["none", "full", 0.5])
def test_any_remat_takes_any_length(remat: Any) -> None:
    module = Attention()
    compiled = fs.compile(fs.functionalize(module).apply, backend="aten", remat=remat, dynamic=True)
    for n in LENGTHS:
        call(compiled, module, torch.randn(2, n, 8))
    assert len(compiled._traced) == 1


def test_a_plan_of_an_open_length_is_that_of_the_length_it_was_traced_for() -> None:
    apply, params, buffers = fs.functionalize(Attention())
    compiled, fixed = (fs.compile(apply, backend="aten", dynamic=dynamic) for dynamic in (True, False))
    x = torch.randn(2, 6, 8)
    plan, expected = (c.plan(params, buffers, x) for c in (compiled, fixed))
    assert plan.held_after_forward == expected.held_after_forward
    assert plan.flops == expected.flops


def test_copies_keep_the_choice() -> None:
    compiled = fs.compile(fs.functionalize(nn.Linear(4, 4)).apply, backend="aten", dynamic=True)
    assert copy.copy(compiled).dynamic is True
    again: CompiledStage = pickle.loads(pickle.dumps(compiled))
    assert again.dynamic is True


@pytest.mark.parametrize("wrong", ["yes", 1.5, 2, [True]])
def test_other_choices_are_refused(wrong: Any) -> None:
    with pytest.raises(fs.StructureError, match="dynamic must be"):
        fs.compile(fs.functionalize(nn.Linear(4, 4)).apply, dynamic=wrong)


def test_cuda_graphs_of_any_length_are_refused() -> None:
    with pytest.raises(fs.StructureError, match="fixed sizes"):
        fs.compile(fs.functionalize(nn.Linear(4, 4)).apply, cuda_graphs=True, dynamic=True)


@pytest.mark.slow
def test_inductor_compiles_once_for_all_lengths() -> None:
    torch.manual_seed(0)
    module = Attention()
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, dynamic=True)
    for n in LENGTHS:
        x = torch.randn(2, n, 8)
        output, _, pullback = fs.stage_vjp(compiled, params, buffers, x)
        cotangent = torch.randn_like(output)
        (dx,), weight_pullback = pullback(cotangent)
        given = x.clone().requires_grad_()
        expected = module(given)
        expected.backward(cotangent)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(dx, given.grad)
        for name, gradient in weight_pullback().items():
            parameter = module.get_parameter(name)
            torch.testing.assert_close(gradient, parameter.grad)
            parameter.grad = None
    assert len(compiled._traced) == 1


@pytest.mark.parametrize(
    ("written", "name"), [("x", r"args\[0\]"), ("y", r"args\[1\]"), ("weight", "weight")]
)
def test_a_write_after_f_names_the_leaf_where_lengths_are_open(written: str, name: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.first(x) * self.weight).exp() * y

    apply, params, buffers = fs.functionalize(Scaled())
    given = {"x": torch.randn(4, 3), "y": torch.randn(4, 3), "weight": params["weight"].detach()}
    stage = fs.compile(apply, backend="aten", dynamic=True)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, given["x"], given["y"])
    given[written].add_(1)
    with pytest.raises(fs.WrittenError, match=f"^{name}|{name}'"):
        pullback(torch.ones_like(output))[1]()


@pytest.mark.parametrize("absent", [0, 1])
def test_a_part_of_any_length_that_has_no_cotangent_counts_as_zeros_beside_the_other(absent: int) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.linear(x).chunk(2, -1)

    module = Parts()
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", dynamic=True)
    for n in (4, 5, 7):
        x = torch.randn(n, 3)
        outputs, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        cotangents = [None if i == absent else torch.randn_like(y) for i, y in enumerate(outputs)]
        (dx,), weight_pullback = pullback(tuple(cotangents))
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        module(leaf)[1 - absent].backward(cotangents[1 - absent])
        torch.testing.assert_close(dx, leaf.grad)
        for name, grad in weight_pullback().items():
            torch.testing.assert_close(grad, module.get_parameter(name).grad)


def test_what_a_backend_assumes_of_a_length_holds_where_its_program_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[int] = []

    def lower(graph: Any, donated: Any) -> Any:
        """A backend whose kernels take lengths that are multiples of four alone."""
        lengths = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        assert all(length % 4 == 0 for length in lengths if isinstance(length, torch.SymInt))
        run = run_as_python(graph, donated)

        def noted(inputs: Any) -> Any:
            ran.extend(given for given in inputs if isinstance(given, int))
            return run(inputs)

        return noted

    monkeypatch.setattr(sys.modules[CompiledStage.__module__], "_backend", lambda name, repeated: ({}, lower))
    torch.manual_seed(0)
    module = Scaled()
    fast = fs.compile(fs.functionalize(module).apply, backend="aten", dynamic=True)
    for length in (8, 12, 6, 4, 7, 9):
        before = len(ran)
        call(fast, module, torch.randn(4, length, 4))
        assert (len(ran) > before) == (length % 4 == 0)
    assert len(fast._traced) == 1
    assert {*ran} == {8, 12, 4}


def test_who_has_waited_for_a_trace_of_another_length_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(4, 4))
    stage = fs.compile(apply, backend="aten")
    traces, trace = [], stage._trace
    monkeypatch.setattr(stage, "_trace", lambda *args: traces.append(args) or trace(*args))

    class Lock:
        """Another thread takes it first, for another length."""

        waiting = True

        def __enter__(self) -> None:
            if self.waiting:
                self.waiting = False
                stage.plan(params, buffers, torch.ones(3, 4))

        def __exit__(self, *error: object) -> None:
            pass

    stage.plan(params, buffers, torch.ones(2, 4))
    monkeypatch.setattr(stage, "_lock", Lock())
    x = torch.ones(5, 4)
    output, _, _ = fs.stage_vjp(stage, params, buffers, x)
    torch.testing.assert_close(output, F.linear(x, params["weight"], params["bias"]))
    assert len(traces) == 2
