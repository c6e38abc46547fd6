"""Hypothesis profiles: how many stages the properties are tried on.

    HYPOTHESIS_PROFILE=thorough pytest property_tests

`STAGES` is the total over the families of stages for the main property (test_equivalence.py); the other
properties take a share of it each. CI draws the same stages each time, so that a change is judged by what it
changes; the other profiles draw anew.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from funcstage.testing.strategies import FAMILIES

collect_ignore = ["conftest.py"]  # for doctests, as two modules of one name cannot be imported

STAGES = {"dev": 200, "ci": 2_000, "thorough": 50_000}

for _name, _stages in STAGES.items():
    settings.register_profile(
        _name,
        max_examples=-(-_stages // len(FAMILIES)),
        deadline=None,
        derandomize=_name == "ci",
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        phases=[phase for phase in Phase if phase is not Phase.explain],
    )
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)

# cuDNN's recurrent layers are single kernels that count no FLOPs, round to TensorFloat-32 and refuse
# backward in eval mode; the other kernels of eager compare with ours operation by operation.
torch.backends.cudnn.enabled = False
# Stages are tiny: more threads would only wait for each other.
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="Complex modules are a new feature")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these tests draw examples, for seconds and more."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-operators", action="store_true", help="try every operator of torch, and write OPERATORS.md"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--all-operators"):
        return
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
    found = [value for r in reports for name, value in r.user_properties if name == "operator"]
    if found:
        path = Path(__file__).parent / "OPERATORS.md"
        path.write_text(_operators_page(sorted(found, key=lambda operator: operator["name"])))
        terminalreporter.write_line(f"wrote {path}")


def _operators_page(found: list[dict[str, Any]]) -> str:
    """What came of a run over all operators, as a page."""
    total: Counter[str] = Counter()
    for operator in found:
        total.update(operator["counts"])
    tried = [o for o in found if any(key.endswith(("equal", "excepted")) for key in o["counts"])]
    whole = [o for o in tried if not o["reasons"]]
    lines = [
        "# Torch's own operators as stages",
        "",
        f"Written by `pytest property_tests/test_operators.py --all-operators` on "
        f"{datetime.date.today()}, torch {torch.__version__}, CPU, float64 and complex128.",
        "",
        f"Of {len(found)} differentiable operators in torch's database {len(tried)} have cases that eager "
        f"autograd computes twice alike; {len(whole)} of these are split as eager does in every case tried, "
        f"on both engines, in both roles, and in place where there is such a variant.",
        "",
        "| cases | |",
        "| --- | --- |",
        *(f"| {key} | {total[key]} |" for key in sorted(total)),
        "",
        "| operator | engine | why it is excepted, in some of its cases or all |",
        "| --- | --- | --- |",
        *(
            f"| {operator['name']} | {engine} | {reason} |"
            for operator in found
            for engine, reason in sorted(operator["reasons"].items())
        ),
        "",
    ]
    untried = [o["name"] for o in found if o not in tried]
    lines += [f"Without a case to compare: {', '.join(untried)}.", ""] if untried else []
    return "\n".join(lines)
