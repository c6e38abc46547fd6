"""Offloading: what a pullback holds waits in host memory, and comes back when it is used."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from funcstage.away import FAR, Away, Sent, send
from funcstage.errors import StageError, StructureError
from funcstage.linear import Linear
from funcstage.pullback import Pullback
from funcstage.state.grad_mode import outside_inference_mode
from funcstage.state.undone import undone_if_interrupted
from funcstage.trees import describe
from funcstage.weight_pullback import WeightPullback

AnyPullback = TypeVar("AnyPullback", bound=Linear[Any])


def offload(pullback: AnyPullback) -> AnyPullback:
    """Move the residuals of I and W, or of W alone, from a CUDA device to the host's memory.

    They are copied to pinned memory on a stream beside the one that computes, and copied back when the
    pullback is used, or earlier: `prefetch` begins that. Their memory on the device is free as soon as the
    copy is done and nobody else holds it; an argument that the caller keeps stays there, too, and those that
    an uncompiled stage differentiates stay until I has run.

    Dense tensors are moved. Sparse ones, DTensors and other subclasses, and those that a transform has
    wrapped stay where they are. Where all are in host memory already, as on the CPU, nothing is copied.

    Args:
        pullback: from `stage_vjp`, or a weight pullback, or a piece of one; consumed.

    Returns:
        The same pullback, with the same rules of use. Its `nbytes` counts residuals wherever they are. Once
        it is used with `retain=True`, they stay on the device.

    Raises:
        StructureError: if it is no pullback.
        ConsumedError: if it was used before.
        StageError: if a residual is on a device that is neither CUDA's nor the host, if the gradients are
            differentiated in turn, or if a CUDA graph is being captured.

    Example:
        >>> import torch, funcstage as fs
        >>> apply, params, buffers = fs.functionalize(torch.nn.Linear(3, 2))
        >>> output, buffers, pullback = fs.stage_vjp(apply, params, buffers, torch.ones(4, 3))
        >>> _, weight_pullback = pullback(torch.ones(4, 2))
        >>> waiting = fs.offload(weight_pullback)
        >>> fs.prefetch(waiting)  # one action ahead, say
        >>> waiting()["bias"]
        tensor([4., 4.])
    """
    offloaded, sent = leave(pullback)
    if sent is not None:
        sent.free_when_done()
    return offloaded


@undone_if_interrupted
@outside_inference_mode
def leave(pullback: AnyPullback) -> tuple[AnyPullback, Sent | None]:
    """Do what `offload` does, and return what is on its way, whose memory on the device is not free yet."""
    _check(pullback, "offload")
    tape = pullback._live()
    if pullback._away is not None:
        return pullback._given_to(tape, pullback._away, "offloaded"), None
    if tape.differentiated:
        raise StageError(
            f"offload cannot move the residuals of {pullback.stage}, which are differentiated in turn: "
            "copies in host memory would have no gradient. Leave offload out, or detach parameters, "
            "arguments and cotangents."
        )
    leaves = tape.leaves()
    elsewhere = {leaf.device.type for leaf in leaves}.difference(FAR, ("cpu", "cuda", "meta"))
    if elsewhere:
        raise StageError(
            f"{pullback.stage} has residuals on {min(elsewhere)!r}, but offload moves only those on "
            "CUDA. Move them yourself, with optree.tree_map(lambda t: t.cpu(), pullback, "
            "namespace='funcstage'), and back before use."
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise StageError(
            f"offload cannot move the residuals of {pullback.stage} while a CUDA graph is captured: the "
            "graph's memory stays its own. Leave offload out there, or do not capture the step."
        )
    sent = send(leaves, tape.lent)
    if not sent.moved:
        return pullback._given_to(tape, None, "offloaded"), None
    watches = tuple([watch.within(sent.leaving) for watch in pullback._watches])
    moved = {*sent.moved}
    devices = [leaf.device if i in moved else None for i, leaf in enumerate(leaves)]
    away = Away(devices, watches, sent.events)
    return pullback._given_to(tape.with_leaves(sent.leaves), away, "offloaded"), sent


@undone_if_interrupted
@outside_inference_mode
def prefetch(pullback: Pullback[Any] | WeightPullback[Any]) -> None:
    """Begin to copy the residuals of an offloaded pullback back, on a stream beside the one that computes.

    The device's memory for them is taken now. What uses the pullback waits for the copies; the host does not.

    Args:
        pullback: any; nothing happens where nothing is in host memory for `offload`.

    Raises:
        StructureError: if it is no pullback.
        ConsumedError: if it was used before.
    """
    _check(pullback, "prefetch")
    tape = pullback._live()
    if pullback._away is not None:
        pullback._away.fetch(tape.leaves())


def _check(pullback: object, verb: str) -> None:
    if not isinstance(pullback, (Pullback, WeightPullback)):
        raise StructureError(
            f"{verb} takes a pullback of stage_vjp or a weight pullback, got {describe(pullback)}."
        )
