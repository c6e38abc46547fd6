"""What torch says in errors that have no class of their own, from torch's own mouth."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import funcstage as fs
from funcstage._torch import functorch as ft
from funcstage._torch import messages, modes, tracing
from funcstage._torch.messages import says

FLOAT = torch.ones(3)


def leaf_written() -> None:
    torch.ones(3, requires_grad=True).add_(1)


def view_of_a_leaf_written() -> None:
    torch.ones(3, requires_grad=True)[0].add_(1)


def saved_written() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    y.add_(1)
    y.sum().backward()


def captured_written() -> None:
    captured = torch.ones(3)
    torch.func.grad(lambda x: captured.add_(x).sum())(FLOAT)


def backward_in_a_transform() -> None:
    def stage(x: Tensor) -> Tensor:
        x.sum().backward()
        return x.sum()

    torch.func.grad(stage)(FLOAT)


def hooks_in_a_transform() -> None:
    def stage(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return x.exp().sum()

    torch.func.grad(stage)(FLOAT)


class TakesContext(Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x * 2

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * 2


def function_takes_ctx() -> None:
    torch.func.grad(lambda x: TakesContext.apply(x).sum())(FLOAT)


def compressed_in_a_transform() -> None:
    torch.func.grad(lambda x: (x.to_dense()).sum())(torch.eye(3).to_sparse_csr())


def nested_in_a_transform() -> None:
    torch.func.grad(lambda x: torch.nested.as_nested_tensor([x, x]).to_padded_tensor(0.0).sum())(FLOAT)


def nested_in_a_trace() -> None:
    with tracing.FakeTensorMode():
        torch.nested.nested_tensor_from_jagged(torch.ones(3, 2), torch.tensor([0, 1, 3]))


def memory_of_a_wrapper() -> None:
    torch.func.grad(lambda x: torch.from_numpy(x.detach().numpy()).sum())(FLOAT)


def storage_of_a_wrapper() -> None:
    torch.func.grad(lambda x: copy.copy(x).sum())(torch.ones(3))


def storage_set() -> None:
    def stage(weight: Tensor, _: object, x: Tensor) -> tuple[Tensor, object]:
        return weight * x * copy.copy(x.detach()), _

    with pytest.raises(fs.StageError) as refusal:
        fs.stage_vjp(stage, torch.ones(3), {}, torch.ones(3))
    raise refusal.value.__cause__ or refusal.value


def as_numpy_in_a_trace() -> None:
    with tracing.FakeTensorMode():
        torch.ones(3).numpy()


def as_a_list_in_a_trace() -> None:
    with tracing.FakeTensorMode():
        torch.func.grad(lambda x: x.sum() * x.detach().tolist()[0])(torch.ones(3))


def pointer_in_a_trace() -> None:
    with tracing.FakeTensorMode(), tracing.FunctionalTensorMode():
        torch.from_dlpack(torch.ones(3))


def pickled_in_a_trace() -> None:
    with tracing.FakeTensorMode(), tracing.FunctionalTensorMode():
        pickle.dumps(torch.ones(3))


def functional_writes_real() -> None:
    real = torch.ones(3)
    torch.func.functionalize(lambda x: real.add_(x))(FLOAT)


def checkpoint_unlike() -> None:
    runs = []

    def region(x: Tensor) -> Tensor:
        runs.append(x)
        return x.exp() if len(runs) == 1 else x.sin().exp().exp()

    def contexts() -> object:
        return create_selective_checkpoint_contexts([torch.ops.aten.sin.default])

    x = torch.ones(3, requires_grad=True)
    checkpoint(region, x, use_reentrant=False, context_fn=contexts, early_stop=False).sum().backward()


def mode_not_entered() -> None:
    TorchFunctionMode().__exit__(None, None, None)


def level_not_entered() -> None:
    ft.pop_layer()


def infrastructure_mode_not_entered() -> None:
    modes.pop_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)


CASES: list[tuple[Callable[[], None], messages.Signs]] = [
    (leaf_written, messages.LEAF_WRITTEN),
    (view_of_a_leaf_written, messages.LEAF_WRITTEN),
    (saved_written, messages.SAVED_WRITTEN),
    (captured_written, messages.CAPTURED_WRITTEN),
    (functional_writes_real, messages.FUNCTIONAL_WRITES_REAL),
    (backward_in_a_transform, messages.BACKWARD_IN_TRANSFORM),
    (hooks_in_a_transform, messages.HOOKS_IN_TRANSFORM),
    (function_takes_ctx, messages.FUNCTION_TAKES_CTX),
    (compressed_in_a_transform, (messages.NO_STRIDES,)),
    (nested_in_a_transform, messages.NESTED),
    (nested_in_a_trace, messages.NESTED_IN_TRACE),
    (memory_of_a_wrapper, messages.NO_MEMORY),
    (storage_of_a_wrapper, messages.NO_MEMORY),
    (storage_set, messages.STORAGE_SET),
    (as_numpy_in_a_trace, messages.NO_VALUES),
    (as_a_list_in_a_trace, messages.NO_VALUES),
    (pointer_in_a_trace, messages.NO_VALUES),
    (pickled_in_a_trace, messages.NO_VALUES),
    (checkpoint_unlike, messages.CHECKPOINT_UNLIKE),
    (mode_not_entered, messages.NOT_ENTERED),
    (level_not_entered, messages.NOT_ENTERED),
    (infrastructure_mode_not_entered, messages.NOT_ENTERED),
]


@pytest.mark.parametrize(("provoke", "signs"), CASES, ids=[case[0].__name__ for case in CASES])
def test_torch_still_says_so(provoke: Callable[[], None], signs: messages.Signs) -> None:
    with pytest.raises((RuntimeError, AttributeError, AssertionError)) as error:
        provoke()
    assert says(error.value, signs), error.value


def test_what_torch_says_of_something_else_is_none_of_them() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.ones(3) @ torch.ones(4)
    assert not any(says(error.value, signs) for _, signs in CASES)
