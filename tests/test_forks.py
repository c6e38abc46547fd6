"""Forks, in a process of their own: torch refuses a backward in a child once its engine has threads.

Deeply nested backward passes, which other tests run, start some.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORKING = Path(__file__).with_name("support") / "forking.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_finds_stages_as_if_no_other_thread_had_run_them() -> None:
    command = [sys.executable, "-m", "pytest", str(FORKING), "-n", "0", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout or " skipped" in done.stdout
