"""A stage by name: `package.module:factory`."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import nn

from funcstage.errors import StageError
from funcstage.functional import FunctionalStage, functionalize
from funcstage.trees import describe

_WAY_OUT = (
    "It must be package.module:factory, a function without arguments that returns a tuple: a module, or "
    "what functionalize returned, and then the arguments of a call."
)


class Target(NamedTuple):
    """A stage and a call of it."""

    stage: nn.Module | FunctionalStage
    args: tuple[Any, ...]

    @property
    def functional(self) -> FunctionalStage:
        """The stage as a function."""
        return self.stage if isinstance(self.stage, FunctionalStage) else functionalize(self.stage)


def load(name: str) -> Target:
    """Import a factory and call it.

    Args:
        name: `package.module:factory`; modules in the working directory are found too.

    Raises:
        StageError: if there is no such factory, or it returns something else than a stage and arguments.
    """
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise StageError(f"{name}: {module_name or 'it'} cannot be imported: {error}. {_WAY_OUT}") from error
    factory = getattr(module, factory_name, None) if factory_name else None
    if not callable(factory):
        raise StageError(f"{name}: {module_name} has no function {factory_name!r}. {_WAY_OUT}")
    made = factory()
    if not isinstance(made, tuple) or not made or isinstance(made, FunctionalStage):
        raise StageError(f"{name} returned {describe(made)}. {_WAY_OUT}")
    stage, *args = made
    if not isinstance(stage, (nn.Module, FunctionalStage)):
        raise StageError(f"{name} returned a tuple that begins with {describe(stage)}. {_WAY_OUT}")
    return Target(stage, tuple(args))
