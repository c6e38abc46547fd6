"""Bad input that once was computed with silently, ended the process, or left torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs


def product(params: Any, buffers: Any, x: Tensor) -> Any:
    return x @ params["v"] + x @ params["w"], buffers


def pending() -> fs.WeightPullback:
    params = {"v": torch.ones(3, 3), "w": torch.ones(3, 3)}
    output, _, pullback = fs.stage_vjp(product, params, (), torch.ones(3, 3))
    return pullback(torch.ones_like(output))[1]


def test_a_nested_parameter_does_not_end_the_process_of_a_compiled_stage() -> None:
    apply, params, buffers = fs.functionalize(nn.Linear(3, 3))
    fast, x = fs.compile(apply, backend="aten"), torch.ones(2, 3)
    fs.stage_vjp(fast, params, buffers, x)
    with pytest.raises(fs.TraceError, match=r"params\['bias'\] is a nested tensor"):
        fs.stage_vjp(fast, {**params, "bias": torch.nested.nested_tensor([x[0]])}, buffers, x)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_parameters_and_buffers_are_refused_by_name(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(fs.LeafError, match=r"params\['w'\] is a nested tensor"):
        fs.stage_vjp(product, {"v": torch.ones(3, 3), "w": nested}, (), torch.ones(3, 3))
    with pytest.raises(fs.LeafError, match=r"buffers\[0\] is a nested tensor"):
        fs.stage_vjp(product, {"v": torch.ones(3, 3), "w": torch.ones(3, 3)}, (nested,), torch.ones(3, 3))


def test_a_compressed_sparse_parameter_is_refused_by_name() -> None:
    params = {"v": torch.ones(3, 3), "w": torch.eye(3).to_sparse_csr()}
    with pytest.raises(fs.LeafError, match=r"parameter \['w'\].*sparse_csr.*to_dense"):
        fs.stage_vjp(product, params, (), torch.ones(3, 3))


def test_a_wrapper_subclass_is_not_given_to_programs_traced_for_plain_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    fast = fs.compile(product, backend="aten")
    params = {"v": torch.ones(3, 3), "w": torch.ones(3, 3)}
    fs.stage_vjp(fast, params, (), torch.ones(3, 3))
    fake = FakeTensorMode().from_tensor(params["w"])
    with pytest.raises(fs.TraceError, match=r"params\['w'\] is a FakeTensor"):
        fs.stage_vjp(fast, {**params, "w": fake}, (), torch.ones(3, 3))


@pytest.mark.parametrize("argnums", [0.0, None.__class__, torch.tensor(0), object()])
def test_argnums_that_are_no_numbers_are_refused(argnums: Any) -> None:
    with pytest.raises(fs.StructureError, match=r"argnums must be.*\(0, 2\)"):
        fs.stage_vjp(lambda p, b, x: (x, b), (), (), torch.ones(2), argnums=argnums)


def window() -> Tensor:
    return torch.zeros(5).as_strided((3, 3), (1, 1))


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (window, "share memory"),
        (in_inference_mode, "inference mode"),
        (lambda: torch.zeros(3, 3).to(torch.float8_e4m3fn), "float8"),
        (lambda: torch.zeros(3, 3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.zeros(3, 3).to_mkldnn(), "_mkldnn"),
        (lambda: torch.nested.nested_tensor([torch.zeros(3)]), "nested"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3, 3), 0.1, 0, torch.qint8), "qint8"),
    ],
)
def test_accumulators_that_cannot_take_a_sum_are_refused_and_nothing_is_consumed(
    make: Any, words: str
) -> None:
    weights = pending()
    with pytest.raises(fs.LeafError, match=rf"accumulate\['w'\].*{words}"):
        fs.stage_backward_weight(weights, {"v": None, "w": make()})
    assert torch.equal(fs.stage_backward_weight(weights)["w"], torch.full((3, 3), 3.0))


def test_accumulators_in_one_memory_are_refused() -> None:
    weights, total = pending(), torch.zeros(3, 3)
    with pytest.raises(fs.LeafError, match=r"accumulate\['w'\] lies in the memory of accumulate\['v'\]"):
        fs.stage_backward_weight(weights, {"v": total, "w": total.view(3, 3)})
    assert not weights.consumed


@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_a_sparse_cotangent_of_a_dense_output_is_refused(engine: str) -> None:
    apply = product if engine == "closures" else fs.compile(product, backend="aten")
    params = {"v": torch.ones(3, 3), "w": torch.ones(3, 3)}
    _, _, pullback = fs.stage_vjp(apply, params, (), torch.ones(3, 3))
    for sparse in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with pytest.raises(fs.LeafError, match=r"output_grads.*sparse"):
            pullback(sparse)
    assert not pullback.consumed
