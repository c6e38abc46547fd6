"""`check_stage` raises no false alarm: modules that cannot be copied, known prices, the meta device."""

from __future__ import annotations

import random
import re
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.testing import StageMismatch, check_stage

BOTH = ("closures", "aten")


class Holds(nn.Linear):
    """A layer with something among its attributes."""

    def __init__(self, held: Any) -> None:
        super().__init__(3, 3)
        self.held = held


class Draws(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(3, generator=self.held)


class Counts(Holds):
    """A layer whose runs differ by what they leave behind."""

    def forward(self, x: Tensor) -> Tensor:
        self.held.append(len(self.held))
        return super().forward(x) * len(self.held)


def not_a_leaf() -> Tensor:
    return torch.ones(3, requires_grad=True) * 2


@pytest.mark.parametrize(
    "held",
    [
        not_a_leaf,
        lambda: [not_a_leaf()],
        lambda: {"kept": (not_a_leaf(), 1)},
        threading.Lock,
        lambda: OrderedDict(lock=threading.RLock()),
        lambda: (i for i in range(3)),
        lambda: open("/dev/null"),  # noqa: SIM115
    ],
    ids=[
        "a tensor with a history",
        "in a list",
        "in a dict",
        "a lock",
        "in a dict of its own",
        "a generator",
        "a file",
    ],
)
def test_a_module_that_cannot_be_deep_copied_is_checked(held: Any) -> None:
    module = Holds(held())
    before = module.held
    assert not check_stage(module, torch.randn(4, 3), engines=BOTH).refusals
    assert module.held is before


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_old_weight_norm_is_checked_after_a_run_too() -> None:
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Tanh())
    x = torch.randn(4, 3)
    module(x)
    report = check_stage(module, x, engines="closures")
    assert "gradient of params['0.weight_g']" in {leaf.leaf for leaf in report.leaves}


def test_a_copy_ties_what_is_tied_and_shares_no_memory() -> None:
    from funcstage.testing.copies import copied

    module = nn.Sequential(Holds(threading.Lock()), Holds([not_a_leaf()]))
    module[1].weight = module[0].weight
    copy = copied(module)
    assert type(copy[0]) is Holds
    assert copy[1].weight is copy[0].weight
    assert copy[0].held is module[0].held
    assert torch.equal(copy[0].bias, module[0].bias)
    of_module = {t.data_ptr() for t in module.state_dict().values()}
    assert not of_module & {t.data_ptr() for t in copy.state_dict().values()}


def test_a_generator_that_a_stage_runs_is_refused_by_name() -> None:
    class Runs(Holds):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(self.held)

    module = Runs(float(i) for i in range(3))
    with pytest.raises(
        fs.StageError, match=re.escape("Runs.held is a generator that the stage takes values")
    ):
        check_stage(module, torch.randn(4, 3), engines=BOTH)
    assert next(module.held) == 0.0


def test_random_generators_of_the_stage_are_left_as_they_were() -> None:
    own, passed = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    check_stage(Draws(own), torch.randn(4, 3), engines="closures")

    def apply(params: Any, buffers: Any, x: Tensor, *, generator: torch.Generator) -> Any:
        return x * params + torch.rand(3, generator=generator), buffers

    check_stage(apply, torch.randn(4, 3), engines="closures", params=torch.ones(3), generator=passed)
    for generator, seed in ((own, 3), (passed, 4)):
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())


class _Drawing(torch.autograd.Function):
    """Noise in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.rand_like(grad)


class Chance(nn.Linear):
    """Draws from a generator of the process, or in its backward."""

    def __init__(self, draw: Any) -> None:
        super().__init__(4, 4)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return _Drawing.apply(y) if self.draw is None else y * self.draw()


DRAWS = {"random": random.random, "choice": lambda: random.choice([2, 3]), "numpy": np.random.rand, "": None}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=[*DRAWS])
def test_random_numbers_from_anywhere_are_no_mismatch(draw: Any) -> None:
    module, x = Chance(draw), torch.randn(3, 4)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    report = check_stage(module, x, engines=("closures", "aten"))
    assert [*report.refusals] == ["aten"]  # in which every call would draw the same
    assert report.exact == len(report.leaves) == 4
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_what_eager_does_not_repeat_itself_is_said_of_each_leaf() -> None:
    count = iter(range(1, 100))
    with pytest.raises(StageMismatch, match="eager itself gives another value in each run") as found:
        check_stage(Chance(lambda: next(count)), torch.randn(3, 4), engines="closures")
    assert {leaf.reproduced for leaf in found.value.report.leaves} == {False}


def test_an_output_that_has_no_gradient_at_all_is_refused_by_name() -> None:
    class Chooses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(fs.LeafError, match="The output of Chooses holds no floating or complex tensor"):
        check_stage(Chooses(4, 4), torch.randn(3, 4))


def test_every_run_starts_from_the_same_attributes_and_leaves_them() -> None:
    module = Counts([0])
    check_stage(module, torch.randn(4, 3), engines="closures")
    assert module.held == [0]


@pytest.mark.parametrize("engine", BOTH)
def test_on_the_meta_device_shapes_and_flops_are_compared(engine: str) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1 << 14, 1 << 14), nn.BatchNorm1d(1 << 14), nn.Linear(1 << 14, 4))
        report = check_stage(module, torch.empty(8, 1 << 14), engines=engine)
    (found,) = report.engines.values()
    assert found.flops is not None
    assert found.flops.weight == 2 * 8 * (1 << 28) + 2 * 8 * 4 * (1 << 14)
    assert "values were not compared, as the output is on the meta device" in str(report)


def test_a_wrong_shape_on_the_meta_device_is_reported() -> None:
    def wider(apply: Any) -> Any:
        def wrong(params: Any, buffers: Any, x: Tensor) -> Any:
            output, buffers = apply(params, buffers, x)
            return output.expand(2, *output.shape), buffers

        return wrong

    with torch.device("meta"), pytest.raises(StageMismatch, match="output: expected float32"):
        check_stage(
            nn.Linear(3, 2), torch.empty(4, 3), engines=wider, output_grads=torch.ones_like, flops=False
        )


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bk,kde,bd->be", self.gate(x).softmax(-1), self.experts, x)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,dr,re->be", x, self.down, self.up)


class Memory(nn.Module):
    """Attention to learned keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, 1, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, self.slots, self.slots)


class _Product(torch.autograd.Function):
    """A product that computes both gradients, wanted or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


class Ignores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x.tanh(), self.weight)


PRICED = {
    "one einsum over several activations": (Experts, (6, 4)),
    "one einsum over several parameters": (LowRank, (6, 4)),
    "attention to parameters": (Memory, (2, 1, 3, 4)),
    "a Function that ignores what is needed": (Ignores, (6, 4)),
}


@pytest.mark.parametrize("kind", PRICED)
@pytest.mark.parametrize("engine", BOTH)
def test_what_is_known_to_cost_more_is_no_mismatch(kind: str, engine: str) -> None:
    build, shape = PRICED[kind]
    report = check_stage(build(), torch.randn(shape), engines=engine)
    (found,) = report.engines.values()
    assert found.flops is not None
    if any(found.flops.problems()):
        assert any("right, but at a price" in note for note in found.notes), str(report)


def test_a_price_explains_no_more_than_its_operation_takes() -> None:
    def repeats(apply: Any) -> Any:
        def twice(params: Any, buffers: Any, x: Tensor) -> Any:
            torch.ones(64, 64) @ torch.ones(64, 64)
            return apply(params, buffers, x)

        return twice

    with pytest.raises(StageMismatch, match="FLOPs: F takes"):
        check_stage(Ignores(), torch.randn(6, 4), engines=repeats)


def test_fewer_flops_than_eagers_are_no_mismatch() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.head(x)
            return self.out(x)

    report = check_stage(Unread(), torch.randn(2, 4), engines="aten")
    assert f"{2 * 2 * 4 * 4} fewer than eager's" in str(report)
    assert " < eager " in str(report)


class Block(nn.Module):
    def __init__(self, reentrant: bool, attention: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant, self.attention = reentrant, attention

    def body(self, x: Tensor) -> Tensor:
        y = F.dropout(self.up(x), 0.2)
        if self.attention:
            y = F.scaled_dot_product_attention(y[None], y[None], y[None], dropout_p=0.3)[0]
        return F.dropout(self.down(y), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("engine", BOTH)
def test_checkpoints_around_draws_are_counted(engine: str, attention: bool, reentrant: bool) -> None:
    report = check_stage(Block(reentrant, attention).train(), torch.randn(2, 4), engines=engine)
    (found,) = report.engines.values()
    assert found.flops is not None
    assert not any(found.flops.problems())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("engine", BOTH)
def test_a_checkpoint_around_a_norm_is_no_mismatch(engine: str, reentrant: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant)

    check_stage(Normed().train(), torch.randn(3, 4), engines=engine)


def test_a_forward_that_fails_with_nothing_to_train_is_compared_and_not_counted() -> None:
    class Hooked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight * 1
            weight.register_hook(lambda grad: grad * 2)
            return F.linear(x, weight, self.bias)

    report = check_stage(Hooked(3, 2), torch.randn(4, 3))
    assert "FLOPs were not counted, as eager does not run while they are (without trainable" in str(report)


def test_inductors_flops_are_those_of_its_programs() -> None:
    torch.manual_seed(0)
    report = check_stage(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4), engines="inductor")
    (found,) = report.engines.values()
    assert found.flops is not None
    assert found.flops.weight == 2 * 3 * 4 * 4
    assert "FLOPs are those of the programs that TorchInductor was given" in str(report)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument: 'input'"),
        ((torch.ones(2, 3), 1), {}, "too many positional arguments"),
        ((torch.ones(2, 3),), {"mask": None}, "got an unexpected keyword argument 'mask'"),
    ],
)
def test_arguments_that_are_not_the_modules_come_with_advice(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(fs.StructureError, match=re.escape(message)) as caught:
        check_stage(nn.Linear(3, 2), *args, **kwargs)
    assert "check_stage(module, x, mask=mask) runs module(x, mask=mask)" in str(caught.value)


def test_a_stage_function_without_its_parameters_comes_with_advice() -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(3, 2))
    x = torch.ones(4, 3)
    for args in ((), (x,), (params, buffers, x)):
        with pytest.raises(fs.StructureError, match=r"without its parameters.*apply, x, params=params"):
            check_stage(apply, *args)
    assert check_stage(apply, x, params=params, buffers=buffers, engines="closures").engines


class Cache:
    """As caches of keys and values are: an object that a forward writes into and reads."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []


class Cached(nn.Linear):
    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.layers.append(super().forward(x))
        return torch.stack(cache.layers).sum(0) * len(cache.layers)


def test_an_object_that_the_forward_writes_into_is_the_same_for_every_run_and_left_alone() -> None:
    cache = Cache()
    report = check_stage(Cached(3, 3), torch.randn(4, 3), engines=BOTH, cache=cache)
    assert isinstance(report.refusals["aten"], fs.TraceError)
    assert "writes into an object that it is handed as an argument" in str(report.refusals["aten"])
    assert not cache.layers


class Store:
    """A library's object beside the output, without an == of its own."""

    def __init__(self, length: int) -> None:
        self.length, self.layers = length, [np.arange(length), {"window": Slotted(length)}]
        self.whole = self


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class Encoded(NamedTuple):
    hidden: Tensor
    cache: Any


class Stores(Holds):
    """A layer that returns an object of its own in each run."""

    def forward(self, x: Tensor) -> Any:
        return Encoded(super().forward(x), self.held())


def test_objects_that_a_stage_makes_anew_are_compared_by_what_they_hold() -> None:
    assert not check_stage(Stores(lambda: Store(3)), torch.randn(4, 3), engines=BOTH).refusals
    assert not check_stage(Stores(object), torch.randn(4, 3), engines=BOTH).refusals


@pytest.mark.parametrize("kind", [Store, Slotted, np.ones])
def test_objects_that_hold_something_else_are_a_mismatch(kind: Any) -> None:
    def engine(apply: Any) -> Any:
        def other(params: Any, buffers: Any, x: Tensor) -> Any:
            output, buffers = apply(params, buffers, x)
            return output._replace(cache=kind(4)), buffers

        return other

    with pytest.raises(StageMismatch, match=re.escape("output.cache: expected")):
        check_stage(Stores(lambda: kind(3)), torch.randn(4, 3), engines=engine)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda y: torch.distributions.Normal(y, 1.0), "output is a Normal. It holds tensors"),
        (lambda y: {y}, "output is a set. It holds tensors"),
        (lambda y: 3, "the output holds no tensor, got int"),
    ],
)
def test_outputs_that_no_engine_takes_are_refused_by_name(output: Any, said: str) -> None:
    class Returns(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return output(super().forward(x))

    with pytest.raises(fs.StructureError, match=said):
        check_stage(Returns(3, 3), torch.randn(4, 3), engines=BOTH)


def test_what_is_no_stage_is_refused_by_name() -> None:
    with pytest.raises(fs.StructureError, match=r"expects an nn\.Module or a stage function, got int"):
        check_stage(3, torch.randn(4, 3))  # type: ignore[arg-type]


class Choosing(nn.Module):
    """Chooses a branch by an operator that torch compiles, which fails while operations are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.proj(y), lambda y: y * 2, (x,))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch.cond is compiled from torch 2.14 on")
def test_flops_that_eager_does_not_let_count_are_a_note() -> None:
    report = check_stage(Choosing(), torch.randn(2, 3), engines="aten")
    assert "FLOPs were not counted, as eager does not run" in str(report)
