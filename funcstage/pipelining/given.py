"""What a pipeline stage was told of the tensors that cross its edges, at whatever position torch takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from funcstage import dtensors
from funcstage._torch.pipelining import TAKES_GRADS_AND_MESHES
from funcstage.errors import LeafError, StructureError
from funcstage.pipelining.examples import alike, as_tuple, look, tensors
from funcstage.trees import PyTree, describe

GetMesh = Callable[..., Any]
"""`get_mesh(mesh_dim_names, mesh_layout) -> DeviceMesh`, as torch calls it."""


class Position(NamedTuple):
    """The arguments of a stage that torch has at changing positions."""

    output_grads: Any
    input_grads: Any
    group: Any
    dw_builder: Any
    get_mesh: Any

    @property
    def group_found(self) -> Any:
        """The process group, wherever it was given."""
        return self.output_grads if isinstance(self.output_grads, dist.ProcessGroup) else self.group

    def of_this_torch(self) -> Position:
        """Read them in the order of the installed torch, and refuse what it does not know.

        Raises:
            StructureError: names the argument.
        """
        read = self
        if not TAKES_GRADS_AND_MESHES:
            if isinstance(self.output_grads, dist.ProcessGroup) or callable(self.input_grads):
                read = Position(None, None, self.output_grads, self.input_grads, self.get_mesh)
            for name in ("output_grads", "input_grads", "get_mesh"):
                if getattr(read, name) is not None:
                    raise StructureError(
                        f"{name}= needs torch 2.12, before which stages send each other plain tensors alone. "
                        "Upgrade torch, or leave it out and let stages return tensor.to_local()."
                    )
        elif isinstance(self.output_grads, dist.ProcessGroup):
            raise StructureError(
                "output_grads is a process group. Since torch 2.12 that is the seventh argument of a stage, "
                "and group the ninth: pass group= by keyword."
            )
        if read.get_mesh is not None and not callable(read.get_mesh):
            raise StructureError(
                "get_mesh must be a function (mesh_dim_names, mesh_layout) -> DeviceMesh, got "
                f"{describe(read.get_mesh)}. Pass one that looks the mesh up by its names."
            )
        return read


@dataclass(frozen=True, slots=True)
class Given:
    """Examples of what a stage takes and returns; `None` where there are none.

    Attributes:
        inputs: of its arguments.
        outputs: of its output.
        input_grads: of the gradients that it sends, one for each of its inputs, or `None`.
        output_grads: of the gradients that it is sent, likewise.
    """

    inputs: PyTree = None
    outputs: PyTree = None
    input_grads: PyTree = None
    output_grads: PyTree = None

    def check(self) -> None:
        """Refuse examples that do not go together.

        Raises:
            LeafError: names the example.
        """
        for what, examples, grads in (
            ("input", self.inputs, self.input_grads),
            ("output", self.outputs, self.output_grads),
        ):
            for i, grad in enumerate(as_tuple(grads) if grads is not None else ()):
                if grad is not None and not isinstance(grad, Tensor):
                    raise LeafError(
                        f"{what}_grads[{i}] must be a tensor or None, got {describe(grad)}. Give an example "
                        f"of the gradient of each {what}, or leave {what}_grads out."
                    )
            if grads is not None and examples is not None:
                check_grads(f"{what}_grads", as_tuple(grads), tensors(examples))

    def all_tensors(self) -> list[Tensor]:
        """All of the examples."""
        return tensors((self.inputs, self.outputs, self.input_grads, self.output_grads))

    def sent_grads(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The examples of the gradients that are sent for such inputs, each `None` where there is none."""
        return _one_each("input_grads", self.input_grads, inputs)

    def check_received(self, grads: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        """Refuse gradients that the next stage sends, if they are not those of the outputs, or not as told.

        Raises:
            LeafError: names the gradient.
        """
        check_grads("what the next stage sends as gradients", grads, outputs)
        told = _one_each("output_grads", self.output_grads, outputs)
        for i, (expected, sent) in enumerate(zip(told, grads, strict=True)):
            if expected is not None and (sent is None or not alike([sent], [expected])):
                raise LeafError(
                    f"output_grads[{i}] is {look(expected)}, but the next stage sends "
                    f"{'none' if sent is None else look(sent)}. Correct output_grads, leave it out, or give "
                    "the next stage input_grads."
                )


def _one_each(name: str, grads: PyTree, of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if grads is None:
        return (None,) * len(of)
    check_grads(name, as_tuple(grads), of)
    return as_tuple(grads)


def check_grads(name: str, grads: Sequence[Any], of: Sequence[Tensor]) -> None:
    """Refuse gradients that cannot be those of these tensors.

    Args:
        name: what they are called.
        grads: the gradients; `None` says nothing about one.
        of: the tensors.

    Raises:
        LeafError: names the gradient.
    """
    if len(grads) != len(of):
        raise LeafError(
            f"{name} has {len(grads)} entries for {len(of)} tensors. Give one for each, None for what needs "
            "no gradient."
        )
    for i, (grad, tensor) in enumerate(zip(grads, of, strict=True)):
        if grad is None:
            continue
        if not tensor.requires_grad:
            raise LeafError(
                f"{name}[{i}] is {look(grad)}, but the tensor, {look(tensor)}, does not require grad. Put "
                "None there."
            )
        meshes = dtensors.mesh_of(grad), dtensors.mesh_of(tensor)
        if (grad.shape, grad.dtype) != (tensor.shape, tensor.dtype) or meshes[0] != meshes[1]:
            raise LeafError(
                f"{name}[{i}] is {look(grad)}, but the tensor is {look(tensor)}. A gradient has the shape, "
                "dtype and mesh of what it is the gradient of; its placements may be others."
            )
