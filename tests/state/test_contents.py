"""What a module holds is remembered from call to call, and looked at anew when something is exchanged."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

NOW: dict[str, Any] = {"does": None}
"""What the forward does; not within reach of the module, so that it changes nothing there."""


class Place:
    """A plain object."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class Slots:
    """One without a namespace."""

    __slots__ = ("value",)

    def __init__(self, value: Any = None) -> None:
        self.value = value


class Does(nn.Module):
    """Does with itself and an activation what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = 0
        self.any: Any = None
        self.log: list[Any] = []
        self.named: dict[str, Any] = {"inside": [[]]}
        self.place = Place([])
        self.bound: Any = partial(list, inside=[])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if NOW["does"] is not None:
            NOW["does"](self, h)
        return self.second(h.tanh())


@pytest.fixture(autouse=True)
def _does_nothing() -> Any:
    yield
    NOW["does"] = None


def run_quietly(module: nn.Module, times: int = 3) -> Callable[[], Tensor]:
    """Run F a few times, and return how to run it once more on the same input."""
    apply, params, buffers = fs.functionalize(module)
    x = torch.ones(2, 4)

    def once() -> Tensor:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        pullback(torch.ones_like(output))[1]()
        result: Tensor = output
        return result

    for _ in range(times):
        once()
    return once


def _hooked(module: Any) -> Callable[[Any], None]:
    kept: list[Any] = []

    def hook(*_: Any) -> None:
        if NOW["does"] is not None:
            kept.append(NOW["h"])

    module.second.register_forward_hook(hook)

    def exchange(new: Any) -> None:
        nonlocal kept
        kept = new

    return exchange


Exchange = Callable[[Any], list[Any]]


def a_list(m: Any) -> list[Any]:
    m.log = []
    return m.log


def a_list_where_nothing_was(m: Any) -> list[Any]:
    m.any = []
    return m.any


def a_list_in_a_list(m: Any) -> list[Any]:
    m.named["inside"][0] = []
    return m.named["inside"][0]


def a_list_under_a_new_name(m: Any) -> list[Any]:
    m.new = []
    return m.new


def a_list_in_an_object(m: Any) -> list[Any]:
    m.place.value = []
    return m.place.value


def a_list_in_a_new_object(m: Any) -> list[Any]:
    m.place = Place([])
    return m.place.value


def a_namespace(m: Any) -> list[Any]:
    m.place.__dict__ = {"value": []}
    return m.place.value


def a_list_in_a_tuple(m: Any) -> list[Any]:
    m.any = (1, ([],))
    return m.any[1][0]


def a_list_in_a_deque(m: Any) -> list[Any]:
    m.any = deque([[]])
    return m.any[0]


def a_list_among_keywords(m: Any) -> list[Any]:
    m.bound.keywords["inside"] = []
    return m.bound.keywords["inside"]


def a_list_on_a_submodule(m: Any) -> list[Any]:
    m.second.log = []
    return m.second.log


def a_list_on_a_new_submodule(m: Any) -> list[Any]:
    m.extra = nn.Tanh()
    m.extra.log = []
    return m.extra.log


EXCHANGES = [value for name, value in list(globals().items()) if name.startswith("a_")]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_a_forward_leaves_where_something_was_exchanged_is_no_dead_tensor(exchange: Exchange) -> None:
    module = Does()
    once = run_quietly(module)
    for _ in range(2):
        found = exchange(module)
        NOW["does"] = lambda m, h, found=found: found.append(h)
        once()
        once()
        assert len(found) == 2
        for tensor in found:
            assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            torch.testing.assert_close(tensor, module.first(torch.ones(2, 4)).detach())
        NOW["does"] = None
        once()


def test_a_cell_that_is_rebound_is_looked_into() -> None:
    module = Does()
    exchange = _hooked(module)
    once = run_quietly(module)
    found: list[Any] = []
    exchange(found)
    NOW["does"] = lambda _, h: NOW.__setitem__("h", h)
    once()
    assert len(found) == 1
    assert not torch._C._functorch.is_functorch_wrapped_tensor(found[0])


def test_tensors_are_taken_out_call_after_call_in_a_module_that_changes_each_time() -> None:
    module = Does()
    once = run_quietly(module)

    def note(m: Any, h: Tensor) -> None:
        m.steps += 1
        m.any = h if m.steps % 3 else (h, None)
        m.place.value = h.mean()
        m.log.append(h)

    NOW["does"] = note
    for _ in range(7):
        once()
        any_of = module.any if isinstance(module.any, Tensor) else module.any[0]
        for tensor in (any_of, module.place.value, *module.log):
            assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    assert module.steps == len(module.log) == 7


def test_a_tensor_in_place_of_another_is_taken_out_call_after_call() -> None:
    module = Does()
    once = run_quietly(module)
    NOW["does"] = lambda m, h: (setattr(m, "any", h), setattr(m, "steps", m.steps + 1))
    for _ in range(5):
        once()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(module.any)
        torch.testing.assert_close(module.any, module.first(torch.ones(2, 4)).detach())
    assert module.steps == 5


DROPPED = {
    "an attribute": lambda m, t: setattr(m, "any", t),
    "a list": lambda m, t: setattr(m, "any", [t]),
    "a tuple": lambda m, t: setattr(m, "any", (1, t)),
    "an object": lambda m, t: setattr(m, "any", Place(t)),
    "slots": lambda m, t: setattr(m, "any", Slots(t)),
    "a dict in a list": lambda m, t: setattr(m, "any", [{"key": t}]),
    "keywords": lambda m, t: setattr(m, "any", partial(print, end=t)),
    "a closure": lambda m, t: setattr(m, "any", lambda: t),
    "a parameter": lambda m, t: setattr(m.first, "weight", t),
}


@pytest.mark.parametrize("where", DROPPED)
def test_a_tensor_that_the_module_drops_between_calls_is_gone(where: str) -> None:
    module = Does()
    tensor = nn.Parameter(torch.ones(4, 4)) if where == "a parameter" else torch.ones(4, 4)
    DROPPED[where](module, tensor)
    once = run_quietly(module)
    gone = weakref.ref(tensor)
    del tensor
    once()
    assert gone() is not None
    DROPPED[where](module, nn.Parameter(torch.zeros(4, 4)) if where == "a parameter" else None)
    gc.collect()
    assert gone() is None


def counts(m: Any) -> None:
    m.steps += 1


def appends(m: Any) -> None:
    m.log.append(m.steps)


def appends_deep_inside(m: Any) -> None:
    m.named["inside"][0].append(1)


def sets_an_item(m: Any) -> None:
    m.named[str(len(m.named))] = 1


def writes_to_an_object(m: Any) -> None:
    m.place.value = [*m.place.value, 1]


def renames(m: Any) -> None:
    m.any, m.log = m.log, [len(m.log)]


def makes_and_deletes(m: Any) -> None:
    m.new = getattr(m, "new", 0) + 1
    vars(m).pop("steps", None)


def empties(m: Any) -> None:
    m.named.clear()


def hooks(m: Any) -> None:
    m.first.register_forward_hook(lambda *_: None)


CHANGES = [counts, appends, appends_deep_inside, sets_an_item, writes_to_an_object, renames]
CHANGES += [makes_and_deletes, empties, hooks]


def state(module: Any) -> Any:
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    place, bound = own.pop("place"), own.pop("bound")
    return own, vars(place), bound.keywords, len(module.first._forward_hooks)


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_given_up_has_changed_nothing(change: Callable[[Any], None]) -> None:
    module = Does()
    once = run_quietly(module)
    module.steps = 5  # between two calls
    twin = copy.deepcopy(module)

    def note_and_take_gradients(m: Any, h: Tensor) -> None:
        change(m)
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            torch.autograd.grad(leaf.sum(), leaf)

    NOW["does"] = note_and_take_gradients
    once()
    twin(torch.ones(2, 4))
    assert state(module) == state(twin)


def test_ordered_dicts_are_put_back_in_their_order() -> None:
    module = Does()
    module.any = OrderedDict(a=1, b=2)
    module.any.move_to_end("a")
    once = run_quietly(module)

    def note_and_take_gradients(m: Any, h: Tensor) -> None:
        m.any["c"] = 3
        m.any.move_to_end("c", last=False)
        leaf = h.detach().requires_grad_()
        torch.autograd.grad(leaf.sum(), leaf)

    NOW["does"] = note_and_take_gradients
    once()
    assert [*module.any] == ["c", "b", "a"]
