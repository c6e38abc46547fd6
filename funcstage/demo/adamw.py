"""AdamW as a pair of pure functions over pytrees (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcstage import trees
from funcstage.trees import Params, PyTree


class AdamWState(NamedTuple):
    """Running means of the gradients and of their squares, shaped like the parameters."""

    step: int
    mean: PyTree
    square: PyTree


class Optimizer(NamedTuple):
    """`init(params) -> state` and `update(grads, state, params) -> (params, state)`; neither mutates."""

    init: Callable[[Params], AdamWState]
    update: Callable[[PyTree, AdamWState, Params], tuple[Params, AdamWState]]


def adamw(
    learning_rate: Callable[[int], float],
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> Optimizer:
    """Make AdamW.

    Args:
        learning_rate: the step size as a function of the step, counted from 1.
        betas: how much of the running means is kept from one step to the next.
        eps: added to the root of the squares.
        weight_decay: decoupled from the gradient; applied to matrices, not to biases and norms.
    """

    def init(params: Params) -> AdamWState:
        return AdamWState(
            0, trees.map_leaves(torch.zeros_like, params), trees.map_leaves(torch.zeros_like, params)
        )

    def update(grads: PyTree, state: AdamWState, params: Params) -> tuple[Params, AdamWState]:
        step = state.step + 1
        rate = learning_rate(step)
        mean = trees.map_leaves(
            lambda m, g: m if g is None else torch.lerp(g, m, betas[0]), state.mean, grads
        )
        square = trees.map_leaves(
            lambda s, g: s if g is None else torch.lerp(g.square(), s, betas[1]), state.square, grads
        )

        def moved(p: Tensor, m: Tensor, s: Tensor, g: Tensor | None) -> Tensor:
            if g is None:
                return p
            direction = m / (1 - betas[0] ** step) / ((s / (1 - betas[1] ** step)).sqrt() + eps)
            return p * (1 - rate * (weight_decay if p.dim() > 1 else 0)) - rate * direction

        return trees.map_leaves(moved, params, mean, square, grads), AdamWState(step, mean, square)

    return Optimizer(init, update)


def warmed_up(peak: float, steps: int) -> Callable[[int], float]:
    """Rise to `peak` over the first tenth of the steps, then fall to a tenth of it, both linearly."""
    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        if step <= warm:
            return peak * step / warm
        return peak * (1 - 0.9 * (step - warm) / max(1, steps - warm))

    return rate
