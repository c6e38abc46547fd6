"""Arguments and buffers that share memory, of which a forward writes into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

ENGINES = ("closures", "aten")


def staged(module: nn.Module, engine: str) -> tuple[Any, Any, Any]:
    apply, params, buffers = fs.functionalize(module)
    compiled = engine not in ("closures", "tape")
    return fs.compile(apply, backend=engine, fullgraph=True) if compiled else apply, params, buffers


class Caching(nn.Module):
    """Writes into its buffer, or assigns it anew, before it reads an argument."""

    def __init__(self, write: Callable[[Caching, Tensor], Any], *, takes_gradients: bool = False) -> None:
        super().__init__()
        self.proj, self.write, self.takes_gradients = nn.Linear(4, 4), write, takes_gradients
        self.register_buffer("b", torch.ones(4))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.write(self, x)
        if self.takes_gradients:
            leaf = torch.ones(4, requires_grad=True)
            (x,) = torch.autograd.grad((leaf * x).sum(), [leaf], create_graph=True)
        return self.proj(x) * z


def assign(module: Caching, x: Tensor) -> None:
    module.b = module.b + 1


@pytest.mark.parametrize("of", ["the module's", "functionalize's"])
@pytest.mark.parametrize("engine", [*ENGINES, "tape"])
@pytest.mark.parametrize("view", [lambda b: b, lambda b: b.detach(), lambda b: b.view(2, 2).t()[1, 1]])
def test_a_buffer_that_is_written_is_no_argument_at_the_same_time(
    view: Callable[[Tensor], Tensor], engine: str, of: str
) -> None:
    x = torch.randn(4)
    for write in (lambda m, x: m.b.add_(1), lambda m, x: m.b.mul_(x.detach()), lambda m, x: m.b[1:].zero_()):
        module = Caching(write, takes_gradients=engine == "tape")
        apply, params, buffers = staged(module, engine)
        given = view(module.b if of == "the module's" else buffers["b"])
        for argnums in ((), (0,), (0, 1)):
            with pytest.raises(fs.PurityError, match=r"writes in place into .*b'.*, which it was handed as"):
                fs.stage_vjp(apply, params, buffers, x, given, argnums=argnums)
        torch.testing.assert_close(buffers["b"], torch.ones(4))
        output, new_buffers, _ = fs.stage_vjp(apply, params, buffers, x, given.clone())  # the way out
        expected = module(x, torch.ones(4)).detach()
        torch.testing.assert_close((output, new_buffers["b"]), (expected, module.b))
    module = Caching(assign, takes_gradients=engine == "tape")
    apply, params, buffers = staged(module, engine)
    given = module.b if of == "the module's" else buffers["b"]
    output, new_buffers, _ = fs.stage_vjp(apply, params, buffers, x, given, argnums=0)
    torch.testing.assert_close((output, new_buffers["b"]), (module(x, given).detach(), module.b))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_view_of_a_buffer_is_noticed_whichever_call_it_is_an_argument_of(engine: str) -> None:
    stage = staged(Caching(lambda m, x: m.b.add_(1)), engine)
    x, flat = torch.randn(4), torch.ones(8)
    fs.stage_vjp(*stage, x, torch.ones(4))
    for buffers in (stage[2], {"b": flat[::2]}):
        with pytest.raises(fs.PurityError, match=r"handed as another argument .*Pass a clone"):
            fs.stage_vjp(*stage[:2], buffers, x, buffers["b"][2:3])
    fs.stage_vjp(*stage[:2], {"b": flat[::2]}, x, flat[1::2])  # of other places in the same memory


class OfTwo(nn.Module):
    """Overwrites its first argument before it reads the second."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q *= 2
        return self.proj(q) * k


@pytest.mark.parametrize("argnums", [(), (0,), (0, 1)])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_argument_that_is_overwritten_is_no_view_of_another(engine: str, argnums: tuple[int, ...]) -> None:
    module, x = OfTwo(), torch.randn(4, 4, 2)
    stage = staged(module, engine)
    q, k = x.unbind(-1)  # which lie between each other
    output = fs.stage_vjp(*stage, q, k, argnums=argnums)[0]
    torch.testing.assert_close(output, module(q.clone(), k).detach())
    for view in (q[:], q.t(), q[2], x[..., 0]):
        with pytest.raises(fs.PurityError, match=r"into (args|an argument).* handed as another argument"):
            fs.stage_vjp(*stage, q, view, argnums=argnums)
    if len(argnums) == 2:  # otherwise it is one object to the forward, too
        with pytest.raises(fs.PurityError, match="handed as another argument"):
            fs.stage_vjp(*stage, q, q, argnums=argnums)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_that_is_written_has_no_other_as_its_view(engine: str) -> None:
    class Cache(nn.Linear):
        def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
            super().__init__(4, 4)
            both = torch.ones(4, 2)
            self.register_buffer("keys", both[:, 0])
            self.register_buffer("others", of(both))

        def forward(self, x: Tensor) -> Tensor:
            self.keys.add_(1)
            return super().forward(x) * self.others

    x, module = torch.randn(4), Cache(lambda both: both[:, 1])
    output, buffers, _ = fs.stage_vjp(*staged(module, engine), x)
    torch.testing.assert_close((output, buffers["keys"]), (module(x).detach(), module.keys))
    for of in (lambda both: both[:, 0][:], lambda both: both.view(8)[:1]):
        apply, params, buffers = staged(Cache(of), engine)
        with pytest.raises(fs.PurityError, match="its buffer 'keys', with which 'others' shares memory"):
            fs.stage_vjp(apply, params, {name: b.clone() for name, b in buffers.items()}, x)


class Normed(nn.Module):
    """Adds statistics that its norm has updated."""

    def __init__(self, norm: nn.Module, *, takes_gradients: bool) -> None:
        super().__init__()
        self.norm, self.proj, self.takes_gradients = norm, nn.Linear(3, 3), takes_gradients

    def forward(self, x: Tensor, statistics: Tensor) -> Tensor:
        if self.takes_gradients:
            leaf = torch.ones(3, 1, requires_grad=True)
            (x,) = torch.autograd.grad((leaf * x).sum(), [leaf], create_graph=True)
            x = x.expand(4, 3, 5)
        return self.proj(self.norm(x).mT) + statistics


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "batch norm, cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "instance norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
}


@pytest.mark.parametrize("view", [lambda b: b, lambda b: b.detach()[:], Tensor.clone])
@pytest.mark.parametrize("engine", [*ENGINES, "tape"])
@pytest.mark.parametrize("norm", NORMS)
def test_statistics_of_a_norm_that_updates_them_are_no_argument(
    norm: str, engine: str, view: Callable[[Tensor], Tensor]
) -> None:
    module, x = Normed(NORMS[norm](), takes_gradients=engine == "tape"), torch.randn(4, 3, 5)
    apply, params, buffers = staged(module, engine)
    for of in (module.norm.running_mean, buffers["norm.running_var"]):
        given = view(of)
        if given.untyped_storage().data_ptr() != of.untyped_storage().data_ptr():
            fs.stage_vjp(apply, params, buffers, x, given)
            continue
        with pytest.raises(fs.PurityError, match=r"norm\.running_.*handed as another argument"):
            fs.stage_vjp(apply, params, buffers, x, given)
        module.eval()  # in which they are not updated
        output = fs.stage_vjp(apply, params, buffers, x, given)[0]
        torch.testing.assert_close(output, module(x, given).detach())
        module.train()
