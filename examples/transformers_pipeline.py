"""Train a causal language model of transformers as a pipeline of compiled stages, sharded by FSDP.

A process for each GPU (with `--device cpu`, the default, no GPU is needed). Two ranks make a pipeline here,
and over two such pipelines every stage is sharded:

    torchrun --nproc-per-node=4 examples/transformers_pipeline.py --pipeline 2 --device cuda \
        --model meta-llama/Llama-3.2-1B --bfloat16

Without `--model` it trains a small Llama with random weights, on bytes. With `--checkpoint` it goes on from
what an earlier run has left there, over as many ranks and stages as you like.

The text is the source code of Python's standard library. With `--padded` its rows are of many lengths, as a
data collator of transformers leaves them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from funcstage.demo import text
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage, pipeline_order

SEQUENCES_PER_MICROBATCH = 2
LEARNING_RATE = 1e-3
MAX_NORM = 1.0
IGNORED = -100
"""The label of what is not to be learnt, for transformers' losses."""


def main() -> None:
    options = parse_options()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    train(options, device)
    dist.destroy_process_group()


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="NAME", help="for from_pretrained: a model's name, or a folder")
    parser.add_argument("--tied", action="store_true", help="without --model: the head is the embedding")
    parser.add_argument("--pipeline", default=2, type=int, metavar="N", help="ranks of a pipeline")
    parser.add_argument("--schedule", default="ZBVZeroBubble", choices=SCHEDULES)
    parser.add_argument("--compile", default="inductor", choices=["none", "aten", "inductor"])
    parser.add_argument("--bfloat16", action="store_true", help="compute in it; parameters stay in float32")
    parser.add_argument("--steps", default=20, type=int, metavar="N", help="at which step to end")
    parser.add_argument("--microbatches", default=4, type=int, metavar="N", help="microbatches a step")
    parser.add_argument("--context", default=64, type=int, metavar="N", help="tokens in a row")
    parser.add_argument("--padded", action="store_true", help="rows of many lengths, with a mask")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where to save, and to go on from")
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="of the text, and of new weights")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, device: torch.device) -> list[float]:
    """Train to the last step.

    Returns:
        The losses of the steps, the same on every rank.
    """
    replicas = dist.get_world_size() // options.pipeline
    mesh = init_device_mesh(device.type, (options.pipeline, replicas), mesh_dim_names=("pipeline", "data"))
    pipeline = make_pipeline(options, mesh, device, load_model(options))
    step = load(options.checkpoint, pipeline) if options.checkpoint else 0
    losses = []
    for batch in batches(options, mesh.get_local_rank("data"), replicas, start=step):
        step += 1
        losses.append(train_step(pipeline, {name: tensor.to(device) for name, tensor in batch.items()}))
        if dist.get_rank() == 0:
            print(f"step {step}/{options.steps}  loss {losses[-1]:.4f}", flush=True)
    if options.checkpoint and losses:
        save(options.checkpoint, pipeline, step)
    return losses


# From a model to stages.


def load_model(options: argparse.Namespace) -> Any:
    """Load or make the whole model in host memory, on every rank the same."""
    torch.manual_seed(options.seed)
    if options.model is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=options.tied,
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.train()


class Stage(nn.Module):
    """Consecutive layers of a causal language model.

    Args:
        part: the model, with other stages' layers left out.
        is_first: whether it takes tokens; others take what the stage before returns.
        is_last: whether it returns logits.
    """

    def __init__(self, part: Any, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.part = part
        self.is_first, self.is_last = is_first, is_last

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the layers. Masks and positions are made of the keyword arguments by the model itself."""
        kwargs |= {"input_ids" if self.is_first else "inputs_embeds": x, "use_cache": False}
        return self.part(**kwargs).logits if self.is_last else self.part.base_model(**kwargs)[0]


def cut_causal_lm(model: Any, num_stages: int) -> list[Stage]:
    """Cut a model into stages, by what its configuration says of pipelines.

    The stages hold the model's parameters under its own names, and run its own forward, each with the layers
    that are left to it. A head that is the embedding becomes a parameter of its own. All are left in training
    mode.

    Raises:
        ValueError: if the model does not say where it can be cut, or the stages are not what it is.
    """
    name, plan = type(model).__name__, model.config.base_model_pp_plan
    if not plan:
        raise ValueError(f"{name} has no base_model_pp_plan. Cut it by funcstage.pipelining.cut.")
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"{name} adds to its loss what depends on all layers. Set output_router_logits=False."
        )
    count = len(getattr(model.base_model, name_of_layers(model)))
    if count < num_stages:
        raise ValueError(f"{name} has {count} layers, too few for {num_stages} stages.")
    bounds = [count * i // num_stages for i in range(num_stages + 1)]
    stages = [part_of(model, range(*bounds[i : i + 2]), count) for i in range(num_stages)]
    check_stages(model, stages)
    if is_tied(model):
        head = stages[-1].part.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    return stages


def is_tied(model: Any) -> bool:
    """Tell whether the head is the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def name_of_layers(model: Any) -> str:
    plan = model.config.base_model_pp_plan
    return next(key for key in plan if isinstance(getattr(model.base_model, key), nn.ModuleList))


def part_of(model: Any, indices: range, count: int) -> Stage:
    """Copy a model without its tensors, and leave out what is not of these layers."""
    layers = name_of_layers(model)
    is_first, is_last = indices.start == 0, indices.stop == count
    part = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    base, config = part.base_model, part.base_model.config
    kept = nn.ModuleList()
    for i in indices:
        kept.add_module(str(i), getattr(base, layers)[i])  # under its number in the model
    after = False
    for key, (inputs, _) in config.base_model_pp_plan.items():
        if key == layers:
            setattr(base, key, kept)
            after = True
        elif not (is_last if after else is_first):
            setattr(base, key, None if "input_ids" in inputs else nn.Identity())
    if not is_last:
        part.set_output_embeddings(None)
    config.num_hidden_layers = len(indices)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in indices]
    return Stage(part, is_first, is_last)


@torch.no_grad()
def check_stages(model: Any, stages: list[Stage]) -> None:
    """Refuse stages that are not what the model is, as its forward does more than run its layers in turn."""
    names = [name for stage in stages for name, _ in stage.part.named_parameters(remove_duplicate=False)]
    if sorted(names) != sorted(name for name, _ in model.named_parameters(remove_duplicate=False)):
        raise ValueError(f"{type(model).__name__} has parameters that belong to no stage, or to several.")
    tokens = torch.arange(16).reshape(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    x: Any = tokens
    for module in (model, *stages):
        module.eval()  # without dropout
    for stage in stages:
        x = stage(x, attention_mask=mask)
    expected = model(tokens, attention_mask=mask).logits
    for module in (model, *stages):
        module.train()
    real = mask.bool()
    if not torch.allclose(x[real], expected[real], rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(model).__name__}: its stages compute something else than it does. Write them by hand."
        )


# A pipeline on this rank.


class Pipeline(NamedTuple):
    """What a rank has of a pipeline.

    Attributes:
        schedule: torch's, over this rank's stages.
        stages: the modules of these, sharded, by their numbers.
        optimizers: one for each of them.
        mesh: `["pipeline", "data"]`.
        ends: the ranks with the two copies of a tied embedding; `None` where this rank has both, or none.
        tied: this rank's copies.
    """

    schedule: Any
    stages: dict[int, Stage]
    optimizers: list[Any]
    mesh: DeviceMesh
    ends: dist.ProcessGroup | None
    tied: list[nn.Parameter]


def make_pipeline(
    options: argparse.Namespace, mesh: DeviceMesh, device: torch.device, model: Any
) -> Pipeline:
    """Cut a model, shard this rank's stages over the data ranks, and put them under a schedule."""
    schedule_class = get_schedule_class(options.schedule)
    one_stage = issubclass(schedule_class, PipelineScheduleSingle)
    ranks = mesh["pipeline"].size()
    num_stages = ranks if one_stage else 2 * ranks
    order = pipeline_order(options.schedule, num_stages, options.microbatches, num_ranks=ranks)
    owners = {i: rank for rank in range(ranks) for i in order.stages_of(rank)}
    whole = cut_causal_lm(model, num_stages)
    mine = {
        i: shard(whole[i], mesh["data"], options) for i in order.stages_of(mesh.get_local_rank("pipeline"))
    }

    tied = [weight for stage in mine.values() for weight in ends_of(stage) if is_tied(model)]
    ends = ranks_of_ends(mesh, owners[0], owners[num_stages - 1]) if is_tied(model) else None

    # As transformers' own losses, but a sum: what it is divided by is known to nobody before the step.
    loss_fn = partial(model.loss_function, vocab_size=model.config.vocab_size, num_items_in_batch=1)
    stages = [
        FunctionalPipelineStage(
            module,
            i,
            num_stages,
            device,
            group=mesh["pipeline"].get_group(),
            compile=False if options.compile == "none" else {"backend": options.compile},
            loss_fn=loss_fn,
        )
        for i, module in mine.items()
    ]
    schedule = schedule_class(
        stages[0] if one_stage else stages,
        options.microbatches,
        loss_fn=stages[-1].loss_fn,
        scale_grads=False,
    )
    optimizers = [torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE) for module in mine.values()]
    return Pipeline(schedule, mine, optimizers, mesh, ends, tied)


def shard(stage: Stage, mesh: DeviceMesh, options: argparse.Namespace) -> Stage:
    """Shard a stage over the data ranks, layer by layer, and bring it to their devices."""
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32) if options.bfloat16 else MixedPrecisionPolicy()
    )
    wrap = partial(fully_shard, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    for layer in getattr(stage.part.base_model, name_of_layers(stage.part)):
        wrap(layer)
    wrap(stage)
    return stage


def ends_of(stage: Stage) -> list[nn.Parameter]:
    """The embedding of a first stage, and the head of a last one."""
    embedding = [stage.part.get_input_embeddings().weight] if stage.is_first else []
    return embedding + ([stage.part.get_output_embeddings().weight] if stage.is_last else [])


def ranks_of_ends(mesh: DeviceMesh, first: int, last: int) -> dist.ProcessGroup | None:
    """Make the groups of those ranks, one of each pipeline's first stage and one of its last."""
    if first == last:
        return None
    pairs = [[int(mesh.mesh[first, i]), int(mesh.mesh[last, i])] for i in range(mesh["data"].size())]
    return dist.new_subgroups_by_enumeration(pairs)[0]


# A step.


def train_step(pipeline: Pipeline, batch: dict[str, Tensor]) -> float:
    """Take a step.

    Args:
        pipeline: what this rank has of it.
        batch: `input_ids` and `labels` for the stages of this data rank, and what the model takes besides.

    Returns:
        The loss before it: the mean over all tokens of all data ranks.
    """
    batch = dict(batch)
    labels, tokens = batch.pop("labels"), batch.pop("input_ids")
    losses: list[Tensor] = []
    pipeline.schedule.step(
        *([tokens] if 0 in pipeline.stages else []),
        **batch,
        target=labels,
        losses=losses,
        return_outputs=False,
    )
    loss = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=labels.device)
    learnt = (labels[:, 1:] != IGNORED).sum()
    # The tokens of a data rank are counted on all ranks of its pipeline.
    sums = torch.stack([loss.double(), learnt / pipeline.mesh["pipeline"].size()])
    dist.all_reduce(sums)
    total, count = sums.tolist()
    finish_gradients(pipeline, pipeline.mesh["data"].size() / count)  # FSDP takes means over the data ranks
    for optimizer in pipeline.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total / count


def finish_gradients(pipeline: Pipeline, scale: float) -> None:
    """Scale the gradients, sum those of tied parameters, and clip as `clip_grad_norm_` the whole model's."""
    parameters = [p for stage in pipeline.stages.values() for p in stage.parameters() if p.grad is not None]
    for parameter in parameters:
        parameter.grad.mul_(scale)
    grads = [parameter.grad.to_local() for parameter in pipeline.tied]
    if pipeline.ends is not None:
        dist.all_reduce(grads[0], group=pipeline.ends)
    elif len(grads) == 2:
        grads[1].copy_(grads[0].add_(grads[1]))

    # The norm of the whole model's has the two copies once.
    copies = pipeline.tied[-1:] if any(stage.is_last for stage in pipeline.stages.values()) else []
    own = nn.utils.get_total_norm([p.grad for p in parameters if all(p is not copy for copy in copies)])
    squares = own.full_tensor() ** 2
    dist.all_reduce(squares, group=pipeline.mesh["pipeline"].get_group())
    nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, squares.sqrt())


# What it learns, and what is kept of it.


def batches(
    options: argparse.Namespace, replica: int, replicas: int, start: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yield what a data rank has of each batch after the step `start`, the same in every run."""
    size = replicas * options.microbatches * SEQUENCES_PER_MICROBATCH
    endless = text.random_batches(tokens_of(options), size, options.context, options.seed)
    for step, (tokens, _) in enumerate(itertools.islice(endless, options.steps)):
        batch = padded(tokens, step) if options.padded else {"input_ids": tokens, "labels": tokens}
        if step >= start:
            yield {name: tensor.chunk(replicas)[replica] for name, tensor in batch.items()}


def padded(tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """Let rows end early, as those of a data collator do."""
    length = tokens.shape[1]
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(length // 2, length + 1, (len(tokens), 1), generator=generator)
    mask = (torch.arange(length) < ends).long()
    labels = tokens.masked_fill(mask == 0, IGNORED)
    return {"input_ids": tokens * mask, "labels": labels, "attention_mask": mask}


def tokens_of(options: argparse.Namespace) -> Tensor:
    """The text as the model's tokens; a model that starts from random weights takes bytes."""
    source = text.standard_library(options.seed).train[:1_000_000]
    if options.model is None:
        return source
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    return torch.tensor(tokenizer(bytes(source.tolist()).decode(errors="replace"))["input_ids"])


BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""Keep the optimizer's state under the names of parameters, which no two stages share."""


def save(folder: Path, pipeline: Pipeline, step: int) -> None:
    """Write a checkpoint, whose `state["model"]` has the names of the whole model."""
    dcp.save(joined(states(pipeline), step), checkpoint_id=folder / f"step-{step}")


def load(folder: Path, pipeline: Pipeline) -> int:
    """Read the last checkpoint, if there is one, and return the steps so far."""
    found = [int(file.parent.name.removeprefix("step-")) for file in folder.glob("step-*/.metadata")]
    if not found:
        return 0
    parts = states(pipeline)
    state = joined(parts, 0)
    dcp.load(state, checkpoint_id=folder / f"step-{max(found)}")
    for stage, optimizer, (model, moments) in zip(
        pipeline.stages.values(), pipeline.optimizers, parts, strict=True
    ):
        set_state_dict(
            stage.part,
            optimizer,
            model_state_dict={name: state["model"][name] for name in model},
            optim_state_dict={name: state["optimizer"][name] for name in moments},
            options=BY_NAME,
        )
    return state["step"]


def states(pipeline: Pipeline) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [
        get_state_dict(stage.part, optimizer, options=BY_NAME)
        for stage, optimizer in zip(pipeline.stages.values(), pipeline.optimizers, strict=True)
    ]


def joined(parts: list[tuple[dict[str, Any], dict[str, Any]]], step: int) -> dict[str, Any]:
    models, moments = ({name: x for part in parts for name, x in part[i].items()} for i in (0, 1))
    return {"model": models, "optimizer": moments, "step": step}


if __name__ == "__main__":
    main()
