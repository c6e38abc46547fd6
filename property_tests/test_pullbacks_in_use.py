"""Whatever is done with pullbacks, in any order: each gives eager's gradients, and nothing is overwritten.

A few stages, for the ways in which an engine lends, hands on or overwrites memory, are made once by each.
What is drawn is what happens to their pullbacks: retained, copied, mapped, split, moved to the host, asked
for sites, summed, dropped; while all that a caller ever got is held, and compared with what it was.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from gated import Gated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import funcstage as fs
from funcstage import trees

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Attends(nn.Module):
    """Attention with a learned bias, and one weight for two products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(6, 6))
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[None, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)[0, 0]
        return self.out(torch.exp(self.out(attended).tanh())) * x


class Hands(nn.Module):
    """Elementwise throughout: a parameter's gradient is a cotangent or a sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.shift = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x * self.scale + self.shift, -1) * torch.exp(self.scale) + self.shift


MODULES: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Sequential(Gated(), Gated()),
    Attends,
    Hands,
)
ENGINES: tuple[dict[str, Any] | None, ...] = (
    None,
    {"backend": "aten"},
    {"backend": "aten", "remat": "full", "sites": True},
    {"backend": "inductor"},
    {"backend": "inductor", "remat": "none"},
    *([{"cuda_graphs": True}, {"cuda_graphs": True, "sites": True}] if DEVICE == "cuda" else []),
)


@functools.cache
def made(module: int, engine: int) -> tuple[nn.Module, Any, Any]:
    """A module and its stage function, traced once for all examples."""
    torch.manual_seed(module)
    built = MODULES[module]().to(DEVICE)
    apply, params, _ = fs.functionalize(built)
    options = ENGINES[engine]
    return built, apply if options is None else fs.compile(apply, **options), params


HOW = ("copy", "deepcopy", "clone", "same", "laid out otherwise")
"""A pullback is copied."""


class OfInput(NamedTuple):
    """A pullback, with the tape of plain autograd."""

    pullback: fs.Pullback
    leaves: list[Tensor]
    output: Tensor


class OfWeights(NamedTuple):
    """Weight pullbacks that sum up to eager's gradients, by parameter."""

    pullbacks: tuple[fs.WeightPullback, ...]
    expected: dict[str, Tensor]


class Use:
    """Any use of the pullbacks of one stage, against plain autograd."""

    def __init__(self, module: int, engine: int, data: st.DataObject) -> None:
        self.module, self.apply, self.params = made(module, engine)
        self.data = data
        self.waiting: list[OfInput] = []
        self.weights: list[OfWeights] = []
        self.held: list[tuple[str, Tensor, Tensor]] = []

    def run_f(self) -> None:
        x = self.drawn()
        output, _, pullback = fs.stage_vjp(self.apply, self.params, {}, x)
        leaves = [x.clone().requires_grad_(), *self.module.parameters()]
        expected = self.module(leaves[0])
        assert_close([output], [expected.detach()])
        self.hold("x", x)
        self.hold("output", output)
        self.waiting.append(OfInput(pullback, leaves, expected))

    def run_i(self, last: bool = False) -> None:
        retain, place = not last and self.flip("retain"), self.place_waiting()
        item = self.waiting[place] if retain else self.waiting.pop(place)
        cotangent = self.drawn()
        (dx,), weight_pullback = item.pullback(cotangent, retain=retain)
        eager_dx, *expected = torch.autograd.grad(item.output, item.leaves, cotangent, retain_graph=True)
        assert_close([dx], [eager_dx])
        self.hold("cotangent", cotangent)
        self.hold("dx", dx)
        self.weights.append(OfWeights((weight_pullback,), dict(zip(self.params, expected, strict=True))))

    def run_w(self, last: bool = False) -> None:
        """W, whose results are the caller's to write into."""
        retain, place = not last and self.flip("retain"), self.place_of_weights()
        item = self.weights[place] if retain else self.weights.pop(place)
        total: dict[str, Tensor] = {}
        for i in self.data.draw(st.permutations(range(len(item.pullbacks)))):
            for name, grad in item.pullbacks[i](retain=retain).items():
                if grad is not None:
                    assert name not in total
                    total[name] = grad
        assert_all_close(total, item.expected)
        overwrite = self.flip("overwrite")
        for grad in total.values():
            if overwrite:
                grad.fill_(torch.nan)
            else:
                self.hold("gradient", grad)

    def sum_w(self) -> None:
        """W of one that waits, or of two, the second into the gradients of the first, which are donated."""
        item = self.weights.pop(self.place_of_weights())
        grads, expected = fs.stage_backward_weight(item.pullbacks), item.expected
        assert_all_close(grads, expected)
        if self.weights and self.flip("accumulate"):
            other = self.weights.pop(self.place_of_weights())
            grads = fs.stage_backward_weight(other.pullbacks, grads)
            assert_all_close(grads, {name: grad + other.expected[name] for name, grad in expected.items()})
        for grad in grads.values():
            self.hold("sum", grad)

    def split(self) -> None:
        item = self.weights.pop(self.place_of_weights())
        parts = self.data.draw(st.integers(1, 4), label="parts")
        pieces = tuple(piece for pullback in item.pullbacks for piece in pullback.split(parts))
        self.weights.append(item._replace(pullbacks=pieces))

    def copy(self) -> None:
        """A copy beside the original, or in its place."""
        how = self.data.draw(st.sampled_from(HOW))
        among, place = self.among()
        item = among.pop(place) if self.flip("replace") else among[place]
        among.append(mapped(item, lambda pullback: copied(pullback, how)))

    def offload(self) -> None:
        among, place = self.among()
        moved = mapped(among.pop(place), fs.offload)
        if self.flip("fetch"):
            mapped(moved, fs.prefetch)
        among.append(moved)

    def look_at_sites(self) -> None:
        """Each parameter's gradient is the sum of its sites' shares, where sites are to be had."""
        item = self.weights[self.place_of_weights()]
        total: dict[str, Tensor] = {}
        try:
            sites = [site for pullback in item.pullbacks for site in pullback.sites]
        except fs.StageError:
            return  # I has summed them; `sites=True` is what they ask for
        for site in sites:
            self.hold("cotangent of a site", site.cotangent)
            for tensor in site.inputs:
                self.hold("input of a site", tensor)
            for name, share in site.vjp().items():
                total[name] = total[name] + share if name in total else share
        assert_all_close(total, item.expected)

    def hold_leaves(self) -> None:
        among, place = self.among()
        for leaf in optree.tree_leaves(among[place][0], namespace=trees.NAMESPACE):
            self.hold("residual", leaf)

    def drop(self) -> None:
        among, place = self.among()
        del among[place]

    def place_waiting(self) -> int:
        """A place among what waits for I; F comes first where nothing does."""
        if not self.waiting:
            self.run_f()
        return self.data.draw(st.integers(0, len(self.waiting) - 1), label="place")

    def place_of_weights(self) -> int:
        """A place among what waits for W; I comes first where nothing does."""
        if not self.weights:
            self.run_i()
        return self.data.draw(st.integers(0, len(self.weights) - 1), label="place")

    def among(self) -> tuple[list[Any], int]:
        """What waits for I or what waits for W, and a place in it."""
        if self.weights and self.flip("weights"):
            return self.weights, self.place_of_weights()
        return self.waiting, self.place_waiting()

    def hold(self, what: str, tensor: Tensor) -> None:
        """Hold what the caller has got, and what it was."""
        self.held.append((what, tensor, tensor.clone()))

    def drawn(self) -> Tensor:
        """A normally distributed input or cotangent."""
        seed = self.data.draw(st.integers(0, 99), label="seed")
        return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    def flip(self, label: str) -> bool:
        return self.data.draw(st.booleans(), label=label)

    def finish(self) -> None:
        """Run what waits, in any order, and look at all that is held."""
        while self.waiting:
            self.run_i(last=True)
        while self.weights:
            self.run_w(last=True)
        for what, tensor, before in self.held:
            assert torch.equal(tensor, before), f"{what} was overwritten"


DONE = (Use.run_f, *(Use.run_i, Use.run_w) * 4, Use.sum_w, Use.split, Use.copy, Use.copy, Use.offload)
LOOKED = (Use.look_at_sites, Use.hold_leaves, Use.drop)


@settings(max_examples=max(300, settings.default.max_examples))
@given(
    module=st.integers(0, len(MODULES) - 1),
    engine=st.integers(0, len(ENGINES) - 1),
    uses=st.lists(st.sampled_from((*DONE, *LOOKED)), min_size=2, max_size=12),
    data=st.data(),
)
def test_pullbacks_give_eagers_gradients_whatever_is_done_with_them(
    module: int, engine: int, uses: list[Callable[[Use], None]], data: st.DataObject
) -> None:
    use = Use(module, engine, data)
    for step in uses:
        step(use)
    use.finish()


def mapped(item: Any, function: Callable[[Any], Any]) -> Any:
    """The same with other pullbacks."""
    if isinstance(item, OfInput):
        return item._replace(pullback=function(item.pullback))
    return item._replace(pullbacks=tuple(map(function, item.pullbacks)))


def copied(pullback: Any, how: str) -> Any:
    """A copy of a pullback."""
    if how in ("copy", "deepcopy"):
        return getattr(copy, how)(pullback)
    made = {"clone": torch.clone, "same": lambda leaf: leaf, "laid out otherwise": laid_out_otherwise}[how]
    return optree.tree_map(made, pullback, namespace=trees.NAMESPACE)


def laid_out_otherwise(leaf: Tensor) -> Tensor:
    """The same elements, the last dimension first in memory."""
    return leaf.movedim(-1, 0).contiguous().movedim(0, -1) if leaf.dim() else leaf


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients by parameter."""
    assert got.keys() == expected.keys()
    assert_close([got[name] for name in expected], expected.values())


def assert_close(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Compare, far more closely than what was overwritten could be."""
    for ours, eagers in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-4)
