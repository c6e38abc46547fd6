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


def test_checkpoint_looks_up_what_it_runs_where_regions_are_intercepted() -> None:
    from torch.utils.checkpoint import checkpoint

    message = MOVED.format(
        version=torch.__version__, name="__dynamo_disable", file="funcstage/_interception.py"
    )
    assert "__dynamo_disable" in inspect.getsource(torch._disable_dynamo), message
    assert hasattr(checkpoint, "__wrapped__"), message


def test_function_has_its_apply_where_custom_functions_are_intercepted() -> None:
    from torch.autograd import Function

    from funcstage import _interception

    message = MOVED.format(
        version=torch.__version__, name="Function.apply", file="funcstage/_interception.py"
    )
    own = Function.__dict__.get("apply")
    assert own is not None, message
    if isinstance(own, classmethod):
        asking = _interception._Asking.__dict__["apply"].__func__.__code__
        assert own.__func__.__code__.co_freevars == asking.co_freevars, message


def test_operators_keep_their_autograd_formulas_in_the_variables_that_are_read() -> None:
    source = inspect.getsource(importlib.import_module("torch._library.autograd"))
    message = MOVED.format(
        version=torch.__version__,
        name="torch._library.autograd.make_autograd_impl",
        file="funcstage/custom_functions.py",
    )
    for name in ("info._setup_context_fn", "info._backward_fn", "Generated = type("):
        assert name in source, message


@pytest.mark.parametrize("file", ["custom_functions.py", "checkpointing.py", "flex.py"])
def test_torch_has_what_custom_parts_of_stages_need(file: str) -> None:
    for module, name in names_from(GRAPH.parent / file):
        message = MOVED.format(version=torch.__version__, name=f"{module}.{name}", file=f"funcstage/{file}")
        assert hasattr(importlib.import_module(module), name), message


def test_compiled_functions_ask_what_stages_answer() -> None:
    from torch._dynamo import eval_frame

    asked = "_force_eager_nested_compile"
    if not hasattr(eval_frame, asked):  # before torch 2.14
        asked = "_callback_from_stance("
    message = MOVED.format(version=torch.__version__, name=asked, file="funcstage/_dynamo.py")
    assert asked in inspect.getsource(eval_frame), message


def test_what_libraries_ask_about_compilation_is_python() -> None:
    message = MOVED.format(
        version=torch.__version__, name="torch.compiler.is_compiling", file="funcstage/graph/_fx.py"
    )
    for function in (torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling):
        assert inspect.isfunction(function), message
        assert not function.__closure__, message
