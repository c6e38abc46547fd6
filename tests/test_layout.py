"""How the package is laid out: private torch in one wing, and nothing that has grown too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "funcstage"
FILES = sorted(PACKAGE.rglob("*.py"))
WING = PACKAGE / "_torch"

OF_MODULES_AND_TENSORS = frozenset(
    {"_version", "_cdata", "_schema", "_overloadpacket", "_is_zerotensor", "_qualified_op_name"}
    | {"_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"}
    | {"_post_accumulate_grad_hooks", "_non_persistent_buffers_set", "_flat_weights_names"}
    | {"_n_microbatches", "_has_backward", "_stages", "_PipelineSchedule", "_get_default_store"}
    | {"_setup_context_fn", "_backward_fn", "_input_metadata"}
)
"""Private attributes of torch's objects, by which they are found where a syntax tree does not tell a type."""


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.AST) -> list[str]:
    """The parts of `torch.ops.aten`, outermost first; of anything else, an unknown one first."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "", *parts]


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of torch in a syntax tree. Operators are those of its public table, `torch.ops`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            parts = dotted(node)
            operator = parts[:2] == ["torch", "ops"]
            of_object = node.attr in OF_MODULES_AND_TENSORS
            names = [".".join(parts)] if (parts[0] == "torch" and not operator) or of_object else []
        else:
            names = []
        yield from (f"line {node.lineno}: {name}" for name in names if any(map(is_private, name.split("."))))  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [path for path in FILES if WING not in path.parents], ids=named)
def test_private_names_of_torch_are_in_one_wing(path: Path) -> None:
    assert [*private_names(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch._ops import OpOverload",
        "from torch.overrides import _pop_mode",
        "def f():\n    return torch._C._functorch",
        "x._version",
    ],
)
def test_a_private_name_is_found_however_it_is_spelled(source: str) -> None:
    assert [*private_names(ast.parse(source))]


@pytest.mark.parametrize(
    "source", ["torch.ops.aten._unsafe_view.default", "self._parts", "torch.__version__"]
)
def test_what_is_no_private_name_of_torch_is_let_through(source: str) -> None:
    assert [*private_names(ast.parse(source))] == []


def length(node: ast.AST) -> int:
    """Lines of a class or function; of a function, those of its docstring do not count."""
    lines = (node.end_lineno or 0) - node.lineno + 1  # type: ignore[attr-defined]
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
        lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_has_grown_too_long(path: Path) -> None:
    text = path.read_text()
    nodes = [*ast.walk(ast.parse(text))]
    assert text.count("\n") <= 500
    assert [n.name for n in nodes if isinstance(n, ast.ClassDef) and length(n) > 350] == []
    assert [n.name for n in nodes if isinstance(n, ast.FunctionDef) and length(n) > 80] == []


@pytest.mark.parametrize(
    ("room", "below"),
    [
        ("_torch", "_torch dtensors errors forks trees"),
        ("schedules", "_torch schedules errors report"),
        ("state", "_torch state trees errors forks registration functional wrappers copies residuals"),
        (
            "engines",
            "_torch engines state autograd checks copies dtensors effects errors forks functional gathered "
            "param_groups report residuals tensors trees",
        ),
    ],
)
def test_a_room_knows_of_nothing_above_it(room: str, below: str) -> None:
    """Imports that the type checker alone reads are none."""
    known = set()
    for path in (PACKAGE / room).rglob("*.py"):
        tree = ast.parse(path.read_text())
        for_types = {id(n) for node in tree.body if isinstance(node, ast.If) for n in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("funcstage"):
                parts = (node.module or "").split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                known |= set() if id(node) in for_types else {*names}
    assert known - {*below.split()} == set()


def test_schedules_load_neither_dynamo_nor_fsdp() -> None:
    def loaded(modules: str) -> list[str]:
        code = f"import sys, {modules}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return [m for m in done.stdout.split() if m.startswith("torch") and ("dynamo" in m or "fsdp" in m)]

    assert loaded("torch, funcstage.schedules") == loaded("torch")
