"""torchtitan's debug models on gloo: what its trainer does around a pipeline, without a GPU.

Its trainer insists on a GPU, and its functions do not. What stands in for a GPU here: its modules are told
that the device is the CPU; FSDP sums without scaling, which gloo cannot; FlexAttention, whose kernel has
gradients on GPUs alone, is answered by causal attention, which it is for one document a row; masks are made
uncompiled. And the input of routed experts is a copy, as torch's `local_map` loses the gradient of what has
not arrived yet.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

sys.path.append(str(Path(__file__).parents[1] / "examples"))

MODELS = ("llama3", "deepseek_v3")
SCHEDULES = ("Interleaved1F1B", "ZBVZeroBubble")
CHECKPOINTS = ("none", "selective", "full")
RANKS = {"PP": (1, 1), "PP+TP": (2, 1), "PP+FSDP": (1, 2), "PP+FSDP+TP": (2, 2)}
"""Ranks of tensor parallelism and of FSDP."""

MICROBATCHES, LENGTH, VOCABULARY = 4, 16, 2048


class Run(NamedTuple):
    """What to train, and how.

    Attributes:
        model: one of torchtitan's.
        ranks: a name in `RANKS`; each of these has a pipeline of two ranks and four stages.
        schedule: one of torch's.
        checkpoint: torchtitan's activation checkpointing.
        blocks_compiled: whether torchtitan's `compile.enable` is on.
        loss: on all logits ("whole"), or, as in torchtitan's own configurations, the last layer and the loss
            on parts of a row at a time ("chunked"), outside of the stage.
        stages: torch's own ("torch"), or ours, uncompiled ("uncompiled") or compiled ("aten").
        steps: of the optimizer.
    """

    model: str
    ranks: str
    schedule: str
    checkpoint: str = "none"
    blocks_compiled: bool = False
    loss: str = "whole"
    stages: str = "torch"
    steps: int = 10

    @property
    def world_size(self) -> int:
        tp, fsdp = RANKS[self.ranks]
        return 2 * tp * fsdp

    def on_torchs_stages(self) -> Run:
        """What it is to be compared with: the same without compilation, on stages of torch's.

        Under ZBVZeroBubble and the chunked loss torch's leave the last norm without a gradient, as that
        shares a unit of FSDP with the layer that the loss runs; and they cannot split what is checkpointed
        selectively. So that is compared with Interleaved1F1B.
        """
        can_split = self.loss == "whole" and self.checkpoint != "selective"
        schedule = self.schedule if can_split else "Interleaved1F1B"
        return self._replace(stages="torch", blocks_compiled=False, schedule=schedule)


def trained(rank: int, group: dist.ProcessGroup, run: Run) -> list[tuple[float, float]]:
    """Train; the loss of this rank's pipeline and the norm of all gradients, for each step."""
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as dist_utils

    on_cpu()
    tp, fsdp = RANKS[run.ranks]
    parallelism = ParallelismConfig(
        data_parallel_shard_degree=fsdp,
        tensor_parallel_degree=tp,
        pipeline_parallel_degree=2,
        pipeline_parallel_schedule=run.schedule,
        spmd_backend="partial_dtensor",
    )
    training = TrainingConfig(
        local_batch_size=MICROBATCHES, seq_len=LENGTH, mixed_precision_param="float32", steps=run.steps
    )
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    dist_utils.set_spmd_backend("partial_dtensor")
    dims.build_mesh()
    schedule, parts, is_first, is_last = pipeline(run, dims, parallelism, training)
    for part in parts:
        fill(part)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in parts]
    replica = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
    found = []
    for step in range(run.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses: list[Tensor] = []
        tokens = torch.randint(
            VOCABULARY,
            (MICROBATCHES, LENGTH + 1),
            generator=torch.Generator().manual_seed(100 * step + replica),
        )
        schedule.step(
            arg_mbs=[(row[None, :-1],) for row in tokens] if is_first else None,
            kwarg_mbs=[keywords(parts[0]) for _ in tokens],
            target_mbs=[row[None, 1:] for row in tokens] if is_last else None,
            losses=losses if is_last else None,
            loss_kwargs={"global_valid_tokens": torch.tensor(float(MICROBATCHES * LENGTH * fsdp))},
            return_outputs=False,
        )
        norm = dist_utils.clip_grad_norm_(
            [p for part in parts for p in part.parameters()], 1.0, foreach=True, pp_mesh=dims.get_mesh("pp")
        )
        for optimizer in optimizers:
            optimizer.step()
        loss = torch.tensor(sum(loss.item() for loss in losses), dtype=torch.float64)
        dist.all_reduce(loss, group=dims.get_mesh("pp").get_group())  # zero but on the last stage's rank
        found.append((float(loss), float(norm)))
    return found


def on_cpu() -> None:
    """Let torchtitan's modules take the CPU for their device."""
    from torchtitan.distributed import parallel_dims, utils
    from torchtitan.models.common import attention
    from torchtitan.tools import utils as tools

    for module in (parallel_dims, utils, tools):
        module.device_type = "cpu"
    attention._compiled_create_block_mask = create_block_mask
    attention.FlexAttention.compiled_flex_attn = staticmethod(_causal)


def _causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float, enable_gqa: bool, **_: Any) -> Any:
    found = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
    )
    return found, SimpleNamespace(lse=None)


def pipeline(run: Run, dims: Any, parallelism: Any, training: Any) -> Any:
    """What torchtitan makes of a model: the schedule, the parts of this rank, and which ends it has."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import pipeline_parallel
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
    from torchtitan.models import deepseek_v3, llama3
    from torchtitan_funcstage import use_functional_stages

    pipeline_parallel.PipelineStage = torch.distributed.pipelining.PipelineStage
    if run.stages != "torch":
        use_functional_stages(False if run.stages == "uncompiled" else {"backend": run.stages})
    spec = {"llama3": llama3, "deepseek_v3": deepseek_v3}[run.model].model_registry("debugmodel")
    spec.model.update_from_config(
        config=SimpleNamespace(parallelism=parallelism, training=training, debug=SimpleNamespace())
    )
    with torch.device("meta"):
        model = spec.model.build()
    checkpoint: Any = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
    loss: Any = CrossEntropyLoss(CrossEntropyLoss.Config())
    if run.loss == "chunked":
        loss = ChunkedLossWrapper(ChunkedLossWrapper.Config())
    made = spec.pipelining_fn(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=parallelism,
        compile_config=CompileConfig(enable=run.blocks_compiled),
        ac_config=checkpoint[run.checkpoint],
        dump_folder="",
        device=torch.device("cpu"),
        model_config=spec.model,
        parallelize_fn=spec.parallelize_fn,
        loss_fn=loss,
    )
    _, parts, _, is_last = made
    if run.loss == "chunked" and is_last:
        loss.set_lm_head(parts[-1].lm_head)
        parts[-1]._skip_lm_head = True
    return made


@torch.no_grad()
def fill(part: nn.Module) -> None:
    """Give a part its first weights, which depend on their names alone, and what stands in for a GPU."""
    part.to_empty(device="cpu")
    part.init_states(buffer_device=None)
    for name, parameter in part.named_parameters():
        torch.manual_seed(sum(map(ord, name.replace("_checkpoint_wrapped_module.", ""))))
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if local.dim() > 1:
            local.normal_(0, 0.02)
    part.train()
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
        if type(module).__name__ == "RoutedExperts":
            module.register_forward_pre_hook(_arrived)


def _arrived(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return given[0].clone(), *given[1:]


def keywords(part: Any) -> dict[str, Any]:
    """What torchtitan hands to all stages, for one microbatch."""
    positions = torch.arange(LENGTH)[None]
    return {"positions": positions, "attention_masks": part.get_attention_masks(positions=positions)}
