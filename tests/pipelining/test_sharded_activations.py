"""DTensors between pipeline stages, on two pipeline ranks by two tensor-parallel ones, against the whole."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_process import one_process
from pipeline_cases import V_SHAPED, Case, make_schedule
from pipeline_ranks import Raised, ranks, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

from funcstage._torch.pipelining import TAKES_GRADS_AND_MESHES
from funcstage.errors import StageError, StructureError
from funcstage.pipelining import FunctionalPipelineStage

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

across_stages = pytest.mark.skipif(
    not TAKES_GRADS_AND_MESHES, reason="torch 2.11 has no DTensors between stages"
)

ATEN = {"backend": "aten"}
STAGES, WIDTH, LENGTH, MICROBATCHES = 4, 8, 6, 4
ROW, TRAINED = torch.ones(2), torch.ones(2).requires_grad_()
CROSSING = {"sequence": Shard(1), "whole": Replicate(), "local": None}
"""How activations lie between stages: by parts of the sequence, whole on every rank, or as plain tensors."""


class Block(nn.Module):
    """A norm over parts of the sequence, and a perceptron over parts of its width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(self.norm(x))))


def model() -> list[Block]:
    torch.manual_seed(0)
    return [Block().double() for _ in range(STAGES)]


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    shape = (2 * MICROBATCHES, LENGTH, WIDTH)
    return torch.randn(shape).double(), torch.randn(shape).double()


def parallelized(block: Block, mesh: DeviceMesh, crossing: Placement | None, i: int) -> nn.Module:
    local = crossing is None or i == STAGES - 1
    layout = Replicate() if local or crossing is None else crossing
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=True),
        "down": RowwiseParallel(output_layouts=layout, use_local_output=local),
    }
    parts = PrepareModuleInput(
        input_layouts=(layout_of_input(crossing, i == 0),), desired_input_layouts=(Shard(1),)
    )
    return parallelize_module(parallelize_module(block, mesh, plan), mesh, parts)


def layout_of_input(crossing: Placement | None, first: bool) -> Placement:
    return Replicate() if first or crossing is None else crossing


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))


def looking_up(mesh: DeviceMesh) -> Callable[..., DeviceMesh]:
    return lambda names, layout: mesh[names]


def indices(schedule: str, place: int) -> list[int]:
    return [place, STAGES - 1 - place] if schedule in V_SHAPED else [place, place + 2]


def stages_of(
    mesh: DeviceMesh,
    case: Case,
    crossing: Placement | None,
    per_stage: Callable[[int], dict[str, Any]] = lambda i: {},
) -> tuple[dict[int, nn.Module], list[Any]]:
    """The modules and the stages of this rank."""
    modules = {
        i: parallelized(block, mesh["tp"], crossing, i)
        for i, block in enumerate(model())
        if i in indices(case.schedule, mesh["pp"].get_local_rank())
    }
    meshes: Any = {"get_mesh": looking_up(mesh)} if TAKES_GRADS_AND_MESHES else {}
    stages = []
    for i, module in modules.items():
        common = {"group": mesh["pp"].get_group(), **meshes}
        if i in case.torchs:
            stages.append(PipelineStage(module, i, STAGES, torch.device("cpu"), **common))
        else:
            stages.append(
                FunctionalPipelineStage(
                    module,
                    i,
                    STAGES,
                    "cpu",
                    compile=case.compile,
                    loss_fn=functional.mse_loss if case.folded else None,
                    **{**common, **per_stage(i)},
                )
            )
    return modules, stages


def steps(
    rank: int,
    group: dist.ProcessGroup,
    case: Case,
    crossing: Placement | None,
    options: Callable[[DeviceMesh, int], dict[str, Any]] = lambda mesh, i: {},
) -> tuple[dict[str, Tensor], list[Any], list[float]]:
    """Two steps of AdamW: the gradients of the last, what crossed, and the losses."""
    mesh = grid()
    modules, stages = stages_of(mesh, case, crossing, lambda i: options(mesh, i))
    loss_fn = stages[-1].loss_fn if case.folded else functional.mse_loss
    schedule = make_schedule(case, stages, loss_fn)
    x, y = batch()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1) for module in modules.values()]
    for _ in range(2):
        losses: list[Tensor] = []
        for optimizer in optimizers:
            optimizer.zero_grad()
        schedule.step(
            *([x] if 0 in modules else []), target=y if STAGES - 1 in modules else None, losses=losses
        )
        grads = {
            f"{i}.{name}": whole(p.grad)
            for i, module in modules.items()
            for name, p in module.named_parameters()
        }
        for optimizer in optimizers:
            optimizer.step()
    metas = [getattr(stage, "_stage_meta", None) for stage in stages]
    said = [
        (stage.stage_index, kind, [getattr(m, "placements", None) for m in getattr(meta, kind) or ()])
        for stage, meta in zip(stages, metas, strict=True)
        if meta is not None
        for kind in ("inputs", "outputs", "input_grads", "output_grads")
        if not (stage.is_first and kind == "input_grads")  # which nobody is sent
    ]
    return grads, said, [loss.item() for loss in losses]


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def expected() -> tuple[dict[str, Tensor], list[float]]:
    blocks = model()
    x, y = batch()
    optimizers = [torch.optim.AdamW(block.parameters(), lr=0.1) for block in blocks]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = []
        for part, target in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True):
            loss = functional.mse_loss(nn.Sequential(*blocks)(part), target)
            (loss / MICROBATCHES).backward()
            losses.append(loss.item())
        named = {f"{i}.{n}": p for i, block in enumerate(blocks) for n, p in block.named_parameters()}
        grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        for optimizer in optimizers:
            optimizer.step()
    return grads, losses


def assert_trains(case: Case, crossing: Placement | None, *options: Any) -> list[Any]:
    """Compare with the whole model; return what the stages said of what crosses."""
    answers = run(4, steps, case, crossing, *options)
    grads, losses = expected()
    found: dict[str, Tensor] = {}
    for mine, _, mine_losses in answers:
        found |= mine
        if mine_losses:
            assert mine_losses == pytest.approx(losses, rel=1e-9)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10)
    return sorted((said for _, all_said, _ in answers for said in all_said), key=str)


ALL_TORCHS = tuple(range(STAGES))


@pytest.mark.parametrize("crossing", [*CROSSING])
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_tensor_parallel_stages_train_as_the_whole_model_and_say_what_torchs_say(
    schedule: str, crossing: str
) -> None:
    if CROSSING[crossing] is not None and not TAKES_GRADS_AND_MESHES:
        pytest.skip("torch 2.11 has no DTensors between stages")
    ways: list[dict[str, Any]] = [{}, {"compile": ATEN, "folded": True}]
    if crossing != "local":  # torch's stages send what has not arrived yet, and wait for ever
        ways.append({"torchs": ALL_TORCHS})
    told = [assert_trains(Case(schedule, STAGES, MICROBATCHES, **way), CROSSING[crossing]) for way in ways]
    assert all(said == told[0] for said in told)


@across_stages
@pytest.mark.parametrize("torchs", [(0, 2), (1, 3)], ids=str)
def test_dtensors_go_from_torchs_stages_to_ours_and_back(torchs: tuple[int, ...]) -> None:
    for crossing in (Shard(1), Replicate()):
        assert_trains(Case("Interleaved1F1B", STAGES, MICROBATCHES, compile=ATEN, torchs=torchs), crossing)


def not_the_first(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return {"get_mesh": None} if i == 0 else {}


@across_stages
def test_a_stage_knows_the_meshes_of_what_it_sends() -> None:
    assert_trains(Case("Interleaved1F1B", STAGES, MICROBATCHES), Shard(1), not_the_first)


def refused(
    rank: int, group: dist.ProcessGroup, options: Callable[[DeviceMesh, int], dict[str, Any]]
) -> None:
    """Begin a step with stages that were given what does not fit."""
    mesh = grid()
    case = Case("Interleaved1F1B", STAGES, MICROBATCHES)
    modules, stages = stages_of(mesh, case, Shard(1), per_stage=lambda i: options(mesh, i))
    schedule = make_schedule(case, stages, functional.mse_loss)
    x, y = batch()
    try:
        schedule.step(*([x] if 0 in modules else []), target=y if STAGES - 1 in modules else None)
    finally:
        assert all(p.grad is None for module in modules.values() for p in module.parameters())


def without(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return {"get_mesh": None} if i == 2 else {}


def nothing(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return {"get_mesh": lambda names, layout: None} if i == 2 else {}


def another(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return {"get_mesh": lambda names, layout: mesh["pp"]} if i == 2 else {}


def on_one_row(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return without(mesh, i) if mesh["tp"].get_local_rank() == 1 else {}


def example(mesh: DeviceMesh, *shape: int) -> DTensor:
    return DTensor.from_local(torch.empty(shape).double(), mesh["tp"], [Replicate()])


def sent(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return {"input_grads": example(mesh, 2, LENGTH + 1, WIDTH)} if i == 2 else {}


def expecting(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return {"output_grads": example(mesh, 2, LENGTH, WIDTH)} if i == 1 else {}


def taking(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    return {"input_args": example(mesh, 2, LENGTH, WIDTH)} if i == 2 else {}


@across_stages
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (without, "Construct it with get_mesh="),
        (nothing, "get_mesh returned None"),
        (another, "of that name and layout"),
        (on_one_row, "Construct it with get_mesh="),
        (sent, "input_grads[0] is float64[2, 7, 8]"),
        (expecting, "but the next stage sends float64[2, 6, 8] placed (Shard(dim=1),)"),
        (taking, "but input_args says (float64[2, 6, 8] placed (Replicate(),)"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank_before_the_first_message(
    options: Callable[..., Any], said: str
) -> None:
    answers = ranks(4).run(refused, options)
    ranks(4).stop()  # torch goes on with the broken groups of a mesh where a later one is equal
    for answer in answers:
        assert isinstance(answer, Raised)
        assert "StageError" in answer.kinds, answer
        assert said in answer.message


def disagreeing(rank: int, group: dist.ProcessGroup, about: str) -> None:
    """Begin a step where one of the two tensor-parallel ranks of each stage has something else."""
    mesh = grid()
    case = Case("Interleaved1F1B", STAGES, MICROBATCHES)
    apart = mesh["tp"].get_local_rank() == 1
    if apart and about == "engine":
        case = Case("Interleaved1F1B", STAGES, MICROBATCHES, compile=ATEN)
    if apart and about == "microbatches":
        case = Case("Interleaved1F1B", STAGES, 2 * MICROBATCHES)
    modules, stages = stages_of(mesh, case, None)
    if apart and about == "placements" and 2 in modules:
        up: Any = modules[2].get_submodule("up")
        whole = torch.zeros(2 * WIDTH).double()
        up.bias = nn.Parameter(DTensor.from_local(whole, mesh["tp"], [Replicate()], run_check=False))
    schedule = make_schedule(case, stages, functional.mse_loss)
    x, y = batch()
    schedule.step(*([x] if 0 in modules else []), target=y if STAGES - 1 in modules else None)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("engine", "disagree about how it is compiled: not and {'backend': 'aten'}"),
        ("placements", "disagree about the parameter 'up.bias': float64[16] placed (Shard(dim=0),)"),
        ("microbatches", "disagree about the number of microbatches: 4 and 8"),
    ],
)
def test_ranks_that_run_other_stages_together_are_refused_on_all(about: str, said: str) -> None:
    answers = ranks(4).run(disagreeing, about)
    ranks(4).stop()
    for answer in answers:
        assert isinstance(answer, Raised)
        assert "StructureError" in answer.kinds, answer
        assert said in answer.message


def placed_by_hand(mesh: DeviceMesh, i: int) -> dict[str, Any]:
    placed = {"input_grads": example(mesh, 2, LENGTH, WIDTH)} if i in (1, 3) else {}
    return placed | ({"output_grads": example(mesh, 2, LENGTH, WIDTH)} if i in (0, 2) else {})


@across_stages
def test_gradients_are_sent_with_the_placements_of_input_grads() -> None:
    answers = run(4, steps, Case("Interleaved1F1B", STAGES, MICROBATCHES), Shard(1), placed_by_hand)
    grads, _ = expected()
    for found, said, _ in answers:
        for name, grad in found.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-8, atol=1e-10)
        for i, kind, placements in said:
            if (kind, i) in (("input_grads", 1), ("output_grads", 2)):
                assert placements == [(Replicate(),)]


def test_arguments_are_taken_at_the_positions_of_this_torch() -> None:
    with one_process():
        own = inspect.signature(PipelineStage).parameters
        plain = dict.fromkeys(list(own)[4:])
        stage = FunctionalPipelineStage(
            nn.Linear(2, 2), 0, 1, "cpu", *(plain | {"group": dist.group.WORLD}).values()
        )
        assert stage.group is dist.group.WORLD
        with pytest.raises(StructureError, match="dw_builder must be None"):
            FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, "cpu", *(plain | {"dw_builder": len}).values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"get_mesh": "tp"}, "get_mesh must be a function"),
        ({"input_grads": ["x"]}, "input_grads[0] must be a tensor or None"),
        ({"input_args": ROW, "input_grads": ROW}, "does not require grad"),
        ({"output_args": ROW, "output_grads": (ROW, ROW)}, "output_grads has 2 entries"),
        ({"input_args": TRAINED, "input_grads": torch.ones(3)}, "input_grads[0] is float32[3]"),
    ],
)
def test_examples_that_do_not_go_together_are_refused(given: dict[str, Any], said: str) -> None:
    if not TAKES_GRADS_AND_MESHES:
        said = "needs torch 2.12"
    with one_process(), pytest.raises(StageError, match=re.escape(said)):
        FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, "cpu", **given)


@across_stages
def test_a_group_at_its_old_position_is_refused() -> None:
    with one_process(), pytest.raises(StructureError, match="pass group= by keyword"):
        FunctionalPipelineStage(nn.Linear(2, 2), 0, 1, "cpu", None, None, dist.group.WORLD)
