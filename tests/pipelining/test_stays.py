"""Pipelines whose weight pullbacks wait in host memory: which do, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_cases import in_pieces
from torch import Tensor, nn

import funcstage as fs
from funcstage import away
from funcstage.pipelining import Action, Order, pipeline_order, pipeline_value_and_grad
from funcstage.pipelining.stays import stays

ORDERS = {
    "ZBVZeroBubble": lambda: pipeline_order("ZBVZeroBubble", 4, 6),
    "InterleavedZeroBubble": lambda: pipeline_order("InterleavedZeroBubble", 4, 6),
    "in pieces": lambda: in_pieces(pipeline_order("ZBVZeroBubble", 4, 6), 2),
    "1F1B": lambda: pipeline_order("1F1B", 4, 6),
}


@pytest.mark.parametrize("offloaded", ["W", "IW"])
@pytest.mark.parametrize("name", ORDERS)
def test_what_waits_has_two_actions_in_between_and_comes_back_one_before_its_use(
    name: str, offloaded: Any
) -> None:
    order = ORDERS[name]()
    found = stays(order, offloaded)
    back = set(found.before.values())
    for actions in order.ranks:
        first = {action: actions.index(action) for action in actions}
        assert len({turn for turn in found.before if turn[0] in first}) == len(back & {*first})
        for used in first:
            made = used._replace(kind="I" if used.kind == "W" else "F")
            if used.kind == "F" or (used.kind != "W" and offloaded == "W"):
                assert used not in back
                continue
            assert (made in found.after) == (used in back) == (first[used] - first[made] > 2)
            if used in back:
                last = actions[first[used] - 1]
                assert found.before[last, actions[: first[used] - 1].count(last)] == used
    assert bool(found.after) == (name != "1F1B" or offloaded == "IW")


@pytest.mark.parametrize("compile", [False, True], ids=["uncompiled", "aten"])
@pytest.mark.parametrize("offloaded", ["W", "IW"])
@pytest.mark.parametrize("name", ORDERS)
def test_a_step_with_offloaded_pullbacks_has_the_gradients_of_the_whole_model(
    name: str, offloaded: Any, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    order, gone = ORDERS[name](), []
    sent = away._sent

    def send(memory: Tensor) -> Tensor:
        gone.append(memory.nbytes)
        return sent(memory)

    monkeypatch.setattr(away, "FAR", ("cpu",))  # as if the CPU's memory were a device's
    monkeypatch.setattr(away, "_sent", send)
    layers = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)) for _ in range(4)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    stages = [fs.functionalize(layer) for layer in model]
    if compile:
        stages = [stage._replace(apply=fs.compile(stage.apply, backend="aten")) for stage in stages]
    step: Any = pipeline_value_and_grad(
        stages, nn.functional.mse_loss, schedule=order, num_microbatches=6, offload=offloaded
    )
    _, _, grads = step([s.params for s in stages], [s.buffers for s in stages], x, y)
    nn.functional.mse_loss(model(x), y).backward()
    for layer, found in zip(model, grads, strict=True):
        for parameter_name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[parameter_name], parameter.grad, rtol=1e-10, atol=1e-12)
    assert len(gone) >= len(stays(order, offloaded).after)


def test_an_order_without_time_lets_nothing_wait() -> None:
    close = [Action(kind, 0, m) for m in range(3) for kind in ("F", "I", "W")]  # type: ignore[arg-type]
    assert not stays(Order("close", 1, 3, (tuple(close),)), "IW").after


@pytest.mark.parametrize("offloaded", [True, "I", "", 1])
def test_what_is_no_choice_is_refused(offloaded: Any) -> None:
    stages = [fs.functionalize(nn.Linear(2, 2))] * 2
    with pytest.raises(
        fs.StructureError, match='offload must be "W" for the residuals of W alone, "IW" for all'
    ):
        pipeline_value_and_grad(stages, nn.functional.mse_loss, num_microbatches=2, offload=offloaded)


def test_captured_steps_do_not_offload() -> None:
    stages = [fs.functionalize(nn.Linear(2, 2))] * 2
    with pytest.raises(fs.StructureError, match="exclude each other"):
        pipeline_value_and_grad(
            stages, nn.functional.mse_loss, num_microbatches=2, offload="W", captured=True
        )
