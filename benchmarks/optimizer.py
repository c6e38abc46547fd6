"""The optimizer in W: how much memory a step needs at most, with gradients that exist at once and without.

    python -m benchmarks.optimizer [--size L] [--microbatches 1 4] [--device meta]

A stage of `benchmarks.split` with AdamW, which writes into parameters and states. From the last I on, when
the weight gradients of all microbatches are still to be computed, MiB above parameters and states: what is
held then, and the most that there is until all parameters are updated. By CUDA's allocator, or elsewhere by
the tensors that are alive, for which the device `meta` does as well as any.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funcstage as fs
from benchmarks.split import MIB, SIZES, make_stage


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they are there, but not of these."""

    def __init__(self, resting: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in resting}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def restart(self) -> None:
        """The most from now on."""
        self.peak = self.now

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Allocated:
    """The same as CUDA's allocator counts it."""

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def counted(resting: list[Tensor]) -> Iterator[Alive | Allocated]:
    """Count on the device of what is there already."""
    if resting[0].is_cuda:
        yield Allocated()
    else:
        with Alive(resting) as alive:
            yield alive


def adamw(param: Tensor, grad: Tensor, state: tuple[Tensor, Tensor]) -> None:
    """A step of AdamW in place, without the correction of the first steps."""
    mean, square = state
    mean.lerp_(grad, 0.1)
    square.mul_(0.99).addcmul_(grad, grad, value=0.01)
    param.mul_(1 - 1e-4).addcdiv_(mean, square.sqrt().add_(1e-8), value=-1e-3)


def gradients_first(pending: list[Any], params: dict[str, Tensor], states: dict[str, Any]) -> None:
    """All gradients, then all updates, each of which lets its gradient go."""
    grads = fs.stage_backward_weight(pending)
    pending.clear()
    for name, param in params.items():
        adamw(param, grads.pop(name), states[name])


def as_they_come(parts: int) -> Callable[[list[Any], dict[str, Tensor], dict[str, Any]], None]:
    """Each parameter as soon as its gradient is there, with W in so many pieces."""

    def run(pending: list[Any], params: dict[str, Tensor], states: dict[str, Any]) -> None:
        pieces = [weight_pullback.split(parts) for weight_pullback in pending]
        pending.clear()
        in_order = [piece for column in zip(*pieces, strict=True) for piece in column]
        del pieces
        fs.stage_backward_weight(in_order, update=adamw, state=states)

    return run


SYSTEMS = {
    "all gradients, then the optimizer": gradients_first,
    **{f"the optimizer in W, {n} pieces": as_they_come(n) for n in (1, 2, 4, 8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "meta")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    stage = make_stage(SIZES[options.size], options.device)
    apply, params, buffers = fs.functionalize(stage.module)
    states = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    there = [stage.x, stage.cotangent, *params.values(), *itertools.chain(*states.values())]
    gradients = f"{sum(p.nbytes for p in params.values()) / MIB:.0f} MiB of gradients"
    print(f"torch {torch.__version__}, {options.device}, size {options.size}: {gradients}")
    print("| engine | microbatches | | held before W, MiB | most in W |")
    print("| --- | --- | --- | --- | --- |")
    for engine, function in {"uncompiled": apply, "aten": fs.compile(apply, backend="aten")}.items():
        fs.stage_vjp(function, params, buffers, stage.x)  # compiled
        for count in options.microbatches:
            for name, run in SYSTEMS.items():
                with counted(there) as memory:
                    resting = memory.now
                    pending: list[Any] = []
                    for _ in range(count):
                        output, _, pullback = fs.stage_vjp(function, params, buffers, stage.x)
                        _, weight_pullback = pullback(stage.cotangent)
                        pending.append(weight_pullback)
                        del output, pullback, weight_pullback
                    gc.collect()
                    held = (memory.now - resting) / MIB
                    memory.restart()
                    run(pending, params, states)
                    most = (memory.peak - resting) / MIB
                print(f"| {engine} | {count} | {name} | {held:,.0f} | {most:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
