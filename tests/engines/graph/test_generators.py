"""Random draws, read or not: the masks are eager's, and the generators end where eager's end."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage.engines.graph.generators import RECORDED, Asked
from funcstage.engines.graph.replay import draws_in_graphs

Forward = Callable[["Drawing", Tensor], Tensor]


class Drawing(nn.Module):
    """Computes anything, with a parameter and a generator of its own."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.generator = torch.Generator()
        self.generator_seed = self.generator.initial_seed()
        self.seed = functools.partial(self.generator.manual_seed, 3)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x * self.scale)


def unused_head(m: Drawing, x: Tensor) -> Tensor:
    F.dropout(x, 0.5)
    x = F.dropout(x, 0.3)
    F.dropout(x, 0.5).sum()
    return x


def unread_numbers(m: Drawing, x: Tensor) -> Tensor:
    torch.rand(3)
    torch.randn(2)
    torch.randint(0, 5, (3,))
    torch.randperm(7)
    torch.multinomial(torch.ones(5), 2)
    torch.bernoulli(torch.full((5,), 0.5))
    torch.poisson(torch.ones(3))
    torch.normal(torch.ones(3), torch.ones(3))
    return F.dropout(x, 0.5)[torch.randperm(16)] + torch.rand_like(x)


def unread_in_place(m: Drawing, x: Tensor) -> Tensor:
    noise = torch.empty(4)
    noise.normal_().uniform_().exponential_().bernoulli_(0.3)
    torch.empty(4).log_normal_().cauchy_()
    torch.empty(4).geometric_(0.3)
    return F.dropout(x, 0.5) + torch.empty_like(x).normal_()


def not_training(m: Drawing, x: Tensor) -> Tensor:
    F.dropout(x, 0.5, training=False)
    F.dropout(x, 0.0)
    F.dropout(x, 1.0)
    return F.dropout(x, 0.5)


def many_dropouts(m: Drawing, x: Tensor) -> Tensor:
    F.alpha_dropout(x, 0.5, training=True)
    F.gumbel_softmax(x, hard=True)
    F.rrelu(x, training=True)
    x = F.rrelu(x - 1.2, training=True)
    return F.dropout1d(x[None], 0.5, training=True) + F.gumbel_softmax(x)


def attention(m: Drawing, x: Tensor) -> Tensor:
    q = x.view(1, 1, 4, 4)
    F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)


def two_generators(m: Drawing, x: Tensor) -> Tensor:
    torch.rand(3, generator=m.generator)
    torch.rand(3)
    x = x + torch.rand(16, generator=m.generator) + torch.rand(16)
    return x + torch.empty(16).bernoulli_(0.3, generator=m.generator)


def region(m: Drawing, x: Tensor) -> Tensor:
    def body(x: Tensor) -> Tensor:
        F.dropout(x, 0.5)
        torch.rand(2)
        return F.dropout(x, 0.5).sin()

    y: Tensor = checkpoint(body, x, use_reentrant=False)
    return y


FORWARDS = (
    unused_head,
    unread_numbers,
    unread_in_place,
    not_training,
    many_dropouts,
    attention,
    two_generators,
    region,
)
ENGINES = ("closures", "none", "min_cut", "full", "inductor")


def compared(stage: Any, module: Drawing, params: Any, buffers: Any) -> None:
    x = torch.ones(16)

    def seeded() -> None:
        torch.manual_seed(0)
        module.generator.manual_seed(1)

    def then() -> list[Tensor]:
        return [torch.rand(2), torch.rand(2, generator=module.generator)]

    seeded()
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    wanted = torch.autograd.grad(expected.sum(), [leaf, module.scale])
    after = then()
    for _ in range(2):
        seeded()
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        ends = then()
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        torch.testing.assert_close([output, dx, weight_pullback()["scale"]], [expected.detach(), *wanted])
        torch.testing.assert_close(ends, after, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_masks_are_eagers_and_generators_end_where_eagers_do(forward: Forward, engine: str) -> None:
    module = Drawing(forward)
    apply, params, buffers = fs.functionalize(module)
    if forward is two_generators and engine != "closures" and not RECORDED:
        with pytest.raises(fs.TraceError, match="draws from a generator of its own"):
            compared(fs.compile(apply, backend="aten"), module, params, buffers)
    elif engine == "inductor":
        compared(fs.compile(apply), module, params, buffers)
    elif engine == "closures":
        compared(apply, module, params, buffers)
    else:
        compared(fs.compile(apply, backend="aten", remat=engine), module, params, buffers)  # type: ignore[arg-type]


def seeds(m: Drawing, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return x + torch.rand(16)


def puts_back(m: Drawing, x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    x = x + torch.rand(16)
    torch.set_rng_state(state)
    return x + torch.rand(16)


def forks(m: Drawing, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        x = x + torch.rand(16)
    return x + torch.rand(16)


def makes_a_generator(m: Drawing, x: Tensor) -> Tensor:
    generator = torch.Generator()
    generator.manual_seed(5)
    return x + torch.rand(16, generator=generator)


def seeds_its_own(m: Drawing, x: Tensor) -> Tensor:
    m.generator.manual_seed(3)
    return x * torch.rand(16, generator=m.generator)


def seeds_without_drawing(m: Drawing, x: Tensor) -> Tensor:
    m.generator.manual_seed(5)
    return x * 2


def puts_its_own_back(m: Drawing, x: Tensor) -> Tensor:
    state = m.generator.get_state()
    x = x * torch.rand(16, generator=m.generator)
    m.generator.set_state(state)
    return x * torch.rand(16, generator=m.generator)


def seeds_a_global(m: Drawing, x: Tensor) -> Tensor:
    GENERATOR.manual_seed(3)
    return x * torch.rand(16, generator=GENERATOR)


def seeds_the_default_itself(m: Drawing, x: Tensor) -> Tensor:
    torch.default_generator.manual_seed(3)
    return x * torch.rand(16)


def seeds_the_default_itself_as_before(m: Drawing, x: Tensor) -> Tensor:
    torch.default_generator.manual_seed(7)
    return x * torch.rand(16)


def reads_the_seed(m: Drawing, x: Tensor) -> Tensor:
    return x * (m.generator.initial_seed() + torch.initial_seed() + 2)


def seeds_by_partial(m: Drawing, x: Tensor) -> Tensor:
    functools.partial(torch.manual_seed, 3)()
    return x * torch.rand(16)


def seeds_its_own_by_partial(m: Drawing, x: Tensor) -> Tensor:
    m.seed()
    return x * torch.rand(16, generator=m.generator)


def seeds_its_own_anew_by_partial(m: Drawing, x: Tensor) -> Tensor:
    functools.partial(m.generator.manual_seed, m.generator_seed)()
    return x * torch.rand(16, generator=m.generator)


def seeds_the_default_by_partial(m: Drawing, x: Tensor) -> Tensor:
    functools.partial(torch.default_generator.manual_seed, 3)()
    return x * torch.rand(16)


def seeds_a_global_by_map(m: Drawing, x: Tensor) -> Tensor:
    list(map(GENERATOR.manual_seed, [3]))
    return x * torch.rand(16, generator=GENERATOR)


def puts_a_global_back_by_name(m: Drawing, x: Tensor) -> Tensor:
    operator.methodcaller("set_state", STATE)(GENERATOR)
    return x * torch.rand(16, generator=GENERATOR)


GENERATOR = torch.Generator()
STATE = torch.Generator().manual_seed(4).get_state()
UNRECORDED = [
    *(seeds, puts_back, forks, makes_a_generator, seeds_its_own, seeds_without_drawing, puts_its_own_back),
    *(seeds_a_global, seeds_the_default_itself, seeds_the_default_itself_as_before, reads_the_seed),
    *(
        seeds_by_partial,
        seeds_its_own_by_partial,
        seeds_its_own_anew_by_partial,
        seeds_the_default_by_partial,
    ),
    *(seeds_a_global_by_map, puts_a_global_back_by_name),
]


@pytest.mark.parametrize("forward", UNRECORDED, ids=lambda f: f.__name__)
def test_what_a_graph_does_not_record_of_generators_is_refused_and_works_uncompiled(forward: Forward) -> None:
    module = Drawing(forward)
    apply, params, buffers = fs.functionalize(module)
    compared(apply, module, params, buffers)
    torch.manual_seed(7)
    torch.rand(3)
    kept = torch.default_generator, module.generator, GENERATOR
    before = [generator.get_state() for generator in kept]
    refusals = "which a graph does not record|makes a random generator in its forward|which a trace of torch"
    with pytest.raises(fs.TraceError, match=refusals):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.ones(16))
    assert all(map(torch.equal, [generator.get_state() for generator in kept], before))
    torch.manual_seed(8)  # torch's own functions are its own again
    assert torch.random.default_generator is torch.default_generator


def by_position(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch._C._nn.rrelu_with_noise(x, torch.empty_like(x), 0.1, 0.9, True, generator)


def test_a_generator_may_be_passed_by_position() -> None:
    module = Drawing(lambda m, x: by_position(x - 2, m.generator))
    apply, params, buffers = fs.functionalize(module)
    compared(apply, module, params, buffers)
    compiled = fs.compile(apply, backend="aten")
    if RECORDED:
        compared(compiled, module, params, buffers)
    else:
        with pytest.raises(fs.TraceError, match="draws from a generator of its own"):
            compared(compiled, module, params, buffers)


def test_a_generator_that_was_made_inside_is_refused_by_position_too() -> None:
    apply, params, buffers = fs.functionalize(Drawing(lambda m, x: by_position(x - 2, torch.Generator())))
    with pytest.raises(fs.TraceError, match="generator"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.ones(16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}], ids=str)
@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_cuda_generators_end_where_eagers_do(backend: Any, options: Any) -> None:
    module = Drawing(unused_head).cuda()
    apply, params, buffers = fs.functionalize(module)
    stage = fs.compile(apply, backend=backend, **options)
    x = torch.ones(16, device="cuda")
    torch.manual_seed(0)
    expected, after = module(x).detach(), torch.rand(2, device="cuda")
    for _ in range(3):
        torch.manual_seed(0)
        output, _, pullback = fs.stage_vjp(stage, params, buffers, x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.rand(2, device="cuda"), after, rtol=0, atol=0)
        pullback(torch.ones_like(output))[1]()


def test_numpys_generator_seeded_by_partial_is_refused() -> None:
    seed = functools.partial(np.random.seed, 3)

    def forward(m: Drawing, x: Tensor) -> Tensor:
        seed()
        return x * torch.rand(16)

    apply, params, buffers = fs.functionalize(Drawing(forward))
    np.random.seed(5)
    with pytest.raises(fs.TraceError, match=r"draws a random number \(numpy"):
        fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, torch.ones(16))


@pytest.mark.parametrize(
    ("operation", "device", "generator", "draws"),
    [
        (torch.ops.aten.bernoulli.p, "meta", None, True),
        (torch.ops.aten.bernoulli.p, "meta", torch.Generator(), False),
        (torch.ops.aten.bernoulli.p, "cpu", None, False),
        (torch.ops.aten.mul.Tensor, "cpu", None, True),  # which draws nothing
    ],
)
def test_cuda_graphs_draw_what_is_drawn_on_the_device_from_its_default_generator(
    operation: Any, device: str, generator: torch.Generator | None, draws: bool
) -> None:
    graph = torch.fx.Graph()
    options = {} if generator is None else {"generator": generator}
    node = graph.call_function(operation, (graph.placeholder("x"), 0.5), options)
    node.meta["val"] = torch.empty(2, device=device)
    assert draws_in_graphs(SimpleNamespace(module=SimpleNamespace(graph=graph))) is draws


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("seeded", [False, True])
def test_generators_within_reach_are_watched_and_put_back(late: bool, seeded: bool) -> None:
    generator, default = torch.Generator(), torch.default_generator
    before, of_all = generator.get_state(), default.get_state()
    asked = Asked()
    found = [generator, default, generator]
    for each in [] if late else found:
        asked.reach(each)
    asked.begin()
    for each in found if late else []:
        asked.reach(each)
    asked.begin()
    assert not torch.equal(generator.get_state(), before)  # so that its own seed set again is noticed
    assert torch.equal(default.get_state(), of_all)  # from which other threads draw
    if seeded:
        functools.partial(generator.manual_seed, generator.initial_seed() + 1)()
        with pytest.raises(fs.TraceError, match=r"called by functools\.partial"):
            asked.refuse()
    else:
        asked.refuse()
    asked.undo()
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(default.get_state(), of_all)


def test_torchs_own_generator_seeded_by_partial_is_noticed_and_put_back() -> None:
    before, asked = torch.default_generator.get_state(), Asked()
    asked.begin()
    functools.partial(torch.default_generator.manual_seed, torch.initial_seed() + 1)()
    with pytest.raises(fs.TraceError, match=r"called by functools\.partial"):
        asked.refuse()
    asked.undo()
    assert torch.equal(torch.default_generator.get_state(), before)


def test_methods_of_generators_that_are_called_are_noted_with_the_first_line() -> None:
    frame, generator = sys._getframe(), torch.Generator()
    for function in (generator.manual_seed, generator.seed, generator.get_state, generator.set_state):
        asked = Asked()
        asked.note(torch.sin, frame)
        asked.note([].append, frame)
        asked.refuse()
        asked.note(function, frame)
        line = frame.f_lineno - 1
        asked.note(generator.initial_seed, frame)
        with pytest.raises(fs.TraceError, match=rf"\({function.__name__}\(\), at .*:{line}\)"):
            asked.refuse()


@pytest.mark.parametrize(
    ("modules", "noted"),
    [
        (["of_a_user"], True),
        (["torch.cuda.random", "of_a_user"], True),
        (["torch.cuda.random", "torch.cuda", "torch._dynamo.utils"], False),
        (["torch.cuda.random", "torch._inductor.graph"], False),
        (["torch._dynamo.utils", "of_a_user"], False),
        (["of_a_user", "torch._dynamo.utils"], True),
        (["torch.random"], True),  # whoever looks up another generator than torch's own
        ([Asked.__module__, "of_a_user"], False),
    ],
)
def test_what_compilers_ask_of_generators_is_none_of_the_stages(modules: list[str], noted: bool) -> None:
    """`modules` run in each other, the innermost first."""
    frame: Any = None
    for module in reversed(modules):
        code = SimpleNamespace(co_filename="stage.py")
        frame = SimpleNamespace(f_globals={"__name__": module}, f_back=frame, f_code=code, f_lineno=7)
    asked = Asked()
    asked.note(torch.Generator().get_state, frame)
    if noted:
        with pytest.raises(fs.TraceError, match=r"\(get_state\(\), at stage.py:7\)"):
            asked.refuse()
    else:
        asked.refuse()


def test_torchs_functions_that_look_its_own_generator_up_are_looked_after_elsewhere() -> None:
    default, asked = torch.default_generator, Asked()
    code = SimpleNamespace(co_filename="stage.py")
    frame: Any = SimpleNamespace(f_globals=vars(torch.random), f_back=None, f_code=code, f_lineno=7)
    asked.note(default.get_state, frame)
    asked.refuse()
    frame.f_globals = {**vars(torch.random), "__name__": "of_a_user"}
    asked.note(default.get_state, frame)
    with pytest.raises(fs.TraceError, match="get_state"):
        asked.refuse()
