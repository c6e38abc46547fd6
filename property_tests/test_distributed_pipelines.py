"""Any schedule, cut and batch on torch.distributed is the whole model under plain eager autograd.

So it is with hooks of parameters, an encoder that feeds the pipeline, and modules that change between steps.
"""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_cases import (
    ONE_STAGE_A_RANK,
    V_SHAPED,
    Case,
    assert_same,
    expected,
    gathered,
    train,
    with_widths,
)
from pipeline_ranks import ranks, run
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from funcstage.pipelining import SCHEDULES, ScheduleError, pipeline_order

pytestmark = pytest.mark.timeout(300)

WORLD_SIZE = 2


def freeze(module: nn.Module) -> None:
    next(module.first.parameters()).requires_grad_(False)


def thaw(module: nn.Module) -> None:
    module.requires_grad_(True)


def append(module: nn.Module) -> None:
    width = module.first.out_features
    module.rest.append(nn.Linear(width, width).double())


def replace(module: nn.Module) -> None:
    module.first = nn.Linear(module.first.in_features, module.first.out_features, bias=False).double()


def replace_parameters(module: nn.Module) -> None:
    module.load_state_dict({name: t * 0.5 for name, t in module.state_dict().items()}, assign=True)


def parametrized(module: nn.Module) -> None:
    if not parametrize.is_parametrized(module.first):
        parametrizations.weight_norm(module.first)


CHANGES = [freeze, thaw, append, replace, replace_parameters, parametrized]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    schedule = draw(st.sampled_from(SCHEDULES), label="schedule")
    stages_a_rank = st.just(1) if schedule in ONE_STAGE_A_RANK else st.just(2)
    if schedule not in (*ONE_STAGE_A_RANK, *V_SHAPED):
        stages_a_rank = st.integers(1, 3)
    num_stages = WORLD_SIZE * draw(stages_a_rank, label="stages a rank")
    widths = draw(
        st.lists(st.integers(1, 9), min_size=num_stages + 1, max_size=num_stages + 1), label="widths"
    )
    return Case(
        schedule,
        num_stages,
        draw(st.integers(1, 9), label="microbatches"),
        functools.partial(with_widths, tuple(widths)),
        size=draw(st.integers(1, 3), label="size of a microbatch"),
        compile=draw(st.sampled_from([False, False, False, {"backend": "aten"}]), label="compile"),
        folded=draw(st.booleans(), label="folded"),
        steps=draw(st.integers(1, 3), label="steps"),
        hooks=draw(st.booleans(), label="hooks"),
        encoder=draw(st.booleans(), label="encoder"),
        changes=tuple(draw(st.lists(st.sampled_from(CHANGES), max_size=2), label="changes")),
    )


@settings(max_examples=settings.default.max_examples // 50 + 20)
@given(case=cases())
def test_a_pipeline_trains_as_the_whole_model_or_is_refused_as_torch_refuses_it(case: Case) -> None:
    try:
        pipeline_order(str(case.schedule), case.num_stages, case.num_microbatches, num_ranks=WORLD_SIZE)
    except ScheduleError:
        for answer in ranks(WORLD_SIZE).run(train, case):
            assert "ValueError" in answer.kinds
        return
    assert_same(gathered(run(WORLD_SIZE, train, case)), expected(case), rtol=1e-9, atol=1e-11)
