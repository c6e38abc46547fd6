"""Stages that read values of tensors, which no trace knows: uncompiled, but for the parts that can be traced.

What `torch.compile` calls a graph break. The stage runs by levels; those submodules that can be traced, the
largest that can, are compiled and run apart (`levels/apart.py`). Which these are is found out as they are
called: one that cannot be traced runs as it is, and its own submodules are tried in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from funcstage._torch.calls import asking_about_calls
from funcstage._torch.interception import intercepting
from funcstage.engines.base import StageCall
from funcstage.engines.levels.apart import Apart, run_apart, split_at_work
from funcstage.functional import function_of
from funcstage.trees import PyTree

if TYPE_CHECKING:
    from funcstage.engines.graph.compile import CompiledStage

Place = tuple[dict[str, Any], str]
"""Where a module holds a tensor: a dict of its, and the name there."""


class Parts:
    """The submodules of a stage that may be compiled apart.

    Args:
        module: of the stage.
        compiled: compiles a stage function.
    """

    def __init__(self, module: nn.Module, compiled: Callable[[Any], CompiledStage]) -> None:
        places: dict[Tensor, list[Place]] = {}
        for part in module.modules():
            for space in (part._parameters, part._buffers):
                for key, tensor in space.items():
                    if tensor is not None:
                        places.setdefault(tensor, []).append((space, key))
        self._parts = {
            part: _Part(part, compiled, places)
            for part in module.modules()
            if part is not module and _pays(part)
        }

    def running(self) -> AbstractContextManager[Any]:
        """Run them apart where they are called meanwhile."""
        return asking_about_calls(self._called)

    def _called(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        part = self._parts.get(module)
        split = None if part is None or not part.is_traceable else split_at_work()
        if part is not None and split is not None:
            found = run_apart(split, part.run, part.params, part.buffers, (args, kwargs))
            if found is not None:
                output, new_buffers = found
                part.hold(new_buffers)
                return output
        return call(module, *args, **kwargs)


class _Part:
    """A submodule that may be compiled.

    Attributes:
        is_traceable: whether it is not known that it cannot be traced.
    """

    def __init__(
        self, module: nn.Module, compiled: Callable[[Any], CompiledStage], places: dict[Tensor, list[Place]]
    ) -> None:
        function, params, buffers = function_of(module)
        self.is_traceable = True
        self._compiled = compiled(_OfTrees(function))
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._params = {name: places[own[name]] for name in params}
        self._buffers = {name: places[own[name]] for name in buffers}

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters that are trained, as the module holds them now."""
        return {name: space[key] for name, ((space, key), *_) in self._params.items()}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers and the other parameters, likewise."""
        return {name: space[key] for name, ((space, key), *_) in self._buffers.items()}

    def hold(self, buffers: dict[str, Tensor]) -> None:
        """Hold these buffers."""
        for name, tensor in buffers.items():
            for space, key in self._buffers[name]:
                space[key] = tensor

    def run(
        self, params: PyTree, buffers: PyTree, args: tuple[Any, ...], diff: Sequence[int]
    ) -> Apart | None:
        """Run it as a compiled stage, if it can be."""
        call = StageCall.of(self._compiled, params, buffers, args, {}, diff)
        with intercepting(None):  # a compiler may use threads
            try:
                found = self._compiled.found(call)
            except Exception:  # the module's own come again as it runs uncompiled
                found = None
            if found is None or found[0].joint.changes is not None:
                self.is_traceable = False  # what it keeps has gradients for the others
                return None
            return Apart(self._compiled.run(found, call), found[0].joint.cotangents)


class _OfTrees:
    """A module's stage function, of a tuple and a dict of arguments: so all of them may have gradients."""

    def __init__(self, function: Any) -> None:
        self.__qualname__ = self.__name__ = function.__qualname__
        self.module, self.contents = function.module, function.contents
        self._function = function

    def __call__(self, params: PyTree, buffers: PyTree, args: Any, kwargs: Any) -> tuple[PyTree, PyTree]:
        output: tuple[PyTree, PyTree] = self._function(params, buffers, *args, **kwargs)
        return output


def _pays(module: nn.Module) -> bool:
    """Tell whether a module has parameters, and is more than one layer of torch's."""
    is_layer = type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())
    return not is_layer and any(True for _ in module.parameters())
