"""ARCHITECTURE.md says of every file what it is for, in the file's own words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
}


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


def lines_of_code(path: Path) -> int:
    """How many lines of a file have code, docstrings, comments and blank lines left out."""
    text = path.read_text()
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - docs)


def test_the_sizes_that_are_stated_are_those_of_the_code_within_a_tenth() -> None:
    stated = re.findall(r"^\| [^|]+ \| ([^|]+) \| [\d,]* ?\| ([\d,]+) \| ([\d,]+) \|", TEXT, re.M)
    assert len(stated) == 8
    counted: set[Path] = set()
    for where, code, lines in stated:
        patterns = re.findall(r"`([^`]+)`", where)
        files = {path for pattern in patterns for path in (ROOT / "funcstage").glob(pattern)} - counted
        counted |= files
        assert sum(map(lines_of_code, files)) == pytest.approx(int(code.replace(",", "")), rel=0.1), where
        found = sum(len(path.read_text().splitlines()) for path in files)
        assert found == pytest.approx(int(lines.replace(",", "")), rel=0.1), where
    assert counted == {*(ROOT / "funcstage").rglob("*.py")}


def test_what_is_named_exists() -> None:
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", TEXT):
        assert any(
            (base / path).exists() for base in (ROOT, ROOT / "funcstage", ROOT / "funcstage/engines")
        ), path
