"""What a layer of the vocabulary is, and where it may stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]


Options: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer stands: what arrives there.

    Attributes:
        shape: of the activation; features last for two or three axes, channels second for convolutions.
        dtype: of the activation and of the parameters.
        device: of both.
        training: the mode.
        autocast: whether the layer runs under autocast.
        fresh: whether the activation may be overwritten: nobody else reads or has saved it.
        argument: whether the activation is an argument of the stage, which may be overwritten whole (the
            stage's name for it then stands for a copy), but not through a view.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = True
    autocast: bool = False
    fresh: bool = False
    argument: bool = False

    def at(self, **changes: Any) -> Place:
        """The same place with some of its attributes changed."""
        return replace(self, **changes)

    @property
    def made(self) -> dict[str, Any]:
        """What factories take."""
        return {"dtype": self.dtype, "device": self.device}

    @property
    def low(self) -> bool:
        """Whether the dtype has 16 bits."""
        return self.dtype in (torch.bfloat16, torch.float16)

    def size(self, *axes: int) -> int:
        """The product of some axes."""
        size = 1
        for axis in axes:
            size *= self.shape[axis]
        return size


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of the vocabulary.

    Attributes:
        build: makes the module for a place.
        fits: tells whether eager runs it there.
        options: the choices for each option, the simplest first.
        shape: the shape after it; the same if left out.
        fresh: whether its result is memory that nobody has saved.
        complex: whether it runs on complex numbers.
        autocast: whether it runs under autocast.
        tags: the families of stages in which it is frequent.
    """

    build: Callable[..., nn.Module]
    fits: Callable[[Place], bool] = lambda place: len(place.shape) >= 1
    options: Options = field(default_factory=dict)
    shape: Callable[..., Shape] = lambda place, **options: place.shape
    fresh: bool = False
    complex: bool = False
    autocast: bool = True
    tags: str = ""

    def fits_at(self, place: Place) -> bool:
        """Tell whether the layer can stand there."""
        if place.dtype.is_complex and not self.complex:
            return False
        return (self.autocast or not place.autocast) and self.fits(place)

    def after(self, place: Place, options: Options) -> Place:
        """The place behind the layer."""
        return place.at(shape=tuple(self.shape(place, **options)), fresh=self.fresh, argument=False)


class Op(nn.Module):
    """A function of the activation and of parameters and buffers of its own."""

    def __init__(
        self,
        function: Callable[..., Any],
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.function = function
        self.names = [*(params or ()), *(buffers or ())]
        for name, tensor in (params or {}).items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, name) for name in self.names))


def weight(place: Place, *shape: int) -> dict[str, Tensor]:
    return {"weight": torch.ones(shape, **place.made)}


def features(place: Place) -> bool:
    return len(place.shape) >= 2 and place.shape[-1] > 0


def sequence(place: Place) -> bool:
    return len(place.shape) == 3 and place.size(0, 1, 2) > 0


def channels(*ndims: int) -> Callable[[Place], bool]:
    def fits(place: Place) -> bool:
        return len(place.shape) in ndims and all(place.shape[1:])

    return fits


def last(place: Place, out: int = 0, **_: Any) -> Shape:
    return (*place.shape[:-1], out or place.shape[-1])


def second(place: Place, out: int = 0, **_: Any) -> Shape:
    return (place.shape[0], out or place.shape[1], *place.shape[2:])


OUT = (0, 1, 2, 4)


YES = (True, False)


NO = (False, True)
