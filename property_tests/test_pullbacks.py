"""What may be done with pullbacks as values: hold them, run them in any order, sum them, copy them."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any, NamedTuple

import optree
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_batches import FEW
from torch import Tensor

import funcstage as fs
from funcstage import trees
from funcstage.testing import TOLERANCES, strategies
from funcstage.testing.reference import normal_like
from funcstage.testing.stages import Stage
from funcstage.testing.tolerances import compare

SHARE = settings(max_examples=settings.default.max_examples // 2)
"""Each of these properties is tried on half as many stages as one family of the main one."""

PRECISE = strategies.stages(
    dtype=st.just(torch.float64), blocks=("residual", "branch", "repeat", "tied", "frozen", "eval")
)
"""Stages in double precision throughout, where sums in eager's order are eager's to the tolerance."""


class Split(NamedTuple):
    """A microbatch between F and I."""

    pullback: fs.Pullback
    output_grads: Any


def forward(stage: Stage, seed: int = 0, make: Any = None) -> Split:
    """Run F, of what `make` makes of the stage function, and draw cotangents."""
    module, args, kwargs = stage.build()
    apply, params, buffers = fs.functionalize(module)
    fast = apply if make is None else make(apply)
    torch.manual_seed(seed)
    output, _, pullback = fs.stage_vjp(fast, params, buffers, *args, argnums=stage.argnums, **kwargs)
    return Split(pullback, cotangents(output, seed))


def cotangents(output: Any, seed: int) -> Any:
    """Draw cotangents for an output."""
    generator = torch.Generator().manual_seed(seed)
    return trees.map_leaves(lambda leaf: normal_like(leaf, generator), output)


def backward(split: Split) -> tuple[Any, Any]:
    """Run I and W."""
    input_grads, weight_pullback = split.pullback(split.output_grads)
    return input_grads, weight_pullback()


def assert_bitwise_equal(got: Any, expected: Any) -> None:
    """Compare two trees to the last bit, NaN with NaN."""
    leaves, spec = trees.flatten(got)
    expected_leaves, expected_spec = trees.flatten(expected)
    assert spec == expected_spec
    for name, ours, wanted in zip(trees.leaf_names(spec, "got"), leaves, expected_leaves, strict=True):
        if isinstance(ours, Tensor) and isinstance(wanted, Tensor):
            torch.testing.assert_close(
                ours, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert ours == wanted, name


def assert_close(got: Any, expected: Any) -> None:
    """Compare two trees to the coarsest tolerance, as kernels that write elsewhere are fused otherwise."""
    leaves, spec = trees.flatten(got)
    for name, *pair in zip(trees.leaf_names(spec, "got"), leaves, trees.flatten(expected)[0], strict=True):
        difference = compare(name, *pair, max(TOLERANCES.values()))
        assert difference.accepted, difference


@SHARE
@given(stage=strategies.stages(), order=st.permutations(range(3)), data=st.data())
def test_weight_passes_give_the_same_in_any_order_after_any_other_microbatches(
    stage: Stage, order: list[int], data: st.DataObject
) -> None:
    expected = [backward(forward(stage, seed)) for seed in range(3)]
    splits = [forward(stage, seed) for seed in range(3)]
    pending = {}
    for i in data.draw(st.permutations(range(3)), label="order of I"):
        input_grads, pending[i] = splits[i].pullback(splits[i].output_grads)
        assert_bitwise_equal(input_grads, expected[i][0])
    for i in order:
        assert_bitwise_equal(pending[i](), expected[i][1])


@SHARE
@given(stage=PRECISE, count=st.integers(1, 3))
def test_summed_weight_passes_are_what_eager_accumulates(stage: Stage, count: int) -> None:
    module, args, kwargs = stage.build()
    eager = copy.deepcopy(module)
    apply, params, buffers = fs.functionalize(module)
    pending = []
    for seed in range(count):
        torch.manual_seed(seed)
        output, buffers, pullback = fs.stage_vjp(
            apply, params, buffers, *args, argnums=stage.argnums, **kwargs
        )
        grads = cotangents(output, seed)
        pending.append(pullback(grads)[1])
        torch.manual_seed(seed)
        output = eager(*trees.map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, args), **kwargs)
        pairs = zip(trees.flatten(output)[0], trees.flatten(grads)[0], strict=True)
        pairs = [(y, grad) for y, grad in pairs if grad is not None and y.requires_grad]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    total = fs.stage_backward_weight(pending)
    trained = {name: p for name, p in eager.named_parameters() if p.requires_grad}
    assert total.keys() == trained.keys()
    for name, parameter in trained.items():
        tolerance = TOLERANCES[torch.float64]
        difference = compare(name, total[name], parameter.grad, tolerance)
        assert difference.accepted, difference
    assert all(weight_pullback.consumed for weight_pullback in pending)


@SHARE
@given(stage=strategies.stages())
def test_a_pullback_copied_leaf_by_leaf_gives_the_same_and_leaves_the_original_usable(stage: Stage) -> None:
    expected = backward(forward(stage))
    split = forward(stage)
    copied = optree.tree_map(torch.clone, split.pullback, namespace=trees.NAMESPACE)
    assert_bitwise_equal(backward(split._replace(pullback=copied)), expected)
    assert copied.nbytes == 0
    assert split.pullback.nbytes >= 0
    input_grads, weight_pullback = split.pullback(split.output_grads)
    assert_bitwise_equal(input_grads, expected[0])
    copied_weight = optree.tree_map(torch.clone, weight_pullback, namespace=trees.NAMESPACE)
    assert_bitwise_equal(copied_weight(), expected[1])
    assert_bitwise_equal(weight_pullback(), expected[1])
    assert weight_pullback.nbytes == copied_weight.nbytes == 0


CALLS = {"stage": strategies.stages(), "retained": st.integers(0, 2), "data": st.data()}


@SHARE
@given(**CALLS)
def test_a_retained_pullback_gives_the_same_in_any_order(
    stage: Stage, retained: int, data: st.DataObject
) -> None:
    called_in_any_order(stage, retained, data)


@FEW
@pytest.mark.filterwarnings("ignore:TorchInductor cannot compile:UserWarning")  # as complex numbers
@given(**CALLS, backend=st.sampled_from(("aten", "inductor", "inductor")))
def test_a_retained_pullback_of_a_compiled_stage_gives_the_same_in_any_order(
    stage: Stage, retained: int, data: st.DataObject, backend: Any
) -> None:
    assume(not stage.reads_values)
    called_in_any_order(stage, retained, data, backend)


def called_in_any_order(stage: Stage, retained: int, data: st.DataObject, backend: str | None = None) -> None:
    """Call I some times and each W once or twice, in any order in which each I comes before its W."""
    make = partial(fs.compile, backend=backend) if backend else None
    assert_equal = assert_close if backend == "inductor" else assert_bitwise_equal
    expected = backward(forward(stage, make=make))
    split, pending = forward(stage, make=make), []
    calls = data.draw(st.permutations(["I"] * (retained + 1) + ["W"] * retained), label="calls")
    n = calls.count("I")
    for call in calls:
        if call == "I":
            n -= 1
            input_grads, weight_pullback = split.pullback(split.output_grads, retain=n > 0)
            pending.append(weight_pullback)
            assert_equal(input_grads, expected[0])
        elif pending:
            weight_pullback = pending.pop(data.draw(st.integers(0, len(pending) - 1), label="which W"))
            for retain in data.draw(st.sampled_from(((False,), (True, False))), label="W is retained"):
                assert_equal(weight_pullback(retain=retain), expected[1])
    for weight_pullback in pending:
        assert_equal(weight_pullback(), expected[1])
    with pytest.raises(fs.ConsumedError):
        split.pullback(split.output_grads)


@SHARE
@given(
    stage=strategies.stages(),
    forms=st.lists(
        st.sampled_from(("absent", "dense", "expanded", "strided", "zero")), min_size=1, max_size=4
    ),
)
def test_cotangents_may_be_absent_repeated_or_strided(stage: Stage, forms: list[str]) -> None:
    def make(output: Any) -> Any:
        form = itertools.cycle(forms)
        grads = trees.map_leaves(lambda grad: in_form(grad, next(form)), cotangents(output, 0))
        # None as a whole would mean one.
        return torch.zeros_like(output) if grads is None else grads

    stage.check(engines=("closures", "aten"), output_grads=make, flops=False)


def in_form(grad: Tensor | None, form: str) -> Tensor | None:
    """Lay a cotangent out differently in memory, or leave it out."""
    if grad is None or form == "absent":
        return None
    if form == "expanded":
        return grad.sum().expand(grad.shape)
    if form == "strided":
        return torch.stack([grad, grad], -1)[..., 0]
    return torch.zeros_like(grad) if form == "zero" else grad
