"""Stages that `cut` makes are the model: same values, gradients, buffers, names, and the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleZBVZeroBubble
from torch.nn import functional

import funcstage as fs
from funcstage.pipelining import CutError, FunctionalPipelineStage, cut, pipeline_value_and_grad

WIDTH = 6
LENGTH = 5


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Moody(nn.Module):
    """Does other things for other values: no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.usual, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.usual(x) if x.sum() > 0 else self.other(x)


class Layer(nn.Module):
    """Batch norm of every position, scaled by a value that all layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(LENGTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.norm(functional.gelu(self.linear(x))) * scale


class Decoder(nn.Module):
    """Embedding, a loop over layers, norm and head; values cross several cuts, and weights are tied."""

    positions: Tensor

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.start = nn.Parameter(torch.randn(16, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.register_buffer("positions", torch.arange(16.0), persistent=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        batch, length = tokens.shape
        x = first = self.embedding(tokens) + self.start[:length]
        scale = torch.cos(self.positions[:length]).unsqueeze(-1)
        if mask is not None:
            scale = scale * mask
        for layer in self.layers:
            x = layer(x, scale)
        logits = self.head(self.norm(x + first)).reshape(batch, length, -1)
        return {"logits": logits, "hidden": [x]}


def sequential() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.GELU(), nn.Linear(WIDTH, 3)]
    return nn.Sequential(*layers), torch.randn(12, WIDTH)


def nested() -> tuple[nn.Module, Tensor]:
    def body() -> nn.Sequential:
        return nn.Sequential(*(Residual(nn.Linear(WIDTH, WIDTH)) for _ in range(3)), nn.BatchNorm1d(WIDTH))

    model = nn.Sequential()
    model.add_module("stem", nn.Linear(WIDTH, WIDTH))
    model.add_module("body", nn.Sequential(body(), body()))
    model.add_module("head", nn.Linear(WIDTH, 3))
    return model, torch.randn(12, WIDTH)


def decoder() -> tuple[nn.Module, Tensor]:
    return Decoder(), torch.randint(11, (12, LENGTH))


CASES = {
    "a chain": (sequential, ["2", "4"], False),
    "a chain of chains": (nested, ["body.0.2", "body.1", "body.1.2"], False),
    "a decoder": (decoder, ["layers.1", "layers.3"], False),
    "a decoder cut everywhere": (decoder, ["layers.0", "layers.1", "layers.2", "layers.3", "norm"], False),
    "an exported decoder": (decoder, ["layers.1", "layers.3"], True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, list[nn.Module], nn.Module]:
    """A model, its input, its stages, and a copy of it that nothing has touched."""
    build, at, exported = CASES[request.param]
    torch.manual_seed(0)
    model, x = build()
    model.double()
    x = x.double() if x.is_floating_point() else x
    whole = copy.deepcopy(model)
    # Of a microbatch's size, of which the trace depends.
    return model, x, cut(model, at, example=(x[:2],) if exported else None), whole


def composed(stages: Iterable[nn.Module], x: Tensor) -> Any:
    value: Any = x
    for stage in stages:
        value = stage(*value) if type(value) is tuple else stage(value)
    return value


def loss_fn(output: Any, target: Tensor) -> Tensor:
    if isinstance(output, dict):
        return (output["logits"] - target).square().mean() + output["hidden"][0].square().mean()
    return (output - target).square().mean()


def target_for(model: nn.Module, x: Tensor) -> Tensor:
    output = copy.deepcopy(model)(x)
    return torch.rand_like(output["logits"] if isinstance(output, dict) else output)


def state(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers()])


def test_composed_stages_are_bitwise_the_model(case: Any) -> None:
    model, x, stages, whole = case
    x = x[:2]
    target = target_for(whole, x)
    ours, theirs = composed(stages, x), whole(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    loss_fn(ours, target).backward()
    loss_fn(theirs, target).backward()
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=0, msg=name)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_stages_hold_the_models_own_tensors_under_its_names(case: Any) -> None:
    model, _, stages, _ = case
    names = state(model)
    for stage in stages:
        for name, tensor in state(stage).items():
            assert tensor is names[name], name
    held = {tensor for stage in stages for tensor in state(stage).values()}
    assert held == set(names.values())
    saved = model.state_dict()
    for stage in stages:
        assert stage.state_dict().keys() <= saved.keys()


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_two_steps_of_the_pipeline_train_the_model(case: Any, engine: str) -> None:
    model, x, modules, whole = case
    targets = target_for(whole, x)
    stages = [fs.functionalize(module) for module in modules]
    compiled = [fs.compile(stage.apply, backend="aten") for stage in stages]
    step = pipeline_value_and_grad(
        compiled if engine == "aten" else stages, loss_fn, schedule="1F1B", num_microbatches=6
    )
    buffers = [stage.buffers for stage in stages]
    optimizer, reference = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, whole))
    for _ in range(2):
        loss, buffers, grads = step([stage.params for stage in stages], buffers, x, targets)
        for module, of_stage in zip(modules, grads, strict=True):
            for name, grad in of_stage.items():
                parameter = module.get_parameter(name)
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        optimizer.step()
        optimizer.zero_grad()
        losses = [loss_fn(whole(a), b) / 6 for a, b in zip(x.chunk(6), targets.chunk(6), strict=True)]
        for part in losses:
            part.backward()
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(loss, sum(losses).detach())  # type: ignore[union-attr]
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=1e-10, atol=1e-12, msg=name)
    expected_buffers = dict(whole.named_buffers())
    for of_stage in buffers:
        for name, buffer in of_stage.items():
            torch.testing.assert_close(buffer, expected_buffers[name], rtol=1e-10, atol=1e-12)


@pytest.fixture
def one_rank() -> Iterator[None]:
    with one_process():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("compile", [False, {"backend": "aten"}])
def test_torchs_schedules_train_cut_stages_and_tied_weights(exported: bool, compile: Any) -> None:
    torch.manual_seed(0)
    model = Decoder().double()
    whole = copy.deepcopy(model)
    x = torch.randint(11, (12, LENGTH))
    targets = target_for(whole, x)
    modules = cut(model, ["layers.2"], example=(x[:3],) if exported else None)

    stages = [
        FunctionalPipelineStage(module, i, 2, "cpu", compile=compile, loss_fn=loss_fn)
        for i, module in enumerate(modules)
    ]
    ScheduleZBVZeroBubble(stages, 4, loss_fn=stages[-1].loss_fn).step(x, target=targets)
    for part, target in zip(x.chunk(4), targets.chunk(4), strict=True):
        (loss_fn(whole(part), target) / 4).backward()
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_only_tensors_cross_a_cut_and_each_only_while_it_is_needed() -> None:
    stages = cut(Decoder(), ["layers.0", "layers.2", "norm"])
    value: Any = torch.randint(11, (3, LENGTH))
    crossing = []
    for stage in stages[:-1]:
        value = stage(*value) if type(value) is tuple else stage(value)
        crossing.append(sorted(tuple(part.shape) for part in value))
    activation, scale, tokens = (3, LENGTH, WIDTH), (LENGTH, 1), (3, LENGTH)
    # The tokens are sent for their size, which the last stage reads; the scale ends with the layers.
    assert crossing[0] == sorted([tokens, activation, scale])
    assert crossing[1] == sorted([tokens, activation, activation, scale])
    assert crossing[2] == sorted([tokens, activation, activation])


def test_without_an_example_stages_follow_the_batch_the_mode_and_data() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.drop = Moody(), Moody(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.drop(self.first(x)))

    traced, chain = Model(), nn.Sequential(Moody(), nn.Dropout(0.5), Moody())
    for model, name in ((traced, "second"), (chain, "2")):
        stages = cut(model, [name])
        for stage in stages:
            stage.eval()
        assert not any(part.training for part in model.children())
        model.eval()
        for x in (torch.randn(2, WIDTH), -torch.randn(7, WIDTH).abs(), torch.randn(3, 4, WIDTH).abs()):
            assert torch.equal(composed(stages, x), model(x))


class AsksForItsMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(functional.dropout(self.first(x), 0.5, self.training))
        return x if self.training else x.softmax(-1)


@pytest.mark.parametrize("exported", [False, True])
def test_stages_that_were_traced_in_one_mode_refuse_the_other(exported: bool) -> None:
    model = AsksForItsMode().eval()
    x = torch.randn(4, WIDTH)
    stages = cut(model, ["second"], example=(x,) if exported else None)
    assert torch.equal(composed(stages, x), model(x))
    stages[0].eval()
    with pytest.raises(CutError, match=r"evaluation mode.* train\(\)"):
        stages[0].train()
    assert not model.training


def test_with_an_example_optional_arguments_arrive_in_order_and_shapes_are_checked() -> None:
    model = Decoder(tied=False).double()
    tokens, mask = torch.randint(11, (2, LENGTH)), torch.rand(2, LENGTH, 1, dtype=torch.float64)
    stages = cut(model, ["layers.1", "norm"], example=(tokens,), kwargs={"mask": mask})
    expected = copy.deepcopy(model)(tokens, mask=mask)["logits"]
    value: Any = (tokens, mask)
    for stage in stages:
        value = stage(*value) if type(value) is tuple else stage(value)
    assert torch.equal(value["logits"], expected)
    with pytest.raises(
        fs.StageError, match=r"input 'tokens' of the first stage must be int64\[2, 5\].*int64\[3, 5\]"
    ):
        stages[0](torch.randint(11, (3, LENGTH)), mask)


def test_inputs_in_structures_arrive_as_their_tensors() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, scales: dict[str, Any], power: int = 1) -> tuple[Tensor, Tensor]:
            x = self.first(x) * scales["early"][0]
            return self.second(x) ** power * scales["late"], x

    model = Model()
    x, early, late = torch.randn(2, 3), torch.rand(3), torch.rand(3)
    scales = {"late": late, "early": [early]}
    stages = cut(model, ["second"], example=(x, scales), kwargs={"power": 2})
    torch.testing.assert_close(stages[1](*stages[0](x, late, early)), model(x, scales, 2), rtol=0, atol=0)


def test_the_model_is_left_as_it_was(case: Any) -> None:
    model, _, _, whole = case
    for part, expected in zip(model.modules(), whole.modules(), strict=True):
        assert vars(part).keys() == vars(expected).keys()
        assert part.training == expected.training
        assert not part._forward_pre_hooks


def test_constants_of_the_forward_are_in_the_stages_that_use_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            signs = torch.tensor([1.0, -1.0, 1.0])
            return self.second(self.first(x) * signs) * signs

    model, x = Model(), torch.randn(2, 3)
    for stages in (cut(model, ["second"]), cut(model, ["second"], example=(x,))):
        assert torch.equal(composed(stages, x), model(x))
        assert all(stage.state_dict().keys() <= model.state_dict().keys() for stage in stages)


def test_a_tuple_may_cross_between_the_slices_of_a_chain() -> None:
    class Pair(nn.Module):
        def forward(self, x: Any) -> tuple[Tensor, Tensor]:
            x, total = x if isinstance(x, tuple) else (x, x)
            return x.tanh(), total + x

    model, x = nn.Sequential(Pair(), Pair(), Pair()), torch.randn(3)
    torch.testing.assert_close(composed(cut(model, ["1", "2"]), x), model(x), rtol=0, atol=0)


def test_no_names_are_one_stage() -> None:
    model = nn.Linear(2, 2)
    assert cut(model, []) == [model]


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.twice(self.twice(self.first(x))))


class Branches(Reused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.twice(x) if x.sum() > 0 else x


class Noisy(Reused):
    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.first(x) + torch.rand(2))


class Counts(Reused):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.twice(self.first(x))


def hooked() -> nn.Module:
    model = Reused()
    model.register_forward_hook(lambda module, args, output: output + 1)
    return model


X = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("build", "at", "options", "says"),
    [
        (Decoder, ["layer.1"], {}, r"no submodule 'layer.1'; near it are 'layers.1'"),
        (Decoder, ["layers.3", "layers.1"], {}, r"order at=\['layers.1', 'layers.3'\]"),
        (sequential, ["3", "1"], {}, r"order at=\['1', '3'\]"),
        (Decoder, ["layers.1", "layers.1"], {}, r"'layers.1' twice"),
        (Decoder, "layers.1", {}, r"must be a list of names .* got 'layers.1'"),
        (Decoder, ["embedding"], {}, r"the stage that ends before 'embedding' would be empty"),
        (sequential, ["0"], {}, r"the stage that ends before '0' would be empty"),
        (nested, ["body", "body.0"], {}, r"the stage that ends before 'body.0' would be empty"),
        (Reused, ["twice"], {}, r"calls 'twice' 2 times"),
        (Reused, ["twice"], {"example": (X,)}, r"calls 'twice' 2 times"),
        (Reused, ["layers"], {}, r"never calls 'layers'. Name what is called in it, such as 'layers.0'"),
        (Reused, ["never"], {"example": (X,)}, r"never calls 'never'\.$"),
        (
            Branches,
            ["twice"],
            {},
            r"cannot be traced symbolically: .*control flow.* Pass `example`.*modules of your own",
        ),
        (Branches, ["twice"], {"example": (X,)}, r"torch.export cannot trace it: .*modules of your own"),
        (Noisy, ["twice"], {}, r"makes a tensor of float32\[2\] that differs from call to call"),
        (Counts, ["twice"], {}, r"its forward assigns 'calls'"),
        (hooked, ["layers.0"], {}, r"hooks are registered on Reused"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_way_out(
    build: Callable[[], Any], at: Any, options: dict[str, Any], says: str
) -> None:
    made = build()
    model = made[0] if isinstance(made, tuple) else made
    with pytest.raises(fs.StageError, match=says):
        cut(model, at, **options)
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert all(isinstance(buffer, Tensor) for buffer in model.buffers())
