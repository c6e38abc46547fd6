"""The split backward of a pipeline stage, as a function transformation.

apply, params, buffers = fs.functionalize(module)                     # nn.Module -> pure function
output, buffers, pullback = fs.stage_vjp(apply, params, buffers, x)   # F
(dx,), weight_pullback = pullback(output_grads)                       # I: what upstream waits for
param_grads = weight_pullback()                                       # W: whenever there is a bubble
"""

from typing import TYPE_CHECKING

from funcstage import _torch as _torch  # warns of a torch newer than those that were tried
from funcstage.derived import DerivedPullback, derive
from funcstage.errors import (
    ConsumedError,
    LeafError,
    PurityError,
    StageError,
    StructureError,
    TraceError,
    WrittenError,
)
from funcstage.functional import FunctionalStage, functionalize
from funcstage.gradients import value_and_grad
from funcstage.offloading import offload, prefetch
from funcstage.pullback import Pullback, stage_backward, stage_backward_input, stage_vjp
from funcstage.sites import Site
from funcstage.weight_pullback import WeightPullback, stage_backward_weight

if TYPE_CHECKING:
    from funcstage import autograd as autograd
    from funcstage import pipelining as pipelining
    from funcstage import schedules as schedules
    from funcstage import testing as testing
    from funcstage.engines.graph.compile import CompiledStage, compile
else:
    from importlib import import_module

    def __getattr__(name):
        """Import what is asked for: what the graph engine and pipelines need of torch takes a second."""
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in ("CompiledStage", "compile"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from funcstage.engines import graph

        return getattr(graph, name)

    def __dir__():
        """The public names, and the modules beside them."""
        return sorted([*__all__, "__version__", *_MODULES])

    _MODULES = ("autograd", "pipelining", "schedules", "testing")


__version__ = "0.1.0"
__all__ = [
    "CompiledStage",
    "ConsumedError",
    "DerivedPullback",
    "FunctionalStage",
    "LeafError",
    "Pullback",
    "PurityError",
    "Site",
    "StageError",
    "StructureError",
    "TraceError",
    "WeightPullback",
    "WrittenError",
    "compile",
    "derive",
    "functionalize",
    "offload",
    "prefetch",
    "stage_backward",
    "stage_backward_input",
    "stage_backward_weight",
    "stage_vjp",
    "value_and_grad",
]
