"""What is seen of a module by its fingerprint, and what is not as a trace serves in spite of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from funcstage.state.module import Fingerprint


class Norm(nn.Module):
    """A part with what a module may have: plain attributes, others, buffers, one of them for later."""

    late: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.name, self.sizes = 2.0, "norm", (1, 2)
        self.listed, self.table = [1, 2], {"a": [3]}
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("late", None)


class Other(Norm):
    """The same under another name."""


class Alone(nn.Module):
    """A module that has one part, and no attribute of its own but its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.only = Norm()


def module_of(holds: bool = False) -> Any:
    module: Any = nn.Sequential(Alone(), nn.Linear(2, 2), Norm())
    if holds:
        module[2].held = [module[1]]
    return module


def another_namespace(module: Any) -> None:
    module.__dict__ = {**vars(module), "scale": 3.0}


def another_at_its_place(module: Any) -> None:
    del module.scale
    module.factor = 2.0


def ignore(*args: Any) -> None: ...


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda m: setattr(m, "scale", 3.0),
    "a number of another type": lambda m: setattr(m, "scale", 2),
    "a text": lambda m: setattr(m, "name", "other"),
    "a tuple": lambda m: setattr(m, "sizes", (1, 3)),
    "a list's element": lambda m: m.listed.append(3),
    "another list": lambda m: setattr(m, "listed", [2, 1]),
    "a list in a dict": lambda m: m.table["a"].append(4),
    "a list for a number": lambda m: setattr(m, "scale", [2.0]),
    "a number for a list": lambda m: setattr(m, "listed", 1),
    "a new number": lambda m: setattr(m, "factor", 2.0),
    "a new list": lambda m: setattr(m, "factors", []),
    "no number": lambda m: delattr(m, "scale"),
    "no list": lambda m: delattr(m, "listed"),
    "one number in place of another": another_at_its_place,
    "another namespace": another_namespace,
    "the mode": lambda m: m.eval(),
    "the class": lambda m: setattr(m, "__class__", Other),
    "a new part": lambda m: m.add_module("part", nn.Tanh()),
    "a part that is none": lambda m: m.add_module("part", None),
    "a new buffer": lambda m: m.register_buffer("variance", torch.ones(2)),
    "no buffer": lambda m: delattr(m, "mean"),
    "a buffer that it had not": lambda m: setattr(m, "late", torch.ones(2)),
    "a new parameter": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(2))),
    "no parameter": lambda m: setattr(m, "weight", None),
    "a hook of its forward": lambda m: m.register_forward_hook(ignore),
    "a hook before its forward": lambda m: m.register_forward_pre_hook(ignore),
    "a hook of its backward": lambda m: m.register_full_backward_hook(ignore),
    "a hook before its backward": lambda m: m.register_full_backward_pre_hook(ignore),
}
NO_CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": ignore,
    "a list that is equal": lambda m: setattr(m, "listed", [1, 2]),
    "a parameter's values": lambda m: m.weight.data.add_(1),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(2))),
    "a gradient": lambda m: setattr(m.weight, "grad", torch.ones(2)),
    "a buffer's values": lambda m: m.mean.add_(1),
    "another buffer": lambda m: setattr(m, "mean", torch.ones(2)),
}
IN_PLACES: dict[str, Callable[[Any], Any]] = {"last": lambda m: m[2], "within": lambda m: m[0].only}


@pytest.mark.parametrize("place", IN_PLACES)
@pytest.mark.parametrize("change", [*CHANGES, *NO_CHANGES])
def test_what_a_module_has_beside_tensors_is_seen(change: str, place: str) -> None:
    module = module_of()
    fingerprint = Fingerprint([module], hooks=True)
    read, glance = fingerprint.read(), fingerprint.glance()
    assert glance.agrees(fingerprint.glance())
    {**CHANGES, **NO_CHANGES}[change](IN_PLACES[place](module))
    alike = change in NO_CHANGES
    after = fingerprint.glance()
    assert glance.agrees(after) == after.agrees(glance) == alike
    assert (fingerprint.read() == read) == alike
    assert after.agrees(fingerprint.glance()) or not alike


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_looked_at_from_then_on(change: str) -> None:
    module = module_of()
    fingerprint = Fingerprint([module], hooks=True)
    CHANGES[change](module[2])
    read, glance = fingerprint.read(), fingerprint.glance()
    assert glance.agrees(fingerprint.glance())
    module[0].only.listed.append(1)
    assert not glance.agrees(fingerprint.glance())
    assert fingerprint.read() != read


def all_of(module: Any) -> Any:
    module._modules.update(module_of()._modules)
    return module[0].only


REPLACED: dict[str, Callable[[Any], Any]] = {
    "the only part of a part": lambda m: m[0].register_module("only", Norm()) or m[0].only,
    "one of three": lambda m: m.__setitem__(1, nn.Linear(2, 2)) or m[1],
    "all": all_of,
}


@pytest.mark.parametrize("which", REPLACED)
def test_a_part_in_place_of_one_like_it_is_seen(which: str) -> None:
    module = module_of()
    fingerprint = Fingerprint([module], hooks=True)
    read, glance = fingerprint.read(), fingerprint.glance()
    new = REPLACED[which](module)
    assert not glance.agrees(fingerprint.glance())
    changed = fingerprint.read()
    assert changed != read
    new.weight = nn.Parameter(new.weight + 1)
    assert fingerprint.read() == changed
    new.training = False
    assert fingerprint.read() not in (read, changed)


def test_a_buffer_that_it_did_not_have_at_first_is_compared_like_an_attribute() -> None:
    module = module_of()
    fingerprint = Fingerprint([module], hooks=True)
    module[2].late = torch.ones(2)
    read, glance = fingerprint.read(), fingerprint.glance()
    module[2].late = torch.ones(3)
    assert not glance.agrees(fingerprint.glance())
    assert fingerprint.read() != read


def test_a_parameter_of_another_class_is_seen_at_a_glance() -> None:  # else it is among the leaves of a call
    module = module_of()
    fingerprint = Fingerprint([module], hooks=True)
    glance = fingerprint.glance()
    module[0].only._parameters["weight"] = nn.Buffer(torch.ones(2))
    assert not glance.agrees(fingerprint.glance())


def test_tensors_of_a_part_that_a_list_holds_do_not_count() -> None:
    module = module_of(holds=True)
    fingerprint = Fingerprint([module], hooks=True)
    read, glance = fingerprint.read(), fingerprint.glance()
    module[1].weight = nn.Parameter(torch.ones(2, 2))
    assert glance.agrees(fingerprint.glance())
    assert fingerprint.read() == read


@pytest.mark.parametrize("place", IN_PLACES)
@pytest.mark.parametrize("matters", [False, True])
def test_hooks_of_parameters_count_where_they_matter(matters: bool, place: str) -> None:
    module = module_of()
    fingerprint = Fingerprint([module], hooks=matters)
    read, glance = fingerprint.read(), fingerprint.glance()
    handle = IN_PLACES[place](module).weight.register_hook(lambda grad: grad)
    assert glance.agrees(fingerprint.glance()) != matters
    assert (fingerprint.read() == read) != matters
    handle.remove()
    assert glance.agrees(fingerprint.glance())
    assert fingerprint.read() == read


def test_all_of_several_modules_is_seen() -> None:
    modules = [module_of(), Norm()]
    fingerprint = Fingerprint(modules, hooks=True)
    for each in (modules[0][2], modules[1]):
        glance = fingerprint.glance()
        each.scale = 3.0
        assert not glance.agrees(fingerprint.glance())
        each.late = torch.ones(2)
        glance = fingerprint.glance()
        each.late = torch.ones(3)
        assert glance.agrees(fingerprint.glance()) is False
