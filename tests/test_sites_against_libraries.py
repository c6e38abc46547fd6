"""What sites give against the libraries made for it: BackPACK, curvlinops, Opacus (the extra `oracles`).

Opacus' clipped sums over a whole pipeline are in `tests/examples/test_scripts_on_sites.py`.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

EXAMPLES = 6
ENGINES: list[dict[str, Any] | None] = [None, {"backend": "aten", "sites": True}]


def perceptron() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double(), torch.randn(EXAMPLES, 5).double()


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).double(), torch.randn(EXAMPLES, 2, 7, 7).double()


MODELS = {"perceptron": perceptron, "convolutions": convolutions}


class Case:
    """A model, its cross entropy and W of it; the first stage of a pipeline or a later one."""

    def __init__(self, model: str, options: dict[str, Any] | None, first: bool) -> None:
        torch.manual_seed(0)
        self.model, self.x = MODELS[model]()
        self.y = torch.randint(3, (EXAMPLES,))
        apply, params, buffers = fs.functionalize(self.model)
        apply = apply if options is None else fs.compile(apply, **options)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, self.x, argnums=() if first else None)
        leaf = output.detach().requires_grad_()
        nn.functional.cross_entropy(leaf, self.y).backward()
        self.weight_pullback = pullback(leaf.grad)[1]

    def of_examples(self) -> list[dict[str, Tensor]]:
        """The gradient of each example's share of the loss."""
        found = []
        for i in range(EXAMPLES):
            grads: dict[str, Tensor] = {}
            for site in self.weight_pullback.sites:
                alone = torch.zeros_like(site.cotangent)
                alone[i] = site.cotangent[i]
                for name, grad in site.vjp(alone).items():
                    grads[name] = grads[name] + grad if name in grads else grad
            found.append(grads)
        return found


@pytest.fixture(params=ENGINES, ids=["uncompiled", "aten"])
def options(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("first", [True, False], ids=["first stage", "later stage"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_examples_and_their_norms_are_those_of_backpack(
    model: str, first: bool, options: Any
) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    case = Case(model, options, first)
    each = case.of_examples()
    extended, loss = backpack.extend(case.model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.BatchGrad(), extensions.BatchL2Grad()):
        loss(extended(case.x), case.y).backward()
    for name, parameter in case.model.named_parameters():
        found = torch.stack([grads[name] for grads in each])
        torch.testing.assert_close(found, parameter.grad_batch)
        torch.testing.assert_close(found.flatten(1).square().sum(1), parameter.batch_l2)


@pytest.mark.parametrize("first", [True, False], ids=["first stage", "later stage"])
def test_kronecker_factors_are_those_of_curvlinops(first: bool, options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library that it loads scripts functions
        curvlinops = pytest.importorskip("curvlinops")
    case = Case("perceptron", options, first)
    weights = {name: p for name, p in case.model.named_parameters() if name.endswith("weight")}
    kfac = curvlinops.KFACLinearOperator(
        case.model,
        nn.CrossEntropyLoss(),
        [*weights.values()],
        [(case.x, case.y)],
        fisher_type="empirical",
        check_deterministic=False,
    )
    size = sum(weight.numel() for weight in weights.values())
    blocks = kfac @ torch.eye(size, dtype=torch.float64)
    factors = {}
    for site in case.weight_pullback.sites:
        (name,) = [name for name in site.params if name in weights]
        (inputs,) = [tensor for tensor in site.inputs if tensor.shape[0] == EXAMPLES]
        each = site.cotangent * EXAMPLES  # of an example's own loss, rather than of its share
        factors[name] = each.T @ each / EXAMPLES, inputs.T @ inputs / EXAMPLES
    expected = torch.block_diag(*(torch.kron(*factors[name]) for name in weights))
    torch.testing.assert_close(expected, blocks)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_examples_are_those_of_opacus(model: str, options: Any) -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    case = Case(model, options, first=True)
    each = case.of_examples()
    sampled = grad_sample.GradSampleModule(case.model, loss_reduction="sum")
    nn.functional.cross_entropy(sampled(case.x), case.y).backward()
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(torch.stack([grads[name] for grads in each]), parameter.grad_sample)
