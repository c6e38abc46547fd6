"""What a function can read that is not handed to it, from its byte code: which names it loads.

Three searches stand on this and stay apart, as they follow and keep different things: the recorder of a trace
follows what runs and keeps each place that is read, `shared` follows calls before anything runs and keeps
what they may change, and a captured step's follows all that may be called and keeps everything on the way.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple


class Loads(NamedTuple):
    """The names that a code object loads, or stores, as the next call may load what it has stored.

    Attributes:
        globals: of its module's globals, or of builtins.
        attributes: of attributes of anything, those that it names in strings included.
        imports: of modules that it imports when it runs.
        any_global: whether it may look up globals by computed names.
        any_attribute: whether it may look up attributes by computed names.
    """

    globals: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[str]
    any_global: bool
    any_attribute: bool


@functools.lru_cache(maxsize=8192)
def loads_of(code: CodeType) -> Loads:
    """Read a code object, without those nested in it, which are read when they run."""
    names: dict[str, set[str]] = {kind: set() for kind in ("global", "attribute", "import")}
    for step in dis.get_instructions(code):
        operation, argument = step.opname, step.argval
        if operation == "LOAD_CONST":
            if isinstance(argument, str) and argument.isidentifier():
                names["attribute"].add(argument)
        elif operation == "IMPORT_NAME":
            names["import"].add(argument)
        elif operation in _OF_ATTRIBUTES:
            names["attribute"].add(argument)
        elif operation in _OF_GLOBALS:
            names["global"].add(argument)
    loaded = names["global"] | names["attribute"]
    return Loads(
        frozenset(names["global"]),
        frozenset(names["attribute"]),
        frozenset(names["import"]),
        not loaded.isdisjoint(_ANY_GLOBAL),
        not loaded.isdisjoint(_ANY_ATTRIBUTE),
    )


def may_be_imported(name: str, package: str | None) -> Iterator[str]:
    """The full names of modules that an import may mean, and of packages around them."""
    above = package.split(".") if package else []
    for n in range(len(above) + 1):
        full = ".".join((*above[:n], name)).rstrip(".")
        yield from (full.rsplit(".", i)[0] for i in range(full.count(".") + 1))


def modules_named_in(code: CodeType, package: str | None) -> Iterator[tuple[str, str | None]]:
    """The names of modules, there or not, that a function of a package imports, or may look up.

    Each comes with the package in which it may be, too.
    """
    loads = loads_of(code)
    yield from ((name, package) for name in loads.imports)
    if not _BY_NAME.isdisjoint(loads.globals | loads.attributes):
        names = (name for name in code.co_consts if isinstance(name, str))
        yield from ((name, None) for name in names if name.replace(".", "").isidentifier())


def is_library(module: object) -> bool:
    """Tell whether a module's functions keep no settings of the user's, other than those that are watched."""
    name = module if isinstance(module, str) else ""  # of Cython's metaclass it is a descriptor
    if name.startswith("torch.nn.modules.") and not name.endswith(".module"):
        return False
    return name.partition(".")[0] in _LIBRARIES


def is_torchs_or_library(module: object) -> bool:
    """Tell the same of all of torch's modules, its layers among them."""
    return is_library(module) or str(module).startswith("torch.")


def codes_within(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of all functions that are made in it."""
    yield code
    for nested in nested_codes(code):
        yield from codes_within(nested)


def nested_codes(code: CodeType) -> set[CodeType]:
    """The code objects of functions that a function makes."""
    return {constant for constant in code.co_consts if isinstance(constant, CodeType)}


_OF_ATTRIBUTES = frozenset({"STORE_ATTR", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"})
_OF_GLOBALS = frozenset(
    {"STORE_GLOBAL", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_CLASSDEREF"}
)
_BY_NAME = frozenset({"modules", "__import__", "import_module"})
"""Ways to a module by its name as a string."""
_ANY_GLOBAL = frozenset({"globals", "eval", "exec"})
_ANY_ATTRIBUTE = frozenset({"getattr", "vars", "__dict__", "eval", "exec", "attrgetter", "dir"})
_REQUIRED_BY_TORCH = {
    "filelock",
    "fsspec",
    "jinja2",
    "markupsafe",
    "mpmath",
    "networkx",
    "sympy",
    "typing_extensions",
}
_LIBRARIES = frozenset(
    {"torch", "funcstage", "functorch", "torchgen", "numpy", "optree", "triton"}
    | _REQUIRED_BY_TORCH
    | {"_pytest", "pytest", "pluggy", "hypothesis"}  # which run where an assertion fails
) | (sys.stdlib_module_names - {"this", "antigravity"})
