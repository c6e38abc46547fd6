"""Whole steps as CUDA graphs.

captured.py   the way in
schedule.py   steps of a pipeline: which runs as it is, is recorded, is replayed; what ranks agree about
function.py   the same of a function, in one process
entries.py    the signatures that steps have had
entry.py      a step with one signature: how it is recorded, and replayed
given.py      its arguments
baked.py      what a graph depends on besides, watched for changes
variables.py  what functions read around them
gradients.py  `.grad` around a replay
graphs.py     CUDA graphs: a stream, a pool of memory
rehearsal.py  a step without messages, so that nothing waits while messages are on their way
messages.py   how messages are withheld, and noted
watchdog.py   replays that do not end
said.py       why something runs as it is
"""

from funcstage.pipelining.capture.captured import captured
from funcstage.pipelining.capture.function import CapturedFunction
from funcstage.pipelining.capture.schedule import CapturedSchedule

__all__ = ["CapturedFunction", "CapturedSchedule", "captured"]
