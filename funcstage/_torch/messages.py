"""What torch says where it raises an error without a class of its own: the one way to tell such errors apart.

To Python each is a `RuntimeError` (or an `AttributeError`) like any other, and what it is about cannot be
asked beforehand: autograd and the levels of `torch.func` look at state that has no name in Python. All the
versions in `versions.py` say the same: `tests/_torch/test_messages.py` makes torch say it.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from typing import Any, TypeAlias

Signs: TypeAlias = tuple[str, ...]
"""Parts of messages, one of which is in the error's."""

LEAF_WRITTEN: Signs = ("leaf Variable that requires grad",)
"""Autograd: a leaf, or a view of one, is written in place."""

SAVED_WRITTEN: Signs = ("modified by an inplace operation",)
"""Autograd: what a node has saved was written in place."""

CAPTURED_WRITTEN: Signs = ("mutate a captured Tensor",)
"""torch.func: a tensor from outside of a transform is written in place."""

INFERENCE: Signs = ("Cannot set version_counter for inference tensor",)
"""torch.func: a wrapper meets a tensor that was made in inference mode."""

STORAGE_SET: Signs = ("in-place operation (aten::set_",)
"""torch.func: of these, a tensor is given another storage."""

FUNCTIONAL_WRITES_REAL: Signs = ("mutating a non-functional tensor",)
"""Functionalization: a tensor of a trace is written into one from outside."""

BACKWARD_IN_TRANSFORM: Signs = ("backward() called inside a functorch transform",)
"""torch.func: `backward()` is called."""

HOOKS_IN_TRANSFORM: Signs = ("don't yet support saved tensor hooks",)
"""torch.func: a transform is opened, or hooks of saved tensors entered, one within the other."""

FUNCTION_IN_CPP: Signs = ("C++ torch::autograd::Function",)
"""torch.func: a custom function in C++ is applied."""

FUNCTION_TAKES_CTX: Signs = ("override the setup_context staticmethod",)
"""torch.func: a custom function in Python whose forward takes `ctx` is applied."""

NO_STRIDES = " tensors do not have strides"
"""A wrapper of torch.func is put around a compressed sparse tensor; the layout comes first."""

NESTED: Signs = ("NestedInt", "NestedTensorImpl")
"""A wrapper of torch.func is put around a nested tensor."""

NESTED_IN_TRACE: Signs = ("shape_env must not be None", "_nested_tensor_from", "NestedTensor")
"""A nested tensor is made of fake ones."""

NO_MEMORY: Signs = ("Cannot access data pointer", "Cannot access storage of TensorWrapper")
"""The memory of a wrapper of torch.func is asked for, which has none."""

ORDERED_EFFECT: Signs = ("Could not find a token for effect",)
"""An operator was recorded that must not be moved, such as a collective in place."""

PLAIN_AMONG_DTENSORS: Signs = ("got mixed torch.Tensor and DTensor",)
"""An operation has some operands that are DTensors and some that are none."""

LOADING: Signs = ("Error(s) in loading state_dict for",)
"""`load_state_dict` failed, whatever with: the error behind it is there as text alone."""

NO_VALUES: Signs = (
    ".numpy() is not supported for tensor subclasses",
    "tolist() shouldn't be called on a tensor with unallocated storage",
    *("Cannot access data pointer of Tensor", "access the data pointer on an invalid python storage"),
)
"""Fake tensors: what they hold is asked for, other than by an operation, whose error has a class."""

CHECKPOINT_UNLIKE: Signs = ("during selective activation checkpoint", "not found in storage")
"""Selective checkpoints: the second run does other things than the first."""

NOT_ENTERED: Signs = (
    *("trying to pop from empty mode stack", "Attempted to unset"),
    *("dynamicLayerStack", "dynamic_layer.layerId()"),
)
"""A mode or level is left that was broken off while it was entered."""

RANK_LOST: Signs = ("gloo", "Connection closed", "Timed out", "pair closure", "reset by peer", "Broken pipe")
"""Gloo, and the store: another rank does not answer. What NCCL raises has a class, gloo's has none."""

STORE_EMPTY: Signs = ("ait timeout",)
"""Nobody has written at a place in a store in time. What a file store raises has no class."""


def says(error: BaseException | str, signs: Signs) -> bool:
    """Tell whether an error, or a part of its message, is one of these; what a stage raises is none."""
    if isinstance(error, BaseException) and is_raised_by_stage(error):
        return False
    message = str(error)
    return any(sign in message for sign in signs)


def with_contexts(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in answer to which it was raised."""
    while error is not None:
        yield error
        error = error.__context__


def is_raised_by_stage(error: BaseException) -> bool:
    """Tell whether a `raise` or an `assert` outside of torch and funcstage raised an error."""
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code.co_code
    raised = dis.opname[code[last.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return raised and is_of_stage(last.tb_frame)


def is_of_stage(frame: Any) -> bool:
    """Tell whether a frame is neither torch's nor ours or our trees', nor one that they have generated."""
    package = package_of(frame)
    generated = frame.f_code.co_filename.startswith("<") and package != "__main__"
    return package not in ("torch", "funcstage", "optree", "") and not generated


def package_of(frame: Any) -> str:
    """The package that a frame's function is from."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
