"""The messages of a rank's stages: withheld while a step is rehearsed, noted while one is recorded.

A schedule asks its stages for what to send and to receive. Here they answer for a while in another way;
neither torch nor the process group is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch

_RECEIVE = ("get_fwd_recv_ops", "get_bwd_recv_ops")
_SEND = ("get_fwd_send_ops", "get_bwd_send_ops")

Method: TypeAlias = Callable[..., Any]


@contextmanager
def withheld(stages: Sequence[Any]) -> Iterator[None]:
    """Let the stages neither send nor receive: what they are waiting for is zeros."""
    kept: list[Any] = []  # as messages are on their way until the end of a step

    def instead(name: str, asked: Method) -> Method:
        def answer(chunk: int) -> list[Any]:
            operations = asked(chunk)
            kept.extend(operations)
            if name in _RECEIVE:
                with torch.no_grad():
                    for operation in operations:
                        operation.tensor.zero_()
            return []

        return answer

    with in_place_of(stages, (*_RECEIVE, *_SEND), instead), _without_replicas(stages), _rehearsing(stages):
        yield


@contextmanager
def noted(stages: Sequence[Any], memory: list[object]) -> Iterator[None]:
    """Add to a list what has the memory of messages: a graph reads and writes there as long as it lives."""

    def instead(_: str, asked: Method) -> Method:
        def answer(chunk: int) -> list[Any]:
            operations = asked(chunk)
            memory.extend(operation.tensor for operation in operations)
            return operations

        return answer

    with in_place_of(stages, _RECEIVE, instead):
        yield
    memory.extend(getattr(stage, "route", None) for stage in stages)


@contextmanager
def in_place_of(
    stages: Sequence[Any], names: Sequence[str], instead: Callable[[str, Method], Method]
) -> Iterator[None]:
    """Let stages have what `instead` makes of methods, of each from its name and itself."""
    with ExitStack() as stack:
        for stage in stages:
            for name in names:
                own = vars(stage).get(name)
                setattr(stage, name, instead(name, getattr(stage, name)))
                stack.callback(_put_back, stage, name, own)
        yield


def _put_back(stage: Any, name: str, own: Any) -> None:
    if own is None:
        delattr(stage, name)
    else:
        setattr(stage, name, own)


@contextmanager
def _without_replicas(stages: Sequence[Any]) -> Iterator[None]:
    """Let no stage of ours average its gradients over replicas, which may have nothing to rehearse."""
    before = [(stage, stage._replicas) for stage in stages if getattr(stage, "_replicas", None) is not None]
    for stage, _ in before:
        stage._replicas = None
    try:
        yield
    finally:
        for stage, replicas in before:
            stage._replicas = replicas


@contextmanager
def _rehearsing(stages: Sequence[Any]) -> Iterator[None]:
    """Let stages of ours whose messages go on a route give away their operations instead."""
    ours = [stage for stage in stages if hasattr(stage, "rehearses")]
    for stage in ours:
        stage.rehearses = True
    try:
        yield
    finally:
        for stage in ours:
            stage.rehearses = False
