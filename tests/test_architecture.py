"""ARCHITECTURE.md says of every file what it is for, in the file's own words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()


def purposes() -> dict[str, str]:
    """The first sentence of every file's docstring."""
    found = {}
    for path in sorted((ROOT / "funcstage").rglob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[str(path.relative_to(ROOT / "funcstage"))] = doc.partition("\n")[0]
    return found


def test_every_file_is_listed_with_what_it_is_for() -> None:
    listed = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", TEXT, re.M))
    assert listed == {path: text.replace("|", "\\|") for path, text in purposes().items()}


def test_what_is_named_exists() -> None:
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", TEXT):
        assert any(
            (base / path).exists() for base in (ROOT, ROOT / "funcstage", ROOT / "funcstage/engines")
        ), path
