"""Two optimizer steps of a library's model, as a pipeline and whole, for the tests of this folder.

The reference is plain eager autograd through the unsplit model, microbatch by microbatch, as batch norm
and the pipeline take them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import funcstage as fs
from funcstage.pipelining import pipeline_value_and_grad

ENGINES = ("closures", "aten")
STAGES = 4
MICROBATCHES = 4
BATCH = 8
STEPS = 2

Inputs = dict[str, Tensor]


def microbatches(inputs: Inputs) -> list[Inputs]:
    """Cut a batch along dimension 0."""
    parts = {name: value.chunk(MICROBATCHES) for name, value in inputs.items()}
    return [{name: chunks[i] for name, chunks in parts.items()} for i in range(MICROBATCHES)]


def check_two_steps(
    model: nn.Module,
    stages: Sequence[nn.Module],
    inputs: Inputs,
    read: Callable[[Any], Tensor],
    *,
    engine: str,
    whole: nn.Module | None = None,
    rtol: float = 1e-9,
) -> None:
    """Compare a pipeline's training with the unsplit model's.

    Args:
        model: the model, in the mode to be trained in; its parameters are trained.
        stages: modules that hold the model's parameters and buffers.
        inputs: a batch, by the names of the model's arguments, in the order of the first stage's.
        read: takes from an output, the model's or the last stage's, the tensor to train.
        engine: "closures", or "aten" for `fs.compile(backend="aten")`.
        whole: what to compare with, of the same parameters and buffers; by default a copy of the model.
        rtol: of everything; of gradients, relative to the largest of the model.
    """
    whole = copy.deepcopy(model) if whole is None else whole
    batches = microbatches(inputs)
    with torch.no_grad():
        example = read(copy.deepcopy(whole)(**batches[0]))
    targets = torch.rand(BATCH, *example.shape[1:], dtype=example.dtype)

    def loss_fn(output: Any, target: Tensor) -> Tensor:
        return (read(output) - target).square().mean()

    functions = [fs.functionalize(stage) for stage in stages]
    applies = [fs.compile(f.apply, backend="aten") if engine == "aten" else f.apply for f in functions]
    step = pipeline_value_and_grad(applies, loss_fn, schedule="ZBVZeroBubble", num_microbatches=MICROBATCHES)
    buffers = [function.buffers for function in functions]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, whole)]
    for _ in range(STEPS):
        loss, buffers, grads = step([f.params for f in functions], buffers, tuple(inputs.values()), targets)
        for stage, of_stage in zip(stages, grads, strict=True):
            for name, grad in of_stage.items():
                parameter = stage.get_parameter(name)
                if grad is not None:  # tied parameters have one from each stage that uses them
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        expected_loss = torch.zeros_like(loss)
        for batch, target in zip(batches, targets.chunk(MICROBATCHES), strict=True):
            part = loss_fn(whole(**batch), target) / MICROBATCHES
            part.backward()
            expected_loss += part.detach()
        _check_close("loss", loss, expected_loss, rtol, 0.0)
        # Some gradients are sums that cancel to nothing, such as those of keys' biases.
        floor = rtol * max(p.grad.abs().max().item() for p in whole.parameters() if p.grad is not None)
        for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None and theirs.grad is not None:
                _check_close(f"gradient of {name}", ours.grad, theirs.grad, rtol, floor)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        _check_close(name, ours, theirs, rtol, rtol)
    names = {buffer: name for name, buffer in model.named_buffers()}
    for stage, of_stage in zip(stages, buffers, strict=True):
        for name, buffer in stage.named_buffers():
            if buffer in names:  # others are constants of a trace
                _check_close(name, of_stage[name], whole.get_buffer(names[buffer]), rtol, rtol)


def _check_close(name: str, ours: Tensor, theirs: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda said: f"{name}: {said}")
