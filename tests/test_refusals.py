"""Bad input gets a `StageError` that names the leaf, what was expected and what came; nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from both_ways import ENGINES, stage_of
from torch import Tensor, nn

import funcstage as fs


@pytest.fixture
def pullback() -> fs.Pullback:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        h = x @ params["w"]
        return {"hidden": [h, h.argmax(-1)], "loss": h.sum()}, buffers

    return fs.stage_vjp(apply, {"w": torch.randn(3, 3)}, (), torch.randn(2, 3))[2]


def good(hidden: Any = None, indices: Any = None, loss: Any = None) -> dict[str, Any]:
    return {"hidden": [hidden, indices], "loss": loss}


@pytest.mark.parametrize(
    ("output_grads", "kind", "words"),
    [
        (torch.ones(2, 3), fs.StructureError, ["structure", "hidden"]),
        ({"hidden": (None, None), "loss": None}, fs.StructureError, ["structure"]),
        ({"hidden": [None], "loss": None}, fs.StructureError, ["structure"]),
        (good(torch.ones(3, 2)), fs.LeafError, ["['hidden'][0]", "[2, 3]", "[3, 2]"]),
        (good(torch.ones(2, 3, dtype=torch.float64)), fs.LeafError, ["float32", "float64"]),
        (good(torch.ones(2, 3, device="meta")), fs.LeafError, ["cpu", "meta"]),
        (good(1.0), fs.StructureError, ["['hidden'][0]", "float"]),
        (good(nn.UninitializedParameter()), fs.LeafError, ["['hidden'][0]", "UninitializedParameter"]),
        (good(torch.nested.nested_tensor([torch.ones(3)] * 2)), fs.LeafError, ["['hidden'][0]", "nested"]),
        (good(indices=torch.ones(2)), fs.LeafError, ["['hidden'][1]", "None"]),
        (None, fs.LeafError, ["one real scalar", "[2, 3]"]),
    ],
)
def test_a_wrong_cotangent_is_refused_and_nothing_is_consumed(
    pullback: fs.Pullback, output_grads: Any, kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind) as refusal:
        pullback(output_grads)
    assert isinstance(refusal.value, fs.StageError)
    for word in words:
        assert word in str(refusal.value)
    (dx,), weight_pullback = pullback(good(torch.ones(2, 3)))
    assert dx is not None
    assert weight_pullback()["w"] is not None


def test_cotangents_may_not_be_left_out_for_a_vector_or_a_complex_number() -> None:
    for x in (torch.randn(3), torch.randn((), dtype=torch.complex64)):
        _, _, pullback = fs.stage_vjp(lambda params, buffers, x: (x * 2, buffers), (), (), x)
        with pytest.raises(fs.LeafError, match="one real scalar"):
            pullback()


@pytest.mark.parametrize("argnums", [1, (0, 3), -2])
def test_argnums_out_of_range_is_refused(argnums: Any) -> None:
    with pytest.raises(fs.StructureError, match="1 positional argument"):
        fs.stage_vjp(lambda p, b, x: (x, b), (), (), torch.ones(2), argnums=argnums)


@pytest.mark.parametrize("value", [3.0, "text", torch.arange(3), [torch.arange(2), None]])
def test_argnums_of_something_without_a_gradient_is_refused(value: Any) -> None:
    with pytest.raises(fs.StructureError, match="positional argument 1"):
        fs.stage_vjp(lambda p, b, x, y: (x, b), (), (), torch.ones(2), value, argnums=(0, 1))


@pytest.mark.parametrize("argnums", [True, (0.0,), ("x",)])
def test_argnums_of_another_type_is_refused(argnums: Any) -> None:
    with pytest.raises(fs.StructureError, match="argnums must be"):
        fs.stage_vjp(lambda p, b, x: (x, b), (), (), torch.ones(2), argnums=argnums)


def test_a_module_in_the_place_of_a_stage_function_is_told_the_way() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(fs.StructureError, match="functionalize"):
        fs.stage_vjp(module, {}, {}, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(fs.StructureError, match="unpack"):
        fs.stage_vjp(fs.functionalize(module), {}, {}, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(fs.StructureError, match="functionalize"):
        fs.functionalize(lambda x: x)  # type: ignore[arg-type]


@pytest.mark.parametrize("result", [torch.ones(2), (torch.ones(2),), [torch.ones(2), {}]])
def test_a_function_that_returns_no_pair_is_refused(result: Any) -> None:
    with pytest.raises(fs.StructureError, match=r"\(output, new_buffers\)"):
        fs.stage_vjp(lambda p, b, x: result, (), (), torch.ones(2))


@pytest.mark.parametrize("output", [lambda x: x > 0, lambda x: {"a": x.long(), "b": (x.int(), 3)}])
def test_an_output_that_has_no_gradient_has_no_one_for_its_cotangent(output: Any) -> None:
    _, _, pullback = fs.stage_vjp(lambda p, b, x: (output(x), b), (), (), torch.ones(()))
    with pytest.raises(fs.LeafError, match=r"holds no floating or complex tensor.* Return the tensor"):
        pullback()


@pytest.mark.parametrize("output", [None, 3.0, {"a": "b"}])
def test_a_function_that_returns_no_tensor_is_refused(output: Any) -> None:
    with pytest.raises(fs.StructureError, match="no tensor"):
        fs.stage_vjp(lambda p, b, x: (output, b), (), (), torch.ones(2))


def test_parameters_of_another_structure_are_refused_by_name() -> None:
    apply, params, buffers = fs.functionalize(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    x = torch.ones(4, 2)
    without = {name: p for name, p in params.items() if name != "0.weight"}
    for call in (apply, lambda *args: fs.stage_vjp(apply, *args)):
        with pytest.raises(fs.StructureError, match=r"missing \['0.weight'\]"):
            call(without, buffers, x)
        with pytest.raises(fs.StructureError, match=r"unexpected \['more'\]"):
            call({**params, "more": x}, buffers, x)
        with pytest.raises(fs.StructureError, match="running_mean"):
            call(params, {}, x)
        with pytest.raises(fs.StructureError, match="flat dict"):
            call(list(params.values()), buffers, x)
        with pytest.raises(fs.LeafError, match=r"\[3, 2\].*\[2, 3\]"):
            call({**params, "0.weight": torch.ones(2, 3)}, buffers, x)
        with pytest.raises(fs.StructureError, match="must be a tensor"):
            call({**params, "0.weight": None}, buffers, x)


def test_a_lazy_module_is_refused_until_it_was_called() -> None:
    module = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(fs.StageError, match=r"0\.weight.*lazy"):
        fs.functionalize(module)
    module(torch.ones(1, 2))
    assert list(fs.functionalize(module).params) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "buffer",
    [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True) * 2, None],
    ids=["a leaf", "a result", "a parameter"],
)
def test_a_buffer_that_requires_grad_is_refused(buffer: Any) -> None:
    module = nn.BatchNorm1d(2)
    module._buffers["running_mean"] = module.weight if buffer is None else buffer
    with pytest.raises(fs.StructureError, match=r"BatchNorm1d: the buffer 'running_mean' requires grad"):
        fs.functionalize(module)
    module.running_mean = module.running_mean.detach()
    fs.functionalize(module)


def test_writing_into_a_captured_tensor_is_refused() -> None:
    counter = torch.zeros(3)

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        counter.add_(x)
        return x * params, buffers

    with pytest.raises(fs.PurityError, match="captured"):
        fs.stage_vjp(apply, torch.ones(3), (), torch.ones(3))
    assert torch.equal(counter, torch.zeros(3))


@pytest.mark.parametrize("write", ["add_", "mul_", "setitem", "view", "data", "out"])
def test_writing_into_a_parameter_or_buffer_is_refused_and_writes_nothing(write: str) -> None:
    def overwrite(tensor: Tensor) -> None:
        if write == "setitem":
            tensor[0] = 5.0
        elif write == "view":
            with torch.no_grad():
                tensor[:2].fill_(3.0)
        elif write == "data":
            tensor.detach().zero_()
        elif write == "out":
            with torch.no_grad():
                torch.add(torch.ones(3), 1, out=tensor.detach())
        else:
            with torch.no_grad():
                getattr(tensor, write)(2.0)

    def apply(params: Any, buffers: Any, x: Tensor, *, which: str) -> Any:
        overwrite({"params": params, "buffers": buffers}[which]["t"])
        return x * params["t"], buffers

    for which, name in (("params", "parameter"), ("buffers", "buffer")):
        params, buffers = {"t": torch.ones(3)}, {"t": torch.ones(3)}
        with pytest.raises(fs.PurityError, match=rf"{name} \['t'\].*float32\[3\]"):
            fs.stage_vjp(apply, params, buffers, torch.ones(3), which=which)
        assert torch.equal(params["t"], torch.ones(3))
        assert torch.equal(buffers["t"], torch.ones(3))


def test_an_embedding_that_renormalises_its_weight_is_refused() -> None:
    module = nn.Embedding(5, 3, max_norm=0.1)
    before = module.weight.detach().clone()
    with pytest.raises(fs.PurityError, match="weight"):
        fs.stage_vjp(*fs.functionalize(module), torch.arange(5))
    assert torch.equal(module.weight, before)


def test_an_argument_that_is_overwritten_in_a_list_is_refused_and_stays() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        torch._foreach_mul_([x], 2.0)
        return x * params, buffers

    x = torch.ones(2)
    with pytest.raises(fs.PurityError, match=r"positional argument \[0\].*_foreach_mul_"):
        fs.stage_vjp(apply, torch.ones(2), (), x)
    assert x.eq(1).all()


def test_a_stage_may_overwrite_its_argument_but_the_callers_tensor_stays() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu_(x)
            return self.linear(h) + x

    module, x = Stage().double(), torch.randn(4, 3, dtype=torch.float64)
    before = x.clone()
    output, _, pullback = fs.stage_vjp(*fs.functionalize(module), x)
    (dx,), _ = pullback(torch.ones_like(output))
    leaf = x.clone().requires_grad_()
    module(leaf * 1).sum().backward()
    assert torch.equal(dx, leaf.grad)
    assert torch.equal(x, before)
    with pytest.raises(fs.PurityError, match="positional argument"):
        fs.stage_vjp(lambda p, b, x: (x[:1].relu_(), b), (), (), x)
    assert torch.equal(x, before)


def test_an_exception_of_the_module_comes_through_unchanged() -> None:
    class Broken(Exception):
        pass

    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        raise error

    for error in (Broken("mine"), RuntimeError("mine too"), ValueError()):
        with pytest.raises(type(error)) as raised:
            fs.stage_vjp(apply, torch.ones(2), (), torch.ones(2))
        assert raised.value is error
    # The levels that were open when it was raised are closed again.
    (dx,), _ = fs.stage_vjp(lambda p, b, x: (x.sum(), b), (), (), torch.ones(2))[2]()
    assert torch.equal(dx, torch.ones(2))


@pytest.mark.supports(
    "saved-tensor hooks (`save_on_cpu`)", "refused: `funcstage.autograd`", "without their effect"
)
def test_saved_tensor_hooks_are_refused_with_the_way_round() -> None:
    def saving(params: Any, buffers: Any, x: Tensor) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return x * params, buffers

    with pytest.raises(fs.StageError, match=r"funcstage\.autograd"):
        fs.stage_vjp(saving, torch.ones(2), (), torch.ones(2))
    _, _, pullback = fs.stage_vjp(
        fs.compile(saving, backend="aten"), torch.ones(2), (), torch.full((2,), 3.0)
    )
    assert torch.equal(pullback(torch.ones(2))[1](), torch.full((2,), 3.0))
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.raises(fs.StageError, match=r"funcstage\.autograd"),
    ):
        fs.stage_vjp(lambda p, b, x: (x * p, b), torch.ones(2), (), torch.ones(2))


@pytest.mark.supports(
    "nested and jagged tensors", "refused: padding and a mask", "refused: padding and a mask"
)
@pytest.mark.parametrize("engine", ["closures", "aten"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("make", [torch.nested.as_nested_tensor, torch.nested.nested_tensor])
def test_nested_tensors_are_refused_with_the_way_round(make: Any, layout: torch.layout, engine: str) -> None:
    parts = [torch.randn(2, 3), torch.randn(3, 3)]

    def apply(params: Any, buffers: Any, x: Any, **kwargs: Any) -> Any:
        return (x if x.is_nested else make([x[:1], x[1:]], layout=layout)) * params, buffers

    function = apply if engine == "closures" else fs.compile(apply, backend="aten")
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(fs.LeafError, match=r"args\[0\] is a nested tensor.*mask, or the packed values"):
        fs.stage_vjp(function, torch.ones(3), (), nested)
    with pytest.raises(fs.LeafError, match=r"\['lengths'\] is a nested tensor"):
        fs.stage_vjp(function, torch.ones(3), (), parts[0], lengths=nested)
    with pytest.raises(fs.StageError, match=r"(makes|output is) a nested tensor.*mask"):
        fs.stage_vjp(function, torch.ones(3), (), parts[0])


def test_what_else_torch_says_of_nested_tensors_comes_through_unchanged() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return torch.nested.nested_tensor([x * params], layout=torch.sparse_coo), buffers

    with pytest.raises(RuntimeError, match="layout") as error:
        fs.stage_vjp(apply, torch.ones(3), (), torch.ones(2, 3))
    assert not isinstance(error.value, fs.StageError)


def weight_pullback(apply: Any, params: Any) -> fs.WeightPullback:
    output, _, pullback = fs.stage_vjp(apply, params, (), torch.ones(2, 3))
    return pullback(torch.ones_like(output))[1]


def test_accumulators_that_do_not_fit_are_refused_and_nothing_is_consumed() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return x @ params["w"] + params["b"] + params["n"], buffers

    params = {"w": torch.ones(3, 3), "b": torch.ones(3), "n": 1}
    pending = weight_pullback(apply, params)
    for accumulate, words in [
        ({"w": None}, "structure"),
        ([None, None, None], "structure"),
        ({"w": torch.zeros(3), "b": None, "n": None}, r"\['w'\].*\[3, 3\].*\[3\]"),
        ({"w": None, "b": torch.zeros(3, dtype=torch.int64), "n": None}, r"\['b'\].*int64"),
        ({"w": None, "b": torch.zeros(3, device="meta"), "n": None}, r"\['b'\].*meta"),
        ({"w": None, "b": torch.zeros(1).expand(3), "n": None}, r"\['b'\].*expanded"),
        ({"w": None, "b": 0.0, "n": None}, r"\['b'\].*float"),
        ({"w": None, "b": None, "n": torch.zeros(1)}, r"\['n'\].*None"),
    ]:
        with pytest.raises(fs.StageError, match=words):
            fs.stage_backward_weight(pending, accumulate)
    total = fs.stage_backward_weight(pending)
    assert torch.equal(total["b"], torch.full((3,), 2.0))
    assert total["n"] is None


def test_weight_pullbacks_that_do_not_belong_together_are_refused() -> None:
    def apply(params: Any, buffers: Any, x: Tensor) -> Any:
        return x * params, buffers

    one, two = weight_pullback(apply, torch.ones(3)), weight_pullback(apply, torch.ones(1))
    with pytest.raises(fs.StructureError, match="other parameters"):
        fs.stage_backward_weight([one, two])
    with pytest.raises(fs.ConsumedError, match="twice"):
        fs.stage_backward_weight([one, one])
    with pytest.raises(fs.StructureError, match="at least one"):
        fs.stage_backward_weight([])
    with pytest.raises(fs.StructureError, match="weight pullbacks"):
        fs.stage_backward_weight([one, "two"])  # type: ignore[list-item]
    with pytest.raises(fs.StructureError, match="stage_vjp"):
        fs.stage_backward_input(one)  # type: ignore[arg-type]
    assert not one.consumed
    fs.stage_backward_weight(one)
    with pytest.raises(fs.ConsumedError, match="used before"):
        fs.stage_backward_weight(one)


@pytest.mark.parametrize(
    ("argument", "said"),
    [(torch.ones(3, dtype=torch.long), r"it is int64\[3\]"), ((1, 2), "a tuple of 2 leaves")],
)
def test_an_argnum_of_nothing_to_differentiate_says_what_is_there(argument: Any, said: str) -> None:
    with pytest.raises(fs.StructureError, match=said):
        fs.stage_vjp(lambda p, b, x, y: (x, b), {}, {}, torch.ones(2), argument, argnums=1)


def test_a_warning_of_many_signatures_says_in_a_word_that_the_structure_differed() -> None:
    fast = fs.compile(lambda p, b, xs: (sum(xs) * p["w"], b), backend="aten")

    def run() -> None:
        for n in range(1, 11):
            fs.stage_vjp(fast, {"w": torch.ones(2)}, {}, [torch.ones(2)] * n, argnums=())

    with pytest.warns(UserWarning, match=r"(?m)^  2: structure$"):
        run()


class MeanTeacher(nn.Module):
    """A frozen teacher that follows its student in every forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.student, self.teacher, self.how = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False), how

    @torch.no_grad()
    def follow(self) -> None:
        for mean, value in (
            (self.teacher.weight, self.student.weight),
            (self.teacher.bias, self.student.bias),
        ):
            if self.how == "in place":
                mean.mul_(0.9).add_(value, alpha=0.1)
            elif self.how == "through data":
                mean.data.mul_(0.9).add_(value.data, alpha=0.1)
            else:
                torch._foreach_lerp_([mean], [value], 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.follow()
        return (self.student(x) - self.teacher(x)).pow(2).sum()


@pytest.mark.parametrize("how", ["in place", "through data", "foreach"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_teacher_of_parameters_is_refused_and_one_of_buffers_is_eagers(engine: str, how: str) -> None:
    torch.manual_seed(0)
    module, x = MeanTeacher(how), torch.randn(2, 3)
    eager = copy.deepcopy(module)
    apply, params, buffers = fs.functionalize(module)
    refusal = (
        r"buffers?\W.*teacher\.\w+.*constants. Make it a buffer before functionalize.*or update it outside"
    )
    with pytest.raises(fs.PurityError, match=refusal):
        fs.stage_vjp(stage_of(apply, engine), params, buffers, x)
    for name in ("weight", "bias"):  # the way out
        value = getattr(module.teacher, name).detach()
        delattr(module.teacher, name)
        module.teacher.register_buffer(name, value)
    apply, params, buffers = fs.functionalize(module)
    apply = stage_of(apply, engine)
    for _ in range(2):
        loss, buffers, pullback = fs.stage_vjp(apply, params, buffers, x)
        expected = eager(x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            [*pullback()[1]().values()], [*torch.autograd.grad(expected, [*eager.student.parameters()])]
        )
        torch.testing.assert_close(buffers, dict(eager.teacher.named_parameters(prefix="teacher")))


class Loads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.other.load_state_dict(self.one.state_dict())
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_dict_that_is_loaded_in_a_forward_is_refused_by_name(engine: str) -> None:
    module = Loads()
    before = copy.deepcopy(module.state_dict())
    apply, params, buffers = fs.functionalize(module)
    refusal = "load_state_dict" if engine == "uncompiled" else "'other.bias'"
    with pytest.raises(fs.PurityError, match=rf"{refusal}.* in place\. .*do it before functionalize"):
        fs.stage_vjp(stage_of(apply, engine), params, buffers, torch.randn(2, 3))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
