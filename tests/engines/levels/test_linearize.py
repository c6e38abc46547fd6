"""Module by module, the closures engine against plain eager autograd: values, None, buffers and FLOPs.

`property_tests/` compose these at random; here each construct stands alone, under its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcstage as fs
from funcstage import testing

check_stage = functools.partial(testing.check_stage, engines="closures")

r = torch.randn
SEQUENCE = (4, 2, 3)


class Stage(nn.Module):
    """A linear layer, a matrix and a vector, with a forward pass of one's own."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3)
        self.w = nn.Parameter(r(3, 3))
        self.p = nn.Parameter(r(3))
        self.body = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2])
        output, hidden = self.layer(packed)
        return nn.utils.rnn.pad_packed_sequence(output, total_length=5)[0], hidden


class Product(torch.autograd.Function):
    """A matrix product that computes what is needed."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad
        return grad @ w.t() if needs_x else None, x.t() @ grad if needs_w else None


def tied() -> nn.Module:
    stage = Stage(lambda s, x: s.m(torch.tanh(s.l(x))) @ s.l.weight.t() + s.l(s.l(x)))
    stage.m = nn.Linear(3, 3)
    stage.m.weight = stage.l.weight
    return stage


def lora() -> nn.Module:
    stage = Stage(lambda s, x: F.linear(x, s.l.weight + s.w[:, :1] @ s.w[:1], s.l.bias))
    stage.l.requires_grad_(False)
    return stage


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "Linear on three axes": (lambda: nn.Linear(3, 4), (2, 5, 3)),
    "MLP": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), (2, 3)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 8)),
    "Conv2d, grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1), (2, 4, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3), (1, 2, 4, 4, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 4, 4)),
    "BatchNorm1d": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (5, 3)),
    "BatchNorm2d": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (2, 3, 4, 4)),
    "BatchNorm with a cumulative average": (lambda: nn.BatchNorm1d(3, momentum=None), (5, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(3), (2, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(3), (2, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 5)),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (2, 3, 5)),
    "LocalResponseNorm": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.LocalResponseNorm(2)), (2, 3, 5)),
    "PReLU": (lambda: nn.Sequential(nn.PReLU(), nn.Linear(3, 3)), (2, 3)),
    "Dropout": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout()), (4, 3)),
    "Dropout2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Dropout2d()), (2, 2, 3, 3)),
    "AlphaDropout": (lambda: nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout()), (4, 3)),
    "FeatureAlphaDropout": (lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.FeatureAlphaDropout()), (2, 2, 3)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True), (2, 5, 8)),
    "encoder layer, gelu": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu), (5, 2, 8)),
    "LSTM": (lambda: nn.LSTM(3, 4), SEQUENCE),
    "LSTM, deep": (lambda: nn.LSTM(3, 4, 3, bidirectional=True, dropout=0.5), SEQUENCE),
    "LSTM, projected": (lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True), SEQUENCE),
    "GRU": (lambda: nn.GRU(3, 4, 2, bidirectional=True, dropout=0.5), SEQUENCE),
    "GRU without biases": (lambda: nn.GRU(3, 4, bias=False, batch_first=True), SEQUENCE),
    "RNN": (lambda: nn.RNN(3, 4, 2, nonlinearity="relu"), SEQUENCE),
    "LSTM, packed": (lambda: Packed(nn.LSTM(3, 4, 2, bidirectional=True, dropout=0.5)), SEQUENCE),
    "GRU, packed": (lambda: Packed(nn.GRU(3, 4, 2, bidirectional=True)), SEQUENCE),
    "RNN, packed": (lambda: Packed(nn.RNN(3, 4)), SEQUENCE),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (2, 3)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), (2, 3)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), (2, 3)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), (2, 3)),
    "orthogonal weights": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), (2, 3)),
    "tied weights": (tied, (4, 3)),
    "LoRA": (lora, (4, 3)),
}

BODIES: dict[str, Callable[..., Any]] = {
    "a parameter detached": lambda s, x: s.l(x) @ s.w.detach() + x * s.p.data,
    "a parameter transposed": lambda s, x: x @ s.w.T + x @ s.w.mT + (s.w.real * 1)[0],
    "parameters concatenated": lambda s, x: torch.cat([x, s.w, x]) @ torch.cat([s.w, s.w], 1),
    "parameters stacked": lambda s, x: torch.where(x > 0, s.p, x) + torch.stack([s.p] * 4),
    "parameters cast": lambda s, x: (x.to(torch.bfloat16) @ s.w.to(torch.bfloat16)).float(),
    "parameters that meet no input": lambda s, x: (s.l(x), s.w * 2, s.p, s.w.unbind(0)[0]),
    "positions": lambda s, x: s.l(x + s.w[[0, 1, 2, 2]]),
    "no parameter": lambda s, x: x.sin(),
    "an input as output": lambda s, x: (x, x[:1], s.l(x), x.t()),
    "views as outputs": lambda s, x: (*s.l(x).chunk(2, 1), s.l(x).t(), *x.unbind(0)),
    "indices as outputs": lambda s, x: (torch.topk(s.l(x), 2), torch.max(x * s.p, 1), s.l(x) > 0),
    "sorted": lambda s, x: torch.sort(x * s.p, dim=1),
    "einsum": lambda s, x: torch.einsum("bi,ij->bj", x, s.w),
    "products by keywords": lambda s, x: torch.addmm(s.p, x, s.w, beta=2.0) + F.linear(input=x, weight=s.w),
    "a chain of products": lambda s, x: torch.linalg.multi_dot([x, s.w, s.w]),
    "a factorisation": lambda s, x: torch.linalg.svdvals(x @ s.w),
    "an inverse": lambda s, x: x @ torch.linalg.inv(s.w),
    "an embedding of an input": lambda s, x: F.embedding((x > 0).long(), s.w) * x[..., None],
    "a loss": lambda s, x: F.cross_entropy(s.l(x), torch.tensor([0, 1, 2, 0])),
    "distances": lambda s, x: torch.cdist(x, s.w),
    "gumbel noise": lambda s, x: F.gumbel_softmax(s.l(x), hard=True),
    "random relu": lambda s, x: F.rrelu(s.l(x), training=True),
    "dropout of a transposed value": lambda s, x: F.dropout(s.l(x).t(), 0.5),
    "dropout in place": lambda s, x: F.dropout(s.l(x), 0.5, inplace=True),
    "dropout of everything": lambda s, x: F.dropout(s.l(x), 1.0) + s.l(x),
    "attention with dropout": lambda s, x: F.scaled_dot_product_attention(
        s.l(x)[None], x[None], s.l(x)[None], dropout_p=0.4
    ),
    "values that steer": lambda s, x: s.l(x) if x.sum().item() > 0 else s.l(x * 2),
    "no grad inside": lambda s, x: s.l(x) + _without_grad(s, x),
    "written in place, by a parameter": lambda s, x: (x * 2).add_(s.p).mul_(2),
    "written in place, through a view": lambda s, x: _through_a_view(s, x),
    "written in place, into zeros": lambda s, x: torch.zeros(4, 3).scatter_add_(
        0, torch.zeros(4, 3).long(), x * s.p
    ),
    "written in place, parameters alone": lambda s, x: _into_a_parameter_value(s, x),
    "written in place, and then transposed": lambda s, x: _transposed_afterwards(s, x),
    "written in place, and kept as it was": lambda s, x: _written_twice(s, x),
    "written in place, parameters into zeros": lambda s, x: _parameters_into_zeros(s, x),
    "written into a result, where nothing is recorded": lambda s, x: s.l(x) + _out_without_grad(s, x),
    "written in place, by index": lambda s, x: x.clone().index_put_((torch.tensor([0, 1]),), s.p),
    "written in place, masked": lambda s, x: (x * s.p).masked_fill_(x > 0, 0.0),
    "written in place, a product": lambda s, x: (x * 1).addmm_(x, s.w),
    "written in place, item by item": lambda s, x: _item_by_item(s, x),
    "a transform inside": lambda s, x: s.l(torch.vmap(lambda row: s.w @ row)(x)),
    "a hook on an activation": lambda s, x: _hooked(s, x),
    "an autograd function": lambda s, x: s.l(Product.apply(x, s.w)),
    "autocast inside": lambda s, x: _autocast(s, x),
    "a device context inside": lambda s, x: _device_context(s, x),
}


def _without_grad(s: Stage, x: Tensor) -> Tensor:
    with torch.no_grad():
        return s.l(x)


def _through_a_view(s: Stage, x: Tensor) -> Tensor:
    y = x * 2
    y[:2].add_(s.p)
    return s.l(y)


def _into_a_parameter_value(s: Stage, x: Tensor) -> Any:
    q = s.w.clone()
    q[:2] += x[:2]
    q.add_(x[:3])
    q.tanh_()
    return s.l(q * 1), q


def _transposed_afterwards(s: Stage, x: Tensor) -> Any:
    q = s.w.clone()
    q[:2] += x[:2]
    q.requires_grad_()
    return x @ q.T, x @ q.mT, q.real * 2, q.chunk(3), torch.cat([q, x])


def _written_twice(s: Stage, x: Tensor) -> Any:
    q = s.w.clone()
    row = q[0]
    q += x[:3]
    first = q + s.p
    q += x[1:]
    return row.sin(), first, q @ s.w, x.tanh() @ q


def _out_without_grad(s: Stage, x: Tensor) -> Tensor:
    made = torch.zeros(4, 3)
    with torch.no_grad():
        torch.sin(x, out=made)
        torch.add(made, s.p, out=made)
    return made


def _parameters_into_zeros(s: Stage, x: Tensor) -> Tensor:
    buffer = torch.zeros(3, 3)
    buffer[1:] = s.w[1:]
    buffer[0].add_(s.p)
    return x @ buffer


def _item_by_item(s: Stage, x: Tensor) -> Tensor:
    y = s.l(x)
    y[:, 0] = s.p[0]
    y[1:2] = x[:1] * 3
    return y @ s.w


def _hooked(s: Stage, x: Tensor) -> Tensor:
    h = s.l(x)
    h.register_hook(lambda grad: grad * 2)
    return s.l(h.sin())


def _autocast(s: Stage, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return s.l(F.layer_norm(s.l(x), (3,), s.p, s.p)).float()


def _device_context(s: Stage, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return s.l(x) + torch.zeros(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_split_as_eager_would_run_it(name: str, dtype: torch.dtype) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    report = check_stage(make().to(dtype), r(shape, dtype=dtype))
    (found,) = report.engines.values()
    assert found.flops is not None


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm", "Dropout", "encoder layer"])
def test_a_module_in_eval_mode_is_split_as_eager_would_run_it(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    check_stage(make().eval(), r(shape))


@pytest.mark.parametrize("name", BODIES)
def test_an_operation_is_split_as_eager_would_run_it(name: str) -> None:
    torch.manual_seed(0)
    # A parameter that is written into an activation's memory has its gradient computed on the way, in I.
    in_i = name in ("written in place, a product", "written in place, parameters into zeros")
    check_stage(Stage(BODIES[name]), r(4, 3), flops=not in_i)


OVERWRITING: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a method": (lambda x, p: x.mul_(p), lambda x, p: x * p),
    "a function": (lambda x, p: torch.relu_(x), lambda x, p: x.relu()),
    "an operator": (lambda x, p: torch.ops.aten.mul_.Tensor(x, p), lambda x, p: x * p),
    "twice": (lambda x, p: (x.mul_(p), x.add_(x)), lambda x, p: x * p * 2),
    "by itself": (lambda x, p: x.mul_(x), lambda x, p: x * x),
    "by index": (lambda x, p: x.__setitem__(0, p), lambda x, p: torch.cat([p[None], x[1:]])),
}


@pytest.mark.parametrize("how", OVERWRITING)
def test_an_argument_that_is_overwritten_is_another_from_there_on_and_the_callers_stays(how: str) -> None:
    write, instead = OVERWRITING[how]
    torch.manual_seed(0)
    params, x, other = {"p": r(3)}, r(4, 3), r(4, 3)
    before = x.clone()

    def writes(params: Any, buffers: Any, x: Tensor, other: Tensor) -> Any:
        y = x.sin()
        write(x, params["p"])
        return (x * other, x.cos() * y, x), buffers

    def makes(params: Any, buffers: Any, x: Tensor, other: Tensor) -> Any:
        y = x.sin()
        x = instead(x, params["p"])
        return (x * other, x.cos() * y, x), buffers

    found = []
    for apply in (writes, makes):
        output, _, pullback = fs.stage_vjp(apply, params, {}, x, other)
        grads, weight_pullback = pullback(tuple(map(torch.ones_like, output)))
        found.append([*output, *grads, *weight_pullback().values()])
    torch.testing.assert_close(*found)
    assert torch.equal(x, before)


WRITING: dict[str, Callable[..., Any]] = {
    "an argument, by keyword alone": lambda x, p, b: torch.relu_(input=x),
    "an argument, as a result": lambda x, p, b: torch.sin(b, out=x),
    "an argument, through a view": lambda x, p, b: x[0].add_(1),
    "an argument among others": lambda x, p, b: torch._foreach_add_([b + 1, x], 1),
    "a parameter": lambda x, p, b: p.add_(1),
    "a parameter, as a result": lambda x, p, b: torch.sin(b, out=p),
    "a parameter, through a view": lambda x, p, b: p[:1].zero_(),
}


@pytest.mark.parametrize("how", WRITING)
def test_what_else_writes_into_what_the_caller_has_given_is_refused_by_name(how: str) -> None:
    x, p, b = r(3), r(3), r(3)
    before = x.clone(), p.clone(), b.clone()

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        with torch.no_grad():
            WRITING[how](x, params["p"], buffers["b"])
        return x * params["p"], buffers

    with pytest.raises(fs.PurityError, match=r"argument " if "argument" in how else r"parameter \["):
        fs.stage_vjp(apply, {"p": p}, {"b": b}, x)
    assert all(map(torch.equal, (x, p, b), before))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes_are_split() -> None:
    module = nn.utils.weight_norm(nn.Linear(3, 4))  # cannot be copied, hence by hand
    x, cotangent = r(2, 3), r(2, 4)
    _, _, pullback = fs.stage_vjp(*fs.functionalize(module), x)
    (dx,), weight_pullback = pullback(cotangent)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(leaf), [leaf, *module.parameters()], cotangent)
    assert all(map(torch.equal, [dx, *weight_pullback().values()], expected))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_and_inputs_are_split(dtype: torch.dtype) -> None:
    module = Stage(lambda s, x: (s.l(x).tanh() @ s.w, s.l(x).abs(), s.l(x).real)).to(dtype)
    check_stage(module, r(4, 3, dtype=dtype))


def test_attention_with_several_inputs_masks_and_keywords_is_split() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True, kdim=6, vdim=4)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, weights: bool) -> Any:
            return self.attention(q, k, v, attn_mask=mask, need_weights=weights)

    mask = torch.zeros(5, 7).masked_fill_(torch.ones(5, 7).triu(3) > 0, float("-inf"))
    for weights in (True, False):
        check_stage(Attention(), r(2, 5, 8), r(2, 7, 6), r(2, 7, 4), mask=mask, weights=weights)
    check_stage(nn.TransformerDecoderLayer(8, 2, 16, 0.3), r(5, 2, 8), r(6, 2, 8))
    check_stage(nn.Transformer(8, 2, 1, 1, 16, batch_first=True), r(2, 5, 8), r(2, 6, 8))


def test_a_composite_function_is_not_one_big_site() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    apply, params, buffers = fs.functionalize(module)
    x = r(2, 5, 8)
    _, _, pullback = fs.stage_vjp(lambda p, b, x: apply(p, b, x, x, x), params, buffers, x)
    assert len(pullback._tape.sites) >= 2  # type: ignore[union-attr]  # the projections in and out


def test_bilinear_layers_and_bags_are_split() -> None:
    check_stage(nn.Bilinear(3, 4, 5), r(2, 3), r(2, 4))
    check_stage(nn.EmbeddingBag(10, 3), torch.randint(0, 10, (4, 5)))
    check_stage(nn.EmbeddingBag(10, 3, mode="sum"), torch.randint(0, 10, (4, 5)), per_sample_weights=r(4, 5))
    check_stage(nn.Embedding(10, 3, padding_idx=0), torch.randint(0, 10, (4, 5)))


def test_sparse_gradients_stay_sparse() -> None:
    module = nn.Embedding(10, 3, sparse=True)
    apply, params, buffers = fs.functionalize(module)
    tokens = torch.tensor([1, 1, 4])
    total = None
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(apply, params, buffers, tokens)
        total = fs.stage_backward_weight(pullback(torch.ones_like(output))[1], total)
    module(tokens).backward(torch.full((3, 3), 2.0))
    assert total["weight"].is_sparse
    assert torch.equal(total["weight"].to_dense(), module.weight.grad.to_dense())


def test_the_stage_can_be_printed_from_inside() -> None:
    seen: list[str] = []

    def body(s: Stage, x: Tensor) -> Tensor:
        h = s.l(x)
        seen.append(f"{h} {s.w!r} {len(h)} {h.tolist()} {bool((h > 0).any())} {float(h.sum().detach())}")
        return s.l(h)

    check_stage(Stage(body), r(4, 3))
    assert seen


def test_functionalize_leaves_the_module_as_it_was() -> None:
    import copy

    for module, x in ((nn.LSTM(3, 4), r(SEQUENCE)), (nn.BatchNorm1d(3), r(4, 3)), (tied(), r(4, 3))):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        fs.stage_vjp(*fs.functionalize(module), x)
        copy.deepcopy(module)(x)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_tied_parameters_appear_once_and_frozen_ones_among_the_buffers() -> None:
    _, params, buffers = fs.functionalize(tied())
    assert [name for name in params if "weight" in name] == ["l.weight"]
    _, params, buffers = fs.functionalize(lora())
    assert list(params) == ["w", "p"]
    assert list(buffers) == ["l.weight", "l.bias"]


def test_buffers_that_the_module_replaces_come_back_too() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            self.mean.lerp_(x.detach().mean(0), 0.5)
            return self.linear(x) + self.mean

    module = Counter()
    check_stage(module, r(3, 2))
    apply, params, buffers = fs.functionalize(module)
    for _ in range(3):
        _, buffers, _ = fs.stage_vjp(apply, params, buffers, torch.ones(3, 2))
    assert int(buffers["count"]) == 3
    assert int(module.count) == 0
    assert torch.equal(buffers["mean"], torch.full((2,), 0.875))


def test_an_embedding_that_marks_its_output_as_requiring_grad_is_a_pure_function() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    module[0].register_forward_hook(lambda m, args, output: output.requires_grad_(True))
    check_stage(module, torch.tensor([[1, 2], [3, 0]]))
