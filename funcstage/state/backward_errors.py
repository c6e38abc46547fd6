"""What torch says in the midst of I or W, said as a refusal of the stage's."""

from __future__ import annotations

from funcstage._torch.messages import CHECKPOINT_UNLIKE, SAVED_WRITTEN, says
from funcstage.errors import StageError, WrittenError


def explain(error: BaseException, stage: str, phase: str) -> None:
    """Refuse in the stage's name where torch does so in its own; other errors are left to the caller.

    Args:
        error: what a reverse pass has raised.
        stage: its name.
        phase: "I" or "W".

    Raises:
        WrittenError: if autograd has come upon a write itself; it does not say into what.
        StageError: if a selective checkpoint cannot be replayed.
    """
    if not isinstance(error, RuntimeError):
        return
    if says(error, SAVED_WRITTEN):
        raise WrittenError(
            f"{phase} of {stage} reads a tensor that was written in place after an operation had saved it "
            "for its backward: by the forward itself, as in y = x.sigmoid(); y.add_(1), or, if captured "
            "from outside, since F. Let the forward write into a clone, or run I and W before the write. "
            f"(torch: {str(error).partition(chr(10))[0]})"
        ) from error
    if says(error, CHECKPOINT_UNLIKE):
        raise StageError(
            f"{phase} of {stage} cannot run a selective checkpoint again "
            f"({str(error).partition(chr(10))[0]}). Its policy saves a value that a later operation writes "
            "into, as dropout does on the CPU, or it decides differently in the second run. Save only matrix "
            "products and let the rest be recomputed, or compile the stage with funcstage.compile."
        ) from error
