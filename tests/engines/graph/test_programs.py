"""Programs and pullbacks that fail or have nothing to read: whose error comes through, and what is left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from identity import Identity
from torch import Tensor, nn

import funcstage as fs
from funcstage.engines.base import StageCall
from funcstage.engines.choose import uncompiled
from funcstage.engines.graph import blame, programs, tapes
from funcstage.engines.graph.programs import Programs, unshared


@pytest.mark.parametrize(("error", "tried"), [(RuntimeError, 1), (torch.OutOfMemoryError, 0)])
def test_an_error_that_the_uncompiled_stage_does_not_have_comes_through(
    error: Any, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []  # noted outside of the stage, whose own lists are put back after a run that is given up

    def run(call: StageCall) -> Any:
        runs.append(call)
        return uncompiled(call)

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return x * params["w"], buffers

    def fails(self: Programs, *args: Any) -> Any:
        raise error("in a kernel")

    fast = fs.compile(apply, backend="aten")
    fs.stage_vjp(fast, {"w": torch.ones(2)}, {}, torch.ones(2))
    monkeypatch.setattr(Programs, "note_forward", fails)
    monkeypatch.setattr(blame, "uncompiled", run)
    with pytest.raises(error, match="in a kernel"):
        fs.stage_vjp(fast, {"w": torch.ones(2)}, {}, torch.ones(2))
    assert len(runs) == tried  # where memory is short, more would be asked of it


@pytest.mark.parametrize("other", [True, 1.0, 2])
def test_a_cotangent_of_a_leaf_that_is_no_tensor_is_that_leaf_or_none(other: Any) -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return (x * params["w"], 1), buffers

    _, _, pullback = fs.stage_vjp(apply, {"w": torch.ones(2)}, {}, torch.ones(2))
    with pytest.raises(fs.StageError, match=r"output_grads\[1\]"):
        pullback((torch.ones(2), other))
    (dx,), _ = pullback((torch.ones(2), 1))
    assert torch.equal(dx, torch.ones(2))


@pytest.mark.parametrize("other", [1, torch.ones(2), torch.ones(2) > 0], ids=str)
def test_a_cotangent_of_an_output_that_has_none_is_refused(other: Any) -> None:
    _, _, pullback = fs.stage_vjp(lambda params, buffers, x: (x > 0, buffers), {}, {}, torch.ones(2))
    with pytest.raises(fs.LeafError, match=r"output_grads of .* must be None"):
        pullback(other)


class Failing(Identity):
    """Fails in its backward as long as it is told to."""

    fails = True

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Failing.fails:
            raise KeyError("in the backward")
        return grad


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("half", ["I", "W"])
def test_a_pullback_that_failed_in_its_midst_is_consumed_and_says_so_unless_retained(
    half: str, retain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return (Failing.apply(x) * params["w"] if half == "I" else x * Failing.apply(params["w"])), buffers

    _, _, pullback = fs.stage_vjp(apply, {"w": torch.ones(2)}, {}, torch.ones(2))
    if half == "I":

        def run() -> Any:
            return pullback(torch.ones(2), retain=retain)[0][0]
    else:
        _, weight_pullback = pullback(torch.ones(2))

        def run() -> Any:
            return weight_pullback(retain=retain)["w"]

    with pytest.raises(KeyError, match="in the backward"):
        run()
    monkeypatch.setattr(Failing, "fails", False)
    if retain:
        assert torch.equal(run(), torch.ones(2))
    else:
        with pytest.raises(fs.ConsumedError, match="failed halfway"):
            run()


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("half", ["I", "W"])
def test_a_compiled_half_that_failed_in_its_midst_says_whether_it_can_run_again(
    half: str, retain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return (x.sin() * params["w"]).cos(), buffers

    def fails(*args: Any) -> Any:
        raise KeyError("in a kernel")

    fast = fs.compile(apply, backend="aten")
    _, _, pullback = fs.stage_vjp(fast, {"w": torch.ones(2)}, {}, torch.ones(2))
    weight_pullback = pullback(torch.ones(2))[1] if half == "W" else None

    def run() -> Tensor:
        if weight_pullback is None:
            found: Tensor = pullback(torch.ones(2), retain=retain)[0][0]
        else:
            found = weight_pullback(retain=retain)["w"]
        return found

    with monkeypatch.context() as patched:
        for module in (programs, tapes):
            patched.setattr(module, "plain_run", fails)
        with pytest.raises(KeyError, match="in a kernel"):
            run()
    if not retain:
        with pytest.raises(fs.ConsumedError, match="failed halfway"):
            run()
        return
    x, w = (torch.ones(2, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad((x.sin() * w).cos().sum(), [x, w])
    for _ in range(2):
        torch.testing.assert_close(run(), expected[half == "W"])


def test_memory_that_two_tensors_have_a_part_of_is_nobodys_own() -> None:
    a, b, c = torch.ones(4), torch.ones(4), torch.ones(4)
    names = ["a", "b", "c", "d"]
    assert unshared(names, [a, b, c, None], []) == {"a", "b", "c"}
    assert unshared(names, [a, b, c, None], [a[:1], None]) == {"b", "c"}
    assert unshared(names, [a, b[2:], b[:2], a.view(2, 2)], [c]) == frozenset()


def test_a_program_that_reads_nothing_but_what_the_stage_has_captured_is_compiled_by_inductor() -> None:
    captured = torch.randn(3)

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return captured.exp() + 1, buffers

    fast = fs.compile(apply, backend="inductor")
    for _ in range(2):
        torch.testing.assert_close(fast({"w": torch.ones(2)}, {}, torch.ones(2))[0], captured.exp() + 1)
        captured.mul_(2)


@pytest.mark.parametrize(
    ("owner", "name"), [(programs, "unshared"), (Programs, "_watched"), (Programs, "_captured")]
)
def test_another_thread_may_run_while_a_first_run_is_looked_at(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = fs.compile(lambda params, buffers, x: ((x * params).sin(), buffers), backend="aten")
    x, params = torch.randn(3), torch.randn(3)

    def run() -> Tensor:
        pullback = fs.stage_vjp(fast, params, (), x)[2]
        return pullback(torch.ones(3))[1]()

    plain, meanwhile = getattr(owner, name), list[Tensor]()

    def look(*args: Any) -> Any:
        monkeypatch.setattr(owner, name, plain)
        with ThreadPoolExecutor(1) as other:
            meanwhile.append(other.submit(run).result(60))
        return plain(*args)

    monkeypatch.setattr(owner, name, look)
    torch.testing.assert_close([run(), *meanwhile], [(x * params).cos() * x] * 2)


@pytest.mark.parametrize("name", ["_watched", "_captured", "note", "note_shared"])
def test_what_is_read_off_a_first_run_is_not_read_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = getattr(Programs, name), []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(Programs, name, counted)
    fast, x = (
        fs.compile(lambda params, buffers, x: ((x * params).sin(), buffers), backend="aten"),
        torch.ones(3),
    )
    for _ in range(3):
        fs.stage_vjp(fast, x, (), x)[2](x)[1]()
    assert len(calls) == 1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_gradients_of_a_forward_without_a_tape_have_none_either(backend: str, autocast: bool) -> None:
    """F may be given parameters that require grad, where nothing is recorded; I and W run where all is."""
    module, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), torch.randn(3, 4)
    apply, _, buffers = fs.functionalize(module)
    with torch.no_grad():
        params = dict(module.named_parameters())
        output, _, pullback = fs.stage_vjp(fs.compile(apply, backend=backend), params, buffers, x)
    with torch.autocast("cpu", enabled=autocast):
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        grads = weight_pullback()
    assert not any(tensor.requires_grad for tensor in (output, dx, *grads.values()))
    torch.testing.assert_close(
        [*grads.values()], [*torch.autograd.grad(module(x).sum(), [*module.parameters()])]
    )
