"""Pipelines of stages that are sharded: by tensor parallelism, by FSDP, by both, beside other stages.

All schedules with all layouts on both engines: `pytest tests/pipelining/test_sharded_stages.py -m slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_ranks import run
from sharded_pipelines import LAYOUTS, SCHEDULES, num_stages, trained, trained_whole
from torch import Tensor

pytestmark = pytest.mark.timeout(600)

ATEN = {"backend": "aten"}


def check(answers: list[list[dict[str, Tensor]]], expected: list[dict[str, Tensor]]) -> None:
    for steps in answers:
        for found, wanted in zip(steps, expected, strict=True):
            assert found
            for name, value in found.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-8, atol=1e-10, msg=name)


def train_and_check(world: int, how: str, schedule: str, compile: Any, kinds: str = "ours") -> None:
    answers = run(world, trained, how, schedule, compile, kinds)
    layout = LAYOUTS[how]
    ranks = world
    for size in layout.sizes:
        ranks //= size
    check(answers, trained_whole(num_stages(schedule, ranks), layout.data_ranks))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "schedule", "compile", "kinds"),
    [
        ("tensor", "Interleaved1F1B", ATEN, "ours"),
        ("tensor", "ZBVZeroBubble", False, "ours"),
        ("fsdp", "GPipe", ATEN, "ours"),
        ("fsdp", "1F1B", False, "ours"),
        ("fsdp", "InterleavedZeroBubble", False, "ours"),
        ("fsdp", "ZBVZeroBubble", ATEN, "ours"),
        ("fsdp", "DualPipeV", False, "ours"),
        ("fsdp", "Interleaved1F1B", ATEN, "mixed"),
        ("hsdp", "Interleaved1F1B", False, "ours"),
        ("fsdp+tensor", "ZBVZeroBubble", ATEN, "ours"),
        ("fsdp+tensor", "1F1B", False, "ours"),
        ("units", "ZBVZeroBubble", ATEN, "ours"),
        ("units", "1F1B", False, "ours"),
        ("some", "Interleaved1F1B", ATEN, "ours"),
    ],
)
def test_sharded_stages_train_as_the_whole_model(how: str, schedule: str, compile: Any, kinds: str) -> None:
    train_and_check(4, how, schedule, compile, kinds)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, ATEN], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("world", "how"), [(4, "tensor"), (4, "fsdp"), (8, "hsdp"), (8, "fsdp+tensor"), (4, "units")]
)
def test_every_schedule_trains_sharded_stages_as_the_whole_model(
    world: int, how: str, schedule: str, compile: Any
) -> None:
    train_and_check(world, how, schedule, compile)
