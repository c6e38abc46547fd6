"""Writes in place after F: refused where I or W would read what was written, as eager; else right."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage import trees
from funcstage.state.writes import Watch


class Norms(nn.Module):
    """Statistics that the backward reads (in eval) or not, an embedding, an output that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.norm(x)) * x)


class Aliases(nn.Module):
    """Reads its input through views, and returns one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.unflatten(0, (1, -1))[0].t()
        return F.linear(rows.t(), self.weight.t()) + self.bias, (rows * scale.sum()).sigmoid()


class Checkpointed(nn.Module):
    """A region that is run again, with a frozen weight, a buffer and a weight of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return self.frozen(self.first(x).tanh()).sin() * self.scale

        return self.last(checkpoint(body, x, use_reentrant=self.reentrant))


class Sums(nn.Module):
    """Nothing but sums: no value is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def evaluated(module: nn.Module) -> nn.Module:
    module.eval()
    return module


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(4, 3), 1),
    "deep": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3), nn.ReLU()), 1),
    "norms": (Norms, 1),
    "norms in eval": (lambda: evaluated(Norms()), 1),
    "aliases": (Aliases, 2),
    "checkpointed": (lambda: Checkpointed(False), 1),
    "sums": (Sums, 1),
}
COMPILED: dict[str, Any] = {
    "none": {"remat": "none"},
    "min_cut": {"remat": "min_cut"},
    "full": {"remat": "full"},
    "policy": {"remat": lambda node: "mul" in node.name},
}
ENGINES = ("closures", *COMPILED)


def made(case: str, engine: str) -> tuple[nn.Module, Any, Any, Any, list[Tensor]]:
    torch.manual_seed(0)
    make, n_args = CASES[case]
    module = make()
    apply, params, buffers = fs.functionalize(copy.deepcopy(module))
    if engine != "closures":
        apply = fs.compile(apply, backend="aten", **COMPILED[engine])
    return module, apply, params, buffers, [torch.randn(5, 4) for _ in range(n_args)]


def cotangents(output: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    return trees.map_leaves(lambda y: torch.randn(y.shape, generator=generator), output)


def eagerly(module: nn.Module, args: list[Tensor], written: tuple[str, Any] | None) -> list[Tensor] | None:
    """The gradients, or None where autograd refuses."""
    args = [arg.clone().requires_grad_() for arg in args]
    output = module(*args)
    outputs = trees.flatten(output)[0]
    if written is not None:
        named = {"args": args, "params": dict(module.named_parameters()), "output": outputs}
        named["buffers"] = {
            **dict(module.named_buffers()),
            **{name: p for name, p in module.named_parameters() if not p.requires_grad},
        }
        with torch.no_grad():
            named[written[0]][written[1]].mul_(0.5)
    wanted = [*args, *[p for p in module.parameters() if p.requires_grad]]
    try:
        return list(torch.autograd.grad(outputs, wanted, trees.flatten(cotangents(output))[0]))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


def run(backward_input: Callable[[], Any]) -> tuple[list[Any], str | None]:
    """Run I and W: the gradients, or what the refusal says."""
    try:
        input_grads, weight_pullback = backward_input()
        return [*input_grads, *weight_pullback().values()], None
    except fs.WrittenError as error:
        return [], str(error)


def leaves_of(case: str) -> list[tuple[str, Any]]:
    _, _, params, buffers, args = made(case, "closures")
    n_outputs = 2 if case == "aliases" else 1
    return [
        *[("args", i) for i in range(len(args))],
        *[("params", name) for name in params],
        *[("buffers", name) for name, buffer in buffers.items() if buffer.is_floating_point()],
        *[("output", i) for i in range(n_outputs)],
    ]


ALL = [(case, *leaf) for case in CASES for leaf in leaves_of(case)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("case", "kind", "leaf"), ALL, ids=lambda part: str(part))
def test_a_write_after_f_is_refused_by_name_where_eager_refuses_and_else_changes_nothing(
    case: str, kind: str, leaf: Any, engine: str
) -> None:
    module, apply, params, buffers, args = made(case, engine)
    expected = eagerly(copy.deepcopy(module), args, None)
    refused = eagerly(copy.deepcopy(module), args, (kind, leaf)) is None
    output, _, pullback = fs.stage_vjp(apply, params, buffers, *args)
    written = {"args": args, "params": params, "buffers": buffers, "output": trees.flatten(output)[0]}
    written[kind][leaf].mul_(0.5)
    grads, refusal = run(lambda: pullback(cotangents(output)))
    if refusal is not None:
        name = "output" if kind == "output" and case != "aliases" else f"{kind}[{leaf!r}]"
        assert f"{name} (float32[" in refusal
        again = case == "checkpointed" or engine in ("full", "policy")
        assert refused or again, "eager has the right gradients here"
    else:
        assert not refused or kind == "buffers" or engine != "closures", "eager refuses"
        for ours, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_argument_that_is_given_other_memory_after_f_is_refused_as_in_eager(engine: str) -> None:
    module, apply, params, buffers, args = made("linear", engine)
    leaf = args[0].clone().requires_grad_()
    output = module(leaf)
    with torch.no_grad():
        leaf.set_(torch.zeros(5, 4))  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output, _, pullback = fs.stage_vjp(apply, params, buffers, *args)
    args[0].set_(torch.zeros(5, 4))  # type: ignore[call-overload]
    assert "W reads it again" in str(run(lambda: pullback(torch.ones_like(output)))[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_read_again_is_not_swapped_with_another_tensor(engine: str) -> None:
    """As in eager, torch refuses to: it would be another tensor altogether, of as many writes."""
    module, apply, params, buffers, args = made("deep", engine)
    leaf = args[0].clone().requires_grad_()
    output = module(leaf)
    with pytest.raises(RuntimeError, match=r"[Ss]wap|use_count"):
        torch.utils.swap_tensors(module[2].weight, nn.Parameter(torch.zeros(3, 4)))  # type: ignore[index]
    expected = torch.autograd.grad(output.sum(), [leaf, *module.parameters()])
    output, _, pullback = fs.stage_vjp(apply, params, buffers, *args)
    for tensor in (args[0], params["2.weight"]):
        with pytest.raises(RuntimeError, match="Cannot swap"):
            torch.utils.swap_tensors(tensor, torch.zeros_like(tensor))
    (found,), weight_pullback = pullback(torch.ones_like(output))
    torch.testing.assert_close([found, *weight_pullback().values()], [*expected])
    del pullback, weight_pullback, output
    torch.utils.swap_tensors(params["2.weight"], torch.zeros(3, 4))


@pytest.mark.parametrize("how", ["held by its module", "handed to it"])
def test_a_write_into_what_a_region_alone_reads_again_is_refused(how: str) -> None:
    """Which no level knows: a buffer of a module that is not the stage's, or an argument that is none."""
    table = torch.rand(4)
    held = nn.Module()
    held.register_buffer("table", table)
    held.forward = lambda x, given=None: x * (held.table if given is None else given)  # type: ignore[union-attr]

    def apply(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
        given = () if how == "held by its module" else (table,)
        return checkpoint(held, x * params, *given, use_reentrant=False), buffers

    output, _, pullback = fs.stage_vjp(apply, torch.rand(4), (), torch.rand(3, 4), table, argnums=0)
    table.mul_(0.5)
    with pytest.raises(fs.WrittenError, match=r"args\[1\] \(float32\[4\]\)"):
        pullback(torch.ones_like(output))


GLOBAL = torch.ones(4)


class Times(torch.autograd.Function):
    """Saves what its caller has captured."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class TimesGlobal(torch.autograd.Function):
    """Saves what it has captured itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(GLOBAL)
        return x * GLOBAL

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Captures(nn.Module):
    """Reads a tensor that is no parameter, buffer or argument."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], captured: Tensor | None = None) -> None:
        super().__init__()
        self.proj, self.body = nn.Linear(4, 4), forward
        self.mask = torch.randn(4) if captured is None else captured
        self.kept = {"deep": [torch.randn(4)]}

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def in_a_cell() -> Captures:
    scale = torch.randn(4)
    module = Captures(lambda m, x: m.proj(x * scale))
    module.cell = (scale,)
    return module


TEACHER = nn.Linear(4, 4).requires_grad_(False)


class OfItsClass(Captures):
    SCALE = torch.ones(4)


def scaled_by_default(m: Any, x: Tensor, scale: Tensor = OfItsClass.SCALE) -> Tensor:
    return m.proj(x * scale)


Captured = Callable[[Any], Tensor]
OF_MASK: Captured = lambda m: m.mask  # noqa: E731
CAPTURING: dict[str, tuple[Callable[[], nn.Module], Captured, str]] = {
    "attribute": (lambda: Captures(lambda m, x: m.proj(x * m.mask).tanh()), OF_MASK, "'mask'"),
    "deep": (lambda: Captures(lambda m, x: m.proj(x * m.kept["deep"][0])), lambda m: m.kept["deep"][0], "0"),
    "global": (lambda: Captures(lambda m, x: m.proj(x * GLOBAL)), lambda m: GLOBAL, "(float32[4])"),
    "cell": (in_a_cell, lambda m: m.cell[0], "captured"),
    "class": (lambda: OfItsClass(lambda m, x: m.proj(x * m.SCALE)), lambda m: m.SCALE, "OfItsClass.SCALE"),
    "default": (lambda: Captures(scaled_by_default), lambda m: OfItsClass.SCALE, "captured"),
    "a global module": (
        lambda: Captures(lambda m, x: m.proj(TEACHER(x))),
        lambda m: TEACHER.weight,
        "(float32[4, 4])",
    ),
    "of W alone": (lambda: Captures(lambda m, x: x + m.proj(m.mask.expand(5, 4))), OF_MASK, "'mask'"),
    "by a view": (lambda: Captures(lambda m, x: m.proj(x * m.mask.view(2, 2).view(4))), OF_MASK, "'mask'"),
    "a matrix": (
        lambda: Captures(lambda m, x: m.proj(F.linear(x, m.mask)), torch.randn(4, 4)),
        OF_MASK,
        "'mask'",
    ),
    "a condition": (
        lambda: Captures(lambda m, x: m.proj(torch.where(m.mask, x, -x)), torch.rand(4) > 0.5),
        OF_MASK,
        "'mask'",
    ),
    "indices": (
        lambda: Captures(lambda m, x: m.proj(x[:, m.mask]), torch.tensor([1, 0, 3, 2])),
        OF_MASK,
        "'mask'",
    ),
    "in place": (lambda: Captures(lambda m, x: m.proj(x).mul_(m.mask)), OF_MASK, "'mask'"),
    "a function's": (lambda: Captures(lambda m, x: m.proj(Times.apply(x, m.mask))), OF_MASK, "'mask'"),
    "a function's own": (lambda: Captures(lambda m, x: m.proj(TimesGlobal.apply(x))), lambda m: GLOBAL, ""),
    "unread": (lambda: Captures(lambda m, x: m.proj(x + m.mask)), OF_MASK, "'mask'"),
    "takes gradients": (
        lambda: Captures(
            lambda m, x: torch.autograd.grad((m.proj(x) * m.mask).tanh().sum(), x, create_graph=True)[0]
        ),
        OF_MASK,
        "captured",
    ),
}


def write(captured: Tensor) -> None:
    captured.detach().copy_(captured.flip(0) if not captured.is_floating_point() else captured * 2)


@pytest.mark.parametrize("engine", [*ENGINES, "inductor"])
@pytest.mark.parametrize("case", CAPTURING)
def test_a_write_into_what_a_stage_has_captured_is_refused_where_eager_refuses(
    case: str, engine: str
) -> None:
    torch.manual_seed(0)
    make, captured, name = CAPTURING[case]
    module, x = make(), torch.randn(5, 4)
    apply, params, buffers = fs.functionalize(module)
    if engine != "closures":
        apply = fs.compile(apply, **{"backend": "aten", **COMPILED.get(engine, {"backend": "inductor"})})

    def eagerly(written: bool) -> list[Tensor] | None:
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        if written:
            write(captured(module))
        try:
            return list(torch.autograd.grad(y.sum(), [leaf, *module.parameters()]))
        except RuntimeError:
            return None

    def ours(written: bool) -> tuple[list[Any], str | None]:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        if written:
            write(captured(module))
        return run(lambda: pullback(torch.ones_like(output)))

    refused = eagerly(written=True) is None
    before = eagerly(written=False)
    grads, refusal = ours(written=True)
    if refusal is None:
        assert not refused
        torch.testing.assert_close(grads, before)
    else:
        assert refused or engine in ("full", "policy")
        assert name in refusal
    grads, refusal = ours(written=False)  # a write before F is none
    assert refusal is None
    torch.testing.assert_close(grads, eagerly(written=False))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_into_what_a_first_stage_has_captured_is_refused(engine: str) -> None:
    module = Captures(lambda m, x: m.proj(x) * m.mask)
    apply, params, buffers = fs.functionalize(module)
    if engine != "closures":
        apply = fs.compile(apply, **{"backend": "aten", **COMPILED[engine]})
    output, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(5, 4), argnums=())
    write(module.mask)
    with pytest.raises(fs.WrittenError, match="'mask'"):
        pullback(torch.ones_like(output))[1]()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_w_alone_reads_of_the_captured_may_be_written_before_i(engine: str) -> None:
    make, captured, _ = CAPTURING["of W alone"]
    module = make()
    apply, params, buffers = fs.functionalize(module)
    if engine != "closures":
        apply = fs.compile(apply, backend="aten", **COMPILED[engine])
    output, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(5, 4))
    write(captured(module))
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    assert dx.eq(1).all()
    with pytest.raises(fs.WrittenError, match=r"captured tensor 'mask' .* W reads it again"):
        fs.stage_backward_weight([weight_pullback])
    assert not weight_pullback.consumed


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_phase_that_reads_what_was_written_is_refused_and_nothing_is_consumed(engine: str) -> None:
    module, apply, params, buffers, (x,) = made("linear", engine)
    expected = eagerly(module, [x], None)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    x.add_(1)
    (dx,), weight_pullback = pullback(cotangents(output))
    torch.testing.assert_close(dx, expected[0])
    for call in (weight_pullback, lambda: fs.stage_backward_weight([weight_pullback])):
        with pytest.raises(fs.WrittenError, match=r"args\[0\] \(float32\[5, 4\]\) of Linear .* W reads it"):
            call()
    assert not weight_pullback.consumed
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    params["weight"].add_(1)
    with pytest.raises(fs.WrittenError, match=r"params\['weight'\] \(float32\[3, 4\]\) of Linear .* I reads"):
        pullback(cotangents(output))
    assert not pullback.consumed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("argnums", [(), (0,)])
def test_an_optimizer_may_step_where_the_weights_are_not_read_again(engine: str, argnums: Any) -> None:
    module, apply, params, buffers, (x,) = made("linear", engine)
    expected = eagerly(module, [x], None)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
    if argnums:
        (_,), weight_pullback = pullback(cotangents(output))
    params["weight"].grad = torch.ones(3, 4)
    torch.optim.SGD([params["weight"]], 0.1).step()
    if not argnums:
        (_,), weight_pullback = pullback(cotangents(output))
    for ours, wanted in zip(weight_pullback().values(), expected[1:], strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", ["retained", "once"])
@pytest.mark.parametrize("target", ["cotangent", "input gradient"])
@pytest.mark.parametrize("case", ["linear", "sums", "norms", "aliases"])
def test_w_refuses_cotangents_and_input_gradients_that_were_written_into_where_it_reads_them(
    case: str, target: str, step: str, engine: str
) -> None:
    module, apply, params, buffers, args = made(case, engine)
    expected = eagerly(module, args, None)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, *args)
    given = cotangents(output)
    input_grads, weight_pullback = pullback(given, retain=step == "retained")
    for leaf in trees.flatten(given if target == "cotangent" else input_grads)[0]:
        if not trees.is_expanded(leaf):
            leaf.mul_(2)
    grads, refusal = run(lambda: ((), weight_pullback))
    if refusal is not None:
        assert "output_grads" in refusal or "input_grads" in refusal  # which may be one tensor
        assert not weight_pullback.consumed
    else:
        for ours, wanted in zip(grads, expected[len(args) :], strict=True):
            torch.testing.assert_close(ours, wanted)


def test_a_cotangent_that_w_holds_is_refused_rather_than_read() -> None:
    for engine in ENGINES:
        _, apply, params, buffers, (x,) = made("linear", engine)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        given = cotangents(output)
        _, weight_pullback = pullback(given)
        given.zero_()
        with pytest.raises(fs.WrittenError, match=r"output_grads \(float32\[5, 3\]\)"):
            weight_pullback()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_receive_buffer_is_watched_through_views_that_are_gone(engine: str) -> None:
    _, apply, params, buffers, _ = made("linear", engine)
    received = torch.randn(2, 5, 4)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, received[0])
    received.zero_()
    with pytest.raises(fs.WrittenError, match=r"args\[0\]"):
        pullback(cotangents(output))[1]()


@pytest.mark.parametrize("engine", ENGINES)
def test_watching_keeps_no_memory_alive(engine: str) -> None:
    _, apply, params, buffers, _ = made("sums", engine)
    big = torch.randn(1000, 4)
    storage = torch.multiprocessing.reductions.StorageWeakRef(big.untyped_storage())
    output, _, pullback = fs.stage_vjp(apply, params, buffers, big)
    del big
    assert storage.expired() or engine == "closures"  # whose levels end in the arguments
    given = torch.randn(1000, 4)
    storage = torch.multiprocessing.reductions.StorageWeakRef(given.untyped_storage())
    input_grads, weight_pullback = pullback(given)
    summed = weight_pullback()
    del given, input_grads, summed, output
    assert storage.expired()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pullback_rebuilt_with_other_residuals_does_not_mind_writes_into_the_old(engine: str) -> None:
    module, apply, params, buffers, (x,) = made("deep", engine)
    expected = eagerly(module, [x], None)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    moved = optree.tree_map(torch.clone, pullback, namespace=trees.NAMESPACE)
    x.zero_()
    (dx,), weight_pullback = moved(cotangents(output))
    for ours, wanted in zip([dx, *weight_pullback().values()], expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    with pytest.raises(fs.WrittenError):
        pullback(cotangents(output))[1]()


def test_a_site_reads_no_input_that_was_written() -> None:
    _, apply, params, buffers, (x,) = made("linear", "closures")
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    (site,) = pullback(cotangents(output))[1].sites
    x.zero_()
    with pytest.raises(fs.WrittenError):
        site.vjp()


def test_derived_parameters_are_watched() -> None:
    params = {"g": torch.randn(3), "v": torch.randn(3)}
    derived, pullback = fs.derive(lambda p: {"w": p["g"] * p["v"], "u": p["v"] + 1}, params)
    params["g"].add_(1)
    with pytest.raises(fs.WrittenError, match=r"params\['g'\]"):
        pullback(trees.map_leaves(torch.ones_like, derived))
    derived, pullback = fs.derive(lambda p: {"w": p["g"].double(), "u": p["v"] + 1}, params)
    params["g"].add_(1)
    assert set(pullback(trees.map_leaves(torch.ones_like, derived))) == {"g", "v"}


def test_tensors_of_inference_mode_are_taken_although_torch_does_not_count_their_writes() -> None:
    for engine in ENGINES:
        module, apply, params, buffers, (x,) = made("linear", engine)
        expected = eagerly(module, [x], None)
        with torch.inference_mode():
            x = x.clone()
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        (dx,), weight_pullback = pullback(cotangents(output))
        torch.testing.assert_close([dx, *weight_pullback().values()], expected)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    with one_process():
        yield init_device_mesh("cpu", (1,))


@pytest.mark.parametrize(
    "target", ["args", "up.weight", "up.bias", "down.weight", "down.bias", "output_grads"]
)
def test_dtensors_are_watched_too(target: str, mesh: DeviceMesh) -> None:
    module = nn.Sequential()
    module.up, module.act, module.down = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    apply, params, buffers = fs.functionalize(parallelize_module(module, mesh, plan))
    x = torch.randn(3, 4)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    given = torch.ones_like(output)
    if target != "output_grads":
        with torch.no_grad():
            (x if target == "args" else params[target]).mul_(2)
    if target in ("args", "up.weight", "down.weight"):  # autograd's node of a product looks at both operands
        with pytest.raises(fs.WrittenError, match=r"args\[0\]" if target == "args" else target):
            pullback(given)
        assert not pullback.consumed
        return
    _, weight_pullback = pullback(given)
    if target == "output_grads":
        given.zero_()
    if target == "output_grads":
        with pytest.raises(fs.WrittenError, match=target):
            weight_pullback()
    else:
        torch.testing.assert_close(weight_pullback()["down.bias"].full_tensor(), torch.full((4,), 3.0))


def test_a_functionalized_tensor_which_nobody_can_take_the_memory_of_is_an_argument_as_in_eager() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return x * params["w"], buffers

    x, params = torch.randn(3), {"w": torch.randn(3)}
    _, _, pullback = fs.stage_vjp(apply, params, {}, torch._to_functional_tensor(x))
    (dx,), weight_pullback = pullback(torch.ones(3))
    torch.testing.assert_close(dx, params["w"])
    torch.testing.assert_close(torch._from_functional_tensor(weight_pullback()["w"]), x)


@pytest.mark.parametrize("phase", ["I", "W"])
@pytest.mark.parametrize("argnums", [(), (0,)])
def test_a_write_by_the_forward_itself_is_refused_as_that(phase: str, argnums: tuple[int, ...]) -> None:
    class Overwrites(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sigmoid() if phase == "I" else (self.weight.sigmoid() * 1).exp()
            z = super().forward(x) * y if phase == "I" else x @ y
            y.add_(1)
            return z

    module, x = Overwrites(4, 4), torch.randn(2, 4)
    leaf = x.clone().requires_grad_(bool(argnums))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        module(leaf).sum().backward()
    output, _, pullback = fs.stage_vjp(*fs.functionalize(module), x, argnums=argnums)
    with pytest.raises(fs.WrittenError, match=r"by the forward itself, .* into a clone"):
        pullback(torch.ones_like(output))[1]()


class Marked(Tensor):
    """A class of a user's."""


def test_a_watch_keeps_no_tensor_that_it_looks_at() -> None:
    of = torch.ones(3, requires_grad=True)
    for kind in (Tensor, Marked):
        made = of.as_subclass(kind) * 2
        tensor = weakref.ref(made)
        watch = Watch([], [made], lambda: ["it"])
        del made
        assert tensor() is None
        assert watch.written(list) is None
