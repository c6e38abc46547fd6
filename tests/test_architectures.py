"""Stages as models have them, written out in plain torch, against eager backward on both engines."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_ranks import run
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage, pipeline_value_and_grad
from funcstage.testing import check_stage
from funcstage.testing.layers.weights import Symmetric

pytestmark = pytest.mark.slow

aten = functools.partial(fs.compile, backend="aten")
inductor = functools.partial(fs.compile, backend="inductor")
ENGINES = pytest.mark.parametrize("engine", [None, aten], ids=["closures", "aten"])


class MixtureOfExperts(nn.Module):
    """Tokens are sorted by expert; those beyond an expert's capacity are dropped, so no shape is data.

    Args:
        grouped: whether the experts' products are one grouped product over the sorted tokens, of which then
            none are dropped, or batched products over padded experts.
    """

    def __init__(self, width: int, experts: int, top: int, capacity: int, grouped: bool = False) -> None:
        super().__init__()
        self.experts, self.top, self.capacity, self.grouped = experts, top, capacity, grouped
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, -2)
        probabilities = self.gate(tokens).softmax(-1)
        weights, chosen = probabilities.topk(self.top)
        weights = weights / weights.sum(-1, keepdim=True)
        load = F.one_hot(chosen, self.experts).sum((0, 1)) / chosen.numel()
        auxiliary = self.experts * (load.detach() * probabilities.mean(0)).sum()
        expert, order = chosen.flatten().sort(stable=True)
        token = order // self.top
        counts = F.one_hot(expert, self.experts).sum(0)
        if self.grouped:
            ends = counts.cumsum(0).to(torch.int32)
            hidden = F.silu(torch._grouped_mm(tokens[token], self.up, ends))
            rows = torch._grouped_mm(hidden, self.down, ends)
        else:
            place = torch.arange(len(expert), device=x.device) - (counts.cumsum(0) - counts)[expert]
            kept = place < self.capacity
            slot = torch.where(kept, expert * self.capacity + place, self.experts * self.capacity)
            padded = tokens.new_zeros(self.experts * self.capacity + 1, tokens.shape[-1])
            padded = padded.index_copy(0, slot, tokens[token])[:-1].unflatten(0, (self.experts, -1))
            done = torch.bmm(F.silu(torch.bmm(padded, self.up)), self.down).flatten(0, 1)
            rows = F.pad(done, (0, 0, 0, 1))[slot]
        mixed = rows * weights.flatten()[order, None]
        return x + torch.zeros_like(tokens).index_add(0, token, mixed).view_as(x), auxiliary


class GroupedQueryAttention(nn.Module):
    """Causal attention with rotary positions, whose keys and values serve several queries each."""

    def __init__(self, width: int, heads: int, groups: int, repeated: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.repeated = heads, groups, repeated
        size = width // heads
        self.queries = nn.Linear(width, width, bias=False)
        self.keys_values = nn.Linear(width, 2 * groups * size)
        self.out = nn.Linear(width, width)
        angles = torch.outer(torch.arange(16.0), 100 ** -(torch.arange(0, size, 2) / size))
        self.rotation: Tensor
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        cos, sin = self.rotation[:, : x.shape[-2]].to(x.dtype)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.rotated(self.queries(x).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        k, v = self.keys_values(x).unflatten(-1, (2 * self.groups, -1)).transpose(1, 2).chunk(2, 1)
        k = self.rotated(k)
        if self.repeated:
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeated)
        return x + self.out(y.transpose(1, 2).flatten(-2))


class LoRA(nn.Linear):
    """A frozen layer with a trained product of low rank beside it, or merged into its weight."""

    def __init__(self, inputs: int, outputs: int, rank: int, merged: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.merged = merged
        self.a = nn.Parameter(torch.randn(rank, inputs))
        self.b = nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight + self.b @ self.a, self.bias)
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b)


class MovingAverage(nn.Module):
    """Subtracts an average over the past of its input and of its own weight, which are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.mean: Tensor
        self.shadow: Tensor
        self.steps: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("shadow", torch.zeros(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.steps += 1
                self.mean.lerp_(x.flatten(0, -2).mean(0), 0.1)
                self.shadow = 0.9 * self.shadow + 0.1 * self.weight
        return (x - self.mean) * self.weight + self.shadow


class SelectiveScan(nn.Module):
    """The recurrence of Mamba, h[t] = a[t] h[t-1] + b[t] x[t], in one of three ways.

    Args:
        how: a Python ``loop``, cumulative sums of logarithms (``cumsum``), or ``doubling``, the associative
            scan in a logarithmic number of steps.
    """

    def __init__(self, width: int, states: int, how: str) -> None:
        super().__init__()
        self.how, self.states = how, states
        self.inner = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.selection = nn.Linear(width, 1 + 2 * states)
        self.log_decay = nn.Parameter(torch.randn(width, states) * 0.1)
        self.skip = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width, bias=False)

    def scan(self, log_a: Tensor, u: Tensor) -> Tensor:
        if self.how == "loop":
            h, hs = torch.zeros_like(u[:, 0]), []
            for t in range(u.shape[1]):
                h = log_a[:, t].exp() * h + u[:, t]
                hs.append(h)
            return torch.stack(hs, 1)
        if self.how == "cumsum":
            total = log_a.cumsum(1)
            return total.exp() * (u * (-total).exp()).cumsum(1)
        a, step = log_a.exp(), 1
        while step < u.shape[1]:
            before = F.pad(u, (0, 0, 0, 0, step, 0))[:, : u.shape[1]]
            u = u + a * before
            a = a * F.pad(a, (0, 0, 0, 0, step, 0), value=1.0)[:, : u.shape[1]]
            step *= 2
        return u

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.inner(x).chunk(2, -1)
        y = F.silu(self.conv(y.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        delta, b, c = self.selection(y).split((1, self.states, self.states), -1)
        delta = F.softplus(delta)
        log_a = -delta[..., None] * self.log_decay.exp()
        h = self.scan(log_a, (delta * y)[..., None] * b[..., None, :])
        y = torch.einsum("btds,bts->btd", h, c) + self.skip * y
        return self.out(y * F.silu(gate))


class Tied(nn.Module):
    """One weight as embedding, in two products, transposed in a third one, and its norm in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8)
        self.first.weight = self.second.weight = self.embedding.weight

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.second(self.first(x + self.embedding(tokens)).tanh())
        return y @ self.embedding.weight / (1 + self.embedding.weight.norm())


def parametrized() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.GELU(), layer)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mixture of experts": lambda: MixtureOfExperts(8, 4, 2, capacity=16),
    "mixture of experts that drops tokens": lambda: MixtureOfExperts(8, 4, 2, capacity=3),
    "mixture of one expert a token": lambda: MixtureOfExperts(8, 3, 1, capacity=12),
    "grouped-query attention": lambda: GroupedQueryAttention(8, 4, 2, repeated=False),
    "grouped-query attention, repeated": lambda: GroupedQueryAttention(8, 4, 1, repeated=True),
    "LoRA": lambda: nn.Sequential(LoRA(8, 16, 2), nn.GELU(), LoRA(16, 8, 2)),
    "merged LoRA": lambda: nn.Sequential(LoRA(8, 16, 2, merged=True), nn.GELU(), LoRA(16, 8, 2, merged=True)),
    "parametrized": parametrized,
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(8, 4)),
    ),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(8, 8), n_power_iterations=2), nn.Tanh(), nn.Linear(8, 8)
    ),
    "moving average": lambda: nn.Sequential(nn.Linear(8, 8), MovingAverage(8)),
    "scan in a loop": lambda: SelectiveScan(8, 3, "loop"),
    "scan by cumulative sums": lambda: SelectiveScan(8, 3, "cumsum"),
    "scan by doubling": lambda: SelectiveScan(8, 3, "doubling"),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name]().to(dtype)


@pytest.mark.supports(
    "mixtures of experts, grouped-query attention, rotary embeddings, scans, parametrizations, spectral norm"
)
@ENGINES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_split_as_eager_runs_it(name: str, training: bool, engine: Any) -> None:
    report = check_stage(
        made(name).train(training), torch.randn(3, 6, 8).double(), engines=engine or "closures"
    )
    (found,) = report.engines.values()
    assert found.flops is not None
    assert found.flops.weight > 0


@pytest.mark.parametrize("name", ["mixture of experts", "grouped-query attention", "scan by doubling"])
def test_an_architecture_through_inductor_is_eager_backward(name: str) -> None:
    check_stage(made(name, torch.float32), torch.randn(3, 6, 8), engines=inductor, flops=False)


@ENGINES
def test_a_weight_with_four_uses_within_a_stage_gets_the_sum(engine: Any) -> None:
    torch.manual_seed(0)
    module = Tied().double()
    assert [name for name, _ in module.named_parameters()] == ["embedding.weight", "second.bias"]
    check_stage(module, torch.randn(3, 5, 8).double(), torch.randint(8, (3, 5)), engines=engine or "closures")


def test_scans_agree_with_each_other() -> None:
    x = torch.randn(2, 6, 8).double()
    loop, *others = (made(name) for name in ARCHITECTURES if name.startswith("scan"))
    for other in others:
        torch.testing.assert_close(other(x), loop(x))


@ENGINES
def test_experts_in_a_grouped_product_are_those_in_batched_products(engine: Any) -> None:
    """Counts of tokens are offsets, never shapes; each expert's gradient comes from its own tokens."""
    torch.manual_seed(0)
    grouped = MixtureOfExperts(8, 4, 2, capacity=0, grouped=True).bfloat16()
    x = torch.randn(3, 8, 8).bfloat16()
    check_stage(grouped, x, engines=engine or "closures")
    padded = MixtureOfExperts(8, 4, 2, capacity=48).double()
    padded.load_state_dict(grouped.state_dict())
    apply, params, buffers = fs.functionalize(grouped)
    (output, auxiliary), _, pullback = fs.stage_vjp(engine(apply) if engine else apply, params, buffers, x)
    grads = pullback((torch.ones_like(output), torch.ones_like(auxiliary)))[1]()
    expected, balance = padded(x.double())
    (expected.sum() + balance).backward()
    for name in ("up", "down"):
        wanted = padded.get_parameter(name).grad
        error = (grads[name] - wanted).norm() / wanted.norm()
        assert error < 2e-2, name


@ENGINES
def test_an_auxiliary_loss_is_differentiated_by_itself(engine: Any) -> None:
    module = made("mixture of experts")
    x = torch.randn(3, 6, 8).double()
    report = check_stage(
        module,
        x,
        engines=engine or "closures",
        output_grads=lambda output: (None, torch.ones_like(output[1])),
    )
    grads = {leaf.leaf for leaf in report.leaves if "gradient" in leaf.leaf}
    assert "gradient of params['gate.weight']" in grads


def flops(function: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


@pytest.mark.supports("frozen weights (LoRA), at no cost in W")
@ENGINES
def test_frozen_weights_cost_nothing_in_w(engine: Any) -> None:
    torch.manual_seed(0)
    rank, rows = 2, 3 * 6
    module = nn.Sequential(LoRA(8, 16, rank), nn.GELU(), LoRA(16, 8, rank))
    apply, params, buffers = fs.functionalize(module)
    assert sorted(params) == ["0.a", "0.b", "2.a", "2.b"]
    stage = engine(apply) if engine else apply
    x = torch.randn(3, 6, 8)
    fs.stage_backward(fs.stage_vjp(stage, params, buffers, x)[2], torch.ones(3, 6, 8))  # compiled
    (output, _, pullback), of_f = flops(lambda: fs.stage_vjp(stage, params, buffers, x))
    (_, weight_pullback), of_i = flops(lambda: pullback(torch.ones_like(output)))
    grads, of_w = flops(weight_pullback)
    base, adapters = 2 * rows * 2 * 8 * 16, 2 * rows * 2 * rank * (8 + 16)
    assert (of_f, of_w) == (base + adapters, adapters)
    assert of_i == base + adapters
    assert grads.keys() == params.keys()


@ENGINES
def test_a_power_iteration_goes_on_from_microbatch_to_microbatch(engine: Any) -> None:
    module = made("spectral norm")
    apply, params, buffers = fs.functionalize(copy.deepcopy(module))
    stage = engine(apply) if engine else apply
    batches, pending = torch.randn(4, 5, 8).double(), []
    for x in batches:
        output, buffers, pullback = fs.stage_vjp(stage, params, buffers, x)
        pending.append(pullback(torch.ones_like(output))[1])
        module(x).sum().backward()
    grads = fs.stage_backward_weight(pending)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-11, atol=1e-12)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


@ENGINES
def test_a_module_that_is_reached_twice_keeps_its_own_tensors(engine: Any) -> None:
    torch.manual_seed(0)
    norm, linear = nn.BatchNorm1d(8), nn.Linear(8, 8)
    module = nn.Sequential(linear, norm, nn.Tanh(), linear, norm).double()
    state = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    check_stage(module, torch.randn(5, 8).double(), engines=engine or "closures")
    assert {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()} == state


# A weight in the first stage and in the last.

VOCABULARY, WIDTH, CHUNKS = 11, 6, 4


class First(nn.Module):
    """Embeds tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(self.embedding(tokens)).tanh()


class Last(nn.Module):
    """Scores every token by its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).transpose(1, 2)


def language_model(num_stages: int, shared: bool) -> list[nn.Module]:
    """Stages whose first and last have the same embeddings: one parameter, or a copy each."""
    torch.manual_seed(0)
    between = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(num_stages - 2)]
    first, last = First(), Last()
    if shared:
        last.head.weight = first.embedding.weight
    else:
        last.head.weight.data.copy_(first.embedding.weight)
    return [module.double() for module in (first, *between, last)]


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(VOCABULARY, (2, 2 * CHUNKS, 5), generator=generator)
    return x, y


def share_of_loss(output: Tensor, target: Tensor) -> Tensor:
    """What a microbatch adds to the mean."""
    return F.cross_entropy(output, target) / CHUNKS


def tied_by_eager(num_stages: int, steps: int = 1) -> list[dict[str, Tensor]]:
    """The gradients of each step of the model that has one parameter for both, trained by SGD."""
    modules = language_model(num_stages, shared=True)
    x, y = tokens()
    done = []
    for _ in range(steps):
        for part, target in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True):
            share_of_loss(nn.Sequential(*modules)(part), target).backward()
        done.append(
            {f"{i}.{n}": p.grad.clone() for i, m in enumerate(modules) for n, p in m.named_parameters()}
        )
        descend(modules)
    return done


def descend(modules: list[nn.Module]) -> None:
    parameters = {parameter for module in modules for parameter in module.parameters()}
    torch.optim.SGD(parameters, lr=0.5).step()
    for parameter in parameters:
        parameter.grad = None


@ENGINES
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_gradients_of_a_weight_in_two_stages_add_up_to_that_of_the_tied_model(
    schedule: str, engine: Any
) -> None:
    stages = [fs.functionalize(module) for module in language_model(4, shared=True)]
    params = [stage.params for stage in stages]
    embedding = params[0]["embedding.weight"]
    assert params[3]["head.weight"].data_ptr() == embedding.data_ptr()
    applies = [engine(stage.apply) if engine else stage.apply for stage in stages]
    step = pipeline_value_and_grad(applies, F.cross_entropy, schedule=schedule, num_microbatches=CHUNKS)
    _, _, grads = step(params, [stage.buffers for stage in stages], *tokens())
    total = grads[0]["embedding.weight"] + grads[3]["head.weight"]
    torch.testing.assert_close(total, tied_by_eager(4)[0]["0.embedding.weight"], rtol=1e-12, atol=1e-14)


def test_a_tie_between_stages_is_a_derivation_from_the_parameters_of_the_whole_model() -> None:
    """`derive` gives a parameter out twice, and its pullback adds the gradients up."""
    stages = [fs.functionalize(module) for module in language_model(4, shared=True)]
    whole = {f"{i}.{name}": p for i, stage in enumerate(stages) for name, p in stage.params.items()}
    del whole["3.head.weight"]

    def cut(whole: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        tied = {**whole, "3.head.weight": whole["0.embedding.weight"]}
        return [{name: tied[f"{i}.{name}"] for name in stage.params} for i, stage in enumerate(stages)]

    params, pullback = fs.derive(cut, whole)
    step = pipeline_value_and_grad(stages, F.cross_entropy, num_microbatches=CHUNKS)
    _, _, grads = step(params, [stage.buffers for stage in stages], *tokens())
    found, expected = pullback(grads), tied_by_eager(4)[0]
    assert found.keys() == whole.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-14)


def train_tied(rank: int, group: dist.ProcessGroup, schedule: str, compile: Any) -> list[dict[str, Tensor]]:
    """Two steps of SGD; the job of every rank."""
    v_shaped = schedule == "ZBVZeroBubble"
    mine = [rank, 3 - rank] if v_shaped else [rank]
    num_stages = 4 if v_shaped else 2
    modules = language_model(num_stages, shared=v_shaped)
    stages = [
        FunctionalPipelineStage(modules[i], i, num_stages, "cpu", group=group, compile=compile) for i in mine
    ]
    kind: Any = get_schedule_class(schedule)
    # Schedules divide a gradient once for every stage that has it, so the loss is divided instead.
    driver = kind(stages if v_shaped else stages[0], CHUNKS, loss_fn=share_of_loss, scale_grads=False)
    x, y = tokens()
    done = []
    for _ in range(2):
        driver.step(*([x] if 0 in mine else []), target=y if num_stages - 1 in mine else None)
        if not v_shaped:
            copy_of = modules[0].embedding if rank == 0 else modules[1].head
            dist.all_reduce(copy_of.weight.grad, group=group)
        done.append({f"{i}.{n}": p.grad.clone() for i in mine for n, p in modules[i].named_parameters()})
        descend([modules[i] for i in mine])
    return done


@pytest.mark.supports("weights tied within a stage or over stages")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compile", [False, {"backend": "aten"}], ids=["eager", "aten"])
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_embeddings_tied_over_ranks_or_on_one_train_as_the_tied_model(schedule: str, compile: Any) -> None:
    """On one rank the stages share a parameter; over ranks each has a copy, whose gradients are summed."""
    num_stages = 4 if schedule == "ZBVZeroBubble" else 2
    answers = run(2, train_tied, schedule, compile)
    for step, expected in enumerate(tied_by_eager(num_stages, steps=2)):
        for answer in answers:
            for name, grad in answer[step].items():
                wanted = expected["0.embedding.weight" if name.endswith("head.weight") else name]
                torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)
