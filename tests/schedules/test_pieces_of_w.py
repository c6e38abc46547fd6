"""Orders with W in pieces: found, timed, written, and run with the gradients of the whole model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import funcstage as fs
from funcstage.pipelining import (
    Action,
    Costs,
    Order,
    find_schedule,
    logged,
    peak_memory,
    pipeline_order,
    pipeline_value_and_grad,
    read_order,
    read_trace,
    simulate,
    write_order,
)

UNEVEN = [Costs(1.0 + s % 3, 0.5 + s % 2, 1.5, 10 + s, 4 + s) for s in range(8)]


def in_pieces(order: Order, pieces: int) -> Order:
    """Divide each W, and leave the pieces where it was; the last ones of a rank take turns."""
    rows = []
    for actions in order.ranks:
        split = [part for action in actions for part in action.gives()]
        tail = list(itertools.takewhile(lambda action: action.kind == "W", reversed(split)))[::-1]
        head = split[: len(split) - len(tail)]
        row = [part for a in head for part in [a] * (pieces if a.kind == "W" else 1)]
        rows.append((*row, *tail * pieces))
    return Order(f"{order.schedule} in pieces", order.num_stages, order.num_microbatches, tuple(rows), pieces)


@pytest.mark.slow
def test_w_in_pieces_leaves_less_bubble_than_zb_v_at_equal_memory() -> None:
    # F 1 s, I 1.3 s, W 0.7 s of a rank with two stages, 0.1 s between ranks; I frees half of what F holds.
    costs = [Costs(0.5, 0.65, 0.35, 500, 250)] * 16
    zb_v = pipeline_order("ZBVZeroBubble", 16, 32)
    limit = max(peak_memory(zb_v, costs))
    bubbles = []
    for pieces in (1, 2):
        order = find_schedule(costs, 8, 32, limit, comm=0.1, seconds=0, pieces=pieces)
        assert max(peak_memory(order, costs)) <= limit
        bubbles.append(simulate(order, costs, comm=0.1).bubble_fraction)
    assert bubbles[1] < bubbles[0] < simulate(zb_v, costs, comm=0.1).bubble_fraction


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("limit", [None, 100, 40])
@pytest.mark.parametrize(("ranks", "stages"), [(4, 4), (4, 8), (1, 2), (2, 2)])
def test_a_found_order_has_all_pieces_of_each_w(
    ranks: int, stages: int, limit: int | None, pieces: int
) -> None:
    order = find_schedule(UNEVEN[:stages], ranks, 6, limit, comm=0.25, seconds=0, pieces=pieces)
    found = [part for actions in order.ranks for action in actions for part in action.gives()]
    assert order.pieces in (1, pieces)
    for kind, s, m in itertools.product("FIW", range(stages), range(6)):
        assert found.count(Action(kind, s, m)) == (order.pieces if kind == "W" else 1)  # type: ignore[arg-type]
    simulate(order, UNEVEN[:stages], comm=0.25)
    assert limit is None or max(peak_memory(order, UNEVEN[:stages])) <= limit


def test_a_piece_takes_its_share_of_the_time_and_frees_its_share_of_the_bytes() -> None:
    actions = [Action("F", 0, 0), Action("I", 0, 0), *[Action("W", 0, 0)] * 3]
    timeline = simulate(Order("three", 1, 1, (tuple(actions),), 3), [Costs(2.0, 1.0, 6.0, 30, 10)])
    assert [(span.start, span.end) for span in timeline.ranks[0]] == [(0, 2), (2, 3), (3, 5), (5, 7), (7, 9)]
    assert [held for _, held in timeline.memory(0)] == [0, 30, 10, 10 * 2 / 3, 10 / 3, 0]
    assert timeline.peak_memory == [30]


def test_a_file_says_which_w_are_pieces_and_torch_does_not_take_them_for_whole_ones(tmp_path: Path) -> None:
    from torch.distributed.pipelining.schedules import _Action

    order = in_pieces(pipeline_order("ZBVZeroBubble", 4, 3), 2)
    write_order(order, tmp_path / "order.csv")
    again = read_order(tmp_path / "order.csv")
    assert (again.ranks, again.pieces) == (order.ranks, 2)
    cell = next(c for c in (tmp_path / "order.csv").read_text().split(",") if "W" in c)
    with pytest.raises(RuntimeError, match="Invalid action string"):
        _Action.from_str(cell)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0F0,0I0,1/2:0W0", "of the 2 pieces of 0W0 there are only 1"),
        ("0F0,0I0,1/2:0W0,1/2:0W0,1/2:0W0", "0W0 occurs more often than its 2 pieces"),
        ("0F0,0B0,1/2:0W0", "0W0 occurs more often than its 2 pieces"),
        ("0F0,0F1,0I0,1/2:0W0,1/2:0W0,0I1,0W1", "W is in 1 and in 2 pieces"),
        ("0F0,0I0,1/0:0W0", "pieces must be a positive integer, got 0"),
        ("0F0,0I0,1/2:0I0", "'1/2:0I0' is not an action"),
    ],
)
def test_pieces_that_do_not_make_a_whole_are_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(fs.StageError, match=complaint):
        read_order(tmp_path / "wrong.csv")


@pytest.mark.parametrize("pieces", [0, -1, True, 1.5])
def test_pieces_of_nothing_are_refused(pieces: Any) -> None:
    with pytest.raises(fs.StageError, match="pieces must be a positive integer"):
        find_schedule(UNEVEN[:2], 2, 2, pieces=pieces)
    with pytest.raises(fs.StageError, match="pieces must be a positive integer"):
        replace(pipeline_order("GPipe", 2, 2), pieces=pieces)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5)) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(5, 5, bias=False)).double()  # which has less than two pieces


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)


def stepped(order: Order, compile: bool, x: torch.Tensor, y: torch.Tensor, log: Any = None) -> Any:
    stages = [fs.functionalize(module) for module in model()]
    if compile:
        stages = [stage._replace(apply=fs.compile(stage.apply, backend="aten")) for stage in stages]
    step: Any = pipeline_value_and_grad(stages, nn.functional.mse_loss, schedule=order, num_microbatches=6)
    if log is not None:
        step = logged(step, log)
    return step([s.params for s in stages], [s.buffers for s in stages], x, y)


ORDERS = {
    "found": lambda: find_schedule(UNEVEN[:4], 2, 6, 60, seconds=0, pieces=2),
    "in turn": lambda: in_pieces(pipeline_order("ZBVZeroBubble", 4, 6), 3),
    "interleaved": lambda: in_pieces(pipeline_order("1F1B", 4, 6), 2),
    "whole": lambda: find_schedule(UNEVEN[:4], 4, 6, seconds=0),
}


@pytest.mark.parametrize("compile", [False, True], ids=["uncompiled", "aten"])
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_in_pieces_has_the_gradients_of_the_whole_model(name: str, compile: bool) -> None:
    order, (x, y) = ORDERS[name](), batch()
    loss, _, grads = stepped(order, compile, x, y)
    whole = model()
    expected = nn.functional.mse_loss(whole(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    for module, found in zip(whole, grads, strict=True):
        for parameter_name, parameter in module.named_parameters():
            torch.testing.assert_close(found[parameter_name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_pieces_are_seen_one_by_one_in_a_profile_and_together_in_what_is_logged(tmp_path: Path) -> None:
    order, told = ORDERS["in turn"](), []
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        stepped(order, False, *batch())
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    found = read_trace(tmp_path / "trace.json")
    assert found.order.pieces == 3
    assert found.order.ranks == (tuple(order.in_turn()),)
    stepped(order, False, *batch(), log=lambda number, scalars: told.append(scalars))
    assert {f"W_seconds/stage_{s}" for s in range(4)} <= set(told[0])
    whole: list[dict[str, float]] = []
    plain = pipeline_order("ZBVZeroBubble", 4, 6)
    stepped(plain, False, *batch(), log=lambda number, scalars: whole.append(scalars))
    for stage in (1, 2, 3):  # of the first stage, pieces hold the chain of cotangents besides
        name = f"residual_bytes/stage_{stage}"
        assert told[0][name] == whole[0][name]


def test_an_order_for_other_numbers_or_that_cannot_run_is_refused() -> None:
    stages = [fs.functionalize(module) for module in model()]

    def step(order: Order, microbatches: int = 6) -> Any:
        return pipeline_value_and_grad(
            stages, nn.functional.mse_loss, schedule=order, num_microbatches=microbatches
        )

    order = ORDERS["found"]()
    with pytest.raises(
        fs.StageError, match="4 stages and 6 microbatches, but there are 4 stages and num_micro"
    ):
        step(order, 3)
    with pytest.raises(fs.StageError, match=r"is missing|there are only"):
        step(replace(order, ranks=(order.ranks[0][:-1], order.ranks[1])))
    with pytest.raises(fs.StageError, match="deadlocks; waiting"):
        step(replace(order, ranks=tuple(actions[::-1] for actions in order.ranks)))
