"""How the reference reads the package's docstrings."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    """Two habits of ours: "Example:" holds code, and "Returns:" prose, whose types are in the signature."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Write both as the parser expects them, which takes what stands before a colon for a type."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^(Returns:\n +)", r"\1: ", text, flags=re.MULTILINE)
