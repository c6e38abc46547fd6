"""Situations that fail: errors in the midst of F, I and W, and a second attempt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from interrupting import FAIL, Brittle, Interrupts
from situation import Around, Situation, map_differentiable
from torch import nn


class Fault(BaseException):
    """Thrown in the midst of a pass, as KeyboardInterrupt is."""


FAULTS: dict[str, type[BaseException]] = {
    "an interrupt": Fault,
    "no memory": torch.OutOfMemoryError,
    "no memory on the host": MemoryError,
    "an arithmetic error": ArithmeticError,
}
"""What may be thrown in the midst of a pass."""


@dataclass(frozen=True)
class Interrupt(Situation):
    """An error in an operation of a pass, which is then tried again."""

    verb: str
    at: int
    what: str = "an interrupt"
    refusable = ("closures", "aten")

    def around(self, verb: str) -> AbstractContextManager[object]:
        return Interrupts(self.at, FAULTS[self.what]) if verb == self.verb else nullcontext()

    def around_eager(self, verb: str) -> AbstractContextManager[object]:
        return nullcontext()


class _Breaking(Around):
    """A backward that may raise: of the output, of the weights, or of the input."""

    def __init__(self, inner: nn.Module, place: str) -> None:
        super().__init__(inner)
        self.place = place
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.place == "input":
            args = map_differentiable(Brittle.apply, args)
        output = super().forward(*args, **kwargs)
        gain = Brittle.apply(self.gain) if self.place == "weight" else self.gain
        if self.place == "output":
            output = map_differentiable(Brittle.apply, output)
        return map_differentiable(lambda t: t * gain, output)


@dataclass(frozen=True)
class Broken(Situation):
    """A function of the user's whose backward raises once in a pass, which is then tried again."""

    verb: str
    place: str
    what: str = "an interrupt"
    refusable = ("closures", "aten")

    def build(self, module: nn.Module) -> nn.Module:
        return _Breaking(module, self.place)

    def around(self, verb: str) -> AbstractContextManager[object]:
        return _armed(FAULTS[self.what]) if verb == self.verb else nullcontext()

    def around_eager(self, verb: str) -> AbstractContextManager[object]:
        return nullcontext()


@contextmanager
def _armed(error: type[BaseException]) -> Iterator[None]:
    FAIL.append(error("in a backward"))
    try:
        yield
    finally:
        FAIL.clear()
