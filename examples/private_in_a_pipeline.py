"""Differentially private training (DP-SGD) of a pipeline: gradients of examples are clipped, then summed.

    python examples/private_in_a_pipeline.py

A gradient is clipped by its norm over all stages, which nobody has before all of the backward has run; it is
wanted for nothing but that norm. A split backward has time in between: I leaves the input and the cotangent
of each product, which tell the norms (Goodfellow, arXiv 1510.01799); they are summed over the stages, a
number for each example; then W runs once, on cotangents that are scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import funcstage as fs

Stages = list[fs.FunctionalStage]
Grads = list[dict[str, Tensor]]


def backward_input(stages: Stages, x: Tensor, y: Tensor) -> tuple[Tensor, list[fs.WeightPullback]]:
    """Run F and I of one microbatch through all stages.

    Returns:
        The loss of each example, and the weight pullback of each stage.
    """
    pullbacks = []
    for apply, params, buffers in stages:
        x, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        pullbacks.append(pullback)
    losses, pull_back = torch.func.vjp(lambda x: nn.functional.cross_entropy(x, y, reduction="none"), x)
    (cotangent,) = pull_back(torch.ones_like(losses))  # of the sum: each example's share is its own gradient
    weight_pullbacks = []
    for pullback in reversed(pullbacks):
        (cotangent,), weight_pullback = pullback(cotangent)
        weight_pullbacks.append(weight_pullback)
    return losses, weight_pullbacks[::-1]


def squared_norms(site: fs.Site, examples: int) -> Tensor:
    """Return the squared norm of each example's gradient of a linear layer, without that gradient.

    Over the positions of an example, the gradient is a sum of products of inputs and cotangents.
    """
    (inputs,) = site.inputs
    inputs = inputs.reshape(examples, -1, inputs.shape[-1])
    cotangents = site.cotangent.reshape(examples, -1, site.cotangent.shape[-1])
    of_weight = torch.einsum("bti,bsi,bto,bso->b", inputs, inputs, cotangents, cotangents)
    has_bias = any(name.endswith("bias") for name in site.params)
    return of_weight + cotangents.sum(1).square().sum(-1) if has_bias else of_weight


def clipped_sums(
    weight_pullbacks: list[fs.WeightPullback], examples: int, bound: float
) -> tuple[Grads, Tensor]:
    """Sum the gradients of the examples of a microbatch, none longer than `bound`.

    Args:
        weight_pullbacks: one for each stage, whose parameters are all read at one site.
        examples: how many there are.
        bound: of the norm over all stages.

    Returns:
        The sums for each stage, and the norms that there were.
    """
    sites = [weight_pullback.sites for weight_pullback in weight_pullbacks]
    norms = sum(squared_norms(site, examples) for of_stage in sites for site in of_stage).sqrt()
    scale = (bound / norms).clamp(max=1)  # on several devices: after an all_reduce of the squares
    grads: Grads = []
    for of_stage in sites:
        grads.append({})
        for site in of_stage:
            by_example = site.cotangent.reshape(examples, -1)
            grads[-1] |= site.vjp((by_example * scale[:, None]).reshape(site.cotangent.shape))
    return grads, norms


def private_step(
    stages: Stages, x: Tensor, y: Tensor, *, microbatches: int, bound: float, noise: float, lr: float
) -> tuple[float, Stages]:
    """Take a step of DP-SGD (Abadi et al., arXiv 1607.00133, algorithm 1): clip, sum, add noise, descend."""
    totals = [{name: torch.zeros_like(p) for name, p in stage.params.items()} for stage in stages]
    loss = 0.0
    for x_m, y_m in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
        losses, weight_pullbacks = backward_input(stages, x_m, y_m)
        loss += losses.sum().item() / len(x)
        grads, _ = clipped_sums(weight_pullbacks, len(x_m), bound)
        totals = [{n: total[n] + grad[n] for n in total} for total, grad in zip(totals, grads, strict=True)]

    def descended(name: str, param: Tensor, total: Tensor) -> Tensor:
        return param - lr * (total + noise * bound * torch.randn_like(total)) / len(x)

    return loss, [
        stage._replace(params={n: descended(n, p, total[n]) for n, p in stage.params.items()})
        for stage, total in zip(stages, totals, strict=True)
    ]


def main(steps: int = 40) -> list[float]:
    """Train on points of three classes, and return the losses."""
    torch.manual_seed(0)
    y = torch.randint(3, (256,))
    x = torch.nn.functional.one_hot(y, 8) * 2 + torch.randn(256, 8)
    first = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32))
    last = nn.Sequential(nn.GELU(), nn.Linear(32, 3))
    stages = [fs.functionalize(first), fs.functionalize(last)]
    losses = []
    for step in range(steps):
        loss, stages = private_step(stages, x, y, microbatches=4, bound=1.0, noise=0.8, lr=1.0)
        losses.append(loss)
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
