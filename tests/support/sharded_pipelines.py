"""Pipelines of sharded stages, trained for a few steps, beside the same model whole and in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from funcstage.pipelining import FunctionalPipelineStage, pipeline_order

WIDTH, HIDDEN, ROWS, MICROBATCHES, STEPS = 4, 8, 2, 4, 3

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""Options of optimizers by the names of parameters: other ranks' stages have the same numbers."""


class Layout(NamedTuple):
    """How the stages of a pipeline are sharded over a mesh within each.

    Attributes:
        sizes: of the mesh within a stage.
        names: of its dimensions: "replica", "shard" and "tensor".
        root: whether `fully_shard` is given each part as a whole, beside its blocks.
        every: of how many stages one is sharded.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    root: bool = True
    every: int = 1

    @property
    def data_ranks(self) -> int:
        """How many ranks have other data."""
        ranks = 1
        for size, name in zip(self.sizes, self.names, strict=True):
            ranks *= 1 if name == "tensor" else size
        return ranks if self.every == 1 else 1


LAYOUTS = {
    "tensor": Layout((2,), ("tensor",)),
    "fsdp": Layout((2,), ("shard",)),
    "hsdp": Layout((2, 2), ("replica", "shard")),
    "fsdp+tensor": Layout((2, 2), ("shard", "tensor")),
    "units": Layout((2,), ("shard",), root=False),
    "some": Layout((2,), ("shard",), every=2),
}


class Block(nn.Module):
    """A perceptron on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


Part = Callable[[], nn.Module]


def two_blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


def parts(n: int, make: Part = two_blocks, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """The same parts in each process."""
    torch.manual_seed(0)
    return [make().to(dtype) for _ in range(n)]


def shard(part: nn.Module, layout: Layout, index: int, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Shard a part as its layout says; gloo has no means."""
    if index % layout.every:
        return part
    if "tensor" in layout.names:
        for block in part.children():
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], plan)
    over = tuple(name for name in layout.names if name != "tensor")
    if not over:
        return part
    options = {"reshard_after_forward": False, **options}
    for unit in (*part.children(), *([part] if layout.root else [])):
        fully_shard(unit, mesh=mesh[over], **options)
    for unit in part.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
    return part


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch(step: int, data_rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(10 + step + 100 * data_rank)
    x, target = torch.randn(2, MICROBATCHES * ROWS, WIDTH, dtype=torch.float64).to(dtype)
    return x, target


def named(parts: Iterable[tuple[int, nn.Module]], what: str) -> dict[str, Tensor]:
    return {
        f"{i}.{n}": full(getattr(p, what)).clone()
        for i, part in parts
        for n, p in part.named_parameters()
        if getattr(p, what) is not None
    }


def clip(part: nn.Module) -> None:
    """Clip weights of the perceptrons and the rest apart: torch takes no norm over several meshes."""
    inner = [p for n, p in part.named_parameters() if ".norm." not in n]
    rest = [p for n, p in part.named_parameters() if ".norm." in n]
    for parameters in (inner, rest):
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 0.05)


def num_stages(schedule: str, ranks: int) -> int:
    """Two a rank, where the schedule has several."""
    return ranks if schedule in ("GPipe", "1F1B") else 2 * ranks


class Pipeline:
    """The stages of this rank, of a pipeline over as many ranks as the mesh within a stage leaves.

    Args:
        how: the layout's name.
        schedule: the schedule's.
        kinds: "ours", "torch's" or "mixed".
        make: makes a part.
        dtype: of the parameters.
        options: of `fully_shard`.
        stage: further options of our stage.
    """

    def __init__(
        self,
        how: str,
        schedule: str,
        kinds: str = "ours",
        make: Part = two_blocks,
        dtype: torch.dtype = torch.float64,
        options: dict[str, Any] | None = None,
        **stage: Any,
    ) -> None:
        self.layout, self.schedule, self.dtype = LAYOUTS[how], schedule, dtype
        world = torch.distributed.get_world_size()
        inner = 1
        for size in self.layout.sizes:
            inner *= size
        ranks = world // inner
        mesh = init_device_mesh(
            "cpu", (ranks, *self.layout.sizes), mesh_dim_names=("pipeline", *self.layout.names)
        )
        over = tuple(name for name in self.layout.names if name != "tensor")
        coordinates = dict(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True))
        self.data_rank = 0
        for name in over if self.layout.every == 1 else ():
            self.data_rank = self.data_rank * mesh[name].size() + coordinates[name]
        self.n = num_stages(schedule, ranks)
        order = pipeline_order(schedule, self.n, MICROBATCHES, num_ranks=ranks)
        mine = order.stages_of(mesh["pipeline"].get_local_rank())
        made = parts(self.n, make, dtype)
        self.parts = {i: shard(made[i], self.layout, i, mesh, **(options or {})) for i in mine}
        self.group = mesh["pipeline"].get_group()
        self.stages = [self._stage(i, kinds, stage) for i in self.parts]
        kind: Any = get_schedule_class(schedule)
        single = schedule in ("GPipe", "1F1B")
        self.runner = kind(self.stages[0] if single else self.stages, MICROBATCHES, loss_fn=F.mse_loss)
        self.optimizers = [torch.optim.AdamW(p.parameters(), lr=0.1) for p in self.parts.values()]

    def _stage(self, i: int, kinds: str, options: dict[str, Any]) -> Any:
        if kinds == "torch's" or (kinds == "mixed" and i % 2):
            return PipelineStage(self.parts[i], i, self.n, torch.device("cpu"), group=self.group)
        return FunctionalPipelineStage(self.parts[i], i, self.n, "cpu", group=self.group, **options)

    def run(self, step: int) -> None:
        """Run the schedule."""
        x, target = batch(step, self.data_rank, self.dtype)
        given = [x] if 0 in self.parts else []
        self.runner.step(*given, target=target if self.n - 1 in self.parts else None)

    def evaluate(self, step: int) -> Tensor | None:
        """Run the forwards alone."""
        x, target = batch(step, self.data_rank, self.dtype)
        given = [x] if 0 in self.parts else []
        output: Tensor | None = self.runner.eval(*given, target=target if self.n - 1 in self.parts else None)
        return output

    def named(self, what: str) -> dict[str, Tensor]:
        """Gradients or parameters of all stages of this rank, whole."""
        return named(self.parts.items(), what)

    def update(self) -> None:
        """Clip the gradients, and let the optimizers step."""
        for part in self.parts.values():
            clip(part)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def train(self, steps: Sequence[int] = range(STEPS)) -> list[dict[str, Tensor]]:
        """Return what each step leaves: gradients, and at the end the parameters."""
        found = []
        for step in steps:
            self.run(step)
            for part in self.parts.values():
                for parameter in part.parameters():
                    assert type(parameter.grad) in (type(None), type(parameter.data))
            found.append(self.named("grad"))
            self.update()
        return [*found, self.named("data")]

    def state(self) -> tuple[nn.Module, dict[str, Any]]:
        """The stages as one module, and its state and the optimizers'."""
        whole = nn.ModuleDict({str(i): part for i, part in self.parts.items()})
        model, optimizers = get_state_dict(whole, self.optimizers, options=_FLAT)
        return whole, {"model": model, "optimizers": optimizers}

    def save(self, folder: str) -> None:
        """Write a checkpoint."""
        dcp.save(self.state()[1], checkpoint_id=folder)

    def load(self, folder: str) -> None:
        """Read it."""
        whole, state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            whole,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizers"],
            options=_FLAT,
        )


def trained(
    rank: int, group: Any, how: str, schedule: str, compile: Any = False, kinds: str = "ours", **options: Any
) -> list[dict[str, Tensor]]:
    """What each step of a pipeline leaves on this rank."""
    return Pipeline(how, schedule, kinds, compile=compile, **options).train()


def trained_whole(n: int, data_ranks: int, make: Part = two_blocks) -> list[dict[str, Tensor]]:
    """The same by the unsharded model in one process."""
    made = parts(n, make)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in made]
    steps = []
    for step in range(STEPS):
        for data_rank in range(data_ranks):
            x, target = batch(step, data_rank)
            for y, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
                for part in made:
                    y = part(y)
                (F.mse_loss(y, wanted) / MICROBATCHES / data_ranks).backward()
        steps.append(named(enumerate(made), "grad"))
        for part in made:
            clip(part)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [*steps, named(enumerate(made), "data")]
