"""Tensors that a forward makes, marks, packs or keeps, against eager autograd of the same module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_inner_gradients import ARGNUMS, ENGINES, assert_same_gradients, eager_gradients, staged
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.testing import check_stage


class Layers(nn.Module):
    """Layers, and what a case makes of them."""

    def __init__(self, case: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.proj, self.norm, self.emb = nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(9, 3)
        self.gru, self.lstm = nn.GRU(3, 3, batch_first=True), nn.LSTM(3, 3, batch_first=True)
        self.register_buffer("scale", torch.ones(3))
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def buffer_made(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x) * nn.Buffer(torch.full((3,), 2.0, dtype=x.dtype))


def buffer_of_an_activation(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    return y * nn.Buffer(y)


def parameter_made(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x) * nn.Parameter(torch.full((3,), 2.0, dtype=x.dtype))


def parameter_of_an_activation(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    return y * nn.Parameter(y)


def parameter_of_a_parameter(s: Layers, x: Tensor) -> Tensor:
    return F.linear(x, nn.Parameter(s.proj.weight)) + s.proj(x)


def constant_parameter(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x) * nn.Parameter(torch.full((3,), 2.0, dtype=x.dtype), requires_grad=False)


def detached_and_unmarked(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    return y * y.detach().requires_grad_(False)


def unmarked_by_attribute(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    constant = y.detach()
    constant.requires_grad = False
    return y * constant


def weight_detached_and_unmarked(s: Layers, x: Tensor) -> Tensor:
    return F.linear(x, s.proj.weight.detach().requires_grad_(False)) + s.proj(x)


def marked_by_attribute(s: Layers, x: Tensor) -> Tensor:
    features = x.detach() * 2
    features.requires_grad = True
    return s.proj(features)


def marked_at_birth(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x) * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype, requires_grad=True)


def marked_twice(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x).requires_grad_() + s.proj.weight.requires_grad_().sum()


def data_read(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    return y * y.data + x.data @ s.proj.weight.data


def data_written_by_operation(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    y.data.mul_(2)
    return y.tanh()


def detached_in_place(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x).detach_() + s.norm(x)


def linear_made(s: Layers, x: Tensor) -> Tensor:
    return nn.Linear(3, 3, dtype=x.dtype)(s.proj(x))


def linear_made_first(s: Layers, x: Tensor) -> Tensor:
    return s.proj(nn.Linear(3, 3, bias=False, dtype=x.dtype)(x))


def layers_made(s: Layers, x: Tensor) -> Tensor:
    kind = {"dtype": x.dtype}
    layers = nn.Linear(3, 8, **kind), nn.ReLU(), nn.LayerNorm(8, **kind), nn.BatchNorm1d(8, **kind)
    return nn.Sequential(*layers, nn.Linear(8, 3, **kind))(s.proj(x))


def embedding_made(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x) + nn.Embedding(3, 3, dtype=x.dtype)(torch.tensor([0, 1]))


def initialised(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x) @ nn.init.orthogonal_(nn.Parameter(torch.empty(3, 3, dtype=x.dtype)))


def filled_without_gradients(s: Layers, x: Tensor) -> Tensor:
    weight = nn.Parameter(torch.empty(3, dtype=x.dtype))
    with torch.no_grad():
        weight.copy_(s.proj.bias)
        weight[1:] = 2
        weight += 1
    return s.proj(x) * weight


def filled_constant(s: Layers, x: Tensor) -> Tensor:
    weight = nn.Parameter(torch.empty(3, dtype=x.dtype), requires_grad=False)
    return s.proj(x) * weight.uniform_()


MADE = [
    linear_made,
    linear_made_first,
    layers_made,
    embedding_made,
    initialised,
    filled_without_gradients,
    filled_constant,
    buffer_made,
    buffer_of_an_activation,
    parameter_made,
    parameter_of_an_activation,
    parameter_of_a_parameter,
    constant_parameter,
    detached_and_unmarked,
    unmarked_by_attribute,
    weight_detached_and_unmarked,
    marked_by_attribute,
    marked_at_birth,
    marked_twice,
    data_read,
    data_written_by_operation,
    detached_in_place,
]


def made(case: Any) -> tuple[Layers, Tensor]:
    torch.manual_seed(0)
    return Layers(case).double(), torch.randn(2, 3, dtype=torch.float64)


def assert_as_eager(module: nn.Module, x: Tensor, engine: str, argnums: Any) -> None:
    expected, dx, grads, _ = eager_gradients(copy.deepcopy(module), x, argnums)
    torch.manual_seed(1)
    apply, params, buffers = staged(module, engine)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
    torch.testing.assert_close(output, expected)
    (found,), weight_pullback = pullback(torch.ones_like(output))
    assert_same_gradients({"x": found, **weight_pullback()}, {"x": dx, **grads})
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.supports("parameters and buffers made in the forward, `requires_grad_` on its own tensors")
@ARGNUMS
@ENGINES
@pytest.mark.parametrize("case", MADE, ids=lambda case: case.__name__)
def test_a_forward_may_make_and_mark_tensors(case: Any, engine: str, argnums: Any) -> None:
    module, x = made(case)
    assert_as_eager(module, x, engine, argnums)


def freezes_a_weight(s: Layers, x: Tensor) -> Tensor:
    s.proj.weight.requires_grad_(False)
    return s.proj(x)


def freezes_a_module(s: Layers, x: Tensor) -> Tensor:
    s.proj.requires_grad_(False)
    return s.proj(x)


def freezes_by_attribute(s: Layers, x: Tensor) -> Tensor:
    s.proj.weight.requires_grad = False
    return s.proj(x)


def freezes_the_input(s: Layers, x: Tensor) -> Tensor:
    x.requires_grad_(False)
    return s.proj(x)


def freezes_late(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    s.proj.bias.requires_grad = False
    return y


def thaws(s: Layers, x: Tensor) -> Tensor:
    return s.proj(x) * s.frozen.requires_grad_()


def is_sensitive_to_what_is_frozen(s: Layers, x: Tensor) -> Tensor:
    point = s.frozen.detach().requires_grad_()
    gradient = torch.autograd.grad((s.proj(x) * point).tanh().sum(), point, create_graph=True)[0]
    return s.proj(x) * gradient


@ARGNUMS
@ENGINES
def test_a_gradient_may_be_taken_at_a_frozen_parameter(engine: str, argnums: Any) -> None:
    module, x = made(is_sensitive_to_what_is_frozen)
    module.frozen = nn.Parameter(torch.ones(3).to(x), requires_grad=False)
    expected, dx, grads, _ = eager_gradients(copy.deepcopy(module), x, argnums)
    grads.pop("frozen", None)
    apply, params, buffers = staged(module, engine)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
    torch.testing.assert_close(output, expected)
    (found,), weight_pullback = pullback(torch.ones_like(output))
    assert_same_gradients({"x": found, **weight_pullback()}, {"x": dx, **grads})


@ARGNUMS
@ENGINES
@pytest.mark.parametrize(
    "case", [freezes_a_weight, freezes_a_module, freezes_by_attribute, freezes_late, thaws]
)
def test_a_mark_on_a_parameter_is_refused_by_name(case: Any, engine: str, argnums: Any) -> None:
    module, x = made(case)
    module.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    apply, params, buffers = staged(module, engine)
    name = (
        r"requires_grad_\(\) on buffers?.*'frozen'"
        if case is thaws
        else r"freezes param.*'proj\.(weight|bias)'"
    )
    with pytest.raises(fs.PurityError, match=rf"{name}.* before functionalize[.;,]"):
        fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
    assert not module.frozen.requires_grad


@ENGINES
def test_a_mark_on_a_differentiated_input_is_refused_by_name(engine: str) -> None:
    module, x = made(freezes_the_input)
    apply, params, buffers = staged(module, engine)
    with pytest.raises(fs.PurityError, match=r"freezes .*\[0\].* read tensor\.detach\(\)"):
        fs.stage_vjp(apply, params, buffers, x)


@ENGINES
def test_the_mark_cannot_be_taken_from_a_computed_tensor_as_in_eager(engine: str) -> None:
    module, x = made(lambda s, x: s.proj(x).requires_grad_(False))
    with pytest.raises(RuntimeError, match="can only change requires_grad flags of leaf") as eagers:
        module(x.requires_grad_())
    apply, params, buffers = staged(module, engine)
    with pytest.raises(RuntimeError, match="can only change requires_grad flags of leaf") as ours:
        fs.stage_vjp(apply, params, buffers, x.detach())
    assert type(ours.value) is type(eagers.value)


@ARGNUMS
@ENGINES
def test_a_write_into_a_parameter_that_was_made_is_torchs_error_as_in_eager(
    engine: str, argnums: Any
) -> None:
    def case(s: Layers, x: Tensor) -> Tensor:
        return s.proj(x) * nn.Parameter(torch.empty(3, dtype=x.dtype)).uniform_()

    module, x = made(case)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad") as eagers:
        module(x)
    apply, params, buffers = staged(module, engine)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad") as ours:
        fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
    assert type(ours.value) is type(eagers.value)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda made, value: made.copy_(value), "copy_"),
        (lambda made, value: made.add_(other=value), "add_"),
        (lambda made, value: made.addcmul_(value.new_ones(3), tensor2=value), "addcmul_"),
        (lambda made, value: torch.add(made, made, out=made).mul_(other=value), "mul_"),
    ],
)
def test_an_activation_written_into_a_parameter_that_was_made_is_eagers_or_refused(
    write: Callable[[Tensor, Tensor], Tensor], name: str
) -> None:
    def case(s: Layers, x: Tensor) -> Tensor:
        made = nn.Parameter(torch.ones(3, dtype=x.dtype), requires_grad=False)
        return s.proj(x) * write(made, s.proj(x).sum(0))

    module, x = made(case)
    assert_as_eager(module, x, "aten", None)
    apply, params, buffers = staged(module, "closures")
    with pytest.raises(fs.PurityError, match=rf"a parameter that it made itself \(float64\[3\].*{name}\."):
        fs.stage_vjp(apply, params, buffers, x)


def assigns_data(s: Layers, x: Tensor) -> Tensor:
    s.proj.weight.data = s.proj.weight.data * 2
    return s.proj(x)


def assigns_data_of_the_input(s: Layers, x: Tensor) -> Tensor:
    x.data = x.data * 2
    return s.proj(x)


def assigns_data_of_an_activation(s: Layers, x: Tensor) -> Tensor:
    y = s.proj(x)
    y.data = y.data * 2
    return y.tanh()


def assigns_data_beside_a_gradient(s: Layers, x: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda x: s.norm(x).square().sum())(x)
    s.proj.weight.data = s.proj.weight.data * 2
    return s.proj(gradient)


def assigns_data_of_a_buffer(s: Layers, x: Tensor) -> Tensor:
    s.scale.data = s.scale.data * 2
    return s.proj(x) * s.scale


def writes_into_data(s: Layers, x: Tensor) -> Tensor:
    s.proj.weight.data.clamp_(-0.1, 0.1)
    return s.proj(x)


def writes_into_data_of_the_input(s: Layers, x: Tensor) -> Tensor:
    x.data.mul_(2)
    return s.proj(x)


@ARGNUMS
@ENGINES
@pytest.mark.parametrize(
    "case",
    [
        freezes_a_weight,
        freezes_a_module,
        freezes_by_attribute,
        assigns_data,
        assigns_data_of_the_input,
        assigns_data_of_an_activation,
        assigns_data_beside_a_gradient,
        assigns_data_of_a_buffer,
        writes_into_data,
    ],
)
def test_marks_and_data_of_what_a_stage_was_given_are_refused(case: Any, engine: str, argnums: Any) -> None:
    module, x = made(case)
    apply, params, buffers = staged(module, engine)
    before = {name: p.clone() for name, p in {**params, **buffers, "x": x}.items()}
    for _ in range(2):
        with pytest.raises(fs.StageError if case.__name__.startswith("freezes") else fs.PurityError):
            fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
    assert_same_gradients({**params, **buffers, "x": x}, before)
    assert all(p.requires_grad for p in module.parameters())


@ENGINES
def test_retain_grad_is_refused(engine: str) -> None:
    module, x = made(lambda s, x: (y := s.proj(x)).retain_grad() or y)
    with pytest.raises(fs.StageError, match=r"retain_grad.*register_hook"):
        fs.stage_vjp(*staged(module, engine), x)


def packed_gru(s: Layers, x: Tensor) -> Tensor:
    packed = rnn.pack_padded_sequence(s.emb(x), torch.tensor([4, 2]), batch_first=True)
    return rnn.pad_packed_sequence(s.gru(packed)[0], batch_first=True)[0]


def packed_lstm(s: Layers, x: Tensor) -> Tensor:
    packed = rnn.pack_padded_sequence(s.emb(x), torch.tensor([2, 4]), batch_first=True, enforce_sorted=False)
    output, (hidden, cell) = s.lstm(packed)
    return rnn.pad_packed_sequence(output, batch_first=True)[0].sum(1) + hidden[0] + cell[0]


def packed_and_normalised(s: Layers, x: Tensor) -> Tensor:
    packed = rnn.pack_padded_sequence(s.emb(x), torch.tensor([4, 2]), batch_first=True)
    return rnn.pad_packed_sequence(s.gru(packed._replace(data=s.norm(packed.data)))[0], batch_first=True)[0]


def unpacked(s: Layers, x: Tensor) -> Tensor:
    packed = rnn.pack_sequence([s.emb(x)[0], s.emb(x)[1][:2]])
    return rnn.pad_sequence(rnn.unpack_sequence(s.gru(packed)[0]), batch_first=True)


@pytest.mark.parametrize("case", [packed_gru, packed_lstm, packed_and_normalised, unpacked])
def test_packed_sequences_may_come_out_of_an_embedding(case: Any) -> None:
    module, _ = made(case)
    tokens = torch.randint(9, (2, 4))
    grads = torch.autograd.grad(module(tokens).sum(), [*module.parameters()], allow_unused=True)
    expected = dict(zip(dict(module.named_parameters()), grads, strict=True))
    apply, params, buffers = staged(module, "closures")
    output, _, pullback = fs.stage_vjp(apply, params, buffers, tokens)
    assert_same_gradients(pullback(torch.ones_like(output))[1](), expected)
    in_parts = fs.compile(apply, backend="aten", fullgraph=False)
    _, _, pullback = fs.stage_vjp(in_parts, params, buffers, tokens)
    assert_same_gradients(pullback(torch.ones_like(output))[1](), expected)


def keeping(what: Callable[[Layers, Tensor], Tensor], reentrant: bool) -> Any:
    def case(s: Layers, x: Tensor) -> Tensor:
        kept = []

        def region(x: Tensor) -> Tensor:
            logits = s.proj(x)
            kept.append(what(s, logits))
            return x * logits.softmax(-1)

        for _ in range(2):
            x = checkpoint(region, x, use_reentrant=reentrant)
        return x + sum(k.square().mean() for k in kept)

    return case


def on_the_module(s: Layers, x: Tensor) -> Tensor:
    def region(x: Tensor) -> Tensor:
        s.__dict__["logits"] = s.proj(x)
        return x * s.__dict__["logits"].softmax(-1)

    y = checkpoint(region, x, use_reentrant=False)
    return y + s.__dict__.pop("logits").square().mean()


def read_in_another_region(s: Layers, x: Tensor) -> Tensor:
    kept = []

    def first(x: Tensor) -> Tensor:
        kept.append(s.proj(x))
        return kept[0].tanh()

    y = checkpoint(first, x, use_reentrant=False)
    return checkpoint(lambda y: s.norm(y) * kept[0], y, use_reentrant=False)


def of_both_kinds(s: Layers, x: Tensor) -> Tensor:
    kept = []

    def region(layer: nn.Module, x: Tensor) -> Tensor:
        kept.append(layer(x))
        return kept[-1].tanh()

    y = checkpoint(region, s.proj, x, use_reentrant=True)
    z = checkpoint(region, s.norm, y, use_reentrant=False)
    return z + kept[0] * kept[1]


def result_kept_too(s: Layers, x: Tensor) -> Tensor:
    kept = []

    def region(x: Tensor) -> Tensor:
        kept.append(s.proj(x).relu_())
        return kept[-1]

    return checkpoint(region, x, use_reentrant=True) * 2


KEPT = {
    "activation": keeping(lambda s, logits: logits, reentrant=False),
    "of parameters": keeping(lambda s, logits: s.proj.weight.sum(0), reentrant=False),
    "detached": keeping(lambda s, logits: logits.detach(), reentrant=False),
    "indices": keeping(lambda s, logits: logits.argmax(-1).double(), reentrant=False),
    "reentrant": keeping(lambda s, logits: logits, reentrant=True),
    "on the module": on_the_module,
    "in another region": read_in_another_region,
    "both kinds": of_both_kinds,
    "result": result_kept_too,
}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@ARGNUMS
@ENGINES
@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT.keys())
def test_what_a_checkpointed_region_keeps_is_read_outside_as_in_eager(
    case: Any, engine: str, argnums: Any
) -> None:
    module, x = made(case)
    assert_as_eager(module, x, engine, argnums)


class Attends(nn.Module):
    """Attention and a distance, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(query=q, key=k, value=v)
        return y + torch.cdist(x1=q, x2=k) @ v


@ENGINES
def test_operations_are_called_by_keyword_alone_under_autocast(engine: str) -> None:
    torch.manual_seed(0)
    module, x = Attends(), torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        check_stage(module, x, engines=engine)
        expected = module(x)
        torch.testing.assert_close(fs.stage_vjp(*staged(module, engine), x)[0], expected)


class Stepped(nn.Module):
    """Recurrent cells and a layer, called by keyword, and a buffer that is initialised so."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.layer = nn.GRUCell(3, 3), nn.GRU(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = {"w_ih": self.cell.weight_ih, "w_hh": self.cell.weight_hh}
        hidden = torch.gru_cell(input=x, hx=x, **weights, b_ih=self.cell.bias_ih, b_hh=self.cell.bias_hh)
        noise = nn.init.constant_(tensor=torch.empty_like(x), val=0.5)
        options = {
            "num_layers": 1,
            "dropout": 0.0,
            "train": True,
            "bidirectional": False,
            "batch_first": False,
        }
        return torch.gru(
            input=hidden[None] + noise,
            hx=x[None],
            params=self.layer._flat_weights,
            has_biases=True,
            **options,
        )[0]


@ENGINES
def test_recurrent_operations_are_called_by_keyword_alone(engine: str) -> None:
    check_stage(Stepped().double(), torch.randn(2, 3, dtype=torch.float64), engines=engine)
