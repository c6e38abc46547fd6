"""An oracle that we did not write: every differentiable operator that torch tests itself with, as a stage.

One tensor of a call is the stage's input and the others are its parameters, then the other way round; both
engines. A run of the suite takes an evenly spread part of the operators and one sample of each;

    pytest property_tests/test_operators.py --all-operators

takes all of them and several samples, and writes `OPERATORS.md`.
"""

from __future__ import annotations

import warnings
from collections import Counter

import operators
import pytest

SAMPLES = 4
"""How many samples of each operator and dtype a whole run takes, spread evenly over the database's."""

PART = 6
"""One in so many operators is tried in a run of the suite."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("--all-operators")
    metafunc.parametrize("name", list(operators.OPERATORS)[:: 1 if whole else PART])


@pytest.mark.filterwarnings("ignore")
def test_an_operator_is_split_as_eager_differentiates_it(
    name: str, request: pytest.FixtureRequest, record_property: pytest.RecordProperty
) -> None:
    whole = request.config.getoption("--all-operators")
    counts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    wrong: list[str] = []
    for case in operators.cases(name, SAMPLES if whole else 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unfit = operators.not_comparable(case)
            if unfit is not None:
                counts[unfit] += 1
                continue
            for engine in operators.ENGINES:
                raised = operators.outcome(case, engine)
                if raised is None:
                    counts[f"{engine} equal"] += 1
                    continue
                entry = operators.known(case, engine, raised)
                if entry is None:
                    wrong.append(f"{engine}: {case}: {raised}")
                else:
                    counts[f"{engine} excepted"] += 1
                    reasons[engine] = entry.reason
    record_property("operator", {"name": name, "counts": dict(counts), "reasons": reasons})
    assert not wrong, "\n".join(wrong)
