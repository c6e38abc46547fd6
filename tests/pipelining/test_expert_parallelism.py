"""Mixtures of experts that lie on several ranks: each token goes to the rank of its expert and back.

How many tokens go where is known at run time alone ("counts", "grouped"), or bounded beforehand ("capacity").
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_ranks import Raised, ranks, run
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import funcstage as fs
from funcstage.pipelining import FunctionalPipelineStage, pipeline_order

pytestmark = pytest.mark.timeout(600)

WIDTH, EXPERTS, ROWS, MICROBATCHES, CAPACITY = 8, 4, 6, 4, 3


class Experts(nn.Module):
    """A router and its experts, of which a rank of `group` has its share; without a group, all.

    Args:
        how: "counts", "grouped" or "capacity".
        group: the ranks that share the experts.
    """

    def __init__(self, how: str, group: Any = None) -> None:
        super().__init__()
        self.how, self.group = how, group
        self.ranks = group.size() if group else 1
        dtype = torch.bfloat16 if how == "grouped" else torch.float64
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False, dtype=dtype)
        weight = torch.randn(EXPERTS, WIDTH, WIDTH).to(dtype) / WIDTH**0.5
        mine = weight.chunk(self.ranks)[group.rank() if group else 0]
        self.weight = nn.Parameter(mine.clone())

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).max(-1)
        if self.how == "capacity":
            found = self.bounded(x, chosen)
        else:
            found = self.counted(x, chosen)
        return torch.tanh(x + found * gates[:, None])

    def counted(self, x: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=EXPERTS)
        theirs = self._exchanged(counts)
        sent, received = (n.view(self.ranks, -1).sum(1).tolist() for n in (counts, theirs))
        tokens = self._sent(x[order], received, sent)
        expert = torch.arange(len(self.weight)).repeat(self.ranks).repeat_interleave(theirs)
        by_expert = expert.argsort(stable=True)
        sizes = torch.bincount(expert, minlength=len(self.weight))
        tokens = tokens[by_expert]
        if self.how == "grouped":
            ends = sizes.cumsum(0).to(torch.int32)
            found = torch._grouped_mm(tokens, self.weight, offs=ends)
        else:
            parts = tokens.split(sizes.tolist())
            found = torch.cat([part @ weight for part, weight in zip(parts, self.weight, strict=True)])
        found = torch.empty_like(found).index_copy(0, by_expert, found)
        returned = self._sent(found, sent, received)
        return torch.empty_like(returned).index_copy(0, order, returned)

    def bounded(self, x: Tensor, chosen: Tensor) -> Tensor:
        picked = F.one_hot(chosen, EXPERTS)
        place = (picked.cumsum(0) * picked).sum(1) - 1
        slots = F.one_hot(place.clamp(max=CAPACITY), CAPACITY + 1)[:, :CAPACITY].to(x.dtype)
        routes = picked.to(x.dtype)[:, :, None] * slots[:, None, :]
        sent = torch.einsum("tec,td->ecd", routes, x)
        tokens = self._sent(sent.flatten(0, 1)).view(self.ranks, len(self.weight), CAPACITY, WIDTH)
        found = torch.einsum("recd,edf->recf", tokens, self.weight)
        returned = self._sent(found.reshape(-1, WIDTH)).view(EXPERTS, CAPACITY, WIDTH)
        return torch.einsum("tec,ecd->td", routes, returned)

    def _exchanged(self, counts: Tensor) -> Tensor:
        return all_to_all_single(counts, None, None, self.group) if self.group else counts

    def _sent(self, x: Tensor, to: Any = None, of: Any = None) -> Tensor:
        return all_to_all_single_autograd(x, to, of, self.group) if self.group else x


def parts(n: int, how: str, group: Any = None) -> list[nn.Module]:
    """The same parts in each process, with as many experts as are its."""
    torch.manual_seed(0)
    return [nn.Sequential(Experts(how, group), Experts(how, group)) for _ in range(n)]


def batch(how: str, rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(10 + rank)
    x, target = torch.randn(2, MICROBATCHES * ROWS, WIDTH, dtype=torch.float64)
    dtype = torch.bfloat16 if how == "grouped" else torch.float64
    return x.to(dtype), target.to(dtype)


def trained(rank: int, group: Any, how: str, schedule: str, compile: Any) -> tuple[int, dict[str, Tensor]]:
    """The rank within its experts' group, and the gradients of a step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "experts"))
    data_rank = mesh.get_local_rank("experts")
    n = 2 if schedule == "1F1B" else 4
    mine = pipeline_order(schedule, n, MICROBATCHES, num_ranks=2).stages_of(mesh.get_local_rank("pipeline"))
    made = parts(n, how, mesh.get_group("experts"))
    x, target = batch(how, data_rank)
    stages = [
        FunctionalPipelineStage(
            made[i], i, n, "cpu", group=mesh.get_group("pipeline"), compile=compile, output_args=x[:ROWS]
        )
        for i in mine
    ]
    kind: Any = get_schedule_class(schedule)
    runner = kind(stages[0] if n == 2 else stages, MICROBATCHES, loss_fn=F.mse_loss)
    runner.step(*([x] if 0 in mine else []), target=target if n - 1 in mine else None)
    grads = {f"{i}.{k}": p.grad for i in mine for k, p in made[i].named_parameters() if p.grad is not None}
    return data_rank, grads


def trained_whole(n: int, how: str) -> list[dict[str, Tensor]]:
    """The same gradients, for each rank's tokens, by all experts in one process."""
    found = []
    for data_rank in range(2):
        made = parts(n, how)
        x, target = batch(how, data_rank)
        for y, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            for part in made:
                y = part(y)
            (F.mse_loss(y, wanted) / MICROBATCHES).backward()
        found.append({f"{i}.{k}": p.grad for i, part in enumerate(made) for k, p in part.named_parameters()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "schedule", "compile"),
    [
        ("counts", "ZBVZeroBubble", False),
        ("counts", "1F1B", {"backend": "aten", "fullgraph": False}),
        ("grouped", "1F1B", False),
        ("grouped", "ZBVZeroBubble", {"backend": "aten", "fullgraph": False}),
        ("capacity", "1F1B", False),
        ("capacity", "ZBVZeroBubble", {"backend": "aten", "fullgraph": True}),
    ],
)
def test_experts_on_several_ranks_have_the_gradients_of_all_experts_on_one(
    how: str, schedule: str, compile: Any
) -> None:
    answers = run(4, trained, how, schedule, compile)
    whole = trained_whole(2 if schedule == "1F1B" else 4, how)
    tolerance = 3e-2 if how == "grouped" else 1e-10
    compared = 0
    for data_rank, grads in answers:
        for name, grad in grads.items():
            if name.endswith("router.weight"):
                expected = whole[data_rank][name]
            else:  # tokens of both ranks went to these experts
                expected = (whole[0][name] + whole[1][name]).chunk(2)[data_rank]
            torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance, msg=name)
            compared += 1
    assert compared == 4 * len(whole[0]) // 2


class Exchanges(TorchDispatchMode):
    """Counts how often tokens are exchanged while it is entered."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops._c10d_functional.all_to_all_single.default
        return function(*args, **(kwargs or {}))


def exchanges_of_each_phase(rank: int, group: Any, compile: Any) -> list[int]:
    (module,) = parts(1, "capacity", group)
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, **compile) if compile else apply
    x, cotangent = (tensor[:ROWS] for tensor in batch("capacity", rank))
    fs.stage_vjp(stage, params, buffers, x)
    with Exchanges() as in_f:
        _, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    with Exchanges() as in_i:
        _, weight_pullback = pullback(cotangent)
    with Exchanges() as in_w:
        weight_pullback()
    return [in_f.count, in_i.count, in_w.count]


@pytest.mark.slow
@pytest.mark.parametrize("compile", [None, {"backend": "aten", "fullgraph": True}], ids=["eager", "aten"])
def test_tokens_travel_in_f_and_in_i_and_never_in_w(compile: Any) -> None:
    for counts in run(2, exchanges_of_each_phase, compile):
        assert counts == [4, 4, 0]


def refused_whole(rank: int, group: Any) -> None:
    (module,) = parts(1, "counts", group)
    apply, params, buffers = fs.functionalize(module)
    x, _ = batch("counts", rank)
    fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, x[:ROWS])


@pytest.mark.slow
def test_counts_that_are_read_are_refused_where_a_stage_must_be_one_program() -> None:
    for answer in ranks(2).run(refused_whole):
        assert isinstance(answer, Raised)
        assert "TraceError" in answer.kinds
        assert "test_expert_parallelism.py" in answer.message
