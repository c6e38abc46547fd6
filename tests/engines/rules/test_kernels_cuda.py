"""What runs kernels of its own, on a CUDA device: attention of every kind, Triton, and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import funcstage as fs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

if torch.cuda.is_available():
    import triton
    import triton.language as tl

    @triton.jit
    def sine_kernel(x, w, out, n, columns, slope: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        product = tl.load(x + at, mask=inside) * tl.load(w + at % columns, mask=inside)
        tl.store(out + at, tl.cos(product) if slope else tl.sin(product), mask=inside)

    def launch(x: Tensor, w: Tensor, slope: bool) -> Tensor:
        out = torch.empty_like(x)
        sine_kernel[(triton.cdiv(x.numel(), 128),)](x, w, out, x.numel(), x.shape[-1], slope, 128)
        return out

    @torch.library.triton_op("funcstage_tests::sine", mutates_args=())
    def sine(x: Tensor, w: Tensor, slope: bool) -> Tensor:
        """sin(x * w), or its cosine, row by row."""
        out = torch.empty_like(x)
        kernel = torch.library.wrap_triton(sine_kernel)
        kernel[(triton.cdiv(x.numel(), 128),)](x, w, out, x.numel(), x.shape[-1], slope, 128)
        return out

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        slope = grad * torch.ops.funcstage_tests.sine(x, w, True)
        return slope * w, (slope * x).sum(0), None

    sine.register_autograd(
        _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2])
    )


class Sine(Function):
    """The same as a function that launches its kernel itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return launch(x, w, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        slope = grad.contiguous() * launch(x, w, True)
        return slope * w, (slope * x).sum(0)


class Rows(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.weight = nn.Parameter(torch.randn(64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.weight))


class Attention(nn.Module):
    """Attention of eight heads by any function of query, key and value."""

    def __init__(self, attend: Callable[..., Tensor], width: int = 512) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.slope = nn.Parameter(torch.full((8,), 0.1))
        self.attend = attend

    def forward(self, x: Tensor, mask: BlockMask | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (8, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(self, q, k, v, mask).transpose(1, 2).flatten(-2))


def compare(module: nn.Module, engine: str, x: Tensor, tolerance: float, **kwargs: Any) -> fs.FunctionalStage:
    """Compare a stage with eager: relative error of every gradient in the largest norm."""
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    expected = module(leaf, **kwargs)
    cotangent = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [leaf, *module.parameters()], cotangent, allow_unused=True)
    stage = fs.functionalize(module)
    if engine != "closures":
        stage = stage._replace(apply=fs.compile(stage.apply, backend=engine))
    for _ in range(2):
        torch.manual_seed(1)
        output, _, pullback = fs.stage_vjp(*stage, x, **kwargs)
        (dx,), weight_pullback = pullback(cotangent)
        found = [output, dx, *weight_pullback().values()]
        for ours, theirs in zip(found, [expected, *grads], strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                error = (ours - theirs).abs().max() / theirs.abs().max()
                assert error <= tolerance
    return stage


ENGINES = ["closures", "aten", "inductor"]


@pytest.mark.supports("Triton kernels by `torch.library.triton_op`", "on CUDA", "on CUDA")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["triton_op", "function"])
def test_triton_kernels_are_split(engine: str, kind: str) -> None:
    torch.manual_seed(0)
    function = (lambda x, w: sine(x, w, False)) if kind == "triton_op" else (lambda x, w: Sine.apply(x, w))
    module, x = Rows(function).cuda(), torch.randn(32, 64, device="cuda")
    if kind == "triton_op" or engine == "closures":
        compare(module, engine, x, 1e-4)
        return
    stage = fs.functionalize(module)
    whole = fs.compile(stage.apply, backend=engine, fullgraph=True)  # type: ignore[arg-type]
    with pytest.raises(fs.TraceError):  # a raw launch reads memory, which fake tensors do not have
        fs.stage_vjp(whole, *stage[1:], x)
    with pytest.warns(UserWarning, match="cannot be traced"):
        compare(module, engine, x, 1e-4)


BACKENDS = [
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]


@pytest.mark.supports("`scaled_dot_product_attention` on each of its backends", "on CUDA", "on CUDA")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name.lower())
def test_attention_runs_on_every_backend(engine: str, backend: SDPBackend) -> None:
    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.manual_seed(0)
    module = Attention(attend).cuda().bfloat16()
    x = torch.randn(2, 256, 512, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(backend):
        compare(module, engine, x, 0.03)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


@pytest.mark.supports("FlexAttention, its `BlockMask` an argument or the module's", "on CUDA", "on CUDA")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "place", ["keyword", "held", "score_mod", "score_mod on a tape", "compiled by the user"]
)
def test_flex_attention_with_a_block_mask(engine: str, place: str) -> None:
    mask = create_block_mask(causal, None, None, 256, 256, device="cuda")
    attend_flex = torch.compile(flex_attention) if place == "compiled by the user" else flex_attention

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, given: BlockMask | None) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - module.slope[h] * (i - j)

        if place == "score_mod on a tape":
            torch.func.grad(torch.sum)(q.detach())
        modified = score_mod if place.startswith("score_mod") else None
        return attend_flex(q, k, v, score_mod=modified, block_mask=given or module.mask)

    torch.manual_seed(0)
    module = Attention(attend).cuda()
    module.mask = None if place == "keyword" else mask
    kwargs = {"mask": mask} if place == "keyword" else {}
    x = torch.randn(2, 256, 512, device="cuda")
    if place.startswith("score_mod") and engine == "closures":
        with pytest.raises(fs.StageError, match=r"reads float32\[8\] on cuda:0, which requires grad"):
            fs.stage_vjp(*fs.functionalize(module), x)
        return
    compare(module, engine, x, 5e-3, **kwargs)


class Checkpointed(nn.Module):
    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(256, 4096), nn.GELU(), nn.Dropout(dropout), nn.Linear(4096, 256), nn.Tanh()
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("engine", ENGINES)
def test_recomputation_draws_the_same_masks_on_the_device(engine: str) -> None:
    torch.manual_seed(0)
    compare(Checkpointed(2, 0.3).cuda(), engine, torch.randn(64, 256, device="cuda"), 1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_after_f_the_device_holds_the_inputs_of_regions_alone(engine: str) -> None:
    depth = 8
    module = Checkpointed(depth, 0.0).cuda()
    x = torch.randn(1024, 256, device="cuda")
    stage = compare(module, engine, x, 1e-3)
    before = torch.cuda.memory_allocated()
    output, _, pullback = fs.stage_vjp(*stage, x)
    held = torch.cuda.memory_allocated() - before
    assert held <= (depth + 1) * x.nbytes  # regions' inputs and the output
    pullback(torch.ones_like(output))[1]()
