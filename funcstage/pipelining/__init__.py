"""Pipelines of stage functions: cut from models, run in one process under torch's schedules, seen on a clock.

stages = [functionalize(stage) for stage in cut(model, at=["layers.2", "layers.4"])]
step = pipeline_value_and_grad(stages, loss_fn, schedule="ZBVZeroBubble", num_microbatches=8)
loss, buffers, param_grads = step(params, buffers, inputs, targets)

timeline = simulate(pipeline_order("ZBVZeroBubble", 4, 8), costs)
plot_timeline(timeline, "timeline.png")
"""

from funcstage.pipelining.cut import CutError, cut
from funcstage.pipelining.local import pipeline_value_and_grad
from funcstage.pipelining.orders import SCHEDULES, Action, Order, ScheduleError, pipeline_order
from funcstage.pipelining.plot import plot_timeline
from funcstage.pipelining.stage import FunctionalPipelineStage
from funcstage.pipelining.timeline import Costs, Span, Timeline, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "CutError",
    "FunctionalPipelineStage",
    "Order",
    "ScheduleError",
    "Span",
    "Timeline",
    "cut",
    "pipeline_order",
    "pipeline_value_and_grad",
    "plot_timeline",
    "simulate",
]
