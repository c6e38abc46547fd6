"""What a forward may observe of its parameters and arguments besides their values, as eager sees it."""

from __future__ import annotations

import copy
import operator
import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from operator import is_not
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs

ENGINES = ("closures", "aten")


class Marked(nn.Parameter):
    """A parameter of a class of the user's."""


class Seeing(nn.Module):
    """Scales its output by what it sees."""

    def __init__(self, sees: Callable[..., Any]) -> None:
        super().__init__()
        self.proj, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.register_buffer("b", torch.ones(4))
        self.plain = nn.Buffer(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.own = Marked(torch.ones(4))
        for tensor, value in ((self.w, 3.0), (self.frozen, 4.0), (self.b, 5.0)):
            tensor.tag = value  # type: ignore[attr-defined]
        self.sees = sees

    @property
    def weight(self) -> nn.Parameter:
        return self.w

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        y = self.proj(x) @ self.w * self.own
        return y * (1 + float(self.sees(self, x, y, *others)))


def staged(module: nn.Module, engine: str) -> tuple[Any, Any, Any]:
    apply, params, buffers = fs.functionalize(module)
    return (
        apply if engine == "closures" else fs.compile(apply, backend=engine, fullgraph=True),
        params,
        buffers,
    )


def check(module: nn.Module, engine: str, argnums: tuple[int, ...], *args: Tensor, times: int = 2) -> None:
    """Compare with eager, in the first call and in the next."""
    leaves = [arg.clone().requires_grad_() if i in argnums else arg for i, arg in enumerate(args)]
    expected = module(*leaves)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    inputs = [leaves[i] for i in argnums]
    wanted = torch.autograd.grad(expected.sum(), [*inputs, *trained.values()])
    apply, params, buffers = staged(module, engine)
    for _ in range(times):
        output, _, pullback = fs.stage_vjp(apply, params, buffers, *args, argnums=argnums)
        of_inputs, weight_pullback = pullback(torch.ones_like(output))
        grads = weight_pullback()
        torch.testing.assert_close(output, expected.detach())
        torch.testing.assert_close([*of_inputs][: len(argnums)], [*wanted[: len(argnums)]])
        torch.testing.assert_close([grads[name] for name in trained], [*wanted[len(argnums) :]])


SEEN: dict[str, Callable[..., Any]] = {
    "isinstance of a parameter": lambda m, x, y: isinstance(m.w, nn.Parameter),
    "of a frozen one": lambda m, x, y: isinstance(m.frozen, nn.Parameter),
    "of a class of the user's": lambda m, x, y: isinstance(m.own, nn.Parameter),
    "of a buffer": lambda m, x, y: 2 * isinstance(m.b, nn.Parameter) + isinstance(m.plain, nn.Buffer),
    "of an activation": lambda m, x, y: isinstance(m.w * 1, nn.Parameter) + isinstance(y, nn.Parameter),
    "a parameter's attribute": lambda m, x, y: m.w.tag,
    "a frozen one's": lambda m, x, y: m.frozen.tag,
    "a buffer's": lambda m, x, y: m.b.tag,
    "an attribute that is there": lambda m, x, y: hasattr(m.w, "tag") + hasattr(m.proj.weight, "tag"),
    "parameters": lambda m, x, y: sum(p.numel() for p in m.parameters() if isinstance(p, nn.Parameter)),
    "which parameters train": lambda m, x, y: sum(p.requires_grad for p in m.parameters()),
    "a parameter is a leaf": lambda m, x, y: m.w.is_leaf + 2 * (m.w.grad_fn is None) + 4 * m.w.output_nr,
    "an argument is a leaf": lambda m, x, y: x.is_leaf + 2 * (x.grad_fn is None) + 4 * x.requires_grad,
    "no leaf": lambda m, x, y: y.is_leaf + 2 * (y.grad_fn is None) + 4 * (m.w.T.grad_fn is None),
    "an argument is no view": lambda m, x, y: (x._base is None) + 2 * x._is_view() + 4 * m.w._is_view(),
    "a parameter's view has it": lambda m, x, y: m.w.T._base is m.w,
    "the same each time": lambda m, x, y: (m.w is m.w) + 2 * (m.w is dict(m.named_parameters())["w"]),
}


@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seen", SEEN)
def test_a_forward_sees_what_it_sees_in_eager(seen: str, engine: str, argnums: tuple[int, ...]) -> None:
    check(Seeing(SEEN[seen]), engine, argnums, torch.randn(3, 4))


KINDS = defaultdict(int, {Tensor: 1, nn.Parameter: 2, Marked: 4, nn.Linear: 5})
OTHERS: list[Any] = [{"a": 1}, [2], "Linear", nn.Linear]
NAMED = {kind.__name__: value for kind, value in KINDS.items()}
Seeing.KINDS = KINDS  # type: ignore[attr-defined]

CLASSES: dict[str, Callable[..., Any]] = {
    "of a parameter": lambda m, x, y: type(m.w) is nn.Parameter,
    "of a frozen one": lambda m, x, y: type(m.frozen) in (nn.Parameter, nn.Buffer),
    "of the user's": lambda m, x, y: m.own.__class__ == Marked,
    "of an argument": lambda m, x, y: type(x) is torch.Tensor,
    "of an activation": lambda m, x, y: y.__class__ is not Tensor,
    "by name": lambda m, x, y: type(m.w).__name__ == "Parameter",
    "as another's": lambda m, x, y: type(m.w) is type(x),
    "as an entry": lambda m, x, y: KINDS[type(y)],
    "as an entry of a class's": lambda m, x, y: m.KINDS[x.__class__],
    "as an entry of a local": lambda m, x, y: (lambda kinds, z: kinds[z.__class__])(KINDS, y),
    "as an entry that may be missing": lambda m, x, y: m.KINDS.get(type(m.w), 3),
    "as an entry by name": lambda m, x, y: NAMED.get(type(y).__name__, 3),
    "as an entry, asked for": lambda m, x, y: type(x) in KINDS,
}


@pytest.mark.parametrize("seen", CLASSES)
def test_the_very_class_of_a_tensor_is_eagers_uncompiled_and_refused_in_a_trace(seen: str) -> None:
    module, x = Seeing(CLASSES[seen]), torch.randn(3, 4)
    for argnums in ((), (0,)):
        check(module, "closures", argnums, x)
    with pytest.raises(fs.TraceError, match=r"compares the class of a tensor .*isinstance.*apply` works"):
        fs.stage_vjp(*staged(module, "aten"), x)


@pytest.mark.parametrize(
    "sees",
    [
        lambda m, x, y: type(m) is Seeing,
        lambda m, x, y: type(x) is list,
        lambda m, x, y: type(x.shape) is torch.Size,
        lambda m, x, y: type(m.sees) is not Tensor,
        lambda m, x, y: type(x) is type(y),
        lambda m, x, y: type(m.w) is type(m.proj.weight),
        lambda m, x, y: KINDS.get(type(m.proj), 3) + KINDS.get(type(m), KINDS[Tensor]),
        lambda m, x, y: {"n": 2}.get(type(x).__name__, 3),
        lambda m, x, y: type(x) in OTHERS or type(m.w).__name__ in OTHERS,
    ],
)
def test_other_classes_are_compared_in_a_trace(sees: Callable[..., Any]) -> None:
    check(Seeing(sees), "aten", (0,), torch.randn(3, 4))


def test_an_attribute_of_a_parameter_is_seen_to_change() -> None:
    def sees(m: Seeing, x: Tensor, y: Tensor) -> float:
        return m.w.tag + getattr(m.proj.weight, "later", 0.0)  # type: ignore[attr-defined]

    module, x = Seeing(sees), torch.randn(3, 4)
    stage = staged(module, "aten")

    def same() -> bool:
        return torch.allclose(fs.stage_vjp(*stage, x)[0], module(x))

    assert same()
    module.w.tag = 7.0
    assert same()
    module.proj.weight.later = 2.0  # type: ignore[assignment]
    assert same()
    traced = repr(stage[0])
    for _ in range(2):
        module.w.main_grad = torch.ones(4)  # type: ignore[assignment]  # which nobody reads
        assert same()
    assert repr(stage[0]) == traced


@pytest.mark.parametrize("engine", ENGINES)
def test_the_grad_of_a_parameter_is_refused_where_it_has_one_or_may_have_one(engine: str) -> None:
    module, x = Seeing(lambda m, x, y: m.w.grad is None), torch.randn(3, 4)
    if engine == "closures":
        check(module, engine, (0,), x)
    else:  # it would be none in later calls, too
        with pytest.raises(fs.TraceError, match=r"reads the `\.grad` .*\['w'\]\), which changes from call"):
            fs.stage_vjp(*staged(module, engine), x)
    module.w.grad = torch.ones(4, 4)
    with pytest.raises(fs.StageError, match=r"reads the `\.grad` of a parameter.* Pass it as an argument"):
        fs.stage_vjp(*staged(module, engine), x)


def test_what_was_given_looks_afterwards_as_before() -> None:
    module, x = Seeing(lambda m, x, y: isinstance(m.frozen, nn.Parameter)), torch.randn(3, 4)
    apply, params, buffers = fs.functionalize(module)
    output, _ = apply(params, buffers, x)
    torch.testing.assert_close(output, module(x).detach())
    fs.stage_vjp(apply, params, buffers, x)
    assert all(
        type(tensor) is Tensor and not vars(tensor) for tensor in (*params.values(), *buffers.values())
    )
    assert vars(module.w) == {"tag": 3.0}


def test_a_region_that_runs_again_sees_the_same() -> None:
    def region(m: Seeing, y: Tensor) -> Tensor:
        return torch.tanh(y * m.w[0]) * (m.w.tag if isinstance(m.frozen, nn.Parameter) else 1)  # type: ignore[attr-defined]

    class Checkpointed(Seeing):
        def forward(self, x: Tensor, *_: Tensor) -> Tensor:
            return checkpoint(region, self, self.proj(x) @ self.w * self.own, use_reentrant=False)

    for engine in ENGINES:
        for argnums in ((), (0,)):
            check(Checkpointed(lambda *_: 0), engine, argnums, torch.randn(3, 4))


def noted(value: Callable[[Tensor], Any]) -> Callable[..., float]:
    def sees(m: Seeing, x: Tensor, y: Tensor) -> float:
        m.w.noted = value(y)  # type: ignore[attr-defined]
        return 0.0

    return sees


def test_what_a_forward_notes_on_a_parameter_stays_there() -> None:
    module = Seeing(noted(lambda y: "seen"))
    fs.stage_vjp(*staged(module, "closures"), torch.randn(3, 4))
    assert module.w.noted == "seen"
    other = Seeing(noted(lambda y: "seen"))
    with pytest.raises(fs.TraceError, match=r"sets an attribute, 'noted', on 'w' .* Set it on the module"):
        fs.stage_vjp(*staged(other, "aten"), torch.randn(3, 4))
    kept = Seeing(noted(lambda y: y))
    with pytest.raises(fs.PurityError, match=r"'noted', on 'w' .* Keep it on the module, or return it"):
        fs.stage_vjp(*staged(kept, "closures"), torch.randn(3, 4))
    assert not hasattr(kept.w, "noted")


class Keeping(nn.Module):
    """Keeps a tensor with attributes."""

    kept: Any = None

    def __init__(self, note: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.proj, self.note = nn.Linear(4, 4), note

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        y.note = self.note(y)  # type: ignore[attr-defined]
        self.kept = [y]
        return y * 2


@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("engine", ENGINES)
def test_attributes_of_a_tensor_that_is_kept_are_kept(engine: str, argnums: tuple[int, ...]) -> None:
    module, x = Keeping(lambda y: 7), torch.randn(3, 4)
    stage = staged(module, engine)
    for _ in range(2):
        fs.stage_vjp(*stage, x, argnums=argnums)
        (kept,) = module.kept
        torch.testing.assert_close(kept, module.proj(x).detach())
        assert kept.note == 7
        assert not kept.requires_grad


def test_tensors_among_them_are_taken_along_or_refused() -> None:
    module, x = Keeping(lambda y: y * 2), torch.randn(3, 4)
    fs.stage_vjp(*staged(module, "closures"), x)
    torch.testing.assert_close(module.kept[0].note, 2 * module.proj(x).detach())
    with pytest.raises(fs.TraceError, match="sets an attribute, 'note', on a tensor that it leaves"):
        fs.stage_vjp(*staged(module, "aten"), x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "sees",
    [
        lambda m, x, y, z: x is z,
        lambda m, x, y, z: len({id(x), id(z)}),
        lambda m, x, y, z: {x: 2.0}.get(z, 1.0),
    ],
)
def test_a_tensor_that_is_passed_twice_is_one_tensor(sees: Callable[..., Any], engine: str) -> None:
    module, x = Seeing(sees), torch.randn(3, 4)
    apply, params, buffers = staged(module, engine)
    for others in ((x, x), (x, x.clone()), (x, x)):
        output, _, _ = fs.stage_vjp(apply, params, buffers, *others, argnums=())
        torch.testing.assert_close(output, module(*others).detach())


ASKED: queue.Queue[Any] = queue.Queue()
ANSWERED: queue.Queue[Any] = queue.Queue()


def _work() -> None:
    while True:
        x, w = ASKED.get()
        ANSWERED.put(torch.relu(x) @ w)


threading.Thread(target=_work, daemon=True).start()


class Asking(nn.Module):
    """Lets a thread of the user's compute, by a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        ASKED.put((self.proj(x), self.w))
        answer: Tensor = ANSWERED.get(timeout=60)
        return answer


@pytest.mark.parametrize("argnums", [(), (0,)])
def test_a_thread_may_be_asked_through_a_queue_of_the_users(argnums: tuple[int, ...]) -> None:
    check(Asking(), "closures", argnums, torch.randn(3, 4))
    with pytest.raises(fs.TraceError, match=r"gives one something to do, .* Do it outside"):
        fs.stage_vjp(*staged(Asking(), "aten"), torch.randn(3, 4))


def test_a_compiled_stage_refuses_a_thread_with_effects_alone() -> None:
    seen: list[int] = []

    def sees(m: Seeing, x: Tensor, y: Tensor) -> float:
        thread = threading.Thread(target=seen.append, args=(1,))
        thread.start()
        thread.join()
        return 0.0

    with pytest.raises(fs.TraceError, match=r"starts a thread .* Do it outside"):
        fs.stage_vjp(*staged(Seeing(sees), "aten"), torch.randn(3, 4))


class Noting(nn.Module):
    """Reads and sets attributes of its argument; in a region, or on a plain tape, if it is to."""

    def __init__(self, how: str, notes: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.proj, self.how, self.notes = nn.Linear(4, 4), how, notes

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "tape":
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(leaf.sum(), leaf)
        if self.how == "region":
            return checkpoint(self.noted, x, use_reentrant=False)
        return self.noted(x)

    def noted(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y * float(self.notes(x, y) or 1)


def seen_by(notes: Callable[[Any, Tensor], Any], how: str, argnums: Any, x: Tensor) -> Tensor:
    """The output of two calls, compiled or not."""
    apply, params, buffers = fs.functionalize(Noting(how, notes))
    if how == "compiled":
        apply = fs.compile(apply, backend="aten", fullgraph=True)
    weight = torch.eye(4)
    fs.stage_vjp(apply, {**params, "proj.weight": weight}, buffers, x, argnums=argnums)
    return fs.stage_vjp(apply, {**params, "proj.weight": weight}, buffers, x, argnums=argnums)[0]


WAYS = ("levels", "tape", "region", "compiled")


@pytest.mark.parametrize("argnums", [None, ()])
@pytest.mark.parametrize("how", WAYS)
def test_a_forward_reads_the_attributes_and_the_class_of_an_argument(how: str, argnums: Any) -> None:
    module = Noting(how, lambda x, y: getattr(x, "tag", 1.0) * (1 + isinstance(x, nn.Parameter)))
    apply, params, buffers = fs.functionalize(module)
    if how == "compiled":
        apply = fs.compile(apply, backend="aten", fullgraph=True)
    for tag in (None, 3.0, 4.0, None):
        for x in (torch.randn(2, 4), nn.Parameter(torch.randn(2, 4), requires_grad=False)):
            if tag is not None:
                x.tag = tag  # type: ignore[attr-defined]
            output = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)[0]
            torch.testing.assert_close(output, module(x).detach())


@pytest.mark.parametrize("argnums", [None, ()])
@pytest.mark.parametrize("how", ["levels", "tape"])
def test_what_a_forward_notes_on_an_argument_stays_there(how: str, argnums: Any) -> None:
    def notes(x: Any, y: Tensor) -> int:
        x.times = getattr(x, "times", 0) + 1
        if hasattr(x, "old"):
            del x.old
        return int(x.times)

    x: Any = torch.ones(2, 4)
    x.old = 1
    first = seen_by(lambda x, y: None, "levels", argnums, torch.ones(2, 4))
    second = seen_by(notes, how, argnums, x)
    assert vars(x) == {"times": 2}
    assert second.mean() == pytest.approx(2 * (second / 2).mean())
    assert first.shape == second.shape


def set_on(x: Any, y: Tensor) -> None:
    x.tag = 3


def deleted_from(x: Any, y: Tensor) -> None:
    del x.old


@pytest.mark.parametrize("notes", [set_on, deleted_from])
def test_a_compiled_stage_refuses_to_note_something_on_an_argument(notes: Any) -> None:
    x: Any = torch.ones(2, 4)
    x.old = 1
    with pytest.raises(fs.TraceError, match=r"an attribute, '\w+', on an argument .* return it"):
        seen_by(notes, "compiled", None, x)
    assert vars(x) == {"old": 1}


def test_a_tensor_noted_on_an_argument_is_refused_and_nothing_is_noted() -> None:
    def notes(x: Any, y: Tensor) -> None:
        x.number = 1
        x.kept = y

    x = torch.ones(2, 4)
    with pytest.raises(fs.PurityError, match=r"'kept', on an argument .* may hold tensors"):
        seen_by(notes, "levels", None, x)
    assert vars(x) == {}


def test_a_compiled_stage_refuses_to_read_a_tensor_that_is_an_attribute_of_an_argument() -> None:
    x: Any = torch.ones(2, 4)
    x.mask = torch.ones(2, 4)
    with pytest.raises(fs.TraceError, match=r"may read 'mask' of an argument .* type Tensor"):
        seen_by(lambda x, y: len(x.mask), "compiled", None, x)
    seen_by(lambda x, y: 1.0, "compiled", None, x)


@pytest.mark.parametrize("argnums", [None, ()])
def test_an_argument_is_the_base_of_its_views(argnums: Any) -> None:
    def notes(x: Tensor, y: Tensor) -> float:
        assert x.T._base is x
        assert x.view(-1)[2:].view(2, -1)._base is x
        assert x._base is None
        return 1.0

    for how in ("levels", "tape", "compiled"):
        seen_by(notes, how, argnums, torch.ones(2, 4))


def test_a_trace_refuses_to_tell_whether_tensors_are_set_to_one_memory() -> None:
    with pytest.raises(fs.TraceError, match="is_set_to"):
        seen_by(lambda x, y: 1.0 + x.is_set_to(x), "compiled", None, torch.ones(2, 4))


def of(tensor: Tensor) -> Tensor:
    return tensor


def is_among(tensor: Tensor, others: Any) -> bool:
    found = False
    for other in others:
        if other is tensor:
            found = True
    return found


def are_any_one(some: Any, others: Any) -> int:
    return sum(a is b for a in some for b in others)


def is_one_until(tensor: Any, other: Tensor) -> bool:
    found = tensor is other
    tensor = None
    return found


def pair(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, 1


ONE: dict[str, tuple[Callable[[Seeing, Tensor], Tensor], Callable[..., Any]]] = {
    "a parameter": (lambda m, x: m.w, lambda m, x, y, z: z is m.w),
    "a parameter by id": (lambda m, x: m.w, lambda m, x, y, z: id(z) == id(m.w)),
    "a parameter as a key": (lambda m, x: m.w, lambda m, x, y, z: {m.w: 2.0}.get(z, 1.0)),
    "a parameter among others": (lambda m, x: m.w, lambda m, x, y, z: any(z is p for p in m.parameters())),
    "a parameter in a list": (lambda m, x: m.w, lambda m, x, y, z: z is [m.w][0]),
    "a buffer": (lambda m, x: m.b, lambda m, x, y, z: z is m.b),
    "a frozen parameter": (lambda m, x: m.frozen, lambda m, x, y, z: m.frozen is not z),
    "an argument": (lambda m, x: x, lambda m, x, y, z: x is z),
    "an argument in a container": (lambda m, x: x, lambda m, x, y, z: z in {x}),
    "an argument by its ids": (lambda m, x: x, lambda m, x, y, z: len({*map(id, (x, z))})),
    "a parameter by a function": (lambda m, x: m.w, lambda m, x, y, z: operator.is_(z, m.w)),
    "a parameter by its function": (lambda m, x: m.w, lambda m, x, y, z: is_not(m.w, of(z))),
    "a parameter by another's function": (
        lambda m, x: m.w,
        lambda m, x, y, z: sum(map(operator.is_, [z], [m.w])),
    ),
    "a parameter that functions return": (lambda m, x: m.w, lambda m, x, y, z: of(z) is of(m.w)),
    "a parameter that a method returns": (lambda m, x: m.w, lambda m, x, y, z: of(z) is m.get_parameter("w")),
    "a parameter in a loop": (lambda m, x: m.w, lambda m, x, y, z: is_among(z, [m.w, y])),
    "a parameter in loops": (lambda m, x: m.w, lambda m, x, y, z: are_any_one([z, y], [m.w, x])),
    "an argument for a while": (lambda m, x: x, lambda m, x, y, z: is_one_until(x, z)),
    "an argument by a function": (lambda m, x: x, lambda m, x, y, z: operator.is_not(x, z)),
    "an argument that functions return": (lambda m, x: x, lambda m, x, y, z: of(x) is of(z)),
    "an argument by an iterator": (lambda m, x: x, lambda m, x, y, z: next(iter([x])) is next(iter([z]))),
    "a parameter by an iterator": (lambda m, x: m.w, lambda m, x, y, z: next(iter([m.w])) is [y, z].pop()),
    "a parameter in what functions return": (lambda m, x: m.w, lambda m, x, y, z: pair(m.w)[0] is pair(z)[0]),
    "a parameter by a property": (lambda m, x: m.w, lambda m, x, y, z: m.weight is {"z": z}.get("z")),
    "an argument in a region": (
        lambda m, x: x,
        lambda m, x, y, z: float(checkpoint(lambda t: (t * (1 + (x is z))).sum(), x, use_reentrant=False)),
    ),
}


@pytest.mark.parametrize("argnums", [(), (0,), (0, 1)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ONE)
def test_tensors_that_are_one_to_the_caller_are_one_or_are_not_compared(
    case: str, engine: str, argnums: tuple[int, ...]
) -> None:
    given, sees = ONE[case]
    module, x = Seeing(sees), torch.randn(3, 4)
    z = given(module, x)
    expected = module(x, z).detach()
    apply, params, buffers = staged(module, engine)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for _ in range(2):
        if case.startswith("an argument") and not argnums and (engine == "closures" or "region" not in case):
            output, _, _ = fs.stage_vjp(apply, params, buffers, x, z, argnums=argnums)
            torch.testing.assert_close(output.detach(), expected)
            continue
        one = "(a tensor by identity|just returned).* twice, or .* is its parameter or buffer too"
        with pytest.raises(fs.StageError, match=one if "region" not in case else f"{one}|reads the value"):
            fs.stage_vjp(apply, params, buffers, x, z, argnums=argnums)
    torch.testing.assert_close(buffers, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ENGINES)
def test_they_are_one_to_a_caller_who_records_nothing_too(engine: str, mode: Any) -> None:
    x, leaf = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    for sees, given in (
        (lambda m, x, y, z: m.w is z, lambda m: (x, m.w)),
        (lambda m, x, y, z: x is z, lambda m: (leaf, leaf)),
    ):
        module = Seeing(sees)
        stage = staged(module, engine)
        with mode(), pytest.raises(fs.StageError, match="compares a tensor by identity"):
            fs.stage_vjp(*stage, *given(module))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trace_for_another_tensor_is_none_for_one_that_is_a_buffer_too(engine: str) -> None:
    module, x = Seeing(lambda m, x, y, z: m.b is z), torch.randn(3, 4)
    stage = staged(module, engine)
    other = module.b.clone()
    torch.testing.assert_close(fs.stage_vjp(*stage, x, other)[0], module(x, other).detach())
    for buffer in (module.b, stage[2]["b"]):
        with pytest.raises(fs.StageError, match="compares a tensor by identity"):
            fs.stage_vjp(*stage, x, buffer)


@pytest.mark.parametrize("argnums", [(), (0, 1)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_tensor_that_is_there_twice_may_be_compared_with_others(
    engine: str, argnums: tuple[int, ...]
) -> None:
    def sees(m: Seeing, x: Tensor, y: Tensor, z: Tensor) -> float:
        others = [part for part in m.modules() if part is not m.proj and m.sees is sees]
        others += [of(z) is of(y), operator.is_(y, m.w), type(of(x)) is type(of(z)), is_among(m.w, [x, y])]
        others += [m.weight is m.proj, len([x]) is len([y]), next(iter([1])) is None]
        return float(x is y) + (z is None) + (x is not m.w) + len(others) + len({id(m), id(y)})

    x = torch.randn(3, 4)
    module = Seeing(sees)
    output, _, _ = fs.stage_vjp(*staged(module, engine), x, x, argnums=argnums)
    torch.testing.assert_close(output, module(x, x).detach())


ALL_ATTRIBUTES: dict[str, Callable[..., Any]] = {
    "of a parameter": lambda m, x, y: len(vars(m.w)),
    "of a plain parameter": lambda m, x, y: len(m.proj.weight.__dict__),
    "of the user's class": lambda m, x, y: len(vars(m.own)),
    "of all": lambda m, x, y: sum(len(p.__dict__) for p in m.parameters()),
    "of a buffer": lambda m, x, y: "".join(sorted(vars(m.b))) == "tag",
    "of an argument": lambda m, x, y: len(x.__dict__) + len([*vars(x)]),
    "of an activation": lambda m, x, y: len(vars(y)),
}


@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("seen", ALL_ATTRIBUTES)
def test_all_attributes_of_a_tensor_are_eagers_uncompiled_and_refused_in_a_trace(
    seen: str, argnums: tuple[int, ...]
) -> None:
    module, x = Seeing(ALL_ATTRIBUTES[seen]), torch.randn(3, 4)
    check(module, "closures", argnums, x)
    with pytest.raises(fs.TraceError, match=r"all attributes of a tensor .* by name: getattr"):
        fs.stage_vjp(*staged(module, "aten"), x, argnums=argnums)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "seen",
    [
        lambda m, x, y: "tag" in vars(m.w),
        lambda m, x, y: m.w.__dict__["tag"] + vars(m.w).get("other", 2.0),
        lambda m, x, y: len(vars(m)) + len(m.proj.__dict__),
    ],
)
def test_an_attribute_that_is_named_may_be_read_in_a_trace(seen: Any, engine: str) -> None:
    check(Seeing(seen), engine, (0,), torch.randn(3, 4))


def test_a_copy_of_a_parameter_is_one() -> None:
    def sees(m: Seeing, x: Tensor, y: Tensor) -> float:
        return isinstance(copy.deepcopy(m.w), nn.Parameter) + len(vars(copy.deepcopy(m.frozen)))

    own = nn.Parameter.__deepcopy__
    check(Seeing(sees), "closures", (0,), torch.randn(3, 4))
    assert nn.Parameter.__deepcopy__ is own


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "asks", [lambda t: t._base is None, lambda t: t.T._base is t, lambda t: t._is_view()]
)
def test_a_region_may_not_ask_what_it_has_views_of(asks: Callable[[Tensor], Any], reentrant: bool) -> None:
    def sees(m: Seeing, x: Tensor, y: Tensor) -> Any:
        def region(t: Tensor) -> Tensor:
            return t * 2 if asks(t) else t

        return checkpoint(region, x, use_reentrant=reentrant)[0, 0].detach()

    x = torch.randn(3, 4)
    with pytest.raises(fs.StageError, match=r"region asks whether a tensor is a view.* outside of the check"):
        fs.stage_vjp(*staged(Seeing(sees), "closures"), x)


@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_keyword_that_requires_grad_is_refused_where_its_gradient_would_be_lost(
    engine: str, argnums: tuple[int, ...]
) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: Any = None) -> Tensor:
            return super().forward(x) * (scale.numel() if x.numel() == 4 else scale)

    stage, scale = staged(Scaled(4, 4), engine), torch.ones(4, requires_grad=True)
    fs.stage_vjp(*stage, torch.ones(1, 4), scale=scale, argnums=argnums)
    with pytest.raises(fs.StageError, match=r"requires grad and is not handed to it"):
        fs.stage_vjp(*stage, torch.ones(3, 4), scale=scale, argnums=argnums)


def marked(m: Seeing, x: Tensor) -> Tensor:
    return m.w.detach().requires_grad_()


def thawed(m: Seeing, x: Tensor) -> Tensor:
    h = x.detach()
    h.requires_grad = True
    return h


def copied(m: Seeing, x: Tensor) -> Tensor:
    return copy.deepcopy(m.w)


def of_a_copied_layer(m: Seeing, x: Tensor) -> Tensor:
    layer = copy.deepcopy(m.proj)
    return layer(x.detach())


ASKS: dict[str, Callable[[Tensor], Any]] = {
    "requires grad": lambda t: t.requires_grad,
    "of what is made of it": lambda t: (t * 2).requires_grad,
    "a leaf": lambda t: t.is_leaf,
    "has a node": lambda t: (t * 2).grad_fn is None,
}


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("asks", ASKS)
@pytest.mark.parametrize("made", [marked, thawed, copied, of_a_copied_layer])
def test_what_a_forward_has_marked_or_copied_requires_grad(
    made: Callable[..., Tensor], asks: str, argnums: tuple[int, ...], no_grad: bool
) -> None:
    def sees(m: Seeing, x: Tensor, y: Tensor) -> Any:
        with torch.set_grad_enabled(not no_grad):
            return ASKS[asks](made(m, x))

    module, x = Seeing(sees), torch.randn(3, 4)
    check(module, "closures", argnums, x)
    if made in (marked, thawed):
        check(module, "aten", argnums, x)
    else:
        with pytest.raises(fs.TraceError, match=r"deepcopy.*The uncompiled `apply` works"):
            fs.stage_vjp(*staged(module, "aten"), x, argnums=argnums)


def test_a_forward_that_is_differentiated_in_turn_may_not_ask_for_its_marks() -> None:
    module = Seeing(lambda m, x, y: marked(m, x).requires_grad)
    apply, params, buffers = staged(module, "closures")
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(fs.StageError, match=r"asking what requires grad after requires_grad_\(\)"):
        fs.stage_vjp(apply, params, buffers, x)
