"""The compiled engine on a CUDA device: Inductor's kernels, and graphs with microbatches in flight."""

from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage.engines.graph import cuda_graphs
from funcstage.engines.graph.compile import compile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Stage(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def eager(apply: Any, params: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> list[Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    x = x.detach().requires_grad_()
    output, _ = apply(leaves, {}, x)
    return [output.detach(), *torch.autograd.grad(output, [x, *leaves.values()], cotangent)]


def split(fast: Any, params: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> list[Tensor]:
    output, _, pullback = fs.stage_vjp(fast, params, {}, x)
    (dx,), weight_pullback = pullback(cotangent)
    return [output, dx, *weight_pullback().values()]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def made() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    apply, params, _ = fs.functionalize(Stage().cuda())
    return apply, params


def batch(n: int = 1) -> Any:
    pairs = [(torch.randn(8, 64, device="cuda"), torch.randn(8, 64, device="cuda")) for _ in range(n)]
    return pairs if n > 1 else pairs[0]


def replaying(apply: Any, params: dict[str, Tensor], **options: Any) -> Any:
    """The stage as CUDA graphs, after microbatches that ran without and that were captured."""
    fast = compile(apply, cuda_graphs=True, **options)
    for x, cotangent in batch(3):
        split(fast, params, x, cotangent)
    return fast


def assert_not_overwritten(
    held: list[Tensor], copies: list[Tensor], fast: Any, params: dict[str, Tensor]
) -> None:
    """Run other microbatches, which leave what is held as it was."""
    for x, cotangent in batch(4):
        split(fast, params, x, cotangent)
    for mine, copy in zip(held, copies, strict=True):
        assert torch.equal(mine, copy)


@pytest.mark.parametrize("options", [{"backend": "aten"}, {}, {"cuda_graphs": True}])
def test_gradients_are_those_of_eager(made: Any, options: dict[str, Any]) -> None:
    apply, params = made
    fast = compile(apply, **options)
    for x, cotangent in batch(3):
        assert_close(split(fast, params, x, cotangent), eager(apply, params, x, cotangent))


def test_replays_see_parameters_that_were_updated_in_place(made: Any) -> None:
    apply, params = made
    fast = compile(apply, cuda_graphs=True)
    for _ in range(3):
        x, cotangent = batch()
        assert_close(split(fast, params, x, cotangent), eager(apply, params, x, cotangent))
        for p in params.values():
            p.mul_(0.9)


def test_replays_follow_parameters_that_moved(made: Any) -> None:
    apply, params = made
    fast = compile(apply, cuda_graphs=True)
    for _ in range(3):
        x, cotangent = batch()
        assert_close(split(fast, params, x, cotangent), eager(apply, params, x, cotangent))
        params = {name: p * 0.9 for name, p in params.items()}


@pytest.mark.parametrize("count", [4, cuda_graphs.MAX_SLOTS + 2])
def test_microbatches_in_flight_do_not_disturb_each_other(made: Any, count: int) -> None:
    apply, params = made
    fast = compile(apply, cuda_graphs=True)
    for _ in range(2):
        pairs = batch(count)
        forwards = [fs.stage_vjp(fast, params, {}, x) for x, _ in pairs]
        inputs = [f[2](c) for f, (_, c) in zip(forwards, pairs, strict=True)]
        weights = [weight_pullback() for _, weight_pullback in reversed(inputs)][::-1]
        for f, ((dx,), _), grads, (x, c) in zip(forwards, inputs, weights, pairs, strict=True):
            assert_close([f[0], dx, *grads.values()], eager(apply, params, x, c))


def test_results_that_a_caller_holds_are_never_overwritten(made: Any) -> None:
    apply, params = made
    fast = replaying(apply, params)
    x, cotangent = batch()
    held = [result.view(-1) for result in split(fast, params, x, cotangent)]
    copies = [result.clone() for result in held]
    assert_not_overwritten(held, copies, fast, params)


def test_gradients_of_a_microbatch_that_ended_without_graphs_are_never_overwritten(made: Any) -> None:
    apply, params = made
    fast = replaying(apply, params)
    x, cotangent = batch()
    _, _, pullback = fs.stage_vjp(fast, params, {}, x)
    optree.tree_leaves(pullback, namespace="funcstage")
    _, weight_pullback = pullback(cotangent)
    held = list(weight_pullback().values())
    copies = [grad.clone() for grad in held]
    del pullback, weight_pullback
    assert_not_overwritten(held, copies, fast, params)


@pytest.mark.parametrize("half", ["pullback", "weight pullback"])
def test_residuals_that_a_caller_holds_are_never_overwritten(made: Any, half: str) -> None:
    apply, params = made
    fast = replaying(apply, params)
    x, cotangent = batch()
    output, _, of_input = fs.stage_vjp(fast, params, {}, x)
    if half == "pullback":
        of_input = optree.tree_map(lambda leaf: leaf, of_input, namespace="funcstage")
        torch.cuda.synchronize()
        for other, c in batch(3):
            split(fast, params, other, c)
    (dx,), of_weight = of_input(cotangent)
    of_weight = optree.tree_map(lambda leaf: leaf, of_weight, namespace="funcstage")
    del of_input
    for other, c in batch(3):
        split(fast, params, other, c)
    assert_close([output, dx, *of_weight().values()], eager(apply, params, x, cotangent))


def test_what_sites_show_is_never_overwritten(made: Any) -> None:
    apply, params = made
    fast = replaying(apply, params, sites=True)
    x, cotangent = batch()
    _, _, pullback = fs.stage_vjp(fast, params, {}, x)
    _, weight_pullback = pullback(cotangent)
    held = [tensor for site in weight_pullback.sites for tensor in (*site.inputs, site.cotangent)]
    assert held
    copies = [tensor.clone() for tensor in held]
    weight_pullback()
    del pullback, weight_pullback
    assert_not_overwritten(held, copies, fast, params)


def test_retained_weight_passes_are_right_after_replays(made: Any) -> None:
    apply, params = made
    fast = replaying(apply, params)
    for retain_first in (True, False):
        x, cotangent = batch()
        output, _, pullback = fs.stage_vjp(fast, params, {}, x)
        waits = pullback(cotangent, retain=True)[1] if retain_first else None
        (dx,), weight_pullback = pullback(cotangent)
        again = weight_pullback(retain=True)
        expected = eager(apply, params, x, cotangent)
        assert_close([output, dx, *weight_pullback().values()], expected)
        assert_close([output, dx, *again.values()], expected)
        if waits is not None:
            assert_close([output, dx, *waits().values()], expected)


@pytest.mark.parametrize("orders", [(1, 2, 1, 2), (2, 1, 2, 1)])
def test_pieces_of_w_are_right_beside_whole_ones(made: Any, orders: tuple[int, ...]) -> None:
    apply, params = made
    fast = compile(apply, cuda_graphs=True)
    for parts in (1, *orders, *orders):
        x, cotangent = batch()
        output, _, pullback = fs.stage_vjp(fast, params, {}, x)
        (dx,), weight_pullback = pullback(cotangent)
        if parts == 1:
            grads = weight_pullback()
        else:
            grads = fs.stage_backward_weight(reversed(weight_pullback.split(parts)))
        assert_close([output, dx, *(grads[name] for name in params)], eager(apply, params, x, cotangent))


def test_i_and_w_lie_where_residuals_lay() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(Stage(512) for _ in range(4))).cuda()
    apply, params, _ = fs.functionalize(module)
    x, cotangent = torch.randn(2, 8192, 512, device="cuda")
    kept = {}
    for graphs in (False, True):
        fast = compile(apply, cuda_graphs=graphs)
        for _ in range(4):
            split(fast, params, x, cotangent)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        split(fast, params, x, cotangent)
        if graphs:
            pools = [s["total_size"] for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0)]
            kept[graphs] = sum(pools)
        else:
            kept[graphs] = torch.cuda.max_memory_allocated() - before
    assert kept[True] < 1.25 * kept[False]


def test_a_slot_is_reused_once_its_results_are_gone(made: Any) -> None:
    apply, params = made
    fast = compile(apply, cuda_graphs=True)
    for x, cotangent in batch(6):
        split(fast, params, x, cotangent)
    (programs,) = fast._traced.values()
    assert len(programs.slots._slots) == 1


def test_replays_are_right_after_an_exception(made: Any) -> None:
    apply, params = made
    fast = compile(apply, cuda_graphs=True)
    x, cotangent = batch()
    _, _, pullback = fs.stage_vjp(fast, params, {}, x)
    with pytest.raises(fs.StageError):
        pullback(cotangent[:1])
    del pullback
    assert_close(split(fast, params, x, cotangent), eager(apply, params, x, cotangent))


def test_a_retained_pullback_gives_the_same_twice(made: Any) -> None:
    apply, params = made
    fast = compile(apply, cuda_graphs=True)
    x, cotangent = batch()
    split(fast, params, x, cotangent)
    _, _, pullback = fs.stage_vjp(fast, params, {}, x)
    (dx,), weight_pullback = pullback(cotangent, retain=True)
    first = [dx, *weight_pullback(retain=True).values()]
    (dx,), again = pullback(cotangent)
    assert_close([dx, *again().values()], first)
    assert_close(list(weight_pullback().values()), first[1:])


def test_dropout_draws_the_masks_of_eager() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).cuda()
    apply, params, _ = fs.functionalize(module)
    x, cotangent = batch()
    for options in ({"backend": "aten"}, {}):
        torch.manual_seed(1)
        theirs = eager(apply, params, x, cotangent)
        torch.manual_seed(1)
        assert_close(split(compile(apply, **options), params, x, cotangent), theirs)


def test_convolutions_and_batch_norm_agree_with_eager() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).cuda()
    apply, params, buffers = fs.functionalize(module)
    x = torch.randn(4, 3, 16, 16, device="cuda")
    theirs = None
    for fast in (apply, compile(apply, backend="aten"), compile(apply)):
        output, new_buffers, pullback = fs.stage_vjp(fast, params, buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        results = [output, *new_buffers.values(), dx, *weight_pullback().values()]
        if theirs is not None:
            for a, b in zip(results, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        theirs = theirs or results
