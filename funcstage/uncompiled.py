"""The uncompiled engine: by levels, or on a plain tape where a stage takes gradients inside itself.

That it does is seen in the middle of its run, which is then given up: generators and the attributes of its
module go back to what they were, and it runs again. From then on it runs on the tape at once.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from funcstage import closures, control_flow, eager, trees
from funcstage.errors import StageError
from funcstage.functional import lent
from funcstage.inner_gradients import TakesGradients
from funcstage.kept import holders, objects_among
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
            before = Before.of(module, leaves)
            try:
                return closures.linearize(apply, params, *given)
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
    """What a run that is given up has changed: random generators and the attributes of modules.

    Attributes:
        generators: generators with their states.
        attributes: modules with their attributes.
        contents: lists, dicts and the like among those and among arguments, with what they held.
    """

    generators: list[tuple[torch.Generator, Tensor]]
    attributes: list[tuple[nn.Module, dict[str, Any]]]
    contents: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: Any, leaves: Sequence[Any]) -> Before:
        """Take note of a stage's module, if it has one, and of the generators of its tensors' devices."""
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
        generators = [torch.default_generator]
        if devices and not torch.cuda.is_current_stream_capturing():
            generators += [torch.cuda.default_generators[device.index] for device in devices]
        modules = [*module.modules()] if isinstance(module, nn.Module) else []
        return cls(
            [(generator, generator.get_state()) for generator in generators],
            [(m, dict(vars(m))) for m in modules],
            [(v, v.copy()) for m in modules for v in vars(m).values() if type(v) in _CONTAINERS]
            + [(h, copy.copy(h)) for root in objects_among(leaves) for h in holders(root)],
        )

    def restore(self) -> None:
        """Put everything back."""
        for generator, state in self.generators:
            generator.set_state(state)
        for module, attributes in self.attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for container, contents in self.contents:
            container.clear()
            if isinstance(container, (list, deque)):
                container.extend(contents)
            else:
                container.update(contents)


_CONTAINERS = {list, dict, set, deque}
