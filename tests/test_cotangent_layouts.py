"""A cotangent may lie in memory in any way: programs, which were traced for one, yield eager's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import funcstage as fs

LAYOUTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": torch.randn,
    "transposed": lambda shape: torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))),
    "expanded": lambda shape: torch.randn(shape[-1]).expand(shape),
    "one number": lambda shape: torch.randn(()).expand(shape),
    "with gaps": lambda shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "out of a larger one": lambda shape: torch.randn(*(n + 2 for n in shape))[(slice(1, -1),) * len(shape)],
    "conjugate": lambda shape: torch.randn(shape, dtype=torch.complex64).conj().imag,
}


class Pairs(nn.Module):
    """A result that lies in memory as pairs, as its cotangent must for torch to view it as complex."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.polar(x * self.weight, x))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)),
    "joined axes": lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 5)),
    "a norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "a convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2)),
    "pairs": Pairs,
}
CASES = [(name, "aten") for name in MODULES] + [("layers", "inductor"), ("joined axes", "inductor")]


@pytest.fixture(scope="module", params=CASES, ids=str)
def stage(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    name, backend = request.param
    torch.manual_seed(0)
    module = MODULES[name]()
    return module, fs.compile(fs.functionalize(module).apply, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cotangent_of_any_layout_yields_eagers_gradients(stage: Any, layout: str) -> None:
    module, fast = stage
    _, params, buffers = fs.functionalize(module)
    x = torch.randn(6, 4, requires_grad=True)
    with torch._inductor.config.patch(size_asserts=False):  # which raise where a result would be wrong
        output, _, pullback = fs.stage_vjp(fast, params, buffers, x.detach())
        cotangent = LAYOUTS[layout](tuple(output.shape))
        (dx,), weight_pullback = pullback(cotangent)
        grads = weight_pullback()
    theirs = torch.autograd.grad(module(x), [x, *module.parameters()], cotangent)
    for name, ours, eager in zip(["x", *params], [dx, *grads.values()], theirs, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
