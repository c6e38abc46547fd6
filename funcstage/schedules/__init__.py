"""Schedules as data: orders, their costs on a clock, pictures, and the search for better ones.

timeline = simulate(pipeline_order("ZBVZeroBubble", 4, 8), costs)
plot_timeline(timeline, "timeline.png")

Nothing here needs the engines; torch's own schedules are imported when one of their orders is asked for.
"""

from funcstage.schedules.costs import Costs, planned_costs
from funcstage.schedules.files import read_order, write_order
from funcstage.schedules.interactive import interactive_timeline
from funcstage.schedules.measured import Wait, read_trace, waits
from funcstage.schedules.orders import SCHEDULES, Action, Order, ScheduleError, ScheduleName, pipeline_order
from funcstage.schedules.plot import plot_comparison, plot_memory, plot_timeline
from funcstage.schedules.search import find_schedule, zero_bubble_h1
from funcstage.schedules.timeline import Span, Timeline, peak_memory, simulate
from funcstage.schedules.trace import chrome_trace, write_chrome_trace

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Order",
    "ScheduleError",
    "ScheduleName",
    "Span",
    "Timeline",
    "Wait",
    "chrome_trace",
    "find_schedule",
    "interactive_timeline",
    "peak_memory",
    "pipeline_order",
    "planned_costs",
    "plot_comparison",
    "plot_memory",
    "plot_timeline",
    "read_order",
    "read_trace",
    "simulate",
    "waits",
    "write_chrome_trace",
    "write_order",
    "zero_bubble_h1",
]
