"""Whatever happens around a pipeline has the effect that it has in eager.

Generated modules become the stages of a schedule, all in this process: hooks of parameters, steps of an
optimizer, modules that are frozen, thawed and replaced, and errors in a forward come between. Beside it the
same happens to plain autograd, a microbatch after the other; torch's own stages would not do, as finding out
shapes changes buffers that are assigned anew, and splitting a backward loses gradients of some modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.pipelining import schedules

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage
from funcstage.testing import strategies
from funcstage.testing.tolerances import compare

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PRECISE = ("residual", "branch", "repeat", "tied", "frozen", "eval")
WIDTH, SIZE, MICROBATCHES = 3, 2, 2
WHOLE = ("GPipe", "1F1B", "Interleaved1F1B")
SPLIT = ("InterleavedZeroBubble", "ZBVZeroBubble")
ENGINES: dict[str, Any] = {"closures": False, "aten": {"backend": "aten"}}


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    with one_process():
        yield


class Fault(Exception):
    """Thrown by a forward."""


class Link(nn.Module):
    """Any module, made to return what it was given the shape of, and to throw at a given call.

    Attributes:
        left: at which call from now on it throws; 0 for none.
        draws: whether the module draws random numbers in training, which would depend on who comes first.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.9, dtype=torch.float64))
        self.left = 0
        self.train()
        before = torch.get_rng_state()
        copy.deepcopy(body)(torch.ones(SIZE, WIDTH, dtype=torch.float64))
        self.draws = not torch.equal(before, torch.get_rng_state())
        self.train(not self.draws)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.clone())  # which may be written in place
        if self.left == 1:
            raise Fault
        if self.left > 1:
            self.left -= 1
        return x * self.scale + torch.tanh(y.abs().sum() if y.is_complex() else y.sum())


@dataclass
class Pipeline:
    """Modules in training, by some way of running one step.

    Attributes:
        modules: one for each stage.
        stages: of a schedule, where there is one.
        step: runs all microbatches forward and backward.
        seen: what hooks saw, by parameter.
    """

    modules: list[nn.Module]
    stages: list[Any]
    step: Callable[[Tensor, Tensor], Any]
    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def watch(self, place: int, late: bool) -> None:
        """Give a parameter of each stage a hook that notes its gradient and changes it."""
        for i, module in enumerate(self.modules):
            trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
            name, parameter = trained[place % len(trained)]
            seen = self.seen.setdefault(f"{i}.{name}", [])
            if late:

                def after(parameter: Tensor, seen: list[Tensor] = seen) -> None:
                    assert parameter.grad is not None
                    seen.append(parameter.grad.clone())
                    parameter.grad.mul_(1.5)

                parameter.register_post_accumulate_grad_hook(after)
            else:

                def changed(grad: Tensor, seen: list[Tensor] = seen) -> Tensor:
                    seen.append(grad.clone())
                    return grad * 2

                parameter.register_hook(changed)

    def state(self) -> list[tuple[str, Tensor | None]]:
        """Parameters, gradients, buffers and what hooks saw."""
        found: list[tuple[str, Tensor | None]] = []
        for i, module in enumerate(self.modules):
            for name, p in module.named_parameters():
                found += [(f"{i}.{name}", p.detach()), (f"the gradient of {i}.{name}", p.grad)]
            found += [(f"{i}.{name}", b) for name, b in module.named_buffers()]
        for name, values in self.seen.items():
            found += [(f"seen {k} by hooks of {name}", value) for k, value in enumerate(values)]
        return found


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """A smooth loss."""
    return (output - target).tanh().square().sum()


def of_schedule(modules: list[nn.Module], name: str, make: Callable[..., Any]) -> Pipeline:
    """A pipeline under one of torch's schedules."""
    stages = [make(module, i, len(modules), torch.device("cpu")) for i, module in enumerate(modules)]
    kind = schedules.get_schedule_class(name)
    given = stages[0] if issubclass(kind, schedules.PipelineScheduleSingle) else stages
    schedule = kind(given, MICROBATCHES, loss_fn=loss_fn, scale_grads=False)

    def step(x: Tensor, target: Tensor) -> Any:
        return schedule.step(x, target=target)

    return Pipeline(modules, stages, step)


def of_eager(modules: list[nn.Module]) -> Pipeline:
    """Plain autograd, a microbatch after the other."""
    pipeline = Pipeline(modules, [], lambda x, target: None)

    def step(x: Tensor, target: Tensor) -> Tensor:
        outputs = []
        for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            y = part
            for module in pipeline.modules:
                y = module(y)
            loss_fn(y, wanted).backward()
            outputs.append(y.detach())
        return torch.cat(outputs)

    pipeline.step = step
    return pipeline


def hooked(pipeline: Pipeline, place: int) -> None:
    pipeline.watch(place, late=False)


def hooked_late(pipeline: Pipeline, place: int) -> None:
    pipeline.watch(place, late=True)


def stepped(pipeline: Pipeline, place: int) -> None:
    """An optimizer's step."""
    for module in pipeline.modules:
        torch.optim.SGD(module.parameters(), lr=0.01).step()
        module.zero_grad()


def frozen(pipeline: Pipeline, place: int) -> None:
    """A parameter beside the last one is frozen, or thawed where it was."""
    for module in pipeline.modules:
        parameters = list(module.parameters())
        parameter = parameters[place % len(parameters)]
        if len(parameters) > 1 and parameter.is_floating_point():
            parameter.requires_grad_(not parameter.requires_grad)
            parameter.grad = None
        module.scale.requires_grad_(True)  # something is left to train


def frozen_wholly(pipeline: Pipeline, place: int) -> None:
    """All of a module but one parameter is frozen."""
    module = pipeline.modules[place % len(pipeline.modules)]
    module.requires_grad_(False)
    module.zero_grad()
    module.scale.requires_grad_(True)


def replaced(pipeline: Pipeline, place: int) -> None:
    """The module of a stage is assigned anew."""
    torch.manual_seed(place)
    i = place % len(pipeline.modules)
    module = Link(nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Tanh()).double())
    pipeline.modules[i] = module
    if pipeline.stages:
        pipeline.stages[i].submod = module


def wrapped(pipeline: Pipeline, place: int) -> None:
    """What is inside of a module is wrapped."""
    module = pipeline.modules[place % len(pipeline.modules)]
    module.body = nn.Sequential(module.body, nn.Identity())


def evaluated(pipeline: Pipeline, place: int) -> None:
    module = pipeline.modules[place % len(pipeline.modules)]
    module.train(place % 2 == 0 and not module.draws)


def doubled(pipeline: Pipeline, place: int) -> None:
    """A parameter is written in place between steps."""
    with torch.no_grad():
        for module in pipeline.modules:
            module.scale.mul_(1.1)


EVENTS = (hooked, hooked_late, stepped, frozen, frozen_wholly, replaced, wrapped, evaluated, doubled)
"""What may happen between two steps."""


@dataclass(frozen=True)
class Plot:
    """A pipeline's story.

    Attributes:
        bodies: what the stages compute.
        schedule: one of torch's.
        engine: a key of `ENGINES`.
        folded: whether the loss is part of the last stage.
        events: before each step, what happens and where.
        fault: the step, stage and microbatch whose forward throws, or None.
    """

    bodies: tuple[nn.Module, ...]
    schedule: str
    engine: str
    folded: bool
    events: tuple[tuple[tuple[Callable[[Pipeline, int], None], int], ...], ...]
    fault: tuple[int, int, int] | None

    def modules(self) -> list[nn.Module]:
        return [Link(copy.deepcopy(body)) for body in self.bodies]

    def ours(self) -> Pipeline:
        def make(*args: Any) -> FunctionalPipelineStage:
            last = args[1] == args[2] - 1
            loss = loss_fn if self.folded and last else None
            shape = torch.empty(SIZE, WIDTH, dtype=torch.float64)  # which may depend on values inside
            return FunctionalPipelineStage(*args, shape, shape, compile=ENGINES[self.engine], loss_fn=loss)

        return of_schedule(self.modules(), self.schedule, make)

    def play(self, pipeline: Pipeline) -> Iterator[list[tuple[str, Any]]]:
        """Run the steps, and yield what is to be seen after each."""
        for k, events in enumerate(self.events):
            for happens, place in events:
                happens(pipeline, place)
            generator = torch.Generator().manual_seed(k)
            x, target = torch.randn(2, SIZE * MICROBATCHES, WIDTH, dtype=torch.float64, generator=generator)
            if self.fault is not None and self.fault[0] == k:
                self.fail(pipeline, x, target)
            output = pipeline.step(x, target).detach()
            yield [
                ("the output", output),
                *((name, None if t is None else t.clone()) for name, t in pipeline.state()),
            ]

    def fail(self, pipeline: Pipeline, x: Tensor, target: Tensor) -> None:
        """A step in which a forward throws; afterwards the user starts from the state before."""
        assert self.fault is not None
        before = [copy.deepcopy(module.state_dict()) for module in pipeline.modules]
        # A compiled stage meets the error when it is traced anew, at the first microbatch.
        faulty = pipeline.modules[self.fault[1]]
        faulty.left = 1 if self.engine == "aten" else 1 + self.fault[2]
        with pytest.raises(Exception) as caught:  # noqa: PT011
            pipeline.step(x, target)
        if isinstance(caught.value, fs.TraceError) and not is_fault(caught.value):
            raise caught.value  # a module that cannot be compiled
        assert is_fault(caught.value), caught.value
        faulty.left = 0
        for module, state in zip(pipeline.modules, before, strict=True):
            module.load_state_dict(state)
            module.zero_grad()
        for seen in pipeline.seen.values():
            seen.clear()


def is_fault(error: BaseException | None) -> bool:
    """Whether it is the user's error, was raised from it, or tells of it where shapes were found out."""
    while error is not None and not isinstance(error, Fault):
        if isinstance(error, fs.StageError) and "Fault" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return error is not None


@st.composite
def plots(draw: st.DrawFn, engine: str) -> Plot:
    """Draw a pipeline's story."""
    schedule = draw(st.sampled_from(WHOLE + SPLIT))
    count = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2}.get(schedule) or draw(st.integers(2, 3))
    body = strategies.modules(dtype=torch.float64, blocks=PRECISE)
    possible = EVENTS if schedule in WHOLE else tuple(e for e in EVENTS if e is not hooked_late)
    events = st.lists(st.tuples(st.sampled_from(possible), st.integers(0, 3)), max_size=2).map(tuple)
    fault = st.none() | st.tuples(st.integers(0, 2), st.integers(0, count - 1), st.integers(0, 1))
    return Plot(
        tuple(draw(body) for _ in range(count)),
        schedule,
        engine,
        draw(st.booleans()),
        tuple(draw(events) for _ in range(3)),
        draw(fault),
    )


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=max(12, settings.default.max_examples // 3))
@given(data=st.data())
def test_a_pipeline_does_as_eager_does_or_is_refused(engine: str, data: st.DataObject) -> None:
    plot = data.draw(plots(engine))
    expected, ours = plot.play(of_eager(plot.modules())), plot.play(plot.ours())
    for k in range(len(plot.events)):
        wanted = next(expected)
        try:
            found = next(ours)
        except fs.TraceError:
            assert engine == "aten"
            event("refused")
            return
        assert [name for name, _ in found] == [name for name, _ in wanted]
        for (name, got), (_, value) in zip(found, wanted, strict=True):
            difference = compare(f"step {k}: {name}", got, value, 1e-6)
            assert difference.accepted or difference.absolute < 1e-12, difference
    event(plot.schedule)
