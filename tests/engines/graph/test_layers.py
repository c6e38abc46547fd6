"""Layers that are alike: copies of what one of them has recorded are what tracing each would record."""

from __future__ import annotations

import copy
import importlib
import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from copied_layers import counted_copies
from seeing import Seeing
from torch import Tensor, nn
from torch.fx import map_arg
from torch.fx.node import map_aggregate
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage._torch import functorch as ft
from funcstage.engines.graph.alike import description
from funcstage.engines.graph.joint import CHECKPOINTED, Joint
from funcstage.engines.graph.layer_copies import unseen
from funcstage.engines.graph.layers import FEWEST_NODES

compiling = importlib.import_module("funcstage.engines.graph.compile")

SETTINGS = {"scale": 1.0}
LOG: list[int] = []
STAGE: dict[str, Any] = {}
SHARED = {"tensor": torch.ones(4)}


class Layer(nn.Module):
    """A layer, with whatever a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)
        self.register_buffer("offset", torch.full((4,), 0.5))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Any:
        h = self.down(F.gelu(self.up(self.norm(x)))) * self.scale
        return x + self.more(h) + self.offset

    def more(self, h: Tensor) -> Tensor:
        return h.tanh() if self.training else h


class Stack(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module] = Layer, n: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(n))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Holds(nn.Module):
    """Holds lists: which of them are one."""

    def __init__(self, which: str) -> None:
        super().__init__()
        lists = {name: [1.0] for name in which}
        self.first, self.second, self.third = (lists[name] for name in which)


@pytest.mark.parametrize(
    ("one", "other"), [*itertools.product(("abc", "aba", "abb", "aab", "aaa"), repeat=2)]
)
def test_layers_are_alike_where_they_hold_one_object_in_the_same_places(one: str, other: str) -> None:
    said = [description(Holds(which), (), [set()]).said for which in (one, other)]
    assert (said[0] == said[1]) is (one == other)


def nodes_of(joint: Joint) -> list[Any]:
    """All that is recorded, with what is known of each value, but for names."""
    numbers = {node: i for i, node in enumerate(joint.module.graph.nodes)}

    def looks(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [*map(looks, value)]
        if not isinstance(value, Tensor):
            return value
        memory = value.untyped_storage().nbytes()
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, memory

    def said(arguments: Any) -> str:
        return repr(map_aggregate(map_arg(arguments, lambda node: f"%{numbers[node]}"), str))

    return [
        (
            node.op,
            node.target if node.op == "call_function" else None,
            said((node.args, node.kwargs)),
            looks(node.meta["val"]) if "val" in node.meta else None,
            node.meta.get(CHECKPOINTED),
        )
        for node in numbers
    ]


def recorded(module: nn.Module, *args: Any, copied: bool, **options: Any) -> tuple[list[Any], int]:
    """What a trace records, and how many layers were copied in the run that was kept."""
    found, copies = run_of(module, *args, copied=copied, **options)
    return found, copies[-1]


def run_of(module: nn.Module, *args: Any, copied: bool, **options: Any) -> tuple[list[Any], list[int]]:
    """What a trace records, and how many layers were copied in each run that it took."""
    found: list[Joint] = []

    def noting(*args: Any, **kwargs: Any) -> Joint:
        found.append(trace(*args, **{**kwargs, "copied": copied}))
        return found[-1]

    trace = compiling.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "trace", noting)
        copies = counted_copies(patch)
        apply, params, buffers = fs.functionalize(module)
        fs.compile(apply, backend="aten", fullgraph=True).plan(params, buffers, *args, **options)
    return nodes_of(found[0]), copies


def compared(module: nn.Module, *args: Any, **options: Any) -> int:
    """How many layers are copied where all of the graph is as without copies."""
    alike, copies = recorded(module, *args, copied=True, **options)
    assert alike == recorded(module, *args, copied=False, **options)[0]
    return copies


X = torch.linspace(-1, 1, 12).view(3, 4)


class Returning(Stack):
    """Two results, of which one is not always used, a number, and arguments of all kinds."""

    class Kind(Layer):
        def forward(self, x: Tensor, *, by: dict[str, Any]) -> Any:  # type: ignore[override]
            y = super().forward(x * by["mask"]) * by["factor"]
            return {"y": y, "rest": (y.exp().sum(), None, 3)}

    def __init__(self) -> None:
        super().__init__(Returning.Kind)

    def forward(self, x: Tensor) -> Any:
        by = {"mask": torch.ones_like(x).tril(), "factor": 2.0}
        for i, layer in enumerate(self.layers):
            result = layer(x, by=by)
            x = result["y"] if i % 2 else result["y"] + result["rest"][0] * result["rest"][2]
        return x


class Regions(Stack):
    def forward(self, x: Tensor) -> Any:
        for i, layer in enumerate(self.layers):
            x = checkpoint(layer, x, use_reentrant=False) if i != 2 else layer(x)
        return x


class Drawing(Layer):
    def more(self, h: Tensor) -> Tensor:
        F.dropout(h, 0.25, self.training)  # draws, though nobody reads it
        return F.dropout(h, 0.5, self.training)


class ReadingIf(Layer):
    """It reads its number only where it has none of its arguments."""

    number: int

    def more(self, h: Tensor) -> Tensor:
        return h * self.number if h is None else h.tanh()


def numbered(kind: Callable[[], nn.Module], n: int = 5) -> nn.Module:
    """Layers that have numbers and names, as those of libraries do."""
    stack = Stack(kind, n)
    for i, layer in enumerate(stack.layers):
        layer.number, layer.up.name = i, f"up {i}"  # type: ignore[assignment, union-attr]
    return stack


class Gradients(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        (grad,) = torch.autograd.grad(y.sum(), self.up.bias, create_graph=True)
        return y + grad.sum()


class OnGPUs(Layer):
    """Attention as GPUs have it, which returns more than tensors."""

    def more(self, h: Tensor) -> Tensor:
        qkv = [h.view(1, 1, 3, 4)] * 3
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        result: Tensor = attend(*qkv, 0.5 if self.training else 0.0, True)[0]
        return result.view(3, 4)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


ALIKE: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "layers": (Stack, (X,)),
    "torch's": (lambda: nn.Sequential(*(attention() for _ in range(4))), (X[None],)),
    "many results and arguments": (Returning, (X,)),
    "regions": (Regions, (X,)),
    "draws": (lambda: Stack(Drawing), (X,)),
    "draws in regions": (lambda: Regions(Drawing), (X,)),
    "numbers": (lambda: numbered(ReadingIf), (X,)),
    "gradients taken inside": (lambda: Stack(Gradients), (X,)),
    "attention on GPUs": (lambda: Stack(OnGPUs), (X,)),
    "gradients that the stage makes": (lambda: Between(lambda x: x * 2), (X,)),
    "a result that is not always used": (
        lambda: OneOfTwo(OneOfTwo.Kind, [True, False, False, True, False]),
        (X,),
    ),
}


@pytest.mark.parametrize("argnums", [(0,), ()])
@pytest.mark.parametrize("name", ALIKE)
def test_copies_are_what_tracing_each_layer_records(name: str, argnums: tuple[int, ...]) -> None:
    make, args = ALIKE[name]
    assert compared(make(), *args, argnums=argnums) >= 2


READS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda layer: layer.number,
    "by its name": lambda layer: getattr(layer, "num" + "ber"),
    "whether it is there": lambda layer: hasattr(layer, "number"),
    "by operator": operator.attrgetter("number"),
    "of its namespace": lambda layer: layer.__dict__["number"],
    "with its namespace": lambda layer: {**vars(layer)}["number"],
    "of a copy": lambda layer: copy.copy(layer).number,
    "of a part": lambda layer: len(layer.up.name),
    "of its state": lambda layer: layer.__getstate__()["number"],
}


@pytest.mark.parametrize("way", READS)
def test_a_number_that_is_read_makes_layers_differ(way: str) -> None:
    class Reading(Layer):
        def more(self, h: Tensor) -> Tensor:
            return h * READS[way](self)

    stack = numbered(Reading)
    assert compared(stack, X) == 0
    assert [layer.number for layer in stack.layers] == [*range(5)]  # type: ignore[union-attr, attr-defined]


class OfTheClass(Layer):
    """Without its own number it would read the class's."""

    number = 9

    def more(self, h: Tensor) -> Tensor:
        return h * self.number


class Answering(Layer):
    def __getattr__(self, name: str) -> Any:
        return 9 if name == "number" else super().__getattr__(name)

    def more(self, h: Tensor) -> Tensor:
        return h * self.number


class WritingItsNumber(Layer):
    def more(self, h: Tensor) -> Tensor:
        self.number = 9
        return h * self.number


class WritingBeside(Layer):
    def more(self, h: Tensor) -> Tensor:
        self.seen = True
        return h.tanh()


class TakingAway(Layer):
    def more(self, h: Tensor) -> Tensor:
        return h * vars(self).pop("number")


@pytest.mark.filterwarnings("ignore:.*changes")
@pytest.mark.parametrize("kind", [OfTheClass, Answering, WritingItsNumber, WritingBeside, TakingAway])
def test_layers_with_numbers_that_answer_or_write_themselves_are_traced(kind: type[Layer]) -> None:
    assert compared(numbered(kind), X) == 0


def test_layers_with_the_number_that_was_read_are_copied() -> None:
    class Reading(Layer):
        number: int

        def more(self, h: Tensor) -> Tensor:
            return h * self.number

    stack = numbered(Reading, 7)
    for i, layer in enumerate(stack.layers):  # type: ignore[arg-type]
        layer.number = i % 2
    assert compared(stack, X) == 5


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_all_but_one_are_copied_where_there_are_three_or_more(n: int) -> None:
    assert compared(Stack(n=n), X) == (n - 1 if n >= 3 else 0)


class Counted(nn.Module):
    """As many operations as it is told."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.n = nn.Parameter(torch.ones(4)), n

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        for _ in range(self.n - 1):
            x = x.sin()
        return x


@pytest.mark.parametrize(("n", "copies"), [(FEWEST_NODES - 1, 0), (FEWEST_NODES, 4)])
def test_layers_are_copied_from_as_many_operations_on_as_are_worth_it(n: int, copies: int) -> None:
    assert compared(nn.Sequential(*(Counted(n) for _ in range(5))), X) == copies


@pytest.mark.parametrize(("repeated", "copies"), [(None, 4), (True, 4), (False, 0)])
def test_layers_are_copied_unless_each_is_to_be_traced(
    repeated: bool | None, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted_copies(monkeypatch)
    apply, params, buffers = fs.functionalize(Stack())
    fs.compile(apply, backend="aten", repeated=repeated).plan(params, buffers, X)
    assert counts == [copies]


def test_layers_around_which_the_stage_adds_their_inputs_are_copied() -> None:
    class Inner(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(self.norm(x))))

    class Residual(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    assert compared(Residual(Inner), X) == 4


@pytest.mark.parametrize("copied", [False, True])
def test_the_layers_of_a_stage_that_is_only_run_are_copied_too(copied: bool) -> None:
    apply, params, buffers = fs.functionalize(Stack())
    fast = fs.compile(apply, backend="aten")
    with torch.no_grad():
        assert torch.equal(fast(params, buffers, X)[0], apply(params, buffers, X)[0])


def _frozen(layer: Layer) -> None:
    layer.up.weight.requires_grad_(False)


def _in_double(layer: Layer) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    layer.register_forward_hook(lambda module, args, result: result.float())
    layer.double()


def _hooked(layer: Layer) -> None:
    layer.down.register_forward_hook(lambda module, args, result: result * 2)


def _another_function(layer: Layer) -> None:
    layer.more = lambda h: h * 3  # type: ignore[method-assign]


def _tied(layer: Layer) -> None:
    layer.norm.bias = layer.norm.weight


def _scaled(layer: Layer) -> None:
    layer.scale = 3.0


def _evaluated(layer: Layer) -> None:
    layer.eval()


def _without_bias(layer: Layer) -> None:
    layer.up.bias = None


def _wider(layer: Layer) -> None:
    layer.up, layer.down = nn.Linear(4, 7), nn.Linear(7, 4)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize(
    "change",
    [
        *(_frozen, _in_double, _hooked, _another_function, _tied, _scaled, _evaluated, _without_bias),
        _wider,
    ],
)
def test_a_layer_that_differs_is_traced(change: Callable[[Layer], None], place: int) -> None:
    stack = Stack()
    change(stack.layers[place])  # type: ignore[arg-type]
    assert compared(stack, X) == 3


class Written(Layer):
    def more(self, h: Tensor) -> Tensor:
        self.offset.mul_(2)
        return h


class Kept(Layer):
    def more(self, h: Tensor) -> Tensor:
        self.last = h
        return h


class Counting(Layer):
    def more(self, h: Tensor) -> Tensor:
        SETTINGS["scale"] += 1
        return h * SETTINGS["scale"]


class Logging(Layer):
    def more(self, h: Tensor) -> Tensor:
        LOG.append(len(LOG))
        return h * len(LOG)


class ReadingOutside(Layer):
    def more(self, h: Tensor) -> Tensor:
        return h * SHARED["tensor"]


class Hooking(Layer):
    def more(self, h: Tensor) -> Tensor:
        h.register_hook(lambda grad: grad * 2)
        return h * 1


class OfItsOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class Custom(Layer):
    def more(self, h: Tensor) -> Tensor:
        return OfItsOwn.apply(h)


class RegionInside(Layer):
    def more(self, h: Tensor) -> Tensor:
        result: Tensor = checkpoint(torch.tanh, h, use_reentrant=False)
        return result


class WritingArguments(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        result: Tensor = super().forward(x)
        return result


class View(Layer):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x.view(4, 3).view(3, 4)


class WithGradient(torch.autograd.Function):
    """Returns its argument, and in the backward what is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.gradient(ctx.saved_tensors[0]), None


class Between(Stack):
    """Between its layers the gradient is another one, which is that of their own parameter, too."""

    class Kind(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + self.own

    class Passing(Kind):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).detach() + self.own

    def __init__(self, gradient: Callable[[Tensor], Tensor], kind: type[Layer] = Kind) -> None:
        super().__init__(kind)
        self.gradient = gradient

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = WithGradient.apply(layer(x), self.gradient)
        return x


class TwiceInEach(Stack):
    """A layer reads what it is given twice, and the stage reads it, too."""

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x) + x * 2
        return x


class Penalised(Stack):
    """A gradient is a part of the result."""

    def __init__(self, create_graph: bool) -> None:
        super().__init__()
        self.create_graph = create_graph

    def forward(self, x: Tensor) -> Any:
        y, bias = super().forward(x), self.layers[0].up.bias
        (grad,) = torch.autograd.grad(y.sum(), bias, retain_graph=True, create_graph=self.create_graph)
        return y + grad.sum()


class OneOfTwo(Stack):
    """Of two results one is not used, by which alone a parameter has a gradient."""

    class Kind(Layer):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, (self.up.weight * 3).sin().sum() + self.more(x.detach())

    class Lone(Kind):
        def __init__(self) -> None:
            super().__init__()
            self.lone = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0], self.lone.sin() * 2

    def __init__(self, kind: type[Layer], used: Sequence[bool]) -> None:
        super().__init__(kind)
        self.used = used

    def forward(self, x: Tensor) -> Any:
        for layer, used in zip(self.layers, self.used, strict=True):
            x, more = layer(x)
            x = x + more if used else x
        return x


class OfTheStage(Layer):
    """It reads what another module of the stage holds."""

    def more(self, h: Tensor) -> Tensor:
        result: Tensor = h * STAGE["stage"].factor
        return result


class ReturningMore(Stack):
    """Layers that return something beside their result."""

    class Kind(Layer):
        more_of: Callable[[Tensor, Tensor], Any]

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, self.more_of(x, y)

    def __init__(self, more_of: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__(ReturningMore.Kind)
        for layer in self.layers:
            layer.more_of = more_of  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x, more = layer(x)
            x = x + more if isinstance(more, Tensor) else x
        return x


class GivenALeaf(Stack):
    """Layers are given a leaf that the stage has made, to take a gradient inside."""

    class Kind(Layer):
        def forward(self, x: Tensor, leaf: Tensor) -> Tensor:  # type: ignore[override]
            result: Tensor = super().forward(x * leaf)
            return result

    def __init__(self) -> None:
        super().__init__(GivenALeaf.Kind)

    def forward(self, x: Tensor) -> Any:
        leaf = torch.ones(4).requires_grad_()
        for layer in self.layers:
            x = layer(x, leaf)
        return x


ALIKE_AND_NOT_COPIED: dict[str, Callable[[], nn.Module]] = {
    "they return an object": lambda: ReturningMore(lambda x, y: object()),
    "they return memory twice": lambda: ReturningMore(lambda x, y: y[0]),
    "they return a tensor twice": lambda: ReturningMore(lambda x, y: y),
    "they return what they are given": lambda: ReturningMore(lambda x, y: x),
    "they return a view of it": lambda: ReturningMore(lambda x, y: x[:1]),
    "they are given a leaf": GivenALeaf,
    "a gradient is none of the trace": lambda: Between(lambda x: GRADIENT),
    "a gradient is none of the trace and passed on": lambda: Between(lambda x: GRADIENT, Between.Passing),
    "a gradient is a value of the layer's": lambda: Between(lambda x: x),
    "a gradient has two parts that the stage adds to": TwiceInEach,
    "the stage takes gradients": lambda: Penalised(create_graph=True),
    "a parameter has no gradient": lambda: OneOfTwo(OneOfTwo.Lone, [False] * 5),
    "a parameter has one at times": lambda: OneOfTwo(OneOfTwo.Lone, [True, False, False, True, False]),
}
GRADIENT = torch.linspace(1, 2, 12).view(3, 4)


@pytest.mark.parametrize("why", ALIKE_AND_NOT_COPIED)
def test_layers_whose_results_are_not_all_their_own_are_traced(why: str) -> None:
    assert compared(ALIKE_AND_NOT_COPIED[why](), X) == 0


class Conjugating(Layer):
    def more(self, h: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(h.view(3, 2, 2)).conj() * 1j).view(3, 4)


NOT_COPIED = (
    *(Written, Kept, ReadingOutside, Hooking, Custom, WritingArguments, Conjugating),
    *(RegionInside, Counting, Logging, View),
)


class Handing(Stack):
    """Layers are given a dict in which they leave something for the next one."""

    class Kind(Layer):
        leave: Callable[[dict[str, Any]], None]

        def forward(self, x: Tensor, by: dict[str, Any]) -> Tensor:  # type: ignore[override]
            before = by["last"]
            self.leave(by)
            result: Tensor = super().forward(x)
            return result + before

    def __init__(self, leave: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(Handing.Kind)
        for layer in self.layers:
            layer.leave = leave  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        by: dict[str, Any] = {"last": x.detach() * 1, "list": [1, 2], "n": 0}
        lists = []
        for layer in self.layers:
            x = layer(x, by)
            lists.append(by["list"])
        return x + by["last"] * len({*map(id, lists)}) * by["n"] * getattr(by["last"], "note", 1)


def _a_tensor(by: dict[str, Any]) -> None:
    by["last"] = by["last"] * 2


def _a_list(by: dict[str, Any]) -> None:
    by["list"] = [*by["list"]]


def _a_number(by: dict[str, Any]) -> None:
    by["n"] += 1


def _the_same_number(by: dict[str, Any]) -> None:
    by["n"] = 7


def _a_note(by: dict[str, Any]) -> None:
    by["last"].note = 3


def _another_note(by: dict[str, Any]) -> None:
    by["last"].note = 2 - getattr(by["last"], "note", 0)


@pytest.mark.parametrize(
    ("leave", "copies"),
    [(_a_tensor, 0), (_a_list, 0), (_a_number, 0), (_the_same_number, 3), (_a_note, 3), (_another_note, 0)],
)
def test_layers_that_change_what_they_are_given_are_traced(
    leave: Callable[[dict[str, Any]], None], copies: int
) -> None:
    assert compared(Handing(leave), X) == copies


@pytest.mark.filterwarnings("ignore:.*changes")
@pytest.mark.parametrize("kind", NOT_COPIED)
def test_a_layer_that_does_more_than_compute_is_traced(kind: type[Layer]) -> None:
    for copied in (True, False):
        SETTINGS["scale"] = 1.0
        LOG.clear()
        found, copies = recorded(Stack(kind), X, copied=copied)
        assert copies == 0
        if copied:
            first = found
    assert first == found


class FromTheBeginning(Stack):
    """Each layer adds the same, so that what the next one is given is computed from it."""

    class Kind(Layer):
        def forward(self, x: Tensor, beginning: Tensor) -> Tensor:  # type: ignore[override]
            result: Tensor = super().forward(x)
            return result + beginning

    def __init__(self) -> None:
        super().__init__(FromTheBeginning.Kind)

    def forward(self, x: Tensor) -> Any:
        beginning = x * 2
        for layer in self.layers:
            x = layer(x, beginning)
        return x


def test_layers_given_what_is_computed_from_something_else_they_are_given_are_traced() -> None:
    """A gradient would count what comes by another one, too."""
    assert compared(FromTheBeginning(), X) == 0


class MadeByTheStage(Stack):
    """Layers read what the stage has made in this very call."""

    class Kind(Layer):
        def more(self, h: Tensor) -> Tensor:
            return h * SHARED["made"]

    def __init__(self) -> None:
        super().__init__(MadeByTheStage.Kind)

    def forward(self, x: Tensor) -> Any:
        SHARED["made"] = x.detach().exp()  # with a gradient it would be seen on the tape
        result = super().forward(x)
        del SHARED["made"]
        return result


def test_layers_that_read_what_they_were_not_given_are_traced_at_once() -> None:
    """A copy would not know what to read, and the stage would be traced once more."""
    assert run_of(MadeByTheStage(), X, copied=True)[1] == [0]


def test_a_hook_that_layers_share_runs_with_each(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Layer()
    layer.register_forward_hook(lambda module, args, result: print("a layer"))  # which nothing watches
    compared(nn.Sequential(*(copy.deepcopy(layer) for _ in range(4))), X)
    assert capsys.readouterr().out.count("a layer") == 2 * 4


class Around(Stack):
    """What happens between the layers, by name."""

    def __init__(self, what: str) -> None:
        super().__init__(OfTheStage if what == "the stage" else AsSet)
        self.what = what
        self.factor = 1.0

    def forward(self, x: Tensor) -> Any:
        results = []
        for i, layer in enumerate(self.layers):
            if self.what == "a global":
                SETTINGS["scale"] = i + 1.0
            if self.what == "the stage":
                self.factor = i + 1.0
            if self.what == "an attribute":
                layer.scale = i + 1.0
            if self.what == "autocast":
                with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
                    x = layer(x).float()
            elif self.what == "no gradients":
                with torch.set_grad_enabled(i != 2):
                    x = layer(x)
            else:
                x = layer(x)
            if self.what == "a write":
                x.add_(1)
            if self.what == "results":
                results.append(x)
            if self.what == "gradients":
                (grad,) = torch.autograd.grad(x.sum(), self.layers[i].up.weight, create_graph=True)
                results.append(grad.sum())
        SETTINGS["scale"] = 1.0
        return (x, results)


class AsSet(Layer):
    def more(self, h: Tensor) -> Tensor:
        return h * SETTINGS["scale"]


@pytest.mark.filterwarnings("ignore:.*changes")
@pytest.mark.parametrize(
    "what",
    ["a global", "the stage", "an attribute", "autocast", "no gradients", "a write", "results", "gradients"],
)
def test_what_happens_between_layers_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Around(what)
    monkeypatch.setitem(STAGE, "stage", stage)
    compared(stage, X)


@pytest.mark.parametrize("place", range(5))
def test_a_write_into_what_a_layer_needs_for_its_backward_is_refused(place: int) -> None:
    class Tanh(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(self.norm(x)))).tanh()

    class Writing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i == place:
                    x.add_(1.0)
            return x

    apply, params, buffers = fs.functionalize(Writing(Tanh))
    with pytest.raises(fs.TraceError, match="overwrites in place what it has read before"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, X)


@pytest.mark.parametrize("place", range(5))
def test_each_copy_is_watched_like_the_layer_that_was_traced(place: int) -> None:
    stack = Stack()
    apply, params, buffers = fs.functionalize(stack)
    fast = fs.compile(apply, backend="aten")

    def run(function: Any) -> Any:
        output, _, pullback = fs.stage_vjp(function, params, buffers, X)
        (grad,), weight_pullback = pullback(torch.ones_like(output))
        return output, grad, weight_pullback()

    for _ in range(2):
        torch.testing.assert_close(run(fast), run(apply), rtol=1e-5, atol=1e-6)
        stack.layers[place].scale = 7.0


def test_an_error_in_a_copy_is_that_of_the_layer_itself() -> None:
    class Failing(Stack):
        def forward(self, x: Tensor) -> Any:
            x = super().forward(x)
            raise ValueError("of the stage")

    apply, params, buffers = fs.functionalize(Failing())
    with pytest.raises(ValueError, match="of the stage"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, X)


def test_an_interrupt_that_broke_off_a_mode_is_raised_and_the_stage_not_traced_once_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Interrupted(Stack):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            print("a run")
            try:
                raise KeyboardInterrupt
            finally:
                ft.pop_layer()  # which was not entered

    apply, params, buffers = fs.functionalize(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, X)
    assert capsys.readouterr().out.count("a run") == 1


def test_what_is_unseen_does_not_reach_the_modes_of_the_stage() -> None:
    with Seeing() as mode:
        with unseen():
            X.sin()
        X.cos()
    assert mode.seen == [Tensor.cos]


@pytest.mark.parametrize("stack", [Stack, lambda: Penalised(create_graph=False)], ids=["", "with a gradient"])
def test_a_profiler_sees_no_copying_and_is_there_again_after_it(stack: Callable[[], nn.Module]) -> None:
    seen: set[str] = set()

    def profile(frame: Any, event: str, argument: Any) -> None:
        seen.add(f"{frame.f_code.co_filename.rpartition('/')[2]} {frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        assert recorded(stack(), X, copied=True)[1] == 4
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert "layer_copies.py backward" in seen  # that of the copies' node, within which nobody watches
    assert seen.isdisjoint({"layer_copies.py _recorded", "layer_copies.py copied"})
