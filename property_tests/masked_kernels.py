"""A split asks every backward operation for some of its gradients, then for the rest: which survive it?

    python -m property_tests.masked_kernels [--device cuda] [--only TEXT]

For all differentiable operators of torch's database and some kernels that it leaves out, on one tape: the
gradients of some tensors, then those of the others, as I and W ask for them, for every choice of some; in
every memory format. They must be what one backward for all of them gives. No code of ours runs: this is
about torch's kernels, and what they do not survive the engines must not ask for. Operators run in a process
of their own, which is started anew behind what takes it down.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from property_tests import operators

SAMPLES = 24
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float64: 1e-9}
"""Of the largest magnitude of a gradient: kernels for one gradient may sum in another order."""

LIMIT = 120.0
"""Seconds for one sample."""

Call = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
Sample = tuple[Call, tuple[Tensor, ...], tuple[Tensor, ...]]

KNOWN = {
    "group_norm": "before torch 2.14, where dX is not asked for, in channels_last on the CPU: the engines "
    "run the contiguous kernel instead (`funcstage/engines/rules/group_norm.py`)",
}
"""What is seen, by a part of the operator's name, and what the engines do about it."""


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, for `"expanded"` the first one everywhere, elsewhere in memory."""
    if layout == "channels_last" and tensor.dim() in (4, 5):
        form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=form)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and tensor.numel():
        return tensor.flatten()[0].expand(tensor.shape)
    if layout == "strided" and tensor.dim():
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    return tensor.contiguous()


def recurrent(kind: str, make: Callable[..., Tensor]) -> Sample:
    gates, states = {"lstm": (4, 2), "gru": (3, 1), "rnn_tanh": (1, 1)}[kind]
    weights = [make(gates * 4, 3), make(gates * 4, 4), make(gates * 4), make(gates * 4)]

    def call(tensors: Sequence[Tensor], _: Any) -> Any:
        x, *rest = tensors
        hidden = rest[0] if states == 1 else tuple(rest[:2])
        function = getattr(torch, kind)
        return function(x, hidden, rest[states:], True, 1, 0.0, True, False, False)

    return call, (make(5, 2, 3), *(make(1, 2, 4) for _ in range(states)), *weights), ()


def cell(kind: str, make: Callable[..., Tensor]) -> Sample:
    gates, states = {"lstm_cell": (4, 2), "gru_cell": (3, 1)}[kind]

    def call(tensors: Sequence[Tensor], _: Any) -> Any:
        x, *rest = tensors
        return getattr(torch, kind)(x, rest[0] if states == 1 else tuple(rest[:2]), *rest[states:])

    hidden = [make(2, 4) for _ in range(states)]
    return call, (make(2, 3), *hidden, make(gates * 4, 3), make(gates * 4, 4), make(gates * 4)), ()


def attention(backend: SDPBackend, bias: bool, make: Callable[..., Tensor]) -> Sample:
    def call(tensors: Sequence[Tensor], _: Any) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors)

    given = [make(2, 4, 8, 16) for _ in range(3)]
    return call, (*given, *([make(2, 4, 8, 8)] if bias else [])), ()


def convolution(dim: int, groups: int, transposed: bool, plain: bool, make: Callable[..., Tensor]) -> Sample:
    name = f"conv{'_transpose' if transposed else ''}{dim}d"

    def call(tensors: Sequence[Tensor], _: Any) -> Any:
        on = not plain  # without oneDNN and cuDNN: the slow kernels, dilated or not
        with torch.backends.mkldnn.flags(enabled=on), torch.backends.cudnn.flags(enabled=on):
            return getattr(F, name)(*tensors, groups=groups, padding=1, dilation=dim)

    shape = [2, 4, 7, 6, 7][: dim + 2]
    return call, (make(*shape), make(4, 4 // groups, *[3] * dim), make(4)), ()


def batch_norm(training: bool, plain: bool, make: Callable[..., Tensor]) -> Sample:
    def call(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
        x, weight, bias = tensors
        with torch.backends.cudnn.flags(enabled=not plain):
            return F.batch_norm(x, others[0].clone(), others[1].clone(), weight, bias, training)

    return call, (make(2, 4, 5, 6), make(4), make(4)), (make(4).detach(), make(4).detach().abs() + 0.5)


def group_norm(dim: int, make: Callable[..., Tensor]) -> Sample:
    shape = [2, 4, 5, 6, 3][:dim]
    return lambda t, _: F.group_norm(t[0], 2, t[1], t[2]), (make(*shape), make(4), make(4)), ()


OWN: dict[str, Callable[[Callable[..., Tensor]], Sample]] = {
    **{f"own: {kind}": lambda make, k=kind: recurrent(k, make) for kind in ("lstm", "gru", "rnn_tanh")},  # type: ignore[misc]
    **{f"own: {kind}": lambda make, k=kind: cell(k, make) for kind in ("lstm_cell", "gru_cell")},  # type: ignore[misc]
    **{
        f"own: attention, {backend.name}, bias {bias}": lambda make, b=backend, i=bias: attention(b, i, make)  # type: ignore[misc]
        for backend, bias in itertools.product(
            (
                SDPBackend.MATH,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.CUDNN_ATTENTION,
            ),
            (False, True),
        )
    },
    **{
        f"own: convolution{d}, groups {g}, transposed {t}, plain {p}": (
            lambda make, d=d, g=g, t=t, p=p: convolution(d, g, t, p, make)  # type: ignore[misc]
        )
        for d, g, t, p in itertools.product((1, 2, 3), (1, 4), (False, True), (False, True))
        if not (t and g > 1)
    },
    **{
        f"own: batch_norm, training {t}, plain {p}": lambda make, t=t, p=p: batch_norm(t, p, make)  # type: ignore[misc]
        for t, p in itertools.product((False, True), (False, True))
    },
    **{f"own: group_norm{d}": lambda make, d=d: group_norm(d, make) for d in (3, 4, 5)},  # type: ignore[misc]
}
"""Kernels that the database's calls do not reach."""


def samples_of(name: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    torch.manual_seed(0)
    if name in OWN:
        yield OWN[name](lambda *shape: torch.randn(*shape, device=device, dtype=dtype).requires_grad_())
        return
    op = operators.OPERATORS[name]
    if not op.supports_dtype(dtype, device):
        return
    found = list(islice(op.sample_inputs(device, dtype, requires_grad=True), operators.SEARCHED))
    for sample in found[:: max(1, -(-len(found) // SAMPLES))]:
        yield operators.closed(op.op, sample)


class Tape:
    """One forward of a sample."""

    def __init__(self, sample: Sample, layout: str) -> None:
        call, tensors, others = sample
        of_tensors = "contiguous" if layout == "expanded" else layout
        self.leaves = [laid_out(t.detach().clone(), of_tensors).detach().requires_grad_() for t in tensors]
        torch.manual_seed(0)  # for random operators
        flat = operators.trees.flatten(call(self.leaves, others))[0]
        self.outputs = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
        self.cotangents = [laid_out(torch.randn_like(t), layout) for t in self.outputs]

    def grads(self, chosen: Sequence[int], retain: bool = False) -> list[Tensor | None]:
        leaves = [self.leaves[i] for i in chosen]
        return [
            *torch.autograd.grad(
                self.outputs, leaves, self.cotangents, allow_unused=True, retain_graph=retain
            )
        ]


def halves(n: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What I asks for and what W does: every choice, of many tensors single ones and all but one."""
    sizes = range(1, n) if n <= 4 else sorted({1, n - 1})
    for first in itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in sizes):
        yield first, tuple(i for i in range(n) if i not in first)


def findings(sample: Sample, layout: str) -> Iterator[str]:
    """Say of a sample which gradients are not what one backward gives; nothing where that raises."""
    n = len(sample[1])
    try:
        whole, again = (Tape(sample, layout).grads(range(n)) for _ in range(2))
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        yield "eager raises"
        return
    floor = 1e-2 * max(magnitude(g) for g in whole)
    if not all(alike(a, b, floor) for a, b in zip(again, whole, strict=True)):
        yield "eager differs from itself"  # sums in no fixed order, memory that nothing is written to
        return
    for first, rest in halves(n):
        try:
            tape = Tape(sample, layout)
            found = dict(zip(first, tape.grads(first, retain=True), strict=True))
            found.update(zip(rest, tape.grads(rest), strict=True))
        except Exception as error:
            yield f"RAISES: {first} then {rest}: {type(error).__name__}: {str(error)[:200]}"
            if "CUDA error" in str(error):
                raise
            continue
        wrong = [i for i in range(n) if not alike(found[i], whole[i], floor)]
        yield f"DIFFERS: {first} then {rest}: gradients {wrong}" if wrong else "equal"


def alike(found: Tensor | None, right: Tensor | None, floor: float) -> bool:
    """Whether they are equal but for rounding; a gradient that is zero but for that is below the floor."""
    if found is None or right is None:
        return found is right or not any(t.any() for t in (found, right) if t is not None)
    if right.layout is not torch.strided:
        found, right = found.to_dense(), right.to_dense()
    right, found = right.detach(), found.detach()
    tolerance = TOLERANCES.get(right.dtype, 1e-3) * max(magnitude(right), floor, 1e-6)
    return found.shape == right.shape and torch.allclose(found, right, 0, tolerance, equal_nan=True)


def magnitude(grad: Tensor | None) -> float:
    """Of the largest finite element."""
    if grad is None:
        return 0.0
    dense = grad.detach() if grad.layout is torch.strided else grad.detach().to_dense()
    finite = dense[dense.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def child(names: Sequence[str], device: str, skip: Sequence[str]) -> None:
    """Print a line for each name, dtype and layout before it runs, and lines for what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # which rounds float32 to ten bits
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype in itertools.product(names, DTYPES):
        try:
            found = list(samples_of(name, device, dtype))
        except Exception:
            continue  # it needs another device, or a package that is not installed
        found = [sample for sample in found if len(sample[1]) > 1]  # there is no choice among one
        for layout in LAYOUTS if found else ():
            label = f"{name}, {str(dtype)[6:]}, {layout}"
            if label in skip:
                continue
            print(f"case: {label}", flush=True)
            for i, sample in enumerate(found):
                faulthandler.dump_traceback_later(LIMIT, exit=True)
                for finding in findings(sample, layout):
                    print(finding if finding == "equal" else f"{finding} [sample {i}]", flush=True)
            faulthandler.cancel_dump_traceback_later()


def run(device: str, names: Sequence[str]) -> tuple[Counter[str], dict[str, list[str]]]:
    """Run all names in children: what was seen how often, and the findings of each name."""
    counts: Counter[str] = Counter()
    wrong: dict[str, list[str]] = {}
    skip: list[str] = []
    pending, label = list(names), ""
    while pending:
        command = [sys.executable, "-m", __spec__.name, "--device", device, "--child"]
        given = "\n".join([*pending, "", *skip])
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(given)
            process.stdin.close()
            name = ""
            for line in map(str.rstrip, process.stdout):
                if line.startswith("case: "):
                    label = line.removeprefix("case: ")
                    name = label.rsplit(", ", 2)[0]
                    counts["cases"] += 1
                elif line.startswith(("equal", "eager ")):
                    counts[line.partition(" [")[0]] += 1
                else:
                    counts[line.partition(":")[0]] += 1
                    wrong.setdefault(name, []).append(f"{label}: {line}")
            process.wait()
            errors.seek(0)
            said = errors.read()
        if process.returncode == 0:
            break
        if not name:
            raise SystemExit(f"the child did not start: {said[-2000:]}")
        counts["CRASHES"] += 1
        reason = f"signal {-process.returncode}" if process.returncode < 0 else said[-300:]
        wrong.setdefault(name, []).append(f"{label}: CRASHES: {reason}")
        skip.append(label)
        pending = pending[pending.index(name) :]
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m property_tests.masked_kernels", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="try operators whose name has TEXT")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        names, skip = (part.splitlines() for part in sys.stdin.read().partition("\n\n")[::2])
        child(names, options.device, skip)
        sys.stdout.flush()
        os._exit(0)  # libraries that are taken down themselves are not what is asked about
    names = [name for name in (*OWN, *operators.OPERATORS) if options.only in name]
    start = time.monotonic()
    counts, wrong = run(options.device, names)
    known = {name: next((why for part, why in KNOWN.items() if part in name), None) for name in wrong}
    for name, lines in wrong.items():
        print(f"{name}: {known[name] or 'NOT KNOWN'}")
        print(*(f"    {line}" for line in lines), sep="\n")
    where = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{len(names)} operators, torch {torch.__version__}, {where}, {time.monotonic() - start:.0f} s")
    print(", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    sys.exit(None in known.values())


if __name__ == "__main__":
    main()
