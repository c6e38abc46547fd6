"""Runs with a random state of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, accelerators: Iterable[torch.device] = ()) -> Iterator[None]:
    """Fix the random state of the CPU and of accelerators inside, and give it back afterwards."""
    modules = [(device, torch.get_device_module(device)) for device in accelerators]
    cpu_state = torch.get_rng_state()
    states = [module.get_rng_state(device) for device, module in modules]
    try:
        # Cheaper than torch.manual_seed, which formats the whole stack for devices that may not exist.
        torch.default_generator.manual_seed(seed)
        for device, module in modules:
            with module.device(device):
                module.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        for (device, module), state in zip(modules, states, strict=True):
            module.set_rng_state(state, device)
