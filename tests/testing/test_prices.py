"""Products of activations and parameters raise no false alarm: they take eager's FLOPs, or a known price."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcstage.testing import check_stage

ENGINES = ("closures", "aten")
Product = Callable[..., Tensor]


class Stage(nn.Module):
    """A product of an activation and of parameters of some shapes."""

    def __init__(self, product: Product, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.product = product
        self.weights = nn.ParameterList(torch.randn(shape) / 2 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.tanh(), *self.weights)


EQUAL: dict[str, tuple[Product, tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "einsum": (lambda x, w: torch.einsum("bd,de->be", x, w), (6, 4), ((4, 5),)),
    "einsum, the parameter first": (lambda x, w: torch.einsum("ed,...d->...e", w, x), (2, 3, 4), ((5, 4),)),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...d,de->...e", x, w), (2, 3, 4), ((4, 5),)),
    "einsum in batches": (lambda x, w: torch.einsum("gbd,gde->gbe", x, w), (3, 2, 4), ((3, 4, 5),)),
    "einsum of heads": (lambda x, w: torch.einsum("btd,dhk->bthk", x, w), (2, 3, 4), ((4, 2, 3),)),
    "einsum of lists": (lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]), (6, 4), ((4, 5),)),
    "einsum of a diagonal": (lambda x, w: torch.einsum("bii,i->b", x, w), (6, 4, 4), ((4,),)),
    "einsum of activations": (
        lambda x, w: torch.einsum("bi,bij,bj->b", x @ w, x[:, :, None] * x[:, None], x),
        (6, 4),
        ((4, 4),),
    ),
    "einsum of parameters": (
        lambda x, u, v, w: x @ torch.einsum("ab,bc,cd->ad", u, v, w),
        (6, 4),
        ((4, 2), (2, 3), (3, 4)),
    ),
    "bilinear": (lambda x, w, b: F.bilinear(x, x.sin(), w, b), (6, 4), ((5, 4, 4), (5,))),
    "addbmm": (lambda x, w, b: torch.addbmm(b, x, w), (3, 2, 4), ((3, 4, 5), (2, 5))),
    "addbmm, the parameter first": (
        lambda x, w: torch.addbmm(x[0], w, x, beta=2, alpha=0.5),
        (3, 2, 4),
        ((3, 2, 2),),
    ),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w, alpha=2), (3, 2, 4), ((3, 4, 5), (3, 2, 5))),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([1, 2], [1, 0])), (3, 2, 4), ((4, 2, 5),)),
    "tensordot, the parameter first": (lambda x, w: torch.tensordot(w, x, dims=1), (4, 3), ((5, 4),)),
    "multi_dot of two": (lambda x, w: torch.linalg.multi_dot([x, w]), (6, 4), ((4, 2),)),
    "inner": (lambda x, w: torch.inner(x, w), (2, 3, 4), ((5, 4),)),
    "inner, the parameter first": (lambda x, w: torch.inner(w, x), (2, 3, 4), ((5, 4),)),
    "kron": (lambda x, w: torch.kron(x, w), (3, 4), ((2, 3),)),
    "matrices in batches": (lambda x, w: w @ x, (2, 3, 4), ((5, 3),)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", EQUAL)
def test_a_product_of_an_activation_and_a_parameter_takes_eagers_flops(name: str, engine: str) -> None:
    product, shape, weights = EQUAL[name]
    report = check_stage(Stage(product, *weights), torch.randn(shape), engines=engine)
    (found,) = report.engines.values()
    assert found.flops is not None
    assert not any(found.flops.problems())


TWO = ((4, 2), (2, 4))
PRICED: dict[str, tuple[Product, tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "einsum": (lambda x, v, w: torch.einsum("bd,dr,re->be", x, v, w), (6, 4), TWO),
    "einsum, an activation between": (lambda x, v, w: torch.einsum("dr,bd,re->be", v, x, w), (6, 4), TWO),
    "einsum with an ellipsis": (lambda x, v, w: torch.einsum("...d,dr,re->...e", x, v, w), (2, 6, 4), TWO),
    "einsum of a list": (lambda x, v, w: torch.einsum("bd,dr,re->be", [x, v, w]), (6, 4), TWO),
    "einsum of derived parameters": (
        lambda x, v, w: torch.einsum("bd,dr,re->be", x, v.exp(), 2 * w),
        (6, 4),
        TWO,
    ),
    "einsum of two activations": (
        lambda x, w: torch.einsum("bk,kde,bd->be", x[:, :3].softmax(-1), w, x),
        (6, 4),
        ((3, 4, 5),),
    ),
    "einsum, not beside each other": (
        lambda x, v, w: torch.einsum("ab,cd,bc->ad", x, v, w),
        (6, 4),
        TWO[::-1],
    ),
    "multi_dot": (lambda x, v, w: torch.linalg.multi_dot([x, v, w]), (6, 4), TWO),
    "multi_dot of vectors": (lambda x, v, w: torch.linalg.multi_dot([x, v, w]), (4,), ((4, 3), (3,))),
    "multi_dot of four": (lambda x, v, w: torch.linalg.multi_dot([x, v, w, x.t()]), (6, 4), TWO),
    "chain_matmul": (lambda x, v, w: torch.chain_matmul(x, v, w), (6, 4), TWO),
    "cdist": (lambda x, w: torch.cdist(x, w), (30, 4), ((30, 4),)),
    "householder_product": (lambda x, w: torch.linalg.householder_product(x, w), (5, 5), ((5,),)),
    "ormqr": (lambda x, t, w: torch.ormqr(x, t, w), (5, 5), ((5,), (5, 5))),
}


@pytest.mark.filterwarnings("ignore:.*chain_matmul is deprecated")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PRICED)
def test_a_product_that_torch_differentiates_as_one_is_noted_with_its_price(name: str, engine: str) -> None:
    product, shape, weights = PRICED[name]
    report = check_stage(Stage(product, *weights), torch.randn(shape), engines=engine)
    (found,) = report.engines.values()
    assert found.flops is not None
    if any(found.flops.problems()):
        assert any("right, but at a price" in note for note in found.notes), str(report)
    if engine == "aten":
        assert not any(found.flops.problems())  # compiled, the terms of a formula are told apart


def test_uncompiled_the_price_is_really_paid() -> None:
    product, shape, weights = PRICED["einsum"]
    report = check_stage(Stage(product, *weights), torch.randn(shape), engines="closures")
    (found,) = report.engines.values()
    assert found.flops is not None
    assert any(found.flops.problems())


SQUARE = ((3, 3),)
EYE = 4 * torch.eye(3, dtype=torch.float64)
UNCOUNTED: dict[str, tuple[Product, tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "pinv": (lambda x, w: x @ torch.linalg.pinv(w), (5, 3), SQUARE),
    "pinv of what is singular": (lambda x, w: x @ torch.linalg.pinv(w[:, :1] @ w[:1]), (5, 3), SQUARE),
    "pinv of a batch": (lambda x, w: torch.linalg.pinv(x @ w), (2, 6, 4), ((4, 3),)),
    "pinv, hermitian": (lambda x, w: x @ torch.linalg.pinv(w + w.mT, hermitian=True), (5, 3), SQUARE),
    "pinverse": (lambda x, w: x @ torch.pinverse(w), (5, 3), SQUARE),
    "lu_solve, adjoint": (
        lambda x, w: torch.linalg.lu_solve(*torch.linalg.lu_factor(w + EYE), x, adjoint=True),
        (3, 7),
        SQUARE,
    ),
    "lu_solve from the right": (
        lambda x, w: torch.linalg.lu_solve(*torch.linalg.lu_factor(w + EYE), x, left=False),
        (7, 3),
        SQUARE,
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", UNCOUNTED)
def test_products_that_eagers_kernels_make_uncounted_are_no_mismatch(name: str, engine: str) -> None:
    product, shape, weights = UNCOUNTED[name]
    torch.manual_seed(0)
    report = check_stage(Stage(product, *weights).double(), torch.randn(shape).double(), engines=engine)
    (found,) = report.engines.values()
    assert found.flops is not None
    assert any(found.flops.problems()) == any("counted in a trace alone" in note for note in found.notes)
