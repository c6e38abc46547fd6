"""The private torch API that the project stands on is there; see the files named for what it is for."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import funcstage

MOVED = "torch {version} has moved {name}, on which {file} stands: find its successor and update that file."


@pytest.mark.parametrize(
    "name",
    [
        "_unwrap_for_grad",
        "_wrap_for_grad",
        "get_unwrapped",
        "is_functorch_wrapped_tensor",
        "maybe_get_level",
        "peek_interpreter_stack",
        "pop_dynamic_layer_stack",
        "push_dynamic_layer_stack",
        "set_inplace_requires_grad_allowed",
        "unwrap_if_dead",
    ],
)
def test_functorch_has_what_the_closures_engine_uses(name: str) -> None:
    message = MOVED.format(
        version=torch.__version__, name=f"torch._C._functorch.{name}", file="funcstage/_functorch.py"
    )
    assert hasattr(torch._C._functorch, name), message


def test_functorch_opens_a_level_as_the_closures_engine_expects() -> None:
    from torch._functorch import eager_transforms

    message = MOVED.format(
        version=torch.__version__, name="grad_increment_nesting", file="funcstage/_functorch.py"
    )
    assert hasattr(eager_transforms, "grad_increment_nesting"), message
    with eager_transforms.grad_increment_nesting() as level:
        assert isinstance(level, int), message


def test_composite_functions_check_for_overrides_by_the_names_that_are_answered() -> None:
    from funcstage.composites import opened

    source = inspect.getsource(torch.nn.functional.multi_head_attention_forward)
    message = MOVED.format(
        version=torch.__version__, name="has_torch_function", file="funcstage/composites.py"
    )
    assert "if has_torch_function(" in source, message
    assert opened(torch.nn.functional.multi_head_attention_forward) is not None, message


def test_recurrent_modules_cache_their_weights_under_the_names_that_are_lent() -> None:
    lstm = torch.nn.LSTM(2, 2)
    for name in ("_flat_weights", "_flat_weight_refs", "_flat_weights_names"):
        assert hasattr(lstm, name), MOVED.format(
            version=torch.__version__, name=f"RNNBase.{name}", file="funcstage/functional.py"
        )


def names_from(path: Path) -> list[tuple[str, str]]:
    """What a file imports from torch: (module, name)."""
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [
        (node.module, alias.name)
        for node in found
        if node.module and node.module.startswith("torch.")
        for alias in node.names
    ]


GRAPH = Path(funcstage.__file__).parent / "graph"


@pytest.mark.parametrize(
    ("file", "module", "name"),
    [(file, *found) for file in ("_torch.py", "inductor.py") for found in names_from(GRAPH / file)],
)
def test_torch_has_what_the_graph_engine_uses(file: str, module: str, name: str) -> None:
    message = MOVED.format(version=torch.__version__, name=f"{module}.{name}", file=f"funcstage/graph/{file}")
    try:
        assert hasattr(importlib.import_module(module), name), message
    except ModuleNotFoundError:
        pytest.fail(message)


def test_inductor_overwrites_what_is_said_to_be_donated() -> None:
    from torch._inductor.utils import get_donated_idxs

    message = MOVED.format(
        version=torch.__version__, name="fw_metadata.bw_donated_idxs", file="funcstage/graph/inductor.py"
    )
    assert "fw_metadata.bw_donated_idxs" in inspect.getsource(get_donated_idxs), message
