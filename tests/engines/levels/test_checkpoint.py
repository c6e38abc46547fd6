"""Activation checkpointing: the same gradients, what it promises to hold, and each operation run again once.

The reference is the same module without checkpoints, as torch's own recomputation updates buffers twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import funcstage as fs
from funcstage import testing
from funcstage.engines.levels import tape as of_levels
from funcstage.engines.levels.checkpoint import modules_in

check_stage = functools.partial(testing.check_stage, engines="closures")

WIDTH = 16
ENGINES = ("closures", "aten", "inductor")


def plainly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`checkpoint` without its effect."""
    for name in ("use_reentrant", "context_fn", "preserve_rng_state", "early_stop"):
        options.pop(name, None)
    return function(*args, **options)


class Mixer(nn.Module):
    """Three checkpointed regions of a kind between two layers that are not."""

    def __init__(self, region: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Tanh())
            for _ in range(3)
        )
        self.last = nn.Linear(WIDTH, WIDTH)
        self.extra = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.region = region
        self.run = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.region(self, block, x)
        return self.last(x)


def non_reentrant(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    return stage.run(block, x, use_reentrant=False)


def reentrant(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    return stage.run(block, x, use_reentrant=True)


def no_early_stop(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    return stage.run(block, x, use_reentrant=False, early_stop=False)


def residual(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    return stage.run(lambda x: x + block(x) @ stage.extra, x, use_reentrant=False)


def from_closures(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    weight = stage.extra.t()
    return stage.run(lambda: block(x) @ weight, use_reentrant=False)


def with_keywords(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    def body(*, hidden: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        return {"twice": block(hidden["x"]) * scale, "once": hidden["x"]}

    out = stage.run(body, hidden={"x": x}, scale=2.0, use_reentrant=False)
    return out["twice"] + out["once"]


def several_outputs(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    def body(x: Tensor, name: str) -> tuple[Any, ...]:
        y = block(x)
        return y, y.argmax(-1), (y.detach(), name), x

    y, index, (constant, name), same = stage.run(body, x, "name", use_reentrant=False)
    assert name == "name"
    return y.gather(-1, index[..., None]) * constant + same


def one_output_read(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    return stage.run(lambda x: (block(x), x @ stage.extra), x, use_reentrant=False)[0]


def nested(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.sin(y @ stage.extra)

    def outer(x: Tensor) -> Tensor:
        return stage.run(inner, block(x) + stage.run(inner, x, use_reentrant=False), use_reentrant=False)

    return stage.run(outer, x, use_reentrant=False)


def nested_reentrant(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    return stage.run(lambda x: stage.run(block, x, use_reentrant=True) * 2, x, use_reentrant=True)


def weights_alone(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    weight = stage.run(lambda: torch.softmax(stage.extra, -1) @ stage.last.weight, use_reentrant=False)
    return block(x @ weight)


def products_saved(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        product = operation in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return stage.run(block, x, use_reentrant=False, context_fn=contexts)


def under_autocast(stage: Mixer, block: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return stage.run(block, x, use_reentrant=False).to(x.dtype)


REGIONS = [
    non_reentrant,
    reentrant,
    no_early_stop,
    residual,
    from_closures,
    with_keywords,
    several_outputs,
    one_output_read,
    nested,
    nested_reentrant,
    weights_alone,
    products_saved,
    under_autocast,
]


def stage_of(module: nn.Module, engine: str) -> fs.FunctionalStage:
    stage = fs.functionalize(module)
    return stage if engine == "closures" else stage._replace(apply=fs.compile(stage.apply, backend=engine))


def plain_copy(module: Any) -> Any:
    plain = copy.deepcopy(module)
    plain.run = plainly
    return plain


def split(
    stage: fs.FunctionalStage, x: Tensor, cotangent: Tensor, argnums: Any = None
) -> tuple[Tensor, Any, Any, Any]:
    output, buffers, pullback = fs.stage_vjp(*stage, x, argnums=argnums)
    (dx,), weight_pullback = pullback(cotangent)
    return output, buffers, dx, weight_pullback()


def assert_equal_to_eager(
    module: nn.Module, stage: fs.FunctionalStage, x: Tensor, argnums: Any = None, **tolerance: float
) -> None:
    leaf = x.clone().requires_grad_(argnums is None)
    torch.manual_seed(1)
    expected = module(leaf)
    after = torch.get_rng_state()
    cotangent = torch.ones_like(expected).cumsum(-1)
    names, params = zip(*module.named_parameters(), strict=True)
    wanted = [*params, leaf] if argnums is None else list(params)
    grads = torch.autograd.grad(expected, wanted, cotangent, allow_unused=True)
    torch.manual_seed(1)
    output, buffers, dx, found = split(stage, x, cotangent, argnums)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(output, expected, **tolerance)
    assert list(found) == list(names)
    for name, expected_grad in zip(names, grads, strict=False):
        if expected_grad is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], expected_grad, **tolerance)
    if argnums is None:
        torch.testing.assert_close(dx, grads[-1], **tolerance)
    else:
        assert dx is None
    held = {**dict(stage.apply.module.named_buffers()), **buffers}
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(held[name], buffer, **tolerance)


@pytest.mark.supports("`torch.utils.checkpoint`: reentrant or not, nested, selective")
@pytest.mark.parametrize("argnums", [None, ()], ids=["", "first stage"])
@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.__name__)
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_gradients_are_those_without_checkpoints(engine: str, region: Any, argnums: Any) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if region is under_autocast else torch.float64
    module = Mixer(region).to(dtype)
    x = torch.randn(6, WIDTH, dtype=dtype)
    # Where a weight is used inside of nested regions, its gradients are summed in another order.
    bitwise = engine == "closures" and region is not nested
    exact = {"rtol": 0.0, "atol": 0.0} if bitwise else {}
    assert_equal_to_eager(plain_copy(module), stage_of(module, engine), x, argnums, **exact)


@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.__name__)
def test_a_region_needs_no_plain_tape(region: Any) -> None:
    module = Mixer(region)
    pullback = fs.stage_vjp(*fs.functionalize(module), torch.randn(6, WIDTH))[2]
    assert isinstance(pullback._tape, of_levels.InputTape)


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    torch.manual_seed(0)
    module = Mixer(residual).double()
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    assert_equal_to_eager(plain_copy(module), stage_of(module, "inductor"), x)


class Stateful(nn.Module):
    """Regions that draw random numbers and update buffers, in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.attention = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.3, batch_first=True)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.run = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.norm, x, use_reentrant=False)
        x = self.run(self.spectral, x, use_reentrant=True)
        x = self.run(self.attention, x[None], use_reentrant=False)
        return self.run(self.lstm, x, use_reentrant=False)[0]


@pytest.mark.slow
@pytest.mark.supports("checkpoints around dropout and around buffers that are updated")
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_the_second_run_finds_generators_and_buffers_as_the_first_one_did(engine: str) -> None:
    torch.manual_seed(0)
    module = Stateful().double()
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    assert_equal_to_eager(plain_copy(module), stage_of(module, engine), x)


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_modes_are_those_of_the_forward(engine: str) -> None:
    module = Stateful().double()
    reference = plain_copy(module)
    apply, params, buffers = stage_of(module, engine)
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    torch.manual_seed(1)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    module.eval()
    _, weight_pullback = pullback(torch.ones_like(output))
    torch.manual_seed(1)
    expected = torch.autograd.grad(reference(x).sum(), list(reference.parameters()))
    torch.testing.assert_close([*weight_pullback().values()], [*expected])


class Deep(nn.Module):
    """Wide regions in a row, so that what is held tells whether they are honoured."""

    def __init__(self, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 32 * WIDTH),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(32 * WIDTH, WIDTH),
                nn.Tanh(),
            )
            for _ in range(depth)
        )
        self.run = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("argnums", [None, ()], ids=["", "first stage"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_after_f_only_the_inputs_of_regions_are_held(engine: str, dropout: float, argnums: Any) -> None:
    depth, x = 6, torch.randn(8, WIDTH)
    stage = stage_of(Deep(depth, dropout), engine)
    states = depth * torch.get_rng_state().nbytes if dropout else 0
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(*stage, x, argnums=argnums)
        assert pullback.nbytes <= (depth + 1) * x.nbytes + states
        pullback(torch.ones_like(output))[1]()


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_attention_is_run_again(engine: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.run = checkpoint

        def attend(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

        def forward(self, x: Tensor) -> Tensor:
            return self.run(self.attend, x, use_reentrant=False)

    module = Attention()
    x = torch.randn(2, 32, WIDTH)
    stage = stage_of(module, engine)
    assert_equal_to_eager(plain_copy(module), stage, x)
    assert fs.stage_vjp(*stage, x)[2].nbytes <= x.nbytes


def flops(function: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


@pytest.mark.parametrize(
    "region", [non_reentrant, residual, nested, products_saved], ids=lambda r: r.__name__
)
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_nothing_is_run_again_twice(engine: str, region: Any) -> None:
    module = Mixer(region)
    stage = stage_of(module, engine)
    x = torch.randn(6, WIDTH)
    leaf = x.clone().requires_grad_()
    eager = flops(lambda: module(leaf).sum().backward())[1]
    of_plain_forward = flops(lambda: plain_copy(module)(leaf))[1]
    fs.stage_backward(fs.stage_vjp(*stage, x)[2], torch.ones_like(x))  # traces
    (output, _, pullback), of_f = flops(lambda: fs.stage_vjp(*stage, x))
    (_, weight_pullback), of_i = flops(lambda: pullback(torch.ones_like(output)))
    _, of_w = flops(weight_pullback)
    assert of_f == of_plain_forward
    assert of_w == of_plain_forward
    assert of_f + of_i + of_w <= eager


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_what_only_w_needs_is_run_again_in_w(engine: str) -> None:
    module = Deep(2)
    stage = stage_of(module, engine)
    x = torch.randn(8, WIDTH)
    fs.stage_backward(fs.stage_vjp(*stage, x, argnums=())[2], torch.ones_like(x))
    output, _, pullback = fs.stage_vjp(*stage, x, argnums=())
    (_, weight_pullback), of_i = flops(lambda: pullback(torch.ones_like(output)))
    assert of_i == 0
    assert flops(weight_pullback)[1] > 0


def test_a_retained_piece_of_w_runs_no_region_again_twice() -> None:
    stage = stage_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), Deep(2)), "closures")
    output, _, pullback = fs.stage_vjp(*stage, torch.randn(8, WIDTH), argnums=())
    pieces = pullback(torch.ones_like(output))[1].split(2)
    first = flops(lambda: [piece(retain=True) for piece in pieces])[1]
    assert flops(lambda: [piece() for piece in pieces])[1] == first


@pytest.mark.parametrize("region", [non_reentrant, residual, products_saved], ids=lambda r: r.__name__)
def test_check_stage_finds_nothing_wrong(region: Any) -> None:
    check_stage(Mixer(region), torch.randn(4, WIDTH))


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_pullbacks_are_retained_late_and_moved(engine: str) -> None:
    import optree

    torch.manual_seed(0)
    module = Mixer(residual).double()
    stage = stage_of(module, engine)
    xs = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    expected = [split(stage_of(plain_copy(module), engine), x, torch.ones_like(x))[2:] for x in xs]
    pullbacks = [fs.stage_vjp(*stage, x)[2] for x in xs]
    pullbacks = [optree.tree_map(torch.clone, p, namespace="funcstage") for p in pullbacks]
    weights = []
    for pullback, x in zip(pullbacks, xs, strict=True):
        pullback(torch.zeros_like(x), retain=True)
        (dx,), weight_pullback = pullback(torch.ones_like(x))
        weights.append((dx, optree.tree_map(torch.clone, weight_pullback, namespace="funcstage")))
    for (dx, weight_pullback), (expected_dx, expected_grads) in zip(weights, expected, strict=True):
        torch.testing.assert_close(dx, expected_dx)
        torch.testing.assert_close(weight_pullback(retain=True), expected_grads)
        torch.testing.assert_close(weight_pullback(), expected_grads)


def test_torchs_own_wrappers_of_checkpoint_are_honoured() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = [
        nn.Sequential(nn.Linear(WIDTH, 32 * WIDTH), nn.GELU(), nn.Linear(32 * WIDTH, WIDTH)) for _ in range(4)
    ]

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(nn.Sequential(*self.layers), 2, x, use_reentrant=False)

    wrapped = nn.Sequential(*[checkpoint_wrapper(copy.deepcopy(layer)) for layer in layers])
    x = torch.randn(8, WIDTH)
    for module, unwrapped in ((wrapped, 0), (Segments(), 2)):  # the last segment is not checkpointed
        _, _, pullback = fs.stage_vjp(*fs.functionalize(module), x)
        assert pullback.nbytes <= (5 + unwrapped * (1 + 2 * 32)) * x.nbytes
        check_stage(module, x)


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_hand_written_stage_is_run_again_with_what_it_was_given(engine: str) -> None:
    layer = nn.Linear(WIDTH, WIDTH).double()

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        def body(x: Tensor) -> Tensor:
            return torch.func.functional_call(layer, params["layer"], (x,)).sin() @ params["w"]

        return checkpoint(body, x, use_reentrant=False), buffers

    params = {
        "layer": {k: torch.randn_like(p) for k, p in layer.named_parameters()},
        "w": torch.randn(WIDTH, WIDTH, dtype=torch.float64),
    }
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    function = apply if engine == "closures" else fs.compile(apply, backend="aten")
    output, _, pullback = fs.stage_vjp(function, params, (), x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    leaf, weight, bias, w = (
        t.clone().requires_grad_()
        for t in (x, params["layer"]["weight"], params["layer"]["bias"], params["w"])
    )
    expected = torch.autograd.grad(((leaf @ weight.t() + bias).sin() @ w).sum(), [leaf, weight, bias, w])
    grads = weight_pullback()
    found = [dx, grads["layer"]["weight"], grads["layer"]["bias"], grads["w"]]
    torch.testing.assert_close(found, list(expected))


def test_higher_derivatives_and_transforms_see_through_checkpoints() -> None:
    torch.manual_seed(0)
    module = Mixer(residual).double()
    apply, params, buffers = fs.functionalize(module)
    plain = fs.functionalize(plain_copy(module)).apply
    x = torch.randn(3, WIDTH, dtype=torch.float64)

    def penalty(function: Any, x: Tensor) -> Tensor:
        output, _, pullback = fs.stage_vjp(function, params, buffers, x)
        return pullback(torch.ones_like(output))[0][0].square().sum()

    torch.testing.assert_close(
        torch.func.grad(functools.partial(penalty, apply))(x),
        torch.func.grad(functools.partial(penalty, plain))(x),
    )
    found = torch.func.vmap(functools.partial(penalty, apply))(x[:, None])
    torch.testing.assert_close(found, torch.func.vmap(functools.partial(penalty, plain))(x[:, None]))


def test_a_reentrant_region_of_constants_has_no_gradient_as_in_torch() -> None:
    module = nn.Sequential(nn.Embedding(5, WIDTH), nn.Linear(WIDTH, WIDTH))

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = module, nn.Linear(WIDTH, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.last(checkpoint(self.embed, tokens, use_reentrant=True))

    for engine in ("closures", "aten"):
        stage = stage_of(Tokens(), engine)
        output, _, pullback = fs.stage_vjp(*stage, torch.tensor([1, 2]))
        grads = pullback(torch.ones_like(output))[1]()
        assert [name for name, grad in grads.items() if grad is None] == [
            "embed.0.weight",
            "embed.1.weight",
            "embed.1.bias",
        ]


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_region_may_read_nothing(reentrant: bool, engine: str) -> None:
    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return x * params + checkpoint(lambda: torch.ones(3), use_reentrant=reentrant), buffers

    function = apply if engine == "closures" else fs.compile(apply, backend="aten")
    output, _, pullback = fs.stage_vjp(function, torch.ones(3), (), torch.full((3,), 2.0))
    assert torch.equal(output, torch.full((3,), 3.0))
    assert torch.equal(pullback(torch.ones(3))[1](), torch.full((3,), 2.0))


def registers_a_buffer(module: nn.Module, x: Tensor) -> None:
    module.register_buffer("last", x.detach() * 2)


def fills_a_buffer(module: nn.Module, x: Tensor) -> None:
    module.empty = x.detach() * 2


def drops_a_buffer(module: nn.Module, x: Tensor) -> None:
    module.scale = None


class Rebuffered(nn.Module):
    """Does something to its buffers in a checkpointed region."""

    def __init__(self, change: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.proj, self.change = nn.Linear(WIDTH, WIDTH), change
        self.register_buffer("scale", torch.ones(WIDTH))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        def region(x: Tensor) -> Tensor:
            self.change(self, x)
            return self.proj(x).sin()

        y: Tensor = checkpoint(region, x.cos(), use_reentrant=False)
        return y


@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("change", [registers_a_buffer, fills_a_buffer, drops_a_buffer])
def test_a_region_may_register_buffers_and_drop_them(change: Any, engine: str) -> None:
    module, x = Rebuffered(change), torch.randn(3, WIDTH)
    assert_equal_to_eager(copy.deepcopy(module), stage_of(module, engine), x)


class Remembering(nn.Module):
    """Keeps an activation in a buffer, from before a checkpointed region until after it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("before", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.before = self.proj(x).sin()
        y: Tensor = checkpoint(lambda x: self.proj(x).tanh(), x, use_reentrant=False)
        return y * self.before


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_region_leaves_activations_in_buffers_as_they_were(engine: str) -> None:
    module, x = Remembering(), torch.randn(3, WIDTH)
    assert_equal_to_eager(copy.deepcopy(module), stage_of(module, engine), x)


def test_writing_into_the_input_of_a_region_is_refused() -> None:
    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return checkpoint(lambda y: y.mul_(2) * params, x * params, use_reentrant=False), buffers

    with pytest.raises(fs.PurityError, match=r"checkpointed region writes into its input .*mul_.*clone"):
        fs.stage_vjp(apply, torch.randn(3), (), torch.randn(3))


def test_a_region_that_changes_from_run_to_run_is_refused() -> None:
    sizes = iter([2, 3])

    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return checkpoint(lambda x: (x * params)[: next(sizes)], x, use_reentrant=False).sum(), buffers

    _, _, pullback = fs.stage_vjp(apply, torch.randn(4), (), torch.randn(4))
    with pytest.raises(fs.StageError, match=r"returned .* in its first run and .* in its second"):
        pullback()


def test_torch_has_its_own_checkpoint_back_when_no_stage_runs() -> None:
    from torch.autograd import Function

    before = Function.apply, checkpoint.__wrapped__.__dict__.get("__dynamo_disable")
    check_stage(Mixer(non_reentrant), torch.randn(4, WIDTH))
    after = Function.apply, checkpoint.__wrapped__.__dict__.get("__dynamo_disable")
    assert after[1] is before[1] or before[1] is None
    assert after[0] == before[0]


class SelectiveDropout(nn.Module):
    """A dropout in a region of which a policy saves some operations."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.proj, self.policy = nn.Linear(4, 4), policy

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return F.dropout(self.proj(x), 0.5).tanh()

        contexts = functools.partial(create_selective_checkpoint_contexts, self.policy)
        return checkpoint(body, x, use_reentrant=False, context_fn=contexts)


def saving(wanted: Callable[[Any], bool]) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if wanted(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


POLICIES = {
    "products": saving(lambda op: op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)),
    "draws": saving(lambda op: torch.Tag.nondeterministic_seeded in op.tags),
    "everything": saving(lambda op: True),
    "nothing": saving(lambda op: False),
    "memory": saving(lambda op: "empty" in str(op)),
    "what is not written": saving(
        lambda op: not str(op).split(".")[1].endswith("_") and "empty" not in str(op)
    ),
}


@pytest.mark.parametrize("argnums", [None, ()], ids=["", "first stage"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_around_dropout_is_right_or_refused_in_our_own_words(policy: str, argnums: Any) -> None:
    module, x = SelectiveDropout(POLICIES[policy]), torch.randn(2, 4)
    weights = [*module.parameters()]
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    plain = F.dropout(module.proj(leaf), 0.5).tanh()
    expected = torch.autograd.grad(plain.sum(), [leaf, *weights])

    def compare(stage: Any) -> None:
        torch.manual_seed(0)
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x, argnums=argnums)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        grads = [*weight_pullback().values()]
        torch.testing.assert_close([output, *grads], [plain.detach(), *expected[1:]])
        assert argnums == () or torch.equal(dx, expected[0])

    apply, params, buffers = fs.functionalize(module)
    compare(fs.compile(apply, backend="aten"))  # where the policy says what is held, and no more
    if policy in ("products", "nothing", "what is not written"):
        compare(apply)
    else:
        with pytest.raises(fs.StageError, match=r"[IW] of .*selective checkpoint.*funcstage\.compile"):
            compare(apply)


class WritesIntoAView(nn.Module):
    """Writes a parameter into a view of an activation, where nothing is recorded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def write(self, x: Tensor) -> Tensor:
        y = self.linear(x) * 1
        y[..., :1].add_(self.linear.bias[:1])
        return y * 2

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        if self.how == "reentrant":
            return checkpoint(self.write, x, use_reentrant=True)
        with torch.no_grad():
            y = self.write(x)
        return x * self.linear.bias + y


@pytest.mark.parametrize("how", ["reentrant", "no_grad"])
def test_a_parameter_is_written_into_a_view_where_nothing_is_recorded(how: str) -> None:
    check_stage(WritesIntoAView(how), torch.randn(2, 4))


def _with_default(module: nn.Module) -> Callable[..., Any]:
    return lambda x, held=module: held(x)


def _with_keyword_default(module: nn.Module) -> Callable[..., Any]:
    return lambda x, *, held=module: held(x)


def _in_a_cycle(module: nn.Module) -> list[Any]:
    cycle: list[Any] = [module]
    cycle.append(cycle)
    return cycle


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda m: m,
    "a method": lambda m: m.forward,
    "a closure": lambda m: lambda x: m(x),
    "a closure in a closure": lambda m: (lambda f: lambda x: f(x))(lambda x: m(x)),
    "a default": _with_default,
    "a keyword's default": _with_keyword_default,
    "what a partial calls": lambda m: functools.partial(m, torch.ones(2)),
    "an argument of a partial": lambda m: functools.partial(print, m),
    "a keyword of a partial": lambda m: functools.partial(print, end=m),
    "a dict": lambda m: {"held": m},
    "a list": lambda m: [1, m],
    "a tuple": lambda m: (m, None),
    "a cycle": _in_a_cycle,
    "twice": lambda m: [m, m, {"again": m}],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_modules_that_a_region_may_run_are_found_where_functions_hold_them(holder: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    assert [*modules_in([1.0, HOLDERS[holder](module)])] == [*module.modules()]


@pytest.mark.parametrize("other", [None, 1.0, torch.ones(2), print, len, dict, functools.partial(print, 1)])
def test_where_nothing_holds_a_module_none_is_found(other: Any) -> None:
    assert [*modules_in([other, lambda x: x])] == []


class HalfHidden(nn.Module):
    """A region that is seen to hold one module, and gets at another one by an object of its own."""

    def __init__(self, passes: bool) -> None:
        super().__init__()
        self.seen, self.hidden = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.passes = passes

    def forward(self, x: Tensor) -> Tensor:
        seen, holder = self.seen, SimpleNamespace(hidden=self.hidden)

        def body(x: Tensor, *_: nn.Module) -> Tensor:
            return seen(x) * holder.hidden(x)

        return checkpoint(body, x, *[self.hidden] * self.passes, use_reentrant=False)


def test_a_parameter_of_a_module_that_is_not_found_is_refused_with_a_way_out() -> None:
    x = torch.randn(2, WIDTH)
    output, _, pullback = fs.stage_vjp(*fs.functionalize(HalfHidden(passes=False)), x)
    with pytest.raises(fs.StageError, match=r"its module was not found\. Pass the module to `checkpoint`"):
        pullback(torch.ones_like(output))
    check_stage(HalfHidden(passes=True), x)
