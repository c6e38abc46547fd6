"""`.grad` around a graph: what is there when a step begins is added to, and nothing that a caller holds
changes.

A graph writes gradients where it wrote them when it was recorded: in the *kept* ones, of which there is one a
parameter. A caller gets them as `.grad` without a copy. So before each replay there are three cases:

- `.grad` is the kept one: the graph was recorded so as to add into it.
- `.grad` is another tensor: its values are copied in, and out again afterwards.
- there is none: the graph was recorded to begin anew. Whoever still holds the old gradient keeps its values,
  as the tensor is given memory of its own; where it cannot be, as views of it are held too, there is no
  replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from funcstage import trees
from funcstage._torch.tensors import memory_of, users_of
from funcstage.dtensors import local_of
from funcstage.pipelining.capture.given import CannotCaptureError

VIEWS_HELD = (
    "views of gradients of an earlier step are held, which a replay would overwrite. Hold copies of them "
    "(`parameter.grad.clone()`)."
)

Pattern = tuple[torch.dtype | None, ...]
"""For each parameter the dtype of its gradient, if it has one."""


class Gradients:
    """The gradients that graphs write, one for each parameter that has had one."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}

    def of(self, parameter: Tensor) -> Kept | None:
        """The kept gradient of a parameter."""
        found = self._kept.get(id(parameter))
        return found if found is not None and found.parameter is parameter else None

    def make(self, parameter: Tensor, dtype: torch.dtype) -> Kept:
        """Make memory for gradients of this dtype, outside of what graphs may overwrite."""
        found = self.of(parameter)
        if found is None or found.tensor.dtype != dtype or found.tensor.shape != parameter.shape:
            found = self._kept[id(parameter)] = Kept(parameter, _like(parameter, dtype))
            found.settle()
        return found

    def adopt(self, parameter: Tensor, grad: Tensor) -> Kept:
        """Keep a gradient that a graph has made in its own memory, which no other graph writes."""
        made = self._kept[id(parameter)] = Kept(parameter, grad)
        return made


class Kept:
    """A gradient's memory.

    Attributes:
        parameter: whose it is.
        tensor: over that memory; callers get others.
    """

    def __init__(self, parameter: Tensor, tensor: Tensor) -> None:
        self.parameter = parameter
        self.tensor = tensor.detach()
        self.memory = memory_of(local_of(self.tensor))
        self._handed: Any = lambda: None
        self.users = 0  # known once nobody else is left who made it

    def settle(self) -> None:
        """Note that nobody but this holds the memory now."""
        self.users = users_of(self.memory)

    def is_that_of(self, grad: Tensor) -> bool:
        """Whether a gradient lies in this memory."""
        mine, other = local_of(self.tensor), local_of(grad)
        return mine.data_ptr() == other.data_ptr() and memory_of(other) == self.memory

    def hand_out(self) -> Tensor:
        """Make a tensor for the caller, whose users can be told."""
        made = self.tensor.detach()
        self._handed = weakref.ref(made)
        return made

    def let_go(self) -> bool:
        """Leave the old values to whoever holds them; `False` if that cannot be done."""
        if users_of(self.memory) <= self.users:
            return True
        held = self._handed()
        if held is not None:
            with torch.no_grad():
                held.data = held.detach().clone()
            del held
        return users_of(self.memory) <= self.users


def pattern_of(parameters: Iterable[Tensor]) -> Pattern:
    """Say which parameters have a gradient, and of which dtype."""
    return tuple([None if grad is None else grad.dtype for grad in map(_GRAD, parameters)])


_GRAD = attrgetter("grad")


class Recorded:
    """What a graph does to the gradients of parameters.

    Made before the graph is recorded, told when its step has run, and then asked around each replay.

    Args:
        parameters: of the stages, and those that the optimizer steps.
        gradients: the kept ones.
        expected: the dtypes of the gradients after an ordinary step, `None` where there was none.
        first: whether no other graph shares the memory that this one is going to have.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        gradients: Gradients,
        expected: Sequence[torch.dtype | None],
        first: bool,
    ) -> None:
        self._parameters = parameters
        self._gradients = gradients
        self._before = [parameter.grad for parameter in parameters]
        self._kept: dict[int, Kept] = {}
        self._made: dict[int, Tensor] = {}
        for i, (parameter, dtype) in enumerate(zip(parameters, expected, strict=True)):
            grad = parameter.grad
            if grad is not None:
                self._kept[i] = gradients.make(parameter, grad.dtype)
            elif dtype is not None and not (first and gradients.of(parameter) is None):
                self._kept[i] = gradients.make(parameter, dtype)
        self._added_to = [i for i, grad in enumerate(self._before) if grad is not None]

    def begin(self) -> None:
        """Let the parameters have the gradients that the graph is to add into."""
        for i in self._added_to:
            self._parameters[i].grad = self._kept[i].tensor.detach()

    def end(self) -> None:
        """Bring the gradients to where they are kept, as the last thing that is recorded.

        Raises:
            CannotCaptureError: if a gradient is none that can be kept.
        """
        memories: set[int] = set()
        for i, parameter in enumerate(self._parameters):
            grad = parameter.grad
            if grad is None:
                if self._kept.pop(i, None) is not None and self._before[i] is not None:
                    raise CannotCaptureError(
                        "the step removes gradients that were there before it. Remove them before the step."
                    )
                continue
            if grad.layout is not torch.strided:
                raise CannotCaptureError(
                    f"a gradient is {trees.describe(grad)}. Let the layer that makes it return dense ones."
                )
            kept = self._kept.get(i)
            if kept is None:
                memory = memory_of(local_of(grad))
                self._made[i] = grad.detach().clone() if memory in memories else grad.detach()
                memories.add(memory)
            elif not kept.is_that_of(grad):
                with torch.no_grad():
                    kept.tensor.copy_(grad)

    def restore(self) -> None:
        """Give the parameters back the gradients that they had before the recording."""
        for parameter, grad in zip(self._parameters, self._before, strict=True):
            parameter.grad = grad

    def settle(self) -> None:
        """Note who holds what, when the recording is over and the gradients are restored."""
        self._before = []
        made, self._made = self._made, {}
        adopted = {i: self._gradients.adopt(self._parameters[i], grad) for i, grad in made.items()}
        made.clear()
        for kept in adopted.values():
            kept.settle()
        self._kept |= adopted
        begun = [kept for i, kept in self._kept.items() if i not in self._added_to]
        self._memories, self._users = [kept.memory for kept in begun], [kept.users for kept in begun]

    def enter(self) -> list[tuple[Tensor, Tensor]] | None:
        """Prepare a replay.

        Returns:
            The gradients of the caller's own, each after the kept one that it was copied to; `None` if there
            can be no replay, as somebody holds views of old gradients.
        """
        foreign = []
        if self._added_to:
            grads = [(self._kept[i], self._parameters[i].grad) for i in self._added_to]
            foreign = [
                (kept.tensor, grad) for kept, grad in grads if grad is not None and not kept.is_that_of(grad)
            ]
        if [*map(users_of, self._memories)] != self._users:
            begun = [kept for i, kept in self._kept.items() if self._parameters[i].grad is None]
            if not all(kept.let_go() for kept in begun):
                return None
        with torch.no_grad():
            for tensor, grad in foreign:
                tensor.copy_(grad)
        return foreign

    def leave(self, foreign: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Let the parameters have their gradients after a replay."""
        with torch.no_grad():
            for tensor, grad in foreign:
                grad.copy_(tensor)
        for i, kept in self._kept.items():
            if self._parameters[i].grad is None:
                self._parameters[i].grad = kept.hand_out()


def _like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(parameter.detach(), dtype=dtype)
