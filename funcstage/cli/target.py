"""A stage by name, `package.module:factory`, and its errors in one line."""

from __future__ import annotations

import argparse
import importlib
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from funcstage import trees
from funcstage.errors import StageError
from funcstage.functional import FunctionalStage, functionalize
from funcstage.testing import StageMismatch
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

    @contextmanager
    def errors(self, arguments: argparse.Namespace) -> Iterator[None]:
        """Say what the stage's own code raises in one line, unless the traceback is wanted."""
        if not arguments.traceback:
            logging.disable(logging.ERROR)  # torch logs tracebacks of what fails on fake tensors
        try:
            yield
        except (StageError, StageMismatch):
            raise
        except Exception as error:
            if arguments.traceback:
                raise
            given = ", ".join(map(describe, self.args))
            meta = _on_meta(self.stage) != any(map(_on_meta, self.args))
            advice = " Put the module and its arguments on the same device." if meta else ""
            if [type(arg) for arg in self.args] == [tuple]:
                advice += " A factory returns (module, x), where the call is module(x)."
            raise StageError(
                f"{arguments.stage} called with {given} raised {_line(error)}{advice}"
            ) from error
        finally:
            logging.disable(logging.NOTSET)


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """Add the option to see where an error of the stage's own code comes from."""
    parser.add_argument("--traceback", action="store_true", help="show where the stage's own code raised")


def load(arguments: argparse.Namespace) -> Target:
    """Import a factory and call it.

    Args:
        arguments: with `stage`, `package.module:factory`; modules in the working directory are found too.

    Raises:
        StageError: if there is no such factory, it raises, or it returns something else than a stage and
            arguments.
    """
    name = arguments.stage
    module_name, colon, factory_name = name.partition(":")
    if not (colon and factory_name):
        raise StageError(f"{name} has no factory after a colon. {_WAY_OUT}")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise StageError(f"{name}: {module_name or 'it'} cannot be imported: {error}. {_WAY_OUT}") from error
    except Exception as error:
        if arguments.traceback:
            raise
        raise StageError(f"{name}: importing {module_name} raised {_line(error)}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise StageError(f"{name}: {module_name} has no function {factory_name!r}. {_WAY_OUT}")
    try:
        made = factory()
    except Exception as error:
        if arguments.traceback:
            raise
        raise StageError(f"{name} raised {_line(error)}") from error
    if not isinstance(made, tuple) or not made or isinstance(made, FunctionalStage):
        raise StageError(f"{name} returned {describe(made)}. {_WAY_OUT}")
    stage, *args = made
    if not isinstance(stage, (nn.Module, FunctionalStage)):
        raise StageError(f"{name} returned a tuple that begins with {describe(stage)}. {_WAY_OUT}")
    return Target(stage, tuple(args))


def _line(error: Exception) -> str:
    """An error in a line, with the place in the user's code, and how to see more."""
    text = " ".join(str(error).split("\n\n")[0].split()).rstrip(".!")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/funcstage/" not in f.filename]
    place = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{place}: {text}. --traceback shows where."


def _on_meta(part: object) -> bool:
    """Whether a module, a functional stage or an argument has tensors on the meta device."""
    if isinstance(part, nn.Module):
        leaves: list[Any] = [*part.parameters(), *part.buffers()]
    else:
        leaves, _ = trees.flatten(part)
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves)
