"""Threads that were there before the stage and compute for it: gradients are eager's, or it is refused."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcstage as fs

Job = Callable[[], Tensor]
DONE = "no more"


class ByEvent:
    """One job at a time, signalled by events."""

    def __init__(self) -> None:
        self.given, self.done = threading.Event(), threading.Event()
        self.job: Any = None
        self.answer: Any = None

    def give(self, job: Any) -> None:
        self.job = job
        self.done.clear()
        self.given.set()

    def take(self) -> Any:
        self.given.wait()
        self.given.clear()
        return self.job

    def reply(self, answer: Tensor) -> None:
        self.answer = answer
        self.tell()

    def result(self) -> Tensor:
        assert self.hears()
        answer: Tensor = self.answer
        return answer

    def tell(self) -> None:
        self.done.set()

    def hears(self) -> bool:
        return self.done.wait(60)


class BySemaphore(ByEvent):
    """The same by semaphores."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answered = threading.Semaphore(0), threading.BoundedSemaphore(1)
        self.answered.acquire()

    def give(self, job: Any) -> None:
        self.job = job
        self.asked.release()

    def take(self) -> Any:
        self.asked.acquire()
        return self.job

    def tell(self) -> None:
        self.answered.release()

    def hears(self) -> bool:
        return self.answered.acquire(timeout=60)


class ByCondition(ByEvent):
    """The same by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = threading.Condition()

    def give(self, job: Any) -> None:
        self.done.clear()
        with self.condition:
            self.job = job
            self.condition.notify_all()

    def take(self) -> Any:
        with self.condition:
            self.condition.wait_for(lambda: self.job is not None)
            job, self.job = self.job, None
            return job


class BySimpleQueue(ByEvent):
    """Jobs through a queue that is written in C, whose calls nobody sees, and answers by an event."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def give(self, job: Any) -> None:
        self.jobs.put(job)  # after which the thread may be done before anybody looks

    def take(self) -> Any:
        return self.jobs.get()

    def hears(self) -> bool:
        heard = super().hears()
        self.done.clear()
        return heard


class BySimpleQueues(BySimpleQueue):
    """Answers through such a queue, too."""

    def tell(self) -> None:
        self.answers.put(None)

    def hears(self) -> bool:
        self.answers.get(timeout=60)
        return True


class ByExecutor(ByEvent):
    """Jobs for an executor of one thread, which has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.executor = ThreadPoolExecutor(1)
        self.executor.submit(int).result()

    def give(self, job: Any) -> None:
        self.future = None if job is DONE else self.executor.submit(job)

    def take(self) -> Any:
        return DONE

    def result(self) -> Tensor:
        assert self.future is not None
        return self.future.result(60)


WORKERS: dict[str, Any] = {}


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[str]:
    """A thread that works, by the name of its class; ends afterwards."""
    works = request.param()
    name = type(works).__name__
    WORKERS[name] = works

    def loop() -> None:
        while (job := works.take()) is not DONE:
            works.reply(job())

    thread = threading.Thread(target=loop)
    thread.start()
    yield name
    WORKERS.pop(name, None)
    works.give(DONE)
    thread.join(60)


class Asking(nn.Module):
    """Has a thread compute with its activations and parameters."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self.proj, self.last, self.worker = nn.Linear(4, 4), nn.Linear(4, 4), worker

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        WORKERS[self.worker].give(lambda: torch.sin(y) @ self.last.weight)
        return self.last(WORKERS[self.worker].result())


HIDDEN: list[list[list[list[Any]]]] = []


class AskingInDepth(Asking):
    """Has it from where nobody looks."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        HIDDEN[-1][0][0][0].give(lambda: torch.sin(y) @ self.last.weight)
        return self.last(HIDDEN[-1][0][0][0].result())


class AskingByTable(Asking):
    """Has it through a function in a table."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        result: Tensor = self.last(TABLE["ask"](lambda: torch.sin(y) @ self.last.weight))
        return result


def _ask(job: Job) -> Tensor:
    (worker,) = TABLED.values()
    worker.give(job)
    answer: Tensor = worker.result()
    return answer


TABLE = {"ask": _ask}
TABLED: dict[str, Any] = {}


SEEN = (ByEvent, BySemaphore, ByCondition, ByExecutor)
KINDS = (*SEEN, BySimpleQueue, BySimpleQueues)


@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("worker", KINDS, indirect=True)
def test_what_a_waiting_thread_computes_has_its_gradients(worker: str, argnums: tuple[int, ...]) -> None:
    module, x = Asking(worker).double(), torch.randn(3, 4, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()])
    apply, params, buffers = fs.functionalize(module)
    for _ in range(2):
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        torch.testing.assert_close([*weight_pullback().values()], [*wanted[1:]])
        assert dx is None if argnums == () else torch.allclose(dx, wanted[0])


@pytest.mark.parametrize("worker", SEEN, indirect=True)
def test_a_compiled_stage_refuses_a_waiting_thread(worker: str) -> None:
    apply, params, buffers = fs.functionalize(Asking(worker))
    with pytest.raises(fs.TraceError, match=r"gives one something to do, or waits for one, .* Do it outside"):
        fs.stage_vjp(fs.compile(apply, backend="aten", fullgraph=True), params, buffers, torch.randn(3, 4))


@pytest.mark.parametrize("worker", [BySimpleQueue], indirect=True)
def test_waiting_for_work_that_nobody_saw_being_given_is_refused(
    worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    HIDDEN.append([[[WORKERS[worker]]]])
    monkeypatch.setitem(globals(), "WORKERS", {})
    apply, params, buffers = fs.functionalize(AskingInDepth(worker))
    with pytest.raises(fs.StageError, match=r"was not seen to give it anything to do .* queue\.Queue"):
        fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))


class Prefetching(nn.Module):
    """Adds what a thread loads; at once, or behind a region."""

    def __init__(self, loaded: Any) -> None:
        super().__init__()
        self.proj, self.loaded = nn.Linear(4, 4), loaded

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.loaded.get(timeout=60)


@pytest.mark.parametrize("argnums", [(), (0,)])
@pytest.mark.parametrize("kind", [queue.Queue, queue.SimpleQueue])
def test_what_a_thread_only_hands_in_is_a_constant(kind: Any, argnums: tuple[int, ...]) -> None:
    loaded, x = kind(), torch.randn(3, 4)
    values = [torch.full((3, 4), float(n)) for n in range(4)]
    thread = threading.Thread(target=lambda: [loaded.put(value) for value in values])
    module = Prefetching(loaded)
    apply, params, buffers = fs.functionalize(module)
    thread.start()
    for value in values:
        output, _, pullback = fs.stage_vjp(apply, params, buffers, x, argnums=argnums)
        torch.testing.assert_close(output, module.proj(x).detach() * value)
        (dx,), weight_pullback = pullback(torch.ones_like(output))
        torch.testing.assert_close(weight_pullback()["proj.bias"], value.sum(0))
        assert argnums == () or torch.equal(dx, value @ params["proj.weight"])
    thread.join(60)


def of_a_cell(jobs: Any, answers: Any) -> Callable[..., Any]:
    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        jobs.put(lambda: x * params)
        return answers.get(), buffers

    return apply


@pytest.mark.parametrize("argument", [False, True])
def test_queues_of_a_function_or_among_its_arguments_are_found(argument: bool) -> None:
    jobs, answers = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()

    def handed(params: Tensor, buffers: Any, x: Tensor, queues: Any) -> Any:
        queues[0].put(lambda: x * params)
        return queues[1].get(), buffers

    thread = threading.Thread(target=lambda: answers.put(jobs.get()()))
    thread.start()
    apply = handed if argument else of_a_cell(jobs, answers)
    args = ((jobs, answers),) if argument else ()
    x, w = torch.randn(3), torch.randn(3)
    _, _, pullback = fs.stage_vjp(apply, w, (), x, *args, argnums=0)
    (dx, *_), weight_pullback = pullback(torch.ones(3))
    thread.join(60)
    torch.testing.assert_close((dx, weight_pullback()), (w, x))


@pytest.mark.parametrize("worker", [BySimpleQueues], indirect=True)
def test_queues_behind_functions_in_tables_are_found(worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLED, worker, WORKERS[worker])
    monkeypatch.setitem(globals(), "WORKERS", {})
    apply, params, buffers = fs.functionalize(AskingByTable(worker))
    output, _, pullback = fs.stage_vjp(apply, params, buffers, torch.randn(3, 4))
    (dx,), weight_pullback = pullback(torch.ones_like(output))
    assert dx is not None
    assert all(grad is not None for grad in weight_pullback().values())
