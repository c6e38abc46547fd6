"""Whether a profiler of torch's listens: `record_function` alone takes 10 us where none does."""

from __future__ import annotations

from torch.autograd import _profiler_enabled

is_listening = _profiler_enabled
"""Tell whether `torch.profiler`, or `torch.autograd.profiler.emit_nvtx`, records what this thread does."""
