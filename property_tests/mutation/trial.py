"""Trials: a process forked for each mutant, on a copy of the package with the fault, that runs tests.

The process that forks has imported torch and all else that tests need, but not the package. The copy lies
first on the path, so that processes which tests start run it as well.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .operators import Mutant
from .reach import Notes, Reach


class Outcome(NamedTuple):
    """What became of a mutant.

    `status` is survived, unreached by any test, killed by one that passes without the fault, or endless: the
    tests ran out of a time that is enough without the fault. Unclear is what goes wrong without it, too, as
    on a busy machine, and says nothing about the fault.
    """

    mutant: Mutant
    status: str
    said: str = ""
    seconds: float = 0.0


class _Running(NamedTuple):
    """A trial, or the run without the fault that `checks` what a trial has found."""

    mutant: Mutant
    tests: list[str]
    copy: Path
    began: float
    limit: float
    checks: Outcome | None = None


def outcomes(
    mutants: Iterable[Mutant], package: Path, reach: Reach, budget: float, jobs: int, grace: float = 60.0
) -> Iterator[Outcome]:
    """Try mutants.

    Args:
        mutants: of files of the package.
        package: its folder, beside which the tests are.
        reach: which tests there are for a line.
        budget: seconds that the tests of one mutant may take, by what they took when `reach` was noted.
        jobs: how many at a time.
        grace: seconds that a trial may take beside its tests.

    Yields:
        What became of each, in the order in which they are done.
    """
    preload(reach.modules)
    running: dict[int, _Running] = {}
    waiting = list(reversed(list(mutants)))

    def start(mutant: Mutant, tests: list[str], checks: Outcome | None = None) -> None:
        copy = copied(package)
        if checks is None:
            (copy / mutant.file).write_text(mutant.source((package.parent / mutant.file).read_text()))
        limit = grace + 6 * sum(reach.seconds[test] for test in tests)
        pid = forked(copy, package.parent, tests, _Chosen(tests, copy), "-x", log=copy / "log")
        running[pid] = _Running(mutant, tests, copy, time.monotonic(), limit, checks)

    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            tests = reach.tests_for(mutant, budget)
            if tests:
                start(mutant, tests)
            else:
                yield Outcome(mutant, "unreached")
        time.sleep(0.05)
        for pid, trial in list(running.items()):
            outcome = _outcome(pid, trial)
            if outcome is None:
                continue
            del running[pid]
            if trial.checks is not None:
                seconds = trial.checks.seconds + outcome.seconds
                status = trial.checks.status if outcome.status == "survived" else "unclear"
                yield trial.checks._replace(status=status, seconds=seconds)
            elif outcome.status == "survived":
                yield outcome
            else:
                start(trial.mutant, _to_check(outcome, trial.tests), outcome)


def _outcome(pid: int, trial: _Running) -> Outcome | None:
    ended, code = os.waitpid(pid, os.WNOHANG)
    seconds = time.monotonic() - trial.began
    if not ended and seconds < trial.limit:
        return None
    with suppress(ProcessLookupError):  # and all that it has started
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
    failed = trial.copy / "failed"
    said = failed.read_text() if failed.exists() else f"exit {os.waitstatus_to_exitcode(code)}"
    status = "endless" if not ended else "survived" if code == 0 else "killed"
    shutil.rmtree(trial.copy, ignore_errors=True)
    return Outcome(trial.mutant, status, said, seconds)


def _to_check(outcome: Outcome, tests: list[str]) -> list[str]:
    """The tests that must pass without the fault: the one that failed, or all where none says so."""
    failed = outcome.said.partition(": ")[0]
    return [test for test in tests if test == failed or test.startswith(f"{failed}::")][:1] or tests


class _Chosen:
    """A plugin of pytest that runs certain tests in a certain order, and notes the first that fails."""

    def __init__(self, tests: list[str], copy: Path) -> None:
        self._order = {test: i for i, test in enumerate(tests)}
        self._failed = copy / "failed"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self._order]
        items[:] = sorted(chosen, key=lambda item: self._order[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = str(crash.message if crash else report.longrepr)
        self._failed.write_text(f"{report.nodeid}: {' '.join(text.split())[:200]}")


def collect(package: Path, files: list[str], tests: list[str], path: Path, limit: float = math.inf) -> None:
    """Run tests once, and write to a file which statements of the package's `files` each of them runs.

    The tests of one file may take `limit` seconds.
    """
    copy = copied(package)
    path.unlink(missing_ok=True)
    os.waitpid(forked(copy, package.parent, tests, Notes(package.parent, files, path, copy, limit)), 0)
    shutil.rmtree(copy, ignore_errors=True)


def copied(package: Path) -> Path:
    """Copy a package into a new folder."""
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    shutil.copytree(package, folder / package.name)  # with its bytecode, which saves a second
    return folder


def forked(
    copy: Path, root: Path, tests: Iterable[str], plugin: Any, *options: str, log: Path | None = None
) -> int:
    """Start a process that runs the files of some tests on a copy of the package, and return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        if log is not None:
            for descriptor in (1, 2):
                os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        code = _run(copy, root, tests, plugin, options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run(copy: Path, root: Path, tests: Iterable[str], plugin: Any, options: Iterable[str]) -> int:
    os.chdir(root)
    sys.path[:0] = [str(copy), str(root)]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(sys.path[:2]),
        "PYTHONSAFEPATH": "1",  # else the working directory comes first
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(copy / "hypothesis"),
        "TORCHINDUCTOR_CACHE_DIR": str(copy / "inductor"),
    }
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    plain = ("-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", "-q")
    return int(pytest.main([*files, *plain, *options], plugins=[plugin]))


def preload(modules: Iterable[str]) -> None:
    """Import what forks would import, which takes them seconds each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            with suppress(Exception):
                importlib.import_module(name)
