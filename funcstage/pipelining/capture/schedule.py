"""A schedule whose steps become CUDA graphs: which runs as it is, is recorded, or is replayed."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from funcstage._torch.distributed import before_shutdown, timeout_of
from funcstage._torch.pipelining import ExchangingStage
from funcstage._torch.schedules import OPTIONS, loss_of, stages_of
from funcstage.dtensors import first_dtensor
from funcstage.errors import StructureError
from funcstage.gathered import is_sharded
from funcstage.pipelining import failures
from funcstage.pipelining.capture.baked import Baked
from funcstage.pipelining.capture.entries import MAX_GRAPHS, Entries
from funcstage.pipelining.capture.entry import WARM_UP, Entry, Graph, record
from funcstage.pipelining.capture.given import CannotCaptureError, Given
from funcstage.pipelining.capture.gradients import VIEWS_HELD, Gradients
from funcstage.pipelining.capture.graphs import Graphs, Recorder
from funcstage.pipelining.capture.rehearsal import rehearse
from funcstage.pipelining.capture.said import Said
from funcstage.pipelining.capture.watchdog import Watchdog
from funcstage.pipelining.lengths import keep_for, looks_of_last
from funcstage.pipelining.plans import agreed_ahead
from funcstage.trees import describe

_ASKED_AT_MOST = 32
"""In how many of the first calls the ranks ask each other whether all of them can capture."""


class CapturedSchedule:
    """A schedule of torch's whose steps are recorded as CUDA graphs, messages included, and replayed.

    The first steps with a signature run as they are; then one is recorded, and from then on replayed. A
    signature is what the arguments look like and every value among them that is no tensor, which of the
    parameters have a gradient, and the settings around the call. What a step returns is the caller's, and
    `.grad` is as without this: what is there is added to.

    Whatever else a graph has baked in is compared before each replay: the modules with their modes,
    attributes and hooks, where tensors lie, the options of the optimizer. If something has changed, the
    step runs as it is, and is recorded anew. So are the variables that functions read around them, as far
    as their names are in the code. What a stage does in Python happens only while it runs as it is.

    On the CPU, and where a stage cannot be captured (it waits for the device, say), all steps run as they
    are, and a warning says why. All ranks agree about that.

    Args:
        schedule: the schedule.
        optimizer: whose step follows each step of the schedule, if one is given.
    """

    def __init__(self, schedule: Any, optimizer: Optimizer | None = None) -> None:
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise StructureError(
                f"optimizer must be a torch.optim.Optimizer, got {describe(optimizer)}. Further work on the "
                "gradients can be done in its hooks (optimizer.register_step_pre_hook)."
            )
        self.schedule = schedule
        self.optimizer = optimizer
        self._own = stages_of(schedule)
        self._device = torch.device(self._own[0].device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._group = self._own[0].group
        self._ranks = dist.get_world_size(self._group) if dist.is_initialized() else 1
        self._said = Said(type(schedule).__name__)
        self._entries = Entries(self._bake, self._parameters, self._said)
        self._gradients = Gradients()
        self._recorder: Recorder | None = None
        self._watchdog: Watchdog | None = None
        self._calls = 0
        self._recorded = False
        self._prepared_for: Entry | None = None
        self._agreeing = self._ranks > 1
        self._given_up = ""
        if self._device.type == "cuda":
            self._recorder = Graphs(self._device)
            if dist.is_initialized():
                before_shutdown(self.close)
        else:
            self._give_up(
                f"stages on {self._device} cannot be captured, only those on CUDA devices. Move the stages "
                "to one"
            )

    def step(self, *args: Any, losses: list[Any] | None = None, **kwargs: Any) -> Any:
        """Run a step, as `schedule.step` does, and the optimizer's if there is one.

        Args:
            *args: the batch, on the rank with the first stage.
            losses: a list for the losses of the microbatches, on the rank with the last stage.
            **kwargs: `target=`, `return_outputs=` and what else `schedule.step` takes.

        Returns:
            The output, on the rank with the last stage.
        """
        return self._run("step", args, losses, kwargs)

    def eval(self, *args: Any, losses: list[Any] | None = None, **kwargs: Any) -> Any:
        """Run the forwards alone, as `schedule.eval` does.

        Args:
            *args: as for `step`.
            losses: as for `step`.
            **kwargs: as for `step`.

        Returns:
            The output, on the rank with the last stage.
        """
        return self._run("eval", args, losses, kwargs)

    def close(self) -> None:
        """Drop the graphs, which must be gone before the process group is destroyed; further steps make new
        ones.

        `destroy_process_group()` of the whole world does that itself.
        """
        self._entries.close()
        self._gradients, self._recorded = Gradients(), False
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def __repr__(self) -> str:
        said = f"not captured: {self._given_up}" if self._given_up else self._entries
        return f"<captured {type(self.schedule).__name__}, {said}>"

    def _run(
        self, method: str, args: tuple[Any, ...], losses: list[Any] | None, kwargs: dict[str, Any]
    ) -> Any:
        if losses is not None and not isinstance(losses, list):
            raise TypeError(f"losses must be a list but got a {type(losses)}")
        step = Step(method, (args, kwargs), losses is not None)
        self._calls += 1
        if self._recorder is None:
            found, output = self._once(step, step.arguments)
        else:
            if self._calls == 1:
                keep_for(self.schedule, 2 * MAX_GRAPHS)
            with agreed_ahead(self.schedule, step.method, *step.arguments) as agreed:
                found, output = self._result(step, *agreed)
            if self._calls == 1:  # by now the ranks have agreed about it
                self._entries.agree(looks_of_last(self.schedule))
        if losses is not None and found:
            losses[:] = found
        return output

    def _once(self, step: Step, arguments: Any) -> tuple[list[Any] | None, Any]:
        """Run a step as it is."""
        result = self._schedule_once(step, arguments)
        if self.optimizer is not None and step.method == "step":
            self.optimizer.step()
        return result

    def _schedule_once(self, step: Step, arguments: Any) -> tuple[list[Any] | None, Any]:
        args, kwargs = arguments
        losses: list[Any] | None = [] if step.wants_losses else None
        output = getattr(self.schedule, step.method)(*args, losses=losses, **kwargs)
        return losses, output

    def _result(self, step: Step, looks: bytes, prepared: bool) -> tuple[list[Any] | None, Any]:
        entry, graph, reason = None, None, ""
        try:
            given = Given.of(step[::2], step.arguments, self._device)
            entry = self._entries.of(given.signature.agreed(looks))
            graph, reason = entry.graph if prepared else None, entry.refused
            if graph is None and entry.is_warm and prepared and not reason:
                graph = self._record(entry, step, given)
        except CannotCaptureError as error:
            reason = str(error)
            if entry is not None:
                entry.refused = reason
        if self._agreeing and self._calls > WARM_UP:
            self._agree(reason, graph is not None)
        elif reason:
            self._said(reason)
        if graph is not None and not self._given_up:
            result = graph.replay(given.tensors)
            if result is not None:
                self._watch()
                return result
            self._said(VIEWS_HELD)
        return self._as_it_is(entry, step)

    # What it is made of.

    def _parameters(self, _: Baked | None = None) -> list[Tensor]:
        """All parameters whose gradients a step may write."""
        own = (p for stage in self._own for p in stage.submod.parameters())
        groups = () if self.optimizer is None else self.optimizer.param_groups
        return [*dict.fromkeys((*own, *(p for group in groups for p in group["params"])))]

    def _bake(self) -> Baked:
        modules = {
            f"stage {stage.stage_index} ({type(stage.submod).__name__})": stage.submod for stage in self._own
        }
        reads = [
            (f"the module of {name}", partial(_submodule, stage))
            for name, stage in zip(modules, self._own, strict=True)
        ]
        reads += [
            (f"{name} of the schedule", partial(getattr, self.schedule, attribute))
            for attribute, name in OPTIONS.items()
        ]
        return Baked(self._device, {**modules, "loss_fn": loss_of(self.schedule)}, self.optimizer, reads)

    # What is done with it.

    def _as_it_is(self, entry: Entry | None, step: Step) -> tuple[list[Any] | None, Any]:
        if entry is None or self._recorder is None:
            return self._once(step, step.arguments)
        with self._recorder.prepared():
            if not entry.runs and self._ranks > 1:
                self._rehearse(step)
            result = self._once(step, step.arguments)
        self._prepared_for = entry
        self._entries.ran(entry)
        return result

    def _rehearse(self, step: Step) -> None:
        """Load and take beforehand what receiving ahead must not wait for; or prepare for another method."""
        parameters = self._parameters()
        if self._gathered() or (first_dtensor(parameters) is not None and self._calls > 1):
            return  # whose gathers the other ranks would have to take part in
        rehearse(self._own, parameters, partial(self._schedule_once, step, step.arguments))

    def _record(self, entry: Entry, step: Step, given: Given) -> Graph:
        assert self._recorder is not None
        if self._gathered():
            raise CannotCaptureError(
                f"FSDP shards parameters of stage {self._gathered()[0]}, and allocates and frees their "
                "memory in each step. If they fit as a whole, use data_parallel= instead."
            )
        away = next((stage for stage in self._own if getattr(stage, "offload", None)), None)
        if away is not None:
            raise CannotCaptureError(
                f"stage {away.stage_index} has offload={away.offload!r}, and a graph's memory stays its own. "
                "Leave offload out, or do not capture the step."
            )
        if self._prepared_for is not entry:
            with self._recorder.prepared():
                self._rehearse(step)  # which prepares the stages for it again
            self._prepared_for = entry
        run = partial(self._once, step)
        first = not self._recorded
        entry.graph = record(entry, given, run, self._recorder, self._gradients, first, self._own)
        self._recorded = True
        return entry.graph

    def _gathered(self) -> list[int]:
        """The stages of ours that FSDP gathers the parameters of."""
        ours = [stage for stage in self._own if isinstance(stage, ExchangingStage)]
        return [stage.stage_index for stage in ours if is_sharded(stage.submod)]

    # What the ranks have to do with each other.

    def _agree(self, reason: str, recorded: bool) -> None:
        """Capture on all ranks, or on none: the reasons of all against it are told to all.

        Every rank asks in the same calls, until all have recorded something.
        """
        told: list[Any] = [None] * self._ranks
        dist.all_gather_object(told, (reason, recorded), group=self._group)
        reasons = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(told) if text]
        if reasons:
            self._give_up(" ".join(reasons))
        self._agreeing = self._calls < _ASKED_AT_MOST and not all(done for _, done in told)

    def _give_up(self, reason: str) -> None:
        self.close()
        self._recorder = None
        self._given_up = reason
        self._said(reason)

    def _watch(self) -> None:
        """Watch over a replay."""
        if self._ranks == 1:
            return
        if self._watchdog is None:
            groups = [stage.group for stage in self._own]
            self._watchdog = Watchdog(timeout_of(self._group, self._device), partial(_failure_in, groups))
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._watchdog.watch(event)


class Step(NamedTuple):
    """A call of a schedule's `step` or `eval`."""

    method: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    wants_losses: bool


def _submodule(stage: Any) -> Any:
    return stage.submod


def _failure_in(groups: list[Any]) -> str | None:
    failure = failures.heard(groups)
    return None if failure is None else failure.message
