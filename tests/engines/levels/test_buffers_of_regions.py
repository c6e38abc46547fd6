"""Buffers that checkpointed regions update, and read again when they are run several times in a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs


class Runs(nn.Module):
    """Runs a region three times, as layers that share a module do."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], reentrant: bool | None) -> None:
        super().__init__()
        self.proj, self.body, self.reentrant = nn.Linear(3, 3), body, reentrant
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            if self.reentrant is None:
                x = self.body(self, x)
            else:
                x = checkpoint(self.body, self, x, use_reentrant=self.reentrant)
        return x


def assigned(self: Any, x: Tensor) -> Tensor:
    self.state = self.state + x.detach().mean(0)
    return self.proj(x).tanh() * self.state


def added(self: Any, x: Tensor) -> Tensor:
    self.state += x.detach().mean(0)
    return self.proj(x).tanh() * self.state


def written(self: Any, x: Tensor) -> Tensor:
    self.state.add_(x.detach().mean(0))
    return self.proj(x).tanh() * self.state


def counted(self: Any, x: Tensor) -> Tensor:
    self.state += 1
    return self.proj(x).tanh()


def assigned_and_added(self: Any, x: Tensor) -> Tensor:
    self.state = self.state * 0.5
    self.state += x.detach().mean(0)
    return self.proj(x).tanh() * self.state.clone()


def of_activations(self: Any, x: Tensor) -> Tensor:
    self.state = self.state + x.mean(0)
    return self.proj(x).tanh() * self.state


def of_weights(self: Any, x: Tensor) -> Tensor:
    self.state = self.state + self.proj.weight.sum(0)
    return (x + self.proj.bias).tanh() * self.state


def added_activations(self: Any, x: Tensor) -> Tensor:
    self.state += x.mean(0)
    return self.proj(x).tanh() * self.state.clone()


def normed(self: Any, x: Tensor) -> Tensor:
    y = torch.batch_norm(self.proj(x), None, None, self.state, torch.ones(3), True, 0.5, 1e-5, False)
    return y.tanh() + self.state.clone() * x  # whose write no version tells of


def normed_by_keyword(self: Any, x: Tensor) -> Tensor:
    statistics = {"running_mean": self.state, "running_var": torch.ones(3)}
    rest = {"training": True, "momentum": 0.5, "eps": 1e-5, "cudnn_enabled": False}
    y = torch.batch_norm(self.proj(x), weight=None, bias=None, **statistics, **rest)
    return y.tanh() + self.state.clone() * x  # whose write no version tells of


LIKE = {added: assigned, written: assigned}
"""Bodies whose backward eager refuses without a checkpoint, with the same in which it does not."""


def eager(body: Any, module: Runs, x: Tensor) -> list[Tensor]:
    like = Runs(LIKE.get(body, body), None)
    like.load_state_dict(module.state_dict())
    leaf = x.clone().requires_grad_()
    output = like(leaf)
    grads = torch.autograd.grad(output.sum(), [leaf, *like.parameters()])
    return [output.detach(), like.state.detach(), *grads]


def split(module: Runs, x: Tensor, compiled: bool) -> list[Tensor]:
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend="aten", fullgraph=True) if compiled else apply
    output, new_buffers, pullback = fs.stage_vjp(stage, params, buffers, x)
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    return [output, new_buffers["state"], dx, *weight_pullback().values()]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("body", [assigned, counted, assigned_and_added, normed, normed_by_keyword])
def test_each_run_of_a_region_goes_on_from_the_buffer_of_the_last(
    body: Any, reentrant: bool, compiled: bool
) -> None:
    torch.manual_seed(0)
    module, x = Runs(body, reentrant), torch.randn(4, 3)
    for _ in range(2):
        torch.testing.assert_close(split(module, x, compiled), eager(body, module, x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("body", [added, written])
def test_a_buffer_that_is_overwritten_after_it_was_read(body: Any, reentrant: bool) -> None:
    torch.manual_seed(0)
    module, x = Runs(body, reentrant), torch.randn(4, 3)
    torch.testing.assert_close(split(module, x, compiled=False), eager(body, module, x))
    with pytest.raises(
        fs.TraceError, match=r"overwrites in place what it has read.*The uncompiled `apply` works"
    ):
        split(module, x, compiled=True)


@pytest.mark.parametrize("body", [added, written])
def test_without_a_checkpoint_it_is_refused_as_eager_refuses_it(body: Any) -> None:
    module, x = Runs(body, None), torch.randn(4, 3)
    with pytest.raises(fs.WrittenError):
        split(module, x, compiled=False)
    with pytest.raises(fs.TraceError, match="overwrites in place what it has read") as error:
        split(module, x, compiled=True)
    assert "works" not in str(error.value)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("body", [of_activations, of_weights, added_activations])
def test_gradients_flow_through_a_buffer_from_one_run_to_the_next(body: Any, compiled: bool) -> None:
    torch.manual_seed(0)
    module, x = Runs(body, False), torch.randn(4, 3)
    torch.testing.assert_close(split(module, x, compiled), eager(body, module, x))
