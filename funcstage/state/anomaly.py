"""Anomaly mode around I or W: autograd looks for NaN behind each of its nodes, and programs have none."""

from __future__ import annotations

import torch

from funcstage.errors import StageError


def refuse_unchecked(checks_nan: bool, stage: str, phase: str) -> None:
    """Refuse to run a phase in which anomaly mode would not find what it looks for.

    Args:
        checks_nan: whether autograd runs the phase.
        stage: its name.
        phase: "I" or "W".

    Raises:
        StageError: where anomaly mode is on with its check, and programs would run.
    """
    if not checks_nan and torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        raise StageError(
            f"{phase} of {stage} is compiled, and its program does not look for NaN, as anomaly mode does. "
            f"Turn that off around {phase} (torch.autograd.set_detect_anomaly(False)); to find where a NaN "
            "comes from, give stage_vjp the uncompiled stage function (`compiled.apply`)."
        )
