"""Pipelines whose weight pullbacks wait in host memory: which do, and that it changes nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pipeline_cases import in_pieces
from torch import Tensor, nn

import funcstage as fs
from funcstage import away
from funcstage.pipelining import Action, Order, pipeline_order, pipeline_value_and_grad
from funcstage.pipelining.stays import stays_everywhere

STAGES, MICROBATCHES = 8, 12
ORDERS = {
    "ZBVZeroBubble": lambda: pipeline_order("ZBVZeroBubble", STAGES, MICROBATCHES),
    "InterleavedZeroBubble": lambda: pipeline_order("InterleavedZeroBubble", STAGES, MICROBATCHES),
    "in pieces": lambda: in_pieces(pipeline_order("ZBVZeroBubble", STAGES, MICROBATCHES), 2),
    "1F1B": lambda: pipeline_order("1F1B", STAGES, MICROBATCHES),
}


def turn(actions: Sequence[Action], place: int) -> tuple[Action, int]:
    return actions[place], actions[:place].count(actions[place])


@pytest.mark.parametrize("offloaded", ["W", "IW"])
@pytest.mark.parametrize("name", ORDERS)
def test_what_waits_has_four_actions_in_between_and_up_to_three_for_each_way(
    name: str, offloaded: Any
) -> None:
    order = ORDERS[name]()
    found = stays_everywhere(order, offloaded)
    back = {user for users in found.before.values() for user in users}
    assert sum(map(len, found.before.values())) == sum(map(len, found.freed.values())) == len(found.after)
    for actions in order.ranks:
        first = {action: actions.index(action) for action in actions}
        for used in first:
            made = used._replace(kind="I" if used.kind == "W" else "F")
            if used.kind == "F" or (used.kind != "W" and offloaded == "W"):
                assert used not in back
                continue
            between = first[used] - first[made] - 1
            assert (made in found.after) == (used in back) == (between >= 4)
            if used in back:
                ahead = 2 if between < 6 else 3
                assert used in found.before[turn(actions, first[used] - ahead)]
                assert made in found.freed[turn(actions, first[made] + 3)]
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
    layers = [
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)) for _ in range(STAGES)
    ]
    model = nn.Sequential(*layers).double()
    x, y = (torch.randn(2 * MICROBATCHES, 3, dtype=torch.float64) for _ in range(2))
    stages = [fs.functionalize(layer) for layer in model]
    if compile:
        stages = [stage._replace(apply=fs.compile(stage.apply, backend="aten")) for stage in stages]
    step: Any = pipeline_value_and_grad(
        stages, nn.functional.mse_loss, schedule=order, num_microbatches=MICROBATCHES, offload=offloaded
    )
    _, _, grads = step([s.params for s in stages], [s.buffers for s in stages], x, y)
    nn.functional.mse_loss(model(x), y).backward()
    for layer, found in zip(model, grads, strict=True):
        for parameter_name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[parameter_name], parameter.grad, rtol=1e-10, atol=1e-12)
    assert len(gone) >= len(stays_everywhere(order, offloaded).after)


def test_an_order_without_time_lets_nothing_wait() -> None:
    close = [Action(kind, 0, m) for m in range(3) for kind in ("F", "I", "W")]  # type: ignore[arg-type]
    order = Order("close", 1, 3, (tuple(close),))
    assert not stays_everywhere(order, "IW").after
    stages = [fs.functionalize(nn.Linear(2, 2))]
    with pytest.warns(UserWarning, match='offload="W" moves nothing under close.* 4 actions') as caught:
        pipeline_value_and_grad(
            stages, nn.functional.mse_loss, schedule=order, num_microbatches=3, offload="W"
        )
    assert caught[0].filename == __file__


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


@pytest.mark.parametrize("offloaded", [None, "IW"])
def test_the_gradients_of_a_step_are_freed_with_the_last_reference(offloaded: Any) -> None:
    """A device's memory must not wait for the garbage collector."""
    stages = [fs.functionalize(nn.Linear(2, 2)) for _ in range(2)]
    step: Any = pipeline_value_and_grad(
        stages, nn.functional.mse_loss, schedule="GPipe", num_microbatches=8, offload=offloaded
    )
    gc.collect()
    gc.disable()
    try:
        _, _, grads = step([s.params for s in stages], [s.buffers for s in stages], *torch.randn(2, 8, 2))
        left = [weakref.ref(grad) for of_stage in grads for grad in of_stage.values()]
        del grads
        assert [ref() for ref in left] == [None] * 4
    finally:
        gc.enable()
