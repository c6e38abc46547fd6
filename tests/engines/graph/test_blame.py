"""Errors of the stage's own come through a compiled stage as they are; refusals say only what was tried."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage._torch import messages

Forward = Callable[[nn.Module, Tensor], Any]


class Stage(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.proj, self.own = nn.Linear(4, 4), forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


class OwnError(Exception):
    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)


def raises(kind: type[Exception], *args: Any) -> Forward:
    def forward(module: nn.Module, x: Tensor) -> Any:
        raise kind(*args)

    return forward


def in_answer_to_torchs(kind: type[Exception], does: Callable[..., Any]) -> Forward:
    def forward(module: nn.Module, x: Tensor) -> Any:
        try:
            return does(module, x)
        except RuntimeError as error:
            raise kind("in my layer") from error

    return forward


def asserts(module: nn.Module, x: Tensor) -> Any:
    assert x.shape[0] == 3, "three samples"
    return module.proj(x)


def from_another(module: nn.Module, x: Tensor) -> Any:
    try:
        return {}["key"]
    except KeyError as error:
        raise ValueError("no such key") from error


OWN: dict[str, Forward] = {
    "ValueError": raises(ValueError, "at most two samples"),
    "RuntimeError": raises(RuntimeError, "mine"),
    "NotImplementedError": raises(NotImplementedError),
    "an error with arguments": raises(OwnError, 3, "text"),
    "assert": asserts,
    "an error with a cause": from_another,
    "an error with torch's as its cause": in_answer_to_torchs(ValueError, lambda m, x: m.proj(x[:, :3])),
    "KeyError": lambda module, x: {}["key"],
    "AttributeError": lambda module, x: module.absent(x),
    "TypeError": lambda module, x: module.proj(x, x, x),
    "ZeroDivisionError": lambda module, x: module.proj(x) * (1 // 0),
    "StopIteration": lambda module, x: next(iter([])),
    "int": lambda module, x: module.proj(x) * int("four"),
    "a wrong width": lambda module, x: module.proj(x[:, :3]),
    "a wrong dtype": lambda module, x: module.proj(x.double()),
    "what does not broadcast": lambda module, x: module.proj(x) + torch.ones(3),
    "an index out of range": lambda module, x: module.proj(x)[:, torch.tensor([9])],
    "a view that is none": lambda module, x: module.proj(x).view(3, 3),
    "a write that does not broadcast": lambda module, x: (module.proj.weight * 2).add_(torch.ones(7)) @ x.T,
    "a dimension that is none": lambda module, x: module.proj(x).sum(7),
}


@pytest.mark.parametrize("where", ["differentiated", "first stage", "called", "uncompiled"])
@pytest.mark.parametrize("backend", ["aten", "inductor"])
@pytest.mark.parametrize("case", OWN)
def test_the_stages_own_error_is_eagers(case: str, backend: Any, where: str) -> None:
    module, x = Stage(OWN[case]), torch.randn(2, 4)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        module(x)
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend=backend)
    state = torch.get_rng_state()
    calls: dict[str, Callable[[], Any]] = {
        "differentiated": lambda: fs.stage_vjp(compiled, params, buffers, x),
        "first stage": lambda: fs.stage_vjp(compiled, params, buffers, x, argnums=()),
        "called": lambda: compiled(params, buffers, x),
        "uncompiled": lambda: fs.stage_vjp(apply, params, buffers, x),
    }
    with pytest.raises(type(expected.value)) as caught:
        calls[where]()
    assert type(caught.value) is type(expected.value)
    assert str(caught.value) == str(expected.value)
    assert caught.value.args == expected.value.args
    assert type(caught.value.__cause__) is type(expected.value.__cause__)
    lines = [frame.name for frame in traceback.extract_tb(caught.tb) if frame.filename == __file__]
    own = [frame.name for frame in traceback.extract_tb(expected.tb) if frame.filename == __file__]
    assert lines[-len(own[1:]) :] == own[1:]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2), {}), ((1,), {"bogus": 1})])
def test_missing_and_unexpected_arguments_are_the_modules_errors(args: Any, kwargs: Any) -> None:
    module = Stage(lambda module, x: module.proj(x))
    args = tuple(torch.randn(2, 4) for _ in args)
    with pytest.raises(TypeError) as expected:
        module(*args, **kwargs)
    apply, params, buffers = fs.functionalize(module)
    with pytest.raises(TypeError) as caught:
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, *args, **kwargs)
    assert str(caught.value) == str(expected.value)
    assert not isinstance(caught.value, fs.StageError)


def reads_a_value(module: nn.Module, x: Tensor) -> Any:
    return module.proj(x) * (2 if x.sum() > -1e9 else 3)


def test_what_cannot_be_traced_names_its_line_and_the_uncompiled_stage_which_was_tried() -> None:
    module, x = Stage(reads_a_value), torch.randn(2, 4)
    apply, params, buffers = fs.functionalize(module)
    line = reads_a_value.__code__.co_firstlineno + 1
    with pytest.raises(fs.TraceError, match=rf"test_blame.py:{line}.*uncompiled `apply` works"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x)
    output, _, _ = fs.stage_vjp(apply, params, buffers, x)
    torch.testing.assert_close(output, module(x))


def test_what_fails_behind_what_cannot_be_traced_is_the_stages_error() -> None:
    def forward(module: nn.Module, x: Tensor) -> Any:
        reads_a_value(module, x)
        raise OwnError(1, "later")

    apply, params, buffers = fs.functionalize(Stage(forward))
    with pytest.raises(OwnError):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.randn(2, 4))


def test_where_the_uncompiled_stage_is_refused_too_it_is_not_said_to_work() -> None:
    apply, params, buffers = fs.functionalize(
        Stage(lambda module, x: module.proj(x) * float(x.data_ptr() > 0))
    )
    with pytest.raises(fs.TraceError) as caught:
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(2, 4))
    assert "works" not in str(caught.value)
    with pytest.raises(fs.StageError, match="custom_op"):
        fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))


def test_anomaly_mode_is_named_where_it_stops_a_trace() -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(4, 4))
    with (
        pytest.warns(UserWarning, match="Anomaly"),
        torch.autograd.detect_anomaly(),
        pytest.raises(fs.TraceError, match=r"anomaly mode.*uncompiled `apply` works"),
    ):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.randn(2, 4))


def test_a_layer_of_torchs_that_cannot_be_traced_is_not_taken_for_anomaly_mode() -> None:
    apply, params, buffers = fs.functionalize(nn.AdaptiveLogSoftmaxWithLoss(4, 5, [2]))
    whole = fs.compile(apply, backend="aten", fullgraph=True)
    with pytest.raises(fs.TraceError, match="cannot be traced: it reads the value of a tensor"):
        fs.stage_vjp(whole, params, buffers, torch.randn(2, 4), torch.tensor([0, 4]))


class NaN(nn.Module):
    """Gives gradients that are not finite: of weights, and of inputs where it is asked to."""

    def __init__(self, of_inputs: bool) -> None:
        super().__init__()
        self.proj, self.scale = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
        self.of_inputs = of_inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) + self.scale.sqrt() * 0
        return (y * 0).sqrt() if self.of_inputs else y


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("backend", [None, "aten", "inductor"])
@pytest.mark.parametrize("phase", ["I", "W", "sum of W"])
def test_anomaly_mode_around_a_backward_finds_nan_or_is_refused(backend: Any, phase: str) -> None:
    apply, params, buffers = fs.functionalize(NaN(of_inputs=phase == "I"))
    stage = fs.compile(apply, backend=backend) if backend else apply
    x = torch.randn(2, 4)

    def run(anomaly: bool) -> None:
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        with torch.autograd.set_detect_anomaly(anomaly and phase == "I"):
            _, weight_pullback = pullback(torch.ones_like(output))
        with torch.autograd.set_detect_anomaly(anomaly and phase != "I"):
            try:
                weight_pullback() if phase == "W" else fs.stage_backward_weight([weight_pullback])
            except fs.StageError:
                assert not weight_pullback.consumed
                raise

    run(anomaly=False)
    found = "compiled.*uncompiled stage function" if backend else "returned nan values"
    with pytest.raises(fs.StageError if backend else RuntimeError, match=found):
        run(anomaly=True)


@pytest.mark.filterwarnings("ignore:Anomaly")
def test_anomaly_mode_without_its_check_leaves_compiled_stages_alone() -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(4, 4))
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        output, _, pullback = fs.stage_vjp(
            fs.compile(apply, backend="aten"), params, buffers, torch.randn(2, 4)
        )
        _, weight_pullback = pullback(torch.ones_like(output))
        assert weight_pullback()["bias"].eq(2).all()


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_compressed_sparse_constant_is_refused_with_a_layout_that_works(engine: str) -> None:
    def stage(constant: Tensor) -> tuple[Any, Any, Any]:
        apply, params, buffers = fs.functionalize(Stage(lambda module, x: constant @ module.proj(x)))
        return (apply if engine == "closures" else fs.compile(apply, backend="aten")), params, buffers

    x = torch.randn(4, 4)
    with pytest.raises(fs.StageError, match=r"compressed sparse layout \(Sparse CSR\)"):
        fs.stage_vjp(*stage(torch.eye(4).to_sparse_csr()), x)
    apply, params, buffers = stage(torch.eye(4).to_sparse_coo())
    apply = getattr(apply, "apply", apply)
    _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    torch.testing.assert_close(pullback(torch.ones(4, 4))[1]()["proj.bias"], torch.full((4,), 4.0))


def test_where_inductor_fails_programs_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from funcstage.engines.graph import inductor

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("a fault of the compiler's")

    monkeypatch.setattr(inductor, "compile_fx_inner", fail)
    module, x = nn.Linear(4, 4), torch.randn(2, 4)
    apply, params, buffers = fs.functionalize(module)
    with pytest.warns(UserWarning, match=r"backend='aten'.*a fault of the compiler's"):
        output, _, pullback = fs.stage_vjp(fs.compile(apply), params, buffers, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grads = pullback(torch.ones(2, 4))[1]()
    torch.testing.assert_close(output, module(x))
    torch.testing.assert_close(grads["weight"], x.sum(0).expand(4, 4))


def test_what_the_stage_raises_itself_is_raised_after_one_run() -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            runs.append(self)
            raise KeyError("the stage's own")

    runs: list[Any] = []
    apply, params, buffers = fs.functionalize(Raises())
    with pytest.raises(KeyError, match="the stage's own"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.ones(2, 3))
    assert len(runs) == 1


TORCHS = {name: signs for name, signs in vars(messages).items() if name.isupper()}


def takes_a_gradient(x: Tensor) -> Tensor:
    leaf = torch.ones(4, requires_grad=True)
    return torch.autograd.grad((leaf * leaf * x.detach()).sum(), leaf)[0]


@pytest.mark.parametrize("tape", [False, True])
@pytest.mark.parametrize("phase", ["F", "F, again", "I"])
@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("name", TORCHS)
def test_an_error_of_the_stages_own_may_say_what_torch_says(
    name: str, engine: str, phase: str, tape: bool
) -> None:
    signs = TORCHS[name]
    text = f"in layer 3: {signs if isinstance(signs, str) else signs[0]}"

    def raising(grad: Tensor) -> Tensor:
        raise RuntimeError(text)

    def forward(module: nn.Module, x: Tensor) -> Any:
        y: Tensor = module.proj(x) * (takes_a_gradient(x) if tape else 1)
        if phase == "I":
            y.register_hook(raising)
            return y
        try:
            return raising(y)
        except RuntimeError as error:
            if phase == "F":
                raise
            raise RuntimeError(text) from error

    apply, params, buffers = fs.functionalize(Stage(forward))
    if engine == "aten":
        apply = fs.compile(apply, backend=engine, fullgraph=True)
    with pytest.raises(RuntimeError) as caught:
        fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))[2](torch.ones(2, 4))
    assert type(caught.value) is RuntimeError
    assert str(caught.value) == text


def test_a_limit_of_the_trace_is_named_whatever_the_stage_says_to_it() -> None:
    apply, params, buffers = fs.functionalize(Stage(in_answer_to_torchs(ValueError, reads_a_value)))
    with pytest.raises(fs.TraceError, match=r"test_blame.py:\d+: in my layer. The uncompiled `apply` works"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.randn(2, 4))


def test_an_argument_is_overwritten_where_the_stage_answers_torchs_error_too() -> None:
    def overwrites(module: nn.Module, x: Tensor) -> Any:
        x *= 2
        return module.proj(x)

    module, x = Stage(in_answer_to_torchs(ValueError, overwrites)), torch.randn(2, 4)
    apply, params, buffers = fs.functionalize(module)
    output = fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x)[0]
    torch.testing.assert_close(output, module(x.clone()).detach())
