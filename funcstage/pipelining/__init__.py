"""Pipelines of stage functions: cut from models, run in one process under torch's schedules, seen on a clock.

stages = [functionalize(stage) for stage in cut(model, at=["layers.2", "layers.4"])]
step = pipeline_value_and_grad(stages, loss_fn, schedule="ZBVZeroBubble", num_microbatches=8)
loss, buffers, param_grads = step(params, buffers, inputs, targets)

timeline = simulate(pipeline_order("ZBVZeroBubble", 4, 8), costs)
plot_timeline(timeline, "timeline.png")
"""

from funcstage.pipelining.capture import CapturedFunction, CapturedSchedule, captured
from funcstage.pipelining.cut import CutError, cut
from funcstage.pipelining.local import pipeline_value_and_grad
from funcstage.pipelining.logged import logged
from funcstage.pipelining.measure import measure_costs
from funcstage.pipelining.over_order import torch_schedule
from funcstage.pipelining.stage import FunctionalPipelineStage
from funcstage.schedules import (
    SCHEDULES,
    Action,
    Costs,
    Order,
    ScheduleError,
    ScheduleName,
    Span,
    Timeline,
    Wait,
    chrome_trace,
    find_schedule,
    interactive_timeline,
    peak_memory,
    pipeline_order,
    planned_costs,
    plot_comparison,
    plot_memory,
    plot_timeline,
    read_order,
    read_trace,
    simulate,
    waits,
    write_chrome_trace,
    write_order,
    zero_bubble_h1,
)

__all__ = [
    "SCHEDULES",
    "Action",
    "CapturedFunction",
    "CapturedSchedule",
    "Costs",
    "CutError",
    "FunctionalPipelineStage",
    "Order",
    "ScheduleError",
    "ScheduleName",
    "Span",
    "Timeline",
    "Wait",
    "captured",
    "chrome_trace",
    "cut",
    "find_schedule",
    "interactive_timeline",
    "logged",
    "measure_costs",
    "peak_memory",
    "pipeline_order",
    "pipeline_value_and_grad",
    "planned_costs",
    "plot_comparison",
    "plot_memory",
    "plot_timeline",
    "read_order",
    "read_trace",
    "simulate",
    "torch_schedule",
    "waits",
    "write_chrome_trace",
    "write_order",
    "zero_bubble_h1",
]
