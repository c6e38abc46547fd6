"""Pipelines of stage functions: torch's schedules run in one process, and seen on a clock.

step = pipeline_value_and_grad(stages, loss_fn, schedule="ZBVZeroBubble", num_microbatches=8)
loss, buffers, param_grads = step(params, buffers, inputs, targets)

timeline = simulate(pipeline_order("ZBVZeroBubble", 4, 8), costs)
plot_timeline(timeline, "timeline.png")
"""

from funcstage.pipelining.local import pipeline_value_and_grad
from funcstage.pipelining.orders import SCHEDULES, Action, Order, ScheduleError, pipeline_order
from funcstage.pipelining.plot import plot_timeline
from funcstage.pipelining.stage import FunctionalPipelineStage
from funcstage.pipelining.timeline import Costs, Span, Timeline, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "FunctionalPipelineStage",
    "Order",
    "ScheduleError",
    "Span",
    "Timeline",
    "pipeline_order",
    "pipeline_value_and_grad",
    "plot_timeline",
    "simulate",
]
