"""Stages in several threads: nobody notices what another thread's stage does, whatever they share."""

from __future__ import annotations

import functools
import itertools
import multiprocessing.pool
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage._torch.interception import intercepting
from funcstage.engines.graph.reads import Reads
from funcstage.engines.graph.recorder import Recorder
from funcstage.engines.graph.refusals import ReadsValue
from funcstage.state.module import locked, locked_and_swapped, look_over, state_of

ENGINES = pytest.mark.parametrize("engine", ["closures", "aten"])
LONG = 60.0
"""Seconds after which a thread that waits for another has failed."""


ELSEWHERE = ThreadPoolExecutor(1)
"""A lasting thread: torch 2.11 crashes where the first thread that compiled has ended."""
ELSEWHERE.submit(int).result()  # which starts it


def unnoticed(function: Callable[[], Any]) -> Any:
    """Call a function in the lasting thread without the stage hearing of it, which a trace would refuse."""
    with intercepting(NOBODY):
        return ELSEWHERE.submit(function).result(LONG)


NOBODY: Any = None


def stage(module: nn.Module, engine: str) -> tuple[Any, Any, Any]:
    apply, params, buffers = fs.functionalize(module)
    return (apply if engine == "closures" else fs.compile(apply, backend=engine)), params, buffers


def compiles() -> bool:
    """Tell whether torch.compile compiles in this thread."""
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch.compile(lambda t: t.sin() + 1, backend=backend)(torch.randn(3))
    return bool(seen)


class Calls(nn.Module):
    """Calls a function in its forward."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.proj, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        self.function()
        return self.proj(x)


def settings() -> list[Any]:
    """What the process has in common that a stage might change."""
    return [
        vars(nn.Module)["__call__"],
        vars(nn.Module)["__getattr__"],
        torch.compiler.is_compiling(),
        torch.compiler.is_dynamo_compiling(),
        torch.backends.cudnn.enabled,
        torch._dynamo.config.error_on_nested_fx_trace,
        torch._dynamo.eval_frame._stance.stance,
        torch.fx._symbolic_trace._is_fx_tracing_flag
        if hasattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag")
        else None,
        torch.is_grad_enabled(),
    ]


@ENGINES
def test_another_thread_finds_all_settings_and_torch_compile_as_they_were(engine: str) -> None:
    before = settings()
    found: list[Any] = []

    def elsewhere() -> None:
        found.append(unnoticed(lambda: (settings(), compiles())))

    apply, params, buffers = stage(Calls(elsewhere), engine)
    fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))
    assert found == [(before, True)]
    assert settings() == before
    assert compiles()


def test_stages_that_overlap_leave_torch_compile_on() -> None:
    first_in, second_in, first_done = (threading.Event() for _ in range(3))

    def run(module: nn.Module) -> None:
        apply, params, buffers = stage(module, "closures")
        fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))

    def first() -> None:
        run(Calls(lambda: (first_in.set(), second_in.wait(LONG))))
        first_done.set()

    def second() -> None:
        assert first_in.wait(LONG)
        run(Calls(lambda: (second_in.set(), first_done.wait(LONG))))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    assert compiles()


@ENGINES
def test_torch_compile_goes_on_after_a_stage_that_fails(engine: str) -> None:
    def fail() -> None:
        raise KeyError("mine")

    apply, params, buffers = stage(Calls(fail), engine)
    before = settings()
    with pytest.raises((KeyError, fs.StageError)):
        fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))
    assert settings() == before
    assert compiles()


@ENGINES
@pytest.mark.parametrize("fullgraph", [False, True])
def test_functions_that_were_compiled_run_as_written_within_a_stage(engine: str, fullgraph: bool) -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last = Shares(nn.Linear(4, 4))
            self.last.compile(backend="eager", fullgraph=fullgraph)
            self.act = torch.compile(lambda t: t.sin(), backend="eager", fullgraph=fullgraph)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.first(x)))

    module, x = Compiled(), torch.randn(3, 4)
    apply, params, buffers = stage(module, engine)
    output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
    grads = pullback(torch.ones(3, 4))[1]()
    module(x).sum().backward()
    torch.testing.assert_close(output, module(x))
    torch.testing.assert_close(grads, {name: p.grad for name, p in module.named_parameters()})


class Shares(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.regions = nn.ModuleList(parts), False

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False) if self.regions else part(x)
        return x


def race(modules: list[nn.Module], engine: str, rounds: int, regions: bool = False) -> None:
    """Run F, I and W of each module's stage, with parameters of its own, in a thread each."""
    x = torch.randn(4, 8)
    stages = [stage(module, engine) for module in modules]
    params = [{name: p * (k + 1) for name, p in stage[1].items()} for k, stage in enumerate(stages)]
    held = [(name, p) for module in modules for name, p in module.named_parameters()]

    def eager(k: int) -> list[Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in params[k].items()}
        leaf = x.clone().requires_grad_()
        out = torch.func.functional_call(modules[k], {**leaves, **stages[k][2]}, (leaf,))
        return [out.detach(), *torch.autograd.grad(out.sum(), [leaf, *leaves.values()])]

    def split(k: int) -> list[Tensor]:
        apply, _, buffers = stages[k]
        output, _, pullback = fs.stage_vjp(apply, params[k], buffers, x)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        return [output, dx, *weight_pullback().values()]

    expected = [eager(k) for k in range(len(modules))]  # by torch, a region would use the module's own
    for module in modules:
        module.regions = regions
    barrier = threading.Barrier(len(modules))

    def work(k: int) -> None:
        barrier.wait(LONG)
        for _ in range(rounds):
            torch.testing.assert_close(split(k), expected[k])

    with ThreadPoolExecutor(len(modules)) as pool:
        for done in [pool.submit(work, k) for k in range(len(modules))]:
            done.result(timeout=LONG)
    now = [(name, p) for module in modules for name, p in module.named_parameters()]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(held, now, strict=True))


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


@ENGINES
@pytest.mark.parametrize("regions", [False, True], ids=["plain", "checkpointed"])
def test_stages_that_share_a_submodule_do_not_see_each_others_tensors(engine: str, regions: bool) -> None:
    shared = layers()
    race([Shares(shared), Shares(shared)], engine, 20, regions)


@ENGINES
def test_stages_that_share_in_a_ring_neither_mix_nor_wait_forever(engine: str) -> None:
    parts = [layers() for _ in range(3)]
    pairs = itertools.permutations(parts, 2)
    race([Shares(a, b) for a, b in pairs], engine, 10)


@ENGINES
def test_a_stage_and_a_stage_of_its_part_share_it(engine: str) -> None:
    whole = Shares(layers(), layers())
    race([whole.parts[1], whole, whole.parts[0][0]], engine, 20)


def test_a_stage_is_looked_at_by_its_trace_while_nobody_else_has_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, shared, waiting = torch.randn(4, 8), layers(), []
    other = stage(Shares(shared), "closures")

    def looking(*given: Any) -> Recorder:
        waiting.append(ELSEWHERE.submit(fs.stage_vjp, *other, x))
        with pytest.raises(TimeoutError):
            waiting[0].result(timeout=0.2)
        return Recorder(*given)

    monkeypatch.setattr(sys.modules["funcstage.engines.graph.compile"], "Recorder", looking)
    output = fs.stage_vjp(*stage(Shares(shared), "aten"), x)[0]
    torch.testing.assert_close(waiting[0].result(timeout=LONG)[0], output)


def test_what_a_trace_has_read_is_looked_at_again_while_nobody_else_has_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, shared, waiting = torch.randn(4, 8), layers(), []
    other, now = stage(Shares(shared), "closures"), Reads.now

    def looking(reads: Reads) -> Any:
        if len(waiting) < 2:  # once within the trace and once behind it
            waiting.append(ELSEWHERE.submit(fs.stage_vjp, *other, x))
            with pytest.raises(TimeoutError):
                waiting[-1].result(timeout=0.2)
        return now(reads)

    monkeypatch.setattr(Reads, "now", looking)
    output = fs.stage_vjp(*stage(Shares(shared), "aten"), x)[0]
    assert len(waiting) == 2
    for each in waiting:
        torch.testing.assert_close(each.result(timeout=LONG)[0], output)


def while_another_thread_has(shared: nn.Module, read: Callable[[], Any]) -> Any:
    """What a function returns that is called while another thread runs a stage, with tensors of its own."""
    reading: list[Any] = []

    def reads(*_: Any) -> None:
        if not reading:
            with intercepting(NOBODY):
                reading.append(ELSEWHERE.submit(read))
                with pytest.raises(TimeoutError):
                    reading[0].result(timeout=0.2)

    handle = shared.register_forward_pre_hook(reads)
    apply, params, buffers = stage(Shares(shared), "closures")
    fs.stage_vjp(apply, {name: p * 0 for name, p in params.items()}, buffers, torch.ones(4, 8))
    handle.remove()
    return reading[0].result(timeout=LONG)


def test_a_module_is_functionalized_while_nobody_else_has_its_parts() -> None:
    shared = layers()
    _, params, _ = while_another_thread_has(shared, lambda: fs.functionalize(Shares(shared)))
    assert [p.data_ptr() for p in params.values()] == [p.data_ptr() for p in shared.parameters()]


def test_a_module_is_functionalized_by_one_thread_at_a_time() -> None:
    """Each looks for hooks by means of one of its own, which another would take for the user's."""
    shared, switching = layers(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            stages = [pool.submit(fs.functionalize, Shares(shared)) for _ in range(400)]
    finally:
        sys.setswitchinterval(switching)
    assert all(stage.result().params.keys() == stages[0].result().params.keys() for stage in stages)


class ReadsAfter(Shares):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


@pytest.mark.filterwarnings("ignore:.*It runs uncompiled")
def test_a_stage_is_taken_in_parts_while_nobody_else_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, x = layers(), torch.randn(4, 8)
    apply, params, buffers = stage(ReadsAfter(shared), "aten")
    found: list[Any] = []
    compiled = sys.modules["funcstage.engines.graph.compile"]
    parts = compiled.Parts

    def of(module: nn.Module, part: Any) -> Any:
        found.append([p.data_ptr() for p in module.parameters()])
        return parts(module, part)

    monkeypatch.setattr(compiled, "Parts", of)
    monkeypatch.setattr(compiled.CompiledStage, "found", refused)
    while_another_thread_has(shared, lambda: fs.stage_vjp(apply, params, buffers, x))
    assert found == [[p.data_ptr() for p in shared.parameters()]]


def refused(self: Any, call: Any) -> Any:
    """What a trace says of a stage that reads values."""
    raise ReadsValue("it reads the value of a tensor")


def test_one_module_in_several_stages_is_lent_to_one_thread_at_a_time() -> None:
    module = layers()
    race([module] * 3, "closures", 20)


def test_stages_that_share_nothing_run_side_by_side() -> None:
    meeting = threading.Barrier(2)
    act = nn.GELU()  # an object that holds nothing is shared by many models

    def run(_: int) -> None:
        module = nn.Sequential(Calls(lambda: meeting.wait(LONG)), act)
        apply, params, buffers = stage(module, "closures")
        fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))


def test_a_run_that_starts_over_leaves_who_waits_where_it_is() -> None:
    meeting, go = threading.Barrier(2), SimpleQueue[None]()
    arrived = ELSEWHERE.submit(lambda: (go.get(timeout=LONG), meeting.wait(LONG)))

    def meet() -> None:
        go.put(None)
        until = time.monotonic() + LONG
        while not meeting._count and time.monotonic() < until:  # type: ignore[attr-defined]
            time.sleep(0.001)
        meeting.wait(LONG)  # of which a stage is told, so that it starts over on a plain tape

    apply, params, buffers = stage(Calls(meet), "closures")
    fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))
    assert arrived.result(LONG)[1] in (0, 1)


# What libraries ask.
ASKED = [
    lambda: torch.compiler.is_compiling(),
    lambda: torch._dynamo.is_compiling(),
    lambda: torch._utils.is_compiling(),
    lambda: torch.compiler.is_dynamo_compiling(),
]


@pytest.mark.parametrize("asked", ASKED, ids=["compiler", "dynamo", "utils", "is_dynamo_compiling"])
def test_a_trace_looks_like_a_compilation_to_its_own_thread_alone(asked: Callable[[], bool]) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            assert not unnoticed(asked)
            if not asked() and mask.all():
                return self.proj(x)
            return self.proj(x) * mask[..., None]

    module, x = Masked(), torch.randn(2, 3, 4)
    apply, params, buffers = stage(module, "aten")
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.rand(2, 3) > 0.5):
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, mask)
        (dx, _), weight_pullback = pullback(torch.ones_like(output))
        leaf = x.clone().requires_grad_()
        expected = module(leaf, mask)
        grads = torch.autograd.grad(expected.sum(), [leaf, *module.parameters()])
        torch.testing.assert_close([output, dx, *weight_pullback().values()], [expected, *grads])
    assert not asked()


def test_a_stage_that_runs_by_levels_does_not_look_like_a_compilation() -> None:
    found: list[bool] = []
    apply, params, buffers = stage(Calls(lambda: found.extend(ask() for ask in ASKED)), "closures")
    fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))
    assert found == [False] * len(ASKED)


def test_torchs_encoder_with_a_mask_is_traced_without_gradients() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.TransformerEncoder(layer, 1).eval()
    apply, params, buffers = stage(module, "aten")
    x, padded = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        output, _ = apply(params, buffers, x, src_key_padding_mask=padded)
        expected = module(x, src_key_padding_mask=padded)
    torch.testing.assert_close(output[~padded], expected[~padded])


def by_a_pool(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        left, right = pool.map(lambda part: part(x), (a, b))
    return left + right


def by_a_lasting_pool(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    return ELSEWHERE.submit(a, x).result() + b(x)


def by_threads(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, part=part: found.update({i: part(x)}))
        for i, part in enumerate((a, b))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0] + found[1]


def by_a_pool_of_multiprocessing(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    pool = multiprocessing.pool.ThreadPool(2)
    try:
        left, right = pool.map(lambda part: part(x), (a, b))
    finally:
        pool.terminate()
    return left + right


def in_a_region(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(by_a_pool, a, b, x, use_reentrant=False)
    return out


class Branches(nn.Module):
    """Two branches, computed by other threads, and what the forward has drawn and counted."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.how, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.how(self.a, self.b, nn.functional.dropout(x))


BRANCHES = [by_a_pool, by_a_lasting_pool, by_threads, by_a_pool_of_multiprocessing, in_a_region]


@pytest.mark.parametrize("how", BRANCHES)
def test_what_a_stage_lets_other_threads_compute_has_its_gradients(how: Callable[..., Tensor]) -> None:
    module, x = Branches(how), torch.randn(3, 4)
    apply, params, buffers = stage(module, "closures")
    for n in range(1, 3):
        torch.manual_seed(n)
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        after = torch.get_rng_state()
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        grads = weight_pullback()
        assert module.calls == n
        torch.manual_seed(n)
        leaf = x.clone().requires_grad_()
        expected = module(leaf)
        module.calls -= 1
        assert torch.equal(torch.get_rng_state(), after)
        wanted = torch.autograd.grad(expected.sum(), [leaf, *module.parameters()])
        torch.testing.assert_close([output, dx, *grads.values()], [expected.detach(), *wanted])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", BRANCHES)
def test_a_compiled_stage_refuses_what_other_threads_compute_of_it(how: Callable[..., Tensor]) -> None:
    module = Branches(how)
    apply, params, buffers = stage(module, "aten")
    with pytest.raises(fs.TraceError, match="The uncompiled `apply` works"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))
    assert module.calls == 0


def test_where_a_stage_is_differentiated_in_turn_its_threads_are_refused() -> None:
    apply, params, buffers = stage(Branches(by_a_pool), "closures")
    with pytest.raises(fs.StageError, match=r"starts threads .* Pass detached"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4).requires_grad_())


def test_other_threads_start_threads_meanwhile() -> None:
    before = threading.Thread.start, ThreadPoolExecutor.submit
    inside, done, asked = threading.Event(), threading.Event(), threading.current_thread()
    module = Calls(lambda: (inside.set(), done.wait(LONG)))
    apply, params, buffers = stage(module, "closures")
    running = threading.Thread(target=fs.stage_vjp, args=(apply, params, buffers, torch.randn(2, 4)))
    running.start()
    inside.wait(LONG)
    assert ELSEWHERE.submit(lambda: threading.current_thread() is not asked).result()
    done.set()
    running.join(LONG)
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == before


def test_a_recorder_in_another_thread_outlasts_a_trace() -> None:
    before = settings()
    inside, recorded, traced = threading.Event(), threading.Event(), threading.Event()

    def record() -> list[str]:
        def body(x: Tensor) -> Tensor:
            recorded.set()
            traced.wait(LONG)
            return x * 2

        inside.wait(LONG)
        return [node.op for node in torch.fx.symbolic_trace(body).graph.nodes]

    def meet(module: nn.Module, args: Any, output: Tensor) -> None:
        with intercepting(NOBODY):
            inside.set()
            recorded.wait(LONG)

    module = nn.Linear(4, 4)
    module.register_forward_hook(meet)
    apply, params, buffers = stage(module, "aten")
    recording = ELSEWHERE.submit(record)
    fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))
    traced.set()
    assert recording.result() == ["placeholder", "call_function", "output"]
    assert settings() == before


def test_a_stage_may_record_a_graph_of_modules_in_its_forward() -> None:
    recorded: list[str] = []

    def record() -> None:
        graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).graph
        recorded.extend(node.op for node in graph.nodes)

    apply, params, buffers = stage(Calls(record), "aten")
    fs.stage_vjp(apply, params, buffers, torch.randn(2, 4))
    assert recorded == ["placeholder", "call_module", "call_module", "output"]


def test_stages_take_turns_where_they_share_a_submodule_that_holds_something() -> None:
    shared, activation = nn.Linear(2, 2), nn.ReLU()
    one, other = nn.Sequential(shared, activation), nn.Sequential(shared)
    apart = nn.Sequential(nn.Linear(2, 2), activation)
    of_one, of_other, of_apart = map(set, map(look_over, (one, other, apart)))
    assert of_one & of_other
    assert not of_one & of_apart
    # In one order wherever they meet, so that nobody waits for one who waits for him.
    both = look_over(nn.Sequential(one, apart))
    assert {*both} >= of_one | of_apart
    together = look_over(nn.Sequential(apart, one))
    assert [lock for lock in together if lock in both] == [lock for lock in both if lock in together]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_who_takes_a_stage_takes_all_of_its_locks(n: int) -> None:
    layers = [nn.Linear(2, 2) for _ in range(n)]
    for layer in layers[1:]:
        look_over(layer)
    module = nn.ModuleList(layers)
    locks = look_over(module)
    assert len(locks) == n

    def is_free(lock: Any) -> bool:
        if taken := lock.acquire(blocking=False):
            lock.release()
        return bool(taken)

    with locked(module):
        assert not any(ELSEWHERE.map(is_free, locks))
    assert all(ELSEWHERE.map(is_free, locks))


@pytest.mark.parametrize("phase", ["I", "W", "a sum of W"])
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_of_two_threads_that_use_one_pullback_up_the_second_is_told(engine: str, phase: str) -> None:
    module, x, grad = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), VECTORS, VECTORS.cos()
    function, params, buffers = stage(module, engine)
    expected = torch.autograd.grad(module(x), [*module.parameters()], grad)
    together = threading.Barrier(2)

    def use(pullback: Any, weight_pullback: Any) -> Any:
        together.wait()
        try:
            if phase == "I":
                return pullback(grad)[1]
            return weight_pullback() if phase == "W" else fs.stage_backward_weight(weight_pullback)
        except fs.ConsumedError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            pullback = fs.stage_vjp(function, params, buffers, x)[2]
            weight_pullback = None if phase == "I" else pullback(grad)[1]
            ends = [pool.submit(use, pullback, weight_pullback) for _ in range(2)]
            first, second = sorted((end.result() for end in ends), key=lambda e: isinstance(e, Exception))
            assert isinstance(second, fs.ConsumedError)
            grads = first() if phase == "I" else first
            torch.testing.assert_close([*grads.values()], [*expected])


USES: dict[str, Callable[[Any, Any], Any]] = {
    "I": lambda pullback, _: [*pullback(VECTORS)[0], *pullback(VECTORS)[1]().values()],
    "W": lambda _, weights: [*weights().values()],
    "a sum of W": lambda _, weights: [*fs.stage_backward_weight([weights]).values()],
    "pieces of W": lambda _, weights: [*fs.stage_backward_weight(weights.split(2)).values()],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("engine", ["closures", "aten"])
def test_who_uses_a_pullback_while_another_thread_does_waits_for_it(
    engine: str, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its residuals are read by one at a time: what the first call keeps, the second one may use up."""
    function, params, buffers = stage(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), engine)
    pullback = fs.stage_vjp(function, params, buffers, VECTORS)[2]
    grads, weights = pullback(VECTORS, retain=True)
    expected = [*(grads if use == "I" else ()), *weights(retain=True).values()]
    waiting: list[Any] = []
    first, run = (pullback, "input_vjp") if use == "I" else (weights, "weight_vjp")
    running = getattr(type(first._tape), run)

    def taken(*args: Any, **kwargs: Any) -> Any:
        if not waiting:
            waiting.append(ELSEWHERE.submit(USES[use], functools.partial(pullback, retain=True), weights))
            with pytest.raises(TimeoutError):
                waiting[0].result(timeout=0.2)
        return running(*args, **kwargs)

    monkeypatch.setattr(type(first._tape), run, taken)
    first(VECTORS, retain=True) if use == "I" else first(retain=True)
    torch.testing.assert_close(waiting[0].result(LONG), expected)


def test_what_a_thread_failed_to_begin_another_one_may_use(monkeypatch: Any) -> None:
    function, params, buffers = stage(nn.Sequential(nn.Linear(4, 4), nn.GELU()), "aten")
    pullback = fs.stage_vjp(function, params, buffers, VECTORS)[2]
    with monkeypatch.context() as patched:
        patched.setattr(type(pullback._tape), "input_vjp", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pullback(VECTORS)
    assert ELSEWHERE.submit(pullback, VECTORS).result(LONG)[1]().keys() == {"0.weight", "0.bias"}


VECTORS = torch.linspace(-1, 1, 12).view(3, 4)


def test_what_a_reverse_pass_reads_of_a_module_is_lent_to_one_thread_at_a_time() -> None:
    module, entered = nn.Linear(2, 2), threading.Event()
    look_over(module)
    states = state_of([module])

    def enter() -> None:
        with locked_and_swapped(states):
            entered.set()

    other = threading.Thread(target=enter)
    with locked(module):
        other.start()
        assert not entered.wait(0.2)
    other.join()
    assert entered.is_set()
