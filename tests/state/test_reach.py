"""Tables of activations that a forward keeps behind functions: of its module's, of classes, of globals."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

Table = Callable[[Tensor], Tensor]


def of_attribute() -> Table:
    def table(x: Tensor) -> Tensor:
        if not hasattr(table, "known"):
            table.known = x * 2  # type: ignore[attr-defined]
        return table.known  # type: ignore[attr-defined,no-any-return]

    return table


def of_variable() -> Table:
    known: Any = None

    def table(x: Tensor) -> Tensor:
        nonlocal known
        if known is None:
            known = x * 2
        return known  # type: ignore[no-any-return]

    return table


def of_dict() -> Table:
    known: dict[int, Tensor] = {}

    def table(x: Tensor) -> Tensor:
        if not known:
            known[0] = x * 2
        return known[0]

    return table


def of_default() -> Table:
    def table(x: Tensor, known: list[Tensor] = []) -> Tensor:  # noqa: B006
        if not known:
            known.append(x * 2)
        return known[0]

    return table


def of_keyword_default() -> Table:
    def table(x: Tensor, *, known: list[tuple[Tensor]] = []) -> Tensor:  # noqa: B006
        if not known:
            known.append((x * 2,))
        return known[0][0]

    return table


def of_wrapper() -> Table:
    inner = of_variable()
    return functools.wraps(inner)(lambda x: inner(x))


def of_cache() -> Table:
    return functools.cache(lambda x: x * 2)


MAKE: dict[str, Callable[[], Table]] = {
    "an attribute": of_attribute,
    "a variable": of_variable,
    "a dict": of_dict,
    "a default": of_default,
    "a keyword's default": of_keyword_default,
    "a wrapped function": of_wrapper,
    "a cache": of_cache,
}
GLOBAL: Table


class Registry:
    """A class that is no module and has a table."""

    @classmethod
    def table(cls, x: Tensor) -> Tensor:
        if not hasattr(cls, "known"):
            cls.known = x * 2  # type: ignore[attr-defined]
        return cls.known  # type: ignore[attr-defined,no-any-return]


class Stage(nn.Module):
    """Adds a table that is computed in the first call."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.proj, self.table = nn.Linear(3, 3), table

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.proj(x) + self.table(x.detach())
        return output


class ByName(Stage):
    """The same table behind a global."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.proj(x) + GLOBAL(x.detach())
        return output


class OfClass(Stage):
    """The same on a class."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.proj(x) + Registry.table(x.detach())
        return output


MADE_AGAIN = {
    *((Stage, make) for make in MAKE if make not in ("a variable", "a wrapped function")),
    *((kind, "a cache") for kind in (Stage, ByName)),
}
"""What compiled stages can do in each call, or, of a cache, leave out."""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    if hasattr(Registry, "known"):
        del Registry.known


def forget(make: Callable[[], Table]) -> None:
    """Let the tables of a class and of globals be computed anew."""
    global GLOBAL
    GLOBAL = make()
    if hasattr(Registry, "known"):
        del Registry.known


def dead() -> int:
    """How many tensors there are of levels, or of traces that nobody has compiled."""
    gc.collect()
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return sum(type(each).__name__ == "FunctionalTensor" or wrapped(each) for each in tensors)


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("kind", [Stage, ByName, OfClass])
@pytest.mark.parametrize("make", MAKE)
def test_a_table_of_activations_is_what_eager_keeps_or_refused(make: str, kind: Any, engine: str) -> None:
    if kind is OfClass and make != "an attribute":
        pytest.skip("one table is enough of a class")
    forget(MAKE[make])
    module, xs = kind(MAKE[make]()), torch.randn(3, 2, 3)
    expected = [module(x).detach() for x in xs]
    forget(MAKE[make])
    state = module.state_dict()
    module = kind(MAKE[make]())
    module.load_state_dict(state)
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    before = dead()
    for x, wanted in zip(xs, expected, strict=True):
        if engine == "aten" and (kind, make) not in MADE_AGAIN:
            with pytest.raises(fs.TraceError, match=r"leaves a tensor .*The uncompiled `apply` works"):
                fs.stage_vjp(stage, params, buffers, x)
            continue
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        torch.testing.assert_close(output, wanted)
        pullback(torch.ones_like(output))[1]()
    assert dead() == before
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied(xs[0]).detach(), expected[0])
