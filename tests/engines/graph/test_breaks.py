"""Stages that read values of tensors, compiled in parts, against plain eager autograd."""

from __future__ import annotations

import io
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.engines.levels.pieces import _units
from funcstage.testing import check_stage


class Block(nn.Module):
    """What can be traced."""

    def __init__(self, width: int = 4, hidden: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.down(functional.gelu(self.up(self.norm(x))))
        return x + (y if scale is None else y * scale)


class Stage(nn.Module):
    """A stage with blocks, and what reads values between them."""

    def __init__(self, between: Callable[[Stage, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(Block() for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


def item(s: Stage, x: Tensor) -> Tensor:
    return x * x.detach().sum().item()


def tolist(s: Stage, x: Tensor) -> Tensor:
    return x * x.new_tensor(x.detach().abs().sum(-1).tolist())[..., None]


def branch(s: Stage, x: Tensor) -> Tensor:
    return s.experts[0](x) if x.sum() > 0 else s.experts[1](x)


def loop(s: Stage, x: Tensor) -> Tensor:
    for _ in range(int(x.detach().abs().sum()) % 3 + 1):
        x = s.experts[0](x)
    return x


def nonzero(s: Stage, x: Tensor) -> Tensor:
    rows = x.sum(-1).gt(0).nonzero()[:, 0]
    return x.index_add(0, rows, s.experts[0](x[rows]))


def masked(s: Stage, x: Tensor) -> Tensor:
    keep = x.sum(-1) > 0
    y = x.clone()
    y[keep] = s.experts[1](x[keep])
    return y


def routed(s: Stage, x: Tensor) -> Tensor:
    """A mixture of experts that counts its tokens."""
    weights, chosen = s.gate(x).softmax(-1).topk(2, -1)
    counts = torch.bincount(chosen.flatten(), minlength=3).tolist()
    y = torch.zeros_like(x)
    for i, expert in enumerate(s.experts):
        if counts[i]:
            rows, place = (chosen == i).nonzero(as_tuple=True)
            y = y.index_add(0, rows, expert(x[rows], scale=weights[rows, place, None]))
    return y


def in_place(s: Stage, x: Tensor) -> Tensor:
    """Into what a part has returned."""
    y = s.experts[0](x)
    y += s.gate(x).sum(-1, keepdim=True)
    return y.mul_(x.detach().max().item())


def scaled_by_a_parameter(s: Stage, x: Tensor) -> Tensor:
    """The last argument depends on parameters alone."""
    return s.experts[2](x * x.detach().sum().item(), scale=s.gate.weight.sum().tanh())


def written_out(s: Stage, x: Tensor) -> Tensor:
    """As text, in which a trace would see no values."""
    print(x, file=io.StringIO())
    return x * float(f"{x.detach().sum():.3f}")


def shared(s: Stage, x: Tensor) -> Tensor:
    s_first = s.first(x)  # twice in one forward
    return functional.linear(s_first, s.first.up.weight.T @ s.second.up.weight) * x.detach().sum().item()


def on_both_levels(s: Stage, x: Tensor) -> Tensor:
    """An argument made of a parameter, into which an activation was written."""
    table = s.gate.weight * 2
    table[0] = x.mean(0)
    return x * x.detach().sum().item() + s.experts[0](table).sum(0)


def ungraded(s: Stage, x: Tensor) -> Tensor:
    """A part of whose result nothing is differentiated."""
    with torch.no_grad():
        y = s.experts[0](x)
    return x * y * y.sum().item()


def mapped(s: Stage, x: Tensor) -> Tensor:
    """A part within a transform of the stage's own."""
    return torch.func.vmap(s.experts[0])(x[:, None])[:, 0] * x.detach().sum().item()


def hyper(s: Stage, x: Tensor) -> Tensor:
    """A part whose parameters depend on the input."""
    made = {"up.weight": s.experts[0].up.weight * x.mean()}
    return torch.func.functional_call(s.experts[0], made, (x,)) * x.detach().sum().item()


def reparametrized(s: Stage, x: Tensor) -> Tensor:
    """A part whose parameters were made of others."""
    made = {"up.weight": s.experts[1].down.weight.T * s.gate.weight.sum()}
    return torch.func.functional_call(s.experts[0], made, (x,)) * x.detach().sum().item()


KINDS = [item, tolist, branch, loop, nonzero, masked, routed, in_place, scaled_by_a_parameter]
KINDS += [written_out, shared, on_both_levels, ungraded, mapped, hyper, reparametrized]


def made(between: Callable[[Stage, Tensor], Tensor]) -> tuple[Stage, Tensor]:
    torch.manual_seed(0)
    return Stage(between).double(), torch.randn(6, 4).double()


def in_parts(apply: Any, **options: Any) -> Any:
    return fs.compile(apply, **{"backend": "aten", "fullgraph": False, **options})


def compiled_parts(stage: Any) -> list[str]:
    """The parts of a stage that have programs."""
    names = {module: name for name, module in stage.module.named_modules()}
    return [names[part] for part, found in stage._parts._parts.items() if found._compiled._traced]


@pytest.mark.supports(
    "control flow and shapes that depend on values", compiled="in parts: submodules that can be traced"
)
@pytest.mark.parametrize("remat", ["none", "min_cut", "full", 0.5], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_reads_values_is_split_as_eager_has_it(kind: Any, remat: Any) -> None:
    module, x = made(kind)
    stages = []

    def engine(apply: Any) -> Any:
        stages.append(in_parts(apply, remat=remat))
        return stages[-1]

    check_stage(module, x, engines=engine, flops=False)
    parts = compiled_parts(stages[0])
    assert {"first", "second"} <= {*parts}
    if kind is routed:
        assert {*parts} == {"first", "second", "experts.0", "experts.1", "experts.2"}


def test_by_inductor() -> None:
    module, x = made(routed)
    check_stage(module, x, engines=lambda apply: in_parts(apply, backend="inductor"), flops=False)


def test_a_first_stage_without_differentiated_inputs() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.body = Stage(nonzero)
            self.tokens = WithTokens()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(self.embedding(tokens)) + self.tokens(tokens)

    class WithTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embedding(tokens).tanh()

    torch.manual_seed(0)
    check_stage(First().double(), torch.arange(6), engines=in_parts, flops=False)


class Taking(nn.Module):
    """Takes and returns more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, pair: tuple[Tensor, int], flag: bool) -> dict[str, Any]:
        y = self.linear(x) * pair[0] * pair[1]
        return {"y": -y if flag else y, "same": x, "order": y.detach().argsort(-1), "none": None}


def test_parts_take_keyword_arguments_and_return_trees() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Taking()
            self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            found = self.part(x * x.detach().sum().item(), pair=(x.tanh() * self.frozen, 2), flag=True)
            again = self.part(found["same"], pair=(self.frozen, 3), flag=False)
            assert found["none"] is None
            return found["y"].gather(-1, found["order"]) + again["y"], again["same"]

    torch.manual_seed(0)
    check_stage(Around().double(), torch.randn(3, 4).double(), engines=in_parts, flops=False)


class Normed(nn.Module):
    """Updates buffers in parts, one of them twice, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.last = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.part(x) * x.detach().sum().item()))


def test_buffers_are_updated_and_random_numbers_drawn_as_in_eager() -> None:
    torch.manual_seed(0)
    module = Normed().double()
    x = torch.randn(6, 4).double()
    check_stage(module, x, engines=in_parts, flops=False)
    check_stage(module.eval(), x, engines=in_parts, flops=False)


def test_what_a_part_keeps_on_its_module_has_gradients_for_the_others() -> None:
    class Keeping(Block):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            self.auxiliary = self.up(x).square().mean()
            return super().forward(x, scale)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Keeping()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) * x.detach().sum().item() + self.part.auxiliary

    torch.manual_seed(0)
    check_stage(Around().double(), torch.randn(3, 4).double(), engines=in_parts, flops=False)


class Told(nn.Module):
    """Reads what the stage around has put on it, or what a function of its has from around."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.told: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        told = self.told() if callable(self.told) else self.told
        return y if told is None else y * told


@pytest.mark.parametrize("how", ["of the input", "of a parameter", "in a closure", "returned", "a constant"])
def test_a_part_that_reads_what_it_is_not_handed_runs_uncompiled(how: str) -> None:
    class Returning(Told):
        def forward(self, x: Tensor) -> Tensor:
            return self.told

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Returning() if how == "returned" else Told()
            self.own = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            of_input, of_parameter = x.cos() * self.own, self.own * 2
            self.part.told = {
                "of the input": of_input,
                "of a parameter": of_parameter,
                "in a closure": lambda: of_input,
                "returned": of_input,
                "a constant": 3.0,
            }[how]
            y = self.part(x) + of_parameter
            self.part.told = None
            return y * x.detach().sum().item()

    torch.manual_seed(0)
    module = Around().double()
    apply, params, buffers = fs.functionalize(module)
    stage = in_parts(apply)
    for _ in range(3):
        x, g = torch.randn(2, 5, 4).double()
        torch.testing.assert_close(split(stage, params, buffers, x, g), eager(module, x, g))


class Shifted(nn.Module):
    """Reads a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh() + self.shift


@pytest.mark.parametrize("of", ["the input", "a parameter", "nothing"])
def test_a_part_whose_buffer_was_assigned_before_has_the_gradients_of_that(of: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.own = Shifted(), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            before = self.part.shift
            made = {"the input": x.mean(0) * self.own, "a parameter": self.own.exp(), "nothing": before + 2}
            self.part.shift = made[of]
            y = self.part(x * x.detach().sum().item())
            self.part.shift = before
            return y

    torch.manual_seed(0)
    check_stage(Around().double(), torch.randn(3, 4).double(), engines=in_parts, flops=False)


def test_a_part_whose_result_has_no_gradients() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).argmax(-1, keepdim=True)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choosing, self.last = Choosing(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x * x.detach().sum().item()
            return self.last(x) * x.gather(-1, self.choosing(x))

    torch.manual_seed(0)
    check_stage(Around().double(), torch.randn(3, 4).double(), engines=in_parts, flops=False)


def test_a_parameter_that_is_frozen_afterwards_still_has_its_gradient() -> None:
    module, x = made(item)
    apply, params, buffers = fs.functionalize(module)
    g = torch.randn(6, 4).double()
    wanted = eager(module, x, g)
    module.first.requires_grad_(False)
    torch.testing.assert_close(split(in_parts(apply), params, buffers, x, g), wanted)


def test_what_programs_cannot_do_is_refused_of_a_stage_with_parts() -> None:
    module, x = made(item)
    apply, params, buffers = fs.functionalize(module)
    g = torch.randn(6, 4).double()
    _, _, pullback = fs.stage_vjp(in_parts(apply), params, buffers, x)
    with pytest.raises(fs.LeafError, match=r"requires grad.*cannot be differentiated again"):
        pullback(g.clone().requires_grad_())
    with (
        pytest.warns(UserWarning, match="Anomaly"),
        torch.autograd.detect_anomaly(),
        pytest.raises(fs.StageError, match="does not look for NaN"),
    ):
        pullback(g, retain=True)
    weight_pullback = pullback(g)[1]
    with (
        pytest.warns(UserWarning, match="Anomaly"),
        torch.autograd.detect_anomaly(),
        pytest.raises(fs.StageError, match="does not look for NaN"),
    ):
        weight_pullback(retain=True)
    found = dict(zip(params, eager(module, x, g)[2:], strict=True))
    torch.testing.assert_close(weight_pullback(), found)


def test_hooks_of_parts_run_once_and_checkpointed_parts_again() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.again = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.again, self.part(x), use_reentrant=False)
            return x * x.detach().sum().item()

    torch.manual_seed(0)
    module = Around().double()
    module.part.register_forward_hook(lambda _, args, output: output * 2)
    module.part.up.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    check_stage(module, torch.randn(3, 4).double(), engines=in_parts, flops=False)


def split(stage: Any, params: Any, buffers: Any, x: Tensor, g: Tensor) -> list[Tensor | None]:
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    (dx,), weight_pullback = pullback(g)
    return [output, dx, *weight_pullback().values()]


def eager(module: nn.Module, x: Tensor, g: Tensor) -> list[Tensor | None]:
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    wanted = [leaf, *module.parameters()]
    return [output.detach(), *torch.autograd.grad(output, wanted, g, allow_unused=True)]


@pytest.mark.slow
def test_other_lengths_and_values_take_other_ways() -> None:
    module, _ = made(routed)
    apply, params, buffers = fs.functionalize(module)
    stage = in_parts(apply)
    for rows in (6, 6, 9, 1, 5, 12):
        x, g = torch.randn(2, rows, 4).double()
        torch.testing.assert_close(split(stage, params, buffers, x, g), eager(module, x, g))
    assert all(len(part._compiled._traced) <= 4 for part in stage._parts._parts.values())


def test_a_pullback_may_be_kept_moved_divided_and_summed_into() -> None:
    module, x = made(routed)
    apply, params, buffers = fs.functionalize(module)
    stage, g = in_parts(apply), torch.randn(6, 4).double()
    wanted = eager(module, x, g)
    output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
    leaves, spec = optree.tree_flatten(pullback, namespace="funcstage")
    assert sum(leaf.nbytes for leaf in leaves) >= pullback.nbytes > 0
    moved = optree.tree_unflatten(spec, [leaf.clone() for leaf in leaves])
    for _ in range(2):
        (dx,), weight_pullback = pullback(g, retain=True)
        assert weight_pullback.nbytes > 0
        for _ in range(2):
            torch.testing.assert_close([output, dx, *weight_pullback(retain=True).values()], wanted)
    (dx,), weight_pullback = moved(g)
    sums = {name: torch.ones_like(p) for name, p in params.items()}
    sums = fs.stage_backward_weight(weight_pullback, accumulate=sums)
    torch.testing.assert_close([dx, *sums.values()], [wanted[1], *(1 + grad for grad in wanted[2:])])
    (dx,), weight_pullback = pullback(g)
    total: dict[str, Tensor] = {}
    for piece in weight_pullback.split(3):
        total |= {name: grad for name, grad in piece().items() if grad is not None}
    torch.testing.assert_close([dx, *(total[name] for name in params)], wanted[1:])
    with pytest.raises(fs.ConsumedError):
        pullback(g)


def test_a_part_costs_w_what_it_holds_times_the_rows_of_its_widest_weight() -> None:
    module, x = made(item)
    module.second = Block(hidden=32).double()
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(in_parts(apply), params, buffers, x)
    _, weight_pullback = pullback(torch.ones_like(output))
    tape: Any = weight_pullback._tape
    held = [sum(leaf.numel() for leaf in of_region.leaves()) for _, of_region in tape.regions]
    assert len(held) == 2
    costs = [unit.cost for unit in _units(tape) if unit.tape.regions]
    assert sorted(costs) == sorted(n * rows for n, rows in zip(sorted(held), (8, 32), strict=True))


def test_sites_of_parts_are_those_of_their_programs() -> None:
    module, x = made(routed)
    apply, params, buffers = fs.functionalize(module)
    g = torch.randn(6, 4).double()
    wanted = dict(zip(params, eager(module, x, g)[2:], strict=True))
    _, _, pullback = fs.stage_vjp(in_parts(apply, sites=True), params, buffers, x)
    total: dict[str, Any] = {}
    for site in pullback(g)[1].sites:
        for name, share in site.vjp().items():
            total[name] = share + total.get(name, 0)
    assert total.keys() == params.keys()
    torch.testing.assert_close(total, wanted)


def test_sums_that_i_of_a_part_has_made_are_named_as_the_stage_names_them() -> None:
    module, _ = made(item)
    module.first = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 4)).double()
    apply, params, buffers = fs.functionalize(module)
    output, _, pullback = fs.stage_vjp(in_parts(apply), params, buffers, torch.randn(4096, 64).double())
    weight_pullback = pullback(torch.ones_like(output))[1]
    with pytest.raises(fs.StageError, match=r"already summed the gradients of first\.0\.weight, to save"):
        _ = weight_pullback.sites


def test_a_parameter_written_between_f_and_w_is_noticed() -> None:
    module, x = made(item)
    apply, params, buffers = fs.functionalize(module)
    _, _, pullback = fs.stage_vjp(in_parts(apply), params, buffers, x)
    params["first.up.weight"].mul_(2.0)
    with pytest.raises(fs.WrittenError):
        pullback(torch.randn(6, 4).double())[1]()


def test_it_is_said_once_which_line_reads_a_value_or_refused() -> None:
    module, x = made(item)
    apply, params, buffers = fs.functionalize(module)
    g = torch.randn(6, 4).double()
    stage = fs.compile(apply, backend="aten")
    with pytest.warns(UserWarning, match=r"cannot be traced, at .*test_breaks.py:\d+: it reads the value"):
        split(stage, params, buffers, x, g)
    for again in (stage, fs.compile(apply, backend="aten", fullgraph=False)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            split(again, params, buffers, x, g)
    for whole in (fs.compile(apply, backend="aten", fullgraph=True), pickle.loads(pickle.dumps(stage)).plan):
        with pytest.raises(fs.TraceError, match="it reads the value of a tensor"):
            whole(params, buffers, x)
    with pytest.raises(fs.StructureError, match="fullgraph must be None, True or False"):
        fs.compile(apply, fullgraph="no")  # type: ignore[arg-type]


def test_a_print_of_a_tensor_is_one_of_its_values_in_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    module, x = made(lambda s, x: (print(s.gate.bias), x)[1])
    apply, params, buffers = fs.functionalize(module)
    stage, g = in_parts(apply), torch.randn(6, 4).double()
    with torch.no_grad():
        params["gate.bias"].fill_(0.125)
    for _ in range(3):
        split(stage, params, buffers, x, g)
    assert capsys.readouterr().out.count("0.1250, 0.1250, 0.1250") == 3
    with pytest.raises(fs.TraceError, match=r"test_breaks.py:\d+: it reads the value of a tensor"):
        split(in_parts(apply, fullgraph=True), params, buffers, x, g)


class Telling(Block):
    """Tells of each of its runs, in a way that nobody watches."""

    def forward(self, x: Tensor) -> Tensor:
        print("a run")
        return super().forward(x) * x.detach().sum().item()


def test_what_reads_values_is_traced_once_and_runs_as_often_as_it_is_called(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, x = made(item)
    module.first = Telling().double()
    apply, params, buffers = fs.functionalize(module)
    stage = in_parts(apply)
    for runs in (3, 1, 1):  # first in a trace of the stage and in one of the part
        fs.stage_vjp(stage, params, buffers, x)
        assert capsys.readouterr().out.count("a run") == runs


def test_parts_of_a_stage_with_cuda_graphs_have_none_and_so_take_any_length() -> None:
    module, _ = made(item)
    apply, params, buffers = fs.functionalize(module)
    stage = in_parts(apply, cuda_graphs=True)
    for rows in (5, 6, 7, 8):
        x, g = torch.randn(2, rows, 4).double()
        torch.testing.assert_close(split(stage, params, buffers, x, g), eager(module, x, g))
    assert {len(part._compiled._traced) for part in stage._parts._parts.values()} == {0, 2}


def test_threads_of_the_compiler_are_none_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_an_event(step: Callable[..., Any], *given: Any) -> Any:
        threading.Event().set()
        return step(*given)

    compiling = sys.modules["funcstage.engines.graph.compile"]
    for name in ("partition", "linearize"):  # as a part is traced, and as it runs
        monkeypatch.setattr(compiling, name, partial(with_an_event, getattr(compiling, name)))
    module, x = made(item)
    apply, params, buffers = fs.functionalize(module)
    stage = in_parts(apply)
    for _ in range(2):
        fs.stage_vjp(stage, params, buffers, x)
    assert compiled_parts(stage) == ["first", "second"]


def test_it_is_whole_again_in_a_mode_that_reads_nothing() -> None:
    module, x = made(lambda s, x: x * x.detach().sum().item() if s.training else x)
    apply, params, buffers = fs.functionalize(module)
    stage, g = in_parts(apply), torch.randn(6, 4).double()
    for training in (True, False, True):
        module.train(training)
        torch.testing.assert_close(split(stage, params, buffers, x, g), eager(module, x, g))
    assert len(stage._traced) == 1


def test_a_function_without_a_module_runs_uncompiled() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return x @ params * x.detach().sum().item(), buffers

    weight, x = torch.randn(4, 4).double(), torch.randn(3, 4).double()
    check_stage(apply, x, params=weight, buffers=(), engines=in_parts, flops=False)


def test_the_stage_may_be_called_and_differentiated_from_outside() -> None:
    module, x = made(branch)
    apply, params, buffers = fs.functionalize(module)
    stage, g = in_parts(apply), torch.randn(6, 4).double()
    wanted = eager(module, x, g)
    torch.testing.assert_close(stage(params, buffers, x)[0], wanted[0])
    split(stage, params, buffers, x, g)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    output, _, pullback = fs.stage_vjp(stage, leaves, buffers, x)
    torch.testing.assert_close([output.detach(), pullback(g)[0][0].detach()], wanted[:2])
    output, _ = stage(leaves, buffers, x)
    found = torch.autograd.grad(output, [*leaves.values()], g, allow_unused=True)
    torch.testing.assert_close([*found], wanted[2:])


def test_threads_run_stages_in_parts_side_by_side() -> None:
    found: dict[int, list[Tensor | None]] = {}
    modules = [made(kind)[0] for kind in (routed, item, routed)]
    x, g = torch.randn(2, 6, 4).double()

    def run(i: int) -> None:
        stage, params, buffers = fs.functionalize(modules[i])
        stage = in_parts(stage)
        for _ in range(3):
            found[i] = split(stage, params, buffers, x, g)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    own = nn.Module.__call__
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.__call__ is own
    for i, module in enumerate(modules):
        torch.testing.assert_close(found[i], eager(module, x, g))


def test_an_error_of_a_part_is_its_own_and_leaves_nothing_behind() -> None:
    class Failing(Block):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            if len(x) == 5:
                raise KeyError("five")
            return super().forward(x, scale)

    module, x = made(lambda s, x: s.part(x) * x.detach().sum().item())
    module.part = Failing().double()
    apply, params, buffers = fs.functionalize(module)
    stage, g, own = in_parts(apply), torch.randn(6, 4).double(), nn.Module.__call__
    with pytest.raises(KeyError, match="five"):
        split(stage, params, buffers, x[:5], g[:5])
    assert nn.Module.__call__ is own
    torch.testing.assert_close(split(stage, params, buffers, x, g), eager(module, x, g))


def test_autocast_is_that_of_the_call() -> None:
    module, x = made(item)
    module.float()
    apply, params, buffers = fs.functionalize(module)
    stage, g = in_parts(apply), torch.randn(6, 4)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            wanted = eager(module, x.float(), g)
            found = split(stage, params, buffers, x.float(), g)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert {"first", "second"} <= {*compiled_parts(stage)}
