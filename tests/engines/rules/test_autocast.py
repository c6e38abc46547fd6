"""Operations in whose kernels autocast acts, where a graph would not see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcstage as fs

LOW = {"device_type": "cpu", "dtype": torch.bfloat16}
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bilinear": lambda x, w: F.bilinear(x, x, w.expand(2, 4, 4)),
    "bilinear by keyword": lambda x, w: torch.bilinear(input1=x, input2=x, weight=w.expand(2, 4, 4)),
    # Their backwards fail in eager under autocast.
    "pinv": lambda x, w: x @ (torch.linalg.pinv(w.detach()) * w),
    "pinverse": lambda x, w: x @ (w.detach().pinverse() * w),
}
if hasattr(torch.linalg, "polar"):
    CALLS["polar"] = lambda x, w: x @ torch.linalg.polar(w)[0]


class Calling(nn.Module):
    """Calls an operation, in or out of autocast."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], **autocast: Any) -> None:
        super().__init__()
        self.call, self.autocast = call, autocast
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4).sin() + 2 * torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(**self.autocast) if self.autocast else nullcontext():
            return self.call(x, self.weight).float()


def split(module: nn.Module, x: Tensor, backend: str | None, around: Any = None) -> list[Tensor]:
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend=backend, fullgraph=True) if backend else apply
    with around or nullcontext():
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    return [output, dx, *weight_pullback().values()]


def eager(module: nn.Module, x: Tensor, around: Any = None) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    with around or nullcontext():
        output = module(leaf)
    return [output.detach(), *torch.autograd.grad(output.sum(), [leaf, *module.parameters()])]


@pytest.mark.parametrize("outside", [False, True], ids=["within the stage", "around it"])
@pytest.mark.parametrize("name", CALLS)
def test_what_autocast_does_within_a_kernel_is_done_or_refused_by_name(name: str, outside: bool) -> None:
    x = torch.linspace(-1, 1, 12).view(3, 4).cos()
    module = Calling(CALLS[name], **({} if outside else LOW))
    around = torch.autocast(**LOW) if outside else None
    torch.testing.assert_close(split(module, x, None, around), eager(module, x, around), rtol=1e-2, atol=1e-2)
    with pytest.raises(fs.TraceError, match=f"calls {name.split()[0]} under autocast.* in bfloat16"):
        split(module, x, "aten", around)
    module.autocast = {"device_type": "cpu", "enabled": False}  # the way out
    torch.testing.assert_close(split(module, x, "aten", around), eager(module, x, around))


def test_no_mention_is_made_of_autocast_where_it_is_off() -> None:
    x = torch.linspace(-1, 1, 12).view(3, 4)
    for call in CALLS.values():
        torch.testing.assert_close(split(Calling(call), x, "aten"), eager(Calling(call), x))
