"""Forks, and turns: a child finds stages as if its parent's other threads had run none of them."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from both_ways import eager
from torch import Tensor, nn
from torch.autograd import Function

import funcstage as fs

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="torch refuses a backward after a fork"),
]
ENGINES = pytest.mark.parametrize("engine", ["levels", "aten"])


class Gate:
    """Where another thread than the main one stops, once, in a phase."""

    def __init__(self) -> None:
        self.phase = ""
        self._reached, self._opened = os.pipe(), os.pipe()

    def pause(self, phase: str) -> None:
        if phase == self.phase and threading.current_thread() is not threading.main_thread():
            self.phase = ""
            os.write(self._reached[1], b".")
            os.read(self._opened[0], 1)  # which no stage hears of, unlike an event

    def reached(self) -> None:
        os.read(self._reached[0], 1)

    def open(self) -> None:
        os.write(self._opened[1], b".")


GATE = Gate()


@torch.library.custom_op("funcstage_forks::pausing", mutates_args=())
def pausing(x: Tensor, phase: str) -> Tensor:
    GATE.pause(phase)
    return x.clone()


@pausing.register_fake
def _(x: Tensor, phase: str) -> Tensor:
    GATE.pause(f"trace of {phase}")
    return torch.empty_like(x)


class Paused(Function):
    @staticmethod
    def forward(x: Tensor, phase: str) -> Tensor:
        return pausing(x, "F") if phase == "I" else x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.phase = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return pausing(grad, ctx.phase), None


class Stage(nn.Module):
    """Pauses in F, I and W; its recurrent layer has its weights a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.gru = nn.Linear(3, 3), nn.GRU(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        y = nn.functional.linear(x, Paused.apply(self.proj.weight, "W"), self.proj.bias)
        return self.gru(Paused.apply(y, "I"))[0]


def stage(engine: str) -> tuple[Any, Any, Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    module = Stage()
    apply, params, buffers = fs.functionalize(module)
    apply = apply if engine == "levels" else fs.compile(apply, backend=engine, fullgraph=True)
    return apply, params, buffers, module, torch.randn(2, 2, 3)


def gradients(output: Tensor, pullback: Any, retain: bool = False) -> list[Tensor]:
    (dx,), weight_pullback = pullback(torch.ones_like(output), retain=retain)
    return [dx, *weight_pullback().values()]


def patched() -> tuple[Any, ...]:
    """What stages exchange for the whole process while they run."""
    return nn.Module.__call__, Function.apply, nn.Parameter.__deepcopy__, threading.Event.set


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked process, or the error that it raises there, in a minute at most."""
    receives, sends = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks among threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            found = function()
        except BaseException as error:
            found = repr(error)
        os.write(sends, pickle.dumps(found))
        os._exit(0)
    os.close(sends)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child hung"
    with os.fdopen(receives, "rb") as answer:
        return pickle.load(answer)


def paused(phase: str, function: Callable[[], Any]) -> Future[Any]:
    """Run a function in another thread, which is in a phase of it by now."""
    GATE.phase = phase
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    GATE.reached()
    return future


@pytest.mark.parametrize(
    ("engine", "phase"),
    [("levels", phase) for phase in "FIW"] + [("aten", phase) for phase in ("F", "I", "W", "trace of F")]
    + [("aten", "trace of I"), ("aten", "trace of W")],
)  # fmt: skip
def test_a_child_uses_a_stage_that_another_thread_was_in(engine: str, phase: str) -> None:
    apply, params, buffers, module, x = stage(engine)
    expected = [tensor.tolist() for tensor in eager(module, x)]
    held = [*map(id, (*module.parameters(), *module.buffers(), *module.gru._flat_weights))]
    own = patched()

    def used() -> list[Tensor]:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        return [output, *gradients(output, pullback)]

    def alone() -> Any:
        now = [*map(id, (*module.parameters(), *module.buffers(), *module.gru._flat_weights))]
        whole = now == held and type(module.proj.weight) is nn.Parameter and patched() == own
        return whole, [tensor.tolist() for tensor in eager(module, x)], [t.tolist() for t in used()]

    if not phase.startswith("trace"):
        used()
    other = paused(phase, used)
    try:
        found = in_child(alone)
    finally:
        GATE.open()
    whole, of_module, of_stage = found
    assert whole
    assert of_module == expected
    for got, want in zip(of_stage, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want))
    for got, want in zip(other.result(60), expected, strict=True):  # nothing has changed here
        torch.testing.assert_close(got, torch.tensor(want))


@ENGINES
def test_residuals_that_another_thread_was_using_are_refused_in_a_child(engine: str) -> None:
    apply, params, buffers, module, x = stage(engine)
    expected = eager(module, x)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    _, _, another = fs.stage_vjp(apply, params, buffers, x)
    other = paused("I", lambda: gradients(output, pullback, retain=True))
    try:
        refused = in_child(lambda: gradients(output, pullback))
        found = in_child(lambda: [grad.tolist() for grad in gradients(output, another)])
    finally:
        GATE.open()
    assert "ConsumedError" in refused
    assert "when this process was forked" in refused
    for got, want in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(torch.tensor(got), want)
    torch.testing.assert_close(other.result(60), expected[1:])
    torch.testing.assert_close(gradients(output, pullback), expected[1:])


def test_a_thread_that_forks_in_a_forward_goes_on_in_both_processes() -> None:
    class Forks(Stage):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal child
            if child is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    child = os.fork()
            return super().forward(x)

    torch.manual_seed(0)
    module, x, child = Forks(), torch.randn(2, 2, 3), None
    try:
        output, _, pullback = fs.stage_vjp(*fs.functionalize(module), x)
        expected = eager(module, x)
        torch.testing.assert_close([output, *gradients(output, pullback)], expected)
    except BaseException:
        if child == 0:
            os._exit(1)
        raise
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@ENGINES
@pytest.mark.parametrize("first", ["I", "W"])
def test_a_call_that_consumes_waits_for_one_that_retains_in_another_thread(engine: str, first: str) -> None:
    apply, params, buffers, module, x = stage(engine)
    expected = eager(module, x)[1:]
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    ones = torch.ones_like(output)
    used: Any = pullback
    if first == "W":
        (dx,), used = pullback(ones, retain=True)
    call: Any = (lambda **how: used(ones, **how)) if first == "I" else (lambda **how: used(**how))
    retains = paused(first, lambda: call(retain=True))
    with ThreadPoolExecutor(1) as pool:
        consumes = pool.submit(call)
        try:
            with pytest.raises(TimeoutError):
                consumes.result(0.3)
        finally:
            GATE.open()
        results = consumes.result(60), retains.result(60)
    assert used.consumed
    with pytest.raises(fs.ConsumedError, match="was used before"):
        call()
    for result in results:  # that of the call that consumes first: it frees nothing of the other's
        grads = [dx, *result.values()] if first == "W" else [*result[0], *result[1]().values()]
        torch.testing.assert_close(grads, expected)
