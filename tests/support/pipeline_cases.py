"""Pipelines for the tests, as data: what every rank runs, and the same model run by plain eager autograd."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional

from funcstage.pipelining import Action, FunctionalPipelineStage, Order, torch_schedule

V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
ONE_STAGE_A_RANK = ("GPipe", "1F1B")
LEARNING_RATE = 0.1


class Model(NamedTuple):
    """A model cut into stages, with a batch for it."""

    modules: list[nn.Module]
    inputs: tuple[Any, ...]
    target: Tensor
    loss_fn: Callable[..., Tensor] = functional.mse_loss
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # never written


class Block(nn.Module):
    """Widths and depths differ from stage to stage, so that a mixed-up stage cannot go unnoticed."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, outputs)
        self.rest = nn.ModuleList(nn.Linear(outputs, outputs) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.rest:
            x = layer(x.tanh())
        return x


def blocks(widths: Sequence[int], batch: int, dtype: torch.dtype = torch.float64) -> Model:
    """Perceptrons from width to width; stage `i` has `i % 3` layers more than one."""
    torch.manual_seed(0)
    modules = [Block(a, b, i % 3).to(dtype) for i, (a, b) in enumerate(itertools.pairwise(widths))]
    inputs = torch.randn(batch, widths[0], dtype=dtype)
    return Model(modules, (inputs,), torch.randn(batch, widths[-1], dtype=dtype))


def uneven(num_stages: int, batch: int) -> Model:
    return blocks([3 + (7 * i) % 5 for i in range(num_stages + 1)], batch)


def with_widths(widths: tuple[int, ...], num_stages: int, batch: int) -> Model:
    return blocks(widths, batch)


def in_bfloat16(num_stages: int, batch: int) -> Model:
    return blocks([4] * (num_stages + 1), batch, torch.bfloat16)


def alike(num_stages: int, batch: int) -> Model:
    """Stages of one kind, which are compiled once."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(4, 4), nn.GELU()).double() for _ in range(num_stages)]
    return Model(modules, (torch.randn(batch, 4).double(),), torch.randn(batch, 4).double())


class Growing(nn.Module):
    """A factor that every microbatch finds larger; backward needs the one that its forward had."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("gain", torch.linspace(0.5, 1.0, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh() * (self.gain + 0)
        self.gain.mul_(1.5)
        return y


def growing(num_stages: int, batch: int) -> Model:
    torch.manual_seed(0)
    modules: list[nn.Module] = [Growing().double() for _ in range(num_stages)]
    return Model(modules, (torch.randn(batch, 4).double(),), torch.randn(batch, 4).double())


class Tokens(nn.Module):
    """A first stage that is fed with integers, has two outputs of which one is integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, tokens: Tensor, *, scale: float = 1.0, flip: bool = False) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens) * self.frozen * scale
        return (-x if flip else x).mean(1), tokens[:, 0]


class Normed(nn.Module):
    """Several inputs and outputs, tied weights, batch statistics, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 6)
        self.down.weight = self.up.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("spread", torch.ones(1).expand(6))

    def forward(
        self, x: Tensor, first: Tensor, skip: Tensor | None = None, *, scale: float = 1.0, flip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self.down(self.up(self.norm(x)).tanh()) * self.spread * scale + (0 if skip is None else skip)
        return (-y if flip else y), first, x if skip is None else x + skip


class Head(nn.Module):
    """A last stage that one of its inputs gets no gradient from."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 5)

    def forward(
        self, x: Tensor, first: Tensor, skip: Tensor, *, scale: float = 1.0, flip: bool = False
    ) -> Tensor:
        return self.out(x) + first[:, None]


def with_everything(num_stages: int, batch: int) -> Model:
    """Integers, several inputs and outputs, tied and frozen and unused parameters, buffers, keywords."""
    torch.manual_seed(0)
    modules = [Tokens(), *(Normed() for _ in range(num_stages - 2)), Head()]
    return Model(
        [module.double() for module in modules],
        (torch.randint(11, (batch, 4)),),
        torch.randint(5, (batch,)),
        functional.cross_entropy,
        {"scale": 0.5, "flip": True},
    )


@dataclass(frozen=True)
class Case:
    """A pipeline to run.

    Attributes:
        schedule: its name, the actions of each rank, as a CSV file has them, or an order of ours.
        num_stages: over how many stages the model is spread.
        num_microbatches: into how many the batch is cut.
        model: makes the model, the same on every rank.
        size: of a microbatch.
        compile: for the stages.
        folded: whether the last stage has the loss in its programs.
        grad_dtype: for the stages.
        torchs: which stages are torch's own.
        steps: of the optimizer.
        backwards: how many steps of the schedule before one of the optimizer.
        options: of the schedule.
        evals: whether to evaluate after each step.
        hooks: whether parameters have hooks that change their gradients.
        encoder: whether the inputs come out of a module outside of the pipeline.
        changes: what is done to the modules before a step after the first.
        offload: for the stages.
    """

    schedule: str | tuple[str, ...] | Order
    num_stages: int
    num_microbatches: int
    model: Callable[[int, int], Model] = uneven
    size: int = 2
    compile: Any = False
    folded: bool = False
    grad_dtype: torch.dtype | None = None
    torchs: tuple[int, ...] = ()
    steps: int = 1
    backwards: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    evals: bool = False
    hooks: bool = False
    encoder: bool = False
    changes: tuple[Callable[[nn.Module], None], ...] = ()
    offload: Any = None

    def build(self) -> Model:
        model = self.model(self.num_stages, self.size * self.num_microbatches)
        for parameter in (p for module in model.modules for p in module.parameters() if self.hooks):
            parameter.register_hook(lambda grad: grad.sign() * grad.square() + 0.125)
        return model

    def make_encoder(self, model: Model) -> nn.Module | None:
        torch.manual_seed(1)
        width = model.inputs[0].shape[-1]
        return nn.Sequential(nn.Linear(width, width), nn.Tanh()).double() if self.encoder else None

    def change(self, step: int, modules: Sequence[nn.Module]) -> None:
        """Do to the modules what is to be done before a step."""
        if 0 < step <= len(self.changes):
            for module in modules:
                torch.manual_seed(step)
                self.changes[step - 1](module)

    def stages_of(self, rank: int, world_size: int) -> list[int]:
        if isinstance(self.schedule, Order):
            return self.schedule.stages_of(rank)
        if self.schedule in V_SHAPED:
            return [rank, 2 * world_size - 1 - rank]
        return list(range(rank, self.num_stages, world_size))


class Step(NamedTuple):
    """What is to be seen after a step, gradients and state by name of stage and tensor.

    Attributes:
        grads: before the optimizer.
        state: parameters and buffers after it.
        losses: of the last step's microbatches.
        output: of the last step, and of the evaluation after it.
    """

    grads: dict[str, Tensor | None]
    state: dict[str, Tensor]
    losses: list[Tensor]
    outputs: list[Tensor]


def in_pieces(order: Order, pieces: int, seed: int = 0) -> Order:
    """The same order with W in pieces, the first where the whole was and the others anywhere after it."""
    rng = random.Random(seed)
    ranks = []
    for actions in order.ranks:
        found: list[Action] = []
        for action in reversed(actions):
            found.insert(0, action)
            for _ in range(pieces - 1 if action.kind == "W" else 0):
                found.insert(rng.randint(1, len(found)), action)
        ranks.append(tuple(found))
    return Order(order.schedule, order.num_stages, order.num_microbatches, tuple(ranks), pieces)


def on_one_rank(order: Order) -> Order:
    """The same order, all of it on one rank."""
    whole = (tuple(order.in_turn()),)
    return Order(order.schedule, order.num_stages, order.num_microbatches, whole, order.pieces)


def make_stages(case: Case, model: Model, rank: int, group: dist.ProcessGroup) -> list[Any]:
    def stage(i: int) -> PipelineStage:
        if i in case.torchs:
            return PipelineStage(model.modules[i], i, case.num_stages, torch.device("cpu"), group=group)
        return FunctionalPipelineStage(
            model.modules[i],
            i,
            case.num_stages,
            "cpu",
            group=group,
            compile=case.compile,
            loss_fn=model.loss_fn if case.folded else None,
            grad_dtype=case.grad_dtype,
            offload=case.offload,
        )

    return [stage(i) for i in case.stages_of(rank, group.size())]


def make_schedule(case: Case, stages: list[Any], loss_fn: Any) -> Any:
    if isinstance(case.schedule, tuple):
        return from_csv(case.schedule, stages, case.num_microbatches, loss_fn)
    if isinstance(case.schedule, Order):
        return torch_schedule(case.schedule, stages, loss_fn, **case.options)
    kind = schedules.get_schedule_class(case.schedule)
    given = stages[0] if issubclass(kind, schedules.PipelineScheduleSingle) else stages
    return kind(given, case.num_microbatches, loss_fn=loss_fn, **case.options)


def from_csv(rows: tuple[str, ...], stages: list[Any], num_microbatches: int, loss_fn: Any) -> Any:
    schedule = schedules._PipelineScheduleRuntime(stages, num_microbatches, loss_fn=loss_fn)
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write("\n".join(row.replace(" ", ",") for row in rows))
        file.flush()
        schedule._load_csv(file.name)
    return schedule


def train(rank: int, group: dist.ProcessGroup, case: Case) -> list[Step]:
    """Run a case; the job of every rank."""
    model = case.build()
    stages = make_stages(case, model, rank, group)
    mine = [stage.stage_index for stage in stages]
    ours = next((stage for stage in stages if isinstance(stage, FunctionalPipelineStage)), None)
    schedule = make_schedule(case, stages, ours.loss_fn if case.folded and ours else model.loss_fn)
    encoder = case.make_encoder(model) if 0 in mine else None
    target = model.target if case.num_stages - 1 in mine else None
    optimizers = optimizers_of([model.modules[i] for i in mine])
    done = []
    for step in range(case.steps):
        case.change(step, [model.modules[i] for i in mine])
        losses: list[Tensor] = []
        for _ in range(case.backwards):
            args = () if 0 not in mine else model.inputs if encoder is None else (encoder(*model.inputs),)
            output = schedule.step(*args, target=target, losses=losses, **model.kwargs)
        outputs = [] if output is None else [output]
        grads = grads_of(model, mine) | taken_from(encoder)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if case.evals:
            output = schedule.eval(*args, target=target, **model.kwargs)
            outputs += [] if output is None else [output]
        done.append(Step(grads, state_of(model, mine), [loss.detach() for loss in losses], outputs))
    return done


def expected(case: Case) -> list[Step]:
    """Run the same by plain eager autograd, one microbatch after the other through the whole model."""
    model = case.build()
    every = range(case.num_stages)
    optimizers = optimizers_of(model.modules)
    encoder = case.make_encoder(model)
    divisor = case.num_microbatches if case.options.get("scale_grads", True) else 1
    done = []
    for step in range(case.steps):
        case.change(step, model.modules)
        for _ in range(case.backwards):
            losses, outputs = [], []
            for output, target in forward(model, case.num_microbatches, encoder):
                loss = model.loss_fn(output, target)
                loss.backward()
                losses.append(loss.detach())
                outputs.append(output.detach())
            for module in (*model.modules, encoder or nn.Module()):
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= divisor
        outputs = [torch.cat(outputs)]
        grads = grads_of(model, every) | taken_from(encoder)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if case.evals:
            outputs.append(
                torch.cat([output.detach() for output, _ in forward(model, case.num_microbatches)])
            )
        done.append(Step(grads, state_of(model, every), losses, outputs))
    return done


def forward(
    model: Model, num_microbatches: int, encoder: nn.Module | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    chunks = [tensor.chunk(num_microbatches) for tensor in (*model.inputs, model.target)]
    for *values, target in zip(*chunks, strict=True):
        value: Any = tuple(values) if encoder is None else encoder(*values)
        for module in model.modules:
            value = module(*(value if isinstance(value, tuple) else (value,)), **model.kwargs)
        yield value, target


def optimizers_of(modules: Sequence[nn.Module]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=0.9) for module in modules]


def grads_of(model: Model, stages: Sequence[int]) -> dict[str, Tensor | None]:
    return {
        f"{i}.{name}": None if parameter.grad is None else parameter.grad.clone()
        for i in stages
        for name, parameter in model.modules[i].named_parameters()
    }


def taken_from(encoder: nn.Module | None) -> dict[str, Tensor | None]:
    """Take the gradients of the encoder, which no optimizer trains."""
    if encoder is None:
        return {}
    grads = {f"encoder.{name}": p.grad for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    return grads


def state_of(model: Model, stages: Sequence[int]) -> dict[str, Tensor]:
    return {f"{i}.{name}": t.clone() for i in stages for name, t in model.modules[i].state_dict().items()}


def gathered(answers: Sequence[Sequence[Step]]) -> list[Step]:
    """Put together what the ranks saw of each step."""
    return [
        Step(
            {name: grad for step in steps for name, grad in step.grads.items()},
            {name: tensor for step in steps for name, tensor in step.state.items()},
            [loss for step in steps for loss in step.losses],
            [output for step in steps for output in step.outputs],
        )
        for steps in zip(*answers, strict=True)
    ]


def assert_same(found: Sequence[Step], wanted: Sequence[Step], **tolerance: float) -> None:
    """Compare steps, to the last bit unless a tolerance is given."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    assert len(found) == len(wanted)
    for ours, eager in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.losses, eager.losses, **tolerance)
        torch.testing.assert_close(ours.outputs, eager.outputs, **tolerance)
        absent = {name for name, grad in eager.grads.items() if grad is None}
        assert {name for name, grad in ours.grads.items() if grad is None} == absent
        for mine, other in ((ours.grads, eager.grads), (ours.state, eager.state)):
            assert mine.keys() == other.keys()
            for name in mine.keys() - absent:
                torch.testing.assert_close(mine[name], other[name], **tolerance)
