"""From one model to the stages of a pipeline, which train the model's own parameters.

A chain (`nn.Sequential`, of others too) is sliced. Any other forward is traced once, symbolically by
`torch.fx` with the modules in it left whole, or, given an example, by `torch.export`; the graph is then cut
where the named modules are called. The way to that graph is that of `torch.distributed.pipelining`, whose
marker (`pipe_split`) is used; what its splitter does next is not. It copies tied parameters, overwrites the
forward of the named modules for good, loses the structure of the output, and leaves it to a class of stage of
its own to carry values past stages that have no use for them. Here every stage takes what the previous one
returns, and passes on what later ones need.
"""

from __future__ import annotations

import copy
import difflib
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.pipelining import pipe_split

from funcstage._torch import pytree
from funcstage._torch.modules import has_hooks, is_saved_without
from funcstage.errors import LeafError, StageError, StructureError
from funcstage.trees import describe, look

_CONSTANT = "_tensor_constant"  # what torch.fx calls tensors that a forward makes
_BY_HAND = "Write the stages as modules of your own, out of the model's submodules."


class CutError(StageError, ValueError):
    """A module that cannot be cut there, or a stage used in another mode than it was cut in."""


def cut(
    module: nn.Module,
    at: Sequence[str],
    *,
    example: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[nn.Module]:
    """Cut a module into stages, before each of the named submodules.

    The stages hold the module's own parameters and buffers, under the module's names: an optimizer over
    `module.parameters()` trains them, and `module.state_dict()` is the checkpoint. A parameter that two
    stages use (tied weights) is in both; its gradient is the sum of theirs. A buffer that two stages update
    is updated in each apart.

    Three ways, by what is given:

    - a chain of `nn.Sequential`, the named modules being in it or in chains within it, is sliced; nothing
      is traced;
    - any other module is traced symbolically. Submodules without a cut inside are not entered: they may do
      anything, at any batch size and in either mode. The forward around them (embedding, a loop over
      layers, head) may not branch on the values or sizes of tensors, and its optional arguments keep their
      defaults;
    - with an `example`, everything is traced by `torch.export`, which follows more. The stages are then for
      inputs of the example's shapes, in the mode that the module is in, and no submodule may branch on
      values. A dataclass in the output becomes a dict, and what `torch.utils.checkpoint` would compute again
      is kept.

    Args:
        module: the model.
        at: qualified names of submodules, in the order in which they are called.
        example: positional arguments of one microbatch, for `torch.export`; needed where the forward cannot
            be traced symbolically, and of no consequence to a chain.
        kwargs: keyword arguments of one microbatch, likewise.

    Returns:
        One stage more than there are names. Each takes what the one before returns: a tensor, or a tuple of
        tensors as several arguments. The first one takes the required arguments of `module`; with an
        example, the tensors in `example` and then those in `kwargs`, all by position. Stages that were traced
        are `torch.fx.GraphModule`s, which can be copied, not pickled.

    Raises:
        CutError: if a name is unknown, out of order, given twice, of a module that is never called, called
            more than once, or first of all, or if the module's forward cannot be traced; by the stages, if
            they were traced in one mode and are put into the other.
        LeafError: by the first stage, if an input has another shape or dtype than in the example.

    Example:
        >>> import torch, funcstage as fs
        >>> from funcstage.pipelining import cut
        >>> layers = [torch.nn.Linear(4, 4) for _ in range(4)]
        >>> stages = [fs.functionalize(stage) for stage in cut(torch.nn.Sequential(*layers), at=["1", "3"])]
        >>> [list(stage.params) for stage in stages]
        [['0.weight', '0.bias'], ['1.weight', '1.bias', '2.weight', '2.bias'], ['3.weight', '3.bias']]
    """
    names = _checked_names(module, at)
    if not names:
        return [module]
    if all(_is_chain(module.get_submodule(name)) for name in _containers(names)):
        order = [name for name, _ in module.named_modules(remove_duplicate=False) if name in names]
        _check_order(module, names, order)
        stages: list[nn.Module] = list(_slices(module, names))
    elif example is None and kwargs is None:
        stages = _cut_symbolically(module, names)
    else:
        stages = _cut_exported(module, names, tuple(example or ()), dict(kwargs or {}))
    for name, stage in zip([*names, None], stages, strict=True):
        if not list(stage.children()) and not list(stage.parameters()):
            raise CutError(
                f"{_class(module)}: the stage that ends before {name!r} would be empty. Leave out that name, "
                "or name a later module in its place."
            )
    return stages


# Chains.


class Chain(nn.Sequential):
    """A slice of an `nn.Sequential`, whose input may be a tuple, which arrives as several arguments."""

    def forward(self, *value: Any) -> Any:
        """Run the modules in turn."""
        return super().forward(value[0] if len(value) == 1 else value)


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and not has_hooks(module)


def _containers(names: Sequence[str]) -> set[str]:
    """Return the names of all modules with a cut inside."""
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 1)}


def _slices(module: nn.Module, names: Sequence[str]) -> list[Chain]:
    parts: list[OrderedDict[str, Any]] = [OrderedDict()]
    for key, child in module._modules.items():
        if key in names:
            parts.append(OrderedDict())
        inner = [name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")]
        if not inner:
            parts[-1][key] = child
            continue
        first, *others = _slices(child, inner)  # type: ignore[arg-type]
        if len(first):
            parts[-1][key] = first
        parts += [OrderedDict({key: other}) for other in others]
    slices = [Chain(part) for part in parts]
    for part in slices:
        part.training = module.training  # the modules in it keep theirs
    return slices


# Traces.


class _Tracer(fx.Tracer):
    """Traces a forward, leaving whole what has no cut inside, and notes the stage of every node."""

    proxy_buffer_attributes = True  # so that they may be indexed by what is traced

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.named = {module.get_submodule(name): name for name in names}
        self.containers = _containers(names)
        self.entered: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.containers

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m in self.named:
            self.entered.append(self.named[m])
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["stage"] = len(self.entered)
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        function, args = super().create_args_for_root(root_fn, is_module)
        return function, [args[0], *map(_required, args[1:])]


def _required(argument: fx.Proxy) -> Any:
    """Put the default in the place of an argument that has one."""
    node = argument.node
    if str(node.target).startswith("*"):
        node.graph.erase_node(node)
        return {} if str(node.target).startswith("**") else ()
    if not node.args:
        return argument
    node.graph.erase_node(node)
    return node.args[0]


def _cut_symbolically(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    containers = [module.get_submodule(name) for name in _containers(names)]
    for container in containers:
        if has_hooks(container):
            raise CutError(
                f"{_class(module)}: hooks are registered on {_class(container)}, which would be cut apart, "
                "so no stage would run them. Register them on modules that stay whole."
            )
    modes = [container.training for container in containers]
    try:
        traced, graph = _traced(module, names)
        for container in containers:
            container.training = not container.training
        other, other_graph = _traced(module, names)
    finally:
        for container, mode in zip(containers, modes, strict=True):
            container.training = mode
    for name, value in _constants(traced, graph).items():
        if not torch.equal(value, _constants(other, other_graph).get(name, value)):
            raise CutError(
                f"{_class(module)}: between the modules that stay whole, its forward makes a tensor of "
                f"{look(value)} that differs from call to call. Make it in a submodule, or give an example. "
                f"{_BY_HAND}"
            )
    same = graph.python_code("self").src == other_graph.python_code("self").src
    return _split(traced, graph, len(names) + 1, fx.GraphModule if same else _OneMode)


def _traced(module: nn.Module, names: Sequence[str]) -> tuple[nn.Module, fx.Graph]:
    """Return a graph, and the module with what the graph refers to."""
    root = copy.copy(module)  # the tracer adds constants to it
    tracer = _Tracer(module, names)
    parts = [root, *(module.get_submodule(name) for name in _containers(names) if name)]
    before = [(dict(vars(part)), dict(part._buffers)) for part in parts]
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise CutError(
            f"{_class(module)}: its forward cannot be traced symbolically: {_reason(error)}. Pass `example`, "
            "the arguments of one microbatch: torch.export then traces it, and follows more. Or write the "
            "stages as modules of your own, from the model's submodules."
        ) from error
    finally:
        changed = [name for part, was in zip(parts, before, strict=True) for name in _restored(part, *was)]
    if changed:
        raise CutError(
            f"{_class(module)}: its forward assigns {', '.join(map(repr, changed))}, and no stage would do "
            f"that. Do it in a submodule, or give an example. {_BY_HAND}"
        )
    _check_order(module, names, tracer.entered)
    return root, graph


def _restored(module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Any]) -> list[str]:
    """Undo assignments to a module, and return the names."""
    now = {**vars(module), **module._buffers}
    was = {**attributes, **buffers}
    changed = [name for name in now if now[name] is not was.get(name) and not name.startswith(_CONSTANT)]
    module._buffers.update(buffers)
    vars(module).update(attributes)
    for name in vars(module).keys() & set(changed) - attributes.keys():
        delattr(module, name)
    return changed


def _constants(root: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    return {name: vars(root)[name] for name in names if name.startswith(_CONSTANT)}


def _cut_exported(
    module: nn.Module, names: Sequence[str], example: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[nn.Module]:
    entered: list[str] = []

    def marked(name: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            entered.append(name)
            pipe_split()

        return mark

    hooks = [module.get_submodule(name).register_forward_pre_hook(marked(name)) for name in names]
    try:
        program = torch.export.export(module, example, kwargs)
    except Exception as error:
        raise CutError(
            f"{_class(module)}: torch.export cannot trace it: {_reason(error)}. {_BY_HAND}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    _check_order(module, names, entered)
    flat: Any = program.module(check_guards=False)
    stage = 0
    for node in list(flat.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.pippy._pipe_split.default:
            stage += 1
            flat.graph.erase_node(node)
        node.meta = {"stage": stage}
    if stage != len(names):
        raise CutError(
            f"{_class(module)}: {len(names) - stage} of the cuts are inside an operation of the traced "
            f"graph, such as a region without gradients. {_BY_HAND}"
        )
    _check_inputs(flat.graph, pytree.tree_leaves((example, kwargs)))
    output = flat.graph.output_node()
    structure = program.call_spec.out_spec
    assert structure is not None
    output.args = (pytree.tree_unflatten(list(output.args[0]), structure),)
    flat.graph.set_codegen(fx.graph.CodeGen())
    root = _with_own_names(module, flat, flat.graph)
    return _split(root, flat.graph, len(names) + 1, _OneMode)


def _check_inputs(graph: fx.Graph, example: Sequence[Any]) -> None:
    """Let the graph refuse inputs unlike the example; drop those that are no tensors, as constants."""
    placeholders = graph.find_nodes(op="placeholder")
    first = placeholders[-1].next
    for node, value in zip(placeholders, example, strict=True):
        if not isinstance(value, Tensor):
            graph.erase_node(node)
            continue
        with graph.inserting_before(first):
            check = graph.call_function(_expect, (node, node.name, tuple(value.shape), value.dtype))
        check.meta["stage"] = 0


def _expect(value: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if value.shape != shape or value.dtype != dtype:
        raise LeafError(
            f"input {name!r} of the first stage must be {str(dtype).removeprefix('torch.')}{list(shape)}, as "
            f"in the example that the model was cut with; got {describe(value)}. Cut it with an example of "
            "this shape."
        )


def _with_own_names(module: nn.Module, traced: nn.Module, graph: fx.Graph) -> nn.Module:
    """Let the graph name tensors as the module first does; return the module with those that it lacks."""
    first: dict[Any, str] = {tensor: name for name, tensor in module.named_buffers()}
    first |= {tensor: name for name, tensor in module.named_parameters()}
    root = copy.copy(module)
    for node in graph.find_nodes(op="get_attr"):
        try:
            own = operator.attrgetter(node.target)(module)
        except AttributeError:
            value = operator.attrgetter(node.target)(traced)
            node.target = node.target.replace(".", "_")
            vars(root)[node.target] = value  # setattr would put a module into a dict that the copies share
        else:
            node.target = first.get(own, node.target)
    return root


class _OneMode(fx.GraphModule):
    """A stage whose trace holds in one mode alone, training or evaluation."""

    def train(self, mode: bool = True) -> _OneMode:
        if mode != self.training:
            was, other = ("training", "eval()") if self.training else ("evaluation", "train()")
            raise CutError(
                f"this stage was traced in {was} mode, and the trace depends on it. Put the model into the "
                f"other mode with {other} and cut it again; the stages share its parameters."
            )
        return super().train(mode)


# From a graph whose nodes know their stage to stages.

_SIZES = {"shape", "ndim", "dtype", "device"}
_SIZE_METHODS = {"size", "dim", "numel", "ndimension"}
_ARITHMETIC = {
    operator.getitem,
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.mod,
    getattr,
}


def _split(root: nn.Module, graph: fx.Graph, num_stages: int, kind: type[fx.GraphModule]) -> list[nn.Module]:
    """Give each stage its nodes, with what it needs of earlier ones as arguments.

    Parameters and sizes of tensors do not cross a cut: each stage reads them again.
    """
    output = graph.output_node()
    nodes = [node for node in graph.nodes if node is not output]
    output.meta["stage"] = num_stages - 1
    read_again: set[fx.Node] = set()
    for node in nodes:
        if _is_read(node, read_again):
            read_again.add(node)

    def sources(node: fx.Node) -> Iterator[fx.Node]:
        for used in node.all_input_nodes:
            yield from sources(used) if used in read_again else [used]

    last_use: dict[fx.Node, int] = {}
    for node in [*(node for node in nodes if node not in read_again), output]:
        for used in sources(node):
            last_use[used] = max(last_use.get(used, 0), node.meta["stage"])

    stages: list[nn.Module] = []
    arriving = [node for node in nodes if node.op == "placeholder"]
    for stage in range(num_stages):
        own = fx.Graph()
        copies = {node: own.placeholder(node.name) for node in arriving}

        def copied(node: fx.Node, own: fx.Graph = own, copies: dict[fx.Node, fx.Node] = copies) -> fx.Node:
            if node not in copies:
                for used in node.all_input_nodes:
                    copied(used, own, copies)
                copies[node] = own.node_copy(node, copies.__getitem__)
            return copies[node]

        for node in nodes:
            if node.op != "placeholder" and node not in read_again and node.meta["stage"] == stage:
                copied(node)
        if stage == num_stages - 1:
            own.output(fx.map_arg(output.args[0], copied))
        else:
            arriving = [
                node
                for node in nodes
                if node not in read_again and node.meta["stage"] <= stage < last_use.get(node, -1)
            ]
            leaving = tuple(copies[node] for node in arriving)
            own.output(leaving if len(leaving) != 1 else leaving[0])
        stages.append(_stage(root, own, kind, f"Stage{stage}"))
    return stages


def _is_read(node: fx.Node, read_again: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return True
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function" or node.target not in _ARITHMETIC:
        return False
    if node.target is getattr and node.args[1] in _SIZES:
        return True
    return all(used in read_again and used.op != "get_attr" for used in node.all_input_nodes)


def _stage(root: nn.Module, graph: fx.Graph, kind: type[fx.GraphModule], name: str) -> nn.Module:
    stage = kind(root, graph, name)
    kept = root.state_dict(keep_vars=True)
    for prefix, part in stage.named_modules():
        for buffer in part._buffers:
            if (f"{prefix}.{buffer}" if prefix else buffer) not in kept:
                is_saved_without(part).add(buffer)
    return stage


# Refusals.


def _checked_names(module: nn.Module, at: Sequence[str]) -> list[str]:
    if not isinstance(module, nn.Module):
        raise StructureError(f"cut expects an nn.Module, got {describe(module)}. Pass the whole model.")
    if isinstance(at, str) or not all(isinstance(name, str) for name in at):
        raise StructureError(
            f"at must be a list of names of submodules, such as ['layers.2', 'layers.4'], got {at!r}."
        )
    known = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    for i, name in enumerate(at):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise CutError(
                f"{_class(module)} has no submodule {name!r}; near it are "
                f"{', '.join(map(repr, near or known[:3]))}. Names are those of named_modules()."
            )
        if name in at[:i]:
            raise CutError(f"at names {name!r} twice. Name each cut once.")
    return list(at)


def _check_order(module: nn.Module, names: Sequence[str], entered: Sequence[str]) -> None:
    """Refuse cuts that the calls of the named modules, in turn, do not make."""
    for name in names:
        calls = entered.count(name)
        if calls == 0:
            inside = [f"{name}.{key}" for key, _ in module.get_submodule(name).named_children()]
            instead = f" Name what is called in it, such as {inside[0]!r}." if inside else ""
            raise CutError(f"{_class(module)}: its forward never calls {name!r}.{instead}")
        if calls > 1:
            raise CutError(
                f"{_class(module)}: its forward calls {name!r} {calls} times, so a stage cannot begin where "
                "it is called. Name a module that is called once."
            )
    if list(entered) != list(names):
        raise CutError(
            f"{_class(module)}: the cuts are out of order; its forward calls the modules in the order "
            f"at={list(entered)}."
        )


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0].strip() if lines else type(error).__name__).rstrip(".")
