"""What a checkpointed region finds around it when it runs again: what its first run found."""

from __future__ import annotations

import random
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.state.ambient import (
    AmbientState,
    Generator,
    RandomState,
    among,
    autocast_off,
    generators_kept,
    of_process,
    of_torch,
    own_autocast_cache,
)


@contextmanager
def casting_to(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", dtype)
    try:
        yield
    finally:
        torch.set_autocast_dtype("cpu", before)


class Region(nn.Module):
    """A region that reads the settings, each in an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def inside(self, x: Tensor) -> Tensor:
        outside = self.first(x * torch.ones(8).to(x))
        with torch.autocast("cpu"):
            cast = self.last(outside.float())
        return cast.float() + outside.float()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False).sin()


SETTINGS: dict[str, tuple[Any, Any]] = {
    "autocast, then none": (lambda: torch.autocast("cpu", torch.bfloat16), nullcontext),
    "none, then autocast": (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)),
    "two dtypes": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
    ),
    "a dtype for autocasts to come": (lambda: casting_to(torch.float16), nullcontext),
    "an autocast that keeps nothing": (
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        nullcontext,
    ),
    "another default device": (nullcontext, lambda: torch.device("meta")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_region_is_run_again_under_the_settings_of_its_first_run(name: str) -> None:
    around_f, around_i = SETTINGS[name]
    module, x = Region(), torch.randn(4, 8)
    apply, params, buffers = fs.functionalize(module)
    with around_f():
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        theirs = module(leaf := x.clone().requires_grad_())
    assert torch.equal(output, theirs)
    cotangent = torch.randn_like(theirs)
    with around_i():
        (dx,), weight_pullback = pullback(cotangent)
        grads = weight_pullback()
        theirs.backward(cotangent)
    assert torch.equal(dx, leaf.grad)
    for key, weight in module.named_parameters():
        assert torch.equal(grads[key], weight.grad), key


def test_what_is_restored_is_left_again() -> None:
    with torch.autocast("cpu", torch.float16), torch.device("meta"):
        noted = AmbientState.now()
    before = AmbientState.now()
    assert noted != before
    with noted.restored():
        now = AmbientState.now()
        assert (now.autocast, now.casts, now.default_device) == (
            ("cpu",),
            noted.casts,
            torch.device("meta"),
        )
    assert AmbientState.now() == before


@pytest.mark.parametrize("draw", [lambda: torch.rand(3).tolist(), lambda: [random.random()]])
def test_generators_draw_the_same_again_and_go_on_as_if_nothing_was_drawn(draw: Any) -> None:
    noted = RandomState((*of_torch(), *of_process()))
    first, second = draw(), draw()
    noted.restore()
    assert draw() == first
    with noted.again():
        assert draw() == first
    with generators_kept((*of_torch(), *of_process())):
        assert draw() == second
    assert draw() == second


def test_generators_that_have_moved_are_named() -> None:
    noted = RandomState(of_process())
    assert noted.moved() == []
    random.random()
    assert noted.moved() == ["random"]


def changed_field(around: Any) -> list[str]:
    """Which settings a context changes."""
    before = AmbientState.now()
    with around:
        now = AmbientState.now()
    return [name for name, one, other in zip(before._fields, before, now, strict=True) if one != other]


@pytest.mark.parametrize(
    ("around", "changed"),
    [
        (nullcontext, []),
        (lambda: torch.autocast("cpu", torch.get_autocast_dtype("cpu")), ["autocast"]),
        (lambda: torch.autocast("cpu", torch.float16), ["autocast", "casts"]),
        (lambda: torch.autocast("cpu", enabled=False, cache_enabled=False), ["casts"]),
        (lambda: casting_to(torch.float16), ["casts"]),
        (lambda: torch.device("meta"), ["default_device"]),
        (torch.no_grad, ["grad_mode"]),
    ],
)
def test_settings_are_told_apart_by_what_they_set(around: Any, changed: list[str]) -> None:
    assert changed_field(around()) == changed


def test_what_is_differentiated_runs_with_gradients_on_whatever_the_callers_mode() -> None:
    for around in (torch.no_grad, torch.enable_grad):
        with around():
            assert AmbientState.now(differentiated=True).grad_mode
            assert AmbientState.now().grad_mode is torch.is_grad_enabled()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_restored_inside_and_left_as_they_were(name: str) -> None:
    noted_in, restored_in = SETTINGS[name]
    with noted_in():
        noted = AmbientState.now()
    with restored_in():
        before = AmbientState.now()
        with noted.restored():
            now = AmbientState.now()
        assert (now.autocast, now.casts) == (noted.autocast, noted.casts)
        assert (now.default_device or torch.device("cpu")) == (noted.default_device or torch.device("cpu"))
        assert AmbientState.now() == before


def test_autocast_is_off_inside_and_on_again_behind() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with autocast_off():
            assert not torch.is_autocast_enabled("cpu")
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype is torch.float32
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype is torch.bfloat16


def test_what_a_trace_has_cast_is_not_kept_for_its_caller_nor_the_other_way_round() -> None:
    weight = torch.ones(2, 2, requires_grad=True)

    def cast() -> Tensor:
        """The weight as autocast has it, which it keeps."""
        (node,) = (each for each, _ in torch.mm(torch.ones(2, 2), weight).grad_fn.next_functions if each)
        return node

    with torch.autocast("cpu", torch.bfloat16):
        first = cast()
        assert cast() is first
        with own_autocast_cache():
            second = cast()
            assert second is not first
            assert cast() is second
        assert cast() not in (first, second)


class Draws:
    """Draws one number of a generator, in a way of its own."""

    def __init__(self, generator: Any, draw: Any) -> None:
        self.generator, self.draw = generator, draw


DRAWS = [
    Draws(own := random.Random(1), own.random),
    Draws(torchs := torch.Generator(), lambda: torch.rand(2, generator=torchs).tolist()),
    Draws(old := numpy.random.RandomState(1), old.rand),
    Draws(new := numpy.random.default_rng(1), new.random),
    Draws(new.bit_generator, new.random),
]


@pytest.mark.parametrize("draws", DRAWS, ids=lambda draws: type(draws.generator).__name__)
def test_generators_are_found_among_objects_and_behind_their_methods(draws: Draws) -> None:
    method = getattr(draws.generator, "random", None) or getattr(draws.generator, "random_raw", None)
    found = [*among(["text", None, draws.generator, *([method] if method else [])])]
    assert len(found) == 1 + (hasattr(method, "__self__"))
    for generator in found:
        noted = RandomState([generator])
        first = draws.draw()
        noted.restore()
        with noted.again():
            assert draws.draw() == first
        assert draws.draw() == first


def test_generators_that_nobody_can_seed_and_torchs_own_are_not_among_them() -> None:
    assert [*among([random.SystemRandom(), torch.default_generator, torch.default_generator.seed, len])] == []


def test_torchs_own_generators_are_the_cpus_and_one_for_each_device() -> None:
    devices = [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]
    (cpu,) = of_torch(devices)
    assert cpu.name.startswith("torch")
    assert [generator.name for generator in of_process()] == ["random", "numpy.random"]


def test_of_a_generator_noted_twice_the_first_state_is_restored() -> None:
    (found,) = among([generator := torch.Generator()])
    noted = RandomState([found])
    first = torch.rand(2, generator=generator)
    noted.note(found)
    noted.restore()
    assert torch.equal(torch.rand(2, generator=generator), first)


def test_numpys_generator_is_named_where_it_has_moved() -> None:
    noted = RandomState(of_process())
    numpy.random.rand()
    assert noted.moved() == ["numpy.random"]


def test_nothing_is_entered_where_the_settings_are_those_already() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as torch does of an autocast for a device that is not there
        with AmbientState.now().restored(), torch.autocast("cpu"):
            with AmbientState.now().restored():
                assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_enabled("cpu")


def test_whether_casts_are_kept_is_restored_where_autocast_is_off() -> None:
    with torch.autocast("cpu", enabled=False, cache_enabled=False):
        noted = AmbientState.now()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with noted.restored():
            assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def test_a_devices_generator_is_read_and_set_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"cuda:0": 1, "cuda:1": 2}
    module = SimpleNamespace(
        get_rng_state=lambda device: states[str(device)],
        set_rng_state=lambda state, device: states.update({str(device): state}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    devices = [torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:0")]
    _, *found = of_torch(devices)
    assert sorted(generator.name for generator in found) == ["cuda:0", "cuda:1"]
    noted = RandomState(found)
    states.update({"cuda:0": 3, "cuda:1": 4})
    noted.restore()
    assert states == {"cuda:0": 1, "cuda:1": 2}


def test_where_numpy_is_not_loaded_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.random")
    assert [*among([object(), numpy.random.RandomState(1)])] == []
    assert [generator.name for generator in of_process()] == ["random"]


def test_states_of_generators_are_read_and_set_by_one_thread_at_a_time() -> None:
    busy, overlaps = threading.Event(), []

    def touched(*state: Any) -> int:
        overlaps.append(busy.is_set())
        busy.set()
        time.sleep(0.01)
        busy.clear()
        return 1

    generator = Generator("touched", touched, touched)

    def work(_: int) -> None:
        for _ in range(3):
            state = RandomState([generator])
            assert state.moved() == []
            state.restore()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(overlaps) == 36
    assert not any(overlaps)


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_numpy_that_another_thread_has_begun_to_load_is_no_error(engine: str, monkeypatch: Any) -> None:
    begun = ModuleType("numpy.random")
    begun.__spec__ = ModuleSpec("numpy.random", None)
    begun.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "numpy.random", begun)
    assert [generator.name for generator in of_process()] == ["random"]
    module, x = nn.Sequential(nn.Linear(3, 3), Checkpointed(nn.Linear(3, 3))), torch.randn(2, 3)
    module.draw = random.Random(0).random
    apply, params, buffers = fs.functionalize(module)
    stage = apply if engine == "closures" else fs.compile(apply, backend=engine)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    torch.testing.assert_close(output, module(x))
    assert all(grad is not None for grad in pullback(torch.ones_like(output))[1]().values())


class Checkpointed(nn.Module):
    """A checkpoint around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)
