"""Hypothesis strategies for stages: generated modules, not only generated shapes.

    @given(strategies.stages())
    def test_my_engine_equals_eager(stage):
        stage.check(engines=my_engine)

A strategy draws a description (`funcstage.testing.stages.Stage`), from which a module is built; a failing
example is printed as that description and shrinks to few and simple layers. Every drawn stage runs in
eager torch: a layer is only drawn where it fits, so that nothing has to be rejected.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from funcstage import trees
from funcstage.schedules.orders import SCHEDULES, Order, ScheduleError, pipeline_order
from funcstage.testing.layers import LAYERS, Place
from funcstage.testing.stages import (
    _INPUTS,
    _OUTPUTS,
    Arguments,
    Block,
    Named,
    Node,
    Pair,
    Stage,
    Use,
    after,
    inner_place,
)
from funcstage.trees import PyTree

try:
    import hypothesis
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "funcstage.testing.strategies needs Hypothesis, not installed here: pip install 'funcstage[test]'.",
        name="hypothesis",
    ) from error

__all__ = ["BLOCKS", "FAMILIES", "built", "devices", "dtypes", "modules", "pytrees", "schedules", "stages"]

FAMILIES: dict[str, tuple[int, ...]] = {
    "dense": (1, 2, 3),
    "weights": (2, 3),
    "in-place": (1, 2, 3, 4),
    "sequence": (3,),
    "attention": (3,),
    "recurrent": (2, 3),
    "image": (3, 4),
    "state": (2, 3, 4),
}
"""Families of stages, by what is frequent in them, with the numbers of axes that they start from."""

_BATCHES = (2, 1, 3, 0)
_SIZES = (3, 1, 2, 4)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
_CASTS = (torch.float64, torch.float32, torch.bfloat16, torch.complex64)
BLOCKS = ("residual", "branch", "repeat", "tied", "cast", "autocast", "frozen", "eval")
"""The kinds of `funcstage.testing.stages.Block`."""


def devices() -> st.SearchStrategy[str]:
    """Draw a device that is present, the CPU first."""
    present = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            present.append(accelerator.type)
    return st.sampled_from(present)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Draw a floating or complex dtype, float32 in most cases."""
    return st.sampled_from((torch.float32, *_DTYPES))


def pytrees(leaves: st.SearchStrategy[Any], max_leaves: int = 4) -> st.SearchStrategy[PyTree]:
    """Draw a pytree: a leaf, or leaves in tuples, lists, dicts, namedtuples and registered dataclasses.

    Args:
        leaves: what stands at the leaves; `None` counts as one.
        max_leaves: how many there are at most.
    """
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(tuple),
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(("a", "b", "c")), inner, max_size=3),
            st.builds(Named, inner, inner),
            st.builds(Pair, inner, inner),
        ),
        max_leaves=max_leaves,
    )


@st.composite
def stages(
    draw: st.DrawFn,
    family: str | None = None,
    dtype: st.SearchStrategy[torch.dtype] | None = None,
    device: st.SearchStrategy[str] | None = None,
    max_layers: int = 4,
    blocks: Sequence[str] = BLOCKS,
) -> Stage:
    """Draw a stage: a composition of layers with arguments of any structure.

    Args:
        draw: passed by Hypothesis.
        family: one of `FAMILIES`; any if left out.
        dtype: of activations and parameters.
        device: of everything.
        max_layers: length of the outermost sequence of layers.
        blocks: which structure there may be (`BLOCKS`).
    """
    kind = draw(_choice(tuple(FAMILIES))) if family is None else family
    ndim = draw(_choice(FAMILIES[kind]))
    shape = tuple(draw(_choice(_BATCHES if ndim > 1 and not axis else _SIZES)) for axis in range(ndim))
    tokens = ""
    if ndim > 1 and kind in ("dense", "sequence", "attention", "state") and draw(_rarely()):
        tokens = draw(_choice(("embedding", "sum", "mean", "max")))
    chosen = draw(dtypes() if dtype is None else dtype)
    if tokens and chosen is not torch.float64:
        chosen = torch.float32
    layout = "contiguous" if tokens else draw(_choice(("contiguous", "transposed", "expanded", "strided")))
    inputs = tuple(draw(_inputs(bool(tokens))) for _ in range(draw(_choice((0, 0, 1, 2)))))
    stage = Stage(
        (),
        shape,
        chosen,
        draw(devices() if device is None else device),
        tokens,
        layout,
        inputs,
        {name: draw(_inputs(bool(tokens))) for name in draw(_choice(((), (), ("scale",), ("a", "b"))))},
        training=draw(_choice((True, True, False))),
        seed=draw(st.integers(0, 2**16)),
    )
    body = _body(draw, stage.start, _Grammar(kind, tuple(blocks)), draw(st.integers(1, max_layers)), 2)
    return _with(
        stage,
        body=body,
        output=draw(_output()),
        argnums=draw(_choice(_argnums(stage))),
    )


def built(**options: Any) -> st.SearchStrategy[Arguments]:
    """Draw a module with arguments for it; options as for `stages`."""
    return stages(**options).map(Stage.build)


def modules(blocks: Sequence[str] = BLOCKS, **options: Any) -> st.SearchStrategy[nn.Module]:
    """Draw a module whose only argument is a tensor of shape [2, 3].

    Args:
        blocks: which structure there may be (`BLOCKS`).
        **options: fields of `funcstage.testing.stages.Stage`: another `shape`, `dtype`, `device`.
    """

    @st.composite
    def draw_module(draw: st.DrawFn) -> nn.Module:
        stage = Stage((), **options)
        grammar = _Grammar(draw(_choice(tuple(FAMILIES))), tuple(blocks))
        body = _body(draw, stage.start, grammar, draw(st.integers(1, 4)), 2)
        return _with(stage, body=body, seed=draw(st.integers(0, 2**16))).build().module

    return draw_module()


@st.composite
def schedules(draw: st.DrawFn, max_ranks: int = 4, max_microbatches: int = 8) -> Order:
    """Draw a schedule of torch's that can be run, as the order of every rank.

    Args:
        draw: passed by Hypothesis.
        max_ranks: over how many ranks it is spread at most.
        max_microbatches: how many microbatches a step has at most.
    """
    name = draw(st.sampled_from(SCHEDULES))
    ranks = draw(st.integers(1, max_ranks))
    stages = ranks * draw(st.sampled_from((1, 2, 3)))
    microbatches = draw(st.integers(1, max_microbatches))
    try:
        return pipeline_order(name, stages, microbatches, num_ranks=ranks)
    except ScheduleError:
        hypothesis.reject()


def _with(stage: Stage, **changes: Any) -> Stage:
    values = {name: getattr(stage, name) for name in Stage.__dataclass_fields__}
    return Stage(**(values | changes))


class _Grammar(NamedTuple):
    """What bodies are drawn from: the frequent layers and the structure."""

    family: str
    blocks: tuple[str, ...]


def _body(draw: st.DrawFn, place: Place, grammar: _Grammar, length: int, depth: int) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for _ in range(length):
        node = _node(draw, place, grammar, depth)
        nodes.append(node)
        place = after([node], place)
    return tuple(nodes)


def _node(draw: st.DrawFn, place: Place, grammar: _Grammar, depth: int) -> Node:
    if depth and grammar.blocks and draw(_rarely()):
        kind = draw(_choice(grammar.blocks))
        block = _block(draw, kind, place, grammar, depth - 1)
        if block is not None:
            return block
    name = draw(_choice(_fitting(place, grammar.family)))
    layer = LAYERS[name]
    return Use(name, tuple((option, draw(_choice(layer.options[option]))) for option in layer.options))


def _block(draw: st.DrawFn, kind: str, place: Place, grammar: _Grammar, depth: int) -> Block | None:
    option: Any = None
    if kind == "tied":
        return Block(kind, (), draw(_choice((False, True)))) if place.shape else None
    if kind == "cast":
        if place.autocast:
            return None
        option = draw(_choice(_CASTS if not place.dtype.is_complex else _CASTS[3:]))
    if kind == "autocast" and place.dtype is not torch.float32:
        return None
    inner = inner_place(Block(kind, (), option), place)
    count = 2 if kind == "branch" else 1
    bodies = tuple(_body(draw, inner, grammar, draw(st.integers(1, 2)), depth) for _ in range(count))
    return Block(kind, bodies, option)


def _fitting(place: Place, family: str) -> tuple[str, ...]:
    fitting = [name for name, layer in LAYERS.items() if layer.fits_at(place)]
    frequent = [name for name in fitting if family in LAYERS[name].tags.split()]
    return tuple(frequent * 3 + fitting)


@functools.cache
def _inputs(tokens: bool) -> st.SearchStrategy[PyTree]:
    return pytrees(_choice(tuple(code for code in _INPUTS if not (tokens and code == "again"))), max_leaves=3)


@functools.cache
def _output() -> st.SearchStrategy[PyTree]:
    hidden, anything = st.just("hidden"), pytrees(_choice(tuple(_OUTPUTS)))
    return st.one_of(
        hidden, hidden, st.tuples(hidden, anything), st.builds(Pair, hidden, anything, st.just(""))
    )


def _argnums(stage: Stage) -> tuple[int | tuple[int, ...] | None, ...]:
    differentiable = {"added", "gate", "unused", "again"}
    positions = [] if stage.tokens else [0]
    for i, tree in enumerate(stage.inputs):
        if differentiable & {code for code in trees.flatten(tree)[0] if code}:
            positions.append(i + 1)
    choices: list[int | tuple[int, ...] | None] = [None, None, None, ()]
    if positions:
        choices += [
            positions[0],
            tuple(positions[-1:]),
            tuple(positions),
            positions[-1] - 1 - len(stage.inputs),
        ]
    return tuple(choices)


@functools.cache
def _choice(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@functools.cache
def _rarely() -> st.SearchStrategy[bool]:
    return st.sampled_from((False, False, False, True))
