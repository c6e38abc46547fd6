"""Situations: what a module, its parameters or its callers may do around a stage, one concept each.

A situation changes how a stage is built and driven, and does the same to plain eager autograd beside it;
`driven` runs both and compares. Like a generated `Stage`, a situation is frozen and prints
as the expression that makes it.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from of_arguments import CARRIERS, FILLED, Carried, Filled
from of_callers import MODES, WRITTEN, Copied, Mode, SavedTensorHooks, Write
from of_faults import FAULTS, Broken, Interrupt
from of_modules import (
    HOOKS,
    PACKS,
    READS,
    WRAPPERS,
    Changed,
    Draws,
    Kept,
    ModuleHook,
    ParameterHook,
    Raised,
    Remade,
    Returned,
    Wrapped,
)
from of_questions import QUESTIONS, THREADS, Asked, NodeHook, Threads
from of_surroundings import CACHES, CAPTURED, SHARED, Cached, Captured, Shared
from of_transforms import KEPT, TRANSFORMS, Transformed
from situation import VERBS, Situation

SITUATIONS: dict[str, tuple[Situation, ...]] = {
    "mode": tuple(Mode(name, verbs) for name in MODES for verbs in ("FIW", "F", "I", "W", "IW")),
    "saved-tensor hooks": (SavedTensorHooks(),),
    "interrupt": tuple(
        Interrupt(verb, at, what) for verb in VERBS for at in (0, 1, 2, 3, 5, 8, 13, 21) for what in FAULTS
    ),
    "failing backward": tuple(
        Broken(verb, place, what)
        for verb in "IW"
        for place in ("input", "weight", "output")
        for what in FAULTS
    ),
    "write": tuple(
        Write(what, verb, place) for verb in WRITTEN for what in WRITTEN[verb] for place in range(4)
    ),
    "parameter hook": tuple(ParameterHook(late, place) for late in (False, True) for place in range(3)),
    "module hook": tuple(ModuleHook(kind, place) for kind in HOOKS for place in range(5)),
    "wrapper": tuple(map(Wrapped, WRAPPERS)),
    "kept tensor": tuple(map(Kept, Kept.HOWS)),
    "remade parameter": tuple(map(Remade, Remade.HOWS)),
    "change": tuple(map(Changed, READS)),
    "shared state": tuple(map(Shared, SHARED)),
    "cached table": tuple(map(Cached, CACHES)),
    "captured tensor": tuple(
        Captured(where, verb, saved)
        for where in CAPTURED
        for verb in ("", "F", "I")
        for saved in (True, False)
    ),
    "argument": tuple(map(Carried, CARRIERS)),
    "filled argument": tuple(Filled(kind, detached) for kind in FILLED for detached in (False, True)),
    "transform": tuple(map(Transformed, TRANSFORMS)),
    "transform and draw": tuple(Transformed("gradient penalty within", kept) for kept in KEPT),
    "type": tuple(map(Returned, PACKS)),
    "draw": (Draws(),),
    "error": (Raised(),),
    "question": tuple(map(Asked, QUESTIONS)),
    "node hook": tuple(map(NodeHook, (False, True))),
    "threads": tuple(map(Threads, THREADS)),
    "copy": tuple(map(Copied, Copied.HOWS)),
}
"""The situations that there are, by kind."""


@st.composite
def situations(draw: st.DrawFn, kind: str, most: int = 3) -> tuple[Situation, ...]:
    """Draw situations for a stage to be in, each of another kind.

    Args:
        draw: passed by Hypothesis.
        kind: one that there is to be.
        most: how many there are at most.
    """
    others = draw(st.lists(st.sampled_from(tuple(SITUATIONS)), max_size=most - 1, unique=True))
    kinds = dict.fromkeys([kind, *others])
    if "copy" in kinds:  # a copy has attributes of its own
        kinds = {name: None for name in kinds if name in ("copy", "mode", "write", "argument", "transform")}
    # A type of the user's is what the outermost wrapper returns; within a transform, what a module
    # keeps or fills is dead in eager too.
    ordered = sorted(kinds, key=lambda name: (name == "type", not name.startswith("transform")))
    found = tuple(draw(st.sampled_from(SITUATIONS[name])) for name in ordered)
    if any(isinstance(situation, Interrupt) and situation.verb == "F" for situation in found):
        # What a forward draws before an interrupt is drawn, in eager too, but the reference has none.
        found = tuple(replace(s, kept="") if isinstance(s, Transformed) else s for s in found)
    return found
