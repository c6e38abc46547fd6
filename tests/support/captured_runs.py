"""Schedules that train, captured or not, step by step on the same batches and random numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from pipeline_cases import Case, Model, make_schedule, make_stages
from recorded_on_host import OnHost, on_host
from torch import Tensor

import funcstage as fs
from funcstage.pipelining import CapturedSchedule, captured

TRAINING = ["step", "clear"] * 5
"""Steps of which the last three are replays."""


def recorded(schedule: Any, optimizer: Any = None) -> tuple[CapturedSchedule, OnHost]:
    """A captured schedule that records its steps on the CPU."""
    with pytest.warns(UserWarning, match="only those on CUDA devices"):
        made = captured(schedule, optimizer=optimizer)
    return made, on_host(made)


class Run:
    """A schedule that trains, captured or not, step by step, on the same batches and random numbers."""

    def __init__(self, case: Case, group: Any, capture: bool, momentum: bool = True) -> None:
        self.model: Model = case.build()
        stages = make_stages(case, self.model, 0, group)
        schedule = make_schedule(case, stages, getattr(stages[-1], "loss_fn", None) or self.model.loss_fn)
        self.parameters = [p for module in self.model.modules for p in module.parameters()]
        trained = [p for p in self.parameters if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9 if momentum else 0.0)
        self.capture = capture
        self.schedule = schedule
        self.recorder: OnHost | None = None
        if capture:
            self.schedule, self.recorder = recorded(schedule, self.optimizer)

    def do(self, what: str, number: int) -> list[Any]:
        """Do something, and return all that is to be seen afterwards."""
        seen: list[Any] = []
        torch.manual_seed(number)
        inputs = tuple(x + number if x.is_floating_point() else x for x in self.model.inputs)
        if what in ("step", "quiet"):
            losses: list[Tensor] = []
            keywords = {"losses": losses} if what == "step" else {"return_outputs": False}
            seen.append(
                self.schedule.step(*inputs, target=self.model.target, **self.model.kwargs, **keywords)
            )
            seen += losses
            if not self.capture:
                self.optimizer.step()
        elif what == "longer":
            inputs = tuple(torch.cat([x, x + 1]) for x in inputs)
            target = torch.cat([self.model.target] * 2)
            seen.append(self.schedule.step(*inputs, target=target, **self.model.kwargs))
            if not self.capture:
                self.optimizer.step()
        elif what == "eval":
            seen.append(self.schedule.eval(*inputs, target=self.model.target, **self.model.kwargs))
        elif what == "clear":
            self.optimizer.zero_grad()
        elif what == "zero":
            self.optimizer.zero_grad(set_to_none=False)
        elif what == "replace":
            for p in self.parameters:
                p.grad = None if p.grad is None else p.grad.clone()
        elif what == "toggle":
            for module in self.model.modules:
                module.train(not module.training)
        elif what == "fail":
            with pytest.raises((fs.StageError, RuntimeError, ValueError)):
                self.schedule.step(
                    *(x[:1, ..., :1] for x in inputs), target=self.model.target, **self.model.kwargs
                )
        seen += [None if p.grad is None else p.grad.clone() for p in self.parameters]
        seen += [t.clone() for module in self.model.modules for t in module.state_dict().values()]
        return [value.detach() if isinstance(value, Tensor) else value for value in seen]


def assert_same(case: Case, group: Any, doing: list[str]) -> OnHost:
    """Do the same things captured and not, and compare all that is to be seen after each, to the last bit."""
    eager, replayed = Run(case, group, False), Run(case, group, True)
    for number, what in enumerate(doing):
        expected, found = eager.do(what, number), replayed.do(what, number)
        torch.testing.assert_close(
            found, expected, rtol=0, atol=0, equal_nan=True, msg=partial("{} {}: {}".format, what, number)
        )
    assert replayed.recorder is not None
    return replayed.recorder
