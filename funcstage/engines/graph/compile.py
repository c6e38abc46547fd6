"""`compile`: a stage function -> the same function, whose F, I and W are programs traced once.

The passes, in order: trace -> decompose -> partition -> programs, one result for each signature.
"""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, Literal

import torch
from torch import Tensor, nn

from funcstage import forks
from funcstage._torch import tracing as tt
from funcstage._torch.functorch import current_level
from funcstage.checks import differentiated_leaves
from funcstage.engines.base import Linearized, StageCall
from funcstage.engines.choose import choose
from funcstage.engines.graph.blame import failed, tried_uncompiled
from funcstage.engines.graph.breaks import Parts
from funcstage.engines.graph.chain import OF_ANY_SIZE, WORTH_IT, chained
from funcstage.engines.graph.cuda_graphs import SlotPool
from funcstage.engines.graph.decompose import DECOMPOSED, decompose
from funcstage.engines.graph.guards import (
    Recent,
    Signature,
    changed,
    others_among,
    reasons,
    refuse_notes,
    signature_of,
)
from funcstage.engines.graph.lengths import Lengths
from funcstage.engines.graph.modules_behind import modules_behind
from funcstage.engines.graph.partition import Remat, checked, partition
from funcstage.engines.graph.plan import Plan, StagePrograms, plan_of
from funcstage.engines.graph.programs import Programs
from funcstage.engines.graph.reads import Reads
from funcstage.engines.graph.recorder import Recorder, may_read
from funcstage.engines.graph.refusals import ReadsValue, warn_of_changes, warn_of_parts
from funcstage.engines.graph.replay import draws_in_graphs, replay
from funcstage.engines.graph.runners import Lower, run_as_python
from funcstage.engines.graph.sharded import sharded
from funcstage.engines.graph.sizes import Open, Sizes, among_tensors
from funcstage.engines.graph.tapes import linearize
from funcstage.engines.graph.trace import trace
from funcstage.errors import StructureError, TraceError, stage_name
from funcstage.report import table
from funcstage.state.ambient import generators_kept, of_process
from funcstage.state.module import Fingerprint, locked
from funcstage.state.overlaps import refuse_written
from funcstage.state.shared import shared_by
from funcstage.trees import AnyBuffers, Buffers, NoBuffers, Output, Params

MAX_SIGNATURES = 64
"""How many signatures a compiled stage keeps; the least recently used one makes room."""

WARN_SIGNATURES = 8


class CompiledStage(Generic[Output, AnyBuffers]):
    """A stage function whose forward and split backward run as compiled programs.

    You call it like the function that it was made from, and `stage_vjp` gets F, I and W from it. A call that
    is differentiated from outside (an argument requires grad, or a transform or a mode of torch is active)
    runs the original function, with the same results.
    """

    def __init__(
        self,
        apply: Callable[..., tuple[Output, AnyBuffers]],
        backend: str,
        remat: Remat,
        cuda_graphs: bool,
        dynamic: bool | None,
        sites: bool,
        repeated: bool | None,
        fullgraph: bool | None,
    ) -> None:
        self.apply = apply
        self.held, self.named = getattr(apply, "held", tuple), getattr(apply, "named", dict)
        self.backend = backend
        self.remat = remat
        self.cuda_graphs = cuda_graphs
        self.dynamic = dynamic
        self.sites = sites
        self.repeated = repeated
        self.fullgraph = fullgraph
        self.module: nn.Module | None = getattr(apply, "module", None)
        self.__qualname__ = self.__name__ = stage_name(apply)
        self._modules = modules_behind(apply)
        self._fingerprint = Fingerprint(self._modules, hooks=getattr(apply, "refuses_hooks", True))
        self._traced: OrderedDict[Signature, Programs] = OrderedDict()
        self._reads: dict[Signature, list[Reads]] = {}  # by signatures without what was read outside
        self._sizes: dict[Signature, list[Sizes]] = {}  # by signatures without them
        self._lengths = Lengths(False if cuda_graphs else dynamic)
        self._recent: tuple[Recent, Programs] | None = None
        self._lock = forks.lock()
        self._warned = False
        self._unreadable: dict[Hashable, ReadsValue] = {}
        self._changing = 0
        self._parts: Parts | None = None

    def __call__(
        self, params: Params, buffers: AnyBuffers | NoBuffers, *args: Any, **kwargs: Any
    ) -> tuple[Output, AnyBuffers]:
        call = StageCall.of(self.apply, params, buffers, args, kwargs, None)
        found = self._whole(call)
        if found is None:
            return self.apply(params, buffers, *args, **kwargs)
        output, new_buffers, _ = self.run(found, call)
        return output, new_buffers

    def linearize(self, call: StageCall) -> Linearized[Any]:
        """Run F: what makes it an engine."""
        found = self._whole(call)
        if found is not None:
            return self.run(found, call)
        call = call.to(self.apply)
        with nullcontext() if self._parts is None else self._parts.running():
            return choose(call)(call)

    def plan(
        self,
        params: Params,
        buffers: Buffers,
        *args: Any,
        argnums: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Plan:
        """Return what F, I and W cost for these arguments, which may be on the meta device.

        Args:
            params: as for `stage_vjp`, a pytree of tensors.
            buffers: likewise.
            *args: positional arguments.
            argnums: which of them are differentiated.
            **kwargs: keyword arguments.

        Returns:
            The plan; print it.
        """
        programs = self._for(params, buffers, args, argnums, kwargs)
        return plan_of(self.__qualname__, programs.joint, programs.partition)

    def programs(
        self,
        params: Params,
        buffers: Buffers,
        *args: Any,
        argnums: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> StagePrograms:
        """Return the graphs of F, I and W for these arguments, for reading.

        Args:
            params: as for `stage_vjp`, a pytree of tensors.
            buffers: likewise.
            *args: positional arguments.
            argnums: which of them are differentiated.
            **kwargs: keyword arguments.

        Returns:
            The three graphs; print them.
        """
        parts = self._for(params, buffers, args, argnums, kwargs).partition
        return StagePrograms(parts.forward.module, parts.input_grad.module, parts.weight_grad.module)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, pickled ones too, are of the stage function, and trace anew."""
        options = self.backend, self.remat, self.cuda_graphs, self.dynamic, self.sites, self.repeated
        return type(self), (self.apply, *options, self.fullgraph)

    def __repr__(self) -> str:
        named = isinstance(self.remat, str | float)
        remat = self.remat if named else getattr(self.remat, "__name__", "policy")
        return (
            f"<CompiledStage of {self.__qualname__}, backend={self.backend!r}, remat={remat!r}, "
            f"{len(self._traced)} signature(s)>"
        )

    def _repr_html_(self) -> str:
        plans = [plan_of("", traced.joint, traced.partition) for traced in self._traced.values()]
        rows = [
            (
                str(i),
                *(f"{phase.flops:,}" for phase in (plan.forward, plan.input_grad, plan.weight_grad)),
                f"{plan.held_after_forward:,} B",
                f"{plan.held_after_input:,} B",
            )
            for i, plan in enumerate(plans)
        ]
        header = ("signature", "FLOPs of F", "of I", "of W", "held after F", "held after I")
        return table(repr(self)[1:-1], header, rows)

    def _whole(self, call: StageCall) -> tuple[Programs, list[Tensor]] | None:
        """The programs for a call and its tensors; `None` where it runs uncompiled, in part or as a whole."""
        try:
            return self.found(call)
        except ReadsValue as refusal:  # which is another error with fullgraph
            if self._parts is None:
                with locked(self.module):  # or it would find another thread's tensors in it
                    self._parts = Parts(self.module or nn.Module(), self._part)
                if self.fullgraph is None:
                    warn_of_parts(refusal)
            return None

    def _part(self, apply: Callable[..., Any]) -> CompiledStage:
        options = self.backend, self.remat, False, self.dynamic, self.sites, self.repeated
        return CompiledStage(apply, *options, fullgraph=False)

    def found(self, call: StageCall) -> tuple[Programs, list[Tensor]] | None:
        """The programs for a call and its tensors; `None` where the original function must run."""
        if current_level():
            return None  # a transform around the stage
        leaves, specs = call.local
        if specs and torch.is_grad_enabled() and any(map(_is_differentiated, call.whole[0])):
            return None  # what this rank has of them does not tell
        if self._recent is not None:  # computing a signature takes as long as launching F
            recent, programs = self._recent
            tensors = recent.match(call, self._fingerprint)
            if tensors is not None:
                return programs, tensors
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(map(_is_differentiated, tensors)):
            return None
        programs, signature, reads = self._looked_up(call)
        now, sizes = self._signature(call), signature.sizes
        # What the stage changes itself is read each time.
        if now._replace(outside=reads.now(), sizes=sizes) == signature:
            open_dims = {} if sizes is None else self._open_in(call)
            self._recent = Recent(call, self._fingerprint, reads, open_dims, sizes), programs
        return programs, tensors

    def run(self, found: tuple[Programs, list[Tensor]], call: StageCall) -> Linearized[Any]:
        """Run F; where it fails, raise what the stage itself raises."""
        programs, tensors = found
        if (joint := programs.joint).written:
            refuse_written(call.name, joint.written, tensors, joint.n_args, joint.names)
        try:
            linearized = linearize(programs, tensors)
            return linearized if joint.sharding is None else sharded(linearized, joint, call.whole[0])
        except Exception as caught:
            error = caught
        raise failed(error, call.to(self.apply))

    def _for(
        self,
        params: Params,
        buffers: Buffers,
        args: tuple[Any, ...],
        argnums: int | Sequence[int] | None,
        kwargs: dict[str, Any],
    ) -> Programs:
        """The programs for arguments with which nothing is run."""
        diff = differentiated_leaves(args, argnums)
        return self._looked_up(StageCall.of(self.apply, params, buffers, args, kwargs, diff))[0]

    def _signature(self, call: StageCall) -> Signature:
        return signature_of(call, self._fingerprint, self._open_in(call))

    def _open_in(self, call: StageCall) -> Open:
        (leaves, specs), structure = call.local, call.whole[1]
        return self._lengths.open_in(leaves, structure, specs)

    def _looked_up(self, call: StageCall) -> tuple[Programs, Signature, Reads]:
        """The programs for a call, the signature that they were traced for, and what that trace read."""
        tensors = [leaf for leaf in call.local[0] if isinstance(leaf, Tensor)]
        called = self._signature(call)
        with self._lock:
            found = self._known(called, tensors)
            if found is None and self._lengths.learn(reversed(self._traced), called):
                found = self._known(self._signature(call), tensors)
            kind = called.structure, called.argnums, called.module
            if found is None and kind in self._unreadable:
                raise self._unreadable[kind].with_traceback(None)
            try:
                return found or self._trace_open(call.to(self.apply))
            except ReadsValue as refusal:
                self._unreadable[kind] = refusal
                raise

    def _known(self, called: Signature, tensors: list[Tensor]) -> tuple[Programs, Signature, Reads] | None:
        for reads in self._reads.get(called, ()):
            plain = called._replace(outside=reads.now())
            for sizes in self._sizes.get(plain, (None,)):
                signature = plain._replace(sizes=sizes)
                programs = self._traced.get(signature)
                if programs is not None and (sizes is None or sizes.admit(tensors)):
                    self._traced.move_to_end(signature)
                    return programs, signature, reads
        return None

    def _trace_open(self, call: StageCall) -> tuple[Programs, Signature, Reads]:
        """Trace with open sizes, if any are to be; where that fails, with the sizes of the call."""
        open_dims = self._open_in(call)
        if open_dims:
            try:
                return self._trace(call, open_dims)
            except Exception as error:
                self._lengths.close(call.whole[1])
                if self.dynamic:
                    warnings.warn(
                        f"{self.__qualname__} cannot be traced with open sizes, so it is traced for each "
                        f"length separately: {error}",
                        stacklevel=2,
                    )
        return self._trace(call, {})

    def _trace(self, call: StageCall, open_dims: Open) -> tuple[Programs, Signature, Reads]:
        decompositions, lower = _backend(self.backend, self.repeated)
        # In this order, as a stage may run within another. One that draws from the process's is refused.
        with locked(self.module), tt.one_at_a_time, generators_kept(of_process()):
            recorder = Recorder(self.apply, self._modules, others_among(*call.whole))
            before, shared = self._signature(call), shared_by(self.apply, self._modules)
            try:
                table = {**DECOMPOSED, **decompositions}
                joint = trace(
                    call,
                    table,
                    recorder=recorder,
                    open_dims=among_tensors(open_dims, call.local[0]),
                    copied=self.repeated is not False,
                )
                reads, said = recorder.finish()
                refuse_notes(call, partial(may_read, recorder))
            except TraceError as refusal:
                shared.restore()
                recorder.left_behind.restore()
                runs_anyway = isinstance(refusal, ReadsValue) and not self.fullgraph
                is_final = open_dims or runs_anyway
                error: Exception | None = refusal if is_final else tried_uncompiled(refusal, call)
                if isinstance(refusal, ReadsValue) and self.fullgraph and isinstance(error, TraceError):
                    error = TraceError(f"{error} {_IN_PARTS}")
                cause = refusal.__cause__
            else:
                error = None
            finally:
                recorder.generators.undo()
                recorder.left_behind.restore()
        if isinstance(error, TraceError):
            raise error from cause
        if error is not None:
            raise error
        replayed = self.cuda_graphs and call.diff is not None and draws_in_graphs(joint)
        given = (node.meta["val"] for node in joint.placeholders if replayed)
        on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in given)
        slots = SlotPool() if on_cuda else None
        joint = decompose(joint)
        if not self.cuda_graphs:  # which cannot read generators
            joint = replay(joint)
        programs = Programs(joint, partition(joint, self.remat, self.sites), lower, slots)
        # Tensors that an earlier call has kept and this trace reads are known by now.
        with locked(self.module):
            called, now = self._signature(call), reads.now()
        plain = called._replace(outside=said)
        if changed(before, plain, called._replace(outside=now)):
            self._changing += 1
            if self._changing == WARN_SIGNATURES:
                warn_of_changes(self.__qualname__)
            return programs, before, reads  # good for this call alone: the next one has to change it too
        if joint.sizes is not None:
            joint.sizes.n_traced = joint.sizes.n_guards()
            self._sizes.setdefault(plain, []).append(joint.sizes)
        signature = plain._replace(sizes=joint.sizes)
        self._traced[signature] = programs
        alike = self._reads.setdefault(called, [])
        if not any(map(reads.is_like, alike)):
            alike.append(reads)
        if len(self._traced) > WARN_SIGNATURES and not self._warned:
            self._warned = True
            self._warn()
        if len(self._traced) > MAX_SIGNATURES:
            self._forget(self._traced.popitem(last=False)[0])
        return programs, signature, reads

    def _forget(self, gone: Signature) -> None:
        """Drop what is known of a signature beside its programs."""
        if gone.sizes is not None:
            self._sizes[gone._replace(sizes=None)].remove(gone.sizes)
        left = {s._replace(outside=(), sizes=None) for s in self._traced}
        if gone._replace(outside=(), sizes=None) not in left:
            del self._reads[gone._replace(outside=(), sizes=None)]

    def _warn(self) -> None:
        seen = list(self._traced)
        misses = ("; ".join(reasons(old, new)) or "?" for old, new in itertools.pairwise(seen))
        listed = "\n".join(f"  {i}: {miss}" for i, miss in enumerate(misses, 2))
        warnings.warn(
            f"{self.__qualname__} was traced for {len(seen)} signatures, and each is compiled separately. "
            f"What changed each time:\n{listed}",
            stacklevel=2,
        )


def compile(
    apply: Callable[..., tuple[Output, AnyBuffers]],
    *,
    backend: Literal["inductor", "aten"] = "inductor",
    remat: Remat = "min_cut",
    cuda_graphs: bool = False,
    dynamic: bool | None = None,
    sites: bool = False,
    repeated: bool | None = None,
    fullgraph: bool | None = None,
) -> CompiledStage[Output, AnyBuffers]:
    """Compile a stage function: traced once for each signature, F, I and W become three programs.

    A signature is all that a trace depends on: tree structure, shapes, dtypes, devices and strides of the
    leaves, other arguments' values, what is differentiated, the module's modes, hooks and attributes,
    autocast, grad mode, and torch's global settings. The programs of the 64 signatures that were used last
    are kept.

    Args:
        apply: a stage function, from `functionalize` or hand-written.
        backend: "inductor" lowers the programs with TorchInductor; "aten" runs them operation by
            operation, bitwise as eager does.
        remat: what backward recomputes instead of holding it: "none", "min_cut" (cheap operations, so that
            the fewest bytes are held), "full" (everything, from the stage's inputs), a policy that says of a
            graph node whether to save its value, or a budget from 0.0 to 1.0: the share of the bytes between
            what "full" and "none" hold after F. What costs most to recompute for each byte is held first.
        cuda_graphs: replay the programs as CUDA graphs. Every microbatch between F and W takes a slot
            of device memory, at most 16 for each signature; further ones run without graphs.
        dynamic: which sizes of arguments a trace leaves open. `None`: none at first; a dimension that is
            seen to vary is open in the next trace. `True`: all, at once. `False`: none, so that each length
            is traced apart. Sizes 0 and 1 are traced apart in any case, as are those that the stage's code
            or a kernel depends on. CUDA graphs are of one length each.
        sites: leave all sums to W, so that `weight_pullback.sites` has every site. I sums the gradients of
            norms otherwise where that saves memory until W.
        repeated: whether identical layers are traced and lowered once, so that the time to the first result
            hardly grows with depth; those that differ in anything but their parameters' values are traced
            and lowered apart. `None`: lowered once by Inductor, where a layer comes four times or more.
            `False`: each layer is traced, and each program is lowered as one.
        fullgraph: what becomes of a stage that reads values of tensors (`.item()`, `nonzero`, an `if`),
            which no trace knows. `None` and `False`: it runs uncompiled, but for those of its submodules that
            can be traced; `None` warns of it. `True`: it is refused.

    Returns:
        A stage function for `stage_vjp`.

    Raises:
        StructureError: if an option is unknown or `apply` is no stage function.

    Example:
        >>> import torch, funcstage as fs
        >>> apply, params, buffers = fs.functionalize(torch.nn.Linear(3, 2))
        >>> fast = fs.compile(apply, backend="aten")
        >>> output, buffers, pullback = fs.stage_vjp(fast, params, buffers, torch.ones(4, 3))
        >>> (dx,), weight_pullback = pullback(torch.ones(4, 2))
        >>> sorted(weight_pullback())
        ['bias', 'weight']
    """
    if not callable(apply) or isinstance(apply, nn.Module):
        raise StructureError(
            f"compile expects a stage function, got {type(apply).__name__}. Take "
            "apply, params, buffers = funcstage.functionalize(module) and compile apply."
        )
    if backend not in ("inductor", "aten"):
        raise StructureError(f"backend must be 'inductor' or 'aten', got {backend!r}.")
    if dynamic not in (None, True, False):
        raise StructureError(f"dynamic must be None, True or False, got {dynamic!r}.")
    if dynamic and cuda_graphs:
        raise StructureError(
            "cuda_graphs=True replays fixed sizes, so it cannot be combined with dynamic=True. Leave one of "
            "them out."
        )
    if not isinstance(sites, bool):
        raise StructureError(f"sites must be True or False, got {sites!r}.")
    if repeated is not None and not isinstance(repeated, bool):
        raise StructureError(f"repeated must be None, True or False, got {repeated!r}.")
    if fullgraph not in (None, True, False):
        raise StructureError(f"fullgraph must be None, True or False, got {fullgraph!r}.")
    return CompiledStage(apply, backend, checked(remat), cuda_graphs, dynamic, sites, repeated, fullgraph)


_IN_PARTS = "Without fullgraph=True those of its submodules that can be traced are compiled."


def _is_differentiated(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _backend(name: str, repeated: bool | None) -> tuple[Any, Lower]:
    if name == "aten":
        return {}, chained(run_as_python, OF_ANY_SIZE) if repeated else run_as_python
    from funcstage.engines.graph import inductor  # here, as importing Inductor takes seconds

    lower: Lower = inductor.lower
    if repeated is not False:
        lower = chained(lower, OF_ANY_SIZE if repeated else WORTH_IT)
    return inductor.decompositions(), lower
