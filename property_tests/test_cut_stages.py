"""Stages that read values of tensors anywhere, compiled around these lines: what is split is eager backward.

A stage is lines: parts that can be traced, lines that read values, writes in place, buffers, random numbers,
and further stages inside of residuals, checkpointed regions, autocast, loops and branches.
"""

from __future__ import annotations

import ast
import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.engines.graph import breaks
from funcstage.testing import check_stage, strategies

FEW = settings(max_examples=2)
SHAPE = (2, 3)
BLOCKS = ("residual", "repeat", "tied", "frozen")


class Lines(nn.Module):
    """A forward of several lines, each with a module of its own, parameters and buffers around them."""

    mean: Tensor

    def __init__(self, kinds: list[str], modules: list[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.kinds = kinds
        self.lines = nn.ModuleList(modules)
        self.weight = nn.Parameter(torch.linspace(-1, 2, SHAPE[-1], dtype=dtype))
        self.register_buffer("mean", torch.zeros(SHAPE[-1], dtype=dtype))

    def forward(self, x: Tensor, *, shift: Tensor | float = 0.0) -> Tensor:
        x = x + shift
        for kind, module in zip(self.kinds, self.lines, strict=True):
            x = LINES[kind](self, module, x)
        return x * 1

    def extra_repr(self) -> str:
        return ", ".join(self.kinds)


def called(module: Any, x: Tensor) -> Tensor:
    """What a part makes of an activation, which it may overwrite, in the shape and dtype of the stage."""
    y = module(x * 1)
    return (y if y.shape == x.shape else x + y.sum()).tanh().to(x.dtype)


def part(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return called(module, x)


def residual(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return x + called(module, x)


def twice(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return called(module, called(module, x))


def recomputed(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(called, module, x, use_reentrant=False)


def recomputed_by_a_function(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: called(module, y * s.weight), x, use_reentrant=False)


def reentrant(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return x + checkpoint(called, module, x, use_reentrant=True)


def autocast(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    if x.dtype is not torch.float32:
        return part(s, module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return called(module, x)


def without_gradients(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = called(module, x)
    return x * s.weight + y


def into_a_result(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    y = called(module, x) * 1
    y += x.sum()
    return y.mul_(0.5)


def into_rows(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = called(module, x)[1]
    y[:, 1:].mul_(s.weight[1:])
    return y


def buffer(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    s.mean = 0.5 * s.mean + x.detach().mean(0)
    return called(module, x) - s.mean


def random(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return functional.dropout(called(module, x), 0.5) * s.weight


def item(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return called(module, x) * (0.5 if x.detach().sum().item() > 0 else 2)


def branch(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    return called(module, x) if x.sum() > 0 else x * s.weight


def loop(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    for _ in range(int(x.detach().abs().sum()) % 3):
        x = called(module, x)
    return x


def tolist(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    sums = x.detach().abs().sum(-1).tolist()
    return called(module, x) * x.new_tensor(sums)[:, None].tanh()


def nonzero(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    rows = x.sum(-1).gt(0).nonzero()[:, 0]
    return called(module, x).index_add(0, rows, x[rows] * s.weight)


def masked(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    y, keep = x.clone(), x > 0
    y[keep] = called(module, x)[keep]
    return y


def printed(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    text = f"{x.detach().sum():.1f}{x}"
    return called(module, x) * len(text[:1])


def routed(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for i in (x.detach().argmax(-1) % 2).unique().tolist():
        y = y + called(module, x * s.weight[i])
    return y


def shifted(s: Lines, module: nn.Module, x: Tensor) -> Tensor:
    shift = x.detach().mean().item() if isinstance(module, Lines) else 0.0
    return module(x, shift=shift * s.weight) if isinstance(module, Lines) else part(s, module, x)


READS: dict[str, Callable[[Lines, nn.Module, Tensor], Tensor]] = {
    f.__name__: f for f in (item, branch, loop, tolist, nonzero, masked, printed, routed)
}
OTHERS: dict[str, Callable[[Lines, nn.Module, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        part,
        residual,
        twice,
        recomputed,
        recomputed_by_a_function,
        reentrant,
        autocast,
        without_gradients,
        into_a_result,
        into_rows,
        buffer,
        random,
        shifted,
    )
}
LINES = READS | OTHERS

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


@st.composite
def cut(draw: st.DrawFn, dtype: torch.dtype, depth: int = 2, reads: bool = True) -> Lines:
    """Draw a stage; `reads` if one of its own lines is to read a value."""
    kinds = draw(st.lists(st.sampled_from([*OTHERS, *READS]), max_size=2))
    if reads:
        kinds.insert(draw(st.integers(0, len(kinds))), draw(st.sampled_from([*READS])))
    modules = [
        draw(cut(dtype, depth - 1, draw(st.booleans())))
        if depth and draw(st.booleans())
        else draw(strategies.modules(BLOCKS, shape=SHAPE, dtype=dtype))
        for _ in kinds
    ]
    return Lines(kinds, modules, dtype)


def stages(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> st.SearchStrategy[Lines]:
    return st.sampled_from(dtypes).flatmap(cut)


def input_of(stage: Lines) -> Tensor:
    return torch.randn(SHAPE, dtype=stage.weight.dtype, generator=torch.Generator().manual_seed(1))


def runs(stage: Lines) -> bool:
    """Tell whether eager can, and changes nothing more when it computes regions again."""
    stage = copy.deepcopy(stage)
    try:
        output = stage(input_of(stage).requires_grad_())
        before = copy.deepcopy(dict(stage.named_buffers()))
        output.sum().backward()
    except RuntimeError:  # as regions may read other values then, or layers not know autocast
        return False
    return all(torch.equal(before[name], buffer) for name, buffer in stage.named_buffers())


def in_parts(apply: Any, **options: Any) -> Any:
    return fs.compile(apply, **{"backend": "aten", "fullgraph": False, **options})


@given(stage=stages(), training=st.booleans(), remat=st.sampled_from(("none", "min_cut", "full", 0.5)))
def test_a_stage_that_is_cut_is_split_as_eager_has_it(stage: Lines, training: bool, remat: Any) -> None:
    assume(runs(stage.train(training)))
    check_stage(stage, input_of(stage), engines=functools.partial(in_parts, remat=remat), flops=False)


@FEW
@given(stage=stages())
def test_a_stage_that_is_cut_is_eagers_by_inductor(stage: Lines) -> None:
    assume(runs(stage))
    check_stage(stage, input_of(stage), engines=functools.partial(in_parts, backend="inductor"), flops=False)


@given(stage=stages())
def test_where_the_graph_must_be_whole_the_line_is_named_and_nothing_changed(stage: Lines) -> None:
    assume(runs(stage))
    apply, params, buffers = fs.functionalize(stage)
    before = copy.deepcopy((stage.state_dict(), buffers)), torch.get_rng_state()
    with pytest.raises(
        fs.TraceError, match=rf"at .*{re.escape(__file__)}:\d+: it reads the value"
    ) as refusal:
        fs.stage_vjp(in_parts(apply, fullgraph=True), params, buffers, input_of(stage))
    (line,) = re.findall(LINE, str(refusal.value))
    names = {found.name for found in ast.walk(SOURCE) if _holds(found, int(line))}
    assert names & {*READS, called.__name__}  # of the generated layers, some read values too
    torch.testing.assert_close(((stage.state_dict(), buffers), torch.get_rng_state()), before, rtol=0, atol=0)


LINE = rf"{re.escape(__file__)}:(\d+)"
SOURCE = ast.parse(Path(__file__).read_text())


def _holds(node: ast.AST, line: int) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0)


def test_generated_stages_have_parts_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The properties above would hold of nothing otherwise."""
    ran: list[bool] = []
    own = breaks._Part.run

    def noting(part: Any, *args: Any) -> Any:
        found = own(part, *args)
        ran.append(found is not None)
        return found

    monkeypatch.setattr(breaks._Part, "run", noting)

    @settings(max_examples=10, database=None, derandomize=True)
    @given(stage=stages())
    def draw(stage: Lines) -> None:
        assume(runs(stage))
        apply, params, buffers = fs.functionalize(stage)
        fs.stage_vjp(in_parts(apply), params, buffers, input_of(stage))

    draw()
    assert sum(ran) > 10
