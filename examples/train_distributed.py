"""Train the demo's language model as a pipeline over several processes, and survive the death of any.

On one machine, a process for each GPU (with `--device cpu`, the default, no GPU is needed):

    torchrun --nproc-per-node=2 examples/train_distributed.py --device cuda

On several machines, the same command on each; `host` is any one of them:

    torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=host:29500 \
        examples/train_distributed.py --device cuda

There `--captured` replays each step as one CUDA graph, which leaves small models little to wait for.

With checkpoints, in a folder that all machines share. When a process dies the others stop too, torchrun
starts all of them anew, and they go on from the last checkpoint as if nothing had happened (or from the one
before, if the last one turns out to be damaged):

    torchrun --nproc-per-node=2 --max-restarts=3 examples/train_distributed.py --checkpoint saved --every 10

A later run with the same `--checkpoint` goes on from where this one ended.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from funcstage.demo import model, text
from funcstage.pipelining import SCHEDULES, FunctionalPipelineStage, captured, pipeline_order

SEQUENCES_PER_MICROBATCH = 2
LEARNING_RATE = 1e-3
MAX_NORM = 1.0


def main() -> None:
    options = parse_options()
    device = set_up(options)
    try:
        train(options, device)
    except Exception:
        # The group is broken, and whatever waits for it on the way out of Python may wait for ever.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedule", default="ZBVZeroBubble", choices=SCHEDULES)
    parser.add_argument("--steps", default=100, type=int, metavar="N", help="at which step to end")
    parser.add_argument("--microbatches", default=8, type=int, metavar="N", help="microbatches a step")
    parser.add_argument("--compile", default="none", choices=["none", "aten", "inductor"])
    parser.add_argument("--captured", action="store_true", help="replay steps as CUDA graphs, on GPUs")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where to save, and to go on from")
    parser.add_argument("--every", default=10, type=int, metavar="N", help="steps between checkpoints")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write the losses of all steps, as JSON")
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="of the text, batches and weights")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--timeout", default=60, type=float, metavar="S", help="how long to wait for a rank")
    return parser.parse_args()


def set_up(options: argparse.Namespace) -> torch.device:
    """Join the process group, and return this process's device."""
    # A run that was interrupted is to end like one that was not, to the last bit.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Checkpoints are coordinated by messages on the CPU, whatever the device. No rank waits for a dead one
    # for longer than the timeout.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=options.timeout)
    store, rank, world = new_store(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def new_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Agree with the other ranks on a store that is empty.

    torchrun's own store outlives restarts, and a new process would look for the others where those who
    died have been (https://github.com/pytorch/pytorch/issues/135712).

    Returns:
        The store, this rank and the number of ranks.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set(f"process {rank}", uuid.uuid4().hex)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        processes = store.multi_get([f"process {r}" for r in range(world)])
        # Whoever has written down the name of this process is no ghost.
        seen = b" ".join(processes)
        store.set(f"seen by {rank}", seen)
        if all(other == seen for other in store.multi_get([f"seen by {r}" for r in range(world)])):
            return dist.PrefixStore(seen.decode(), store), rank, world
        time.sleep(0.05)
    raise TimeoutError(f"Rank {rank} has waited for the others for {timeout.total_seconds():g} s.")


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train from the last checkpoint, or from the beginning, to the last step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    one_stage = issubclass(get_schedule_class(options.schedule), PipelineScheduleSingle)
    num_stages = world if one_stage else 2 * world
    order = pipeline_order(options.schedule, num_stages, options.microbatches, num_ranks=world)

    # Every rank makes all weights, which needs no messages. A model too large for that is made on the
    # meta device, and each rank then gives memory and values to its own part.
    torch.manual_seed(options.seed)
    whole = model.build_stages(num_stages)
    # Under the numbers of their stages, parameters have names that no two ranks share: those of checkpoints.
    mine = nn.ModuleDict({str(i): whole[i] for i in order.stages_of(rank)}).to(device)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=LEARNING_RATE)
    schedule = make_schedule(options, mine, num_stages, device)
    losses = load(options.checkpoint, mine, optimizer) if options.checkpoint else []

    for step, (inputs, targets) in enumerate(batches(options, device, start=len(losses)), len(losses) + 1):
        # What is random (dropout, say) depends on the step and the rank, not on what ran before.
        torch.manual_seed(hash((options.seed, step, rank)))
        loss = forward_and_backward(schedule, mine, inputs, targets)
        loss = clip_over_all_stages(mine, loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if rank == 0:
            print(f"step {step}/{options.steps}  loss {loss:.4f}", flush=True)
            if options.losses:
                write(options.losses, json.dumps(losses))
        if options.checkpoint and (step % options.every == 0 or step == options.steps):
            save(options.checkpoint, mine, optimizer, losses)


def make_schedule(
    options: argparse.Namespace, mine: nn.ModuleDict, num_stages: int, device: torch.device
) -> Any:
    """Put this rank's modules under one of torch's schedules."""
    compiled = False if options.compile == "none" else {"backend": options.compile}
    stages = [
        FunctionalPipelineStage(module, int(i), num_stages, device, compile=compiled, loss_fn=model.loss_fn)
        for i, module in mine.items()
    ]
    schedule_class = get_schedule_class(options.schedule)
    one_stage = issubclass(schedule_class, PipelineScheduleSingle)
    # The last stage's own form of the loss makes it a part of that stage's programs.
    schedule = schedule_class(
        stages[0] if one_stage else stages, options.microbatches, loss_fn=stages[-1].loss_fn
    )
    return captured(schedule) if options.captured else schedule


def batches(options: argparse.Namespace, device: torch.device, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the steps after `start`, the same ones on every rank and in every run."""
    source = text.standard_library(options.seed)
    size = options.microbatches * SEQUENCES_PER_MICROBATCH
    endless = text.random_batches(source.train, size, model.CONTEXT, options.seed)
    for inputs, targets in itertools.islice(endless, start, options.steps):
        yield inputs.to(device), targets.to(device)


def forward_and_backward(schedule: Any, mine: nn.ModuleDict, inputs: Tensor, targets: Tensor) -> Tensor:
    """Run the schedule: gradients end in `.grad`. Return the loss, or 0 where the last stage is not."""
    losses: list[Tensor] = []
    schedule.step(*([inputs] if "0" in mine else []), target=targets, losses=losses, return_outputs=False)
    return torch.stack(losses).mean() if losses else inputs.new_zeros((), dtype=torch.float32)


def clip_over_all_stages(mine: nn.ModuleDict, loss: Tensor) -> float:
    """Scale the gradients of all ranks as `clip_grad_norm_` would those of the whole model.

    Returns:
        The loss, known to the rank with the last stage before, to every rank after: it travels along.
    """
    norm = nn.utils.get_total_norm([p.grad for p in mine.parameters() if p.grad is not None])
    sums = torch.stack([norm**2, loss.detach()])
    dist.all_reduce(sums)
    nn.utils.clip_grads_with_norm_(mine.parameters(), MAX_NORM, sums[0].sqrt())
    return sums[1].item()


def save(folder: Path, mine: nn.ModuleDict, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """Write a checkpoint, then its checksums, then the name of it; what is cut short is never in force.

    The one before stays, to go on from should this one be damaged later.
    """
    name = f"step-{len(losses)}"
    dcp.save(checkpoint_state(mine, optimizer, losses), checkpoint_id=folder / name)
    own = [folder / name / ".metadata"] if dist.get_rank() == 0 else []
    own += (folder / name).glob(f"__{dist.get_rank()}_*")
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {file.name: checksum(file) for file in own})
    if dist.get_rank() == 0:  # by now all ranks have written their part
        sums = {file: value for part in parts for file, value in part.items()}
        write(folder / name / CHECKSUMS, json.dumps(sums))
        before = [old for old in checkpoints(folder, pointed_to(folder)) if old != name]
        write(folder / "latest", name)
        for old in folder.glob("step-*"):
            if old.name not in (name, *before[:1]):
                shutil.rmtree(old)


def load(folder: Path, mine: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> list[float]:
    """Read the last checkpoint that is whole, if there is one, and return the losses so far."""
    # Rank 0 speaks for all: a network file system may show the others older files.
    found = [checkpoints(folder, pointed_to(folder)) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    for name in found[0]:
        if damage := damage_of(folder / name):
            if dist.get_rank() == 0:
                print(f"{folder / name} is damaged: {damage}; looking for the one before", flush=True)
            continue
        state = checkpoint_state(mine, optimizer, [])
        dcp.load(state, checkpoint_id=folder / name)
        parameters, moments = state["model"], state["optimizer"]
        set_state_dict(
            mine, optimizer, model_state_dict=parameters, optim_state_dict=moments, options=BY_NAME
        )
        if dist.get_rank() == 0:
            if name != pointed_to(folder):
                write(folder / "latest", name)  # those that are damaged are passed over for good
            print(f"going on from {folder / name}", flush=True)
        return state["losses"]
    if found[0]:
        raise ValueError(f"No checkpoint in {folder} is whole. Move the folder away to train from the start.")
    return []


CHECKSUMS = "checksums.json"
"""Written after everything else in a checkpoint; without it, one has been cut short."""


def checkpoints(folder: Path, latest: str | None) -> list[str]:
    """Name the checkpoints that were once whole, newest first; none that is newer than the latest."""
    steps = {path.name: step_of(path.name) for path in folder.glob("step-*") if (path / CHECKSUMS).exists()}
    if latest is not None:
        steps[latest] = step_of(latest)
    newest = float("inf") if latest is None else step_of(latest)
    return sorted((name for name, step in steps.items() if step <= newest), key=step_of, reverse=True)


def pointed_to(folder: Path) -> str | None:
    """Read the name of the latest checkpoint; `None` if there is none, or it cannot be read."""
    try:
        name = (folder / "latest").read_text(errors="replace").strip()  # which may be by `echo`
        return name if step_of(name) >= 0 else None
    except (OSError, ValueError):  # none, a folder of that name, a number of thousands of digits
        return None


def step_of(name: str) -> int:
    """Read the step from a checkpoint's name; -1 if it is no such name."""
    number = name.removeprefix("step-")
    return int(number) if name.startswith("step-") and number.isascii() and number.isdigit() else -1


def damage_of(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint, on all ranks the same; each reads its share of the files."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text())
        if ".metadata" not in sums:
            raise ValueError(f"{CHECKSUMS} leaves files out")
        files = sorted(sums)[dist.get_rank() :: dist.get_world_size()]
        wrong = [name for name in files if checksum(checkpoint / name) != sums[name]]
        if ".metadata" in files and not wrong:  # nobody opens an index that may be damaged
            wrong = [f"{name} has no checksum" for name in sorted(data_files(checkpoint) - sums.keys())]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, wrong)
    return ", ".join(name for part in parts for name in part)


def data_files(checkpoint: Path) -> set[str]:
    """Name the files of all ranks that a checkpoint's index lists."""
    index = FileSystemReader(checkpoint).read_metadata()
    return {entry.relative_path for entry in index.storage_data.values()}


def checksum(file: Path) -> str:
    """Compute the checksum of a file, without reading all of it into memory."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""Keep the optimizer's state under the names of parameters, not in groups that every rank numbers from 0."""


def checkpoint_state(mine: nn.ModuleDict, optimizer: torch.optim.Optimizer, losses: list[float]) -> dict:
    """Collect this rank's share of a checkpoint. The number of losses is that of the steps taken."""
    parameters, moments = get_state_dict(mine, optimizer, options=BY_NAME)
    return {"model": parameters, "optimizer": moments, "losses": losses}


def write(file: Path, content: str) -> None:
    """Write a file so that it is never seen, nor left behind, half written."""
    part = file.with_name(file.name + ".part")
    with part.open("w") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())  # else the name could be on the disk before the content
    os.replace(part, file)


if __name__ == "__main__":
    main()
