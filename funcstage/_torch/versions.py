"""The torches that funcstage was tried with: the one list, which tests, scripts and pages read.

funcstage stands on private parts of torch, which may move with every release. A new one is added here once
`python .ci/torches.py VERSION` passes with it.
"""

from __future__ import annotations

import re
import warnings

RELEASES = ("2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0")
"""What the tests ran on, ascending."""

TRIED = tuple(release.rpartition(".")[0] for release in RELEASES)
"""The same without the patch: these are the versions that are supported."""


def series(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (2, 15) of "2.15.0a0+git1234"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def warn_if_newer(found: str) -> None:
    """Warn that a torch is newer than those that were tried.

    Args:
        found: the version of torch.
    """
    if series(found) > series(TRIED[-1]):
        warnings.warn(
            f"This is torch {found}; funcstage was tested with torch {', '.join(TRIED[:-1])} and "
            f"{TRIED[-1]}. Private parts of torch that it relies on may have changed: run its "
            f"tests/_torch/test_private_api.py to see, or install torch {TRIED[-1]}.",
            stacklevel=4,  # the import of funcstage
        )
