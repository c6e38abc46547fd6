"""Errors and interrupts inside F, I and W: nothing is left behind, and pullbacks say truly what they are."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from interrupting import (
    FAIL,
    Brittle,
    Interrupts,
    calls_of,
    drop_what_autograd_left,
    interrupted,
    interrupted_again,
    state_of_everything,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import funcstage as fs

ENGINES = ("closures", "aten")


class Stage(nn.Module):
    """Fails in I, where the input goes through `Brittle`, or in W, where the weight does."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        x = Brittle.apply(x.sin()) if self.place == "I" else x
        weight = Brittle.apply(self.second.weight) if self.place == "W" else self.second.weight
        return nn.functional.linear(self.first(x).tanh(), weight, self.second.bias)


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt(), RuntimeError("torn")], ids=repr)
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("place", ["I", "W"])
def test_a_failed_pullback_works_again_or_says_that_it_is_consumed(
    place: str, retain: bool, error: BaseException
) -> None:
    torch.manual_seed(0)
    module, x = Stage(place), torch.randn(3, 4)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()])
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    call: Callable[[], Any] = lambda: pullback(torch.ones_like(output), retain=retain)  # noqa: E731
    used: Any = pullback
    if place == "W":
        used = call()[1]
        call = lambda: used(retain=retain)  # noqa: E731
    FAIL.append(error)
    with pytest.raises(type(error)):
        call()
    assert used.consumed == (not retain)
    if retain:
        result = call()
        grads = [result[0][0], *result[1]().values()] if place == "I" else result.values()
        torch.testing.assert_close([*grads], [*(expected if place == "I" else expected[1:])])
    else:
        with pytest.raises(fs.ConsumedError, match="failed halfway"):
            call()


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("given", [True, False])
def test_a_sum_that_failed_says_what_is_in_it(failing: int, given: bool) -> None:
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(Stage("W"))
    pending, alone = [], []
    for _ in range(3):
        x = torch.randn(3, 4)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        pending.append(pullback(torch.ones_like(output), retain=True)[1])
        alone.append(pullback(torch.ones_like(output), retain=True)[1]())
    total = {name: torch.zeros_like(p) for name, p in params.items()} if given else None
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        if calls == failing:
            FAIL.append(MemoryError("full"))
        calls += 1

    pull = pending[0]._live()
    for one in pending:
        tape = one._live()
        assert type(tape) is type(pull)
    original = fs.WeightPullback._add_into

    def add_into(self: fs.WeightPullback, totals: Any) -> Any:
        fail()
        return original(self, totals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs.WeightPullback, "_add_into", add_into)
        with pytest.raises(MemoryError) as caught:
            fs.stage_backward_weight(pending, total)
    (note,) = caught.value.__notes__
    assert f"weight pullback {failing} of 3" in note
    if total is not None and failing:
        assert "`accumulate` has those before it; this one is not" in note
        for name, leaf in total.items():
            torch.testing.assert_close(leaf, sum(grads[name] for grads in alone[:failing]))
    else:
        assert "Nothing was added" in note
    assert [one.consumed for one in pending] == [i < failing for i in range(3)]


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: self.norm(self.a(x)).tanh(), x, use_reentrant=False)
        return self.b(y)


def split_by(engine: str) -> tuple[nn.Module, Callable[[], list[Tensor | None]]]:
    """A module, and what runs F, I and W of it: "aten" traces anew each time, "compiled before" once."""
    torch.manual_seed(0)
    module, x, grad = Everything(), torch.randn(5, 3), torch.randn(5, 2)
    apply, params, buffers = fs.functionalize(module)
    kept = fs.compile(apply, backend="aten")

    def run() -> list[Tensor | None]:
        stage = {"closures": apply, "compiled before": kept}.get(engine)
        stage = fs.compile(apply, backend="aten") if stage is None else stage
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        (dx,), weight_pullback = pullback(grad)
        return [output, dx, *weight_pullback().values()]

    return module, run


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "share"), [("closures", 40), ("aten", 5), ("compiled before", 20)])
def test_interrupts_anywhere_leave_nothing_behind(engine: str, share: int) -> None:
    module, run = split_by(engine)
    expected, before = run(), state_of_everything(module)
    calls = calls_of(run)
    for n in range(1, calls, max(1, calls // share)):
        interrupted(run, n)
        assert state_of_everything(module) == before, f"at call {n} of {calls}"
        torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("engine", ENGINES)
def test_a_pullback_that_failed_keeps_no_tensor_alive(engine: str, at: int) -> None:
    def seen() -> list[weakref.ref[Tensor]]:
        def branches(params: dict[str, Tensor], buffers: Any, x: Tensor) -> Any:
            return x * params["scale"] + (x @ params["weight"]).sum().tanh(), buffers

        params, x = {"scale": torch.randn(3), "weight": torch.randn(3, 3)}, torch.randn(2, 3)
        run = fs.compile(branches, backend="aten") if engine == "aten" else branches
        output, _, pullback = fs.stage_vjp(run, params, {}, x)
        with contextlib.suppress(MemoryError), Interrupts(at, MemoryError):
            pullback(torch.ones_like(output))[1]()
        leaves: list[Any] = optree.tree_leaves(pullback, namespace="funcstage")
        return [weakref.ref(tensor) for tensor in (x, output, *params.values(), *leaves)]

    refs = seen()
    drop_what_autograd_left()
    gc.collect()
    assert not [ref() for ref in refs if ref() is not None]


@pytest.mark.parametrize(
    ("engine", "share", "later"),
    [
        *(("closures", 12, each) for each in ((1,), (2,), (5,), (1, 1), (2, 1), (3, 2), (1, 1, 1))),
        *(("compiled before", 20, each) for each in ((1,), (1, 1), (2, 1))),
        *(("aten", 1, each) for each in ((1,), (1, 1))),
    ],
)
def test_interrupts_of_what_an_interrupt_has_begun_leave_nothing_behind(
    engine: str, share: int, later: tuple[int, ...]
) -> None:
    module, run = split_by(engine)
    expected, before = run(), state_of_everything(module)
    calls, again = calls_of(run), 0
    for n in range(calls // (2 * share), calls, calls // share):
        again += interrupted_again(run, n + sum(later), later) > 1
        assert state_of_everything(module) == before, f"at call {n} of {calls}"
        torch.testing.assert_close(run(), expected)
    assert again or engine == "aten"


class Outer(TorchFunctionMode):
    """A mode of the caller's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("entered", [0, 1, 2])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_modes_of_the_caller_are_entered_after_an_interrupt_whatever_was_left_before_it(
    left: int, entered: int
) -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(left + 1):  # the split's, too
                torch.overrides._pop_mode()
            for _ in range(entered):
                torch.overrides._push_mode(Outer())
            raise KeyboardInterrupt

    apply, params, buffers = fs.functionalize(Broken(4, 4))
    with Outer() as outer, Outer() as inner:
        with pytest.raises(KeyboardInterrupt):
            fs.stage_vjp(apply, params, buffers, torch.ones(2, 4))
        assert torch.overrides._get_current_function_mode_stack() == [outer, inner]
    assert torch.overrides._get_current_function_mode_stack() == []
