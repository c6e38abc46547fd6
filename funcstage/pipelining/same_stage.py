"""What the ranks of a mesh must agree about, which run a stage together: compared before the first message.

Each rank writes down what its stage is (which one, its parameters and how they lie on the mesh, how it is
compiled, the steps of the schedule), and compares that with what the others of the mesh have written. Where
they disagree they would send each other other messages, and wait for ever or compute nonsense.
"""

from __future__ import annotations

import pickle
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from funcstage import trees
from funcstage._torch.schedules import num_microbatches
from funcstage.dtensors import groups_of, placement
from funcstage.errors import StructureError
from funcstage.pipelining import failures

_SECONDS = 30.0
"""How long to wait for the others of a mesh, who may have a stage of torch's there, which writes nothing."""

_COUNTS: dict[str, int] = {}
_COMPARED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
"""The stages of each schedule that were compared."""


def check_same(
    schedule: Any,
    stage_index: int,
    parameters: Mapping[str, Any],
    how: Mapping[str, str],
) -> None:
    """Compare a stage with those of the other ranks on the meshes that its parameters lie on.

    Args:
        schedule: that begins its first step.
        stage_index: the number of the stage.
        parameters: of the stage; DTensors among them are compared.
        how: what else must be the same, by name.

    Raises:
        StructureError: if they are not the same; it says which ranks disagree, and about what.
    """
    seen = _COMPARED.setdefault(schedule, set())
    if stage_index in seen:
        return
    seen.add(stage_index)
    groups = sorted(groups_of(parameters.values()), key=lambda group: str(group.group_name))
    facts = {
        "the number of the stage": str(stage_index),
        **how,
        **{f"the parameter {name!r}": _look(p) for name, p in parameters.items() if placement(p)},
    }
    places = {}
    for group in groups:
        name = failures.key(group, "")
        places[group] = f"same stage {_COUNTS.get(name, 0)}"
        _COUNTS[name] = _COUNTS.get(name, 0) + 1
        failures.store().set(_key(group, places[group], dist.get_rank(group)), pickle.dumps(facts))
    until = time.monotonic() + _SECONDS
    for group, place in places.items():
        for rank in failures.others(group):
            _compare(group, place, rank, facts, until)


def _compare(group: Any, place: str, other: int, mine: dict[str, str], until: float) -> None:
    while not (text := failures.written(_key(group, place, other))):
        failure = failures.heard([group])
        if failure is not None:
            raise failures.heard_by_all(failure)
        if time.monotonic() > until:
            return
        time.sleep(0.005)
    theirs = pickle.loads(text)
    what = next((fact for fact in (*mine, *theirs) if mine.get(fact) != theirs.get(fact)), None)
    if what is None:
        return
    said = {dist.get_rank(group): mine.get(what, "none"), other: theirs.get(what, "none")}
    first, second = sorted(said)
    raise StructureError(
        f"Ranks {dist.get_global_rank(group, first)} and {dist.get_global_rank(group, second)} run stage "
        f"{mine['the number of the stage']} together, over a mesh, and disagree about {what}: "
        f"{said[first]} and {said[second]}. Build, shard and compile it alike on all ranks of its mesh."
    )


def _key(group: Any, place: str, rank: int) -> str:
    return failures.key(group, f"{place} of {rank}")


def how_it_runs(schedule: Any, compile_options: Mapping[str, Any] | None) -> dict[str, str]:
    """What the order of a stage's messages depends on, in words; functions by their names."""
    options = {name: getattr(value, "__qualname__", value) for name, value in (compile_options or {}).items()}
    return {
        "the schedule": type(schedule).__name__,
        "the number of microbatches": str(num_microbatches(schedule)),
        "how it is compiled": "not" if compile_options is None else str(dict(sorted(options.items()))),
    }


def _look(parameter: Any) -> str:
    mesh, placements = placement(parameter)
    return f"{trees.look(parameter)} placed {placements} over {tuple(mesh.shape)} ranks"
