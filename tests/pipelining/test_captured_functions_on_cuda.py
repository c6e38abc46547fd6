"""Captured functions and pipelines in one process on a CUDA device, next to the same as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import funcstage as fs
from funcstage.pipelining import SCHEDULES, captured, pipeline_value_and_grad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(32)
    return nn.Sequential(nn.Linear(16, 32), norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 16)).cuda()


def random_batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x, y = (torch.randn(rows, 16, device="cuda", generator=generator) for _ in range(2))
    return x, y


def stages_of(compile: dict[str, Any] | None) -> list[Any]:
    stages = [fs.functionalize(layers()) for _ in range(2)]
    if compile is None:
        return stages
    return [stage._replace(apply=fs.compile(stage.apply, **compile)) for stage in stages]


ENGINES: list[dict[str, Any] | None] = [None, {"backend": "aten"}, {}]


@pytest.mark.parametrize("compile", ENGINES, ids=["uncompiled", "aten", "inductor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_in_one_process_is_the_same_to_the_last_bit(
    schedule: Any, compile: dict[str, Any] | None
) -> None:
    results = []
    for capture in (False, True):
        stages = stages_of(compile)
        step = pipeline_value_and_grad(
            stages, functional.mse_loss, schedule=schedule, num_microbatches=4, captured=capture
        )
        params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
        seen = []
        for seed in range(8):
            torch.manual_seed(seed // 2)  # as of drawing the same numbers again
            loss, buffers, grads = step(params, buffers, *random_batch(seed, 8 if seed % 2 else 12))
            params = [
                {name: p - 0.1 * g[name] for name, p in of.items()}
                for of, g in zip(params, grads, strict=True)
            ]
            seen.append((loss, buffers, grads, params))
        results.append(seen)
    assert "2 graphs" in repr(step)
    same(results[1], results[0])


def test_dropout_is_drawn_anew() -> None:
    stages = stages_of(None)
    step = pipeline_value_and_grad(stages, functional.mse_loss, num_microbatches=2, captured=True)
    params, buffers = [stage.params for stage in stages], [stage.buffers for stage in stages]
    losses = [step(params, buffers, *random_batch(0))[0].item() for _ in range(8)]
    assert "1 graphs" in repr(step)
    assert len({*losses}) == 8


def training_step() -> tuple[Callable[..., Any], tuple[Any, Any, Any]]:
    apply, params, buffers = fs.functionalize(layers())

    def loss(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
        output, buffers = apply(params, buffers, x)
        return functional.mse_loss(output, y), buffers

    value_and_grad = fs.value_and_grad(loss, microbatches=2)

    def step(params: Any, buffers: Any, momentum: Any, x: Tensor, y: Tensor) -> Any:
        value, buffers, grads = value_and_grad(params, buffers, x, y)
        momentum = {name: 0.9 * m + grads[name] for name, m in momentum.items()}
        params = {name: p - 0.1 * momentum[name] for name, p in params.items()}
        return value, params, buffers, momentum

    return step, (params, buffers, {name: torch.zeros_like(p) for name, p in params.items()})


def test_a_functional_training_step_is_the_same_to_the_last_bit() -> None:
    results = []
    for capture in (False, True):
        step, state = training_step()
        runs = captured(step) if capture else step
        torch.manual_seed(0)
        seen = []
        for seed in range(8):
            value, *state = runs(*state, *random_batch(seed))
            seen.append((value, *state))
        results.append(seen)
    assert "1 graphs" in repr(runs)
    same(results[1], results[0])


def test_a_step_of_eager_autograd_with_its_optimizer_is_the_same_to_the_last_bit() -> None:
    results = []
    for capture in (False, True):
        module = layers()
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, capturable=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def step(x: Tensor, y: Tensor, module: Any = module, optimizer: Any = optimizer) -> Tensor:
            loss = functional.mse_loss(module(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        runs = captured(step) if capture else step
        torch.manual_seed(0)
        seen = []
        for seed in range(12):
            seen.append(runs(*random_batch(seed)))
            scheduler.step()
            seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]
            seen += [t.clone() for t in module.state_dict().values()]
            if seed % 4 != 1:
                optimizer.zero_grad()
        results.append(seen)
    assert "2 graphs" in repr(runs)
    same(results[1], results[0])


def waiting(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 1e9 else x + 1


def of_the_host(x: Tensor) -> Tensor:
    return x + torch.rand(16).pin_memory().to("cuda", non_blocking=True)


def sparse(x: Tensor) -> Tensor:
    places = torch.zeros(1, 8, dtype=torch.long, device="cuda")
    return torch.sparse_coo_tensor(places, x, (4, 16), check_invariants=False)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (waiting, r"the step cannot be captured, at .*test_captured_functions_on_cuda.py"),
        (of_the_host, r"random numbers on the host \(torch, on the CPU\)|cannot be captured"),
        (sparse, r"the result\[0\] is .*sparse"),
    ],
)
def test_what_a_graph_could_not_do_runs_as_it_is(function: Callable[[Tensor], Tensor], said: str) -> None:
    fast = captured(function)
    results = []
    for runs in (function, fast):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append([runs(random_batch(seed)[0]).to_dense() for seed in range(6)])
    same(results[1], results[0])
    (text,) = {str(each.message) for each in caught}
    assert "runs as it is, not as a CUDA graph" in text
    assert re.search(said, text), text
    assert "not captured" in repr(fast)
    # The generator of the device and the allocator go on as ever.
    torch.manual_seed(3)
    drawn = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    same(torch.rand(4, device="cuda"), drawn)


def test_a_captured_function_may_call_another() -> None:
    inner = captured(lambda x: functional.dropout(x, 0.5) * 2)
    outer = captured(lambda x: inner(x) + 1)
    results = []
    for runs in (lambda x: functional.dropout(x, 0.5) * 2 + 1, outer):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append([runs(random_batch(seed)[0]) for seed in range(8)])
    same(results[1], results[0])
    assert "1 graphs" in repr(outer)


def test_two_devices_need_two_captured_functions() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    fast = captured(lambda x: x * 2)
    for seed in range(4):
        x, _ = random_batch(seed)
        same(fast(x), x * 2)
    with pytest.warns(UserWarning, match=r"is on cuda:1, but the step runs on cuda:0"):
        same(fast(x.to("cuda:1")), x.to("cuda:1") * 2)


def test_memory_is_given_back_when_it_is_closed() -> None:
    step, state = training_step()
    fast = captured(step)
    for seed in range(5):
        result = fast(*state, *random_batch(seed))
    del result
    fast.close()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    pools = {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}
    assert "0 graphs" in repr(fast)
    assert len(pools) <= 1 or all(
        not segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )
