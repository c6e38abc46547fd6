"""Files whose functions note which of their statements run, in every process."""

from __future__ import annotations

import ast
from collections.abc import Iterator

LINES_RUN = '''
"""Notes what runs, in whatever process, under the number of the moment that `Notes` has set."""
import mmap
import os
from pathlib import Path

folder = Path(__file__).parents[1]
moment = mmap.mmap(os.open(folder / "moment", os.O_RDWR), 8)
log = (folder / "log").open("a", buffering=1)

class Run(set):
    now = b""

    def add(self, entry):
        if moment[:8] != self.now:
            self.clear()
            self.now = moment[:8]
        if entry not in self:
            super().add(entry)
            log.write(f"{int.from_bytes(self.now, 'little')} {entry}\\n")

run = Run()
'''


def noting(file: str, text: str) -> str:
    """A source file whose functions note which of their statements run."""
    tree = ast.parse(text)
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for node in [function, *_statements(function)]:
            for name in ("body", "orelse", "finalbody"):
                if isinstance(getattr(node, name, None), list):
                    setattr(node, name, _noting(file, getattr(node, name)))
    start = next(i for i, node in enumerate([*tree.body, None]) if not _comes_first(node))
    package = file.partition("/")[0]  # which the recorder of what a stage reads takes for a library
    tree.body[start:start] = ast.parse(f"from {package}.lines_run import run as _lines_run").body
    return ast.unparse(tree)


def _statements(function: ast.AST) -> Iterator[ast.AST]:
    """The statements of a function, without those of functions and classes in it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.expr)):
            yield child
            yield from _statements(child)


def _noting(file: str, statements: list[ast.stmt]) -> list[ast.stmt]:
    found: list[ast.stmt] = []
    for node in statements:
        if not _comes_first(node):
            found += ast.parse(f"_lines_run.add({f'{node.lineno} {file}'!r})").body
        found.append(node)
    return found


def _comes_first(node: ast.AST | None) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")
