"""Ambient state: what a stage's result depends on besides its arguments and its module.

A trace holds only under the settings that it was made under, so they are a part of its key. A checkpointed
region that runs again finds autocast, the default device and random generators as in its first run. A run
that is given up puts generators back.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from funcstage import forks
from funcstage._torch.settings import default_device, global_flags, is_any_autocast_enabled

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "hpu", "mps")


class AmbientState(NamedTuple):
    """The settings around a call; compared by equality. The fields' names serve as reasons for a retrace.

    Attributes:
        autocast: the device types for which it is on.
        casts: whether it keeps what it casts, and the dtype that it casts to on each device type.
        default_device: where one was set.
        grad_mode: whether gradients are on.
        flags: torch's other settings.
    """

    autocast: tuple[str, ...]
    casts: tuple[Any, ...]
    default_device: torch.device | None
    grad_mode: bool
    flags: tuple[Any, ...]

    @classmethod
    def now(cls, differentiated: bool = False) -> AmbientState:
        """Read it; what is `differentiated` runs with gradients on, whatever the caller's mode."""
        kinds = AUTOCAST_DEVICES if is_any_autocast_enabled() else ()
        return cls(
            tuple(filter(torch.is_autocast_enabled, kinds)),
            (torch.is_autocast_cache_enabled(), *map(torch.get_autocast_dtype, AUTOCAST_DEVICES)),
            default_device(),
            differentiated or torch.is_grad_enabled(),
            global_flags(),
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Let a second run find autocast and the default device as they were."""
        cached, *dtypes = self.casts
        device = self.default_device or torch.device("cpu")
        with ExitStack() as stack:
            for kind, dtype in zip(AUTOCAST_DEVICES, dtypes, strict=True):
                was_on = kind in self.autocast
                now = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
                if (was_on, dtype) != now or cached != torch.is_autocast_cache_enabled():
                    stack.enter_context(torch.autocast(kind, dtype, was_on, cached))
            if device != torch.get_default_device():
                stack.enter_context(device)
            yield


@contextmanager
def autocast_off() -> Iterator[None]:
    """Turn autocast off where it is on."""
    with ExitStack() as stack:
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def own_autocast_cache() -> Iterator[None]:
    """Keep what a trace casts out of the caller's autocast cache, and what it cast out of the trace."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class Generator(NamedTuple):
    """A generator of random numbers that others share, by what reads its state and what sets it."""

    name: str
    state: Callable[[], Any]
    set_state: Callable[[Any], object]


_CPU = Generator("torch, on the CPU", torch.default_generator.get_state, torch.default_generator.set_state)


def of_torch(devices: Iterable[torch.device] = ()) -> Iterator[Generator]:
    """Torch's own generators: the CPU's, and those of some devices."""
    yield _CPU
    for device in {*devices}:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            set_state = partial(module.set_rng_state, device=device)
            yield Generator(str(device), partial(module.get_rng_state, device), set_state)


def numpy_random() -> Any:
    """The module of NumPy's generators; None before it is loaded, also while another thread loads it."""
    module = sys.modules.get("numpy.random")
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def of_process() -> Iterator[Generator]:
    """Python's generator, and NumPy's where that is loaded."""
    yield Generator("random", random.getstate, random.setstate)
    numpy = numpy_random()
    if numpy is not None:
        yield Generator("numpy.random", numpy.get_state, numpy.set_state)


def among(objects: Iterable[Any]) -> Iterator[Generator]:
    """The generators among objects, and those whose methods are among them; torch's default one left out."""
    numpy = numpy_random()
    for each in objects:
        owner = getattr(each, "__self__", each) if callable(each) else each
        if isinstance(owner, random.Random) and not isinstance(owner, random.SystemRandom):
            yield Generator("random.Random", owner.getstate, owner.setstate)
        elif isinstance(owner, torch.Generator) and owner is not torch.default_generator:
            yield Generator("torch.Generator", owner.get_state, owner.set_state)
        elif numpy is not None and isinstance(owner, numpy.RandomState):
            yield Generator("numpy.random.RandomState", owner.get_state, owner.set_state)
        elif numpy is not None and isinstance(owner, (numpy.Generator, numpy.BitGenerator)):
            bits = getattr(owner, "bit_generator", owner)
            yield Generator("numpy.random", partial(getattr, bits, "state"), partial(setattr, bits, "state"))


def _comparable(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _comparable(part) for key, part in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_comparable, state))
    return state.tolist() if hasattr(state, "tolist") else state


_ONE_THREAD = forks.lock()
"""Torch locks a generator while it wraps its state. If Python then collects garbage, another thread may run,
and wait for that lock with Python's own in its hands, for ever; for this lock it waits without."""


class RandomState:
    """Generators, with the states that they had."""

    def __init__(self, generators: Iterable[Generator]) -> None:
        self._noted: list[tuple[Generator, Any]] = []
        for generator in generators:
            self.note(generator)

    def note(self, generator: Generator) -> None:
        """Note one more."""
        with _ONE_THREAD:
            self._noted.append((generator, generator.state()))

    def restore(self) -> None:
        """Put the states back, the ones noted first last."""
        with _ONE_THREAD:
            for generator, state in reversed(self._noted):
                generator.set_state(state)

    def moved(self) -> list[str]:
        """The names of those that have another state now."""
        with _ONE_THREAD:
            now = [generator.state() for generator, _ in self._noted]
        return [
            generator.name
            for (generator, before), after in zip(self._noted, now, strict=True)
            if _comparable(before) != _comparable(after)
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again, and go on afterwards as if nothing had been drawn."""
        with generators_kept(generator for generator, _ in self._noted):
            self.restore()
            yield


@contextmanager
def generators_kept(generators: Iterable[Generator]) -> Iterator[None]:
    """Leave generators as they were."""
    before = RandomState(generators)
    try:
        yield
    finally:
        before.restore()
