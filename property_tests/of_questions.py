"""Situations in which a forward asks what tensors are, hooks nodes, or has other threads compute."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from situation import Around, Situation, map_differentiable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funcstage import trees


class _Asking(Around):
    """Scales its output by what it learns about a tensor that it is handed."""

    def __init__(self, inner: nn.Module, question: str) -> None:
        super().__init__(inner)
        self.question = question
        self.own = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.held = nn.Buffer(torch.ones(2, 2))
        for tensor in (self.own, self.frozen, self.held):
            tensor.tag = 2.0  # type: ignore[attr-defined]
        self.marks = MARKS[question](self) if question in MARKS else None

    def forward(self, *args: Any, asked: Any, **kwargs: Any) -> Any:
        scale = 1 + float(QUESTIONS[self.question][1](self, asked))
        output = super().forward(*args, **kwargs)
        return map_differentiable(lambda t: t * scale, output)


def _tagged(k: int) -> Tensor:
    tensor: Any = torch.ones(2, 2)
    tensor.tag = float(k)
    return tensor


def _in_a_region(asks: Callable[[Tensor], Any]) -> Callable[[Any, Any], float]:
    def question(m: Any, asked: Tensor) -> float:
        answers: list[float] = []

        def region(t: Tensor) -> Tensor:
            answers.append(float(asks(t)))
            return t.sum()

        checkpoint(region, m.own.T, use_reentrant=False)
        return answers[0]

    return question


QUESTIONS: dict[str, tuple[Callable[[Any, int], Any], Callable[[Any, Any], Any]]] = {
    "a parameter": (lambda m, k: m.own, lambda m, t: t is m.own),
    "a frozen parameter": (lambda m, k: m.frozen, lambda m, t: t is m.frozen),
    "a buffer": (lambda m, k: m.held, lambda m, t: t is m.held),
    "a parameter, by id": (lambda m, k: m.own, lambda m, t: len({id(t), id(m.own)})),
    "a parameter, as a key": (lambda m, k: m.own, lambda m, t: len({t: 1, m.own: 2})),
    "one of two": (lambda m, k: [torch.ones(2)] * 2, lambda m, t: t[0] is t[1]),
    "one memory": (lambda m, k: m.held, lambda m, t: t.is_set_to(t) + (t.data_ptr() == t.data_ptr())),
    "attributes": (lambda m, k: _tagged(k), lambda m, t: t.tag),
    "all attributes": (lambda m, k: _tagged(k), lambda m, t: len(vars(t))),
    "a parameter's attribute": (lambda m, k: 0, lambda m, t: m.own.tag + m.frozen.tag + m.held.tag),
    "all of a parameter's": (lambda m, k: 0, lambda m, t: len(vars(m.own))),
    "its class": (lambda m, k: nn.Parameter(torch.ones(2), k > 9), lambda m, t: isinstance(t, nn.Parameter)),
    "a base": (lambda m, k: 0, lambda m, t: (m.own.T._base is m.own) + 2 * (m.own._base is None)),
    "a view": (lambda m, k: 0, lambda m, t: m.own._is_view() + 2 * m.own.T._is_view()),
    "one of a list": (lambda m, k: 0, lambda m, t: any(m.own is each for each in m.marks)),
    "one of a set": (lambda m, k: 0, lambda m, t: m.frozen in m.marks),
    "a key": (lambda m, k: 0, lambda m, t: m.marks.get(m.own, 1)),
    "one of ids": (lambda m, k: 0, lambda m, t: id(m.own) in m.marks),
    "one that a function knows": (lambda m, k: 0, lambda m, t: m.marks(m.own)),
    "a base in a region": (lambda m, k: 0, _in_a_region(lambda t: t._base is None)),
    "a view in a region": (lambda m, k: 0, _in_a_region(lambda t: t._is_view())),
}
"""What is handed over in which microbatch, and what is asked of it."""

MARKS: dict[str, Callable[[Any], Any]] = {
    "one of a list": lambda m: [m.own],
    "one of a set": lambda m: {m.frozen},
    "a key": lambda m: {m.own: 2.0},
    "one of ids": lambda m: {id(m.own)},
    "one that a function knows": lambda m: (lambda own: lambda tensor: tensor is own)(m.own),
}
"""Where the module holds its own tensors besides, for some of the questions."""


@dataclass(frozen=True)
class Asked(Situation):
    """The forward asks which object a tensor is, what is noted on it, or what it is a view of."""

    question: str
    refusable = ("closures", "aten")

    def build(self, module: nn.Module) -> nn.Module:
        return _Asking(module, self.question)

    def handed(self, module: nn.Module, k: int) -> dict[str, Any]:
        asking = next(m for m in module.modules() if isinstance(m, _Asking))
        return {"asked": QUESTIONS[self.question][0](asking, k)}


class _HookingNodes(Around):
    def __init__(self, inner: nn.Module, before: bool) -> None:
        super().__init__(inner)
        self.before, self.scale = before, nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)

        def hooked(leaf: Any) -> Any:
            if not (trees.is_differentiable(leaf) and leaf.requires_grad):
                return leaf
            leaf = leaf * self.scale if self.before else torch.sin(leaf)
            if self.before:
                leaf.grad_fn.register_prehook(_scaled)
            else:
                leaf.grad_fn.register_hook(lambda grads, _: _scaled(grads))
            return leaf

        return trees.map_leaves(hooked, output)


def _scaled(grads: Any) -> Any:
    return tuple(None if grad is None else 3 * grad for grad in grads)


@dataclass(frozen=True)
class NodeHook(Situation):
    """The forward puts a hook on a node of its tape: after it, or before one that weights have a share in."""

    before: bool = False
    refusable = ("closures", "aten")

    def build(self, module: nn.Module) -> nn.Module:
        return _HookingNodes(module, self.before)


class _Helper:
    """A thread that computes what it is given, by some means, and answers by the like."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.jobs = kind()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while True:
            job, answer = self.jobs.get()
            try:
                answer.put(job())
            except BaseException as error:  # which the forward raises
                answer.put(error)

    def ask(self, job: Callable[[], Any]) -> Any:
        answer = self.kind()
        self.jobs.put((job, answer))
        found = answer.get(timeout=10)
        if isinstance(found, BaseException):
            raise found
        return found


class _Signals:
    """A queue of events."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.there = threading.Event()

    def put(self, value: Any) -> None:
        self.held.append(value)
        self.there.set()

    def get(self, timeout: float | None = None) -> Any:
        assert self.there.wait(timeout)
        value = self.held.pop(0)
        if not self.held:
            self.there.clear()
        return value


EXECUTOR = ThreadPoolExecutor(1)
HELPERS = {kind.__name__: _Helper(kind) for kind in (queue.Queue, queue.SimpleQueue, _Signals)}


def _in_a_new_thread(job: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(job()))
    thread.start()
    thread.join(10)
    return found[0]


def _loaded(job: Callable[[], Any]) -> Any:
    """Only data comes from the thread."""
    HELPERS["Queue"].jobs.put((lambda: torch.full((), 2.0, dtype=torch.float64), LOADED))
    return job() * LOADED.get(timeout=10)


LOADED: Any = queue.SimpleQueue()
THREADS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "a queue": lambda job: HELPERS["Queue"].ask(job),
    "a simple queue": lambda job: HELPERS["SimpleQueue"].ask(job),
    "an event": lambda job: HELPERS["_Signals"].ask(job),
    "an executor": lambda job: EXECUTOR.submit(job).result(10),
    "a new thread": _in_a_new_thread,
    "a loader": _loaded,
}
"""How a forward has another thread compute."""


class _Threading(Around):
    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__(inner)
        self.how, self.scale = how, nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)

        return map_differentiable(lambda t: THREADS[self.how](lambda: torch.sin(t) * self.scale), output)


@dataclass(frozen=True)
class Threads(Situation):
    """The forward has a thread compute, which was there before or is new."""

    how: str
    refusable = ("aten",)

    def build(self, module: nn.Module) -> nn.Module:
        return _Threading(module, self.how)
