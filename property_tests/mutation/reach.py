"""Which tests run which statements, noted once by running them all, so that a trial runs no others."""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .operators import Mutant
from .statements import LINES_RUN, noting
from .targets import concerns


@dataclass(frozen=True)
class Reach:
    """What was noted.

    Attributes:
        seconds: how long each passing test took, by its id.
        lines: for each statement of each file the tests that run it, as the bits of a number.
        modules: what the tests import from elsewhere.
        hashes: of the files as they were.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, int]]
    modules: list[str]
    hashes: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> Reach:
        read = json.loads(path.read_text())
        lines = {f: {int(n): int(b, 16) for n, b in found.items()} for f, found in read["lines"].items()}
        return cls(read["seconds"], lines, read["modules"], read["hashes"])

    def tests_for(self, mutant: Mutant, budget: float) -> list[str]:
        """The tests that may see a mutant, as many as take `budget`.

        Those of files about the mutant's come first, then those of others; of each file the quickest first.
        """
        lines = self.lines.get(mutant.file, {})
        first, last = mutant.lines
        found = functools.reduce(int.__or__, (lines.get(n, 0) for n in range(first, last + 1)), 0)
        chosen = [test for i, test in enumerate(self.seconds) if found >> i & 1]
        chosen.sort(key=self.seconds.__getitem__)
        file_of = {test: test.partition("::")[0] for test in chosen}
        earlier: Counter[str] = Counter()  # one test of every file, then another of every file
        turns = {}
        for test in chosen:
            turns[test] = earlier[file_of[test]]
            earlier[file_of[test]] += 1
        chosen.sort(key=lambda test: (not concerns(mutant.file, file_of[test]), turns[test]))
        spent = 0.0
        for i, test in enumerate(chosen):
            spent += self.seconds[test]
            if spent > budget:
                return chosen[: max(i, 1)]
        return chosen

    def stale(self, root: Path) -> list[str]:
        """The files that have changed since."""
        return [file for file, digest in self.hashes.items() if digest_of(root / file) != digest]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


class Notes:
    """A plugin of pytest that notes what `Reach` holds, and writes it to a file.

    Args:
        root: the folder that ids and paths are relative to.
        files: those whose statements are noted, relative to the root.
        path: of the file to write.
        copy: a folder with a copy of the package, whose files will note.
    """

    def __init__(self, root: Path, files: list[str], path: Path, copy: Path) -> None:
        self._root, self._path, self._copy = root, path, copy
        self._files = files
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()
        self._moments: list[tuple[str, bool]] = []
        for file in files:
            (copy / file).write_text(noting(file, (root / file).read_text()))
        (copy / "lines_run.py").write_text(LINES_RUN)
        (copy / "moment").write_bytes(bytes(8))
        self._moment = mmap.mmap(os.open(copy / "moment", os.O_RDWR), 8)

    def _begin(self, item: pytest.Item, setup: bool) -> None:
        self._moments.append((item.nodeid, setup))
        self._moment[:8] = len(self._moments).to_bytes(8, "little")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self._seconds[item.nodeid] = round(time.perf_counter() - start, 3)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self._begin(item, setup=True)
        try:
            return (yield)
        finally:
            self._begin(item, setup=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        tests = [test for test in self._seconds if test not in self._failed]
        numbers = {test: 1 << i for i, test in enumerate(tests)}
        modules: defaultdict[str, int] = defaultdict(int)
        for test, number in numbers.items():
            modules[test.partition("::")[0]] |= number
        bits: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        for entry in (self._copy / "log").read_text().splitlines() if tests else ():
            moment, line, file = entry.split()
            if int(moment):
                test, setup = self._moments[int(moment) - 1]
                # What a module's fixture has run, it has run for all tests of the module.
                bits[file][line] |= modules[test.partition("::")[0]] if setup else numbers.get(test, 0)
        notes = {
            "seconds": {test: self._seconds[test] for test in tests},
            "lines": {file: {line: f"{b:x}" for line, b in found.items()} for file, found in bits.items()},
            "modules": [name for name, module in list(sys.modules.items()) if self._is_foreign(name, module)],
            "hashes": {file: digest_of(self._root / file) for file in self._files},
        }
        self._path.parent.mkdir(exist_ok=True, parents=True)
        self._path.write_text(json.dumps(notes))
        print(f"\n{len(tests)} tests noted; these failed: {sorted(self._failed)}")

    def _is_foreign(self, name: str, module: Any) -> bool:
        file = str(getattr(module, "__file__", None) or self._root)
        return name != "__main__" and not any(file.startswith(str(path)) for path in (self._root, self._copy))
