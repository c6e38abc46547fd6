"""Captured functions and pipelines in one process, recorded on the CPU, next to the same as they are."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import recorded_on_host
import torch
from recorded_on_host import OnHost, on_host
from torch import Tensor, nn
from torch.nn import functional

import funcstage as fs
from funcstage.pipelining import SCHEDULES, captured, logged, pipeline_value_and_grad
from funcstage.pipelining.capture.entries import MAX_GRAPHS

V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


def recorded(function: Callable[..., Any]) -> tuple[Any, OnHost]:
    """A captured function that records its calls on the CPU."""
    made = captured(function)
    return made, on_host(made)


def random_batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, y


def layers(*rest: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *rest, nn.Linear(4, 4)).double()


def updated(params: Any, grads: Any) -> Any:
    return [{name: p - 0.1 * g[name] for name, p in of.items()} for of, g in zip(params, grads, strict=True)]


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Pipelines in one process.


@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "aten"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_in_one_process_trains_as_eager_does(schedule: Any, compiled: bool) -> None:
    modules = [layers() for _ in range(2)]
    whole = nn.Sequential(*(layers() for _ in range(2)))
    stages = [fs.functionalize(module) for module in modules]
    if compiled:
        stages = [stage._replace(apply=fs.compile(stage.apply, backend="aten")) for stage in stages]
    step = pipeline_value_and_grad(
        stages, functional.mse_loss, schedule=schedule, num_microbatches=4, captured=True
    )
    recorder = on_host(step)
    params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for seed in range(6):
        x, y = random_batch(seed)
        loss, buffers, grads = step(params, buffers, x, y)
        params = updated(params, grads)
        expected = functional.mse_loss(whole(x), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        found = [value for of_stage in params for value in of_stage.values()]
        torch.testing.assert_close(found, [p.detach() for p in whole.parameters()], rtol=1e-9, atol=1e-11)
    assert recorder.replays == 4  # one of them right after it was recorded


def test_dropout_and_batch_statistics_are_those_of_the_pipeline_as_it_is() -> None:
    def run(capture: bool) -> list[Any]:
        stages = [fs.functionalize(layers(nn.BatchNorm1d(4).double(), nn.Dropout(0.4))) for _ in range(2)]
        step = pipeline_value_and_grad(stages, functional.mse_loss, num_microbatches=2, captured=capture)
        recorder = on_host(step) if capture else None
        params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
        seen = []
        for seed in range(7):
            torch.manual_seed(seed // 2)
            loss, buffers, grads = step(params, buffers, *random_batch(0))
            params = updated(params, grads)
            seen.append((loss, buffers, grads, params))
        assert recorder is None or recorder.replays == 5
        return seen

    found = run(True)
    same(found, run(False))
    assert not torch.equal(found[-1][0], found[-2][0])


def test_a_captured_pipeline_in_one_process_is_logged() -> None:
    stages = [fs.functionalize(layers()) for _ in range(2)]
    step = pipeline_value_and_grad(stages, functional.mse_loss, num_microbatches=2, captured=True)
    recorder = on_host(step)
    seen: list[dict[str, float]] = []
    run = logged(step, lambda number, scalars: seen.append(scalars))
    params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
    losses = [run(params, buffers, *random_batch(seed))[0].item() for seed in range(5)]
    assert recorder.replays == 3
    assert [scalars["loss"] for scalars in seen] == losses
    assert all(set(scalars) == {"loss", "seconds"} for scalars in seen)


def test_on_the_cpu_a_pipeline_says_so_once_and_runs_as_it_is() -> None:
    stages = [fs.functionalize(layers()) for _ in range(2)]
    step, plain = (
        pipeline_value_and_grad(stages, functional.mse_loss, num_microbatches=2, captured=capture)
        for capture in (True, False)
    )
    params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(4):
            same(step(params, buffers, *random_batch(seed)), plain(params, buffers, *random_batch(seed)))
    (warning,) = said
    assert "are on cpu, but only work on a CUDA device" in str(warning.message)
    assert warning.filename == __file__


def test_errors_of_a_pipeline_are_the_same_captured() -> None:
    stages = [fs.functionalize(layers()) for _ in range(2)]
    step = pipeline_value_and_grad(stages, functional.mse_loss, num_microbatches=2, captured=True)
    on_host(step)
    params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
    for seed in range(4):
        expected = step(params, buffers, *random_batch(0))
        with pytest.raises(fs.LeafError, match="must be cut along dimension 0"):
            step(params, buffers, *random_batch(seed, rows=3))
        same(step(params, buffers, *random_batch(0)), expected)


# Functional training steps.


def adam_step(value_and_grad: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any, x: Tensor, y: Tensor) -> Any:
        loss, _, grads = value_and_grad(params, {}, x, y)
        count = state["count"] + 1
        moments = {
            name: (0.9 * m + 0.1 * grads[name], 0.99 * s + 0.01 * grads[name] ** 2)
            for name, (m, s) in state["moments"].items()
        }
        new = {}
        for name, (m, s) in moments.items():
            direction = m / (1 - 0.9**count) / ((s / (1 - 0.99**count)).sqrt() + 1e-8)
            new[name] = params[name] - 0.01 * direction
        return loss, new, {"count": count, "moments": moments}

    return step


def test_a_functional_training_step_is_captured_with_its_optimizer() -> None:
    module = layers()
    apply, params, _ = fs.functionalize(module)

    def loss(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
        output, buffers = apply(params, buffers, x)
        return functional.mse_loss(output, y), buffers

    step = adam_step(fs.value_and_grad(loss, microbatches=2))
    fast, recorder = recorded(step)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    mine = theirs = (params, {"count": torch.zeros(()), "moments": moments})
    reference = layers()
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.01, betas=(0.9, 0.99))
    for seed in range(8):
        batch = random_batch(seed)
        value, *mine = fast(*mine, *batch)
        expected, *theirs = step(*theirs, *batch)
        same((value, mine), (expected, theirs))
        optimizer.zero_grad()
        functional.mse_loss(reference(batch[0]), batch[1]).backward()
        optimizer.step()
    assert recorder.replays == 6
    torch.testing.assert_close([*mine[0].values()], [p.detach() for p in reference.parameters()])


def test_a_step_of_eager_autograd_with_its_optimizer_is_captured_too() -> None:
    def weights(capture: bool) -> list[Any]:
        module = layers(nn.Dropout(0.3))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = functional.mse_loss(module(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        runs, recorder = recorded(step) if capture else (step, None)
        seen = []
        for seed in range(9):
            torch.manual_seed(seed)
            seen.append(runs(*random_batch(seed)))
            seen += [p.detach().clone() for p in module.parameters()]
            seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]
            if seed % 3:
                optimizer.zero_grad()
        assert recorder is None or recorder.replays >= 4
        return seen

    same(weights(True), weights(False))


# What a call is given, and returns.


def scaled(x: Tensor, scale: float = 1.0) -> Tensor:
    return x * scale


def test_results_are_the_callers() -> None:
    fast, recorder = recorded(scaled)
    kept = [(x, fast(x)) for x in (random_batch(seed)[0] for seed in range(6))]
    assert recorder.replays == 4
    for x, result in kept:
        same(result, x)


def test_an_argument_that_is_returned_is_that_very_tensor() -> None:
    fast, recorder = recorded(lambda x, y: {"x": x, "sum": x + y, "again": x})
    for seed in range(5):
        x, y = random_batch(seed)
        found = fast(x, y)
        assert found["x"] is x
        assert found["again"] is x
        same(found["sum"], x + y)
    assert recorder.replays == 3


def test_a_tensor_that_is_given_twice_is_one_tensor_inside() -> None:
    fast, recorder = recorded(lambda x, y: (x + y, x is y))
    for seed in range(5):
        x, y = random_batch(seed)
        same(fast(x, x), (2 * x, True))
        same(fast(x, y), (x + y, False))
    assert recorder.replays == 6


def test_each_signature_has_a_graph_up_to_a_bound() -> None:
    fast, recorder = recorded(scaled)
    scales = [float(i) for i in range(MAX_GRAPHS + 2)] * 5
    random.Random(0).shuffle(scales)
    x, _ = random_batch(0)

    def calls() -> None:
        for scale in scales:
            same(fast(x, scale=scale), x * scale)

    with pytest.warns(UserWarning, match=r"scaled runs as it is.*another signature: .*scale"):
        calls()
    assert len(recorder.recordings) == MAX_GRAPHS
    assert repr(fast) == f"<captured scaled, {MAX_GRAPHS} graphs of {MAX_GRAPHS}>"
    fast.close()
    same(fast(x, scale=3.0), 3 * x)


def test_shapes_and_containers_are_signatures() -> None:
    fast, recorder = recorded(
        lambda tree: [2 * leaf for leaf in (tree if isinstance(tree, list) else [tree])]
    )
    for seed in range(4):
        for rows in (2, 3):
            x, y = random_batch(seed, rows)
            same(fast(x), [2 * x])
            same(fast([x, y]), [2 * x, 2 * y])
    assert recorder.replays == 8


# What it reads besides.

RATE = 0.5
TENSOR = torch.full((), 2.0, dtype=torch.float64)


def helper(x: Tensor) -> Tensor:
    return x * RATE * TENSOR


def through_a_helper(x: Tensor) -> Tensor:
    return helper(x) + 1


class Scale(nn.Module):
    def scale(self) -> float:
        return RATE

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale()


def test_a_global_that_changes_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, recorder = recorded(through_a_helper)
    x, _ = random_batch(0)
    for rate in (0.5, 0.25, 0.5):
        monkeypatch.setattr(f"{__name__}.RATE", rate)
        for _ in range(4):
            same(fast(x), x * rate * 2 + 1)
    assert len(recorder.recordings) == 2
    monkeypatch.setattr(f"{__name__}.TENSOR", torch.full((), 3.0, dtype=torch.float64))
    same(fast(x), x * 0.5 * 3 + 1)
    monkeypatch.setattr(f"{__name__}.helper", lambda x: -x)
    same(fast(x), 1 - x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_global_that_a_method_of_a_module_reads_is_taken_up(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, params, buffers = fs.functionalize(Scale())
    if compiled:
        apply = fs.compile(apply, backend="aten")
    fast, recorder = recorded(lambda x: apply(params, buffers, x)[0])
    x, _ = random_batch(0)
    for rate in (0.5, 0.25):
        monkeypatch.setattr(f"{__name__}.RATE", rate)
        for _ in range(4):
            same(fast(x), x * rate)
    assert len(recorder.recordings) == 2


def test_defaults_are_taken_up() -> None:
    module = nn.Dropout(0.5)

    def step(x: Tensor, scale: list[float] = [2.0], *, module: nn.Module = module) -> Tensor:  # noqa: B006
        return module(x) * scale[0]

    module.eval()
    fast, recorder = recorded(step)
    x, _ = random_batch(0)
    for _ in range(4):
        same(fast(x), x * 2)
    step.__defaults__[0][0] = 3.0  # type: ignore[index]
    same(fast(x), x * 3)
    step.__defaults__ = ([4.0],)
    for _ in range(4):
        same(fast(x), x * 4)
    module.train()
    assert not torch.equal(fast(x), x * 4)
    assert len(recorder.recordings) == 2


def test_the_mode_of_a_module_behind_a_stage_is_taken_up() -> None:
    module = nn.Dropout(0.5)
    apply, params, buffers = fs.functionalize(module)
    fast, recorder = recorded(lambda x: apply(params, buffers, x)[0])
    x, _ = random_batch(0)
    for _ in range(4):
        assert not torch.equal(fast(x), x)
    module.eval()
    for _ in range(4):
        same(fast(x), x)
    assert len(recorder.recordings) == 2


def test_a_variable_from_around_is_taken_up_and_its_tensors_are_written_in_place() -> None:
    rate, count = 0.5, torch.zeros((), dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        count.add_(1)
        return x * rate + count

    fast, recorder = recorded(step)
    x, _ = random_batch(0)
    for i in range(5):
        same(fast(x), x * 0.5 + (i + 1))
    rate = 0.25
    for i in range(5, 10):
        version = count._version
        same(fast(x), x * 0.25 + (i + 1))
        assert count._version > version
    assert len(recorder.recordings) == 2


# What runs as it is.


class Counter:
    def __init__(self) -> None:
        self.calls = 0


def counting() -> Callable[[Tensor], Any]:
    counter = Counter()

    def step(x: Tensor) -> Tensor:
        counter.calls += 1
        return x * counter.calls

    return step


def history() -> Callable[[Tensor], Any]:
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    return lambda x: x * weight


def drawing() -> Callable[[Tensor], Any]:
    return lambda x: x * random.random()


def drawing_by_torch() -> Callable[[Tensor], Any]:
    return lambda x: x * (2.0 if bool(torch.rand(()) >= 0) else 1.0)


def waiting() -> Callable[[Tensor], Any]:
    return lambda x: x * 2 if x.sum().item() > 1e9 else x


def writing() -> Callable[[Tensor], Any]:
    return lambda x: x.add_(1).clone()


def handing_out() -> Callable[[Tensor], Any]:
    apply, params, _ = fs.functionalize(layers())
    return lambda x: fs.stage_vjp(apply, params, {}, x)[::2]


def opaque() -> Callable[[Tensor], Any]:
    return lambda x: (x * 2, Counter())


AS_IT_IS = [
    (counting, r"calls was \d+ and is \d+ by each step"),
    (history, r"the result\[0\] requires grad"),
    (drawing, r"random numbers on the host \(random\)"),
    (waiting, r"cannot be captured, at .*test_captured_functions.py:\d+: operation not permitted"),
    (writing, "writes into its arguments"),
    (handing_out, r"there is a Pullback in the result.*Run F, I and W within"),
    (opaque, r"the result\[0\]\[1\] is Counter"),
]


@pytest.mark.parametrize(("make", "said"), AS_IT_IS, ids=lambda case: getattr(case, "__name__", ""))
def test_what_a_graph_could_not_do_runs_as_it_is_and_is_named(
    make: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(recorded_on_host), "__name__", "torch.recorded_on_host")
    fast, recorder = recorded(make())
    plain = make()
    results: list[list[Any]] = [[], []]
    for runs, seen in zip((fast, plain), results, strict=True):
        random.seed(0)
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in range(5):
                x, _ = random_batch(seed)
                result = runs(x)
                result = result[0] if isinstance(result, tuple) else result
                seen.append((result.detach(), x))
        if runs is fast:
            assert re.search(said, str(caught[0].message)), caught[0]
    assert recorder.replays == 0
    same(*results)


def test_a_pullback_that_is_given_is_used_up_as_ever() -> None:
    apply, params, _ = fs.functionalize(layers())
    fast, recorder = recorded(lambda pullback, cotangent: fs.stage_backward(pullback, cotangent))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(5):
            x, y = random_batch(seed)
            _, _, pullback = fs.stage_vjp(apply, params, {}, x)
            found = fast(pullback, y)
            with pytest.raises(fs.ConsumedError):
                fast(pullback, y)
            same(found, fs.stage_backward(fs.stage_vjp(apply, params, {}, x)[2], y))
    assert "there is a Pullback in (args, kwargs)" in str(said[0].message)
    assert recorder.replays == 0


def test_bound_methods_are_captured_and_methods_of_classes_refused() -> None:
    class Trainer:
        rate = 2.0

        def step(self, x: Tensor) -> Tensor:
            return x * self.rate

        decorated = captured(step)

    trainer = Trainer()
    fast, recorder = recorded(trainer.step)
    x, _ = random_batch(0)
    for rate in (2.0, 3.0):
        trainer.rate = rate
        for _ in range(4):
            same(fast(x), x * rate)
    assert len(recorder.recordings) == 2
    with pytest.raises(fs.StructureError, match=r"self\.step = captured\(self\.step\)"):
        trainer.decorated(x)


def test_an_argument_that_requires_grad_lets_the_call_run_as_it_is() -> None:
    fast, recorder = recorded(scaled)
    x, _ = random_batch(0)
    x.requires_grad_()
    with pytest.warns(UserWarning, match=r"requires grad.*Pass it detached"):
        _ = [fast(x).sum().backward() for _ in range(4)]
    assert recorder.replays == 0
    assert x.grad is not None
    same(x.grad, torch.full_like(x, 4.0))


def test_inside_of_a_transformation_it_runs_as_it_is() -> None:
    fast, _ = recorded(scaled)
    x, _ = random_batch(0)
    for _ in range(4):
        fast(x, 2.0)
    with pytest.warns(UserWarning, match="inside a transformation"):
        grad = torch.func.grad(lambda x: fast(x, 2.0).sum())(x)
    same(grad, torch.full_like(x, 2.0))


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(fs.StageError, match=r"got Linear.*or pass a function"):
        captured(nn.Linear(2, 2))
    with pytest.raises(fs.StageError, match=r"got int.*or pass a function"):
        captured(3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(fs.StageError, match="goes with a schedule, got a function"):
        captured(scaled, optimizer=optimizer)  # type: ignore[call-overload]
