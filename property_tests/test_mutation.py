"""The command of `property_tests.mutation`, on a package of one file whose tests are known."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mutation.__main__ import ACCEPTED, read_accepted, reason_for, table
from mutation.operators import Mutant, mutants_of
from mutation.reach import Reach, moved
from mutation.targets import distance, target_files
from mutation.trial import Outcome

ROOT = Path(__file__).parents[1]

CODE = '''
"""A file with faults that its tests see, and with some that they do not see."""

import time

def first_positive(values, start=0):
    for value in values[start:]:
        if value > 0 and value != 5:
            return value

def countdown(n):
    while n:
        n -= 1
        time.sleep(0.01)
    return (n, "done")

def elsewhere():
    return 1

def once():
    return 1

def unused():
    return 1
'''

TESTS = """
import subprocess, sys
from pathlib import Path
from toy.core import countdown, first_positive, once

def test_the_first_positive_value_is_found():
    assert first_positive([-1, 2]) == 2

def test_a_countdown_ends():
    assert countdown(3) == (0, "done")

def test_what_another_process_runs():
    command = "import toy.core; assert toy.core.elsewhere() == 1"
    subprocess.run([sys.executable, "-c", command], check=True)

def test_that_passes_only_once():
    once()
    Path(__file__).with_name("ran").touch(exist_ok=False)

def test_that_fails_anyway():
    assert False
"""

SCRIPT = """
import json, sys
from pathlib import Path
from property_tests.mutation.operators import mutants_of
from property_tests.mutation.reach import Reach
from property_tests.mutation.trial import collect, outcomes

root, file = Path(sys.argv[1]), "toy/core.py"
notes = root / "notes.json"
collect(root / "toy", [file], ["tests/test_core.py"], notes)
reach = Reach.load(notes)
mutants = mutants_of(file, (root / file).read_text())
found = outcomes(mutants, root / "toy", reach, budget=60.0, jobs=2, grace=20.0)
print(json.dumps({"tests": [*reach.seconds], "outcomes": {o.mutant.name: o.status for o in found}}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    root = tmp_path_factory.mktemp("root")
    for file, text in (("toy/__init__.py", ""), ("toy/core.py", CODE), ("tests/test_core.py", TESTS)):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_only_tests_that_pass_without_a_fault_take_part(found: dict) -> None:
    names = [
        "test_the_first_positive_value_is_found",
        "test_a_countdown_ends",
        "test_what_another_process_runs",
        "test_that_passes_only_once",
    ]
    assert found["tests"] == [f"tests/test_core.py::{name}" for name in names]


@pytest.mark.parametrize(
    ("place", "status"),
    [
        ("first_positive | value > 0 and value != 5 -> (not (value > 0 and value != 5))", "killed"),
        ("first_positive | value > 0 and value != 5 -> (value > 0 or value != 5)", "killed"),
        ("first_positive | value > 0 and value != 5 -> (value > 0)", "survived"),
        ("first_positive | value > 0 -> (value >= 0)", "survived"),
        ("first_positive | 5 -> (6)", "survived"),
        ("first_positive | 0 -> (1)", "survived"),  # either one
        ("first_positive | value -> (None)", "killed"),
        ("countdown | n -> (not (n))", "killed"),
        ("countdown | n -= 1 -> pass", "endless"),
        ("countdown | (n, 'done') -> (n,)", "killed"),
        ("elsewhere | 1 -> (2)", "killed"),
        ("once | 1 -> (2)", "unclear"),  # its test fails from the second time on
        ("unused | 1 -> (None)", "unreached"),
    ],
)
def test_what_becomes_of_a_fault(place: str, status: str, found: dict) -> None:
    assert found["outcomes"][f"toy/core.py | {place}"] == status


def test_tests_in_files_about_the_mutants_file_come_first_and_the_quickest_of_these() -> None:
    seconds = {"tests/test_a.py::a": 0.1, "tests/test_core.py::b": 0.5, "tests/test_core.py::c": 0.2}
    reach = Reach(seconds, {"toy/core.py": {1: 0b111, 2: 0b101}}, [], {})
    [c, b, a] = ["tests/test_core.py::c", "tests/test_core.py::b", "tests/test_a.py::a"]
    mutant = Mutant("toy/core.py", "f", "1", "2", "number", (1, 1), (0, 1))
    assert reach.tests_for(mutant, budget=1.0) == [c, b, a]
    assert reach.tests_for(mutant, budget=0.3) == [c]
    assert reach.tests_for(replace(mutant, lines=(2, 2)), budget=1.0) == [c, a]
    tests = [f"tests/engines/graph/test_{name}.py" for name in ("plan", "budget", "split")]
    assert [distance("funcstage/engines/graph/plan.py", test) for test in tests] == [0, 1, 2]


def test_notes_follow_the_lines_of_a_file_that_has_changed() -> None:
    old = "a\nb\nc\nd\n"
    found = {1: 0b001, 2: 0b010, 3: 0b100}
    assert moved(found, old, old) == found
    assert moved(found, old, "new\na\nb\nc\n") == {1: 0b001, 2: 0b001, 3: 0b010, 4: 0b100}
    assert moved(found, old, "a\nc\nd\n") == {1: 0b001, 2: 0b100}
    assert moved(found, old, "a\nB\nB\nc\nd\n") == {1: 0b001, 2: 0b111, 3: 0b111, 4: 0b100}


def test_what_is_noted_anew_of_a_file_of_tests_takes_the_place_of_what_was() -> None:
    old = Reach(
        {"t.py::a": 1.0, "u.py::b": 2.0, "t.py::c": 3.0, "v.py::d": 4.0}, {"x": {1: 0b1111, 2: 0b10}}, [], {}
    )
    new = Reach({"t.py::c": 5.0, "t.py::e": 6.0}, {"x": {1: 0b10, 3: 0b01}}, [], {})
    both = old.joined(new)
    assert both.seconds == {"u.py::b": 2.0, "v.py::d": 4.0, "t.py::c": 5.0, "t.py::e": 6.0}
    assert both.lines == {"x": {1: 0b1011, 2: 0b0001, 3: 0b0100}}


def test_the_tests_of_a_file_may_take_only_so_long_when_they_are_noted(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text("")
    (tmp_path / "test_long.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.parametrize('case', range(2))\ndef test_a(case): ...\n"
        "def test_b(): time.sleep(0.3)\n"
    )
    (tmp_path / "test_other.py").write_text("def test_d(): ...\n")
    script = (
        "from pathlib import Path; from property_tests.mutation.trial import collect\n"
        f"root = Path({str(tmp_path)!r})\n"
        "collect(root / 'toy', ['toy/__init__.py'], ['test_long.py', 'test_other.py'], root / 'notes', 0.3)"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert [*Reach.load(tmp_path / "notes").seconds] == [
        "test_long.py::test_a[0]",
        "test_long.py::test_b",
        "test_other.py::test_d",
    ]


def test_no_fault_is_planted_twice_or_is_none() -> None:
    code = "def f(x, y):\n    if x == y or x < y:\n        return g(x, x) if x is y else g(x, y)\n"
    tried = [mutant.source(code) for mutant in mutants_of("a.py", code)]
    same = {ast.unparse(ast.parse(text)) for text in [code, *tried]}
    assert len(same) == 1 + len(tried)


def test_a_score_counts_what_was_tried_and_is_clear() -> None:
    mutant = Mutant("a.py", "f", "1", "2", "number", (1, 1), (0, 1))
    found = [Outcome(mutant, status) for status in ("killed", "endless", "unclear", "survived", "unreached")]
    assert "| a.py | 1 | 1 | 1 | 1 | 0 | 1 | 50.0% |" in table(found, [])
    assert "| a.py | 1 | 1 | 0 | 0 | 2 | 1 | 100.0% |" in table(
        found, read_accepted("a.py | f | *\n    Why.\n")
    )


def test_a_survivor_is_accepted_for_a_reason_that_names_it_or_all_like_it() -> None:
    accepted = read_accepted("# a comment\na.py | f | 1 -> (2)\na.py | g | *cuda* -> *\n    Why.\n")
    reasons = {}
    for name in ("f | 1 -> (2)", "f | 1 -> (22)", "g | x.is_cuda -> (not x.is_cuda)", "g | 1 -> (2)"):
        function, old, new = re.fullmatch(r"(.*) \| (.*) -> (.*)", name).groups()
        mutant = Mutant("a.py", function, old, new, "number", (1, 1), (0, 1))
        reasons[name] = reason_for(Outcome(mutant, "survived"), accepted)
    assert list(reasons.values()) == ["Why.", None, "Why.", None]
    assert reason_for(Outcome(mutant, "killed"), accepted) is None


def test_what_is_accepted_is_still_there() -> None:
    names = [m.name for file in target_files() for m in mutants_of(file, (ROOT / file).read_text())]
    accepted = read_accepted(ACCEPTED.read_text())
    assert [name.pattern for name, _ in accepted if not any(map(name.fullmatch, names))] == []
