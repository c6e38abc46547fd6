"""What a stage does to tensors behind the back of autograd, refused by every engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funcstage import trees
from funcstage._torch.operators import without_torch_function
from funcstage.errors import PurityError, StageError
from funcstage.state.guise import own_of


def refuse_effects(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an operation that no engine would give its effect.

    Raises:
        PurityError: if it assigns to a tensor's `.data`.
        StageError: if it asks for a `.grad` of a tensor that no backward of the user's will reach, or reads
            that of a parameter which has one.
    """
    if func not in EFFECTS:
        return
    if func == _READ_GRAD:
        own = own_of(args[0])
        with without_torch_function():
            has_one = own is not None and own.grad is not None
        if has_one:
            raise StageError(
                f"The stage reads the `.grad` of a parameter ({trees.describe(args[0])}) in its forward, "
                "which a stage function is not given. Pass it as an argument, or set it to None before."
            )
        return
    tensor = trees.describe(args[0] if args else next(iter(kwargs.values()), None))
    if func == _ASSIGN_DATA:
        raise PurityError(
            f"The stage assigns to the `.data` of a tensor ({tensor}), which autograd does not see. "
            "Compute a new tensor; make state that lasts across calls a buffer, and write into it in place "
            "(buffer.copy_(value))."
        )
    raise StageError(
        f"The stage calls retain_grad() on a tensor ({tensor}), but a split backward does not fill its "
        "`.grad`. Return the tensor as an output, or hook it with register_hook."
    )


def refused_write(what: str, by: str = "", *, frozen: bool = False) -> PurityError:
    """The refusal of a stage that writes in place into what it was given.

    Args:
        what: who writes into which leaf.
        by: which operation does, with a comma before it.
        frozen: whether that is a parameter of a module, which requires no grad.
    """
    if frozen:
        return PurityError(
            f"{what} in place{by}. A stage takes parameters that require no grad as constants. Make it a "
            "buffer before functionalize, whose updates come back in new_buffers (value = "
            "layer.weight.detach(); del layer.weight; layer.register_buffer('weight', value)), or update it "
            "outside of the stage."
        )
    return PurityError(
        f"{what} in place{by}. {WRITTEN}: work on a clone, return the new value as a buffer, or do it before "
        "functionalize or between calls."
    )


WRITTEN = "A stage function mutates nothing that it is given"


def refused_mark(owner: str, requires_grad: bool) -> PurityError:
    """The refusal of a stage that freezes, or thaws, what it was given."""
    if requires_grad:
        return PurityError(
            f"The stage calls requires_grad_() on {owner} in its forward, which is too late for a gradient. "
            "Let the parameter require grad before functionalize. If the stage takes gradients itself, call "
            "requires_grad_() on tensor.detach()."
        )
    return PurityError(
        f"The stage freezes {owner} with requires_grad_(False) in its forward, but its gradient would still "
        "be computed. Freeze it before functionalize, or read tensor.detach()."
    )


_ASSIGN_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
MARKS: set[Any] = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
"""What marks a tensor as requiring grad, or not."""

_OF_TENSORS: Any = Tensor
_READ_GRAD = _OF_TENSORS.grad.__get__
EFFECTS: set[Any] = {_ASSIGN_DATA, _READ_GRAD, Tensor.retain_grad}
