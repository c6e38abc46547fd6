"""Whole steps of a pipeline as CUDA graphs.

schedule.py   which step runs as it is, is recorded, is replayed; what ranks agree about
entry.py      a step with one signature: how it is recorded, and replayed
given.py      its arguments
baked.py      what a graph depends on besides, watched for changes
gradients.py  `.grad` around a replay
graphs.py     CUDA graphs: a stream, a pool of memory
rehearsal.py  a step without messages, so that nothing waits while messages are on their way
messages.py   how messages are withheld, and noted
watchdog.py   replays that do not end
"""

from funcstage.pipelining.capture.schedule import CapturedSchedule, captured

__all__ = ["CapturedSchedule", "captured"]
