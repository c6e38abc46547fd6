"""Which operations of a stage read a tensor: where to look when its gradient is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcstage import trees


class Readers(TorchFunctionMode):
    """While it is entered, notes the operations that read some tensors.

    Attributes:
        found: the operations by the name of the tensor, in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, tuple[Tensor, str]] = {}
        self._modules: dict[int, str] = {}
        self.found: dict[str, list[str]] = {}

    def watch(self, named: Iterable[tuple[str, Tensor]], module: nn.Module | None) -> None:
        """Look out for these tensors, and tell which submodule of `module` reads them."""
        # The tensor is held with its name, as its id would be given away with its memory.
        self._watched = {id(tensor): (tensor, name) for name, tensor in named}
        self._modules = {} if module is None else {id(m): name for name, m in module.named_modules()}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in trees.flatten(result)[0]):
            for leaf in trees.flatten((args, dict(kwargs)))[0]:
                if id(leaf) in self._watched:
                    self._note(self._watched[id(leaf)][1], function)
        return result

    def _note(self, name: str, function: Callable[..., Any]) -> None:
        operation = getattr(function, "__name__", str(function))
        where = self._submodule(sys._getframe(2))
        reader = f"{operation} in {where}" if where else operation
        readers = self.found.setdefault(name, [])
        if reader not in readers:
            readers.append(reader)

    def _submodule(self, frame: FrameType | None) -> str:
        """Name the innermost submodule that is being run."""
        while frame is not None:
            name = self._modules.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
            frame = frame.f_back
        return ""
