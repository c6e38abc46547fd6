"""Tables that a forward computes once and keeps outside of its module, in caches or behind globals."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.state.shared import names_of

ENGINES = ("closures", "aten")


def made(n: int) -> Tensor:
    return torch.arange(n).double() * 2


@functools.lru_cache(maxsize=2)
def bounded(n: int) -> Tensor:
    return made(n)


@functools.cache
def unbounded(n: int, dtype: Any) -> dict[str, Any]:
    return {"tables": [made(n).to(dtype)]}


class Tables:
    """Keeps what it has computed in ways of its own."""

    def __init__(self) -> None:
        self.known: dict[int, Tensor] = {}
        self.rows: list[Any] = []

    def __call__(self, n: int) -> Tensor:
        if n not in self.known:
            self.known[n] = made(n)
        return self.known[n]

    def row(self, n: int) -> Tensor:
        if not self.rows:
            self.rows.append((n, made(n)))
        return self.rows[0][1]  # type: ignore[no-any-return]


TABLES = Tables()


def by_default(n: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return known.setdefault(n, made(n))


def closing() -> Callable[[int], Tensor]:
    known: dict[int, Tensor] = {}

    def table(n: int) -> Tensor:
        if n not in known:
            known[n] = made(n)
        return known[n]

    return table


closed = closing()


class Stage(nn.Module):
    def __init__(self, case: Callable[..., Tensor]) -> None:
        super().__init__()
        self.proj, self.case = nn.Linear(4, 4, dtype=torch.float64), case

    @functools.lru_cache  # noqa: B019
    def of_method(self, n: int) -> Tensor:
        return made(n)

    @staticmethod
    @functools.cache
    def of_class(n: int) -> tuple[Tensor, int]:
        return made(n), n

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x) * self.case(self)
        return y


FUNCTIONS: dict[str, Any] = {
    "tables": [(bounded, functools.partial(unbounded, 4))],
    "of another": (lambda: bounded(4),),
}


CACHED: dict[str, Callable[[Stage], Tensor]] = {
    "lru_cache": lambda s: bounded(4),
    "cache, in containers": lambda s: unbounded(4, torch.float64)["tables"][0],
    "a method": lambda s: s.of_method(4),
    "a static method": lambda s: s.of_class(4)[0],
    "in a table": lambda s: FUNCTIONS["tables"][0][0](4),
    "a partial function in a table": lambda s: FUNCTIONS["tables"][0][1](torch.float64)["tables"][0],
    "behind a function in a table": lambda s: FUNCTIONS["of another"][0](),
}
KEPT: dict[str, Callable[[Stage], Tensor]] = {
    "a dict of an object": lambda s: TABLES(4),
    "tuples in a list": lambda s: TABLES.row(4),
    "a default": lambda s: by_default(4),
    "a closure": lambda s: closed(4),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for cache in (bounded, unbounded, Stage.of_method, Stage.of_class):
        cache.cache_clear()
    closure = closed.__closure__ or ()
    for known in (TABLES.known, TABLES.rows, (by_default.__defaults__ or ())[0], closure[0].cell_contents):
        known.clear()


def staged(module: nn.Module, engine: str) -> tuple[Any, Any, Any]:
    apply, params, buffers = fs.functionalize(module)
    compiled = engine == "aten"
    return fs.compile(apply, backend=engine, fullgraph=True) if compiled else apply, params, buffers


def check(module: nn.Module, stage: tuple[Any, Any, Any], x: Tensor) -> None:
    output, _, pullback = fs.stage_vjp(*stage, x)
    grads = pullback(torch.ones_like(output))[1]()
    expected = module(x.clone())
    weight = torch.autograd.grad(expected.sum(), module.proj.weight)[0]  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close((output, grads["proj.weight"]), (expected.detach(), weight))


@pytest.mark.parametrize("first", ["the stage", "eager"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CACHED)
def test_a_cached_function_may_make_tensors(case: str, engine: str, first: str) -> None:
    module, x = Stage(CACHED[case]), torch.randn(3, 4, dtype=torch.float64)
    if first == "eager":
        module(x)
    stage = staged(module, engine)
    for rows in (3, 3, 2):
        check(module, stage, x[:rows])
    torch.testing.assert_close(CACHED[case](module), made(4))


class Named(Stage):
    """Calls the function by its name."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x) * bounded(4) * self.of_class(4)[0] * self.of_method(4)
        return y


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_holds_plain_tensors_afterwards(engine: str) -> None:
    module = Named(CACHED["lru_cache"])
    check(module, staged(module, engine), torch.randn(3, 4, dtype=torch.float64))
    for table in (bounded(4), Stage.of_class(4)[0], module.of_method(4)):
        torch.testing.assert_close(copy.deepcopy(table), made(4))


def test_a_cached_function_is_computed_anew_where_a_trace_is_begun_anew() -> None:
    class Overwriting(Stage):
        def forward(self, x: Tensor) -> Tensor:
            table = self.case(self)
            x += 1
            y: Tensor = self.proj(x) * table
            return y

    module, x = Overwriting(CACHED["lru_cache"]), torch.randn(3, 4, dtype=torch.float64)
    output = fs.stage_vjp(*staged(module, "aten"), x)[0]
    torch.testing.assert_close(output, (module.proj(x + 1) * made(4)).detach())


@pytest.mark.parametrize("case", KEPT)
def test_what_an_uncompiled_stage_leaves_in_containers_stays(case: str) -> None:
    module, x = Stage(KEPT[case]), torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        check(module, staged(module, "closures"), x)
    torch.testing.assert_close(KEPT[case](module), made(4))


@pytest.mark.parametrize("case", KEPT)
def test_a_compiled_stage_that_leaves_tensors_in_containers_is_refused(case: str) -> None:
    module, x = Stage(KEPT[case]), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(fs.TraceError, match=r"leaves a tensor outside of its module.*`apply` works"):
        fs.stage_vjp(*staged(module, "aten"), x)
    torch.testing.assert_close(KEPT[case](module), made(4))
    check(module, staged(module, "aten"), x)  # which finds the table there


def test_a_builtin_that_a_function_calls_leads_nowhere() -> None:
    assert names_of([lambda: float(len("1"))]) == []


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


class Parametrized(nn.Module):
    """Has a parametrized weight, which it reads in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.proj, self.how = nn.Linear(3, 3), how
        parametrize.register_parametrization(self.proj, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "on a tape":
            point = torch.ones(3, requires_grad=True)
            x = x * torch.autograd.grad(point.square().sum(), point)[0]
        if self.how == "in a region":
            return checkpoint(self.proj, x, use_reentrant=False)
        return self.proj(self.proj(x))


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("calls", ["FF", "FE", "EF", "EFE"])
@pytest.mark.parametrize("how", ["by levels", "on a tape", "in a region"])
def test_weights_that_a_call_has_cached_are_not_read_by_another(how: str, calls: str, engine: str) -> None:
    module, x = Parametrized(how), torch.randn(2, 3)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)

    def eagerly() -> list[Tensor]:
        return [*torch.autograd.grad(module(x).sum(), [*module.parameters()])]

    expected, first = eagerly(), "E" in calls
    with parametrize.cached():
        for call in calls:
            if call == "F":
                _, _, pullback = fs.stage_vjp(stage, params, buffers, x)
                found = fs.stage_backward(pullback, torch.ones(2, 3))[1]
                torch.testing.assert_close([found[name] for name in params], expected)
            elif first:  # after that eager has no tape any more to the weight that it has cached
                first = False
                torch.testing.assert_close(eagerly(), expected)
