"""From a module to a stage function: the first step, on which everything else builds.

A stage function is `apply(params, buffers, *args, **kwargs) -> (output, new_buffers)`. It mutates
nothing it is given; what a module would update in place comes back as a value.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcstage import forks
from funcstage._torch import functorch as ft
from funcstage._torch.modules import own_cached_weights, weight_names
from funcstage._torch.operators import without_torch_function
from funcstage._torch.tensors import is_functional
from funcstage.errors import LeafError, StageError, StructureError, stage_name
from funcstage.gathered import Gathering, show_shards
from funcstage.registration import holds_tensor, is_consumed_by_looking, way_out
from funcstage.report import size, table
from funcstage.state.cells import held_by_callable
from funcstage.state.contents import Contents
from funcstage.state.module import locked, look_over
from funcstage.state.overlaps import names_that_share, refuse_written_buffers
from funcstage.state.parameter_hooks import check_no_hooks
from funcstage.state.parts import Parts
from funcstage.state.subclasses import check_parameters
from funcstage.trees import Buffers, Params, PyTree, Tensors, describe, flatten, leaf_names
from funcstage.wrappers import check_unwrapped


class FunctionalStage(NamedTuple):
    """A module as a pure function, with the values that it starts from.

    Attributes:
        apply: `apply(params, buffers, *args, **kwargs) -> (output, new_buffers)`.
        params: the trainable parameters by qualified name, detached; they share the module's storage.
        buffers: the buffers, then the frozen parameters, by qualified name, likewise.
    """

    apply: Callable[..., tuple[PyTree, Tensors]]
    params: Tensors
    buffers: Tensors

    def __repr__(self) -> str:
        held = []
        for kind, tree in (("parameters", self.params), ("buffers", self.buffers)):
            tensors = [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]
            held.append(f"{len(tensors)} {kind} ({size(sum(tensor.nbytes for tensor in tensors))})")
        return f"<FunctionalStage of {stage_name(self.apply)}: {', '.join(held)}>"

    def _repr_html_(self) -> str:
        name = getattr(self.apply, "__qualname__", type(self.apply).__name__)
        rows = [
            (path, kind, describe(leaf), f"{leaf.nbytes:,} B" if isinstance(leaf, Tensor) else "")
            for kind, tree in (("parameter", self.params), ("buffer", self.buffers))
            for path, leaf in tree.items()
        ]
        return table(f"{name}: {len(rows)} tensors", ("name", "", "tensor", "size"), rows)


def functionalize(module: nn.Module) -> FunctionalStage:
    """Turn a module into a pure stage function and its parameters and buffers.

    Built on `torch.func.functional_call`. The module's code and its train/eval mode are read
    at call time; its tensors are read here, once, and never written. While the stage's forward runs, the
    module and its submodules hold the tensors that the stage was given: stages that share a submodule
    therefore run one at a time, whatever their threads, and so does `functionalize`; other readers of the
    module (a plain call, `state_dict()`, an optimizer) must wait until no stage of it runs. A parameter
    that the module reaches under several names (tied weights) appears once, under the first. Parameters
    that do not require grad are held constant: they are found among the buffers.

    Args:
        module: any initialised `nn.Module`.

    Returns:
        A `FunctionalStage`.

    Raises:
        StageError: if `module` is not a module, is wrapped for data parallelism, has parameters with hooks,
            buffers that require grad, or lazy parameters that were never initialised.

    Example:
        >>> import torch, funcstage as fs
        >>> apply, params, buffers = fs.functionalize(torch.nn.BatchNorm1d(3))
        >>> sorted(params), sorted(buffers)
        (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'])
        >>> output, new_buffers = apply(params, buffers, torch.ones(2, 3))
        >>> int(buffers["num_batches_tracked"]), int(new_buffers["num_batches_tracked"])
        (0, 1)
    """
    if not isinstance(module, nn.Module):
        raise StructureError(
            f"functionalize expects an nn.Module, got {describe(module)}. A function of the form "
            "apply(params, buffers, *args) -> (output, new_buffers) needs no functionalize: "
            "pass it to stage_vjp as it is."
        )
    check_unwrapped(module)
    with locked(module):
        stage = function_of(module)
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    check_no_hooks(type(module).__name__, trainable, accumulators=True)
    stage.apply.refuses_hooks = True  # type: ignore[attr-defined]  # those that come later, too
    return stage


def function_of(module: nn.Module) -> FunctionalStage:
    """Do what `functionalize` does, for callers who run the hooks of parameters themselves."""
    with locked(module):  # or another thread's stage has its tensors there
        return _function_of(module)


def _function_of(module: nn.Module) -> FunctionalStage:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise StageError(
                f"{type(module).__name__}: {name!r} is lazy and not yet initialised, so it has no shape. "
                "Call the module once on an example input, then functionalize it."
            )
        if not _is_place(module, name):
            raise StructureError(
                f"{type(module).__name__} names a tensor {name!r}, but holds none under that name: its class "
                "has a named_parameters() or named_buffers() of its own, as wrappers do that hide a prefix. "
                "Wrap it in an nn.Sequential, which names tensors by where they are, or pass the module "
                "inside of it."
            )
    show_shards(module)
    named_params = dict(module.named_parameters())
    check_parameters(type(module).__name__, named_params)
    for name, buffer in module.named_buffers():
        if buffer.requires_grad:
            raise StructureError(
                f"{type(module).__name__}: the buffer {name!r} requires grad, and would get no gradient, as "
                "gradients are those of parameters. Register it as an nn.Parameter, or detach it."
            )
    params = {name: p.detach() for name, p in named_params.items() if p.requires_grad}
    frozen = {name: p.detach() for name, p in named_params.items() if not p.requires_grad}
    buffers = {name: b.detach() for name, b in module.named_buffers()} | frozen
    return FunctionalStage(ModuleFunction(module, params, buffers, frozenset(frozen)), params, buffers)


class ModuleFunction:
    """A module as a stage function: `apply(params, buffers, *args, **kwargs) -> (output, new_buffers)`.

    A shallow copy has the same module; `copy.deepcopy` and `pickle` take the module along.

    Attributes:
        module: the module, read for its code and its train/eval mode.
        contents: what it holds, from call to call.
        gathering: how parameters that FSDP shards become whole.
        refuses_hooks: whether parameters may have no hooks, as nobody would run them.
        reduces: whether its W reduces gradients of what FSDP shards.
    """

    refuses_hooks = False
    reduces = True
    _gathers = True

    def __init__(self, module: nn.Module, params: Params, buffers: Buffers, frozen: frozenset[str]) -> None:
        self.__qualname__ = self.__name__ = type(module).__name__
        self.module = module
        self.contents = Contents(module)
        self._frozen = frozen
        self._param_shapes = {name: p.shape for name, p in params.items()}
        self._buffer_shapes = {name: b.shape for name, b in buffers.items()}
        self._look_at_parts()

    def _look_at_parts(self) -> None:
        """Read what the module is made of."""
        self._aliases = _tied_names(self.module)
        self._parts = Parts(self.module)
        self.gathering = Gathering(self.module)
        self._twins = names_that_share(
            {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        )
        look_over(self.module)

    def _check_parts(self) -> None:
        """Refuse a module that has other parameters than it had, which would get no gradients."""
        if self._parts.unchanged():
            return
        with locked(self.module):
            self._check_names()
            self._look_at_parts()

    def _check_names(self) -> None:
        check_unwrapped(self.module)
        names = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        known = set(self._param_shapes.keys() | self._frozen | self._aliases.keys())
        known -= {name for name, _ in self.module.named_buffers(remove_duplicate=False)}
        if names != known:
            differ = sorted(names ^ known)
            raise StructureError(
                f"{self.__qualname__}: the module was changed after functionalize, and {differ[0]!r} is "
                f"{'new' if differ[0] in names else 'no longer a parameter'}. Call functionalize again."
            )

    def __call__(self, params: Params, buffers: Buffers, *args: Any, **kwargs: Any) -> tuple[PyTree, Buffers]:
        module = self.module
        self._check_parts()
        with without_torch_function():
            if self.refuses_hooks and self._parts.any_hooked():
                trained = {n: p for n, p in module.named_parameters() if n in self._param_shapes}
                check_no_hooks(self.__qualname__, trained)
            _check(module, "params", params, self._param_shapes)
            _check(module, "buffers", buffers, self._buffer_shapes)
        # In-place updates must land in copies; frozen parameters are never updated, so not copied.
        copies = {name: b.clone() for name, b in buffers.items() if name not in self._frozen}
        state = {**buffers, **copies, **params}
        if self.gathering.groups and self._gathers:
            state = self.gathering.whole(self.__qualname__, state, self.reduces)
        for alias, name in self._aliases.items():
            state[alias] = state[name]
        recurrent = self._parts.recurrent
        flat = _flat_weights(recurrent, state) if recurrent else _NOTHING
        hooks = self.gathering.around(module) if self.gathering.groups else _NOTHING
        with locked(module), flat, hooks, own_cached_weights():
            # The ties are resolved above, once, rather than in every call.
            output = self._parts.call_with(state, args, kwargs)
        refuse_written_buffers(self.__qualname__, copies, buffers, self.named, self._twins, (args, kwargs))
        # Buffers that the module has assigned anew are in `state` now.
        return output, {name: buffers[name] if name in self._frozen else state[name] for name in buffers}

    def held(self) -> list[Tensor | None]:
        """The tensors that the module holds itself."""
        return self._parts.held()

    def named(self) -> dict[str, Tensor | None]:
        """The same by name."""
        return dict(zip(self._parts.names, self.held(), strict=True))

    def for_whole_parameters(self) -> ModuleFunction:
        """The same function of parameters that somebody else has gathered."""
        function = copy.copy(self)
        function._gathers = False
        return function

    def __repr__(self) -> str:
        return f"<stage function of {self.__qualname__}>"


_NOTHING = nullcontext()


def _is_place(module: nn.Module, name: str) -> bool:
    """Whether a module, or one that its attributes lead to, holds a parameter or buffer under a name."""
    *path, last = name.split(".")
    owner: Any = module
    for attribute in path:
        owner = getattr(owner, attribute, None)
    return isinstance(owner, nn.Module) and (last in owner._parameters or last in owner._buffers)


def checked_result(apply: Callable[..., Any], result: Any) -> tuple[PyTree, Buffers]:
    """Return a stage function's result as its two parts, or refuse it.

    Raises:
        StructureError: if it is no pair, or if its output holds no tensor.
    """
    name = stage_name(apply)
    if not isinstance(result, tuple) or len(result) != 2:
        raise StructureError(
            f"{name}: a stage function returns (output, new_buffers), got {describe(result)}. Return "
            "`output, buffers` where the function updates no buffer; funcstage.functionalize turns a module "
            "into a stage function."
        )
    leaves, spec = flatten(result[0])
    for i, leaf in enumerate(leaves):
        if type(leaf) is not Tensor and holds_tensor(leaf):
            raise StructureError(
                f"{name}: {leaf_names(spec, 'output')[i]} is a {type(leaf).__qualname__}. It holds tensors, "
                f"but no engine looks into it. {way_out(leaf)}."
            )
        held = () if isinstance(leaf, Tensor) else held_by_callable(leaf)
        for tensor in held:
            if ft.innermost(tensor) is not tensor or is_functional(tensor):
                raise StructureError(
                    f"{name}: {leaf_names(spec, 'output')[i]} is a {type(leaf).__qualname__} that holds a "
                    f"tensor of the forward ({describe(tensor)}), which would be dead when somebody reads it "
                    "there. Return the tensor itself, and make of it outside what is to be made."
                )
        if is_consumed_by_looking(leaf):
            raise StructureError(
                f"{name}: {leaf_names(spec, 'output')[i]} is a {type(leaf).__qualname__}. Nobody sees "
                "its tensors before it has yielded them. Return a list or a tuple of what it yields."
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise StructureError(
            f"{name}: the output holds no tensor, got {describe(result[0])}; there is nothing to "
            "differentiate. Return the tensors that the next stage or the loss needs."
        )
    return result


def check_leaves(
    root: str, tree: PyTree, flat: tuple[list[Any], optree.PyTreeSpec] | None = None
) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves and the structure of a tree; refuse tensors that no engine looks into.

    `flat` is what is returned, where that is known.
    """
    leaves, spec = flat or flatten(tree)
    if PLAIN_TENSORS.issuperset(map(type, leaves)) and not any(map(_IS_NESTED, leaves)):
        return leaves, spec
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if is_lazy(leaf):
                raise LeafError(
                    f"{leaf_names(spec, root)[i]} is lazy and not yet initialised, so it has no shape. "
                    "Call the module that it belongs to once on an example input."
                )
            if leaf.is_nested:
                layout = str(leaf.layout).removeprefix("torch.")
                raise LeafError(
                    f"{leaf_names(spec, root)[i]} is a nested tensor ({layout} layout), which no engine "
                    "looks into. Pass padded tensors with a mask, or the packed values with their offsets."
                )
    return leaves, spec


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Map every further name of a parameter or buffer to the first one."""
    first: dict[Tensor, str] = {}
    aliases: dict[str, str] = {}
    # A module that is reached twice is listed once: swapped in twice, a tensor would stay there.
    for prefix, part in module.named_modules():
        for named in (part.named_parameters, part.named_buffers):
            for name, tensor in named(prefix, recurse=False, remove_duplicate=False):
                if first.setdefault(tensor, name) != name:
                    aliases[name] = first[tensor]
    return aliases


@contextmanager
def _flat_weights(recurrent: dict[str, nn.RNNBase], state: dict[str, Tensor]) -> Iterator[None]:
    """Swap the list of weights that recurrent modules cache beside their parameters.

    Left alone they would build it from the swapped parameters, flatten those in place for cuDNN, and keep
    them after the call.
    """
    kept = [(rnn, rnn._flat_weights, rnn._flat_weight_refs) for rnn in recurrent.values()]

    def put_back() -> None:
        for rnn, flat_weights, refs in kept:
            rnn._flat_weights, rnn._flat_weight_refs = flat_weights, refs

    try:
        with forks.lent(put_back):
            for prefix, rnn in recurrent.items():
                names = (f"{prefix}.{name}" if prefix else name for name in weight_names(rnn))
                weights: list[Any] = [state.get(name) for name in names]
                rnn._flat_weights = weights
                rnn._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]
            yield
    finally:
        put_back()


def _check(module: nn.Module, what: str, given: Any, shapes: dict[str, torch.Size]) -> None:
    """Refuse state whose names or shapes are not the module's (missing names would silently be its own)."""
    if (
        type(given) is dict
        and [*given] == [*shapes]
        and PLAIN_TENSORS.issuperset(map(type, given.values()))
        and [*map(_SHAPE, given.values())] == [*shapes.values()]
    ):
        return
    owner = type(module).__name__
    if not isinstance(given, Mapping):
        raise StructureError(
            f"{owner}: {what} must be a flat dict from qualified names to tensors, as functionalize "
            f"returns it; got {describe(given)}."
        )
    if given.keys() != shapes.keys():
        missing = sorted(shapes.keys() - given.keys())
        extra = sorted(map(str, given.keys() - shapes.keys()))
        raise StructureError(
            f"{owner}: {what} has other names than the module: missing {missing or 'none'}, unexpected "
            f"{extra or 'none'}. Pass a dict with the keys that functionalize returned."
        )
    for name, shape in shapes.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor):
            raise StructureError(
                f"{owner}: {what}[{name!r}] must be a tensor, got {describe(tensor)}. Pass the dict that "
                "functionalize returned, or tensors like those in it."
            )
        if tensor.shape != shape:
            raise LeafError(
                f"{owner}: {what}[{name!r}] must have shape {list(shape)}, got {describe(tensor)}. "
                "If the module was changed after functionalize, call functionalize again."
            )


PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))
_SHAPE = attrgetter("shape")
_IS_NESTED = attrgetter("is_nested")
