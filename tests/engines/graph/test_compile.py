"""The compiled engine against plain eager autograd, through generated Python over ATen."""

import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import funcstage as fs
from funcstage.engines.graph import CompiledStage, compile
from funcstage.engines.graph.compile import WARN_SIGNATURES
from funcstage.errors import TraceError
from funcstage.testing import check_stage

compiling = importlib.import_module("funcstage.engines.graph.compile")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class First(nn.Module):
    """A module's first output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Tied(nn.Module):
    """A weight used on two branches, one through another layer, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.b(self.a(x).relu()), "z": self.a(x).square().sum()}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.linear(x)
        y[:, :2] = 0
        return y.mul_(2).relu_()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        return self.used(x)


class TransposedDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.transpose(0, 1), 0.5) * 2


def images(*shape: int) -> tuple[Tensor]:
    return (torch.randn(2, *shape),)


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), images(8)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1), images(4, 9)),
    "conv2d grouped": lambda: (nn.Conv2d(4, 8, 3, groups=2), images(4, 6, 6)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2), images(2, 4, 4, 4)),
    "conv transposed": lambda: (nn.ConvTranspose2d(4, 3, 3, stride=2), images(4, 5, 5)),
    "layer norm": lambda: (nn.LayerNorm(8), images(8)),
    "group norm": lambda: (nn.GroupNorm(2, 8), images(8, 5)),
    "batch norm": lambda: (nn.BatchNorm2d(3), images(3, 4, 4)),
    "batch norm, evaluated": lambda: (nn.BatchNorm2d(3).eval(), images(3, 4, 4)),
    "instance norm": lambda: (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), images(3, 7)),
    "rms norm": lambda: (nn.RMSNorm(8), images(8)),
    "weight norm": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), images(8)),
    "embedding": lambda: (nn.Embedding(10, 4), (torch.randint(0, 10, (3, 4)),)),
    "embedding bag": lambda: (nn.EmbeddingBag(10, 4, mode="mean"), (torch.randint(0, 10, (3, 4)),)),
    "prelu": lambda: (nn.PReLU(8), images(8)),
    "bilinear": lambda: (nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))),
    "attention": lambda: (Attention(), images(4, 8)),
    "encoder layer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), images(4, 8)),
    "gru": lambda: (First(nn.GRU(8, 6, batch_first=True, bidirectional=True)), images(3, 8)),
    "rnn": lambda: (First(nn.RNN(8, 6)), images(3, 8)),
    "lstm": lambda: (First(nn.LSTM(8, 6, 2)), images(3, 8)),
    "lstm cell": lambda: (First(nn.LSTMCell(8, 6)), images(8)),
    "tied": lambda: (Tied(), images(8)),
    "in place": lambda: (InPlace(), images(8)),
    "checkpointed": lambda: (Checkpointed(), images(8)),
    "unused": lambda: (Unused(), (torch.randn(2, 8), torch.randn(3))),
    "dropout": lambda: (nn.Dropout(0.5), images(8)),
    "dropout of a view": lambda: (TransposedDropout(), images(4, 8)),
    "channel dropout": lambda: (nn.Dropout2d(0.5), images(4, 3, 3)),
    "alpha dropout": lambda: (nn.AlphaDropout(0.5), images(8)),
}
FUSED_IN_EAGER = {"lstm": 1e-5}  # oneDNN runs a layer as one kernel


def leaves(tree: Any) -> list[Any]:
    return optree.tree_leaves(tree, none_is_leaf=True)


def eager(apply: Any, params: Any, buffers: Any, args: tuple[Any, ...], seed: int = 1) -> list[Any]:
    """Outputs, new buffers, input gradients and parameter gradients of the plain tape."""
    torch.manual_seed(seed)
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    args = tuple(a.detach().requires_grad_(a.is_floating_point()) for a in args)
    output, new_buffers = apply(params, buffers, *args)
    outputs = leaves(output)
    inputs = [leaf for leaf in (*args, *leaves(params)) if leaf.requires_grad]
    grads = iter(torch.autograd.grad(outputs, inputs, [torch.cos(o) for o in outputs], allow_unused=True))
    found = [next(grads) if leaf.requires_grad else None for leaf in (*args, *leaves(params))]
    return [*outputs, *leaves(new_buffers), *found]


def split(apply: Any, params: Any, buffers: Any, args: tuple[Any, ...], seed: int = 1) -> list[Any]:
    torch.manual_seed(seed)
    output, new_buffers, pullback = fs.stage_vjp(apply, params, buffers, *args)
    input_grads, weight_pullback = pullback(optree.tree_map(torch.cos, output))
    return [*leaves(output), *leaves(new_buffers), *leaves(input_grads), *leaves(weight_pullback())]


def assert_same(ours: list[Any], theirs: list[Any], tolerance: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def functionalized(name: str) -> tuple[Any, Any, Any, tuple[Tensor, ...]]:
    module, args = CASES[name]()
    return *fs.functionalize(module), args


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("remat", ["none", "min_cut", "full"])
@pytest.mark.parametrize("name", CASES)
def test_results_are_bitwise_those_of_eager(name: str, remat: Any) -> None:
    apply, params, buffers, args = functionalized(name)
    fast = compile(apply, backend="aten", remat=remat)
    for seed in (1, 2):
        ours, theirs = (f(g, params, buffers, args, seed) for f, g in ((split, fast), (eager, apply)))
        assert_same(ours, theirs, FUSED_IN_EAGER.get(name, 0.0))


def eager_flops(apply: Any, params: Any, buffers: Any, args: tuple[Any, ...], weights: bool) -> int:
    params = {name: p.detach().requires_grad_(weights) for name, p in params.items()}
    args = tuple(a.detach().requires_grad_(a.is_floating_point()) for a in args)

    def run() -> None:
        outputs = leaves(apply(params, buffers, *args)[0])
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    return flops(run)


@pytest.mark.parametrize("remat", ["none", "min_cut"])
@pytest.mark.parametrize("name", ["mlp", "conv2d grouped", "attention", "tied", "bilinear", "gru"])
def test_no_matrix_product_is_computed_twice(name: str, remat: Any) -> None:
    apply, params, buffers, args = functionalized(name)
    fast = compile(apply, backend="aten", remat=remat)
    theirs = eager_flops(apply, params, buffers, args, weights=True)
    assert flops(lambda: split(fast, params, buffers, args)) == theirs
    plan = fast.plan(params, buffers, *args)
    assert plan.flops == theirs
    assert plan.recomputed_flops == 0


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in CASES
        if CASES[name]()[0].state_dict()
        and CASES[name]()[1][0].is_floating_point()
        and name not in ("checkpointed", "tied", "unused")
    ],
)
def test_no_weight_gradient_is_computed_with_the_input_gradients(name: str) -> None:
    """I does what eager does when only the inputs are differentiated."""
    apply, params, buffers, args = functionalized(name)
    fast = compile(apply, backend="aten", remat="none")
    plan = fast.plan(params, buffers, *args)
    if name != "lstm":  # whose eager kernel has no formula
        theirs = eager_flops(apply, params, buffers, args, weights=False)
        assert plan.forward.flops + plan.input_grad.flops == theirs
    for node in fast.programs(params, buffers, *args).input_grad.graph.nodes:
        mask = [a for a in node.args if isinstance(a, list) and a and isinstance(a[0], bool)]
        assert not mask or not any(mask[0][1:])


def test_with_nothing_to_differentiate_in_the_inputs_everything_is_left_to_the_weights() -> None:
    apply, params, buffers, args = functionalized("mlp")
    fast = compile(apply, backend="aten")
    assert fast.plan(params, buffers, *args, argnums=()).input_grad.operations == 0
    _, _, pullback = fs.stage_vjp(fast, params, buffers, *args, argnums=())
    (dx,), weight_pullback = pullback(torch.ones(2, 8))
    assert dx is None
    assert all(grad is not None for grad in weight_pullback().values())


def test_a_cotangent_left_out_contributes_nothing_rather_than_zeros() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x).sqrt(), self.b(x * y)

    apply, params, buffers = fs.functionalize(TwoHeads())
    args = (torch.randn(2, 4), torch.randn(2, 4))
    fast = compile(apply, backend="aten")
    for cotangents in ((None, torch.ones(2, 4)), (torch.ones(2, 4), None), (None, None)):
        results = []
        for stage in (apply, fast):
            _, _, pullback = fs.stage_vjp(stage, params, buffers, *args)
            input_grads, weight_pullback = pullback(cotangents)
            results.append([*leaves(input_grads), *leaves(weight_pullback())])
        for ours, theirs in zip(*reversed(results), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_cotangents_may_lie_in_memory_in_any_way() -> None:
    apply, params, buffers, (x,) = functionalized("encoder layer")
    fast = compile(apply.module.eval() and apply, backend="aten")
    for cotangent in (torch.ones(()).expand_as(x), torch.randn(8, 4, 2).permute(2, 1, 0)):
        results = []
        for stage in (apply, fast):
            _, _, pullback = fs.stage_vjp(stage, params, buffers, x)
            (dx,), weight_pullback = pullback(cotangent)
            results.append([dx, *weight_pullback().values()])
        assert_same(*results, tolerance=1e-5)


def test_retained_pullbacks_give_the_same_again_and_gradients_are_nobody_elses_memory() -> None:
    apply, params, buffers, args = functionalized("tied")
    fast = compile(apply, backend="aten")
    output, _, pullback = fs.stage_vjp(fast, params, buffers, *args)
    cotangents = optree.tree_map(torch.ones_like, output)
    _, weight_pullback = pullback(cotangents, retain=True)
    first = weight_pullback(retain=True)
    copies = {name: grad.clone() for name, grad in first.items()}
    total = fs.stage_backward_weight(weight_pullback, accumulate=first)
    for name, each in copies.items():
        torch.testing.assert_close(total[name], 2 * each)
    _, again = pullback(cotangents)
    assert_same(list(again().values()), list(copies.values()))


def test_used_pullbacks_hold_nothing() -> None:
    apply, params, buffers, args = functionalized("mlp")
    _, _, pullback = fs.stage_vjp(compile(apply, backend="aten"), params, buffers, *args)
    assert pullback.nbytes > 0
    _, weight_pullback = pullback(torch.ones(2, 8))
    assert pullback.nbytes == 0
    assert weight_pullback.nbytes > 0
    weight_pullback()
    assert weight_pullback.nbytes == 0


def test_residuals_can_be_mapped_as_a_pytree() -> None:
    apply, params, buffers, args = functionalized("mlp")
    fast = compile(apply, backend="aten")
    _, _, pullback = fs.stage_vjp(fast, params, buffers, *args)
    (dx,), weight_pullback = optree.tree_map(torch.clone, pullback, namespace="funcstage")(torch.ones(2, 8))
    (expected,), expected_weights = pullback(torch.ones(2, 8))
    assert torch.equal(dx, expected)
    moved = optree.tree_map(torch.clone, weight_pullback, namespace="funcstage")
    assert_same(list(moved().values()), list(expected_weights().values()))


def test_compiled_stages_are_called_like_the_original() -> None:
    for name in ("mlp", "batch norm", "tied"):
        apply, params, buffers, args = functionalized(name)
        fast = compile(apply, backend="aten")
        ours, theirs = fast(params, buffers, *args), apply(params, buffers, *args)
        assert_same(leaves(ours), leaves(theirs))


def test_gradients_of_gradients_are_those_of_the_original() -> None:
    apply, params, buffers, (x,) = functionalized("mlp")
    fast = compile(apply, backend="aten")
    grads = []
    for stage in (apply, fast):
        leaf = x.detach().requires_grad_()
        output, _, pullback = fs.stage_vjp(stage, params, buffers, leaf)
        (dx,), _ = pullback(torch.ones_like(output))
        grads.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    assert torch.equal(*grads)


def test_keyword_arguments_and_plain_values_are_part_of_the_signature() -> None:
    def apply(params: Any, buffers: Any, x: Tensor, power: int, *, scale: float = 1.0) -> Any:
        return params["w"] * x**power * scale, buffers

    fast = compile(apply, backend="aten")
    params, x = {"w": torch.randn(3)}, torch.randn(3)
    for power, scale in ((2, 1.0), (3, 1.0), (2, 0.5), (2, 1)):
        results = []
        for stage in (apply, fast):
            output, _, pullback = fs.stage_vjp(stage, params, {}, x, power, scale=scale)
            (dx, none), weight_pullback = pullback(torch.ones(3))
            assert none is None
            results.append([output, dx, weight_pullback()["w"]])
        assert_same(*results)


class Sensitive(nn.Module):
    """Reads all that a trace could be stale about."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale * (2 if self.training else 3) * (5 if torch.is_grad_enabled() else 7)
        if torch.are_deterministic_algorithms_enabled():
            factor *= 11
        return self.linear(x) * factor + torch.zeros((), dtype=torch.get_default_dtype())


def test_no_trace_is_ever_stale() -> None:
    module = Sensitive()
    apply, params, buffers = fs.functionalize(module)
    fast = compile(apply, backend="aten")
    x = torch.randn(2, 4)

    def same(x: Tensor = x, params: Any = params, **options: Any) -> None:
        results = []
        for stage in (apply, fast):
            output, _, pullback = fs.stage_vjp(stage, params, buffers, x, **options)
            grads, weight_pullback = pullback(torch.ones_like(output))
            results.append([output, *leaves(grads), *leaves(weight_pullback())])
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)

    same()
    module.eval()
    same()
    module.scale = 2.0
    same()
    same(torch.randn(3, 4))
    same(torch.randn(4, 2).t())
    same(x.double(), {name: p.double() for name, p in params.items()})
    same(argnums=())
    with torch.autocast("cpu", torch.bfloat16):
        same()
    same()
    same({**params, "linear.bias": params["linear.weight"][0]} and x)
    same(x.detach().requires_grad_())
    for setting in (torch.no_grad(), torch.inference_mode()):
        with setting:
            assert torch.equal(fast(params, buffers, x)[0], apply(params, buffers, x)[0])
    torch.use_deterministic_algorithms(True)
    try:
        same()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    try:
        same()
    finally:
        torch.set_default_dtype(torch.float32)
    same()


def test_the_same_tensor_given_twice_has_a_gradient_in_both_places() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return params["a"] * x + params["b"] ** 2, buffers

    fast = compile(apply, backend="aten")
    shared, x = torch.randn(3), torch.randn(3)
    for params in ({"a": torch.randn(3), "b": torch.randn(3)}, {"a": shared, "b": shared}):
        assert_same(split(fast, params, {}, (x,)), split(apply, params, {}, (x,)))


def test_backward_runs_as_under_no_autocast() -> None:
    apply, params, buffers, args = functionalized("mlp")
    fast = compile(apply, backend="aten")
    with torch.autocast("cpu", torch.bfloat16):
        output, _, pullback = fs.stage_vjp(fast, params, buffers, *args)
    assert output.dtype == torch.bfloat16
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    leaf = args[0].detach().requires_grad_()
    weights = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = apply(weights, buffers, leaf)
    grads = torch.autograd.grad(expected, [leaf, *weights.values()], torch.ones_like(expected))
    assert_same([dx, *weight_pullback().values()], list(grads))


def test_many_signatures_are_warned_of_once_with_the_reasons() -> None:
    apply, params, buffers, _ = functionalized("mlp")
    fast = compile(apply, backend="aten", dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(1, 12):
            fast(params, buffers, torch.randn(n, 8))
    (warning,) = [w for w in caught if "signatures" in str(w.message)]
    assert f"traced for {WARN_SIGNATURES + 1} signatures" in str(warning.message)
    assert "[8, 8]" in str(warning.message)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x  # the line that is named


class Nonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


@pytest.mark.parametrize("module", [Branching(), Nonzero()])
def test_what_cannot_be_traced_is_refused_by_name(module: nn.Module) -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(4, 4), module))
    with pytest.raises(TraceError, match="uncompiled `apply` works") as caught:
        fs.stage_vjp(compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(2, 4))
    assert "Without fullgraph=True" in str(caught.value)
    assert caught.value.__cause__ is not None, "torch's own error is the cause"
    if isinstance(module, Branching):
        line = Branching.forward.__code__.co_firstlineno + 1
        assert f"Sequential.1 cannot be traced, at {__file__}:{line}" in str(caught.value)


def test_a_stage_that_reads_values_is_not_traced_for_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(4, 4), Branching()))
    stage, traced = compile(apply, backend="aten", fullgraph=False), list[Any]()
    trace = compiling.trace

    def counted(*args: Any, **kwargs: Any) -> Any:
        traced.append(args)
        return trace(*args, **kwargs)

    monkeypatch.setattr(compiling, "trace", counted)
    for _ in range(3):
        fs.stage_vjp(stage, params, buffers, torch.randn(2, 4))
    assert len(traced) == 1


class DrawsLater(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.rand_like(grad)


def test_random_numbers_of_a_backward_are_refused_in_a_trace() -> None:
    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return DrawsLater.apply(super().forward(x))  # type: ignore[no-any-return]

    apply, params, buffers = fs.functionalize(Drawing(4, 4))
    x = torch.randn(2, 4)
    with pytest.raises(
        TraceError, match=r"in its backward \(aten.rand_like.*Draw them in the forward.*works"
    ):
        fs.stage_vjp(compile(apply, backend="aten"), params, buffers, x)
    fs.stage_vjp(apply, params, buffers, x)[2](torch.ones(2, 4))


class Inverse(nn.Module):
    """Linear algebra that checks its matrices, after a batch norm whose kernel has strides of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.weight = nn.Parameter(torch.eye(6) + torch.rand(6, 6) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        return torch.linalg.solve(self.weight, x @ torch.linalg.inv(self.weight), left=False)


def test_inverses_and_kernels_with_other_strides_than_their_traces_are_compiled() -> None:
    torch.manual_seed(0)
    module = Inverse().double()
    apply, params, buffers = fs.functionalize(module)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    output, _, pullback = fs.stage_vjp(compile(apply, backend="aten"), params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    grads = torch.autograd.grad(expected.sum(), [leaf, *module.parameters()])
    torch.testing.assert_close([output, dx, *weight_pullback().values()], [expected.detach(), *grads])


def test_a_stage_that_writes_into_its_parameters_is_refused() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        with torch.no_grad():
            params["w"].add_(1)
        return params["w"] * x, buffers

    params = {"w": torch.ones(2)}
    with pytest.raises(fs.PurityError):
        fs.stage_vjp(compile(apply, backend="aten"), params, {}, torch.ones(2))
    assert torch.equal(params["w"], torch.ones(2))


def test_a_stage_may_overwrite_its_argument_but_the_callers_tensor_stays() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        x.add_(1)
        return (params["w"] * x, x), buffers

    x = torch.ones(2)
    output, _, pullback = fs.stage_vjp(compile(apply, backend="aten"), {"w": torch.ones(2)}, {}, x)
    (dx,), weight_pullback = pullback((torch.ones(2), None))
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(output[1], torch.full((2,), 2.0))
    assert torch.equal(dx, torch.ones(2))
    assert torch.equal(weight_pullback()["w"], torch.full((2,), 2.0))


@pytest.mark.parametrize(
    "options",
    [
        *({"backend": "xla"}, {"remat": "some"}, {"sites": None}, {"sites": 1}, {"repeated": 1}),
        *({"dynamic": "no"}, {"fullgraph": "no"}, {"fullgraph": 2}),
    ],
    ids=str,
)
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    apply, *_ = functionalized("mlp")
    with pytest.raises(fs.StructureError):
        compile(apply, **options)
    with pytest.raises(fs.StructureError):
        compile(nn.Linear(2, 2))


@pytest.mark.parametrize("value", [None, True, False])
@pytest.mark.parametrize("name", ["dynamic", "repeated", "fullgraph"])
def test_options_may_be_left_open_chosen_or_ruled_out(name: str, value: bool | None) -> None:
    stage = compile(functionalized("mlp")[0], **{name: value})
    assert getattr(stage, name) is value
    assert (stage.cuda_graphs, stage.sites) == (False, False)


def test_a_policy_decides_what_is_saved() -> None:
    apply, params, buffers, args = functionalized("mlp")
    nothing = compile(apply, backend="aten", remat=lambda node: False)
    everything = compile(apply, backend="aten", remat=lambda node: True)
    assert nothing.plan(params, buffers, *args).held_after_forward == args[0].nbytes
    assert everything.plan(params, buffers, *args).recomputed_flops == 0
    for fast in (nothing, everything):
        assert_same(split(fast, params, buffers, args), eager(apply, params, buffers, args))


def test_min_cut_holds_the_matrix_products_operands_and_no_more_for_the_weights() -> None:
    module = nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 8, bias=False))
    apply, params, buffers = fs.functionalize(module.bfloat16())
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    plan = compile(apply, backend="aten").plan(params, buffers, x)
    assert plan.held_after_input == 2 * 64 * (8 + 32 + 32 + 8)
    assert plan.held_after_forward == 2 * 64 * (8 + 32)


def test_plans_are_printed_as_tables() -> None:
    apply, params, buffers, args = functionalized("mlp")
    fast = compile(apply, backend="aten")
    plan = fast.plan(params, buffers, *args)
    assert str(plan).count("\n") == 9
    assert plan._repr_html_().count("<tr>") == 10
    assert "torch.ops.aten.mm" in str(fast.programs(params, buffers, *args))
    assert "backend='aten'" in repr(fast)


def test_a_stage_of_seventy_billion_parameters_is_traced_without_its_memory() -> None:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(80)))
        x = torch.empty(4096, 8192)
    apply, params, buffers = fs.functionalize(module)
    plan = compile(apply, backend="aten").plan(params, buffers, x)
    assert plan.flops == 3 * 80 * 2 * 4096 * 8192 * 8192


def test_threads_may_share_a_compiled_stage() -> None:
    from concurrent.futures import ThreadPoolExecutor

    apply, params, buffers, args = functionalized("mlp")
    fast: CompiledStage = compile(apply, backend="aten")
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: fast(params, buffers, *args)[0], range(8)))
    for output in outputs:
        assert torch.equal(output, apply(params, buffers, *args)[0])
    assert len(fast._traced) == 1


def test_a_program_that_inductor_cannot_compile_runs_operation_by_operation() -> None:
    def scaled(params: Any, buffers: Any, x: Tensor) -> Any:
        return torch.sin(x * params["w"]) + 0.123456789, buffers

    without_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without_compiler, pytest.warns(UserWarning, match="TorchInductor cannot compile a program"):
        check_stage(scaled, torch.randn(5), params={"w": torch.randn(5)}, engines="inductor")


def test_the_module_runs_while_it_is_traced_and_not_again() -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    stage = fs.compile(apply, backend="aten")
    runs = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code is nn.Sequential.forward.__code__:
            runs.append(frame)

    before = sys.getprofile()
    for _ in range(3):
        sys.setprofile(profile)
        try:
            fs.stage_vjp(stage, params, buffers, torch.ones(2, 3))
        finally:
            sys.setprofile(before)
        assert len(runs) == 1


def test_copies_are_compiled_as_the_stage_was() -> None:
    apply = fs.functionalize(nn.Linear(3, 2)).apply
    options = {"remat": "full", "dynamic": True, "sites": True, "repeated": False}
    stage = fs.compile(apply, backend="aten", **options)
    for made in (copy.copy(stage), copy.deepcopy(stage)):
        assert made.backend == "aten"
        assert {name: getattr(made, name) for name in options} == options
    assert copy.copy(fs.compile(apply, backend="aten")).repeated is None


@pytest.mark.parametrize("wrong", [None, 3, "forward", nn.Linear(3, 2)])
def test_only_a_stage_function_is_compiled(wrong: Any) -> None:
    with pytest.raises(fs.StructureError, match="compile expects a stage function"):
        fs.compile(wrong)
