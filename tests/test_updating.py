"""The optimizer in W: parameters are as a step after W leaves them, and gradients are let go on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

ENGINES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "uncompiled": lambda apply: apply,
    "compiled": lambda apply: fs.compile(apply, backend="aten"),
}


class Stage(nn.Module):
    """A tied weight, one that nobody reads, and one that a second product reads in W."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.tanh(self.a(x)) * self.scale)
        return self.c(torch.nn.functional.linear(y, self.a.weight).sin())


def pullbacks(engine: str, n: int) -> tuple[Any, list[Any]]:
    """Parameters, and what W of some microbatches is owed."""
    torch.manual_seed(0)
    apply, params, buffers = fs.functionalize(Stage().double())
    function, found = ENGINES[engine](apply), []
    for _ in range(n):
        output, _, pullback = fs.stage_vjp(function, params, buffers, torch.randn(5, 4, dtype=torch.float64))
        found.append(pullback(torch.randn_like(output))[1])
    return params, found


def momentum(param: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = 0.9 * state + grad
    return param - 0.1 * state, state


def in_place(param: Tensor, grad: Tensor, state: Tensor) -> None:
    state.mul_(0.9).add_(grad)
    param.sub_(0.1 * state)


def stepped(engine: str, n: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """W first, then the step."""
    params, found = pullbacks(engine, n)
    grads = fs.stage_backward_weight(found)
    there = {name: grad for name, grad in grads.items() if grad is not None}
    new = {name: momentum(params[name], grad, torch.ones_like(grad)) for name, grad in there.items()}
    states = {name: torch.ones_like(param) for name, param in params.items()}
    return (
        {**params, **{name: param for name, (param, _) in new.items()}},
        {**states, **{name: state for name, (_, state) in new.items()}},
    )


@pytest.mark.parametrize("update", [momentum, in_place])
@pytest.mark.parametrize("parts", [0, 1, 3, 20])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_in_w_is_the_step_after_it(engine: str, n: int, parts: int, update: Any) -> None:
    expected = stepped(engine, n)
    params, found = pullbacks(engine, n)
    if parts:  # all first pieces, then all second ones
        pieces = [weight_pullback.split(parts) for weight_pullback in found]
        found = [piece for column in zip(*pieces, strict=True) for piece in column]
    states = {name: torch.ones_like(param) for name, param in params.items()}
    result = fs.stage_backward_weight(found, update=update, state=states)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_in_the_accumulators_counts(engine: str) -> None:
    params, found = pullbacks(engine, 1)
    totals = {name: torch.full_like(param, 2.0) for name, param in params.items()}
    right = fs.stage_backward_weight(found, {name: total.clone() for name, total in totals.items()})
    _, again = pullbacks(engine, 1)
    new, _ = fs.stage_backward_weight(again, totals, update=lambda param, grad, _: (param - grad, None))
    torch.testing.assert_close(new, {name: params[name] - right[name] for name in params})


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_let_go_one_piece_after_another(engine: str) -> None:
    _, (weight_pullback,) = pullbacks(engine, 1)
    pieces = weight_pullback.split(10)
    assert len(pieces) > 1
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def update(param: Tensor, grad: Tensor, _: None) -> tuple[Tensor, None]:
        nonlocal most
        alive.append(weakref.ref(grad))
        most = max(most, sum(ref() is not None for ref in alive))
        return param - grad, None

    fs.stage_backward_weight(pieces, update=update)
    assert len(alive) == 7
    assert most < len(alive)
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("engine", ENGINES)
def test_refused_calls_leave_everything_as_it_was(engine: str) -> None:
    params, found = pullbacks(engine, 1)
    wrong: list[dict[str, Any]] = [
        {"update": 3},
        {"update": momentum, "state": {"a": 1}},
        {"state": dict.fromkeys(params)},
        {"update": momentum, "state": [1, 2]},
    ]
    for options in wrong:
        with pytest.raises(fs.StructureError, match=r"update|state"):
            fs.stage_backward_weight(found, **options)
    fs.stage_backward_weight(found)
    with pytest.raises(fs.ConsumedError):
        fs.stage_backward_weight(found, update=momentum)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_that_fails_says_what_was_updated(engine: str) -> None:
    _, found = pullbacks(engine, 1)
    names = []

    def update(param: Tensor, grad: Tensor, state: None) -> tuple[Tensor, None]:
        names.append(param.shape)
        if len(names) == 3:
            raise RuntimeError("out of luck")
        return param - grad, None

    with pytest.raises(RuntimeError, match="out of luck") as caught:
        fs.stage_backward_weight(found, update=update)
    (note,) = [note for note in caught.value.__notes__ if "Updated by then" in note]
    assert note.count("params") == 2


def test_an_update_must_return_both() -> None:
    _, found = pullbacks("uncompiled", 1)
    with pytest.raises(fs.StructureError, match="must return the parameter and its state"):
        fs.stage_backward_weight(found, update=lambda param, grad, state: param)  # type: ignore[arg-type,return-value]
