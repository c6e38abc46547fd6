"""A stage driven through situations, beside plain eager autograd in the same ones.

What is allowed: each result equals eager's; or a `StageError` before anything ran or was consumed; or eager
raises too, and then the split raises, or gives what eager gives where nobody writes anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from of_faults import FAULTS
from situation import Situation, World
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from funcstage import trees
from funcstage.checks import differentiated_leaves
from funcstage.engines.graph.compile import compile
from funcstage.errors import ConsumedError, StageError
from funcstage.functional import functionalize
from funcstage.pullback import Pullback, stage_vjp
from funcstage.testing.reference import _Twin, _twin, normal_like
from funcstage.testing.stages import Stage
from funcstage.testing.tolerances import compare, nodes_on_tape
from funcstage.weight_pullback import WeightPullback

Engine = Callable[[Callable[..., Any]], Callable[..., Any]]

_TOLERANCE = 1e-6
"""Of results in double precision, some of them ill-conditioned; what is silently wrong is wrong by more."""

_MICROBATCHES = 2

ORDERS = ("each", "late", "together", "reversed")
"""Each microbatch by itself; W after the last I; both F first, and then in order or the last one first."""


@dataclass
class Record:
    """What a run gave, in the order in which it came.

    Attributes:
        results: named values; an error of the user's own is one.
        error: what ended the run, if anything did.
        untrue: what was said and was not so.
    """

    results: list[tuple[str, Any]] = field(default_factory=list)
    error: BaseException | None = None
    untrue: list[str] = field(default_factory=list)

    def add(self, name: str, tree: Any) -> None:
        """Note the leaves of a tree as they are now."""
        leaves, spec = trees.flatten(tree)
        for path, leaf in zip(trees.leaf_names(spec, name), leaves, strict=True):
            self.results.append((path, leaf.detach().clone() if isinstance(leaf, Tensor) else leaf))


@dataclass(frozen=True)
class Script:
    """Two microbatches of a stage, in situations.

    Attributes:
        stage: a generated stage.
        situations: what happens around it, the innermost first.
        order: in which F, I and W of the microbatches come.
        retain: whether I and W are asked to keep what they hold.
    """

    stage: Stage
    situations: tuple[Situation, ...]
    order: str = "each"
    retain: bool = False

    def built(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The module in its situations and its arguments, always the same."""
        module, args, kwargs = self.stage.build()
        for situation in self.situations:
            module = situation.build(module)
        return module, args, kwargs

    def eager(self, writes: bool = True, all_around: bool = False) -> Record:
        """Run plain autograd, if told so without what callers write between passes, or amid all of theirs."""
        return _Eager(self, writes, all_around).run()

    def split(self, engine: Engine) -> Record:
        """Run F, I and W."""
        return _Split(self, engine).run()

    def opened(self, output: Any) -> Any:
        """The output as a pytree that everybody knows."""
        for situation in reversed(self.situations):
            output = situation.opened(output)
        return output

    def closed(self, cotangents: Any) -> Any:
        """Cotangents as the stage takes them."""
        for situation in self.situations:
            cotangents = situation.closed(cotangents)
        return cotangents


class _Run:
    """What both sides do alike."""

    def __init__(self, script: Script, writes: bool = True) -> None:
        self.script = script
        self.writes = writes
        self.record = Record()
        self.module, self.args, self.kwargs = script.built()
        self.diff = differentiated_leaves(self.args, script.stage.argnums)
        self.held = [situation.held() for situation in script.situations]

    def run(self) -> Record:
        order, last = self.script.order, _MICROBATCHES - 1
        passed: list[tuple[int, Any]] = []
        waiting: list[Callable[[], None]] = []
        try:
            for k in range(_MICROBATCHES):
                try:
                    passed.append((k, self.forward(k)))
                except KeyError as error:
                    self.record.results.append(("error", type(error)))
                if order in ("each", "late") or k == last:
                    for i, one in reversed(passed) if order == "reversed" else passed:
                        waiting.append(self.input_backward(i, one))
                    passed.clear()
                if order == "each" or k == last:
                    while waiting:
                        waiting.pop(0)()
                for situation in self.script.situations:
                    situation.between(self.module)
            for situation in self.script.situations:
                self.record.add("left behind", situation.observed(self.module))
            self.record.add("left in arguments", self.left())
            self.record.add("parameters", dict(self.module.named_parameters()))
        except (Exception, *FAULTS.values()) as error:
            self.record.error = error
        return self.record

    def keywords(self, k: int) -> dict[str, Any]:
        """The arguments that situations add."""
        added: dict[str, Any] = {}
        for situation, held in zip(self.script.situations, self.held, strict=True):
            added |= situation.keywords(held, k) | situation.handed(self.module, k)
        return added

    def left(self) -> list[Any]:
        """What is in the objects among the arguments."""
        pairs = zip(self.script.situations, self.held, strict=True)
        return [value for situation, held in pairs for value in situation.left(held)]

    def forward(self, k: int) -> Any:
        raise NotImplementedError

    def input_backward(self, k: int, passed: Any) -> Callable[[], None]:
        raise NotImplementedError

    def cotangents(self, k: int, opened: Any) -> Any:
        generator = torch.Generator().manual_seed(self.script.stage.seed + k)
        return trees.map_leaves(lambda leaf: normal_like(leaf, generator), opened)

    def after(self, verb: str, world: World) -> None:
        if self.writes:
            for situation in self.script.situations:
                situation.after(verb, world)

    def seed(self, k: int) -> None:
        torch.manual_seed(self.script.stage.seed + k)

    def drawn(self, k: int) -> None:
        """Note where the random generator stands."""
        self.record.add(f"next draw {k}", torch.rand(2, dtype=torch.float64))


class _Eager(_Run):
    def __init__(self, script: Script, writes: bool, all_around: bool) -> None:
        super().__init__(script, writes)
        self.all_around = all_around

    def forward(self, k: int) -> Any:
        leaves, spec = trees.flatten(self.args)
        leaves = [_twin(leaf) for leaf in leaves]
        inputs = [leaves[i].requires_grad_() for i in self.diff]
        for i in self.diff:
            leaves[i] = _Twin.apply(leaves[i])
        self.seed(k)
        with self.entered("F"):
            kwargs = trees.map_leaves(_twin, self.kwargs)
            output = self.module(*trees.unflatten(spec, leaves), **kwargs, **self.keywords(k))
        self.drawn(k)
        opened = self.script.opened(output)
        self.record.add(f"output {k}", opened)
        self.record.add(f"buffers {k}", dict(self.module.named_buffers()))
        params = [p for p in self.module.parameters() if p.requires_grad]
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        held = [*self.module.buffers(), *frozen]
        world = World(self.module, _tensors(leaves), [*params], held, [], _tensors(opened), [])
        self.after("F", world)
        return opened, inputs, params, world

    def input_backward(self, k: int, passed: Any) -> Callable[[], None]:
        opened, inputs, params, world = passed
        cotangents = trees.flatten(self.cotangents(k, opened))[0]
        pairs = [
            (leaf, cotangent)
            for leaf, cotangent in zip(trees.flatten(opened)[0], cotangents, strict=True)
            if isinstance(leaf, Tensor) and leaf.requires_grad and cotangent is not None
        ]
        outputs, given = [leaf for leaf, _ in pairs], [cotangent.clone() for _, cotangent in pairs]
        whole = any(node.name() == "CheckpointFunctionBackward" for node in nodes_on_tape(outputs))
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        of_weights: list[Tensor | None] = []
        with self.entered("I"):
            if outputs and whole:  # such a checkpoint cannot be asked for less
                torch.autograd.backward(outputs, given)
                grads = [leaf.grad for leaf in inputs]
                of_weights = [p.grad for p in params]
                for p in params:
                    p.grad = None
            elif outputs and inputs:
                grads = torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True)
        self.record.add(f"input gradients {k}", list(grads))
        world.cotangents = _tensors(cotangents)
        world.input_grads = _tensors(list(grads))
        self.after("I", world)

        def weight_backward() -> None:
            with self.entered("W"):
                if outputs and params and not whole:
                    torch.autograd.backward(outputs, given, inputs=params)
            self.record.add(f"weight gradients {k}", of_weights or [p.grad for p in params])
            for p in params:
                p.grad = None

        return weight_backward

    def entered(self, verb: str) -> ExitStack:
        stack = ExitStack()
        for situation in self.script.situations:
            around = situation.around if self.all_around else situation.around_eager
            stack.enter_context(around(verb))
        return stack


class _Split(_Run):
    def __init__(self, script: Script, engine: Engine) -> None:
        super().__init__(script)
        self.functional = None
        self.engine = engine

    def run(self) -> Record:
        try:
            apply, self.params, self.buffers = functionalize(self.module)
            self.apply = self.engine(apply)
            for situation in self.script.situations:
                self.apply = situation.stage(self.apply)
        except Exception as error:
            self.record.error = error
            return self.record
        return super().run()

    def forward(self, k: int) -> Any:
        args, kwargs = trees.map_leaves(_twin, (self.args, self.kwargs))
        held = _tensors((self.params, self.buffers, args, kwargs))
        before = [t.detach().clone() for t in held]
        given, keywords, left = self.buffers, self.keywords(k), self.left()

        def run() -> Any:
            self.seed(k)
            return stage_vjp(
                self.apply,
                self.params,
                given,
                *args,
                argnums=self.script.stage.argnums,
                **kwargs,
                **keywords,
            )

        try:
            output, self.buffers, pullback = self.attempt("F", run, None)
        except StageError:
            if [*map(id, self.left())] != [*map(id, left)]:
                self.record.untrue.append("F was refused, and wrote into an argument")
            raise
        finally:
            for tensor, value in zip(held, before, strict=True):
                same = compare("given", tensor.detach(), value, 0.0).accepted
                assert same, "F wrote into what it was given"
        self.drawn(k)
        opened = self.script.opened(output)
        self.record.add(f"output {k}", opened)
        named = [name for name, _ in self.module.named_buffers()]
        self.record.add(f"buffers {k}", {name: self.buffers[name] for name in named})
        world = World(
            self.module, _tensors(args), [*self.params.values()], [*given.values()], [], _tensors(opened), []
        )
        versions = {name: buffer._version for name, buffer in given.items()}
        self.after("F", world)
        for name, version in versions.items():  # of eager's buffers there is one version only
            if given[name]._version != version:
                self.buffers[name].copy_(given[name])
        return opened, pullback, world

    def input_backward(self, k: int, passed: Any) -> Callable[[], None]:
        opened, pullback, world = passed
        cotangents = self.cotangents(k, opened)
        given = self.script.closed(cotangents)
        retain = self.script.retain
        input_grads, weight_pullback = self.attempt("I", lambda: pullback(given, retain=retain), pullback)
        leaves = trees.flatten(input_grads)[0]
        self.record.add(f"input gradients {k}", [leaves[i] for i in self.diff])
        world.cotangents, world.input_grads = _tensors(cotangents), _tensors(leaves)
        self.after("I", world)

        def weight_backward() -> None:
            grads = self.attempt("W", lambda: weight_pullback(retain=retain), weight_pullback)
            self.record.add(f"weight gradients {k}", list(grads.values()))

        return weight_backward

    def attempt(self, verb: str, run: Callable[[], Any], used: Pullback | WeightPullback | None) -> Any:
        """Run a pass, and once more where it failed; what a pullback says of itself must be so."""
        try:
            with self.entered(verb):
                return run()
        except tuple(FAULTS.values()):
            consumed = used is not None and used.consumed
            if consumed and self.script.retain:
                self.record.untrue.append(f"{verb} was to be retained, and is consumed")
        try:
            result = run()
        except ConsumedError:
            if not consumed:
                self.record.untrue.append(f"{verb} is consumed, and denied it")
            raise
        if consumed:
            self.record.untrue.append(f"{verb} said that it was consumed, and runs")
        return result

    def entered(self, verb: str) -> ExitStack:
        stack = ExitStack()
        for situation in self.script.situations:
            stack.enter_context(situation.around(verb))
        return stack


def verdict(script: Script, name: str, engine: Engine) -> str:
    """Drive a stage by an engine and compare it with eager.

    Args:
        script: what to drive.
        name: the engine's name, by which situations say who may refuse them.
        engine: a function from a stage function to one.

    Returns:
        What came of it: ``"equal"``, ``"refused"`` or ``"eager raises"``.

    Raises:
        AssertionError: if a result differs from eager's, or there was another error, or a setting changed.
    """
    with ambient_kept():
        split = _Split(script, engine)
        ours = split.run()
    assert not ours.untrue, f"{_situation(script)}: {ours.untrue}"
    observed = [value for situation in script.situations for value in situation.observed(split.module)]
    for value in [*observed, *split.left()]:
        assert not _is_dead(value), f"{_situation(script)}: {type(value).__name__} is left behind"
    is_refused = any(situation.refused for situation in script.situations)
    if is_refused and isinstance(ours.error, StageError):
        return "refused"
    with ambient_kept():
        expected = script.eager()
    if is_refused:  # or else the module has failed before
        assert ours.error is not None, f"{_situation(script)}: not refused"
        assert type(ours.error) is type(expected.error), f"{_situation(script)}: {ours.error}"
        return "eager raises"
    if expected.error is not None:
        outcome, expected = "eager raises", script.eager(writes=False)
        if ours.error is not None or expected.error is not None:
            return outcome
        # On a plain tape the caller's hooks switch off autograd's look for writes, as they do in eager.
        amid_all = script.eager(all_around=True)
        if amid_all.error is None and _equal(script, ours, amid_all):
            return "equal"
        # What comes after it eager never saw.
        ours.results = [(name, value) for name, value in ours.results if " 0" in name]
        expected.results = [(name, value) for name, value in expected.results if " 0" in name]
    else:
        outcome = "equal"
    _assert_equal(script, ours, expected)
    if ours.error is None:
        assert len(ours.results) == len(expected.results)
        return outcome
    if not isinstance(ours.error, StageError):
        raise AssertionError(f"{_situation(script)}: eager runs, the split raises") from ours.error
    refusing = {each for situation in script.situations for each in situation.refusable}
    in_parts = name == "aten" and "closures" in refusing and _runs_in_parts(script)
    if name not in refusing and not in_parts and not _refuses_the_plain(script, engine):
        raise AssertionError(f"{_situation(script)}: refused, and should not be") from ours.error
    return "refused"


def _is_dead(value: Any) -> bool:
    """Whether it is a tensor that only lived in a transform or a trace."""
    if not isinstance(value, Tensor):
        return False
    return type(value) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(value)


def _refuses_the_plain(script: Script, engine: Engine) -> bool:
    return isinstance(Script(script.stage, ()).split(engine).error, StageError)


def _runs_in_parts(script: Script) -> bool:
    """Whether the compiled stage has lines that run uncompiled, and are refused as these are."""
    whole = functools.partial(compile, backend="aten", fullgraph=True)
    return isinstance(Script(script.stage, ()).split(whole).error, StageError)


def _equal(script: Script, ours: Record, expected: Record) -> bool:
    try:
        _assert_equal(script, ours, expected)
    except AssertionError:
        return False
    return len(ours.results) == len(expected.results)


def _assert_equal(script: Script, ours: Record, expected: Record) -> None:
    scale = max((float(v.abs().max()) for v in _finite(expected)), default=0.0)
    for (name, got), (_, wanted) in zip(ours.results, expected.results, strict=False):
        difference = compare(name, got, wanted, _TOLERANCE)
        small = not difference.complaint and difference.absolute <= 1e-12 * scale
        assert difference.accepted or small, f"{_situation(script)}: {difference}"


def _finite(record: Record) -> Iterator[Tensor]:
    for _, value in record.results:
        if isinstance(value, Tensor) and trees.is_differentiable(value) and value.numel():
            yield value.nan_to_num(0, 0, 0)


def _situation(script: Script) -> str:
    return ", ".join(map(repr, script.situations)) or "nothing out of the ordinary"


@contextmanager
def ambient_kept() -> Iterator[None]:
    """Insist that settings of the process and the thread are what they were."""
    before = _ambient()
    yield
    assert _ambient() == before, f"left behind: {_ambient()}, before: {before}"


def _ambient() -> tuple[Any, ...]:
    from torch._dynamo import eval_frame

    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        len(_get_current_function_mode_stack()),
        len(_get_current_dispatch_mode_stack()),
        torch._C._functorch.maybe_current_level()
        if hasattr(torch._C._functorch, "maybe_current_level")
        else None,
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        str(eval_frame._stance),
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.flatten(tree)[0] if isinstance(leaf, Tensor)]
