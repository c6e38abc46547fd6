"""Generated stages: a small description from which a module and its arguments are built, always the same.

A `Stage` is what a failing property prints: frozen, readable, and a valid expression after
``from funcstage.testing.stages import *`` and ``import torch``. Its body is a sequence of layers (`Use`)
and of structure around them (`Block`: residuals, branches, repetition, ties, casts, autocast, freezing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from funcstage import trees
from funcstage.testing.check import StageReport, check_stage
from funcstage.testing.layers import LAYERS, Place
from funcstage.testing.seeding import seeded
from funcstage.trees import PyTree

__all__ = ["Arguments", "Block", "Named", "Node", "Pair", "Stage", "Use", "after", "use"]


class Named(NamedTuple):
    """A namedtuple among the pytrees."""

    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class Pair:
    """A registered dataclass among the pytrees; its note is no leaf."""

    left: Any
    right: Any
    note: str = ""


def _flatten_pair(pair: Any) -> Any:
    return (pair.left, pair.right), pair.note, ("left", "right")


def _unflatten_pair(note: Any, children: Any) -> Any:
    left, right = children
    return Pair(left, right, note)


_PAIR: Any = Pair
optree.register_pytree_node(_PAIR, _flatten_pair, _unflatten_pair, namespace=trees.NAMESPACE)


@dataclass(frozen=True, slots=True, repr=False)
class Use:
    """A layer of the vocabulary with its options."""

    layer: str
    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"use({', '.join([repr(self.layer), *(f'{k}={v!r}' for k, v in self.options)])})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # how Hypothesis shows a failing example


def use(layer: str, **options: Any) -> Use:
    """Describe a layer."""
    return Use(layer, tuple(options.items()))


@dataclass(frozen=True, slots=True)
class Block:
    """Structure around layers.

    Attributes:
        kind: ``residual`` (x + body(x)), ``branch`` (one body beside another), ``repeat`` (the same
            layers twice), ``tied`` (the weight of an earlier product, transposed if the option says so),
            ``cast`` (the body computes in the dtype of the option), ``autocast``, ``frozen`` (no
            parameter is trained), ``eval`` (the body stays in eval mode).
        bodies: the inner sequences.
        option: of the kind.
    """

    kind: str
    bodies: tuple[tuple[Node, ...], ...] = ()
    option: Any = None


Node: TypeAlias = Use | Block


class Arguments(NamedTuple):
    """A built stage."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """A generated stage with its arguments.

    Attributes:
        body: what it computes.
        shape: of the first argument; of its embedding where that is tokens.
        dtype: of activations and parameters.
        device: of everything.
        tokens: ``""``, or how integer tokens become activations: ``embedding`` or a bag's mode.
        layout: of the first argument in memory.
        inputs: further positional arguments, pytrees of codes (`_INPUTS`).
        keywords: keyword arguments, likewise.
        output: a pytree of codes (`_OUTPUTS`).
        argnums: which positional arguments are differentiated.
        training: the module's mode.
        seed: of parameters, arguments, and dropout.
    """

    body: tuple[Node, ...]
    shape: tuple[int, ...] = (2, 3)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tokens: str = ""
    layout: str = "contiguous"
    inputs: tuple[PyTree, ...] = ()
    keywords: dict[str, PyTree] = field(default_factory=dict)
    output: PyTree = "hidden"
    argnums: int | tuple[int, ...] | None = None
    training: bool = True
    seed: int = 0

    @property
    def start(self) -> Place:
        """Where the body begins."""
        used = trees.flatten((self.inputs, self.keywords))[0]
        made = bool(self.tokens) or any(code in ("added", "gate", "number", "ids", "mask") for code in used)
        return Place(
            self.shape,
            self.dtype,
            self.device,
            self.training,
            fresh=made or self.layout == "contiguous",
            argument=not made,
        )

    @property
    def reads_values(self) -> bool:
        """Whether its operations depend on values of tensors, which a trace cannot express."""
        return "branching" in str(self)

    def build(self) -> Arguments:
        """Make the module, its positional and its keyword arguments."""
        device = torch.device(self.device)
        with seeded(self.seed, [] if device.type == "cpu" else [device]):
            module = _Generated(self)
            module.train(self.training)
            for inner in module.modules():
                if isinstance(inner, _Structure):
                    inner.settle()
            _randomize(module)
            first = self._first()
            fill = {name: make for name, (make, _) in _INPUTS.items()}
            args, kwargs = trees.map_leaves(
                lambda code: fill[code](self, first), (self.inputs, self.keywords)
            )
        return Arguments(module, (first, *args), kwargs)

    def check(self, **options: Any) -> StageReport:
        """Run `check_stage` on it."""
        module, args, kwargs = self.build()
        return check_stage(module, *args, **kwargs, **{"argnums": self.argnums, "seed": self.seed, **options})

    def _first(self) -> Tensor:
        if self.tokens:
            bag = () if self.tokens == "embedding" else (2,)
            return torch.randint(0, _VOCABULARY, (*self.shape[:-1], *bag)).to(self.device)
        shape = self.shape
        if self.layout == "transposed" and len(shape) > 1:
            x = self._random((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
        elif self.layout == "expanded":
            x = self._random((1, *shape[1:])).expand(shape)
        elif self.layout == "strided":
            x = self._random((*shape[:-1], 2 * shape[-1]))[..., ::2]
        else:
            x = self._random(shape)
        return x

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, dtype=torch.complex64 if self.dtype.is_complex else torch.float32).to(
            self.device, self.dtype
        )


def after(nodes: Sequence[Node], place: Place) -> Place:
    """Return the place behind a sequence of nodes."""
    for node in nodes:
        if isinstance(node, Use):
            place = LAYERS[node.layer].after(place, dict(node.options))
        else:
            place = place.at(shape=_inside(node, place)[0].shape, fresh=node.kind != "tied", argument=False)
    return place


class _Structure(nn.Module):
    """A `Block` as a module."""

    def __init__(self, block: Block, place: Place, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.block = block
        self.dtype = place.dtype
        self.device = place.device
        inner = inner_place(block, place)
        self.bodies = nn.ModuleList(_sequence(body, inner, weights) for body in block.bodies)
        self.repeats = block.kind == "repeat" and after(block.bodies[0], inner).shape == place.shape
        if block.kind == "tied":
            self.weight = _square(place, weights)

    def settle(self) -> None:
        """Apply what holds after the whole module was built."""
        if self.block.kind == "frozen":
            self.requires_grad_(False)
        elif self.block.kind == "eval":
            self.eval()

    def forward(self, x: Tensor) -> Tensor:
        kind, option = self.block.kind, self.block.option
        if kind == "tied":
            return F.linear(x, self.weight.t() if option else self.weight)
        if kind == "cast":
            y = self.bodies[0](x.to(option)) * 1
            return y.to(self.dtype) if self.dtype.is_complex or not y.is_complex() else y.real.to(self.dtype)
        if kind == "autocast":
            with torch.autocast(self.device.partition(":")[0], dtype=torch.bfloat16):
                return (self.bodies[0](x) * 1).to(self.dtype)
        if kind == "repeat":
            return self.bodies[0](self.bodies[0](x) if self.repeats else x) * 1
        if kind == "residual":
            return _added(self.bodies[0](x), x)
        if kind == "branch":
            return _added(*(body(x) for body in self.bodies))
        return self.bodies[0](x) * 1


def inner_place(block: Block, place: Place) -> Place:
    """Return the place where a block's bodies begin."""
    changes: dict[str, Any] = {"fresh": False, "argument": False}
    if block.kind == "cast":
        changes["dtype"] = block.option
    elif block.kind == "autocast":
        changes["autocast"] = True
    elif block.kind == "eval":
        changes["training"] = False
    return place.at(**changes)


def _inside(block: Block, place: Place) -> list[Place]:
    inner = inner_place(block, place)
    return [after(body, inner) for body in block.bodies] or [place]


def _added(y: Tensor, x: Tensor) -> Tensor:
    return y + x if y.shape == x.shape else y + x.sum().to(y.dtype)


def _sequence(nodes: Sequence[Node], place: Place, weights: list[nn.Parameter]) -> nn.Sequential:
    made: list[nn.Module] = []
    for node in nodes:
        if isinstance(node, Block):
            module: nn.Module = _Structure(node, place, weights)
        else:
            module = LAYERS[node.layer].build(place, **dict(node.options))
            weights += [p for p in module.parameters(recurse=False) if p.dim() == 2]
        made.append(module)
        place = after([node], place)
    return nn.Sequential(*made)


def _square(place: Place, weights: list[nn.Parameter]) -> nn.Parameter:
    """The latest earlier weight that maps these features to as many, or a new one."""
    n = place.shape[-1]
    for weight in reversed(weights):
        if weight.shape == (n, n) and weight.dtype == place.dtype:
            return weight
    weights.append(nn.Parameter(torch.ones(n, n, **place.made)))
    return weights[-1]


def _randomize(module: nn.Module) -> None:
    """Give every parameter and statistic a value of its own, so that no gradient is right by chance."""
    with torch.no_grad():
        for parameter in module.parameters():
            wide = torch.complex64 if parameter.is_complex() else torch.float32
            parameter.copy_(torch.randn(parameter.shape, dtype=wide) * 0.7)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape))


class _Generated(nn.Module):
    """The module of a `Stage`."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.codes = (stage.inputs, stage.keywords)
        self.output = stage.output
        self.stem: nn.Module | None = None
        made: dict[str, Any] = {"dtype": stage.dtype, "device": stage.device}
        if stage.tokens == "embedding":
            self.stem = nn.Embedding(_VOCABULARY, stage.shape[-1], padding_idx=0, **made)
        elif stage.tokens:
            self.stem = nn.EmbeddingBag(_VOCABULARY, stage.shape[-1], mode=stage.tokens, **made)
        self.body = _sequence(stage.body, stage.start, [])

    def forward(self, first: Tensor, *args: Any, **kwargs: Any) -> PyTree:
        x = first
        if isinstance(self.stem, nn.EmbeddingBag):
            x = self.stem(first.flatten(0, -2)).unflatten(0, first.shape[:-1])
        elif self.stem is not None:
            x = self.stem(first)
        # A code in a keyword and the value that was passed for it.
        codes = trees.flatten(self.codes[0])[0] + trees.flatten(self.codes[1])[0]
        values = trees.flatten(args)[0] + [
            v for k in sorted(self.codes[1]) for v in trees.flatten(kwargs[k])[0]
        ]
        for code, value in zip(codes, values, strict=True):
            x = _INPUTS[code][1](x, value)
        hidden = self.body(x)
        return trees.map_leaves(lambda code: _OUTPUTS[code](self, first, hidden), self.output)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project onto the vocabulary by the weight of the embedding, if there is one that fits."""
        weight = getattr(self.stem, "weight", None)
        if weight is None or weight.dtype != hidden.dtype or hidden.shape[-1] != weight.shape[-1]:
            return hidden * 3
        return hidden @ weight.t()


def _of_shape(stage: Stage, first: Tensor) -> Tensor:
    return stage._random(stage.shape)


_VOCABULARY = 5

_INPUTS: dict[str | None, tuple[Callable[[Stage, Tensor], Any], Callable[[Tensor, Any], Tensor]]] = {
    "added": (_of_shape, lambda x, v: x + v),
    "gate": (lambda stage, first: stage._random(stage.shape[-1:]), lambda x, v: x * v),
    "number": (lambda stage, first: 1.5, lambda x, v: x * v),
    "unused": (lambda stage, first: stage._random((2,)), lambda x, v: x),
    "ids": (
        lambda stage, first: torch.arange(stage.shape[-1], device=stage.device),
        lambda x, v: x * v,
    ),
    "mask": (
        lambda stage, first: (torch.arange(stage.shape[-1], device=stage.device) % 2).bool(),
        lambda x, v: x.masked_fill(v, 0.5),
    ),
    "flag": (lambda stage, first: True, lambda x, v: x * 2 if v else x),
    "name": (lambda stage, first: "mean", lambda x, v: x),
    "again": (lambda stage, first: first, lambda x, v: x + v if v.shape == x.shape else x),
    None: (lambda stage, first: None, lambda x, v: x),
}
"""What an argument's leaf may be: how it is made, and what the stage does with it."""

_OUTPUTS: dict[str | None, Callable[[_Generated, Tensor, Tensor], Any]] = {
    "hidden": lambda module, first, hidden: hidden,
    "input": lambda module, first, hidden: first,
    "view": lambda module, first, hidden: hidden[..., :1],
    "view of input": lambda module, first, hidden: first[:1],
    "sum": lambda module, first, hidden: hidden.sum(),
    "positive": lambda module, first, hidden: (hidden.real if hidden.is_complex() else hidden) > 0,
    "size": lambda module, first, hidden: hidden.numel(),
    "detached": lambda module, first, hidden: hidden.detach(),
    "parameter": lambda module, first, hidden: next(module.parameters(), hidden),
    "constant": lambda module, first, hidden: torch.ones(2, device=hidden.device),
    "other": lambda module, first, hidden: hidden * 2 + 1,
    "logits": lambda module, first, hidden: module.logits(hidden),
    "text": lambda module, first, hidden: "done",
    None: lambda module, first, hidden: None,
}
"""What an output's leaf may be."""
