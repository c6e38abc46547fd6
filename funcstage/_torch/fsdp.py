"""What FSDP2 knows of the parameters that it shards, and what its hooks do beside gathering them.

Relied on are, of a module under `fully_shard` or `replicate`, `_get_fsdp_state()`; of that state
`_fsdp_param_group` (2.11, 2.12) or `_fsdp_param_groups`, `_is_root`, `_state_ctx.iter_forward_root`,
`_training_state`, `_states_to_forward_prefetch`, `_modules_to_run_forward`, `_auto_reshard_after_forward`,
`_register_pre_backward_hook`, `_lazy_init`, `_root_post_backward_final_callback` and
`_state_ctx.all_states`; of a group and its parameters what is read in `_read` below, and what is called where
gradients are handed over. Imported when a module is there that FSDP has worked on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, FSDPMeshInfo, TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from funcstage._torch.dtensor import DTensor, local_of, spec_of, with_dtype, wrapped
from funcstage.errors import StructureError

_c10d: Any = torch.ops._c10d_functional


class Sharded(NamedTuple):
    """A parameter that FSDP shards.

    Attributes:
        name: the qualified name of the parameter.
        torchs: what FSDP knows of it.
        dim: the dimension that is split.
        size: the sizes of the whole, as FSDP gathers it: with tensor parallelism what this rank has of it.
        padded: the sizes of a shard, the same on all ranks.
        own: the sizes of this rank's shard.
        dtype: that the whole is cast to.
        whole: how the whole is sharded by tensor parallelism, if it is.
        spec: how the shards are.
    """

    name: str
    torchs: Any
    dim: int
    size: torch.Size
    padded: torch.Size
    own: torch.Size
    dtype: torch.dtype
    whole: Any
    spec: Any

    def is_shard(self, tensor: object) -> bool:
        """Tell whether a tensor is sharded as FSDP would have it."""
        if not isinstance(tensor, DTensor):
            return False
        return (tensor.placements, tensor.device_mesh) == (tuple(self.spec.placements), self.spec.mesh)

    @property
    def summed_in(self) -> torch.dtype:
        """The dtype that FSDP sums the gradients of microbatches in."""
        return _reduced_in(self, self.torchs.sharded_param.dtype, self.dtype)

    def take(self, grad: Tensor) -> None:
        """Let FSDP have the gradient of the whole parameter, as if autograd had left it there."""
        whole = self.torchs._unsharded_param
        if grad.dtype == whole.dtype:
            whole.grad = grad
        elif hasattr(FSDPParam, "unsharded_grad_dtype"):  # from torch 2.15 on
            whole.grad_dtype = grad.dtype
            whole.grad = grad
        else:
            self.torchs.unsharded_accumulated_grad = grad


class Group(NamedTuple):
    """Parameters that FSDP gathers and reduces together.

    Attributes:
        torchs: FSDP's group.
        parameters: of the group.
        gathers: over which the parameters are sharded; None where each rank has them whole.
        scatters: the same for gradients, over which they may travel apart.
        replicas: the ranks that have the same shards; None where there are none.
        again: whether the whole is to be gathered again for the backward.
    """

    torchs: Any
    parameters: tuple[Sharded, ...]
    gathers: Any
    scatters: Any
    replicas: Any
    again: bool

    def gather(self, shards: Sequence[Any]) -> list[Tensor]:
        """Make the whole parameters of shards, which are DTensors; one message for each dtype.

        Parameters travel side by side, each from where it is to where it is read: FSDP's own copies, into one
        piece of memory and out of it again, would stand between the products.
        """
        ranks = 1 if self.gathers is None else self.gathers.size()
        rows = [_padded(local_of(s).to(p.dtype), p.padded, p.dim) for p, s in self._with(shards)]
        whole: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(row.dtype for row in rows):
            places = [i for i, row in enumerate(rows) if row.dtype == dtype]
            flat = [rows[i].flatten() for i in places]
            if ranks > 1:
                pending = _c10d.all_gather_into_tensor_coalesced(flat, ranks, self.gathers.group_name)
                flat = [*map(_c10d.wait_tensor, pending)]
            whole.update(zip(places, flat, strict=True))
        made = []
        for i, parameter in enumerate(self.parameters):
            stacked = whole[i].reshape(ranks, *parameter.padded).movedim(0, parameter.dim)
            sizes = list(parameter.padded)
            sizes[parameter.dim] *= ranks
            tensor = stacked.reshape(sizes).narrow(parameter.dim, 0, parameter.size[parameter.dim])
            tensor = tensor.contiguous()
            spec = parameter.whole
            made.append(tensor if spec is None else wrapped(tensor, with_dtype(spec, tensor.dtype)))
        return made

    def reduce(self, grads: Sequence[Any], shards: Sequence[Any]) -> list[Any]:
        """Make shards of the mean of what every rank has of the gradients; None stays None."""
        given = [
            grad if grad is not None or not self._zeros_for_absent(p) else torch.zeros(p.size, dtype=p.dtype)
            for p, grad in zip(self.parameters, grads, strict=True)
        ]
        places = [i for i, grad in enumerate(given) if grad is not None]
        if not places:
            return given
        ranks = 1 if self.scatters is None else self.scatters.size()
        inner = {i: self.parameters[i].torchs._get_grad_inner_tensor(given[i]) for i in places}
        flat = _joined([_by_rank(inner[i], self.parameters[i], ranks) for i in places]).flatten()
        flat = flat.to(_reduced_in(self.parameters[places[0]], shards[places[0]].dtype, flat.dtype))
        before, after = self._divisors(flat.dtype, ranks)
        flat = flat if before == 1 else flat / before
        if ranks > 1:
            pending = _c10d.reduce_scatter_tensor(flat, "sum", ranks, self.scatters.group_name)
            flat = _c10d.wait_tensor(pending)
        if self.replicas is not None and self.replicas.size() > 1:
            flat = _c10d.wait_tensor(_c10d.all_reduce(flat, "sum", self.replicas.group_name))
        flat = flat if after == 1 else flat / after
        reduced: list[Any] = [None] * len(given)
        parts = flat.split([self.parameters[i].padded.numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            p, shard = self.parameters[i], shards[i]
            own = part.view(p.padded).narrow(p.dim, 0, p.own[p.dim])
            reduced[i] = wrapped(own.to(shard.dtype).clone(), spec_of(shard))
        return reduced

    def await_reduction(self) -> None:
        """Tell FSDP of torch 2.15 that there are gradients to reduce."""
        if hasattr(self.torchs, "_post_backward_pending"):
            self.torchs._post_backward_pending = True

    def _with(self, shards: Sequence[Any]) -> Iterator[tuple[Sharded, Any]]:
        return zip(self.parameters, shards, strict=True)

    def _zeros_for_absent(self, parameter: Sharded) -> bool:
        wanted = getattr(self.torchs, "reduce_scatter_unused_params", False)
        return bool(wanted) and parameter.torchs.sharded_param.requires_grad

    def _divisors(self, dtype: torch.dtype, ranks: int) -> tuple[float, float]:
        """What sums are divided by before they travel, where they might overflow otherwise, and after."""
        replicas = 1 if self.replicas is None else self.replicas.size()
        factor = self.torchs.gradient_divide_factor
        factor = float(ranks * replicas) if factor is None else factor
        if dtype in (torch.float32, torch.bfloat16):
            return 1.0, factor
        before = 1.0
        while factor % before == 0 and factor / before > before:
            before *= 2
        return before, factor / before


def units_of(module: nn.Module) -> list[nn.Module]:
    """The submodules that `fully_shard` or `replicate` has worked on, outer ones first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def roots_of(module: nn.Module) -> list[Any]:
    """Those of them that are within no other."""
    units = units_of(module)
    inner = {id(part) for unit in units for part in unit.modules() if part is not unit}
    return [unit for unit in units if id(unit) not in inner]


def with_shards(module: nn.Module) -> None:
    """Let FSDP put the shards where a forward has left whole parameters."""
    for unit in units_of(module):
        unit.reshard()  # type: ignore[operator]


def gather_all(module: nn.Module, trains: bool) -> None:
    """Let FSDP gather all parameters of a module that are not yet whole.

    Args:
        module: the module.
        trains: whether a backward follows, whose gradients are to be reduced.
    """
    for root in roots_of(module):
        root._get_fsdp_state()._lazy_init()
        if trains and hasattr(root, "set_manual_backward_finalization"):  # from torch 2.15 on
            root.set_manual_backward_finalization(True)
    for unit in units_of(module):
        unit.unshard()  # type: ignore[operator]


def let_go(module: nn.Module) -> None:
    """Let FSDP do after a forward what `reshard_after_forward` says."""
    for unit in units_of(module):
        for group in _groups(unit._get_fsdp_state()):  # type: ignore[operator]
            if not group.is_unsharded:
                continue
            with group.use_training_state(TrainingState.FORWARD):
                group.reshard()


def reduce_all(root: Any) -> None:
    """Let FSDP reduce the gradients of a root, as torch's schedules do where the root is the whole stage."""
    root.set_reshard_after_backward(True)
    root.set_requires_gradient_sync(True)
    if hasattr(root, "finalize_backward"):  # from torch 2.15 on
        root.finalize_backward()
        root.set_manual_backward_finalization(False)
        return
    root.set_is_last_backward(True)
    state = root._get_fsdp_state()
    for each in state._state_ctx.all_states:
        for group in _groups(each):
            group.post_backward()
    state._root_post_backward_final_callback()


def groups_of(module: nn.Module) -> tuple[Group, ...]:
    """Read what FSDP knows of the parameters of a module.

    Raises:
        StructureError: if something that was asked of FSDP cannot be had here.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    roots = roots_of(module)
    found: dict[int, Group] = {}
    for unit in units_of(module):
        state = unit._get_fsdp_state()  # type: ignore[operator]
        is_root = unit in roots and state._auto_reshard_after_forward
        for group in _groups(state):
            found.setdefault(id(group), _read(type(module).__name__, group, names, bool(is_root)))
    return tuple(found.values())


def check_reduces(owner: str, groups: Sequence[Group]) -> None:
    """Refuse to compute past what FSDP was told about gradients.

    Raises:
        StructureError: names the setting.
    """
    for group in groups:
        for setting, said in (
            ("reduce_grads", "set_requires_gradient_sync(False)"),
            ("all_reduce_grads", "set_requires_all_reduce(False)"),
        ):
            if not getattr(group.torchs, setting):
                raise StructureError(
                    f"{owner}: {said} tells FSDP to hold gradients back, but W returns them reduced. Set it "
                    "to True again; funcstage.stage_backward_weight sums over microbatches."
                )


@contextmanager
def hooks_casting_only(module: nn.Module) -> Iterator[None]:
    """Let FSDP's hooks cast inputs and outputs, as the policy says, and do nothing else."""
    states = {id(s): s for s in (u._get_fsdp_state() for u in units_of(module))}.values()  # type: ignore[operator]
    before = [(state, dict(vars(state)), set(state._modules_to_run_forward)) for state in states]
    try:
        for state in states:
            vars(state).update(_IDLE)
            vars(state).update({name: None for name in ("_fsdp_param_group",) if name in vars(state)})
            state._state_ctx = copy.copy(state._state_ctx)
            state._state_ctx.iter_forward_root = _SOMEBODY_ELSE
            state._modules_to_run_forward.clear()
        yield
    finally:
        for state, attributes, to_run in before:
            vars(state).clear()
            vars(state).update(attributes)
            state._modules_to_run_forward.clear()
            state._modules_to_run_forward.update(to_run)


_SOMEBODY_ELSE = object()
_IDLE: dict[str, Any] = {
    "_fsdp_param_groups": (),
    "_is_root": False,
    "_training_state": TrainingState.IDLE,
    "_states_to_forward_prefetch": (),
    "_register_pre_backward_hook": lambda output: output,
}


def _groups(state: Any) -> list[Any]:
    if "_fsdp_param_group" not in vars(state):  # from torch 2.13 on
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _read(owner: str, group: Any, names: dict[int, str], is_root: bool) -> Group:
    meshes = group.mesh_info
    if group._all_reduce_hook is not None:
        raise _unread(owner, "to run an all-reduce hook", "Reduce the gradients that W returns yourself")
    for kind in (group._all_gather_comm, group._reduce_scatter_comm):
        if not type(kind).__module__.startswith("torch."):
            raise _unread(owner, f"to use collectives of your own ({type(kind).__name__})", "Leave them out")
    gathers = meshes.shard_process_group if isinstance(meshes, FSDPMeshInfo) else None
    return Group(
        group,
        tuple(_parameter(owner, parameter, names) for parameter in group.fsdp_params),
        gathers,
        getattr(meshes, "reduce_scatter_process_group", None) or gathers,
        meshes.replicate_process_group if isinstance(meshes, DDPMeshInfo) else None,
        group.post_forward_mesh_info is not None and not is_root,
    )


def _parameter(owner: str, parameter: Any, names: dict[int, str]) -> Sharded:
    info = parameter._module_info
    shard = getattr(info.module, info.param_name)
    name = names.get(id(shard), info.param_name)
    if parameter.offload_to_cpu:
        raise _unread(owner, f"to offload {name!r} to the CPU", "Leave `offload_policy` out")
    if hasattr(local_of(shard), "fsdp_pre_all_gather"):
        raise _unread(owner, f"to gather {name!r} as its class says", "Give it a tensor of a plain class")
    if getattr(parameter, "is_spmd_types", False):
        raise _unread(owner, f"to shard {name!r}, which spmd_types annotates", "Make it a DTensor")
    dtype, asked = shard.dtype, parameter.mp_policy.param_dtype
    whole = getattr(parameter, "_unsharded_dtensor_spec", None) or getattr(parameter, "_tp_spec", None)
    return Sharded(
        name,
        parameter,
        parameter.fsdp_placement.dim,
        parameter._orig_size,
        parameter.padded_sharded_param_size,
        parameter.sharded_size,
        asked if asked is not None and dtype.is_floating_point else dtype,
        whole if parameter.is_dtensor else None,
        parameter._sharding_spec,
    )


def _unread(owner: str, what: str, instead: str) -> StructureError:
    return StructureError(
        f"{owner}: FSDP was asked {what}, which a functional stage does not do. {instead}, or run the "
        "module itself, with funcstage.autograd for a split backward."
    )


def _reduced_in(parameter: Sharded, own: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """The dtype of the sums: if none is asked for that of gradients, from torch 2.15 on of parameters."""
    by_itself = own if hasattr(FSDPParam, "unsharded_grad_dtype") else computed
    return parameter.torchs.mp_policy.reduce_dtype or by_itself


def _padded(shard: Tensor, sizes: torch.Size, dim: int) -> Tensor:
    missing = sizes[dim] - shard.size(dim)
    if not missing:
        return shard
    rest = list(sizes)
    rest[dim] = missing
    return torch.cat([shard, shard.new_zeros(rest)], dim)


def _by_rank(grad: Tensor, parameter: Sharded, ranks: int) -> Tensor:
    """A row for each rank, of what its shard is."""
    sizes = list(parameter.padded)
    sizes[parameter.dim] *= ranks
    grad = _padded(grad, torch.Size(sizes), parameter.dim)
    apart = grad.unflatten(parameter.dim, (ranks, parameter.padded[parameter.dim]))
    return apart.movedim(parameter.dim, 0).reshape(ranks, -1)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows), 1)
