"""What training does, in any order: the gradients stay eager's, and nothing is left alive afterwards.

A chain of generated stages, each uncompiled or compiled, is driven as a schedule might drive it, and worse:
many microbatches at once, weight passes of any subset, steps between, modes that change, errors thrown in the
middle of a forward, pullbacks that are never used, threads. Beside it copies run under plain autograd.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import optree
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from interrupting import Interrupts, drop_what_autograd_left
from torch import Tensor, nn

import funcstage as fs
from funcstage import trees
from funcstage.testing import strategies

pytestmark = pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning")

SHAPE = (2, 3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MADE: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE}
PRECISE = ("residual", "branch", "repeat", "tied", "frozen", "eval")


class Fault(Exception):
    """Thrown by a stage."""


class Link(nn.Module):
    """A stage whose output feeds the next one: any module, made to return what it was given the shape of.

    Attributes:
        faulty: whether it throws after all it computes, its buffers' updates included.
        differentiates: whether it takes a gradient inside.
    """

    def __init__(self, body: nn.Module, differentiates: bool = False) -> None:
        super().__init__()
        self.differentiates = differentiates
        self.scale = nn.Parameter(torch.full((SHAPE[-1],), 0.9, **MADE))
        self.body = body
        self.faulty = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.clone() if self.differentiates else x)  # whose tape refuses to write into what came
        if self.faulty:
            raise Fault
        if self.differentiates:
            x = torch.func.grad(lambda point: (point * self.scale).sin().sum())(x)
        return x * self.scale + torch.tanh(y.abs().sum() if y.is_complex() else y.sum())


@dataclass(eq=False)
class Running:
    """A stage in training, beside the same under plain autograd."""

    module: Link
    eager: Link
    apply: Any
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    total: dict[str, Tensor | None] | None = None
    expected_total: list[Tensor | None] | None = None

    @classmethod
    def of(cls, body: nn.Module, compiled: bool, differentiates: bool) -> Running:
        module = Link(body, differentiates)
        apply, params, buffers = fs.functionalize(module)
        if compiled and is_traceable(module):
            apply = fs.compile(apply, backend="aten")
        return cls(module, copy.deepcopy(module), apply, params, buffers)

    def trained(self) -> list[nn.Parameter]:
        """The eager copy's parameters, in the order of `params`."""
        return [p for p in self.eager.parameters() if p.requires_grad]

    def settle(self) -> None:
        """Give the eager copy new parameters and statistics; tapes that are pending keep the old ones."""
        self.eager = copy.deepcopy(self.module)
        values = {**self.buffers, **self.params}
        with torch.no_grad():
            for name, value in [*self.eager.named_parameters(), *self.eager.named_buffers()]:
                value.copy_(values[name])


@dataclass(eq=False)
class Passed:
    """A stage's part of a microbatch: after F, then after I."""

    stage: Running
    pullback: fs.Pullback | None
    output: Tensor
    leaf: Tensor
    eager_output: Tensor
    weights: list[nn.Parameter]


@dataclass(eq=False)
class Pending:
    """A weight pass that waits."""

    stage: Running
    weight_pullback: fs.WeightPullback
    expected: list[Tensor | None]


@dataclass(eq=False)
class Microbatch:
    """What a microbatch has gone through, up to the stage whose I comes next."""

    passed: list[Passed] = field(default_factory=list)
    cotangent: Tensor | None = None


class Training(RuleBasedStateMachine):
    """Any interleaving of F, I and W over stages and microbatches, against plain autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[Running] = []
        self.microbatches: list[Microbatch] = []
        self.pending: list[Pending] = []
        self.seen: list[weakref.ref[Tensor]] = []
        self.allocated = 0

    @initialize(
        bodies=st.lists(
            st.tuples(strategies.modules(blocks=PRECISE, **MADE), st.booleans(), st.booleans()),
            min_size=1,
            max_size=3,
        )
    )
    def build(self, bodies: list[tuple[nn.Module, bool, bool]]) -> None:
        gc.collect()
        self.allocated = allocated()  # with the bodies, which Hypothesis keeps alive
        self.stages = [Running.of(copy.deepcopy(body), *how) for body, *how in bodies]
        for stage in self.stages:
            self.note((stage.params, stage.buffers))

    @rule(seed=st.integers(0, 2**16))
    def forward(self, seed: int) -> None:
        """F of every stage, one after the other."""
        microbatch = Microbatch()
        x = drawn(seed)
        for stage in self.stages:
            passed, stage.buffers = self.run_forward(stage, x, seed)
            microbatch.passed.append(passed)
            x = passed.output
        self.microbatches.append(microbatch)

    @precondition(lambda self: self.microbatches)
    @rule(data=st.data(), retain=st.booleans())
    def input_backward(self, data: st.DataObject, retain: bool) -> None:
        """I of the last stage of a microbatch that has not had it."""
        microbatch = self.microbatches[draw_place(data, self.microbatches)]
        passed = microbatch.passed.pop()
        if not microbatch.passed:
            self.microbatches.remove(microbatch)
        cotangent = microbatch.cotangent
        if cotangent is None:
            cotangent = drawn(0)
        microbatch.cotangent, pending = self.run_input_backward(passed, cotangent, retain)
        self.pending.append(pending)

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), accumulate=st.booleans())
    def weight_backward(self, data: st.DataObject, accumulate: bool) -> None:
        """W of some of the microbatches that wait at a stage, into what was summed before, or not."""
        stage = self.pending[draw_place(data, self.pending)].stage
        waiting = [pending for pending in self.pending if pending.stage is stage]
        places = st.sets(st.integers(0, len(waiting) - 1), min_size=1)
        chosen = [waiting[place] for place in sorted(data.draw(places))]
        self.pending = [pending for pending in self.pending if not any(pending is one for one in chosen)]
        donated = stage.total if accumulate else None
        grads = fs.stage_backward_weight([pending.weight_pullback for pending in chosen], donated)
        for pending in chosen:
            with pytest.raises(fs.ConsumedError):
                pending.weight_pullback()
        expected = summed(pending.expected for pending in chosen)
        if donated is not None:
            expected = summed([stage.expected_total, expected])
        assert_close(list(grads.values()), expected)
        self.note(grads)
        stage.total, stage.expected_total = grads, expected

    @precondition(lambda self: any(stage.total is not None for stage in self.stages))
    @rule()
    def optimizer_step(self) -> None:
        """A step with what was summed; microbatches in flight keep the parameters that they started with."""
        for stage in self.stages:
            if stage.total is not None:
                stage.params = {
                    name: p if stage.total[name] is None else p - 1e-3 * torch.tanh(stage.total[name])
                    for name, p in stage.params.items()
                }
                self.note(stage.params)
                stage.total = stage.expected_total = None
                stage.settle()

    @rule(index=st.integers(0, 2), training=st.booleans())
    def switch_mode(self, index: int, training: bool) -> None:
        stage = self.stages[index % len(self.stages)]
        stage.module.train(training)
        stage.eager.train(training)

    @rule(index=st.integers(0, 2))
    def fault(self, index: int) -> None:
        """A forward that throws changes nothing."""
        stage = self.stages[index % len(self.stages)]
        before = {name: value.clone() for name, value in {**stage.params, **stage.buffers}.items()}
        stage.module.faulty = True
        with pytest.raises((Fault, fs.TraceError)):  # as a trace meets it
            fs.stage_vjp(stage.apply, stage.params, stage.buffers, torch.ones(SHAPE, **MADE))
        stage.module.faulty = False
        for name, value in {**stage.params, **stage.buffers}.items():
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name

    @precondition(lambda self: self.microbatches)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A microbatch that is never pulled back."""
        del self.microbatches[draw_place(data, self.microbatches)]

    @precondition(lambda self: self.microbatches)
    @rule(data=st.data(), at=st.integers(0, 5))
    def interrupt(self, data: st.DataObject, at: int) -> None:
        """I of a microbatch is interrupted: it can be tried again, or says that it is consumed."""
        passed = self.microbatches.pop(draw_place(data, self.microbatches)).passed.pop()
        assert passed.pullback is not None
        try:
            with Interrupts(at, Fault):
                passed.pullback(drawn(0))
        except Fault:
            if not passed.pullback.consumed:
                self.run_input_backward(passed, drawn(0), False)
        with pytest.raises(fs.ConsumedError):
            passed.pullback(drawn(0))

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def drop_weights(self, data: st.DataObject) -> None:
        del self.pending[draw_place(data, self.pending)]

    @rule(index=st.integers(0, 2), threads=st.integers(2, 4))
    def threads(self, index: int, threads: int) -> None:
        """F, I and W of several microbatches of one stage at once, without random numbers and statistics."""
        stage = self.stages[index % len(self.stages)]
        training = stage.module.training
        stage.module.eval()
        stage.eager.eval()
        xs = [torch.full(SHAPE, 0.1 * (i + 1), **MADE) for i in range(threads)]
        cotangent = torch.ones(SHAPE, **MADE)

        def whole(x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
            output, _, pullback = fs.stage_vjp(stage.apply, stage.params, stage.buffers, x)
            (dx,), weight_pullback = pullback(cotangent)
            return output, dx, weight_pullback()

        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(whole, xs))
        for x, (output, dx, grads) in zip(xs, results, strict=True):
            leaf = x.clone().requires_grad_()
            expected = stage.eager(leaf.clone())
            found = torch.autograd.grad(expected, [leaf, *stage.trained()], cotangent, allow_unused=True)
            assert_close([output, dx, *grads.values()], [expected.detach(), *found])
        stage.module.train(training)
        stage.eager = copy.deepcopy(stage.module)
        stage.settle()

    def teardown(self) -> None:
        """Nothing that was computed outlives those who hold it."""
        if sys.exc_info()[0] is not None:
            return  # a failure's traceback holds what it is about
        self.stages, self.microbatches, self.pending = [], [], []
        drop_what_autograd_left()
        gc.collect()
        alive = [tensor for tensor in (ref() for ref in self.seen) if tensor is not None]
        assert not alive, f"{len(alive)} of {len(self.seen)} tensors are left"
        assert allocated() <= self.allocated

    def run_forward(self, stage: Running, x: Tensor, seed: int) -> tuple[Passed, dict[str, Tensor]]:
        torch.manual_seed(seed)
        output, buffers, pullback = fs.stage_vjp(stage.apply, stage.params, stage.buffers, x)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(seed)
        eager_output = stage.eager(leaf.clone())  # which may be written in place
        of_eager = dict(stage.eager.named_buffers())
        assert_close([output], [eager_output.detach()])
        assert_close([buffers[name] for name in of_eager], list(of_eager.values()))
        self.note((output, buffers, optree.tree_leaves(pullback, namespace=trees.NAMESPACE)))
        return Passed(stage, pullback, output, leaf, eager_output, stage.trained()), buffers

    def run_input_backward(self, passed: Passed, cotangent: Tensor, retain: bool) -> tuple[Tensor, Pending]:
        pullback = passed.pullback
        assert pullback is not None
        (dx,), weight_pullback = pullback(cotangent, retain=retain)
        if retain:
            assert_close([pullback(cotangent)[0][0]], [dx])
        with pytest.raises(fs.ConsumedError):
            pullback(cotangent)
        wanted = [passed.leaf, *passed.weights]
        expected = torch.autograd.grad(passed.eager_output, wanted, cotangent, allow_unused=True)
        assert_close([dx], expected[:1])
        self.note((dx, optree.tree_leaves(weight_pullback, namespace=trees.NAMESPACE)))
        return dx, Pending(passed.stage, weight_pullback, list(expected[1:]))

    def note(self, tree: Any) -> None:
        """Remember tensors without holding them."""
        self.seen += [weakref.ref(leaf) for leaf in trees.flatten(tree)[0] if isinstance(leaf, Tensor)]


def is_traceable(module: nn.Module) -> bool:
    """Whether no operation's shape or choice depends on the values of tensors, as a trace asks."""
    apply, params, buffers = fs.functionalize(copy.deepcopy(module))
    try:
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.ones(SHAPE, **MADE))
    except fs.TraceError:
        return False
    return True


def drawn(seed: int) -> Tensor:
    """A normally distributed input or cotangent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float64, generator=generator).to(DEVICE)


def allocated() -> int:
    """Bytes of tensors on the GPU, apart from what cuBLAS keeps for each thread."""
    if DEVICE == "cpu":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def draw_place(data: st.DataObject, among: list[Any]) -> int:
    """Draw a place in a list, as Hypothesis keeps what is drawn alive."""
    return data.draw(st.integers(0, len(among) - 1))


def summed(terms: Iterable[list[Tensor | None] | None]) -> list[Tensor | None]:
    """Add gradients as eager accumulates them."""
    total: list[Tensor | None] | None = None
    for term in terms:
        assert term is not None
        if total is None:
            total = list(term)
        else:
            total = [a if b is None else b if a is None else a + b for a, b in zip(total, term, strict=True)]
    assert total is not None
    return total


def assert_close(got: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    """Compare in double precision; what is absent must be absent."""
    for ours, eagers in zip(got, expected, strict=True):
        assert (ours is None) == (eagers is None)
        if ours is not None:
            torch.testing.assert_close(ours, eagers, rtol=1e-8, atol=1e-8, equal_nan=True)


Training.TestCase.settings = settings(
    max_examples=max(20, settings.default.max_examples // 6), stateful_step_count=20
)
TestTraining = Training.TestCase
