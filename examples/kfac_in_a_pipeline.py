"""K-FAC in a pipeline: a second-order optimizer from what W is made of, with no hook and no second backward.

    python examples/kfac_in_a_pipeline.py

K-FAC (Martens & Grosse, arXiv 1503.05671) takes the Fisher matrix of a linear layer for a Kronecker product
of two small ones: of the second moments of its inputs and of its cotangents (here those of the data's own
loss: the empirical Fisher). After I both lie in the weight pullback, as the input and the cotangent of a
site, so that factors are computed where W is: in the bubbles of the schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import funcstage as fs

Stages = list[fs.FunctionalStage]


class Factors(NamedTuple):
    """Second moments at a linear layer, summed over the rows that it has seen.

    Attributes:
        inputs: [in + 1, in + 1], a one behind each input for the bias.
        cotangents: [out, out], of each row's own loss.
        rows: how many there were.
    """

    inputs: Tensor
    cotangents: Tensor
    rows: int

    def __add__(self, other: object) -> Factors:
        assert isinstance(other, Factors)
        return Factors(*(a + b for a, b in zip(self, other, strict=True)))


def factors_of(site: fs.Site) -> Factors:
    """Return the factors of a linear layer with a bias, from one microbatch.

    Args:
        site: its cotangents are those of a sum over rows.
    """
    (inputs,) = site.inputs
    rows = inputs.reshape(-1, inputs.shape[-1])
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    cotangents = site.cotangent.reshape(-1, site.cotangent.shape[-1])
    return Factors(rows.T @ rows, cotangents.T @ cotangents, len(rows))


def preconditioned(weight: Tensor, bias: Tensor, factors: Factors, damping: float) -> tuple[Tensor, Tensor]:
    """Multiply a layer's gradient with the inverse of its Fisher matrix.

    Args:
        weight: the gradient, [out, in].
        bias: likewise, [out].
        factors: of the layer.
        damping: is divided among the factors by their size (section 6.3 of the paper).
    """
    a, g = factors.inputs / factors.rows, factors.cotangents / factors.rows
    share = (a.trace() / len(a) / (g.trace() / len(g)).clamp(min=1e-12)).sqrt()
    a = a + share * damping**0.5 * torch.eye(len(a), dtype=a.dtype)
    g = g + damping**0.5 / share * torch.eye(len(g), dtype=g.dtype)
    step = torch.linalg.solve(g, torch.linalg.solve(a, torch.cat([weight, bias[:, None]], dim=1).T).T)
    return step[:, :-1], step[:, -1]


def backward_input(stages: Stages, x: Tensor, y: Tensor) -> tuple[Tensor, list[fs.WeightPullback]]:
    """Run F and I of one microbatch through all stages; the loss is a sum over rows."""
    pullbacks = []
    for apply, params, buffers in stages:
        x, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        pullbacks.append(pullback)
    cotangent, loss = torch.func.grad_and_value(lambda x: (x - y).square().sum() / 2)(x)
    weight_pullbacks = []
    for pullback in reversed(pullbacks):
        (cotangent,), weight_pullback = pullback(cotangent)
        weight_pullbacks.append(weight_pullback)
    return loss, weight_pullbacks[::-1]


def kfac_step(
    stages: Stages, x: Tensor, y: Tensor, *, microbatches: int, damping: float, lr: float
) -> tuple[float, Stages]:
    """Take a step; factors and gradients are sums over the microbatches."""
    loss = 0.0
    grads: list[dict[str, Tensor] | None] = [None] * len(stages)
    factors: list[dict[str, Factors]] = [{} for _ in stages]
    for x_m, y_m in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
        summed, weight_pullbacks = backward_input(stages, x_m, y_m)
        loss += summed.item() / len(x)
        for i, weight_pullback in enumerate(weight_pullbacks):
            for site in weight_pullback.sites:
                layer, found = site.params[0].rpartition(".")[0], factors_of(site)
                factors[i][layer] = factors[i][layer] + found if layer in factors[i] else found
            grads[i] = fs.stage_backward_weight(weight_pullback, accumulate=grads[i])

    def descended(
        stage: fs.FunctionalStage, grad: dict[str, Tensor], of: dict[str, Factors]
    ) -> dict[str, Tensor]:
        params = dict(stage.params)
        for layer, at in of.items():
            names = f"{layer}.weight", f"{layer}.bias"
            steps = preconditioned(*(grad[name] / len(x) for name in names), at, damping)
            for name, step in zip(names, steps, strict=True):
                params[name] = params[name] - lr * step
        return params

    return loss, [
        stage._replace(params=descended(stage, grad, of))
        for stage, grad, of in zip(stages, grads, factors, strict=True)
        if grad is not None
    ]


def main(steps: int = 30) -> list[float]:
    """Fit a function whose inputs have very different sizes, and return the losses."""
    torch.manual_seed(0)
    x = torch.randn(512, 6) * torch.logspace(-1, 1, 6)
    y = torch.stack([(x[:, 0] * 5).sin(), x[:, 5].tanh()], dim=1)
    first = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32))
    last = nn.Sequential(nn.Tanh(), nn.Linear(32, 2))
    stages = [fs.functionalize(first), fs.functionalize(last)]
    losses = []
    for step in range(steps):
        loss, stages = kfac_step(stages, x, y, microbatches=4, damping=1e-4, lr=0.03)
        losses.append(loss)
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
