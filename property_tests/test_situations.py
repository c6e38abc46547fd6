"""Whatever a module or its callers do around a stage has the effect that it has in eager, or is refused.

One example is a generated stage in a few situations (`situations`), driven for two
microbatches by an engine and by plain autograd.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import situations
import torch
from driven import ORDERS, Script, ambient_kept, verdict
from hypothesis import Phase, assume, event, given, settings
from hypothesis import strategies as st
from of_callers import SavedTensorHooks
from of_questions import Threads
from of_surroundings import Captured
from one_process import one_process
from torch import Tensor, nn

import funcstage as fs
from funcstage import trees
from funcstage.checks import differentiated_leaves
from funcstage.testing import strategies
from funcstage.testing.stages import Stage, use
from funcstage.testing.tolerances import compare

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]

ENGINES = {"closures": lambda apply: apply, "aten": functools.partial(fs.compile, backend="aten")}
REMAT = ("min_cut", "none", "full", 0.5)
PRECISE = ("residual", "branch", "repeat", "tied", "frozen", "eval")


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A process group of this process alone, for wrappers."""
    with one_process():
        yield


@pytest.mark.parametrize("kind", situations.SITUATIONS)
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=max(8, settings.default.max_examples // 8))
@given(data=st.data())
def test_a_stage_in_a_situation_does_as_eager_does_or_is_refused(
    engine: str, kind: str, data: st.DataObject
) -> None:
    stage = data.draw(strategies.stages(dtype=st.just(torch.float64), blocks=PRECISE, max_layers=3))
    around = data.draw(situations.situations(kind))
    script = Script(stage, around, data.draw(st.sampled_from(ORDERS)), data.draw(st.booleans()))
    split = ENGINES[engine]
    if engine != "closures":
        split = functools.partial(split, remat=data.draw(st.sampled_from(REMAT)))
    event(f"{kind}: {verdict(script, engine, split)}")


def test_hooks_on_what_is_saved_switch_off_the_look_for_writes_on_a_plain_tape_as_in_eager() -> None:
    stage = Stage(body=(use("linear", out=0, bias=True),), shape=(3,), dtype=torch.float64)
    around = Captured("a global's attribute", after_verb="F"), SavedTensorHooks(), Threads("a queue")
    assert verdict(Script(stage, around), "closures", ENGINES["closures"]) == "equal"
    assert verdict(Script(stage, around[:1] + around[2:]), "closures", ENGINES["closures"]) == "eager raises"


class Root(nn.Module):
    """A stage of its own around a submodule that several share."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.shared(*args, **kwargs)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=max(8, settings.default.max_examples // 12), phases=[Phase.generate])
@given(stage=strategies.stages(dtype=st.just(torch.float64), blocks=PRECISE, max_layers=3))
def test_stages_that_share_submodules_run_side_by_side(engine: str, stage: Stage) -> None:
    """Each thread has its own stage and parameters; the module that lends its code is one."""
    shared, args, kwargs = stage.build()
    shared.eval()  # random numbers and statistics depend on who comes first
    kept = dict(shared.named_parameters())
    stages, expected = [], []
    for scale in (0.5, 1.0, 1.5):
        apply, params, buffers = fs.functionalize(Root(shared))
        params = {name: p * scale for name, p in params.items()}
        stages.append((ENGINES[engine](apply), params, buffers))
        expected.append(eager(shared, {name.removeprefix("shared."): p for name, p in params.items()}, stage))
    assume(all(map(equal, expected[1], eager(shared, kept, stage))))  # no draws in eval mode
    start = threading.Barrier(len(stages))

    def run(index: int) -> list[list[Any]]:
        apply, params, buffers = stages[index]
        start.wait()
        found = []
        for _ in range(4):
            held = fs.functionalize(Root(shared)).params  # the others must have put theirs away
            assert all(
                p.data_ptr() == kept[name.removeprefix("shared.")].data_ptr() for name, p in held.items()
            )
            output, _, pullback = fs.stage_vjp(apply, params, buffers, *args, argnums=stage.argnums, **kwargs)
            input_grads, weight_pullback = pullback(cotangents(output))
            grads = weight_pullback()
            found.append(trees.flatten((output, input_grads, list(grads.values())))[0])
        return found

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ambient_kept(), ThreadPoolExecutor(len(stages)) as pool:
            running = [pool.submit(run, index) for index in range(len(stages))]
    finally:
        sys.setswitchinterval(switching)
    for future, wanted in zip(running, expected, strict=True):
        if isinstance(future.exception(), fs.TraceError):
            continue
        for found in future.result():
            assert all(map(equal, found, wanted))
    assert all(p is kept[name] for name, p in shared.named_parameters())


def cotangents(output: Any) -> Any:
    return trees.map_leaves(
        lambda leaf: torch.ones_like(leaf) if trees.is_differentiable(leaf) else None, output
    )


def eager(module: nn.Module, params: dict[str, Tensor], stage: Stage) -> list[Any]:
    """What the stage gives with these parameters, under plain autograd."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(params.get(name, parameter))
    _, args, kwargs = stage.build()
    leaves, spec = trees.flatten(args)
    leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    inputs = [leaves[i].requires_grad_() for i in differentiated_leaves(args, stage.argnums)]
    given = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    output = module(*trees.unflatten(spec, given), **kwargs)
    pairs = [
        (leaf, torch.ones_like(leaf))
        for leaf in trees.flatten(output)[0]
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if pairs:
        torch.autograd.backward([leaf for leaf, _ in pairs], [ones for _, ones in pairs])
    place = {id(leaf): leaf.grad for leaf in inputs}
    results = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in trees.flatten(output)[0]]
    return [
        *results,
        *(place.get(id(leaf)) for leaf in leaves),
        *(p.grad for p in module.parameters() if p.requires_grad),
    ]


def equal(got: Any, expected: Any) -> bool:
    return compare("", got, expected, 1e-6).accepted
