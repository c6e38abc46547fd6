"""Steps that are taken at once: an interrupt comes before the first or after the last of them.

Python looks for interrupts between its own instructions, and not within a function in C. So what is to be put
back whatever happens is made ready beforehand, as an iterator over calls of functions in C, and gone through
by one of them, which is the first thing that an `except` or a `finally` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

at_once: Callable[[Iterable[Any]], None] = deque[Any](maxlen=0).extend
"""Go through steps, and keep none of what they return."""
