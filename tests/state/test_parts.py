"""A module is lent the tensors of a call, wherever it holds its own, and has these again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage import trees


class Counting(nn.Module):
    """Counts its calls in a buffer, in one of several ways."""

    calls: Tensor

    def __init__(self, count: Callable[[Counting], Any] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("calls", torch.zeros(()))
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        if self.count is None:
            self.calls += 1
        else:
            self.count(self)
        return x * self.scale + self.calls


def assign(module: Counting) -> None:
    module.calls = module.calls + 1


def exchange_the_dict(module: Counting) -> None:
    module._buffers = {"calls": module.calls + 1}


def move_to_attribute(module: Counting) -> None:
    now = module.calls + 1
    del module.calls
    module.calls = now


class Remaking(nn.Module):
    """Makes or exchanges parameters in its forward, in one of several ways."""

    def __init__(self, remake: Callable[[Any], Any]) -> None:
        super().__init__()
        self.proj, self.remake = nn.Linear(4, 4), remake
        self.register_parameter("later", None)

    def forward(self, x: Tensor) -> Tensor:
        self.remake(self)
        y: Tensor = self.proj(x)
        return y


def new_parameter(m: Any) -> None:
    m.proj.scale = nn.Parameter(torch.ones(4))


def registered(m: Any) -> None:
    m.register_parameter("scale", nn.Parameter(torch.ones(4), requires_grad=False))


def where_none_was(m: Any) -> None:
    m.later = nn.Parameter(torch.ones(4))


def new_layer(m: Any) -> None:
    m.more = nn.Linear(4, 4)


def layer_of_the_same_names(m: Any) -> None:
    m.proj = nn.Linear(4, 4)


def normalised(m: Any) -> None:
    m.proj.weight = nn.Parameter(m.proj.weight.detach() / 2)


def computed(m: Any) -> None:
    m.proj._parameters["weight"] = m.proj.weight * 2


def as_an_attribute(m: Any) -> None:
    weight = m.proj.weight * 2
    del m.proj.weight
    m.proj.weight = weight


def dropped(m: Any) -> None:
    m.proj.bias = None


MADE = [new_parameter, registered, where_none_was, new_layer, layer_of_the_same_names]
EXCHANGED = [normalised, computed, as_an_attribute, dropped]


def stage_of(module: nn.Module) -> tuple[Any, ...]:
    return tuple(fs.functionalize(module))


@pytest.mark.parametrize("count", [None, assign, exchange_the_dict, move_to_attribute])
def test_a_buffer_is_read_back_from_where_the_forward_has_left_it(
    count: Callable[[Counting], Any] | None,
) -> None:
    module = Counting(count)
    own = module.scale
    apply, params, buffers = stage_of(module)
    x = torch.tensor([1.0, 1.0])
    output, new_buffers, pullback = fs.stage_vjp(apply, params, buffers, x)
    assert output.tolist() == [3.0, 4.0]
    assert new_buffers["calls"].item() == 1
    assert module.scale is own
    assert module.calls.item() == 0
    assert buffers["calls"].item() == 0
    (dx,), weight_pullback = pullback(torch.ones(2))
    assert dx.tolist() == [2.0, 3.0]
    assert weight_pullback()["scale"].tolist() == [1.0, 1.0]


def test_dicts_of_a_module_may_be_exchanged_between_calls() -> None:
    module = Counting()
    apply, params, buffers = stage_of(module)
    fs.stage_vjp(apply, params, buffers, torch.ones(2))
    module._parameters, module._buffers = dict(module._parameters), dict(module._buffers)
    doubled = {"scale": params["scale"] * 2}
    output, new_buffers, _ = fs.stage_vjp(apply, doubled, {"calls": torch.tensor(5.0)}, torch.ones(2))
    assert output.tolist() == [10.0, 12.0]
    assert new_buffers["calls"].item() == 6
    assert module.calls.item() == 0


def test_a_buffer_that_was_taken_away_is_lent_nevertheless() -> None:
    module = Counting()
    apply, params, buffers = stage_of(module)
    del module.calls
    output, new_buffers, _ = fs.stage_vjp(apply, params, buffers, torch.ones(2))
    assert output.tolist() == [3.0, 4.0]
    assert new_buffers["calls"].item() == 1
    assert not hasattr(module, "calls")


def test_a_forward_that_fails_leaves_the_module_its_own_tensors() -> None:
    def fail(module: Counting) -> None:
        del module.calls
        raise ValueError("on purpose")

    module = Counting(fail)
    scale = module.scale
    apply, params, buffers = stage_of(module)
    with pytest.raises(ValueError, match="on purpose"):
        fs.stage_vjp(apply, params, buffers, torch.ones(2))
    assert module.scale is scale
    assert module.calls.item() == 0


@pytest.mark.parametrize(
    "tree",
    [
        {"b": 1, "a": 2.0},
        {},
        {"a": {"c": 1}, "b": None},
        {2: 1, 1: 2},
        {"a": (1, 2)},
    ],
)
def test_dicts_are_flattened_as_optree_does_when_they_are_met_again(tree: dict[Any, Any]) -> None:
    for _ in range(3):
        leaves, spec = trees.flatten(dict(tree))
        expected, expected_spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=trees.NAMESPACE)
        assert leaves == expected
        assert spec == expected_spec
        assert [*trees.unflatten(spec, leaves)] == [*tree]


def test_a_dict_of_known_keys_with_something_else_in_it_is_looked_into() -> None:
    trees.flatten({"p": 1, "q": 2})
    leaves, spec = trees.flatten({"p": 1, "q": [2, 3]})
    assert leaves == [1, 2, 3]
    assert trees.unflatten(spec, leaves) == {"p": 1, "q": [2, 3]}
    leaves, spec = trees.flatten({"q": 2, "p": 1})
    assert [*trees.unflatten(spec, leaves)] == ["q", "p"]


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("remake", [*MADE, *EXCHANGED])
def test_a_forward_that_makes_or_exchanges_parameters_is_refused_and_the_module_is_as_it_was(
    remake: Callable[[Any], Any], engine: Any
) -> None:
    module = Remaking(remake)
    before = {name: id(p) for name, p in module.named_parameters()}
    parts = [*module.modules()]
    apply, params, buffers = stage_of(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    generator = torch.get_rng_state()
    said = r"sets a parameter on its module, '(proj\.scale|scale|later|more\.weight|proj\.weight)'.*__init__"
    if remake in EXCHANGED:
        said = r"exchanges its parameter 'proj\.(weight|bias)'.*a buffer"
    for _ in range(2):
        with pytest.raises(fs.PurityError, match=said):
            fs.stage_vjp(stage, params, buffers, torch.ones(2, 4))
        assert {name: id(p) for name, p in module.named_parameters()} == before
        assert [*module.modules()] == parts
        assert "scale" not in module._parameters
        assert module.later is None
        assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_parameter_that_the_first_call_makes_is_trained_where_that_came_before(engine: Any) -> None:
    def lazily(m: Any) -> None:
        if m.later is None:
            m.later = nn.Parameter(torch.full((4,), 2.0))

    module = Remaking(lazily)
    module.register_forward_hook(lambda m, args, y: y * m.later)
    x = torch.randn(2, 4)
    module(x)
    apply, params, buffers = stage_of(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    grads = pullback(torch.ones_like(output))[1]()
    module(x).sum().backward()
    torch.testing.assert_close(grads, {name: p.grad for name, p in module.named_parameters()})


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_forward_may_exchange_a_parameter_for_a_while(engine: Any) -> None:
    def doubled(module: nn.Module, args: Any) -> None:
        part: Any = module
        vars(part)["own"] = module._parameters.pop("weight")  # by assignment it would be registered
        part.weight = part.own * 2

    def as_before(module: nn.Module, args: Any, output: Any) -> None:
        del module.weight
        module._parameters["weight"] = vars(module).pop("own")

    module = nn.Linear(4, 4)
    expected = 2 * module.weight.detach().sum(0)
    module.register_forward_pre_hook(doubled)
    module.register_forward_hook(as_before)
    apply, params, buffers = stage_of(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(stage, params, buffers, torch.randn(2, 4))
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        weight_pullback()
        torch.testing.assert_close(dx, expected.expand(2, 4))


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_call_that_is_refused_has_drawn_nothing_and_left_nothing(engine: Any) -> None:
    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.calls = nn.Linear(4, 4), 0
            self.last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.last, self.calls = nn.functional.dropout(self.proj(x)), self.calls + 1
            self.last.retain_grad()
            y: Tensor = self.last
            return y

    module = Refused()
    apply, params, buffers = stage_of(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    generator = torch.get_rng_state()
    with pytest.raises(fs.StageError, match="retain_grad"):
        fs.stage_vjp(stage, params, buffers, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), generator)
    assert (module.last, module.calls) == (None, 0)
