"""Arguments and outputs of any type: what users and libraries write passes through, with its gradients."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import threading
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import funcstage as fs

ENGINES = pytest.mark.parametrize("engine", ["closures", "aten", "inductor"])


@dataclasses.dataclass
class Plain:
    hidden: Tensor
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    extra: Any = None
    scale: float = 2.0
    name: str = "frozen"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    hidden: Tensor
    extra: Any = None


@dataclasses.dataclass
class Checked:
    """Refuses what gradients may be."""

    hidden: Tensor
    extra: Any = None
    width: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.hidden is None:
            raise ValueError("hidden is needed")
        self.width = self.hidden.shape[-1]


@dataclasses.dataclass
class Derived(Plain):
    more: Any = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class Nested:
    hidden: Tensor
    extra: Any = None
    inner: Plain | None = None


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As the one of transformers."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclasses.dataclass
class Encoded(ModelOutput):
    hidden: Tensor | None = None
    extra: Any = None
    attentions: Any = None


class Dict(dict):  # type: ignore[type-arg]
    pass


class Attributes(dict):  # type: ignore[type-arg]
    """Its entries are its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Mirrored(OrderedDict):  # type: ignore[type-arg]
    """Has its entries as attributes as well, and other entries than those of the same name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.__dict__.update(kwargs, tag="of the dict")
        self["tag"] = "of an entry"


class Ordered(OrderedDict):  # type: ignore[type-arg]
    pass


class Window(deque):  # type: ignore[type-arg]
    pass


class Default(defaultdict):  # type: ignore[type-arg]
    pass


class Items(list):  # type: ignore[type-arg]
    pass


class Pair(tuple):
    __slots__ = ()


class Named(NamedTuple):
    hidden: Tensor
    extra: Any = None


class Doubled(Named):
    """Makes something else of what it is given, so that it must not be made twice."""

    def __new__(cls, hidden: Tensor, extra: Any = None) -> Doubled:
        return super().__new__(cls, hidden * 2, extra)


class Picky(Named):
    """Takes other arguments than its fields, and has an attribute."""

    def __new__(cls, pair: tuple[Tensor, Any]) -> Picky:
        new = super().__new__(cls, *pair)
        new.width = new.hidden.shape[-1]  # type: ignore[attr-defined]
        return new


class Initialised(Named):
    __slots__ = ()

    def __init__(self, hidden: Tensor, extra: Any = None) -> None:
        if self.hidden is None:
            raise ValueError("hidden is needed")


class User(UserDict):  # type: ignore[type-arg]
    pass


class Attrs:
    """As `attrs.define` makes them."""

    __slots__ = ("extra", "hidden")
    __attrs_attrs__ = (types.SimpleNamespace(name="hidden"), types.SimpleNamespace(name="extra"))

    def __init__(self, hidden: Tensor, extra: Any = None) -> None:
        self.hidden, self.extra = hidden, extra


class Cache:
    """As the caches of libraries: lists of tensors, registered in torch's own pytrees."""

    def __init__(self, keys: list[Tensor], extra: Any = None) -> None:
        self.keys, self.extra = keys, extra


def _as_cache(values: Any, context: Any) -> Cache:
    return Cache(values[0], values[1])


_pytree.register_pytree_node(Cache, lambda cache: ([cache.keys, cache.extra], {"unhashable": [1]}), _as_cache)

MAKE: dict[str, Any] = {
    "dataclass": Plain,
    "frozen": Frozen,
    "slots": Slotted,
    "with __post_init__ and init=False": Checked,
    "derived": Derived,
    "nested": lambda h, e: Nested(hidden=h, extra=e, inner=Plain(h * 2)),
    "model output": lambda h, e: Encoded(hidden=h, extra=e),
    "dict subclass": lambda h, e: Dict(hidden=h, extra=e),
    "dict with attributes": lambda h, e: Attributes(hidden=h, extra=e),
    "dict with entries as attributes": lambda h, e: Mirrored(hidden=h, extra=e),
    "OrderedDict subclass": lambda h, e: Ordered(hidden=h, extra=e),
    "defaultdict subclass": lambda h, e: Default(list, hidden=h, extra=e),
    "list subclass": lambda h, e: Items([h, e]),
    "deque subclass": lambda h, e: Window([h, e], maxlen=3),
    "tuple subclass": lambda h, e: Pair([h, e]),
    "named tuple": Named,
    "named tuple with __new__": Doubled,
    "named tuple of a pair": lambda h, e: Picky((h, e)),
    "named tuple with __init__": Initialised,
    "UserDict": lambda h, e: User(hidden=h, extra=e),
    "attrs": Attrs,
    "registered in torch": lambda h, e: Cache([h], e),
    "in a dict": lambda h, e: {"a": [Plain(h, e)], "b": Encoded(h)},
}
READ: dict[str, Any] = {
    "list subclass": lambda v: v[0],
    "deque subclass": lambda v: v[0],
    "tuple subclass": lambda v: v[0],
    "registered in torch": lambda v: v.keys[0],
    "in a dict": lambda v: v["a"][0].hidden + v["b"].hidden,
    "nested": lambda v: v.hidden + v.inner.hidden,
}


def hidden_of(kind: str, value: Any) -> Any:
    if kind in READ:
        return READ[kind](value)
    return value["hidden"] if isinstance(value, (dict, UserDict)) else value.hidden


class Stage(nn.Module):
    def __init__(self, kind: str, extra: Any) -> None:
        super().__init__()
        self.proj, self.kind, self.extra = nn.Linear(4, 4), kind, extra

    def forward(self, value: Any) -> Any:
        out = self.proj(hidden_of(self.kind, value))
        return MAKE[self.kind](out.tanh(), out.sin() if self.extra == "tensor" else self.extra)


@pytest.mark.parametrize(
    ("engine", "extra"),
    [*itertools.product(["closures", "aten"], ["tensor", None, 3]), ("inductor", "tensor")],
)
@pytest.mark.parametrize("kind", MAKE)
def test_a_type_passes_in_and_out_with_eagers_gradients(kind: str, extra: Any, engine: Any) -> None:
    torch.manual_seed(0)
    module, x = Stage(kind, extra), torch.randn(2, 4)
    given = MAKE[kind](x, None)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    leaf = x.clone().requires_grad_()
    expected = module(MAKE[kind](leaf, None))
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(stage, params, buffers, given)
        assert type(output) is type(expected)
        torch.testing.assert_close(hidden_of(kind, output), hidden_of(kind, expected))
        ones = torch.ones(2, 4)
        (dvalue,), weight_pullback = pullback(MAKE[kind](ones, ones if extra == "tensor" else extra))
        grads = weight_pullback()
        assert type(dvalue) is type(given)
    leaves = [t for t in fs.trees.flatten(expected)[0] if isinstance(t, Tensor)]
    cotangents = [torch.ones(2, 4) for _ in leaves]
    if kind == "nested":
        cotangents[-1] = torch.full((2, 4), 2.0)
    if kind == "named tuple with __new__":
        cotangents[0] = torch.full((2, 4), 2.0)
    dx, *dparams = torch.autograd.grad(leaves, [leaf, *module.parameters()], cotangents)
    found = [t for t in fs.trees.flatten(dvalue)[0] if isinstance(t, Tensor)]
    if kind == "named tuple with __new__":
        found = [found[0] * 2]
    if kind in ("nested", "in a dict"):
        found = [found[0] + found[1] * (2 if kind == "nested" else 1)]
    torch.testing.assert_close(found, [dx])
    torch.testing.assert_close(list(grads.values()), dparams)


def test_a_named_tuple_keeps_the_attributes_that_it_was_given() -> None:
    apply, params, buffers = fs.functionalize(Stage("named tuple of a pair", None))
    output, _, pullback = fs.stage_vjp(apply, params, buffers, Picky((torch.randn(2, 4), None)))
    assert output.width == 4  # type: ignore[attr-defined]
    cotangent = output._replace(hidden=None)
    cotangent.width = None  # type: ignore[attr-defined]  # which `_replace` leaves out
    (dvalue,), _ = pullback(cotangent)
    assert dvalue == (None, None)


def test_a_model_output_keeps_its_entries_attributes_and_nones() -> None:
    module = Stage("model output", None)
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, Encoded(torch.randn(2, 4)))
    assert list(output) == ["hidden"]
    assert output.extra is None
    assert output["hidden"] is output.hidden
    (dvalue,), _ = pullback(Encoded())  # nothing is known of any cotangent
    assert dvalue.hidden is None
    assert not dvalue


@ENGINES
def test_fields_that_are_no_tensors_keep_their_values(engine: Any) -> None:
    class Kind(enum.Enum):
        A = 1

    @dataclasses.dataclass
    class Output:
        hidden: Tensor
        kind: Kind
        names: list[str]
        of: type = Plain

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Output:
            return Output(self.proj(x), Kind.A, ["a", "b"])

    apply, params, buffers = fs.functionalize(Module())
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, torch.randn(2, 4))
    assert (output.kind, output.names, output.of) == (Kind.A, ["a", "b"], Plain)
    pullback(Output(torch.ones(2, 4), Kind.A, ["a", "b"]), retain=True)
    pullback(dataclasses.replace(output, hidden=None), retain=True)
    with pytest.raises(fs.LeafError, match="must be None"):
        pullback(Output(torch.ones(2, 4), Kind.A, ["a", "c"]))
    with pytest.raises(fs.StructureError, match="structure"):
        pullback(Plain(torch.ones(2, 4)))


@ENGINES
@pytest.mark.parametrize("eq", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_configurations_are_passed_by_keyword(engine: Any, eq: bool, frozen: bool) -> None:
    @dataclasses.dataclass(frozen=frozen, eq=eq)
    class Config:
        scale: float = 2.0
        names: Any = ("a", "b")
        kind: type = Plain

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor, config: Config) -> Tensor:
            assert isinstance(config, Config)
            return self.proj(x) * config.scale * len(config.names)

    module, x = Scaled(), torch.randn(2, 4)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    for config in (Config(), Config(3.0), Config(names=["a"])):
        output, _, _ = fs.stage_vjp(stage, params, buffers, x, config=config)
        torch.testing.assert_close(output, module(x, config))


class Opaque:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class OpaqueSlots:
    __slots__ = ("hidden",)

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = [hidden]


@ENGINES
@pytest.mark.parametrize("kind", [Opaque, OpaqueSlots])
@pytest.mark.parametrize("beside", [False, True])
def test_an_unknown_type_that_holds_tensors_is_refused_by_name(kind: Any, beside: bool, engine: Any) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Any, wrap: bool) -> Any:
            out = self.proj(x.hidden if isinstance(x, kind) else x)
            return ({"a": out, "b": kind(out)} if beside else kind(out)) if wrap else out

    apply, params, buffers = fs.functionalize(Module())
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    with pytest.raises(fs.StructureError, match=rf"{kind.__name__}.*register_pytree_node"):
        fs.stage_vjp(stage, params, buffers, torch.randn(2, 4), wrap=True)
    with pytest.raises(fs.StructureError, match=rf"args\[0\].*{kind.__name__}.*argnums"):
        fs.stage_vjp(apply, params, buffers, kind(torch.randn(2, 4)), wrap=False)


def test_a_type_that_several_threads_meet_at_once_is_known_to_all() -> None:
    barrier = threading.Barrier(4)

    def meet(kind: Any) -> Any:
        barrier.wait(60)
        return fs.trees.flatten(kind(torch.ones(1), 2))[0]

    for _ in range(20):
        kind = dataclasses.make_dataclass("Met", ["hidden", "extra"])
        with ThreadPoolExecutor(4) as pool:
            for leaves in pool.map(meet, [kind] * 4):
                assert [type(leaf) for leaf in leaves] == [Tensor, int]


@ENGINES
def test_a_state_that_is_empty_at_first_comes_back_filled(engine: Any) -> None:
    @dataclasses.dataclass
    class State:
        hidden: Any = None
        steps: int = 0

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor, state: State) -> State:
            x = x if state.hidden is None else x + state.hidden
            return State(self.proj(x).tanh(), state.steps + 1)

    module, x, state = Module(), torch.randn(2, 4), State()
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    for steps in (1, 2, 3):
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x, state)
        expected = module(x, state)
        torch.testing.assert_close(output.hidden, expected.hidden)
        assert output.steps == steps
        (dx, dstate), _ = pullback(State(torch.ones(2, 4), steps))
        assert steps == 1 or torch.equal(dx, dstate.hidden)
        state = output


class AttributeDict(dict[str, Any]):
    """As configurations and batches of many libraries are."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_dict_whose_keys_are_its_attributes_passes_through(engine: str) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, batch: AttributeDict) -> AttributeDict:
            return AttributeDict(hidden=self.proj(batch.x) + batch.shift)

    module, x, shift = Module(), torch.randn(2, 4), torch.randn(4)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, AttributeDict(x=x, shift=shift))
    assert type(output) is AttributeDict
    torch.testing.assert_close(output.hidden, module.proj(x) + shift)
    (grads,), weight_pullback = pullback(AttributeDict(hidden=torch.ones(2, 4)))
    torch.testing.assert_close(grads["x"], torch.ones(2, 4) @ module.proj.weight)
    assert torch.equal(weight_pullback()["proj.bias"], torch.full((4,), 2.0))


HIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "a read-only dict": lambda y: types.MappingProxyType({"y": y}),
    "the values of a dict": lambda y: {"y": y}.values(),
    "the items of a dict": lambda y: {"y": y}.items(),
    "a generator": lambda y: (each for each in [y]),
    "a map": lambda y: map(torch.sin, [y]),
    "an iterator": lambda y: iter([y]),
    "a function": lambda y: lambda: y * 2,
    "a function in a table": lambda y: {"f": functools.partial(torch.add, [y])},
    "a method": lambda y: y.sum,
    "a weak reference": weakref.ref,
    "an error": lambda y: ValueError("too large", {"y": y}),
}


@pytest.mark.parametrize("engine", ["uncompiled", "aten"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", HIDDEN)
def test_an_output_whose_tensors_are_not_seen_is_refused_as_what_it_is(
    kind: str, beside: bool, engine: str
) -> None:
    class Hiding(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, HIDDEN[kind](y)) if beside else HIDDEN[kind](y)

    apply, params, buffers = fs.functionalize(Hiding(3, 2))
    if engine == "aten":
        apply = fs.compile(apply, backend="aten", fullgraph=True)
    with pytest.raises(fs.StructureError, match=r"(Pass on|Return) (dict|a list|the tensor)|read-only view"):
        fs.stage_vjp(apply, params, buffers, torch.ones(4, 3))


@pytest.mark.parametrize("engine", ["uncompiled", "aten"])
def test_a_function_among_the_outputs_may_hold_what_the_forward_has_not_made(engine: str) -> None:
    constant = torch.ones(2)

    class Scaling(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), functools.partial(torch.mul, constant)

    apply, params, buffers = fs.functionalize(Scaling(3, 2))
    apply = apply if engine == "uncompiled" else fs.compile(apply, backend="aten", fullgraph=True)
    (output, scale), _, _ = fs.stage_vjp(apply, params, buffers, torch.ones(4, 3))
    assert torch.equal(scale(output), output)


def test_an_argument_whose_tensors_are_not_seen_is_refused_as_what_it_is() -> None:
    def stage(params: Any, buffers: Any, given: Any) -> Any:
        return next(iter(given.values())) * params, buffers

    with pytest.raises(fs.StructureError, match=r"mappingproxy, .* dict\(\.\.\.\)"):
        fs.stage_vjp(stage, torch.ones(2), {}, types.MappingProxyType({"y": torch.ones(2)}))


def test_a_cotangent_of_another_layout_is_refused_by_both_layouts() -> None:
    def stage(params: Any, buffers: Any, x: Tensor) -> Any:
        return (x * params).to_sparse(), buffers

    _, _, pullback = fs.stage_vjp(stage, torch.ones(2, 2), {}, torch.ones(2, 2))
    with pytest.raises(fs.LeafError, match=r"on cpu, sparse_coo; got float32\[2, 2\] on cpu\."):
        pullback(torch.ones(2, 2))
    with pytest.raises(fs.TraceError, match=r"sparse_coo layout.*apply` works"):
        fs.stage_vjp(fs.compile(stage, backend="aten"), torch.ones(2, 2), {}, torch.ones(2, 2))


class DynamicCache:
    """Keeps keys, as those of models in transformers do."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = [keys]


@pytest.mark.parametrize("engine", ["uncompiled", "aten"])
def test_a_cache_in_an_output_is_refused_with_the_argument_that_leaves_it_out(engine: str) -> None:
    class Decoder(nn.Linear):
        def forward(self, x: Tensor, use_cache: bool = True) -> Any:
            y = super().forward(x)
            return (y, DynamicCache(y)) if use_cache else (y, None)

    apply, params, buffers = fs.functionalize(Decoder(3, 2))
    if engine == "aten":
        apply = fs.compile(apply, backend="aten", fullgraph=True)
    with pytest.raises(fs.StructureError, match=r"\[1\] is a DynamicCache.* use_cache=False\. Reg"):
        fs.stage_vjp(apply, params, buffers, torch.ones(4, 3))
    fs.stage_vjp(apply, params, buffers, torch.ones(4, 3), use_cache=False)
