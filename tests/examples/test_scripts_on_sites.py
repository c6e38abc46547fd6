"""The scripts that train from W's sites: what they compute is what a gradient for each example says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

FOLDER = Path(__file__).parents[2] / "examples"
PRIVATE = runpy.run_path(str(FOLDER / "private_in_a_pipeline.py"))
KFAC = runpy.run_path(str(FOLDER / "kfac_in_a_pipeline.py"))


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6, bias=False))
    return [first.double(), nn.Sequential(nn.Tanh(), nn.Linear(6, 3)).double()]


def stages_of(parts: list[nn.Module], compile: bool) -> list[Any]:
    stages = [fs.functionalize(part) for part in parts]
    if not compile:
        return stages
    return [stage._replace(apply=fs.compile(stage.apply, backend="aten", sites=True)) for stage in stages]


def each_gradient(model: nn.Module, x: Tensor, losses_of: Any) -> list[list[Tensor]]:
    """By brute force: a backward for each example."""
    found = []
    for i in range(len(x)):
        losses = losses_of(model(x[i : i + 1]), i)
        found.append([*torch.autograd.grad(losses.sum(), [*model.parameters()])])
    return found


def in_order(grads: list[dict[str, Tensor]], parts: list[nn.Module]) -> list[Tensor]:
    return [of[name] for of, part in zip(grads, parts, strict=True) for name, _ in part.named_parameters()]


@pytest.mark.parametrize("compile", [False, True], ids=["uncompiled", "aten"])
@pytest.mark.parametrize("positions", [(), (4,)], ids=["rows", "sequences"])
def test_clipped_sums_are_those_of_each_examples_gradient(positions: tuple[int, ...], compile: bool) -> None:
    parts = modules()
    x = torch.randn(6, *positions, 5, dtype=torch.float64)
    y = torch.randint(3, (6, *positions))

    def losses_of(output: Tensor, i: int) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, -2), y[i : i + 1].flatten(), reduction="sum")

    each = each_gradient(nn.Sequential(*parts), x, losses_of)
    norms = torch.stack([torch.cat([grad.flatten() for grad in grads]).norm() for grads in each])
    bound = norms.median().item()
    scale = (bound / norms).clamp(max=1)
    expected = [torch.einsum("b,b...", scale, torch.stack(grads)) for grads in zip(*each, strict=True)]

    # The loss takes classes along dimension 1, so sequences are handed to it as rows.
    parts = [parts[0], nn.Sequential(*parts[1], nn.Flatten(0, -2))] if positions else parts
    stages = stages_of(parts, compile)
    _, weight_pullbacks = PRIVATE["backward_input"](stages, x, y.flatten())
    grads, found = PRIVATE["clipped_sums"](weight_pullbacks, 6, bound)
    torch.testing.assert_close(found, norms)
    torch.testing.assert_close(in_order(grads, parts), expected)


def test_clipped_sums_are_those_of_opacus() -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    parts = modules()
    model = nn.Sequential(*modules())
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    sampled = grad_sample.GradSampleModule(model, loss_reduction="sum")
    nn.functional.cross_entropy(sampled(x), y, reduction="sum").backward()
    each = [parameter.grad_sample for parameter in sampled.parameters()]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in each]).norm(dim=0)
    bound = norms.median().item()
    expected = [torch.einsum("b,b...", (bound / norms).clamp(max=1), g) for g in each]
    _, weight_pullbacks = PRIVATE["backward_input"](stages_of(parts, False), x, y)
    grads, found = PRIVATE["clipped_sums"](weight_pullbacks, 6, bound)
    torch.testing.assert_close(found, norms)
    torch.testing.assert_close(in_order(grads, parts), expected)


def test_private_training_learns() -> None:
    losses = PRIVATE["main"]()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("compile", [False, True], ids=["uncompiled", "aten"])
def test_kronecker_factors_are_the_second_moments_of_single_rows(compile: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    parts = [nn.Sequential(layer, nn.Tanh()), nn.Sequential(nn.Linear(4, 3)).double()]
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    each = each_gradient(nn.Sequential(*parts), x, lambda output, i: (output - y[i]).square().sum() / 2)
    _, weight_pullbacks = KFAC["backward_input"](stages_of(parts, compile), x, y)
    (site,) = weight_pullbacks[0].sites
    factors = KFAC["factors_of"](site)
    # A row's gradient of the bias is its cotangent; that of the weight is the product with its input.
    cotangents = torch.stack([grads[1] for grads in each])
    ones = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(factors.cotangents, cotangents.T @ cotangents)
    torch.testing.assert_close(factors.inputs, ones.T @ ones)
    torch.testing.assert_close(torch.stack([grads[0] for grads in each]), cotangents[:, :, None] * x[:, None])
    # The step: a solution of the Fisher matrix in full, a Kronecker product, with both dampings.
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    a, g = factors.inputs / 6, factors.cotangents / 6
    share = (a.trace() / 6 / (g.trace() / 4)).sqrt()
    a, g = a + 0.1 * share * torch.eye(6), g + 0.1 / share * torch.eye(4)
    whole = torch.linalg.solve(torch.kron(g, a), torch.cat([weight, bias[:, None]], dim=1).flatten())
    found = KFAC["preconditioned"](weight, bias, factors, 0.01)
    torch.testing.assert_close(torch.cat([found[0], found[1][:, None]], dim=1).flatten(), whole)


def test_kfac_gets_further_than_gradient_descent() -> None:
    losses = KFAC["main"]()
    # In as many steps gradient descent gets to 0.099, with the best of five rates.
    assert losses[-1] < 0.07
