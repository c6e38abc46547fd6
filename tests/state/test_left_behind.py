"""What a forward changes besides attributes, lists and dicts of its module: each call does, as in eager."""

from __future__ import annotations

import array
import copy
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

SEEN: list[Tensor] = []
TURN = {"odd": False}


class Slotted:
    """Keeps what it has in slots."""

    __slots__ = ("calls", "last")

    def __init__(self) -> None:
        self.calls: int = 0
        self.last: Tensor | None = None


def called() -> None:
    """A function with an attribute."""


class Leaving(nn.Module):
    """Changes something in each call."""

    on_class: ClassVar[list[Tensor]] = []

    def __init__(self, what: str) -> None:
        super().__init__()
        self.lin, self.what = nn.Linear(3, 3), what
        self.numbers, self.typed, self.slotted = numpy.zeros(2), array.array("d", [0.0]), Slotted()
        self.counter, self.recent = Counter("a"), OrderedDict(a=1, b=2, c=3)
        called.calls = 0  # type: ignore[attr-defined]
        self.function = called
        TURN["odd"] = False
        SEEN.clear()
        self.on_class.clear()

    def forward(self, x: Tensor) -> Tensor:
        output = self.lin(x)
        if self.what == "an array of NumPy":
            self.numbers += 1
        elif self.what == "an array of Python":
            self.typed.append(1.0)
        elif self.what == "a number in a slot":
            self.slotted.calls += 1
        elif self.what == "an attribute of a function":
            self.function.calls += 1  # type: ignore[attr-defined]
        elif self.what == "a counter":
            self.counter.update("ab")
        elif self.what == "an order":
            self.recent.move_to_end(next(iter(self.recent)))
        elif self.what == "a global that comes back":
            TURN["odd"] = not TURN["odd"]
        elif self.what == "a tensor in a slot":
            self.slotted.last = output
        elif self.what == "a tensor in a global":
            SEEN.append(output)
        elif self.what == "a tensor on a class":
            self.on_class.append(output)
        return output * (2 if TURN["odd"] else 1)

    def left(self) -> list[Any]:
        """What is there now."""
        slotted = self.slotted.calls, self.slotted.last
        counted = dict(self.counter), [*self.recent], called.calls, dict(TURN)  # type: ignore[attr-defined]
        return [self.numbers.tolist(), [*self.typed], slotted, counted, [*SEEN], [*self.on_class]]


def run(stage: Callable[[Tensor], Any], module: Leaving) -> list[Any]:
    torch.manual_seed(0)
    return [(stage(torch.randn(2, 3)), copy.copy(module.left())) for _ in range(4)]


def functional(what: str) -> tuple[Leaving, fs.FunctionalStage, list[Any]]:
    """A module that changes something, as a stage, and what eager's runs return and leave."""
    torch.manual_seed(0)
    module = Leaving(what)
    expected = run(module, module)
    torch.manual_seed(0)
    module = Leaving(what)
    return module, fs.functionalize(module), expected


def plain(value: Any) -> Any:
    """Values with tensors as lists, all of them alive."""
    if isinstance(value, Tensor):
        assert type(value) is Tensor
        assert "Tracking" not in repr(value)
        return value.detach().tolist()
    return [*map(plain, value)] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize(
    "what",
    [
        *("an array of NumPy", "an array of Python", "a number in a slot", "an attribute of a function"),
        *("a counter", "an order", "a global that comes back"),
    ],
)
def test_a_forward_changes_it_in_every_call(what: str, engine: str) -> None:
    module, (apply, params, _), expected = functional(what)
    stage = apply if engine == "closures" else fs.compile(apply, backend="aten")
    assert plain(run(lambda x: fs.stage_vjp(stage, params, {}, x)[0], module)) == plain(expected)


@pytest.mark.parametrize("what", ["a tensor in a slot", "a tensor in a global", "a tensor on a class"])
def test_a_tensor_that_is_left_is_alive_or_refused(what: str) -> None:
    module, (apply, params, _), expected = functional(what)
    with pytest.raises(fs.TraceError, match="leaves a tensor"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, {}, torch.randn(2, 3))
    assert module.left()[2:] == Leaving("").left()[2:]  # the refusal has put it back
    assert plain(run(lambda x: fs.stage_vjp(apply, params, {}, x)[0], module)) == plain(expected)


def test_a_stage_that_changes_what_it_reads_in_every_call_says_so() -> None:
    apply, params, _ = fs.functionalize(Leaving("an array of NumPy"))
    stage = fs.compile(apply, backend="aten")
    for _ in range(7):
        fs.stage_vjp(stage, params, {}, torch.ones(2, 3))
    with pytest.warns(UserWarning, match="has been traced in every call"):
        fs.stage_vjp(stage, params, {}, torch.ones(2, 3))


class Store:
    """Where auxiliary losses are kept for whoever trains, which nothing in the stage reads."""

    last: Any = None
    first: Any = None

    def __init__(self) -> None:
        self.item: Any = None

    @classmethod
    def keep(cls, value: Any) -> None:
        cls.first = value


OBJECT, LAST = Store(), None


def _on_the_class(value: Any) -> None:
    Store.last = value


def _in_a_global(value: Any) -> None:
    global LAST
    LAST = value


def _on_a_function(value: Any) -> None:
    called.kept = value  # type: ignore[attr-defined]


def _on_an_object(value: Any) -> None:
    OBJECT.item = value


PLACES: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {
    "a class": (_on_the_class, lambda: Store.last),
    "a class, by its method": (Store.keep, lambda: Store.first),
    "a global": (_in_a_global, lambda: LAST),
    "a function": (_on_a_function, lambda: getattr(called, "kept", None)),
    "an object": (_on_an_object, lambda: OBJECT.item),
}


class KeepingLosses(nn.Linear):
    """Leaves a loss in a place that it never reads; fails then, if it is to."""

    def __init__(self, keep: str, fails: bool) -> None:
        super().__init__(3, 3)
        self.keep, self.fails = keep, fails

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        PLACES[self.keep][0](y.square().mean())
        if self.fails:
            raise ArithmeticError("of the stage's own")
        return y


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_leaves_where_it_reads_nothing_is_refused_in_a_trace_and_not_left(
    place: str, fails: bool
) -> None:
    keep, kept = PLACES[place]
    keep(None)
    apply, params, buffers = fs.functionalize(KeepingLosses(place, fails))
    error: Any = ArithmeticError if fails else fs.TraceError
    with pytest.raises(
        error, match="of the stage's own" if fails else "leaves a tensor outside of its module"
    ):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.ones(2, 3))
    assert type(kept()) in (type(None), Tensor)
    keep(None)


@pytest.mark.parametrize("place", ["a class", "a class, by its method", "a global", "an object"])
def test_what_an_uncompiled_forward_leaves_where_it_reads_nothing_is_eagers(place: str) -> None:
    keep, kept = PLACES[place]
    module, x = KeepingLosses(place, fails=False), torch.randn(2, 3)
    keep(None)
    fs.stage_vjp(*fs.functionalize(module), x)
    left = kept()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(left)
    torch.testing.assert_close(left, module(x).square().mean().detach())
    keep(None)
