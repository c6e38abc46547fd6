"""The Python in the documents runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
TESTING = README.with_name("TESTING.md")


def test_the_examples_of_the_readme_run_one_after_the_other() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["param_grads"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_examples_of_how_to_test_run_one_after_the_other() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TESTING.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "an example", "exec"), {})  # no file, in which Hypothesis would look for code


def test_the_readme_names_the_two_commands() -> None:
    text = README.read_text()
    assert "pip install -e '.[demo]' && python -m funcstage demo" in text
    assert "pip install -e '.[test]' && pytest" in text


@pytest.mark.slow
def test_the_table_of_what_is_supported_is_that_of_the_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--collect-only", "--print-support", "tests"]
    found = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
    begin = found.stdout.index("<!-- support")
    end = found.stdout.index("<!-- end of support -->")
    assert found.stdout[begin:end] in README.read_text(), (
        "write it anew: pytest tests -m supports --write-support"
    )
