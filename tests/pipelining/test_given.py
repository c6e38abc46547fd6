"""What a stage is told of the tensors that cross its edges: what goes together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import funcstage as fs
from funcstage.pipelining import given as given_module
from funcstage.pipelining.given import Given, Position, check_grads

X, Y, N = torch.ones(2, 3).requires_grad_(), torch.ones(4).requires_grad_(), torch.ones(2).int()
DX, DY = torch.zeros(2, 3), torch.zeros(4)


def ids(tensors: Any) -> list[int]:
    return [*map(id, tensors)]


def test_all_examples_are_among_all() -> None:
    assert ids(Given((X, 3, N), [Y], (DX, None, None), DY).all_tensors()) == ids([X, N, Y, DX, DY])
    assert Given().all_tensors() == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Given(), None),
        (Given((X, N), (Y,), (DX, None), (DY,)), None),
        (Given(X, Y, DX, DY), None),
        (Given((X, N), None, None, (DY, DY)), None),
        (Given(input_grads=(3,)), r"input_grads\[0\] must be a tensor or None, got int.*each input,"),
        (Given(output_grads=(None, "x")), r"output_grads\[1\] must be a tensor or None.*each output,"),
        (Given((X, Y), None, (DX,)), r"input_grads has 1 entries for 2 tensors"),
        (Given(None, X, None, (DX, None)), r"output_grads has 2 entries for 1 tensors"),
        (Given((X, N), None, (DX, N)), r"input_grads\[1\].* does not require grad"),
        (Given(None, (X, Y), None, (DX, DX)), r"output_grads\[1\].* has the shape"),
    ],
)
def test_examples_that_do_not_go_together_are_refused_by_name(given: Given, said: str | None) -> None:
    if said is None:
        given.check()
        return
    with pytest.raises(fs.LeafError, match=said):
        given.check()


@pytest.mark.parametrize(
    ("grad", "fits"),
    [(DX, True), (None, True), (DY, False), (DX.double(), False), (DX[:1], False)],
)
def test_a_gradient_has_the_shape_and_dtype_of_its_tensor(grad: Tensor | None, fits: bool) -> None:
    if fits:
        check_grads("grads", (grad,), [X])
        return
    with pytest.raises(fs.LeafError, match=r"grads\[0\].*A gradient has the shape, dtype and mesh"):
        check_grads("grads", (grad,), [X])


def test_there_is_one_for_each_input_or_none_at_all() -> None:
    assert Given().sent_grads([X, Y]) == (None, None)
    assert ids(Given(input_grads=[DX, None]).sent_grads([X, Y])) == ids((DX, None))
    assert ids(Given(input_grads=DX).sent_grads([X])) == ids((DX,))
    with pytest.raises(fs.LeafError, match="input_grads has 1 entries for 2 tensors"):
        Given(input_grads=DX, output_grads=(DX, DY)).sent_grads([X, Y])


@pytest.mark.parametrize(
    ("told", "sent", "said"),
    [
        (None, (DX, DY), None),
        (None, (DX, None), None),
        ((DX, None), (DX, DY), None),
        ((DX, None), (DX + 1, None), None),
        (None, (DX,), "what the next stage sends as gradients has 1 entries for 2"),
        ((DX,), (DX, DY), "output_grads has 1 entries for 2"),
        ((None, DY), (DX, None), r"output_grads\[1\] is float32\[4\], but the next stage sends none"),
        ((DX, DY), (DY, DY), r"what the next stage sends as gradients\[0\]"),
        ((DY, DY), (DX, DY), r"output_grads\[0\]"),
    ],
)
def test_what_is_received_is_what_was_told(told: Any, sent: Any, said: str | None) -> None:
    given = Given(output_grads=told)
    if said is None:
        given.check_received(sent, [X, Y])
        return
    with pytest.raises(fs.LeafError, match=said):
        given.check_received(sent, [X, Y])


NOTHING = Position(None, None, None, None, None)


@pytest.mark.parametrize("name", ["output_grads", "input_grads", "get_mesh"])
def test_what_torch_takes_from_2_12_on_is_refused_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_module, "TAKES_GRADS_AND_MESHES", False)
    assert NOTHING.of_this_torch() == NOTHING
    with pytest.raises(fs.StructureError, match=rf"^{name}= needs torch 2\.12"):
        NOTHING._replace(**{name: DX}).of_this_torch()
