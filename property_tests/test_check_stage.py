"""`check_stage` sees every kind of wrong split, and says which leaf and by how much."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage.engines.base import Linearized, StageCall
from funcstage.engines.levels import linearize as levels
from funcstage.testing import StageMismatch, check_stage
from funcstage.testing.stages import Block, use
from funcstage.testing.stages import Stage as Generated

Grads = list[Tensor | None]


class Tape:
    """A tape of the closures engine whose results somebody spoils."""

    def __init__(self, tape: Any, spoil: Callable[[str, Grads, list[Any]], Any], keeps: bool = False) -> None:
        self.tape = tape
        self.spoil = spoil
        self.keeps = keeps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tape, name)

    def with_leaves(self, leaves: Sequence[Tensor]) -> Tape:
        return Tape(self.tape.with_leaves(leaves), self.spoil, self.keeps)

    def input_vjp(self, cotangents: list[Any], retain: bool) -> Any:
        grads, weight_tape, rest = self.tape.input_vjp(cotangents, retain or self.keeps)
        self.spoil("I", grads, [cotangents])
        return grads, Tape(weight_tape, self.spoil, self.keeps), rest and Tape(rest, self.spoil, self.keeps)

    def weight_vjp(self, retain: bool) -> Any:
        grads, rest = self.tape.weight_vjp(retain or self.keeps)
        self.spoil("W", grads, [])
        return grads, rest and Tape(rest, self.spoil, self.keeps)


def engine(
    spoil: Callable[[str, Grads, list[Any]], Any] = lambda verb, grads, cotangents: None,
    forward: Callable[..., Any] = lambda output, buffers, params: (output, buffers),
    keeps: bool = False,
) -> Callable[[Any], Any]:
    """The closures engine with a defect."""

    def wrap(apply: Any) -> Any:
        def spoiled(call: StageCall) -> Linearized:
            output, buffers, tape = levels.linearize(call.to(apply))
            return Linearized(*forward(output, buffers, call.params), Tape(tape, spoil, keeps))

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return apply(*args, **kwargs)

        wrapped.linearize = spoiled  # type: ignore[attr-defined]
        return wrapped

    return wrap


def only(verb: str, act: Callable[[Grads, list[Any]], Any]) -> Callable[[str, Grads, list[Any]], Any]:
    """A defect of I or of W alone."""
    return lambda v, grads, cotangents: act(grads, cotangents) if v == verb else None


def put(i: int, change: Callable[[Tensor | None], Tensor | None]) -> Callable[[Grads, list[Any]], None]:
    """A defect in one gradient."""

    def act(grads: Grads, cotangents: list[Any]) -> None:
        grads[i] = change(grads[i])

    return act


DEFECTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an input gradient is off by a thousandth": (
        engine(only("I", put(0, lambda g: g * 1.001))),
        r"gradient of args\[0\]: max abs error .*, max rel error 0.001",
    ),
    "a parameter gradient is missing": (
        engine(only("W", put(1, lambda g: None))),
        r"gradient of params\['0.weight'\]: expected float32\[3, 3\] on cpu, got None",
    ),
    "a parameter gradient is zero where eager has none": (
        engine(only("W", put(4, lambda g: torch.zeros(2)))),
        r"gradient of params\['unused'\]: expected None, got float32\[2\] on cpu",
    ),
    "a parameter gradient has another dtype": (
        engine(only("W", put(1, lambda g: g.double()))),
        r"expected float32\[3, 3\] on cpu, got float64\[3, 3\] on cpu",
    ),
    "a gradient is not a number": (
        engine(only("W", put(0, lambda g: g * float("nan")))),
        r"gradient of params\['0.bias'\]: max abs error inf",
    ),
    "two gradients share memory": (
        engine(only("W", lambda grads, _: grads.__setitem__(2, grads[0].detach()))),
        r"gradient of params\['1.bias'\] shares its memory with gradient of params\['0.bias'\]",
    ),
    "the output is off": (
        engine(forward=lambda output, buffers, params: (output + 0.1, buffers)),
        "output: max abs error 0.1",
    ),
    "the output keeps a tape alive": (
        engine(forward=lambda output, buffers, params: (output.clone().requires_grad_(), buffers)),
        "output still requires grad",
    ),
    "a buffer is not updated": (
        engine(forward=lambda output, buffers, params: (output, {n: b * 0 for n, b in buffers.items()})),
        r"new buffers\['1.num_batches_tracked'\]: 1 of 1 elements differ",
    ),
    "a parameter is overwritten": (
        engine(forward=lambda output, buffers, params: (params["0.bias"].add_(0) * 0 + output, buffers)),
        r"params\['0.bias'\] was mutated in place",
    ),
    "a cotangent is overwritten": (
        engine(only("I", lambda grads, rest: rest[0][0].mul_(2))),
        "output_grads was mutated in place",
    ),
    "the pullbacks may be used twice": (engine(keeps=True), "the Pullback could be used twice"),
    "I does the work of W as well": (
        engine(only("I", lambda grads, _: torch.ones(3, 4) @ torch.ones(4, 3))),
        "FLOPs: I takes 144, eager's backward to the inputs alone 72",
    ),
}


class Stage(nn.Sequential):
    """A stage with a buffer and an unused parameter."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_wrong_split_is_reported(defect: str) -> None:
    wrap, message = DEFECTS[defect]
    torch.manual_seed(0)
    with pytest.raises(StageMismatch, match=message) as caught:
        check_stage(Stage(), torch.randn(4, 3), engines=wrap)
    assert caught.value.report.complaints()


def test_a_right_split_passes_through_an_engine() -> None:
    report = check_stage(Stage(), torch.randn(4, 3), engines=engine())
    assert not report.complaints()
    assert report.exact == len(report.leaves) == 10
    (found,) = report.engines.values()
    assert found.input_nbytes > 0
    assert found.weight_nbytes > 0


def test_nothing_that_is_passed_in_changes() -> None:
    module, x = Stage(), torch.randn(4, 3, requires_grad=True)
    module[0].weight.grad = torch.ones(3, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    assert set(check_stage(module, x).engines) == {"closures", "aten", "inductor"}
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    assert module[0].bias.grad is None
    assert torch.equal(module[0].weight.grad, torch.ones(3, 3))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_hand_written_stage_takes_its_parameters_by_keyword() -> None:
    def affine(params: Any, buffers: Any, x: Tensor, *, scale: float) -> Any:
        return {"y": x @ params["w"] * scale + params["b"]}, {"calls": buffers["calls"] + 1}

    params = {"w": torch.randn(3, 2), "b": torch.randn(2), "unused": torch.randn(2), "index": torch.tensor(1)}
    report = check_stage(
        affine,
        torch.randn(4, 3),
        engines=("closures", "aten"),
        params=params,
        buffers={"calls": torch.tensor(0)},
        scale=2.0,
    )
    assert report.stage.endswith("affine")
    assert {leaf.leaf for leaf in report.leaves} >= {"output['y']", "new buffers['calls']"}


def test_what_functionalize_returned_is_a_stage_too() -> None:
    stage = fs.functionalize(nn.Linear(3, 2))
    check_stage(stage, torch.randn(4, 3), engines=("closures", "aten"))
    with pytest.raises(fs.StageError, match=re.escape("only with a stage function")):
        check_stage(stage, torch.randn(4, 3), params=stage.params)


def test_a_scalar_output_needs_no_cotangent() -> None:
    class Loss(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().sum()

    check_stage(Loss(3, 2), torch.randn(4, 3), engines="closures")
    check_stage(Loss(3, 2), torch.randn(4, 3), engines="aten", output_grads=torch.tensor(2.0))


def test_tolerances_follow_the_coarsest_dtype_that_took_part() -> None:
    class Casts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16().float())

    report = check_stage(Casts(3, 2), torch.randn(4, 3), engines="closures")
    assert {leaf.tolerance for leaf in report.leaves} == {6e-2}


class DependsOnValues(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_an_engine_that_refuses_the_stage_is_listed_with_its_reason() -> None:
    report = check_stage(DependsOnValues(3, 3), torch.ones(4, 3), engines=("closures", "aten"))
    assert set(report.refusals) == {"aten"}
    assert isinstance(report.refusals["aten"], fs.TraceError)
    assert "aten refused it: " in str(report)


def test_a_stage_that_every_engine_refuses_is_refused() -> None:
    with pytest.raises(fs.TraceError):
        check_stage(DependsOnValues(3, 3), torch.ones(4, 3), engines=("aten",))


def test_only_known_engines_are_asked() -> None:
    with pytest.raises(fs.StructureError, match=re.escape("no engine 'eager'; expected one of closures")):
        check_stage(Stage(), torch.randn(4, 3), engines="eager")
    with pytest.raises(fs.StructureError, match="engines is empty"):
        check_stage(Stage(), torch.randn(4, 3), engines=())


def test_a_wrong_gradient_comes_with_the_operations_that_read_the_leaf() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + x @ self.first.weight.t()

    with pytest.raises(StageMismatch) as caught:
        check_stage(Tied(), torch.randn(4, 3), engines=engine(only("W", put(1, lambda g: g * 2))))
    (leaf,) = [leaf for leaf in caught.value.report.leaves if not leaf.accepted]
    assert leaf.leaf == "gradient of params['first.weight']"
    assert leaf.readers == ("linear in first", "linear in second", "t")
    assert str(leaf).endswith("; read by linear in first, linear in second, t")


def test_a_result_that_eager_itself_computes_to_no_digit_is_not_a_mismatch() -> None:
    """A norm over one feature cancels its gradient; what is left is the rounding of far larger terms."""
    lstm = use("recurrent", kind="lstm", hidden=1, layers=1, both=True, states=False)
    bodies = (
        (lstm, use("custom function")),
        (use("linear", out=1, bias=False), use("layer norm", affine="weight")),
    )
    attention = use("attention", heads=2, weights=False, masked=True, dropout=0.0)
    body = (
        Block("branch", bodies),
        use("linear", out=2, bias=True),
        attention,
        use("rms norm", affine=True),
    )
    for seed in (36, 84, 88, 113):
        Generated(body, shape=(2, 3, 3), seed=seed).check(engines="closures")


@pytest.mark.parametrize("factor", [1 + 1e-3, 1 + 1e-4])
def test_further_rounding_excuses_no_wrong_factor(factor: float) -> None:
    spoilt = engine(only("W", put(1, lambda g: g * factor)))
    body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))
    torch.manual_seed(0)
    with pytest.raises(StageMismatch):
        check_stage(body, torch.randn(4, 8), engines=spoilt)


class _Unsteady(torch.autograd.Function):
    """Another gradient each time that it is run."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _Unsteady.runs += 1
        return grad * 2 * _Unsteady.runs


def test_that_eager_differs_from_run_to_run_excuses_nothing() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> tuple[Tensor, Any]:
        return _Unsteady.apply(x * params), buffers

    with pytest.raises(StageMismatch, match="gradient of params"):
        check_stage(apply, torch.ones(3), engines="closures", params=torch.ones(3, requires_grad=True))
