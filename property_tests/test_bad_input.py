"""Bad input: valid calls with one thing wrong get eager's result, eager's error or a `StageError`.

Hypothesis draws a valid call and one mutation of it: a leaf that is no tensor or a strange one, another tree,
memory that is shared, cotangents and accumulators that do not fit. Whatever comes of it, nothing that the
caller holds has changed, torch's global modes are as they were, and the valid call works afterwards.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import funcstage as fs
from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch import interception as _interception

TRIED: collections.Counter[tuple[str, str, str]] = collections.Counter()
"""How often each (place, mutation, outcome) came up."""

logging.getLogger("torch").setLevel(logging.CRITICAL)  # of fake tensors, which report what they raise

# What comes in place of a leaf.


class Tagged(Tensor):
    """A subclass that `__torch_function__` passes on."""


class Wrapped(Tensor):
    """A tensor that holds another, and sees all operations by `__torch_dispatch__`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def leaked(tensor: Tensor) -> Tensor:
    """A tensor that a transform has wrapped and that outlives it."""
    kept: list[Tensor] = []
    torch.func.vjp(lambda x: kept.append(x * 1) or x.sum(), tensor.detach())
    return kept[0]


def overlapping(tensor: Tensor) -> Tensor:
    """Elements that share memory in part, as those of a sliding window do."""
    flat = torch.arange(1 + sum(n for n in tensor.shape)).to(tensor.dtype)
    return flat.as_strided(tensor.shape, (1,) * tensor.dim())


def widened(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[..., :1]], -1)


STRANGE: dict[str, Callable[[Tensor], Any]] = {
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t[0],
    "an element more": widened,
    "no elements": lambda t: t[:0],
    "one element": lambda t: t.flatten()[0],
    "flattened": lambda t: t.flatten(),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "on the meta device": lambda t: t.to("meta"),
    "on CUDA": lambda t: t.to("cuda"),
    "transposed in memory": lambda t: t.mT.contiguous().mT,
    "with gaps in memory": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "expanded along an axis": lambda t: t[:1].expand(t.shape),
    "overlapping itself": overlapping,
    "requires grad": lambda t: t.detach().clone().requires_grad_(),
    "has a grad_fn": lambda t: t.detach().clone().requires_grad_() * 1,
    "a Parameter": lambda t: nn.Parameter(t.detach()),
    "a Buffer": lambda t: nn.Buffer(t.detach()),
    "an inference tensor": inference,
    "sparse COO": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: t.to_sparse_csr(),
    "MKL-DNN": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "a subclass": lambda t: t.as_subclass(Tagged),
    "a wrapper subclass": Wrapped,
    "a fake tensor": lambda t: FakeTensorMode().from_tensor(t),
    "a functional tensor": lambda t: torch._to_functional_tensor(t),  # type: ignore[attr-defined]
    "nested": lambda t: torch.nested.nested_tensor([*t]),
    "jagged": lambda t: torch.nested.nested_tensor([*t], layout=torch.jagged),
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "conjugated and real": lambda t: torch.complex(t, t).conj().real,
    "negated, by its bit": lambda t: torch._neg_view(t),  # type: ignore[attr-defined]
    "left over from a transform": leaked,
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "infinite": lambda t: torch.full_like(t, torch.inf),
    "copied on write": lambda t: torch._lazy_clone(t),  # type: ignore[attr-defined]
    "lazy": lambda t: nn.UninitializedParameter(),
    "None": lambda t: None,
    "a float": lambda t: 0.5,
    "an int": lambda t: 3,
    "True": lambda t: True,
    "a complex number": lambda t: 1j,
    "a string": lambda t: "text",
    "bytes": lambda t: b"text",
    "an object": lambda t: object(),
    "a class": lambda t: Tensor,
    "a function": lambda t: torch.sum,
    "a module": lambda t: nn.Linear(2, 2),
    "a NumPy array": lambda t: t.numpy(),
    "a NumPy number": lambda t: np.float32(0.5),
    "an unhashable object": lambda t: bytearray(3),
    "a shape": lambda t: t.shape,
    "a dtype": lambda t: t.dtype,
    "an iterator": lambda t: iter([t]),
    "in a list": lambda t: [t],
    "in a tuple, twice": lambda t: (t, t),
    "in a dict": lambda t: {"t": t},
    "an empty list": lambda t: [],
}


class Named(NamedTuple):
    """A tree of another type."""

    first: Any
    second: Any


def items(tree: Any) -> list[Any]:
    return list(tree.values()) if isinstance(tree, dict) else list(tree)


TREES: dict[str, Callable[[Any], Any]] = {
    "None as a whole": lambda tree: None,
    "a tensor as a whole": lambda tree: torch.ones(2),
    "its first entry": lambda tree: items(tree)[0],
    "an entry less": lambda tree: dict([*tree.items()][1:]) if isinstance(tree, dict) else tree[1:],
    "an entry more": lambda tree: (
        {**tree, "more": torch.ones(2)} if isinstance(tree, dict) else (*tree, torch.ones(2))
    ),
    "another key": lambda tree: {**dict([*tree.items()][1:]), "other": items(tree)[0]},
    "numbers for keys": lambda tree: dict(enumerate(items(tree))),
    "keys of several types": lambda tree: {**tree, 1: torch.ones(2), None: torch.ones(2)},
    "an ordered dict": lambda tree: collections.OrderedDict(tree.items()),
    "an ordered dict, reversed": lambda tree: collections.OrderedDict(reversed(tree.items())),
    "a default dict": lambda tree: collections.defaultdict(list, tree.items()),
    "a dict in another order": lambda tree: dict(reversed(tree.items())),
    "a chain of dicts": lambda tree: collections.ChainMap(tree),
    "a list": items,
    "a tuple": lambda tree: tuple(items(tree)),
    "a named tuple": lambda tree: Named(tree, tree),
    "in another list": lambda tree: [tree],
    "empty": lambda tree: type(tree)(),
}

ARGNUMS: dict[str, Any] = {
    "argnums -1": -1,
    "argnums 0": 0,
    "argnums (0, 0)": (0, 0),
    "argnums (0, -1)": (0, -1),
    "argnums [0]": [0],
    "argnums {0}": {0},
    "argnums range(1)": range(1),
    "argnums 10**30": 10**30,
    "argnums -7": -7,
    "argnums 7": 7,
    "argnums True": True,
    "argnums 0.0": 0.0,
    "argnums (None,)": (None,),
    "argnums a string": "0",
    "argnums an object": object(),
    "argnums a NumPy number": np.int64(0),
    "argnums a tensor": torch.tensor(0),
    "argnums a vector": torch.tensor([0]),
    "argnums ((0,),)": ((0,),),
    "argnums {}": {},
    "argnums a name": ("x",),
}

# Valid calls.


class Call(NamedTuple):
    """What `stage_vjp` is given."""

    apply: Callable[..., Any]
    params: Any
    buffers: Any
    args: Any
    kwargs: Any
    argnums: Any = None

    def held(self) -> list[Tensor]:
        return [leaf for leaf in trees.flatten(self[1:5])[0] if isinstance(leaf, Tensor)]


def dictionary(params: Any, buffers: Any, x: Tensor, *, mask: Any = None) -> Any:
    hidden = x @ params["w"] + params["b"]["bias"] + buffers["shift"]
    if mask is not None:
        hidden = hidden * mask
    return {"hidden": hidden, "top": hidden.argmax(-1), "sum": hidden.sum()}, {
        **buffers,
        "calls": buffers["calls"] + 1,
    }


def listed(params: Any, buffers: Any, x: Tensor, y: Any) -> Any:
    first, (second, scale) = params
    hidden = torch.tanh(x @ first) @ second * scale + y["added"]
    return hidden, (buffers[0] * 0.9 + hidden.detach().mean(0) * 0.1,)


def scalar(params: Tensor, buffers: Any, x: Tensor) -> Any:
    return ((x * params).sum() + buffers).square(), buffers


def recomputed(params: Any, buffers: Any, x: Tensor) -> Any:
    return checkpoint(lambda x: torch.sin(x @ params["w"]), x, use_reentrant=False) + x, buffers


def ready(maker: Callable[[], Call]) -> Callable[[], Call]:
    def make() -> Call:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return maker()

    return make


def of_module(module: nn.Module, *args: Any, **kwargs: Any) -> Call:
    return Call(*fs.functionalize(module), args, kwargs)


@ready
def call_dictionary() -> Call:
    params = {"w": torch.randn(3, 3), "b": {"bias": torch.randn(3)}}
    buffers = {"shift": torch.randn(3), "calls": torch.tensor(0)}
    return Call(dictionary, params, buffers, (torch.randn(3, 3),), {"mask": torch.rand(3, 3)})


@ready
def call_listed() -> Call:
    params = [torch.randn(3, 3), (torch.randn(3, 3), torch.tensor(2.0))]
    return Call(listed, params, (torch.zeros(3),), (torch.randn(3, 3), {"added": torch.randn(3, 3)}), {})


SUBJECTS: dict[str, Callable[[], Call]] = {
    "a dict of parameters": call_dictionary,
    "a list of parameters": call_listed,
    "a parameter": ready(lambda: Call(scalar, torch.randn(3), torch.tensor(1.0), (torch.randn(3),), {})),
    "a checkpoint": ready(lambda: Call(recomputed, {"w": torch.randn(3, 3)}, (), (torch.randn(3, 3),), {})),
    "a perceptron": ready(
        lambda: of_module(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Dropout(0.3), nn.Linear(4, 3)),
            torch.randn(5, 3),
        )
    ),
    "a convolution": ready(
        lambda: of_module(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.ReLU(inplace=True)),
            torch.randn(2, 2, 4, 4),
        )
    ),
    "an encoder": ready(
        lambda: of_module(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            torch.randn(2, 3, 4),
            src_key_padding_mask=torch.tensor([[False, False, True]] * 2),
        )
    ),
    "an embedding": ready(
        lambda: of_module(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.tensor([[0, 3], [4, 1]]))
    ),
    "an LSTM": ready(lambda: of_module(nn.LSTM(3, 2), torch.randn(2, 1, 3))),
}

Engine: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


@functools.lru_cache(maxsize=32)
def aten(apply: Callable[..., Any]) -> fs.CompiledStage:
    return fs.compile(apply, backend="aten")


ENGINES: dict[str, Engine] = {"closures": lambda apply: apply, "aten": aten}

# Eager, and what is compared with it.


def differentiated(args: Sequence[Any], argnums: Any) -> list[int]:
    """Which leaves of the arguments are differentiated, in terms of Python's own indices."""
    positions = range(len(args))
    if argnums is None:
        chosen = {*positions}
    else:
        chosen = {positions[number] for number in ((argnums,) if isinstance(argnums, int) else argnums)}
    owners = [i for i, arg in enumerate(args) for _ in trees.flatten(arg)[0]]
    leaves = trees.flatten(args)[0]
    return [k for k, leaf in enumerate(leaves) if owners[k] in chosen and trees.is_differentiable(leaf)]


def usable(leaf: Any) -> Any:
    """What eager can compute with: of an inference tensor, the clone that torch asks for."""
    return leaf.clone() if isinstance(leaf, Tensor) and not is_lazy(leaf) and leaf.is_inference() else leaf


def fresh(leaf: Any) -> Any:
    return usable(leaf).detach().requires_grad_() if trees.is_differentiable(leaf) else leaf


def ones(output: Any) -> Any:
    """Cotangents for all that can have one."""
    grads = trees.map_leaves(
        lambda leaf: (
            torch.ones(leaf.shape, dtype=leaf.dtype, device=leaf.device)
            if trees.is_differentiable(leaf)
            else None
        ),
        output,
    )
    return grads if grads is not None else output


def eagerly(call: Call, output_grads: Any = ...) -> tuple[Any, ...]:
    """Output, new buffers and all gradients by plain autograd; cotangents are ones if left out."""
    params = trees.map_leaves(fresh, call.params)
    leaves, spec = trees.flatten(call.args)
    diff = differentiated(call.args, call.argnums)
    leaves = [fresh(leaf) if i in diff else usable(leaf) for i, leaf in enumerate(leaves)]
    ends = [leaves[i] for i in diff]
    args = trees.unflatten(spec, leaves)
    buffers, kwargs = trees.map_leaves(usable, (call.buffers, call.kwargs))
    output, new_buffers = call.apply(params, buffers, *args, **kwargs)
    outputs, spec_of_output = trees.flatten(output)
    if output_grads is ... or (output_grads is None and len(outputs) == 1):
        output_grads = ones(output)
    cotangents, spec_of_cotangents = trees.flatten(output_grads)
    assert spec_of_cotangents == spec_of_output
    pairs = [
        (leaf, grad)
        for leaf, grad in zip(outputs, cotangents, strict=True)
        if grad is not None and leaf.requires_grad
    ]
    param_leaves, params_spec = trees.flatten(params)
    trained = [leaf for leaf in param_leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    wanted = [*ends, *trained]
    found: Sequence[Any] = [None] * len(wanted)
    if pairs and wanted:
        outputs, grads = map(list, zip(*pairs, strict=True))
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    of_args: list[Any] = [None] * len(leaves)
    for i, grad in zip(diff, found, strict=False):
        of_args[i] = grad
    rest = iter(found[len(ends) :])
    of_params = [next(rest) if any(leaf is t for t in trained) else None for leaf in param_leaves]
    return (
        output,
        new_buffers,
        trees.unflatten(spec, of_args),
        trees.unflatten(params_spec, of_params),
    )


def split(call: Call, engine: Engine) -> tuple[Any, ...]:
    """The same by `stage_vjp`."""
    output, new_buffers, pullback = fs.stage_vjp(
        engine(call.apply), call.params, call.buffers, *call.args, argnums=call.argnums, **call.kwargs
    )
    input_grads, weight_pullback = pullback(ones(output))
    return output, new_buffers, input_grads, weight_pullback()


def bare(leaf: Any) -> Any:
    """A tensor's values, dense and without classes of our own around them."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = ft.innermost(leaf.detach())
    leaf = leaf.inner if isinstance(leaf, Wrapped) else leaf
    if leaf.layout is not torch.strided:
        leaf = leaf.to_dense()
    if leaf.is_quantized:
        leaf = leaf.dequantize()
    if torch._is_functional_tensor(leaf):  # type: ignore[attr-defined]
        torch._sync(leaf)  # type: ignore[attr-defined]
        leaf = torch._from_functional_tensor(leaf)  # type: ignore[attr-defined]
    return leaf.as_subclass(Tensor).resolve_conj().resolve_neg()


def difference(got: Any, expected: Any, values: bool = True) -> str:
    """Say where two trees differ, or nothing."""
    leaves, spec = trees.flatten(got)
    wanted_leaves, wanted_spec = trees.flatten(expected)
    if spec != wanted_spec:
        return f"expected {wanted_spec}, got {spec}"
    for name, leaf, wanted in zip(trees.leaf_names(spec, "result"), leaves, wanted_leaves, strict=True):
        if isinstance(leaf, Tensor) != isinstance(wanted, Tensor):
            return f"{name}: expected {trees.describe(wanted)}, got {trees.describe(leaf)}"
        if not isinstance(leaf, Tensor):
            if leaf is not wanted and type(leaf) is not type(wanted):
                return f"{name}: expected {wanted!r}, got {leaf!r}"
            continue
        if (leaf.shape, leaf.dtype, leaf.device) != (wanted.shape, wanted.dtype, wanted.device):
            return f"{name}: expected {trees.describe(wanted)}, got {trees.describe(leaf)}"
        if not values or leaf.is_meta or isinstance(wanted, FakeTensor):
            continue
        ours, eagers = bare(leaf), bare(wanted)
        near = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 0.0}.get(leaf.dtype, 1e-5)
        try:
            torch.testing.assert_close(ours, eagers, rtol=near, atol=near, equal_nan=True)
        except AssertionError as error:
            return f"{name}: {error}"
    return ""


# What must be as it was.


def contents(tensor: Tensor) -> Any:
    """The bytes of a tensor's memory; of one that has none, nothing."""
    tensor = ft.innermost(tensor)
    if isinstance(tensor, Wrapped):
        return contents(tensor.inner)
    if tensor.layout is torch.sparse_coo:
        return contents(tensor._indices()), contents(tensor._values())
    if tensor.layout is torch.sparse_csr:
        return contents(tensor.crow_indices()), contents(tensor.values())
    if tensor.is_mkldnn:
        return contents(tensor.to_dense())
    strange = tensor.is_meta or tensor.is_nested or type(tensor) not in (Tensor, nn.Parameter, Tagged)
    if strange or torch._is_functional_tensor(tensor):  # type: ignore[attr-defined]
        return None
    storage = tensor.detach().as_subclass(Tensor).untyped_storage()
    return torch.frombuffer(bytearray(b"\0") + bytearray(storage.cpu()), dtype=torch.uint8).tolist()


def state(tensor: Tensor) -> tuple[Any, ...]:
    if is_lazy(tensor):
        return ()
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.requires_grad, tensor.grad if tensor.is_leaf else None, contents(tensor)


def surroundings() -> tuple[Any, ...]:
    """All of torch's global modes that a stage or an engine touches."""
    return (
        ft.current_level(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._is_any_autocast_enabled(),
        torch._C._is_torch_function_enabled(),
        torch._C._autograd._saved_tensors_hooks_is_enabled(),
        torch._C._functorch.get_inplace_requires_grad_allowed(),
        torch.get_default_dtype(),
        torch.backends.cudnn.enabled,
        _interception._patches._users,
        _interception.current_interceptor(),
        torch.autograd.Function.__dict__["apply"],
        getattr(torch.autograd.Function.apply, "__code__", None),  # exchanged up to torch 2.13
        vars(checkpoint.__wrapped__).get("__dynamo_disable"),  # type: ignore[attr-defined]
    )


class Attempt(NamedTuple):
    """What a call returned, or what it raised."""

    result: Any
    error: Exception | None


def attempt(function: Callable[[], Any]) -> Attempt:
    torch.manual_seed(1)
    hooks = ft.saving_hooks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Attempt(function(), None)
        except Exception as error:
            # Up to torch 2.12 the generator of a checkpoint that fails pops its hooks when it is freed:
            # here, and not in the midst of another attempt, whose hooks it would take.
            traceback.clear_frames(error.__traceback__)
            return Attempt(None, error)
        finally:
            ft.drop_saving_hooks(hooks)  # what a generator has left that is not freed


def judged(
    kind: tuple[str, str], ours: Callable[[], Any], eager: Callable[[], Any] | None, held: Iterable[Tensor]
) -> Attempt:
    """Make a call and, if there is one, eager's; fail unless what comes of it is allowed."""
    held = list(held)
    expected = None if eager is None else attempt(eager)
    before, modes = [*map(state, held)], surroundings()
    got = attempt(ours)
    assert surroundings() == modes, f"{kind}: a global mode has changed"
    for tensor, was in zip(held, before, strict=True):
        assert state(tensor) == was, f"{kind}: {trees.describe(tensor)} has changed"
    # Kernels that are given meta tensors beside real ones may read what is not there.
    with_meta = any(tensor.is_meta for tensor in held)
    outcome = "equal"
    if isinstance(got.error, fs.StageError):
        outcome = "StageError"
        assert_informative(got.error)
    elif got.error is not None:
        outcome = "raises as eager"
        assert kind[0] != "argnums", got.error
        kinds = type(expected.error if expected is not None else None), type(got.error)
        if not (issubclass(*kinds) or issubclass(*reversed(kinds))):
            raise AssertionError(f"{kind}: eager: {expected and expected.error!r}") from got.error
    elif expected is not None and (expected.error is None or not with_meta):
        assert expected.error is None, f"{kind}: eager raises {expected.error!r}, we do not"
        found = difference(got.result, expected.result, values=not with_meta)
        assert not found, f"{kind}: {found}"
    TRIED[(*kind, outcome)] += 1
    return got


def assert_informative(error: Exception) -> None:
    """A refusal says what is wrong and, in a sentence of its own, what to do."""
    text = str(error)
    assert len(text) > 40, text
    assert re.search(r"[.;:?] \w|\bpass\b|\bexpected\b", text), f"no way out: {text}"
    if isinstance(error, fs.LeafError):
        assert re.search(r"\[|'|params|buffers|accumulate|_grads|argument|dtype|stage_index|loss_fn", text), (
            f"no leaf: {text}"
        )


# The properties.


def mutated(tree: Any, place: int, name: str) -> Any:
    """A tree with one leaf replaced; which, is `place` modulo their number."""
    leaves, spec = trees.flatten(tree)
    candidates = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not candidates:
        return None
    i = candidates[place % len(candidates)]
    leaves[i] = STRANGE[name](leaves[i])
    # Not by the spec, which may refuse nodes in the place of leaves.
    return trees.unflatten(spec, leaves)


def aliased(call: Call, place: int, other: int, view: bool) -> Call | None:
    """A call that gives one tensor twice."""
    leaves, spec = trees.flatten(call[1:5])
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    i = tensors[place % len(tensors)]
    like = [
        k
        for k in tensors
        if k != i and (leaves[k].shape, leaves[k].dtype) == (leaves[i].shape, leaves[i].dtype)
    ]
    if not like:
        return None
    source = leaves[like[other % len(like)]]
    leaves[i] = source.view_as(source) if view else source
    return Call(call.apply, *trees.unflatten(spec, leaves), call.argnums)


PLACES = ("params", "buffers", "args", "kwargs")


def mutation(call: Call, where: str, what: str, place: int, other: int) -> Call | None:
    """The call with one thing wrong, or nothing where that cannot be."""
    try:
        if what in STRANGE:
            return call._replace(**{where: mutated(getattr(call, where), place, what)})
        if what in TREES:
            tree = TREES[what](getattr(call, where))
            if where == "args":
                tree = (tree, *call.args[1:]) if not isinstance(tree, (list, tuple)) else tuple(tree)
            if where == "kwargs" and not isinstance(tree, dict):
                return None
            return call._replace(**{where: tree})
        if what in ARGNUMS:
            return call._replace(argnums=ARGNUMS[what])
        if what == "params and buffers exchanged":
            return call._replace(params=call.buffers, buffers=call.params)
        return aliased(call, place, other, view=what == "a view of another leaf")
    except Exception:  # the mutation does not apply to this leaf: it has no rows, say
        return None


ALIASES = ("another leaf", "a view of another leaf", "params and buffers exchanged")
WHATS = st.one_of(
    st.sampled_from([*STRANGE]), st.sampled_from([*STRANGE]), st.sampled_from([*TREES, *ARGNUMS, *ALIASES])
)
NUMBERS = st.integers(0, 11)


def try_call(call: Call, engine: str, where: str, what: str, place: int, other: int) -> None:
    bad = mutation(call, where, what, place, other)
    if bad is None or (where != "params" and getattr(bad, where) is None):
        return
    kind = ("argnums" if what in ARGNUMS else where, f"{what}, {engine}")
    run = ENGINES[engine]
    right = attempt(lambda: split(call, run))
    assert not isinstance(right.error, Exception) or engine == "aten", right.error
    judged(kind, lambda: split(bad, run), lambda: eagerly(bad), [*call.held(), *bad.held()])
    again = attempt(lambda: split(call, run))
    assert type(again.error) is type(right.error), again.error
    if right.error is None:
        assert not difference(again.result, right.result)


def replaced(tree: Any, place: int, what: str) -> Any:
    """A tree with one leaf replaced, or replaced as a whole."""
    if what in STRANGE:
        return mutated(tree, place, what)
    return TREES[what](tree)


def apart(tree: Any) -> Any:
    """A tree whose tensors are all copied, for what will be donated."""
    return trees.map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def try_cotangents(call: Call, engine: str, what: str, place: int) -> None:
    """I with one thing wrong about its cotangents, then I as it should be."""
    apply = ENGINES[engine](call.apply)
    torch.manual_seed(1)
    output, _, pullback = fs.stage_vjp(apply, call.params, call.buffers, *call.args, **call.kwargs)
    right = ones(output)
    try:
        wrong = replaced(right, place, what)
    except Exception:  # the mutation does not apply
        return
    expected = attempt(lambda: eagerly(call)[2:])
    assert expected.error is None

    def both() -> Any:
        input_grads, weight_pullback = pullback(wrong, retain=True)
        return input_grads, weight_pullback(retain=True)

    held = [*call.held(), *tensors(output), *tensors(right), *tensors(wrong)]
    judged(("cotangents", f"{what}, {engine}"), both, lambda: eagerly(call, wrong)[2:], held)
    assert not pullback.consumed
    assert not difference(attempt(lambda: unretained(pullback, right)).result, expected.result)
    again = attempt(lambda: pullback(right)).error
    assert isinstance(again, fs.ConsumedError), again


def unretained(pullback: fs.Pullback, output_grads: Any) -> Any:
    input_grads, weight_pullback = pullback(output_grads)
    return input_grads, weight_pullback()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.flatten(tree)[0] if isinstance(leaf, Tensor)]


def try_accumulate(call: Call, engine: str, what: str, place: int) -> None:
    """W into accumulators of which one is wrong, then W as it should be."""
    apply = ENGINES[engine](call.apply)
    torch.manual_seed(1)
    output, _, pullback = fs.stage_vjp(apply, call.params, call.buffers, *call.args, **call.kwargs)
    pending = pullback(ones(output))[1]
    expected = pending(retain=True)
    right = trees.map_leaves(lambda g: None if g is None else torch.ones_like(g), expected)
    wrong = None
    if what in ALIASES:
        wrong = shared(right, place, what)
    else:
        with contextlib.suppress(Exception):  # the mutation does not apply
            wrong = replaced(apart(right), place, what)
    if wrong is None:
        return

    def sums(totals: Any) -> Any:
        return trees.map_leaves(
            lambda total, grad: (
                grad if total is None else total if grad is None else (grad + total).to(total.dtype)
            ),
            totals,
            expected,
        )

    kind = ("accumulate", f"{what}, {engine}")
    eager = attempt(lambda: sums(wrong))
    got = judged(kind, lambda: fs.stage_backward_weight(pending, wrong), None, call.held())
    if got.error is None:
        assert eager.error is None, f"{kind}: eager raises {eager.error!r}, we do not"
        assert not difference(got.result, eager.result), f"{kind}: {difference(got.result, eager.result)}"
        assert pending.consumed
        return
    assert isinstance(got.error, fs.StageError), got.error
    assert not pending.consumed
    total = fs.stage_backward_weight(pending, apart(right))
    assert not difference(total, sums(right))


def shared(right: Any, place: int, what: str) -> Any:
    """Accumulators of which two lie in the same memory."""
    leaves, spec = trees.flatten(apart(right))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    i = places[place % len(places)]
    like = [leaves[k] for k in places if k != i and leaves[k].shape == leaves[i].shape]
    if not like:
        return None
    leaves[i] = like[0].view_as(like[0]) if what == "a view of another leaf" else like[0]
    return trees.unflatten(spec, leaves)


def make_derived(params: Any) -> Any:
    return {"low": params["w"].to(torch.bfloat16), "same": params["b"], "twice": params["w"] * 2}


def try_derive(what: str, place: int, wrong_grads: bool) -> None:
    """`derive` with a wrong parameter, or its pullback with a wrong gradient."""
    params = {"w": torch.ones(3, 3), "b": torch.ones(3)}
    derived, pullback = fs.derive(make_derived, params)
    right = trees.map_leaves(torch.ones_like, derived)
    kind = ("derived_grads" if wrong_grads else "derive", what)

    def eager(params: Any, grads: Any) -> Any:
        leaves = trees.map_leaves(fresh, params)
        outputs = trees.flatten(make_derived(leaves))[0]
        flat, spec = trees.flatten(grads)
        assert spec == trees.flatten(derived)[1]
        pairs = [(o, g) for o, g in zip(outputs, flat, strict=True) if g is not None]
        ends, params_spec = trees.flatten(leaves)
        found = torch.autograd.grad(*map(list, zip(*pairs, strict=True)), allow_unused=True, inputs=ends)
        return trees.unflatten(params_spec, found)

    try:
        wrong = replaced(right if wrong_grads else params, place, what)
    except Exception:  # the mutation does not apply
        return
    if wrong_grads:
        got = judged(kind, lambda: pullback(wrong, retain=True), None, [*tensors(wrong), *tensors(params)])
    else:
        got = judged(
            kind, lambda: fs.derive(make_derived, wrong)[0], lambda: make_derived(wrong), tensors(wrong)
        )
    assert got.error is None or isinstance(got.error, fs.StageError) or not wrong_grads, got.error
    total = pullback(right)
    assert torch.equal(total["w"], torch.full((3, 3), 3.0))
    assert torch.equal(total["b"], torch.ones(3))


@settings(max_examples=1500, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.sampled_from([*SUBJECTS]),
    st.sampled_from([*ENGINES]),
    st.sampled_from(PLACES),
    WHATS,
    NUMBERS,
    NUMBERS,
)
def test_a_call_with_one_thing_wrong_is_right_or_refused_and_changes_nothing(
    subject: str, engine: str, where: str, what: str, place: int, other: int
) -> None:
    if (subject, engine, where) == ("an LSTM", "aten", "params") and what in OTHER_DTYPES:
        return
    try_call(made(subject), engine, where, what, place, other)


OTHER_DTYPES = ("float64", "float16", "bfloat16", "float8", "complex", "int64", "uint8", "bool")
"""oneDNN casts one weight of an LSTM silently; the products that a compiled stage makes of it do not."""


@functools.cache
def made(subject: str) -> Call:
    return SUBJECTS[subject]()


@settings(max_examples=250, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.sampled_from([*SUBJECTS]), st.sampled_from([*ENGINES]), st.sampled_from([*STRANGE, *TREES]), NUMBERS
)
def test_a_wrong_cotangent_consumes_nothing(subject: str, engine: str, what: str, place: int) -> None:
    try_cotangents(made(subject), engine, what, place)


UNKNOWN = "a fake tensor"
"""Beside real gradients it ends in an error of torch's own."""


@settings(max_examples=250, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.sampled_from([*SUBJECTS]),
    st.sampled_from([*ENGINES]),
    st.sampled_from([what for what in (*STRANGE, *TREES, *ALIASES) if what != UNKNOWN]),
    NUMBERS,
)
def test_wrong_accumulators_consume_nothing(subject: str, engine: str, what: str, place: int) -> None:
    try_accumulate(made(subject), engine, what, place)


@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.sampled_from([what for what in (*STRANGE, *TREES) if what != UNKNOWN]), NUMBERS, st.booleans())
def test_wrong_derived_gradients_consume_nothing(what: str, place: int, wrong_grads: bool) -> None:
    try_derive(what, place, wrong_grads)
