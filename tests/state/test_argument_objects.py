"""What a forward writes into objects among its arguments: as eager leaves it there, detached, or refused."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import funcstage as fs


class Slotless:
    """As caches of keys and values are."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.table: dict[str, Any] = {}
        self.queue: deque[Any] = deque()
        self.inner = SimpleNamespace(last=None)
        self.seen = 0

    def tensors(self) -> list[Tensor]:
        nested = [t for pair in self.layers for t in pair]
        return [*nested, *self.table.values(), *self.queue, self.inner.last]


class Fills(nn.Linear):
    def forward(self, x: Tensor, cache: Slotless) -> Tensor:
        y = super().forward(x)
        cache.layers.append((y, x * 2))
        cache.table["y"] = y.tanh()
        cache.queue.append(self.weight * 2)
        cache.inner.last = y.detach()
        cache.seen += 1
        return y * cache.seen


def test_uncompiled_the_object_holds_what_eager_leaves_in_it() -> None:
    module, x = Fills(3, 3), torch.randn(4, 3)
    expected, cache = Slotless(), Slotless()
    apply, params, buffers = fs.functionalize(module)
    for _ in range(2):
        wanted = module(x, expected)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, cache=cache)
        assert torch.equal(output, wanted)
        grads = pullback(torch.ones_like(output))[1]()
        assert torch.allclose(grads["bias"], torch.full((3,), 4.0 * expected.seen))
    assert cache.seen == expected.seen == 2
    for ours, eagers in zip(cache.tensors(), expected.tensors(), strict=True):
        assert type(ours) is Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(ours)
        assert not ours.requires_grad
        assert torch.equal(ours, eagers.detach())
    copy.deepcopy(cache)


def test_compiled_it_is_refused_by_name_and_the_object_is_left_alone() -> None:
    apply, params, buffers = fs.functionalize(Fills(3, 3))
    cache = Slotless()
    with pytest.raises(fs.TraceError, match="writes into an object that it is handed as an argument"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.randn(4, 3), cache=cache)
    assert not cache.layers
    assert not cache.table
    assert cache.inner.last is None
    assert cache.seen == 0


def test_an_object_that_is_only_read_is_compiled() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor, settings: Any) -> Tensor:
            return super().forward(x) * (settings.seen + 2)

    module, x = Reads(3, 3), torch.randn(4, 3)
    apply, params, buffers = fs.functionalize(module)
    settings = Slotless()
    output, _, _ = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x, settings=settings)
    assert torch.allclose(output, module(x, settings))


# Lists, dicts and the like, which a stage is handed rebuilt.


@dataclasses.dataclass
class Batch:
    x: Tensor
    hidden: Any = None


class Pair(NamedTuple):
    x: Tensor
    log: list[Any]


class Cache:
    """Registered with a rule of its own, as model libraries do."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = values


optree.register_pytree_node(
    Cache, lambda cache: (cache.values, None), lambda _, values: Cache([*values]), namespace="funcstage"
)


class Writes(nn.Module):
    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.proj, self.body = nn.Linear(3, 3), body

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.body(self.proj, *args, **kwargs)


def appends(proj: Any, x: Tensor, log: Any) -> Tensor:
    log.append(y := proj(x))
    return y.tanh()


def appends_more(proj: Any, x: Tensor, log: Any) -> Tensor:
    log += [("step", proj(x), {"x": [x * 2]}), 3, proj.weight.sum()]
    return proj(x)


def sets(proj: Any, x: Tensor, table: Any) -> Tensor:
    table["y"] = y = proj(x)
    table["x"] = x
    return y


def pops(proj: Any, batch: dict[str, Any]) -> Tensor:
    return proj(batch.pop("x")) * batch["scale"]


def replaces_within(proj: Any, batch: dict[str, Any]) -> Tensor:
    batch["inner"][0] = proj(batch["x"])
    batch["again"] = batch["inner"]
    return batch["inner"][0] * 2


def clears(proj: Any, xs: list[Tensor]) -> Tensor:
    y = proj(xs[0]) + xs[1]
    xs.clear()
    return y


def by_key(proj: Any, x: Tensor, *, log: Any) -> Tensor:
    return appends(proj, x, log)


def in_a_tuple(proj: Any, pair: Pair) -> Tensor:
    return appends(proj, *pair)


def an_attribute(proj: Any, batch: Batch) -> Tensor:
    batch.hidden = y = proj(batch.x)
    return y


def takes_gradients(proj: Any, x: Tensor, log: Any) -> Tensor:
    x = x * 1
    (force,) = torch.autograd.grad(proj(x).tanh().sum(), x, create_graph=True)
    log.append(force)
    return force * 2


def reads(proj: Any, batch: dict[str, Any]) -> Tensor:
    return proj(next(iter(batch["inner"]))) * len(batch)


X = torch.randn(4, 3)
WRITING: list[tuple[Callable[..., Tensor], Callable[[], tuple[Any, ...]], dict[str, Any]]] = [
    (appends, lambda: (X, []), {}),
    (appends, lambda: (X, deque([X, 1], maxlen=2)), {}),
    (appends_more, lambda: (X, [X]), {}),
    (sets, lambda: (X, {}), {}),
    (sets, lambda: (X, OrderedDict(z=1)), {}),
    (sets, lambda: (X, defaultdict(list, z=[X])), {}),
    (pops, lambda: ({"x": X, "scale": 2},), {}),
    (replaces_within, lambda: ({"x": X, "inner": [1, X]},), {}),
    (clears, lambda: ([X, X * 2],), {}),
    (by_key, lambda: (X,), {"log": []}),
    (in_a_tuple, lambda: (Pair(X, [X]),), {}),
    (an_attribute, lambda: (Batch(X),), {}),
    (takes_gradients, lambda: (X, []), {}),
]


def assert_alike(ours: Any, eagers: Any) -> None:
    """Compare types, keys in their order, and values, tapes aside."""
    assert type(ours) is type(eagers)
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours.detach(), eagers.detach())
    elif isinstance(ours, Batch):
        assert_alike(vars(ours), vars(eagers))
    elif isinstance(ours, dict):
        assert [*ours] == [*eagers]
        assert_alike([*ours.values()], [*eagers.values()])
    elif isinstance(ours, (list, tuple, deque)):
        for pair in zip(ours, eagers, strict=True):
            assert_alike(*pair)
    else:
        assert ours == eagers


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def ids(case: Any) -> str:
    return case[0].__name__


@pytest.mark.supports(
    "lists and dicts among the arguments that the forward writes into",
    "as eager leaves them, detached",
    "refused: return what is new",
)
@pytest.mark.parametrize("case", WRITING, ids=ids)
def test_uncompiled_the_callers_containers_hold_what_eager_leaves_in_them(case: Any) -> None:
    body, make, kwargs = case
    module = Writes(body)
    apply, params, buffers = fs.functionalize(module)
    given, expected = (make(), copy.deepcopy(kwargs)), (make(), copy.deepcopy(kwargs))
    inner = given[0][0]["inner"] if body is replaces_within else None
    if body is takes_gradients:
        expected = (X.clone().requires_grad_(), *expected[0][1:]), expected[1]
    wanted = module(*expected[0], **expected[1])
    output, _, pullback = fs.stage_vjp(apply, params, buffers, *given[0], **given[1])
    torch.testing.assert_close(output, wanted.detach())
    assert_alike(given, expected)
    assert not any(x.requires_grad for x in filter(is_tensor, tree_leaves(given)))
    assert not any(
        map(torch._C._functorch.is_functorch_wrapped_tensor, filter(is_tensor, tree_leaves(given)))
    )
    if inner is not None:
        assert given[0][0]["inner"] is given[0][0]["again"] is inner
    grads = pullback(torch.ones_like(output))[1]()
    found = torch.autograd.grad(wanted.sum(), [*module.parameters()], allow_unused=True)
    for ours, grad in zip(grads.values(), found, strict=True):
        torch.testing.assert_close(ours, grad)


@pytest.mark.parametrize("case", WRITING, ids=ids)
def test_compiled_a_container_that_is_written_into_is_refused_by_name_and_left_alone(case: Any) -> None:
    body, make, kwargs = case
    apply, params, buffers = fs.functionalize(Writes(body))
    args, kwargs = make(), copy.deepcopy(kwargs)
    with pytest.raises(fs.TraceError, match=r"writes into k?w?args\[.*only in its first.* `apply` works"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, *args, **kwargs)
    assert_alike((args, kwargs), (make(), case[2]))


def pops_from_a_copy(proj: Any, batch: dict[str, Any]) -> Tensor:
    return pops(proj, copy.copy(batch))


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_forward_may_write_into_a_copy_of_a_container(engine: str) -> None:
    module = Writes(pops_from_a_copy)
    apply, params, buffers = fs.functionalize(module)
    apply = fs.compile(apply, backend="aten") if engine == "aten" else apply
    for scale in (2, 2, 3):
        batch = {"x": X, "scale": scale}
        output, _, pullback = fs.stage_vjp(apply, params, buffers, batch)
        (grads,), _ = pullback(torch.ones_like(output))
        leaf = X.clone().requires_grad_()
        expected = module({"x": leaf, "scale": scale})
        torch.testing.assert_close(output, expected.detach())
        torch.testing.assert_close(grads["x"], torch.autograd.grad(expected.sum(), leaf)[0])
        assert [*batch] == ["x", "scale"]


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_containers_that_are_only_read_stay_as_they_are(engine: str) -> None:
    module = Writes(reads)
    apply, params, buffers = fs.functionalize(module)
    inner = (X,)
    batch = {"inner": inner, "other": [[], {"a": None}], "set": frozenset((1,)), "float": float("nan")}
    stage = apply if engine == "closures" else fs.compile(apply, backend="aten")
    output, _, _ = fs.stage_vjp(stage, params, buffers, batch)
    torch.testing.assert_close(output, module(batch).detach())
    assert batch["inner"] is inner
    assert inner[0] is X


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_type_whose_contents_cannot_be_exchanged_is_refused(engine: str) -> None:
    def grows(proj: Any, x: Tensor, cache: Cache) -> Tensor:
        cache.values.append(proj(x))
        return cache.values[-1]

    apply, params, buffers = fs.functionalize(Writes(grows))
    stage = apply if engine == "closures" else fs.compile(apply, backend="aten")
    cache = Cache([X])
    with pytest.raises(fs.StageError, match=r"writes into args\[1\], a Cache.*copy the container"):
        fs.stage_vjp(stage, params, buffers, X, cache)
    assert len(cache.values) == 1


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_container_that_is_passed_twice_may_not_be_written_into(engine: str) -> None:
    def counts(proj: Any, x: Tensor, log: list[int], same: list[int]) -> Tensor:
        log.append(1)
        return proj(x) * len(same)

    apply, params, buffers = fs.functionalize(Writes(counts))
    stage = apply if engine == "closures" else fs.compile(apply, backend="aten")
    log = [1]
    with pytest.raises(fs.StageError, match=r"writes into args\[1\], a list"):
        fs.stage_vjp(stage, params, buffers, X, log, log)
    assert log == [1]
