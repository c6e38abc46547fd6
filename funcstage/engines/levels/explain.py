"""What torch says about functions that its levels cannot transform, said as advice."""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from funcstage import trees
from funcstage._torch import functorch as ft
from funcstage._torch import messages as torchs
from funcstage._torch.messages import is_raised_by_stage, says
from funcstage._torch.tensors import READS_WHETHER_VIEW
from funcstage.effects import WRITTEN, refused_write
from funcstage.engines.levels import inner_gradients
from funcstage.errors import LeafError, PurityError, StageError
from funcstage.trees import PyTree


def refuse_saved_tensor_hooks(stack: ExitStack) -> None:
    try:
        stack.enter_context(ft.refusing_to_save(_HOOKS_REFUSED))
    except RuntimeError as error:
        raise StageError(_HOOKS_REFUSED) from error


def written_into_own(func: Any, target: Any) -> Exception:
    """What is raised where a stage writes what is differentiated into a parameter that it has made."""
    if isinstance(target, Tensor) and target.requires_grad and target.is_leaf:
        return RuntimeError(_LEAF_WRITTEN)  # as torch says
    return PurityError(
        "The stage writes a value that needs a gradient into a parameter that it made itself "
        f"({trees.describe(target)}), with {getattr(func, '__name__', func)}. Use the value directly instead."
    )


def asks_for_views(func: Any) -> StageError:
    """The refusal of a checkpointed region that asks what its operands are views of: its runs have others."""
    asked = "_is_view" if func is READS_WHETHER_VIEW else "_base"
    return StageError(
        f"A checkpointed region asks whether a tensor is a view, or of what ({asked}), which differs between "
        "its runs. Ask outside of the checkpoint, and pass the answer as an argument."
    )


def impure(owner: str, func: Any, written: Tensor, given: dict[str, PyTree]) -> PurityError:
    constants = [leaf for leaf in trees.flatten(given.get("buffer"))[0] if isinstance(leaf, nn.Parameter)]
    frozen = ft.storage_key(written) in map(ft.storage_key, constants)
    by = f", by {getattr(func, '__name__', func)}"
    return refused_write(f"The stage writes into {owner}", by, frozen=frozen)


class explaining:  # no generator: see `funcstage.state.undone`
    """Raise a refusal in place of what torch says about functions that cannot be transformed.

    `higher` tells whether gradients are to be differentiated in turn.
    """

    def __init__(self, given: dict[str, PyTree], higher: bool) -> None:
        self._given = given
        self._higher = higher

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if isinstance(error, StageError) or not isinstance(error, (AttributeError, RuntimeError)):
            return
        if is_raised_by_stage(error):
            return
        if not self._higher and says(error, torchs.BACKWARD_IN_TRANSFORM + torchs.FUNCTION_IN_CPP):
            raise inner_gradients.TakesGradients from None
        refusal = _refusal(error) or _sparse(error, self._given) or _compressed(error)
        if refusal is not None:
            raise refusal from error


def _sparse(error: Exception, given: dict[str, PyTree]) -> StageError | None:
    """Blame a sparse leaf, if there is one: few of torch's kernels take them, and fewer under levels."""
    for kind, tree in given.items():
        leaves, spec = trees.flatten(tree)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
                reason = str(error).partition("\n")[0]
                return LeafError(
                    f"The stage fails on {kind} {trees.leaf_names(spec, '')[i]} ({trees.describe(leaf)}): "
                    f"{reason} Pass it as tensor.to_dense(), or run funcstage.autograd eagerly."
                )
    return None


def _compressed(error: Exception) -> StageError | None:
    layout, found, _ = str(error).partition(torchs.NO_STRIDES)
    if not found:
        return None
    return StageError(
        f"The stage reads a tensor in a compressed sparse layout ({layout}), which torch.func cannot "
        "transform. Convert it with tensor.to_sparse_coo(), or make it dense."
    )


def _refusal(error: Exception) -> StageError | None:
    """Translate what torch says about functions that cannot be transformed; None for users' errors."""
    if _HOOKS_REFUSED in str(error):
        return StageError(_HOOKS_REFUSED)
    if says(error, torchs.HOOKS_IN_TRANSFORM):  # those of `saving_outside`
        return inner_gradients.refused("torch.func")
    if says(error, torchs.INFERENCE):
        return StageError(
            "The stage enters torch.inference_mode() in its forward, whose tensors torch.func cannot take. "
            "Write torch.no_grad(), which gives the same values, or compile the stage with funcstage.compile."
        )
    if says(error, torchs.STORAGE_SET):
        return StageError(
            "The stage gives a tensor the memory of another, as copy.copy and unpickling do, which "
            "torch.func does not allow. In place of copy.copy write tensor.detach(), in place of pickle "
            "copy.deepcopy(tensor.detach())."
        )
    if says(error, torchs.CAPTURED_WRITTEN):
        return PurityError(
            "The stage writes in place into a tensor that it captured from outside (not an argument, a "
            "parameter or a buffer), which a pure function cannot do. Register the tensor as a buffer (in "
            "__init__; where the first call does so, call the module once before functionalize), or update a "
            "clone of it."
        )
    if says(error, torchs.LOADING) and WRITTEN in str(error):
        return refused_write("The stage calls load_state_dict() in its forward, which writes into parameters")
    frames = traceback.walk_tb(error.__traceback__)
    of_nested = any(str(frame.f_globals.get("__name__")).startswith("torch.nested") for frame, _ in frames)
    if says(error, torchs.NESTED) or (of_nested and says(error, torchs.NO_MEMORY)):
        return StageError(
            "The stage makes a nested tensor, which torch.func cannot transform. Compute on padded tensors "
            "with a mask, or on the packed values with their offsets."
        )
    if says(error, torchs.NO_MEMORY):
        return StageError(
            "The stage reads the memory of a tensor that is differentiated (through NumPy, copy.copy or "
            "pickle, for example), which torch.func does not allow. Read that of tensor.detach(); what is to "
            "have a gradient, wrap in a torch.library.custom_op."
        )
    if says(error, torchs.FUNCTION_IN_CPP):
        return inner_gradients.runs_in_cpp()
    if says(error, torchs.FUNCTION_TAKES_CTX):
        return StageError(
            "The stage applies a torch.autograd.Function whose forward takes `ctx`, through an `apply` that "
            "was bound before the stage ran. torch 2.14 and later hide that from funcstage. Write "
            "`MyFunction.apply(...)` in the stage, or give the function a separate setup_context "
            "staticmethod."
        )
    return None


_LEAF_WRITTEN = "a leaf Variable that requires grad is being used in an in-place operation."
_HOOKS_REFUSED = (
    "The uncompiled engine cannot differentiate under saved-tensor hooks (such as save_on_cpu). Take them "
    "out of the stage, or use funcstage.autograd on an eager tape; torch.utils.checkpoint works."
)
