"""What torch says in the midst of I or W, said as a refusal of the stage's."""

from __future__ import annotations

from funcstage._torch.messages import CHECKPOINT_UNLIKE, SAVED_WRITTEN, says
from funcstage.errors import StageError
from funcstage.state.writes import written_error


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
        raise written_error("A tensor that was captured", stage, phase) from error
    if says(error, CHECKPOINT_UNLIKE):
        raise StageError(
            f"{phase} of {stage} cannot run a selective checkpoint again "
            f"({str(error).partition(chr(10))[0]}). Its policy saves a value that a later operation writes "
            "into, as dropout does on the CPU, or it decides differently in the second run. Save only matrix "
            "products and let the rest be recomputed, or compile the stage with funcstage.compile."
        ) from error
