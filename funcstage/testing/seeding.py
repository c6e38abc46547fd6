"""Runs with a random state of their own."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from funcstage.state.ambient import generators_kept, numpy_random, of_process, of_torch


@contextmanager
def seeded(seed: int, accelerators: Iterable[torch.device] = ()) -> Iterator[None]:
    """Fix the random state of the CPU and of accelerators inside, and give it back afterwards.

    That of Python's own generator and of NumPy's, by which forwards may choose layers, is fixed as well.
    """
    modules = [(device, torch.get_device_module(device)) for device in accelerators]
    with generators_kept([*of_torch(device for device, _ in modules), *of_process()]):
        random.seed(seed)
        if numpy := numpy_random():
            numpy.seed(seed % 2**32)
        # Cheaper than torch.manual_seed, which formats the whole stack for devices that may not exist.
        torch.default_generator.manual_seed(seed)
        for device, module in modules:
            with module.device(device):
                module.manual_seed(seed)
        yield
