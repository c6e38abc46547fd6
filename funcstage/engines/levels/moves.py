"""How tensors move between the two levels, and what is noted where they do: the sites."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcstage._torch import functorch as ft
from funcstage._torch.operators import without_torch_function
from funcstage.engines.levels.tape import Site


class Levels:
    """The level of the inputs and, above it, the level of the parameters.

    Attributes:
        outer_level: the level of the inputs, None where nothing is differentiated.
        inner_level: the level of the parameters.
        sites: the sites so far.
        bases: the sites at what outputs are views of.
        plain: operands on none of the levels, by the ids of these references: given, or captured.
        trainable: those among which are some whose gradients checkpointed regions would lose.
    """

    def __init__(self, outer_level: int | None, inner_level: int) -> None:
        self.outer_level = outer_level
        self.inner_level = inner_level
        self.sites: list[Site] = []
        self.bases: set[Site] = set()
        self.plain: dict[int, weakref.ref[Tensor]] = {}
        self.trainable: list[Tensor] = []

    def above(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation with the outer level on top.

        Not only for speed: composite kernels decide by `requires_grad` what to save, and on the inner
        level activations do not require grad.
        """
        layer = ft.pop_layer()
        try:
            return func(*args, **kwargs)
        finally:
            ft.push_layer(layer)

    def reads_weights(self, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
        """Tell whether an operand lives on the inner level; note those that live on none."""
        inner_level, level_of = self.inner_level, ft.level_of
        found = False
        for operands in (args, kwargs.values()) if kwargs else (args,):
            for operand in operands:
                if isinstance(operand, Tensor):
                    level = level_of(operand)
                    if level == inner_level:
                        found = True
                    elif level < 0:
                        reference = weakref.ref(operand)  # the same one each time
                        self.plain[id(reference)] = reference
                elif isinstance(operand, (list, tuple)):
                    found |= self.reads_weights(operand, {})
                elif isinstance(operand, dict):
                    found |= self.reads_weights(operand.values(), {})
        return found

    def captured(self) -> list[Tensor]:
        """The operands so far on none of the levels."""
        return [tensor for reference in self.plain.values() if (tensor := reference()) is not None]

    def is_activation(self, value: Tensor) -> bool:
        """Tell whether a value without its inner wrapper depends on a differentiated input."""
        return value.requires_grad and ft.level_of(value) == self.outer_level

    def release(self, leaf: Any) -> Any:
        """Let a site's output leave the inner level; values made of parameters alone stay."""
        if not isinstance(leaf, Tensor) or ft.level_of(leaf) != self.inner_level:
            return leaf
        value = ft.unwrap(leaf, self.inner_level)
        if not leaf.requires_grad:
            return value
        if not self.is_activation(value):
            return leaf
        if value._is_view() and leaf._is_view():
            self.meet_at_base(value, leaf)
        else:
            self.sites.append(Site(get_gradient_edge(value), get_gradient_edge(leaf)))
        return value

    def meet_at_base(self, value: Tensor, leaf: Tensor) -> None:
        """Note a site whose output is a view, at what it is a view of.

        Writing into a view moves its place on a tape, but not that of its base. Several outputs may be
        views of one base, which is one site.
        """
        base, inner_base = value._base, leaf._base
        assert base is not None
        assert inner_base is not None
        site = Site(get_gradient_edge(base), get_gradient_edge(inner_base))
        if site not in self.bases:
            self.bases.add(site)
            self.sites.append(site)

    def lower_activation(self, leaf: Any) -> Any:
        """Bring an operand that is on both levels down, so that the inner tape ends before it."""
        if isinstance(leaf, Tensor) and ft.level_of(leaf) == self.inner_level and leaf.requires_grad:
            return self.lower(leaf) if self.is_activation(ft.unwrap(leaf, self.inner_level)) else leaf
        return leaf

    def below(self, leaf: Any) -> Any:
        """An operand without its wrapper of the inner level."""
        on_inner = isinstance(leaf, Tensor) and ft.level_of(leaf) == self.inner_level
        return ft.unwrap(leaf, self.inner_level) if on_inner else leaf

    def lower(self, leaf: Any) -> Any:
        """Bring an operand down to the outer level, as a site of its own."""
        if not isinstance(leaf, Tensor) or ft.level_of(leaf) != self.inner_level:
            return leaf
        if not (leaf.requires_grad and torch.is_grad_enabled()):
            return ft.unwrap(leaf, self.inner_level)
        if self.is_activation(ft.unwrap(leaf, self.inner_level)):
            leaf = leaf.view_as(leaf)  # a place of its own, as `leaf` itself stays on both levels
            value = ft.unwrap(leaf, self.inner_level)
        else:
            value = ft.make_leaf(self.above(torch.detach, (ft.unwrap(leaf, self.inner_level),), {}))
        self.sites.append(Site(self.above(get_gradient_edge, (value,), {}), get_gradient_edge(leaf)))
        return value

    @property
    def levels(self) -> list[int]:
        """The levels that there are, from below."""
        return [level for level in (self.outer_level, self.inner_level) if level is not None]

    def bare(self, value: Any) -> Any:
        """A value without the wrappers of the levels."""
        for level in reversed(self.levels):
            if isinstance(value, Tensor):
                value = ft.unwrap(value, level)
        return value

    def is_weight(self, value: Tensor) -> bool:
        """Tell whether a value depends on parameters and lives on the inner level alone."""
        on_inner = ft.level_of(value) == self.inner_level and value.requires_grad
        return on_inner and not self.is_activation(ft.unwrap(value, self.inner_level))

    def is_differentiated(self, value: Tensor) -> bool:
        """Tell whether a value depends on parameters or differentiated inputs."""
        with without_torch_function():
            return self.is_weight(value) or self.is_activation(ft.unwrap(value, self.inner_level))
