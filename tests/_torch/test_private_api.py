"""Which private name of torch has moved.

funcstage stands on private parts of torch. Here each is looked up (`test_torch_has_the_private_name`), and
what is built on it is compared with plain eager autograd (`test_what_stands_on_private_names_works`): where
that fails, the message says which names are behind it. `python .ci/torches.py` runs this on all torches that
were tried.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import importlib.util
import inspect
import linecache
import random
import re
import warnings
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_process import one_process
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

pytestmark = [pytest.mark.versions, pytest.mark.filterwarnings("ignore:.*CUDA")]

spec = importlib.util.find_spec("funcstage")
assert spec is not None
assert spec.origin is not None
PACKAGE = Path(spec.origin).parent
MOVED = f"torch {torch.__version__} has moved {{}}, on which {{}} stands: find its successor."


# The names, as the package spells them.


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def names_in(path: Path) -> dict[str, tuple[str, set[int]]]:
    """The private names of torch in a file: what it calls each, and on which lines."""
    tree = ast.parse(path.read_text())
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            aliases |= {
                (a.asname or "torch"): (a.name if a.asname else "torch")
                for a in node.names
                if a.name.partition(".")[0] == "torch"
            }

    def spelled(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return aliases.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := spelled(node.value)):
            return f"{owner}.{node.attr}"
        return None

    found: dict[str, tuple[str, set[int]]] = {}
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            inner.add(id(node.value))
        name = spelled(node) if id(node) not in inner else None
        if name and is_private(name) and not name.endswith((".__get__", ".__name__")):
            found.setdefault(name, (ast.unparse(node), set()))[1].add(node.lineno)  # type: ignore[attr-defined]
    for alias, name in aliases.items():
        if is_private(name) and not any(other.startswith(name) for other in found):
            found[name] = (alias, set())
    return {name: at for name, at in found.items() if not any(f.startswith(f"{name}.") for f in found)}


NAMES: dict[str, dict[str, tuple[str, set[int]]]] = {
    path.relative_to(PACKAGE).as_posix(): names
    for path in sorted(PACKAGE.rglob("*.py"))
    if (names := names_in(path))
}
FILES: dict[str, list[str]] = {}
for _file, _names in NAMES.items():
    for _name in _names:
        FILES.setdefault(_name, []).append(_file)
NOT_YET_IN_2_11 = (
    *("_StageBackwardMeta", "_StageForwardMeta", "_TensorMeta", "_TensorMeta.from_tensor"),
    "extract_tensor_meta",
)


def looked_up(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    found: Any = None
    for i, part in enumerate(parts):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(".".join(parts[: i + 1]))
        found = importlib.import_module(part) if found is None else getattr(found, part)
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_torch_has_the_private_name(name: str) -> None:
    owner = "torch.distributed.pipelining._utils"
    if name in {f"{owner}.{late}" for late in (*NOT_YET_IN_2_11, "_derive_grad_metas")} and is_2_11():
        return
    try:
        looked_up(name)
    except (AttributeError, ModuleNotFoundError):
        pytest.fail(MOVED.format(name, ", ".join(f"funcstage/{file}" for file in FILES[name])))


def is_2_11() -> bool:
    return torch.__version__.startswith("2.11.")


# What is built on them.

Use = Callable[[], None]
USES: dict[Use, tuple[str, ...]] = {}


def stands_on(*files: str) -> Callable[[Use], Use]:
    """Say in which files of the package the private names are that this takes through their use."""

    def note(use: Use) -> Use:
        USES[use] = files
        return use

    return note


def assert_split_as_eager(
    module: nn.Module, *args: Tensor, engine: str | None = None, **options: Any
) -> None:
    """F, I and W, twice over, are eager's forward and backward."""
    import funcstage as fs

    torch.manual_seed(1)
    reference = copy.deepcopy(module)
    leaves = [arg.clone().requires_grad_(arg.is_floating_point()) for arg in args]
    output = reference(*leaves)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    apply, params, buffers = fs.functionalize(module)
    if engine is not None:
        apply = fs.compile(apply, backend=engine, **options)
    sums: Any = None
    for _ in range(2):
        torch.manual_seed(1)
        found, new_buffers, pullback = fs.stage_vjp(apply, params, buffers, *args)
        dxs, weight_pullback = pullback(cotangent)
        sums = fs.stage_backward_weight(weight_pullback, sums)
        torch.testing.assert_close(found, output.detach(), rtol=1e-4, atol=1e-5)
        for dx, leaf in zip(dxs, leaves, strict=True):
            torch.testing.assert_close(dx, leaf.grad, rtol=1e-4, atol=1e-5)
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert sums.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (sums[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(sums[name], 2 * grad, rtol=1e-3, atol=1e-4)
    state = {name: buffer for name, buffer in reference.named_buffers() if name in new_buffers}
    torch.testing.assert_close({name: new_buffers[name] for name in state}, state)


class Doubled(torch.autograd.Function):
    """Its forward takes `ctx`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return 2 * grad * weight if wanted[0] else None, 2 * (grad * x).sum(0) if wanted[1] else None


@torch.library.custom_op("funcstage_private::halved", mutates_args=())
def halved(x: Tensor, weight: Tensor, by: float = 0.5) -> Tensor:
    return x * weight * by


@halved.register_fake
def _(x: Tensor, weight: Tensor, by: float = 0.5) -> Tensor:
    return torch.empty_like(x)


halved.register_autograd(
    lambda ctx, grad: (grad * ctx.weight * ctx.by, (grad * ctx.x).sum(0) * ctx.by, None),
    setup_context=lambda ctx, inputs, output: ctx.__dict__.update(
        zip(("x", "weight", "by"), inputs, strict=True)
    ),
)


class Custom(nn.Module):
    """Custom functions, an operator with a formula, and a backward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.inner = nn.Linear(4, 4)
        self.inner.register_full_backward_hook(lambda module, grads, outputs: None)

    def forward(self, x: Tensor) -> Tensor:
        return halved(Doubled.apply(self.inner(x), self.weight), self.weight)


class Region(nn.Module):
    """A checkpointed region: with dropout, all of it is recomputed, else all but the matrix products."""

    def __init__(self, selective: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.options: dict[str, Any] = (
            {"context_fn": lambda: create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])}
            if selective
            else {}
        )

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            y = self.down(self.up(x).tanh())
            return y.exp() if self.options else functional.dropout(y, 0.5)

        return x + checkpoint(body, x, use_reentrant=False, **self.options)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.lstm, self.packed = nn.LSTM(4, 3, batch_first=True), packed

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.lstm(x)[0]
        lengths = torch.tensor([3, 2])
        run = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(run)[0], batch_first=True)[0]


class UnderAutocast(nn.Module):
    """Composites of float32 in a bfloat16 region."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.points = nn.Linear(4, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            distances = torch.cdist(x.float(), self.points)
            attended = functional.scaled_dot_product_attention(*[self.linear(x)[None]] * 3)
        return distances.float().sum(-1) + attended.float().sum(-1)[0]


class QuasiRandom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        engine = torch.quasirandom.SobolEngine(4, scramble=True, seed=0)
        return self.linear(x) * engine.fast_forward(1).draw(3)


class Frequent(nn.Module):
    """What has composites, views and zeros without memory in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.rand(4)), nn.Parameter(torch.eye(4) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(self.scale, self.scale, indexing="ij")
        return torch.cat([x @ (rows + columns), x * self.scale], -1) @ torch.cat(
            [torch.linalg.inv(self.matrix)] * 2
        )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.PReLU(), nn.GroupNorm(2, 4), nn.Dropout(0.5)
    )


ROWS = torch.randn(3, 4)
SEQUENCES = torch.randn(2, 3, 4)


@stands_on("_torch/functorch.py", "_torch/operators.py", "_torch/tensors.py", "_torch/modules.py")
def levels() -> None:
    for module in (Attention(), convolutional(), Recurrent(), Recurrent(packed=True)):
        assert_split_as_eager(module, SEQUENCES)
    assert_split_as_eager(Frequent(), ROWS)
    assert_split_as_eager(QuasiRandom(), ROWS)
    assert_split_as_eager(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()), ROWS)


@stands_on("_torch/modes.py")
def a_forward_that_is_interrupted() -> None:
    import funcstage as fs

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.overrides.BaseTorchFunctionMode().__enter__()
            raise KeyboardInterrupt

    apply, params, buffers = fs.functionalize(Broken())
    with pytest.raises(KeyboardInterrupt):
        fs.stage_vjp(apply, params, buffers, ROWS)
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0


@stands_on("_torch/functorch.py")
def levels_within_transforms() -> None:
    import funcstage as fs

    module = nn.Linear(4, 2)
    apply, params, buffers = fs.functionalize(module)

    def grads(x: Tensor) -> Any:
        _, _, pullback = fs.stage_vjp(apply, params, buffers, x)
        return pullback(torch.ones(2))[1]()["weight"]

    torch.testing.assert_close(torch.func.vmap(grads)(ROWS), ROWS[:, None].expand(3, 2, 4))


@stands_on("_torch/operators.py")
def group_norms() -> None:
    images = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    for engine in (None, "aten"):
        assert_split_as_eager(nn.GroupNorm(2, 4), images, engine=engine)


@stands_on("_torch/operators.py", "_torch/settings.py")
def autocast() -> None:
    for engine in (None, "aten"):
        import funcstage as fs

        module = UnderAutocast()
        apply, params, buffers = fs.functionalize(module)
        apply = fs.compile(apply, backend=engine) if engine else apply
        _, _, pullback = fs.stage_vjp(apply, params, buffers, ROWS)
        (dx,), weight_pullback = pullback(torch.ones(3))
        leaf = ROWS.clone().requires_grad_()
        module(leaf).sum().backward()
        torch.testing.assert_close(dx, leaf.grad, rtol=0.05, atol=0.05)
        torch.testing.assert_close(weight_pullback()["points"], module.points.grad, rtol=0.02, atol=0.02)


@stands_on("_torch/interception.py", "_torch/functorch.py", "_torch/tracing.py")
def regions() -> None:
    for selective in (False, True):
        for engine in (None, "aten"):
            assert_split_as_eager(Region(selective), ROWS, engine=engine)

    def region(x: Tensor) -> Tensor:
        return x.tanh() + random.random()

    def apply(params: Tensor, buffers: Any, x: Tensor) -> Any:
        return checkpoint(region, x * params, use_reentrant=False), buffers

    import funcstage as fs

    for stops_early in (False, True):
        random.seed(0)
        with set_checkpoint_early_stop(stops_early):
            _, _, pullback = fs.stage_vjp(apply, ROWS, (), ROWS)
        pullback(ROWS)
        left = random.random()
        random.seed(0)
        assert left == [random.random() for _ in range(3)][1 if stops_early else 2]


@stands_on("_torch/calls.py")
def calls_of_modules() -> None:
    import funcstage as fs
    from funcstage.testing import check_stage as check

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) * x.detach().sum().item()

    own = nn.Module.__call__
    check(Around(), ROWS, engines=lambda apply: fs.compile(apply, backend="aten", fullgraph=False))
    assert nn.Module.__call__ is own


@stands_on("_torch/custom.py", "_torch/interception.py", "_torch/operators.py")
def custom_functions() -> None:
    for engine in (None, "aten"):
        assert_split_as_eager(Custom(), ROWS, engine=engine)


@stands_on("_torch/dynamo.py", "_torch/interception.py")
def compiled_parts() -> None:
    import torch._dynamo

    module = nn.Linear(4, 4)
    inner = torch.compile(module.forward, backend="eager")

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return inner(x) if not torch.compiler.is_compiling() else module(x)

    import funcstage as fs

    for engine in (None, "aten"):
        apply, params, buffers = fs.functionalize(Compiled())
        apply = fs.compile(apply, backend=engine) if engine else apply
        _, _, pullback = fs.stage_vjp(apply, params, buffers, ROWS)
        grads = pullback(torch.ones(3, 4))[1]()
        torch.testing.assert_close(grads["module.weight"], ROWS.sum(0).expand(4, 4))


@stands_on("_torch/tape.py")
def the_eager_tape() -> None:
    from funcstage import autograd

    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    module[2].weight.requires_grad_()
    x = ROWS.clone().requires_grad_()
    wanted = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    output = module(x)
    grads, groups = autograd.stage_backward_input(
        [output], [torch.ones_like(output)], [x], module.parameters()
    )
    autograd.stage_backward_weight(module.parameters(), groups)
    torch.testing.assert_close([grads[0], *(p.grad for p in module.parameters())], list(wanted))
    view = output.view(-1)
    torch.testing.assert_close(view.detach(), output.detach().flatten())


@stands_on("_torch/namespaces.py")
def attributes_put_aside() -> None:
    from funcstage._torch.namespaces import noting_reads, tells_reads

    module, read = nn.Linear(4, 3), list[Any]()
    assert tells_reads(nn.Linear, "in_features")
    with noting_reads([module], [{"in_features", "out_features"}], lambda i, name: read.append(name)):
        module(ROWS)
        assert not read
        assert module.in_features == 4
    assert {*read} == {"in_features"}


@stands_on("_torch/recorded.py")
def nodes_recorded_again() -> None:
    """One of three layers is traced, and the others' nodes are copies of its."""
    import funcstage as fs

    layers = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) for _ in range(3)))
    x = ROWS[None]
    apply, params, buffers = fs.functionalize(layers)
    output, _, pullback = fs.stage_vjp(fs.compile(apply, backend="aten"), params, buffers, x)
    (grad,), weight_pullback = pullback(torch.ones_like(output))
    wanted = x.clone().requires_grad_()
    expected = torch.autograd.grad(layers(wanted).sum(), [wanted, *layers.parameters()])
    torch.testing.assert_close([grad, *weight_pullback().values()], [*expected])


class Joined(nn.Module):
    """A sum of what its parts make, for which there is no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) + y


class GradientInside(nn.Module):
    """A penalty on a gradient, and a tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def squares(x: Tensor) -> Tensor:
            return self.linear(x).tanh().square().sum()

        value, tangent = torch.func.jvp(squares, (x,), (torch.ones_like(x),))
        return torch.func.grad(squares)(x) + value * tangent


class Keeping(nn.Module):
    """Keeps an auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        self.kept = y.square().mean()
        return y


LEFT: list[Tensor] = []


def leaving(params: Tensor, buffers: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Leaves a tensor in a global."""
    LEFT.append(x * params)
    return LEFT[-1], buffers


@stands_on("_torch/functorch.py", "_torch/operators.py", "_torch/tensors.py")
def kept_tensors() -> None:
    import funcstage as fs

    with pytest.raises(fs.TraceError, match="leaves a tensor"):
        fs.stage_vjp(fs.compile(leaving, backend="aten"), torch.ones(4), (), ROWS)

    for engine in (None, "aten"):
        module = Keeping()
        apply, params, buffers = fs.functionalize(module)
        stage = apply if engine is None else fs.compile(apply, backend=engine)
        output, _, _ = fs.stage_vjp(stage, params, buffers, ROWS)
        assert type(module.kept) is Tensor
        torch.testing.assert_close(module.kept, output.square().mean())


SCALES = {"scale": 2.0}


class Scaled(nn.Module):
    """Reads a global."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x) * SCALES["scale"]
        return y


@stands_on("_torch/tracing.py", "_torch/tensors.py")
def reads() -> None:
    import funcstage as fs

    apply, params, buffers = fs.functionalize(Scaled())
    stage = fs.compile(apply, backend="aten")
    for scale in (2.0, 3.0):
        SCALES["scale"] = scale
        output, _, _ = fs.stage_vjp(stage, params, buffers, ROWS)
        torch.testing.assert_close(output, apply(params, buffers, ROWS)[0])


@stands_on("_torch/functorch.py", "_torch/operators.py")
def gradients_inside() -> None:
    for engine in (None, "aten"):
        assert_split_as_eager(GradientInside(), ROWS, engine=engine)


@stands_on("_torch/tracing.py", "_torch/fx.py", "_torch/operators.py", "_torch/modules.py")
def traces() -> None:
    for module in (Attention(), convolutional(), Recurrent()):
        for remat in ("none", "min_cut", "full"):
            assert_split_as_eager(module, SEQUENCES, engine="aten", remat=remat)
    assert_split_as_eager(Frequent(), ROWS, engine="aten")


@stands_on("_torch/modules.py")
def cached_weights() -> None:
    import funcstage as fs

    module = parametrizations.weight_norm(nn.Linear(4, 4))
    expected = module(ROWS).detach()
    apply, params, buffers = fs.functionalize(module)
    with parametrize.cached():
        for _ in range(2):
            output, _, pullback = fs.stage_vjp(apply, params, buffers, ROWS)
            torch.testing.assert_close(output, expected)
            assert None not in fs.stage_backward(pullback, torch.ones_like(output))[1].values()
        assert module(ROWS).requires_grad


@stands_on("_torch/tracing.py", "_torch/settings.py")
def signatures() -> None:
    import funcstage as fs

    module = nn.Linear(4, 4)
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten")
    plain = module(ROWS).detach()

    def output(x: Tensor = ROWS) -> Tensor:
        return fs.stage_vjp(compiled, params, buffers, x)[0]

    torch.testing.assert_close(output(), plain)
    torch.testing.assert_close(output(ROWS.t().contiguous().t()), plain)
    torch.testing.assert_close(output(ROWS[:2]), plain[:2])
    assert output(torch._conj(ROWS.to(torch.complex64)).real).shape == plain.shape
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: 2 * output)
    try:
        torch.testing.assert_close(output(), 2 * plain)
    finally:
        handle.remove()
    torch.testing.assert_close(output(), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert output().dtype is torch.bfloat16


@stands_on("_torch/dtensor.py", "_torch/fsdp.py")
def shards() -> None:
    import funcstage as fs

    with one_process():
        mesh = init_device_mesh("cpu", (1,))
        parallel = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
        for module in (parallel, fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)):
            expected = dict(module.named_parameters())
            apply, params, buffers = fs.functionalize(module)
            for function in (apply, fs.compile(apply, backend="aten")):
                output, _, pullback = fs.stage_vjp(function, params, buffers, ROWS)
                grads = pullback(torch.ones_like(output))[1]()
                for name, grad in grads.items():
                    assert grad.placements == params[name].placements
                bias = next(grad for name, grad in grads.items() if name.endswith("bias"))
                torch.testing.assert_close(bias.full_tensor(), torch.full((4,), float(len(ROWS))))
            assert [*params] == [*expected]


@stands_on("_torch/fsdp.py", "_torch/pipelining.py", "_torch/schedules.py")
def gathered_once_a_step() -> None:
    from funcstage.pipelining import FunctionalPipelineStage

    x = torch.randn(4, 4)
    with one_process():
        module, plain = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        plain.load_state_dict(module.state_dict())
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        stage = FunctionalPipelineStage(module, 0, 1, "cpu")
        schedule = torch_schedules.ScheduleGPipe(stage, 2, loss_fn=functional.mse_loss)
        for _ in range(2):
            schedule.step(x, target=x)
            functional.mse_loss(plain(x), x).backward()
        for shard, parameter in zip(module.parameters(), plain.parameters(), strict=True):
            grad: Any = shard.grad
            wanted: Any = parameter.grad
            # The first gradient is divided again, as under torch's own stage.
            torch.testing.assert_close(grad.full_tensor(), wanted / 2 * 1.5)


@stands_on("_torch/shapes.py", "_torch/tracing.py")
def open_sizes() -> None:
    import funcstage as fs

    module = Attention()
    apply, params, buffers = fs.functionalize(module)
    compiled = fs.compile(apply, backend="aten", dynamic=True)
    for n in (3, 7, 5):
        x = torch.randn(2, n, SEQUENCES.shape[-1])
        output, _, pullback = fs.stage_vjp(compiled, params, buffers, x)
        torch.testing.assert_close(output, module(x))
        assert pullback(torch.ones_like(output))[0][0].shape == x.shape
    assert "1 signature" in repr(compiled)


@stands_on("_torch/symmetric.py")
def memory_of_peers() -> None:
    from funcstage._torch.symmetric import open_memory, place

    device = torch.device("cuda", 0)
    if not torch.cuda.is_available():  # where nobody has peers
        assert place(torch.device("cpu")) == "cpu is no CUDA device"
        kind = torch._C._distributed_c10d._SymmetricMemory
        assert kind.signal_pad_size >= 4
        for name in ("empty_strided_p2p", "rendezvous", "get_buffer", "put_signal", "wait_signal"):
            assert callable(getattr(kind, name))
        return
    _, name, others = place(device)
    assert name not in others
    with one_process():
        memory = open_memory(64, 1000, dist.group.WORLD, device)
        x = torch.arange(16.0, device=device)
        with memory.beside():
            memory.of(0).view(torch.float32).copy_(x)
            for signal in (0, 999):
                memory.put(0, signal)
        for signal in (0, 999):
            memory.wait(0, signal)
        memory.join(memory.mark())
        assert memory.own.view(torch.float32).equal(x)


@stands_on("_torch/graphs.py")
def abandoned_recordings() -> None:
    if not torch.cuda.is_available():
        return  # where nothing is recorded
    from funcstage._torch.graphs import abandon

    device, pool = torch.device("cuda", torch.cuda.current_device()), torch.cuda.graph_pool_handle()
    x, stream = torch.ones(4, device=device), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        failed = torch.cuda.CUDAGraph()
        failed.capture_begin(pool=pool, capture_error_mode="thread_local")
        with contextlib.suppress(RuntimeError):
            x.sum().item()
        abandon(failed, device, pool)
    good = torch.cuda.CUDAGraph()
    with torch.cuda.graph(good, pool=torch.cuda.graph_pool_handle(), stream=stream):
        y = x + torch.rand_like(x)
    good.replay()
    assert bool((y >= 1).all())


@stands_on("_torch/inductor.py", "_torch/tracing.py")
def inductor() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.LayerNorm(4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="TorchInductor cannot compile")
        assert_split_as_eager(module, ROWS, engine="inductor")
        assert_split_as_eager(Frequent(), ROWS, engine="inductor")


@stands_on("_torch/tensors.py", "engines/graph/trace.py")
def attributes_of_tensors() -> None:
    from funcstage._torch.tensors import IS_PARAMETER, OF_FUNCTIONAL

    seen: list[set[str]] = []
    attributes_of = attrgetter("__dict__")  # `vars` of what is traced is refused

    class Noting(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            seen.append({*attributes_of(y)})
            return y * (2 if isinstance(self.weight, torch.nn.Parameter) else 1)

    assert_split_as_eager(Noting(3, 3), torch.randn(2, 3), engine="aten")
    assert any(seen)
    assert set[str]().union(*seen) <= OF_FUNCTIONAL
    tensor = torch.ones(3)
    setattr(tensor, IS_PARAMETER, True)
    assert isinstance(tensor, torch.nn.Parameter)


@stands_on("_torch/tensors.py", "_torch/operators.py")
def counts_of_storages() -> None:
    from funcstage._torch.operators import copy_into_all
    from funcstage._torch.tensors import memory_of, users_of

    tensor = torch.ones(3)
    count = users_of(memory_of(tensor))
    view = tensor.view(3)
    assert users_of(memory_of(tensor)) == count + 1, view
    copy_into_all([tensor], [torch.zeros(3)])
    assert not tensor.any()


@stands_on("_torch/operators.py", "_torch/pytree.py", "testing/tolerances.py")
def check_stage() -> None:
    from funcstage.testing import check_stage

    check_stage(
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)), ROWS, engines=("closures", "aten")
    )


def called_by_torch(cls: type, called: set[str]) -> type:
    """A subclass that notes which methods that it shares with torch's stage are called."""

    def noting(name: str, method: Any) -> Any:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return method(self, *args, **kwargs)

        return noted

    own = {
        name: noting(name, method)
        for kind in reversed(cls.__mro__[: cls.__mro__.index(PipelineStage)])
        for name, method in vars(kind).items()
        if inspect.isfunction(method) and not name.startswith("__")
    }
    return type(cls.__name__, (cls,), own)


FROM_2_12 = {
    "_forward_metadata_inference",
    "_backward_metadata_inference",
    "_post_metadata_inference_cleanup",
}
READ = ("args_recv_info", "bwd_cache", "group_rank", "output_chunks", "stage_index_to_group_rank")
"""What is read of a stage, beside what differs from torch to torch."""
CALLED = {
    "clear_runtime_states",
    "forward_one_chunk",
    "backward_one_chunk",
    "get_fwd_recv_ops",
    "get_fwd_send_ops",
    "set_local_fwd_input",
    "get_local_bwd_output",
    "set_local_bwd_input",
    "backward_weight_one_chunk",
    "perform_reduce_grad",
    "scale_grads",
    "_prepare_forward_infra",
    "_prepare_backward_infra",
}
"""What a schedule calls of a stage, in any torch."""


@stands_on("_torch/pipelining.py", "pipelining/stage.py", "_torch/tensors.py")
def stages_under_schedules() -> None:
    from funcstage.pipelining import FunctionalPipelineStage

    called: set[str] = set()
    kind = called_by_torch(FunctionalPipelineStage, called)
    with one_process():
        for schedule, count, options in (
            (torch_schedules.Schedule1F1B, 1, {}),
            (torch_schedules.ScheduleZBVZeroBubble, 2, {"compile": {"backend": "aten"}}),
            (torch_schedules.ScheduleInterleavedZeroBubble, 2, {"data_parallel": dist.group.WORLD}),
        ):
            modules = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(count)]
            whole = copy.deepcopy(nn.Sequential(*modules))
            stages = [
                kind(
                    module,
                    i,
                    count,
                    "cpu",
                    loss_fn=functional.mse_loss if i + 1 == count else None,
                    **options,
                )
                for i, module in enumerate(modules)
            ]
            driven: Any = schedule(
                stages if count > 1 else stages[0],  # type: ignore[arg-type]
                2,
                loss_fn=stages[-1].loss_fn,
            )
            inputs, target = torch.randn(4, 4), torch.randn(4, 4)
            driven.step(inputs, target=target)
            parts = zip(inputs.chunk(2), target.chunk(2), strict=True)
            losses = [functional.mse_loss(whole(x), y) for x, y in parts]
            torch.stack(losses).mean().backward()
            for mine, eagers in zip(nn.Sequential(*modules).parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, eagers.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                dict(nn.Sequential(*modules).named_buffers()), dict(whole.named_buffers())
            )
    wanted = CALLED | ({"_shape_inference", "_get_init_p2p_neighbors_ops"} if is_2_11() else FROM_2_12)
    for name in READ:
        assert hasattr(stages[0], name), f"a stage has no {name}"
    for name in sorted(wanted - called):
        raise AttributeError(f"no schedule calls PipelineStage.{name}")


@stands_on("_torch/pipelining.py", "_torch/distributed.py", "_torch/schedules.py", "pipelining/stage.py")
def messages_between_ranks() -> None:
    from pipeline_cases import Case, assert_same, expected, gathered, in_pieces, train, with_everything
    from pipeline_ranks import run

    from funcstage.pipelining import pipeline_order

    for case in (Case("ZBVZeroBubble", 4, 4, with_everything), Case("Interleaved1F1B", 4, 2)):
        assert_same(gathered(run(2, train, case)), expected(case), rtol=1e-10, atol=1e-12)
    rows = ("0F0 0F1 0I0 0I1 0W0 0W1", "1F0 1B0 1F1 1I1 1W1")
    order = in_pieces(pipeline_order("ZBVZeroBubble", 4, 4), 3)
    for case in (Case(rows, 2, 2), Case(order, 4, 4, offload="IW")):
        assert_same(gathered(run(2, train, case)), expected(case), rtol=1e-10, atol=1e-12)


FROM_2_12_PREPARED = {"_stage_meta", "_inference_mode"}
UP_TO_2_11_PREPARED = {"inputs_meta", "_outputs_meta"}


@stands_on("_torch/schedules.py", "_torch/pipelining.py")
def steps_that_fail_and_schedules_in_turn() -> None:
    from funcstage._torch.pipelining import PREPARED_BY_TORCH
    from funcstage._torch.schedules import KEPT_BY_SCHEDULES
    from funcstage.pipelining import FunctionalPipelineStage

    def failing(output: Tensor, target: Tensor) -> Tensor:
        if failures:
            raise failures.pop()
        return functional.mse_loss(output, target)

    kinds: dict[Any, str] = {
        torch_schedules.Schedule1F1B: "_stage_forward_initialized",
        torch_schedules.ScheduleInterleavedZeroBubble: "_stages_forward_initialized",
    }
    absent = FROM_2_12_PREPARED if is_2_11() else UP_TO_2_11_PREPARED
    with one_process():
        for kind, initialized in kinds.items():
            single = issubclass(kind, torch_schedules.PipelineScheduleSingle)
            modules = [nn.Linear(4, 4) for _ in range(1 if single else 2)]
            whole = copy.deepcopy(nn.Sequential(*modules))
            stages = [
                FunctionalPipelineStage(module, i, len(modules), "cpu") for i, module in enumerate(modules)
            ]
            driven = [kind(stages[0] if single else stages, n, loss_fn=failing) for n in (2, 4)]
            for schedule, rows in ((driven[0], 4), (driven[1], 12), (driven[0], 4), (driven[0], 8)):
                x = torch.randn(rows, 4)
                failures = [KeyError("of the loss")]
                with contextlib.suppress(KeyError):
                    schedule.step(x, target=x)
                for module in (*modules, whole):
                    module.zero_grad()
                schedule.step(x, target=x)
                functional.mse_loss(whole(x), x).backward()
                grads = [parameter.grad for module in modules for parameter in module.parameters()]
                torch.testing.assert_close(grads, [parameter.grad for parameter in whole.parameters()])
                kept = KEPT_BY_SCHEDULES[:1] if single else KEPT_BY_SCHEDULES
                both = initialized, initialized.replace("forward", "backward")
                for name in (*kept, *both, "_check_inputs"):
                    assert hasattr(schedule, name), f"a {kind.__name__} has no {name}"
            for name in {*PREPARED_BY_TORCH} - absent:
                assert hasattr(stages[0], name), f"a stage has no {name} after a step"


@stands_on("_torch/sharded_messages.py", "_torch/pipelining.py", "_torch/dtensor.py")
def dtensors_between_ranks() -> None:
    from pipeline_cases import Case
    from torch.distributed.tensor import Shard

    from tests.pipelining import test_sharded_activations as sharded

    if not is_2_11():
        sharded.assert_trains(Case("Interleaved1F1B", 4, 4, compile={"backend": "aten"}), Shard(1))


@stands_on("pipelining/cut.py")
def cutting() -> None:
    from funcstage.pipelining import cut

    for model, at in ((nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "1"), (Joined(), "second")):
        wanted = model(ROWS)
        stages = cut(model, [at], example=(ROWS,))
        found: Any = (ROWS,)
        for stage in stages:
            found = stage(*found)
            found = found if isinstance(found, tuple) else (found,)
        torch.testing.assert_close(found, (wanted,))


@stands_on("_torch/profiling.py")
def a_profiler_that_listens() -> None:
    from funcstage._torch.profiling import is_listening

    assert not is_listening()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert is_listening()
    with torch.autograd.profiler.emit_nvtx(enabled=torch.cuda.is_available()):
        assert is_listening() == torch.cuda.is_available()
    assert not is_listening()


@stands_on("flex.py")
def attention_as_a_program() -> None:
    import torch.nn.attention.flex_attention  # makes the operators; what becomes of them is tested on CUDA

    from funcstage.engines.rules import flex
    from funcstage.engines.rules.table import known

    operators = torch.ops.higher_order
    assert known(operators.flex_attention).at_levels
    assert flex.is_flex_attention_backward(operators.flex_attention_backward)
    assert not known(operators.flex_attention_backward).at_levels
    with torch._dynamo.utils.disable_cache_limit():
        pass


@stands_on("_torch/block_masks.py")
def parts_of_block_masks() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    from funcstage._torch.block_masks import is_block_mask, split, with_offset_as_tensor

    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    whole = create_block_mask(
        lambda b, h, q, k: documents[b, q] == documents[b, k], 2, None, 4, 4, device="cpu", BLOCK_SIZE=2
    )
    assert is_block_mask(type(whole))
    q, k = torch.arange(4)[:, None], torch.arange(4)
    for i, part in enumerate(split(whole, 2)):
        made = with_offset_as_tensor(part.mask_mod)
        assert any(isinstance(cell.cell_contents, Tensor) for cell in made.__closure__)
        expected = documents[i][:, None] == documents[i]
        for function in (made, part.mask_mod):
            assert torch.equal(function(torch.zeros_like(q), torch.zeros_like(q), q, k), expected)


def blamed(error: BaseException, files: tuple[str, ...]) -> list[str]:
    """The private names that an error is about: said by it, on the lines where it arose, or in the files."""
    said = [name for file in files for name in NAMES.get(file, {}) if name.rpartition(".")[2] in str(error)]
    if said:
        return said
    trace = error.__traceback__
    frames = []
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    for path, number in reversed(frames):
        if not Path(path).is_relative_to(PACKAGE):
            continue
        line = linecache.getline(path, number)
        names = NAMES.get(Path(path).relative_to(PACKAGE).as_posix(), {})
        if on_line := [n for n, (alias, _) in names.items() if re.search(rf"\b{re.escape(alias)}\b", line)]:
            return on_line
    return [name for file in files for name in NAMES.get(file, {})]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_what_stands_on_private_names_works(use: Use) -> None:
    try:
        use()
    except Exception as error:
        files = ", ".join(f"funcstage/{file}" for file in USES[use])
        raise AssertionError(
            f"torch {torch.__version__} does otherwise what {files} builds on private names "
            f"({use.__name__}). It is about {', '.join(blamed(error, USES[use]))}: "
            f"{type(error).__name__}: {error}"
        ) from error


COMMON = (
    "torch.utils._python_dispatch.",
    "torch.utils._pytree.",
    "torch._ops.",
    "torch._foreach_",
    "torch.ops.",
)
"""What all the world uses in one way: it is only looked up."""


def test_each_file_with_a_private_name_is_taken_through_a_use() -> None:
    used = {file for files in USES.values() for file in files}
    needed = {file for file, names in NAMES.items() if not all(name.startswith(COMMON) for name in names)}
    assert needed <= used, f"add to a use, or write one by @stands_on: {sorted(needed - used)}"


def test_compiled_functions_ask_what_stages_answer() -> None:
    from torch._dynamo import eval_frame

    asked = "_force_eager_nested_compile"
    if not hasattr(eval_frame, asked):  # before torch 2.14
        asked = "_callback_from_stance("
    assert asked in inspect.getsource(eval_frame), MOVED.format(asked, "funcstage/_torch/dynamo.py")


def test_what_libraries_ask_about_compilation_is_python() -> None:
    message = MOVED.format("torch.compiler.is_compiling", "funcstage/_torch/fx.py")
    for function in (torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling):
        assert inspect.isfunction(function), message
        assert not function.__closure__, message


# The tables of schedules; if these fail, `funcstage/schedules/orders.py` is the one file to change.

CHANGED = (
    f"torch {torch.__version__} changed its private pipeline schedules: adapt funcstage/schedules/orders.py"
)
SCHEDULES = {
    "GPipe": "ScheduleGPipe",
    "1F1B": "Schedule1F1B",
    "LoopedBFS": "ScheduleLoopedBFS",
    "Interleaved1F1B": "ScheduleInterleaved1F1B",
    "InterleavedZeroBubble": "ScheduleInterleavedZeroBubble",
    "ZBVZeroBubble": "ScheduleZBVZeroBubble",
    "DualPipeV": "ScheduleDualPipeV",
}


def pipeline_order(schedule: str, num_stages: int, num_microbatches: int) -> Any:
    from funcstage import pipelining

    return pipelining.pipeline_order(schedule, num_stages, num_microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_still_has_the_schedule_under_its_name(schedule: str) -> None:
    named = torch_schedules.get_schedule_class(schedule)
    assert named is getattr(torch_schedules, SCHEDULES[schedule], None), CHANGED


def test_actions_still_have_the_fields_that_are_read() -> None:
    from funcstage._torch.schedules import HOUSEKEEPING, MESSAGES

    action = getattr(torch_schedules, "_Action", None)
    assert action is not None, CHANGED
    fields = {"stage_index", "computation_type", "microbatch_index", "sub_actions"}
    assert fields <= set(action._fields), CHANGED
    kinds = {kind.value for kind in torch_schedules._ComputationType}
    assert {"F", "I", "W", "B", "OVERLAP_F_B"} <= kinds, CHANGED
    assert kinds <= {"F", "I", "W", "B", "OVERLAP_F_B", *MESSAGES, *HOUSEKEEPING}, CHANGED


# V-shaped schedules have two stages a rank.
POSSIBLE = [
    (schedule, num_stages)
    for schedule in SCHEDULES
    for num_stages in (1, 2, 3, 4, 8)
    if num_stages % 2 == 0 or schedule not in ("ZBVZeroBubble", "DualPipeV")
]


@pytest.mark.parametrize(("schedule", "num_stages"), POSSIBLE)
@pytest.mark.parametrize("num_microbatches", [8, 12])
def test_every_table_holds_each_action_once_and_can_run(
    schedule: str, num_stages: int, num_microbatches: int
) -> None:
    from funcstage.pipelining import Action

    order = pipeline_order(schedule, num_stages, num_microbatches)
    done = [done for action in order.in_turn() for done in action.gives()]
    expected = {
        Action(kind, stage, microbatch)
        for kind in ("F", "I", "W")
        for stage in range(num_stages)
        for microbatch in range(num_microbatches)
    }
    assert len(done) == len(expected), CHANGED
    assert set(done) == expected, CHANGED


@pytest.mark.parametrize(
    ("schedule", "first_rank", "last_rank"),
    [
        ("GPipe", "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "3F0 3F1 3F2 3F3 3B0 3B1 3B2 3B3"),
        ("1F1B", "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3"),
        (
            "ZBVZeroBubble",
            "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3",
            "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3",
        ),
    ],
)
def test_small_tables_are_the_published_ones(schedule: str, first_rank: str, last_rank: str) -> None:
    ranks = pipeline_order(schedule, 4, 4).ranks
    assert " ".join(map(str, ranks[0])) == first_rank, CHANGED
    assert " ".join(map(str, ranks[-1])) == last_rank, CHANGED


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV"])
def test_v_shaped_schedules_fold_the_stages_over_the_ranks(schedule: str) -> None:
    assert pipeline_order(schedule, 8, 8).rank_of_stages() == [0, 1, 2, 3, 3, 2, 1, 0], CHANGED


def test_a_torch_that_moved_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_schedules, "ScheduleGPipe")
    with pytest.raises(RuntimeError, match=r"torch .* builds its pipeline schedules differently"):
        pipeline_order("GPipe", 2, 2)
