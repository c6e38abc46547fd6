"""What a forward keeps on its module is afterwards what eager would have left there, detached."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.state.kept import untouched
from funcstage.state.reach import holders

ENGINES = pytest.mark.parametrize("engine", ["closures", "aten", "inductor"])


class Holder:
    """A plain object on the module."""

    def __init__(self) -> None:
        self.hidden: Any = None
        self.all: list[Any] = []


class Keeps(nn.Module):
    """Keeps by a function of itself and the activation, which it then returns."""

    def __init__(self, keep: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.proj, self.sub, self.keep = nn.Linear(4, 4), nn.Linear(4, 4), keep
        self.aux: Any = None
        self.log: list[Any] = []
        self.named: dict[str, Any] = {}
        self.pair: Any = ()
        self.calls, self.holder = 0, Holder()
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        kept = self.keep(self, h)
        return self.sub(h.tanh() if kept is None else kept)


def auxiliary(m: Any, h: Tensor) -> None:
    m.aux = h.softmax(-1).square().mean()


def the_activation_itself(m: Any, h: Tensor) -> None:
    m.aux = h


def read_again(m: Any, h: Tensor) -> Tensor:
    m.aux = h.sin()
    return h + m.aux


def appended(m: Any, h: Tensor) -> None:
    m.log.append(h)


def replaced_list(m: Any, h: Tensor) -> None:
    m.log = [h, {"sin": h.sin()}]


def cleared(m: Any, h: Tensor) -> None:
    m.log.clear()
    m.log.append(h.cos())


def in_a_dict(m: Any, h: Tensor) -> None:
    m.named["h"] = h.sin()
    m.named.setdefault("deep", {})["h"] = [h]


def in_a_tuple(m: Any, h: Tensor) -> None:
    m.pair = (h, [h.cos()], 3)


def on_a_submodule(m: Any, h: Tensor) -> None:
    m.sub.seen = h.mean()


def on_an_object(m: Any, h: Tensor) -> None:
    m.holder.hidden = h
    m.holder.all.append(h.sin())


def on_a_new_object(m: Any, h: Tensor) -> None:
    m.holder = Holder()
    m.holder.hidden = [h]


def moved_on(m: Any, h: Tensor) -> None:
    m.previous, m.aux = m.aux, h


def detached(m: Any, h: Tensor) -> None:
    m.aux = h.detach()


def written_later(m: Any, h: Tensor) -> Tensor:
    m.aux = h * 2
    m.aux.add_(1)
    return m.aux.tanh()


def counted(m: Any, h: Tensor) -> Tensor:
    m.calls += 1
    return h * m.calls


def toggled(m: Any, h: Tensor) -> Tensor:
    m.calls = 1 - m.calls
    return h * (m.calls + 1)


def made_once(m: Any, h: Tensor) -> Tensor:
    """As rotary embeddings do."""
    if m.aux is None:
        m.aux = torch.arange(h.shape[0]).float().cos()[:, None]
    return h * m.aux


def in_a_region(m: Any, h: Tensor) -> Tensor:
    def region(h: Tensor) -> Tensor:
        m.aux = h.tanh().mean()
        return h.tanh()

    return checkpoint(region, h, use_reentrant=False)


def of_a_region_and_used_outside(m: Any, h: Tensor) -> Tensor:
    def region(h: Tensor) -> Tensor:
        m.aux = h.tanh()
        return m.aux.sin()

    out: Tensor = checkpoint(region, h, use_reentrant=False)
    return out * m.aux


def beside_a_gradient(m: Any, h: Tensor) -> Tensor:
    leaf = h.detach().requires_grad_()
    (m.aux,) = torch.autograd.grad(leaf.sin().sum(), leaf, create_graph=True)
    m.pair = (h, leaf)
    return h * m.aux


def in_a_new_submodule(m: Any, h: Tensor) -> Tensor:
    m.act = nn.Tanh()
    m.act.last = h
    out: Tensor = m.act(h)
    return out


def in_an_empty_buffer(m: Any, h: Tensor) -> Tensor:
    m.empty = h.sin()
    return h + m.empty


def in_an_empty_buffer_once(m: Any, h: Tensor) -> Tensor:
    if m.empty is None:
        m.empty = torch.arange(h.shape[0]).float().cos()[:, None]
    return h * m.empty


def in_a_new_buffer(m: Any, h: Tensor) -> None:
    m.register_buffer("new", h.detach())


def deleted(m: Any, h: Tensor) -> None:
    if hasattr(m, "later"):
        del m.later
    else:
        m.later = h


KEEP = [
    auxiliary,
    the_activation_itself,
    read_again,
    appended,
    replaced_list,
    cleared,
    in_a_dict,
    in_a_tuple,
    on_a_submodule,
    on_an_object,
    on_a_new_object,
    moved_on,
    detached,
    written_later,
    counted,
    toggled,
    made_once,
    in_a_region,
    of_a_region_and_used_outside,
    beside_a_gradient,
    in_a_new_submodule,
    in_an_empty_buffer,
    in_an_empty_buffer_once,
    in_a_new_buffer,
    deleted,
]


def contents(module: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """The tensors that a module keeps, and the plain values of its dicts."""
    tensors, values = [], []
    for holder in holders(module):
        for value in holder.values() if isinstance(holder, dict) else holder:
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, Tensor) and not isinstance(each, nn.Parameter):
                    tensors.append(each)
                elif isinstance(each, (int, str, float)):
                    values.append(each)
    return tensors, values


def is_dead(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not plain or tensor.requires_grad or tensor.grad_fn is not None


@pytest.mark.slow
@pytest.mark.supports(
    "tensors that the forward keeps on its module",
    "as eager leaves them, detached",
    "likewise; refused where it reads them again",
)
@ENGINES
@pytest.mark.parametrize("keep", KEEP)
def test_the_module_holds_what_eager_leaves(keep: Any, engine: Any) -> None:
    torch.manual_seed(0)
    module = Keeps(keep)
    twin = copy.deepcopy(module)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    for _ in range(4):
        x = torch.randn(3, 4)
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        leaf = x.clone().requires_grad_()
        expected = twin(leaf)
        tensors, values = contents(module)
        theirs, their_values = contents(twin)
        torch.testing.assert_close(tensors, [tensor.detach() for tensor in theirs])
        assert values == their_values
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        grads = weight_pullback()
        torch.testing.assert_close(output, expected.detach())
        trained = [*twin.parameters()]
        torch.testing.assert_close(
            [dx, *grads.values()], [*torch.autograd.grad(expected.sum(), [leaf, *trained])]
        )
        after, _ = contents(module)
        torch.testing.assert_close(after, tensors)
        assert not any(map(is_dead, after))
        assert copy.deepcopy(module).calls == twin.calls
        pickle.dumps(module.state_dict())


@ENGINES
def test_activations_that_hooks_collect_are_eagers(engine: Any) -> None:
    found: list[list[Tensor]] = []
    for who in ("stage", "eager"):
        torch.manual_seed(0)
        module, acts = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), []
        for layer in module:
            layer.register_forward_hook(lambda m, i, o, acts=acts: acts.append(o))
            layer.register_forward_hook(_collecting(acts))
        apply, params, buffers = fs.functionalize(module)
        stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
        for _ in range(3):
            x = torch.randn(3, 4)
            if who == "eager":
                module(x)
            else:
                fs.stage_vjp(stage, params, buffers, x)
        found.append(acts)
    assert len(found[0]) == len(found[1]) == 18
    torch.testing.assert_close(found[0], [tensor.detach() for tensor in found[1]])
    assert not any(map(is_dead, found[0]))


def _collecting(acts: list[Any]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        acts.append(output)

    return hook


@pytest.mark.parametrize("engine", ["aten", "inductor"])
@pytest.mark.parametrize("initial", [None, torch.zeros(3, 4)], ids=["made in the forward", "made before"])
@pytest.mark.parametrize("packed", [False, True], ids=["by itself", "in a tuple"])
def test_a_compiled_stage_that_reads_what_it_kept_is_refused_with_a_way_out(
    engine: Any, initial: Any, packed: bool
) -> None:
    def running(m: Any, h: Tensor) -> Tensor:
        before = m.aux[0][0] if packed and m.aux is not None else m.aux
        now = h if before is None else before * 0.9 + h
        m.aux = ((now,), 1) if packed else now
        return now.tanh()

    module, x = Keeps(running), torch.randn(3, 4)
    module.aux = ((initial,), 1) if packed and initial is not None else initial
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend=engine)
    if initial is None:
        fs.stage_vjp(stage, params, buffers, x)
    before = module.aux
    with pytest.raises(fs.TraceError, match=r"'aux'.*register_buffer"):
        fs.stage_vjp(stage, params, buffers, x)
    assert module.aux is before


def test_a_compiled_stage_that_reads_a_buffer_that_it_has_filled_is_refused_with_a_way_out() -> None:
    def running(m: Any, h: Tensor) -> Tensor:
        m.empty = h if m.empty is None else m.empty * 0.9 + h
        return m.empty.tanh()

    apply, params, buffers = fs.functionalize(Keeps(running))
    stage, x = fs.compile(apply, backend="aten"), torch.randn(3, 4)
    fs.stage_vjp(stage, params, buffers, x)
    with pytest.raises(fs.TraceError, match=r"'empty'.*register_buffer"):
        fs.stage_vjp(stage, params, buffers, x)


@ENGINES
def test_a_kept_tensor_that_is_written_in_place_is_refused_by_name(engine: Any) -> None:
    def running(m: Any, h: Tensor) -> None:
        m.aux.mul_(0.9).add_(h.detach())

    module = Keeps(running)
    module.aux = torch.ones(3, 4)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    with pytest.raises(fs.PurityError, match="buffer"):
        fs.stage_vjp(stage, params, buffers, torch.randn(3, 4))
    assert torch.equal(module.aux, torch.ones(3, 4))


@ENGINES
def test_a_forward_that_fails_leaves_no_dead_tensor(engine: Any) -> None:
    def fails(m: Any, h: Tensor) -> None:
        m.aux = h
        raise KeyError("mine")

    module = Keeps(fails)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    with pytest.raises(KeyError, match="mine"):
        fs.stage_vjp(stage, params, buffers, torch.randn(3, 4))
    assert module.aux is None or not is_dead(module.aux)
    copy.deepcopy(module)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
@ENGINES
def test_stage_functions_are_copied(how: str, engine: Any) -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU()), torch.randn(3, 4)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine, remat="none")
    fs.stage_vjp(stage, params, buffers, x)
    copied = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda each: pickle.loads(pickle.dumps(each)),
    }[how](stage)
    assert copied is not stage
    assert (copied.module is module) == (how == "copy")
    assert repr(copied).replace("0 signature", "1 signature") == repr(stage)
    if how != "copy":
        module.eval()
    output, fresh, pullback = fs.stage_vjp(copied, params, buffers, x)
    expected, theirs, own = fs.stage_vjp(apply if how == "copy" else copied, params, buffers, x)
    assert copied.module.training
    torch.testing.assert_close((output, fresh), (expected, theirs))
    torch.testing.assert_close(pullback(torch.ones(3, 4))[1](), own(torch.ones(3, 4))[1]())


def test_nothing_is_left_of_a_run_that_leaves_a_module_untouched() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.log, module.notes = [1], {"n": 0}
    before = {name: (value, copy.copy(value)) for name, value in vars(module).items()}
    running = module[1].running_mean
    with untouched(module):
        module.log.append(2)
        module.notes["n"] = 1
        module.notes = {}
        module.later = nn.Linear(2, 2)
        module.count = 3
        module[1].running_mean = torch.ones(2)
        module.register_forward_hook(lambda *_: None)
        module.register_parameter("scale", nn.Parameter(torch.ones(2)))
        module.register_buffer("mask", torch.ones(2))
    assert {name: (value, value) for name, value in vars(module).items()} == before
    assert all(vars(module)[name] is value for name, (value, _) in before.items())
    assert module[1].running_mean is running


@ENGINES
def test_a_tensor_that_a_partial_function_keeps_is_alive_or_refused(engine: str) -> None:
    module, x = Keeps(lambda m, y: setattr(m, "aux", functools.partial(torch.add, y * 2))), torch.randn(3, 4)
    apply, params, buffers = fs.functionalize(module)
    if engine != "closures":
        with pytest.raises(fs.TraceError, match=r"leaves something on its module .*'aux'"):
            fs.stage_vjp(fs.compile(apply, backend=engine, fullgraph=True), params, buffers, x)
        return
    for _ in range(2):
        output, _, _ = fs.stage_vjp(apply, params, buffers, x)
        (kept,) = module.aux.args
        assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
        torch.testing.assert_close(module.aux(torch.zeros(4)), 2 * module.proj(x).detach())
        assert output.shape == kept.shape


@ENGINES
def test_a_tensor_that_a_closure_keeps_is_alive_or_refused(engine: str) -> None:
    module, x = Keeps(lambda m, y: setattr(m, "aux", lambda: y * 2)), torch.randn(3, 4)
    apply, params, buffers = fs.functionalize(module)
    if engine == "closures":
        fs.stage_vjp(apply, params, buffers, x)
        torch.testing.assert_close(module.aux(), 2 * module.proj(x).detach())
        return
    with pytest.raises(fs.TraceError, match=r"'aux'.* closes over a tensor of the forward"):
        fs.stage_vjp(fs.compile(apply, backend=engine, fullgraph=True), params, buffers, x)
    assert module.aux is None


class Counts(nn.Module):
    """Counts in a tensor of its own that its first call makes, as a buffer or as it is."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.proj, self.as_buffer = nn.Linear(4, 4), as_buffer

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "count"):
            if self.as_buffer:
                self.register_buffer("count", torch.ones(4))
            else:
                self.count = torch.ones(4)
        if self.as_buffer:
            self.count += 1
        else:
            self.count = self.count + 1
        y: Tensor = self.proj(x) * self.count
        return y


def test_a_kept_tensor_that_is_made_of_the_one_before_is_refused_in_a_trace_by_its_name() -> None:
    apply, params, buffers = fs.functionalize(Counts(as_buffer=False))
    fast, x = fs.compile(apply, backend="aten"), torch.ones(2, 4)
    fs.stage_vjp(fast, params, buffers, x)
    with pytest.raises(fs.TraceError, match=r"kept on its module in an earlier call \('count'\)"):
        fs.stage_vjp(fast, params, buffers, x)


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_buffer_that_the_first_call_registers_is_made_before_functionalize(
    engine: str,
) -> None:
    module, x = Counts(as_buffer=True), torch.ones(2, 4)

    def stage() -> Any:
        apply, params, buffers = fs.functionalize(module)
        return apply if engine == "closures" else fs.compile(apply, backend="aten"), params, buffers

    first = stage()
    with pytest.raises(fs.PurityError, match=r"as a buffer \(in __init__; .* call the module once before"):
        any(fs.stage_vjp(*first, x) is None for _ in range(2))
    module(x)
    output, buffers, _ = fs.stage_vjp(*stage(), x)
    torch.testing.assert_close((output, buffers["count"]), (module(x).detach(), module.count))


class Referring(nn.Module):
    """Keeps a weak reference to a tensor of its forward."""

    def __init__(self, keep: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.keep = nn.Linear(3, 3), keep
        self.found: Any = None
        self.held: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.keep(self, x, y)
        return y


def _beside_the_tensor(m: Any, x: Tensor, y: Tensor) -> None:
    m.held = y * 2
    m.found = weakref.ref(m.held)


def _in_a_new_list(m: Any, x: Tensor, y: Tensor) -> None:
    m.held = y * 2
    m.found = [weakref.ref(m.held)]


def _to_the_output(m: Any, x: Tensor, y: Tensor) -> None:
    m.found = weakref.ref(y)


def _to_the_input(m: Any, x: Tensor, y: Tensor) -> None:
    m.found = weakref.ref(x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep", [_beside_the_tensor, _in_a_new_list, _to_the_output, _to_the_input])
def test_a_weak_reference_that_would_lead_to_nothing_is_refused(
    keep: Callable[[Any, Tensor, Tensor], Any], compiled: bool
) -> None:
    module = Referring(keep)
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", fullgraph=True) if compiled else apply
    with pytest.raises(fs.PurityError, match=r"keeps a weak reference to a tensor .*Keep the tensor itself"):
        fs.stage_vjp(stage, params, buffers, torch.randn(2, 3))
    assert module.found is None
    assert module.held is None


def _to_what_is_gone(m: Any, x: Tensor, y: Tensor) -> None:
    m.found = weakref.ref(y * 2)


def _to_a_module(m: Any, x: Tensor, y: Tensor) -> None:
    m.found = weakref.ref(m.linear)


def _the_tensor_itself(m: Any, x: Tensor, y: Tensor) -> None:
    m.found = y * 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep", [_to_what_is_gone, _to_a_module, _the_tensor_itself])
def test_other_references_are_kept(keep: Callable[[Any, Tensor, Tensor], Any], compiled: bool) -> None:
    module, x = Referring(keep), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", fullgraph=True) if compiled else apply
    output = fs.stage_vjp(stage, params, buffers, x)[0]
    found = module.found
    torch.testing.assert_close(output, module(x).detach())
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, module.found.detach())
    else:
        assert found() is module.found()
