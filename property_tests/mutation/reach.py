"""Which tests run which statements, noted once by running them all, so that a trial runs no others."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import mmap
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from .operators import Mutant
from .statements import LINES_RUN, noting
from .targets import distance


@dataclass(frozen=True)
class Reach:
    """What was noted.

    Attributes:
        seconds: how long each passing test took, by its id.
        lines: for each statement of each file the tests that run it, as the bits of a number.
        modules: what the tests import from elsewhere.
        texts: of the files as they were.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, int]]
    modules: list[str]
    texts: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> Reach:
        read = json.loads(path.read_text())
        lines = {f: {int(n): int(b, 16) for n, b in found.items()} for f, found in read["lines"].items()}
        return cls(read["seconds"], lines, read["modules"], read["texts"])

    def save(self, path: Path) -> None:
        lines = {f: {str(n): f"{b:x}" for n, b in found.items()} for f, found in self.lines.items()}
        notes = {"seconds": self.seconds, "lines": lines, "modules": self.modules, "texts": self.texts}
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(notes))

    def tests_for(self, mutant: Mutant, budget: float) -> list[str]:
        """The tests that may see a mutant, as many as take `budget`.

        Those of the file of its name come first, then those about it, then others; of each file the quickest.
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
        chosen.sort(key=lambda test: (distance(mutant.file, file_of[test]), turns[test]))
        spent = 0.0
        for i, test in enumerate(chosen):
            spent += self.seconds[test]
            if spent > budget:
                return chosen[: max(i, 1)]
        return chosen

    def stale(self, root: Path) -> list[str]:
        """The files that have changed since."""
        return [file for file, text in self.texts.items() if text_of(root / file) != text]

    def up_to_date(self, root: Path) -> Reach:
        """With the lines where they are today; those that are new are run by who runs those around them."""
        texts = {file: text_of(root / file) for file in self.texts}
        lines = {f: moved(found, self.texts[f], texts[f]) for f, found in self.lines.items()}
        return replace(self, lines=lines, texts=texts)

    def joined(self, newer: Reach) -> Reach:
        """With what was noted anew of the tests of some files, on the same text."""
        again = {test.partition("::")[0] for test in newer.seconds}
        kept = [test.partition("::")[0] not in again for test in self.seconds]
        seconds = dict(itertools.compress(self.seconds.items(), kept))
        lines: dict[str, dict[int, int]] = {}
        for file in {**self.lines, **newer.lines}:
            old, new = self.lines.get(file, {}), newer.lines.get(file, {})
            lines[file] = {
                n: chosen_bits(old.get(n, 0), kept) | new.get(n, 0) << len(seconds) for n in {**old, **new}
            }
        modules = [*dict.fromkeys([*self.modules, *newer.modules])]
        return Reach({**seconds, **newer.seconds}, lines, modules, {**self.texts, **newer.texts})


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def moved(found: dict[int, int], old: str, new: str) -> dict[int, int]:
    """What was noted of the lines of an old text, for those of a new one."""
    if old == new:
        return found
    lines: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        around = functools.reduce(int.__or__, (found.get(n, 0) for n in range(i, i_end + 2)), 0)
        for k in range(j_end - j):
            tests = found.get(i + k + 1, 0) if tag == "equal" else around
            if tests:
                lines[j + k + 1] = tests
    return lines


def chosen_bits(number: int, chosen: list[bool]) -> int:
    """The bits of a number that are chosen, closed up."""
    bits = f"{number:b}"[::-1].ljust(len(chosen), "0")
    return int("".join(itertools.compress(bits, chosen))[::-1] or "0", 2)


class Notes:
    """A plugin of pytest that notes what `Reach` holds, and writes it to a file.

    Args:
        root: the folder that ids and paths are relative to.
        files: those whose statements are noted, relative to the root.
        path: of the file to write.
        copy: a folder with a copy of the package, whose files will note.
        limit: seconds for the tests of one file, one case of each first; those that are left are not noted.
    """

    def __init__(self, root: Path, files: list[str], path: Path, copy: Path, limit: float) -> None:
        self._root, self._path, self._copy = root, path, copy
        self._limit = limit
        self._texts = {file: (root / file).read_text() for file in files}
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._left_out = 0
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()
        self._not_passed: set[str] = set()
        self._moments: list[tuple[str, bool]] = []
        [package] = {file.partition("/")[0] for file in files}
        for file, text in self._texts.items():
            (copy / file).write_text(noting(file, text))
        (copy / package / "lines_run.py").write_text(LINES_RUN)
        (copy / "log").touch()
        (copy / "moment").write_bytes(bytes(8))
        self._moment = mmap.mmap(os.open(copy / "moment", os.O_RDWR), 8)

    def _begin(self, item: pytest.Item, setup: bool) -> None:
        self._moments.append((item.nodeid, setup))
        self._moment[:8] = len(self._moments).to_bytes(8, "little")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = {item.path: i for i, item in enumerate(items)}
        earlier: Counter[tuple[Path, str]] = Counter()  # one case of every test, then another of every test
        turns = {}
        for item in items:
            test = item.path, getattr(item, "originalname", item.name)
            turns[item] = earlier[test]
            earlier[test] += 1
        items.sort(key=lambda item: (files[item.path], turns[item]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._timed(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._timed(item))

    def _timed(self, item: pytest.Item) -> Iterator[None]:
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            spent = time.perf_counter() - start
            self._spent[item.nodeid.partition("::")[0]] += spent
            self._seconds[item.nodeid] = round(self._seconds.get(item.nodeid, 0.0) + spent, 3)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        if self._spent[item.nodeid.partition("::")[0]] >= self._limit:
            self._left_out += 1
            pytest.skip("the tests of this file have had their time")
        self._begin(item, setup=True)
        try:
            return (yield from self._timed(item))
        finally:
            self._begin(item, setup=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self._not_passed.add(report.nodeid)
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        tests = [test for test in self._seconds if test not in self._not_passed]
        numbers = {test: 1 << i for i, test in enumerate(tests)}
        modules: defaultdict[str, int] = defaultdict(int)
        for test, number in numbers.items():
            modules[test.partition("::")[0]] |= number
        bits: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        for entry in (self._copy / "log").read_text().splitlines():
            moment, line, file = entry.split()
            if int(moment):
                test, setup = self._moments[int(moment) - 1]
                # What a module's fixture has run, it has run for all tests of the module.
                bits[file][int(line)] |= modules[test.partition("::")[0]] if setup else numbers.get(test, 0)
        Reach(
            {test: self._seconds[test] for test in tests},
            {file: dict(found) for file, found in bits.items()},
            [name for name, module in list(sys.modules.items()) if self._is_foreign(name, module)],
            self._texts,
        ).save(self._path)
        print(f"\n{len(tests)} tests noted, {self._left_out} left out; these failed: {sorted(self._failed)}")

    def _is_foreign(self, name: str, module: Any) -> bool:
        file = str(getattr(module, "__file__", None) or self._root)
        return name != "__main__" and not any(file.startswith(str(path)) for path in (self._root, self._copy))
