"""Situations that callers make around a stage: modes, interrupts, writes in place, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from situation import Situation, World
from torch.utils._python_dispatch import TorchDispatchMode

from funcstage import trees


@dataclass(frozen=True)
class Mode(Situation):
    """A mode of torch around some passes."""

    name: str
    verbs: str = "FIW"

    @property
    def refusable(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("aten",) if self.name == "anomaly" else ()  # whose checks read values, which a trace lacks

    def around(self, verb: str) -> AbstractContextManager[object]:
        return MODES[self.name]() if verb in self.verbs else nullcontext()

    def around_eager(self, verb: str) -> AbstractContextManager[object]:
        # Without a tape eager has no gradients; the split has, whatever the caller's grad mode.
        return nullcontext() if self.name in _GRAD_MODES else self.around(verb)


class _Passes(TorchDispatchMode):
    """A mode of the user's that changes nothing."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class _Watches(torch.overrides.TorchFunctionMode):
    """A mode of the user's that changes nothing."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic(warn_only: bool) -> Iterator[None]:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


_GRAD_MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    **_GRAD_MODES,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: _default_dtype(torch.float16),
    "default device": lambda: torch.device("cpu"),
    "deterministic": lambda: _deterministic(warn_only=False),
    "deterministic, warning": lambda: _deterministic(warn_only=True),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "anomaly without a check": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "dispatch mode": _Passes,
    "function mode": _Watches,
}


@dataclass(frozen=True)
class SavedTensorHooks(Situation):
    """Saved-tensor hooks around the forward."""

    refusable = ("closures",)

    def around(self, verb: str) -> AbstractContextManager[object]:
        if verb != "F":
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda packed: packed[0])

    def around_eager(self, verb: str) -> AbstractContextManager[object]:
        """None: hooks that change nothing still switch off autograd's look for writes in place.

        torch's own derivative of softmax's dual writes over what it has saved, and is wrong under them.
        """
        return nullcontext()


@dataclass(frozen=True)
class Write(Situation):
    """A write in place, after a pass, into what a later one may read."""

    what: str
    after_verb: str
    place: int = 0
    refusable = ("closures", "aten")

    def after(self, verb: str, world: World) -> None:
        leaves = [t for t in getattr(world, self.what) if not trees.overlaps_itself(t)]
        if verb == self.after_verb and leaves:
            with torch.no_grad():
                leaves[self.place % len(leaves)].fill_(1)


WRITTEN = {
    "F": ("args", "params", "buffers", "output"),
    "I": ("args", "params", "cotangents", "input_grads"),
}
"""What is written after which pass."""


@dataclass(frozen=True)
class Copied(Situation):
    """The stage function is a copy."""

    how: str
    refusable = ("closures", "aten")
    HOWS: ClassVar = ("copy", "deepcopy", "pickle")

    def stage(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        if self.how == "pickle":
            module: Any = apply.module  # type: ignore[attr-defined]
            try:
                pickle.dumps(module)
            except Exception:  # of which torch or the user has no pickles
                return apply
            copied: Callable[..., Any] = pickle.loads(pickle.dumps(apply))
            return copied
        return copy.copy(apply) if self.how == "copy" else copy.deepcopy(apply)
