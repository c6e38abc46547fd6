"""Pipelines of stage functions: cut from models, run in one process under torch's schedules, seen on a clock.

stages = [functionalize(stage) for stage in cut(model, at=["layers.2", "layers.4"])]
step = pipeline_value_and_grad(stages, loss_fn, schedule="ZBVZeroBubble", num_microbatches=8)
loss, buffers, param_grads = step(params, buffers, inputs, targets)

timeline = simulate(pipeline_order("ZBVZeroBubble", 4, 8), costs)
plot_timeline(timeline, "timeline.png")
"""

from funcstage.pipelining.chrome_trace import chrome_trace, write_chrome_trace
from funcstage.pipelining.costs import Costs, measure_costs, planned_costs
from funcstage.pipelining.cut import CutError, cut
from funcstage.pipelining.local import pipeline_value_and_grad
from funcstage.pipelining.order_files import read_order, write_order
from funcstage.pipelining.orders import SCHEDULES, Action, Order, ScheduleError, pipeline_order
from funcstage.pipelining.plot import plot_comparison, plot_memory, plot_timeline
from funcstage.pipelining.search import find_schedule, zero_bubble_h1
from funcstage.pipelining.stage import FunctionalPipelineStage
from funcstage.pipelining.timeline import Span, Timeline, peak_memory, simulate

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
    "chrome_trace",
    "cut",
    "find_schedule",
    "measure_costs",
    "peak_memory",
    "pipeline_order",
    "pipeline_value_and_grad",
    "planned_costs",
    "plot_comparison",
    "plot_memory",
    "plot_timeline",
    "read_order",
    "simulate",
    "write_chrome_trace",
    "write_order",
    "zero_bubble_h1",
]
