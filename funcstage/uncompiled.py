"""The uncompiled engine: by levels, or on a plain tape where a stage takes gradients inside itself.

That it does is seen in the middle of its run, which is then given up: generators and the attributes of its
module go back to what they were, and it runs again. From then on it runs on the tape at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from funcstage import _functorch as ft
from funcstage import closures, control_flow, eager, trees
from funcstage.contents import Contents, Held
from funcstage.errors import StageError
from funcstage.functional import lent
from funcstage.inner_gradients import TakesGradients
from funcstage.kept import holders, objects_among, refill
from funcstage.trees import Buffers, Params, PyTree


def linearize(
    apply: Callable[..., Any],
    params: Params,
    buffers: Buffers,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    diff: Sequence[int],
) -> tuple[PyTree, Buffers, closures.InputTape | eager.InputTape]:
    """Run a stage function once and retain what its two reverse passes need; as `closures.linearize`."""
    try:
        return _linearize(apply, params, buffers, args, kwargs, diff)
    except StageError:
        raise
    except Exception as error:
        name = control_flow.operator_behind(error)
        if name is None:
            raise
        raise StageError(control_flow.refusal("The stage", name, control_flow.COMPILED)) from error


def _linearize(apply: Callable[..., Any], params: Params, *given: Any) -> Any:
    leaves = trees.flatten((params, given))[0]
    if closures.is_differentiated(leaves):
        return closures.linearize(apply, params, *given)
    if not _is_known(apply):
        module = getattr(apply, "module", None)
        with lent(module):
            before = Before.of(module, leaves, getattr(apply, "contents", None))
            try:
                return closures.linearize(apply, params, *given, held=before.held)
            except TakesGradients:
                before.restore()
        with suppress(TypeError):  # some callables cannot be remembered
            _TAKING.add(apply)
    return eager.linearize(apply, params, *given)


def _is_known(apply: Callable[..., Any]) -> bool:
    try:
        return apply in _TAKING
    except TypeError:
        return False


_TAKING: WeakSet[Callable[..., Any]] = WeakSet()
"""Stage functions that were seen to take gradients."""


class Before(NamedTuple):
    """What a run that is given up has changed: random generators, and what modules and arguments hold.

    Attributes:
        generators: generators with their states.
        held: what the module held, if there is one.
        handed: containers among the arguments, with what they held.
    """

    generators: list[tuple[torch.Generator, Tensor]]
    held: Held | None
    handed: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: Any, leaves: Sequence[Any], contents: Any = None) -> Before:
        """Take note of a stage's module, if it has one, and of the generators of its tensors' devices.

        `contents` are the module's, where something is known of them.
        """
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
        generators = [torch.default_generator]
        if devices and not torch.cuda.is_current_stream_capturing():
            generators += [torch.cuda.default_generators[device.index] for device in devices]
        held = None
        if isinstance(module, nn.Module):
            known = isinstance(contents, Contents) and not ft.current_level()  # whose tensors die with it
            held = (contents if known else Contents(module)).now()
        return cls(
            [(generator, generator.get_state()) for generator in generators],
            held,
            [(each, copy.copy(each)) for root in objects_among(leaves) for each in holders(root)],
        )

    def restore(self) -> None:
        """Put everything back."""
        for generator, state in self.generators:
            generator.set_state(state)
        if self.held is not None:
            self.held.restore()
        for container, contents in self.handed:
            refill(container, contents)
