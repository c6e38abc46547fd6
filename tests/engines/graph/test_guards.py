"""No trace is used where it does not hold: whatever a stage may read, a change of it is seen.

Every comparison is with plain eager autograd at that moment, on the very function that was compiled.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Barrier
from types import SimpleNamespace
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

import funcstage as fs
from funcstage.checks import differentiated_leaves


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def leaves(tree: Any) -> list[Any]:
    return optree.tree_leaves(tree, none_is_leaf=True)


def detached(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def eager(apply: Any, params: Any, buffers: Any, args: tuple[Any, ...], argnums: Any = None) -> list[Any]:
    """Output, new buffers, input gradients and parameter gradients of the plain tape."""
    wanted = differentiated_leaves(args, argnums)
    params, args = detached((params, args))
    inputs, weights = leaves(args), leaves(params)
    ends = [leaf.requires_grad_() for leaf in (*(inputs[i] for i in wanted), *weights)]
    with torch.enable_grad():
        output, new_buffers = apply(params, buffers, *args)
    outputs = leaves(output)
    grads = torch.autograd.grad(outputs, ends, [torch.cos(o) for o in outputs], allow_unused=True)
    found = dict(zip(wanted, grads, strict=False))
    input_grads = [found.get(i) for i in range(len(inputs))]
    return detached([*outputs, *leaves(new_buffers), *input_grads, *grads[len(wanted) :]])


class Stage(NamedTuple):
    """A stage function, the same compiled, and what it is called with first."""

    apply: Any
    fast: Any
    params: Any
    buffers: Any

    @classmethod
    def of(cls, module: nn.Module, backend: Any = "aten") -> Stage:
        apply, params, buffers = fs.functionalize(module)
        return cls(apply, fs.compile(apply, backend=backend), params, buffers)

    def check(self, *args: Any, argnums: Any = None, tolerance: float = 0.0) -> list[Any]:
        """Compare F, I and W with eager, whose results are returned."""
        theirs = eager(self.apply, self.params, self.buffers, args, argnums)
        output, new_buffers, pullback = fs.stage_vjp(
            self.fast, self.params, self.buffers, *args, argnums=argnums
        )
        input_grads, weight_pullback = pullback(optree.tree_map(torch.cos, detached(output)))
        ours = [*leaves(output), *leaves(new_buffers), *leaves(input_grads), *leaves(weight_pullback())]
        for mine, wanted in zip(ours, theirs, strict=True):
            if wanted is None:
                assert mine is None
            else:
                torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
        return theirs

    def check_change(self, change: Callable[[], Any], *args: Any, tolerance: float = 0.0) -> None:
        """Compare before and after something that makes a difference."""
        before = self.check(*args, tolerance=tolerance)
        change()
        after = self.check(*args, tolerance=tolerance)
        assert before[0].dtype != after[0].dtype or not torch.equal(before[0], after[0]), "no difference"


class Scaled(nn.Module):
    """A layer, an activation, and a factor that is computed from an attribute."""

    def __init__(self, value: Any = 1.0, factor: Callable[[Any], Any] = float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act: nn.Module = nn.Sequential(nn.LeakyReLU(0.5), nn.Tanh())
        self.value = value
        self.factor = factor
        self.other = "other"

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) * self.factor(self.value)


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    nested: Any = None


@dataclasses.dataclass(slots=True)
class Slotted:
    scale: float = 1.0


class Size(enum.Enum):
    SMALL = 1.0
    LARGE = 2.0


def put(name: str, value: Any) -> Callable[[Any], None]:
    return lambda target: setattr(target, name, value)


def within(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change an attribute's content, rather than the attribute."""
    return lambda module: change(module.value)


scale: Any = lambda value: value.scale  # noqa: E731

ATTRIBUTES: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    # an attribute, the factor that is made of it, what changes
    "a float": (1.0, float, put("value", 2.0)),
    "the sign of a zero": (0.0, lambda v: 1 / torch.tensor(v), put("value", -0.0)),
    "a number that becomes a bool": (1, lambda v: 2 + (v is True), put("value", True)),
    "a number that becomes None": (1.0, lambda v: 2.0 if v is None else v, put("value", None)),
    "a number that becomes a list": (1.0, lambda v: 2.0 if v == [] else v, put("value", [])),
    "a list that becomes a number": ([], lambda v: 2.0 if v == [] else v, put("value", 1.0)),
    "a string": ("a", len, put("value", "ab")),
    "an enumerator": (Size.SMALL, lambda v: v.value, put("value", Size.LARGE)),
    "a function": (torch.ones, lambda v: v(()) + 1, put("value", torch.zeros)),
    "a list that grows": ([1.0], sum, within(lambda v: v.append(2.0))),
    "an item of a list": ([1.0], sum, within(lambda v: v.__setitem__(0, 2.0))),
    "a list in a list": ([[1.0]], lambda v: sum(v[0]), within(lambda v: v[0].append(2.0))),
    "a list in a tuple": (([1.0],), lambda v: sum(v[0]), within(lambda v: v[0].append(2.0))),
    "an item of a dict": ({"a": 1.0}, lambda v: v["a"], within(lambda v: v.update(a=2.0))),
    "the order of a dict": (
        {"a": 1.0, "b": 2.0},
        lambda v: next(iter(v.values())),
        within(lambda v: v.update(a=v.pop("a"))),
    ),
    "a set": ({1}, len, within(lambda v: v.add(2))),
    "an item of a set": ({1.0, 3.0}, sum, within(lambda v: (v.remove(1.0), v.add(2.0)))),
    "a set in place of one as large": ({1.0, 3.0}, sum, put("value", {2.0, 3.0})),
    "a frozen set in place of one as large": (frozenset({1.0}), sum, put("value", frozenset({2.0}))),
    "a set in a list": ([{1.0}], lambda v: sum(v[0]), within(lambda v: (v[0].clear(), v[0].add(2.0)))),
    "a dataclass": (Config(), scale, within(put("scale", 2.0))),
    "a dataclass in another": (
        Config(nested=Config()),
        lambda v: v.nested.scale,
        within(lambda v: put("scale", 2.0)(v.nested)),
    ),
    "a dataclass in a list": ([Config()], lambda v: v[0].scale, within(lambda v: put("scale", 2.0)(v[0]))),
    "a dataclass with slots": (Slotted(), scale, within(put("scale", 2.0))),
    "an object": (SimpleNamespace(scale=1.0), scale, within(put("scale", 2.0))),
    "a module that is no submodule": (
        [nn.LeakyReLU(0.5)],
        lambda v: v[0].negative_slope,
        within(lambda v: put("negative_slope", 0.25)(v[0])),
    ),
    "a tensor": (torch.ones(4), lambda v: v, put("value", torch.full((4,), 2.0))),
    "a tensor in place": (torch.ones(4), lambda v: v, within(lambda v: v.mul_(2))),
    "a tensor in a list": (
        [torch.ones(4)],
        lambda v: v[0],
        within(lambda v: v.__setitem__(0, torch.full((4,), 2.0))),
    ),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_changed_attribute_is_seen(name: str) -> None:
    value, factor, change = ATTRIBUTES[name]
    module = Scaled(copy.deepcopy(value), factor)
    Stage.of(module).check_change(lambda: change(module), torch.randn(2, 4))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrized() -> Scaled:
    module = Scaled()
    parametrize.register_parametrization(module.linear, "weight", Doubled())
    return module


def rename(module: Any) -> None:
    del module.other
    module.late = 2.0


STRUCTURE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the mode": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), lambda m: m.eval()),
    "a submodule's mode": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), lambda m: m[1].eval()),
    "a late attribute": (
        lambda: Scaled(factor=lambda v: v),
        lambda m: (put("late", 2.0)(m), put("factor", lambda v: m.late)(m)),
    ),
    "a function of its own": (Scaled, put("factor", lambda v: 2.0)),
    "its forward": (Scaled, lambda m: put("forward", lambda x: m.linear(x))(m)),
    "a submodule": (Scaled, put("act", nn.Sigmoid())),
    "a submodule's attribute": (Scaled, lambda m: put("negative_slope", 0.1)(m.act[0])),
    "a submodule taken away": (Scaled, lambda m: m.act.pop(1)),
    "a submodule added": (Scaled, lambda m: m.act.append(nn.Tanh())),
    "the order of submodules": (Scaled, lambda m: m.act.append(m.act.pop(0))),
    "a hook after a submodule": (
        Scaled,
        lambda m: m.act.register_forward_hook(lambda module, args, output: output * 2),
    ),
    "a hook before a submodule": (
        Scaled,
        lambda m: m.act.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    ),
    "a hook of the stage": (
        Scaled,
        lambda m: m.register_forward_hook(lambda module, args, output: output * 2),
    ),
    "one more parametrization": (
        parametrized,
        lambda m: parametrize.register_parametrization(m.linear, "weight", Doubled()),
    ),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_changed_structure_is_seen(name: str) -> None:
    make, change = STRUCTURE[name]
    module = make()
    Stage.of(module).check_change(lambda: change(module), torch.randn(2, 4))


def test_a_hook_on_all_modules_is_seen_and_so_is_that_it_is_gone() -> None:
    stage, x = Stage.of(Scaled()), torch.randn(2, 4)
    register = nn.modules.module.register_module_forward_hook
    handles: list[Any] = []
    try:
        stage.check_change(lambda: handles.append(register(lambda module, args, output: output * 2)), x)
    finally:
        for handle in handles:
            handle.remove()
    stage.check(x)


def test_what_replaced_a_submodule_is_watched_as_well() -> None:
    module = Scaled()
    stage, x = Stage.of(module), torch.randn(2, 4)
    stage.check_change(lambda: put("act", nn.LeakyReLU(0.5))(module), x)
    stage.check_change(lambda: put("negative_slope", 0.1)(module.act), x)


def test_one_attribute_in_place_of_another_is_seen() -> None:
    module = Scaled(factor=lambda value: getattr(module, "late", 1.0))
    Stage.of(module).check_change(lambda: rename(module), torch.randn(2, 4))


def test_a_trace_serves_again_when_a_change_is_taken_back() -> None:
    module = Scaled([1.0], sum)
    stage, x = Stage.of(module), torch.randn(2, 4)
    for number in (1.0, 2.0) * 3:
        module.value = [number]
        stage.check(x)
        module.eval()
        stage.check(x)
        module.train()
    assert "4 signature(s)" in repr(stage.fast)


class Setting(NamedTuple):
    """A global setting of torch, with two values for it."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    values: tuple[Any, Any]


def field(owner: Any, name: str, *values: Any) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), values)


def switch(owner: Any, name: str) -> Setting:
    return Setting(getattr(owner, f"{name}_enabled"), getattr(owner, f"enable_{name}"), (True, False))


cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
SETTINGS: dict[str, Setting] = {
    "default dtype": Setting(
        torch.get_default_dtype, torch.set_default_dtype, (torch.float32, torch.float64)
    ),
    "deterministic algorithms": Setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, (False, True)
    ),
    "float32 matmul precision, high": Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest", "high")
    ),
    "float32 matmul precision, medium": Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("high", "medium")
    ),
    "cuda.matmul.allow_tf32": field(cuda.matmul, "allow_tf32", False, True),
    "cuda.matmul.fp32_precision": field(cuda.matmul, "fp32_precision", "ieee", "tf32"),
    "cuda.matmul.allow_fp16_reduced_precision_reduction": field(
        cuda.matmul, "allow_fp16_reduced_precision_reduction", True, False
    ),
    "cuda.matmul.allow_bf16_reduced_precision_reduction": field(
        cuda.matmul, "allow_bf16_reduced_precision_reduction", True, False
    ),
    "cuda.matmul.allow_fp16_accumulation": field(cuda.matmul, "allow_fp16_accumulation", False, True),
    "cudnn.enabled": field(cudnn, "enabled", True, False),
    "cudnn.deterministic": field(cudnn, "deterministic", False, True),
    "cudnn.benchmark": field(cudnn, "benchmark", False, True),
    "cudnn.conv.fp32_precision": field(cudnn.conv, "fp32_precision", "ieee", "tf32"),
    "mkldnn.enabled": field(mkldnn, "enabled", True, False),
    "mkldnn.deterministic": field(mkldnn, "deterministic", False, True),
    "mkldnn.matmul.fp32_precision": field(mkldnn.matmul, "fp32_precision", "ieee", "bf16"),
    "mkldnn.conv.fp32_precision": field(mkldnn.conv, "fp32_precision", "ieee", "bf16"),
    "warnings about algorithms only": Setting(
        torch.is_deterministic_algorithms_warn_only_enabled,
        lambda only: torch.use_deterministic_algorithms(False, warn_only=only),
        (False, True),
    ),
    "filling of memory": field(torch.utils.deterministic, "fill_uninitialized_memory", True, False),
    "anomaly mode": Setting(  # with its checks for NaN no stage is traced
        torch.is_anomaly_enabled, lambda on: torch.autograd.set_detect_anomaly(on, False), (False, True)
    ),
    "dtype of an autocast to come": Setting(
        lambda: torch.get_autocast_dtype("cpu"),
        lambda dtype: torch.set_autocast_dtype("cpu", dtype),
        (torch.bfloat16, torch.float16),
    ),
    "number of threads": Setting(torch.get_num_threads, torch.set_num_threads, (1, 2)),
    "fast path of attention layers": Setting(
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, (True, False)
    ),
    "paths of einsum": field(torch.backends.opt_einsum, "strategy", "auto", "greedy"),
    "flash attention": switch(cuda, "flash_sdp"),
    "memory-efficient attention": switch(cuda, "mem_efficient_sdp"),
    "attention by formula": switch(cuda, "math_sdp"),
    "cuDNN's attention": switch(cuda, "cudnn_sdp"),
    "reduced attention by formula": Setting(
        cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp, (False, True)
    ),
}


@contextmanager
def set_to(setting: Setting, value: Any) -> Iterator[None]:
    before = setting.read()
    setting.write(value)
    try:
        yield
    finally:
        setting.write(before)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_a_stage_reads_is_read_when_it_is_called(name: str) -> None:
    setting = SETTINGS[name]
    first, second = setting.values
    module = Scaled(factor=lambda _: 3.0 if setting.read() == usual else 2.0)
    stage, x = Stage.of(module), torch.randn(2, 4)
    with set_to(setting, first):
        usual = setting.read()
        stage.check_change(lambda: setting.write(second), x)
        setting.write(first)
        stage.check(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_attention_runs_the_kernel_that_is_switched_on_at_the_time() -> None:
    stage, x = Stage.of(Attention()), torch.randn(2, 64, 8)
    for kernels in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH) * 2:
        with sdpa_kernel(kernels):
            theirs = stage.check(x)
            names = str(stage.fast.programs(stage.params, {}, x))
            assert ("flash" in names) == (kernels is SDPBackend.FLASH_ATTENTION)
    assert len(theirs) == 4


def test_attention_by_formula_reduces_in_the_precision_that_is_set_at_the_time() -> None:
    stage, x = Stage.of(Attention().bfloat16()), torch.randn(2, 64, 8).bfloat16()
    setting = SETTINGS["reduced attention by formula"]
    with sdpa_kernel(SDPBackend.MATH), set_to(setting, False):
        stage.check_change(lambda: setting.write(True), x)


AUTOCAST: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "off": nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "off inside": lambda: torch.autocast("cpu", enabled=False),
    "of another device": lambda: torch.autocast("cuda", torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore:.*[Dd]isabling")
@pytest.mark.parametrize("first", AUTOCAST)
def test_autocast_is_as_it_is_at_the_call(first: str) -> None:
    stage, x = Stage.of(Scaled()), torch.randn(2, 4)
    for name in (first, *AUTOCAST, first):
        with AUTOCAST[name]():
            stage.check(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_stage_may_read_whether_gradients_are_recorded(mode: Any) -> None:
    module = Scaled(factor=lambda _: 2.0 if torch.is_grad_enabled() else 3.0)
    stage, x = Stage.of(module), torch.randn(2, 4)
    for setting in (nullcontext, mode, nullcontext):
        with setting():
            ours, theirs = (f(stage.params, stage.buffers, x)[0] for f in (stage.fast, stage.apply))
            assert torch.equal(ours, theirs)
        stage.check(x)


Point = namedtuple("Point", "a b")


def tree_dependent(params: Any, buffers: Any, x: Tensor, tree: Any = None) -> Any:
    """A stage that looks at the form of its arguments, and at which of its weights are trained."""
    state = {**params, **buffers}
    factor = {tuple: 2, list: 3, dict: 4, OrderedDict: 5, Point: 6, type(None): 7}.get(type(tree), 8)
    sums = sum((leaf * leaf for leaf in leaves(tree) if leaf is not None), torch.zeros(()))
    return x * x @ state["w"] * factor + state["b"] * len(buffers) + sums, buffers


W, B, X, Y = (torch.randn(shape) / 4 for shape in ((3, 3), (3,), (2, 3), (3,)))
SHARED = torch.randn(3, 3) / 4
CALLS: dict[str, tuple[Any, Any, tuple[Any, ...], Any]] = {
    # parameters, buffers, arguments, argnums
    "plain": ({"w": W, "b": B}, {}, (X,), None),
    "nothing differentiated": ({"w": W, "b": B}, {}, (X,), ()),
    "by a number": ({"w": W, "b": B}, {}, (X,), 0),
    "two arguments": ({"w": W, "b": B}, {}, (X, Y), None),
    "the first of two": ({"w": W, "b": B}, {}, (X, Y), (0,)),
    "the second of two": ({"w": W, "b": B}, {}, (X, Y), (1,)),
    "a tuple": ({"w": W, "b": B}, {}, (X, (Y, Y)), None),
    "a list": ({"w": W, "b": B}, {}, (X, [Y, Y]), None),
    "a dict": ({"w": W, "b": B}, {}, (X, {"a": Y, "b": Y}), None),
    "a dict with other keys": ({"w": W, "b": B}, {}, (X, {"a": Y, "c": Y}), None),
    "an ordered dict": ({"w": W, "b": B}, {}, (X, OrderedDict(a=Y, b=Y)), None),
    "a namedtuple": ({"w": W, "b": B}, {}, (X, Point(Y, Y)), None),
    "None for a leaf": ({"w": W, "b": B}, {}, (X, [Y, None]), None),
    "one frozen": ({"w": W}, {"b": B}, (X,), None),
    "the other frozen": ({"b": B}, {"w": W}, (X,), None),
    "a parameter for an argument": ({"w": W, "b": B}, {}, (nn.Parameter(X.clone()),), None),
    "an argument that requires grad": ({"w": W, "b": B}, {}, (X.clone().requires_grad_(),), None),
    "parameters that require grad": ({"w": W.clone().requires_grad_(), "b": B}, {}, (X,), None),
    "another batch": ({"w": W, "b": B}, {}, (torch.randn(5, 3),), None),
    "no batch": ({"w": W, "b": B}, {}, (Y,), None),
    "an empty batch": ({"w": W, "b": B}, {}, (X[:0],), None),
    "transposed": ({"w": W, "b": B}, {}, (torch.randn(3, 2).t(),), None),
    "expanded": ({"w": W, "b": B}, {}, (Y.expand(2, 3),), None),
    "shifted in memory": ({"w": W, "b": B}, {}, (torch.randn(7)[1:].view(2, 3),), None),
    "weights transposed": ({"w": W.t(), "b": B}, {}, (X,), None),
    "double": ({"w": W.double(), "b": B.double()}, {}, (X.double(),), None),
    "half of it double": ({"w": W, "b": B.double()}, {}, (X,), None),
    "complex": ({"w": W + 1j * W, "b": B}, {}, (X + 2j * X,), None),
    "conjugate": ({"w": W + 1j * W, "b": B}, {}, ((X + 2j * X).conj(),), None),
    "negated": ({"w": W, "b": B}, {}, ((X - 1j * X).conj().imag,), None),
    "one tensor for two parameters": ({"w": SHARED, "b": SHARED[0]}, {}, (X,), None),
    "parameter and argument in one": ({"w": SHARED, "b": B}, {}, (SHARED,), None),
    "two arguments in one": ({"w": W, "b": B}, {}, (SHARED, SHARED), None),
}
if torch.cuda.is_available():
    CALLS["on CUDA"] = ({"w": W.cuda(), "b": B.cuda()}, {}, (X.cuda(),), None)


@pytest.mark.filterwarnings("ignore:.*was traced for:UserWarning")
def test_a_call_of_another_form_is_traced_anew() -> None:
    fast = fs.compile(tree_dependent, backend="aten")
    for params, buffers, args, argnums in (*CALLS.values(), *reversed(CALLS.values())):
        Stage(tree_dependent, fast, params, buffers).check(*args, argnums=argnums)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_another_form_after_a_plain_one_is_traced_anew(name: str) -> None:
    fast = fs.compile(tree_dependent, backend="aten")
    for params, buffers, args, argnums in (CALLS["plain"], CALLS[name], CALLS["plain"]):
        Stage(tree_dependent, fast, params, buffers).check(*args, argnums=argnums)


def test_a_plan_is_of_the_device_that_it_is_asked_for() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    stage, x = Stage.of(module), torch.randn(2, 4)
    stage.check(x)
    state = optree.tree_map(lambda leaf: leaf.to("meta"), (stage.params, stage.buffers))
    plan = stage.fast.plan(*state, x.to("meta"))
    assert plan.flops == stage.fast.plan(stage.params, stage.buffers, x).flops
    stage.check(x)


def test_plain_arguments_count_with_their_types_and_signs() -> None:
    def apply(params: Any, buffers: Any, x: Tensor, number: Any) -> Any:
        kind = [bool, int, float, str].index(type(number))
        return params["w"] * x * (kind + 1) / torch.tensor(float(number)), buffers

    fast = fs.compile(apply, backend="aten")
    for number in (1, True, 1.0, "1", 0.0, -0.0, 0, False, float("nan"), float("inf")):
        Stage(apply, fast, {"w": torch.randn(3)}, {}).check(torch.randn(3), number)


class Twice(nn.Module):
    """Two layers, whose weights may be one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def test_tied_and_untied_modules_of_one_shape_have_their_own_gradients() -> None:
    for tied in (False, True, False):
        stage = Stage.of(Twice(tied))
        assert len(stage.params) == (3 if tied else 4)
        stage.check(torch.randn(2, 4))


def test_weights_tied_or_frozen_after_the_trace_leave_the_stage_as_it_was_functionalized() -> None:
    module = Twice(tied=False)
    stage, x = Stage.of(module), torch.randn(2, 4)
    stage.check(x)
    module.b.weight = module.a.weight
    stage.check(x)
    module.a.bias.requires_grad_(False)
    stage.check(x)
    Stage.of(module).check(x)


@pytest.mark.slow
def test_no_program_of_inductor_is_ever_stale() -> None:
    module = Scaled(torch.ones(4), lambda value: value * (2 if module.training else 3))
    stage, x = Stage.of(module, "inductor"), torch.randn(2, 4)
    stage.check(x, tolerance=1e-5)
    stage.check_change(lambda: module.value.mul_(2), x, tolerance=1e-5)
    stage.check_change(module.eval, x, tolerance=1e-5)
    stage.check(x, argnums=(), tolerance=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        stage.check(x, tolerance=3e-2)
    doubled = optree.tree_map(torch.Tensor.double, (stage.params, stage.buffers))
    stage._replace(params=doubled[0], buffers=doubled[1]).check(x.double(), tolerance=1e-6)
    stage.check(x, tolerance=1e-5)


def test_stages_may_be_traced_in_several_threads_at_once() -> None:
    stages = [Stage.of(nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))) for _ in range(4)]
    start, x = Barrier(len(stages)), torch.randn(2, 4)

    def run(stage: Stage) -> Tensor:
        start.wait()
        output, _ = stage.fast(stage.params, stage.buffers, x)
        return output

    with ThreadPoolExecutor(len(stages)) as pool:
        outputs = list(pool.map(run, stages))
    for output, stage in zip(outputs, stages, strict=True):
        assert torch.equal(output, stage.apply(stage.params, stage.buffers, x)[0])


def test_a_module_with_another_namespace_is_traced_anew() -> None:
    class Scaled(torch.nn.Linear):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    module, x = Scaled(2, 2), torch.ones(1, 2)
    module.scale = 2.0
    apply, params, buffers = fs.functionalize(module)
    fast = fs.compile(apply, backend="aten", fullgraph=True)
    fs.stage_vjp(fast, params, buffers, x)
    module.__dict__ = {**vars(module), "scale": 3.0}
    torch.testing.assert_close(fs.stage_vjp(fast, params, buffers, x)[0], module(x).detach())
