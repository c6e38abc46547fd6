"""Where faults are planted, and the tests that may see them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "funcstage"

TARGETS = (
    "funcstage/pullback.py",
    "funcstage/weight_pullback.py",
    "funcstage/engines/levels/*.py",
    "funcstage/engines/graph/*.py",
    "funcstage/state/ambient.py",
    "funcstage/state/content.py",
    "funcstage/state/grad_mode.py",
    "funcstage/state/module.py",
    "funcstage/state/writes.py",
    *(
        f"funcstage/pipelining/{name}.py"
        for name in (
            *("accumulating_stage", "binding", "examples", "failed_steps", "folded_loss", "given", "hooks"),
            *("inference", "microbatch", "module_stage", "pieces", "refusals", "replicas", "same_stage"),
            *("snapshot", "stage", "upstream", "waiting", "whole"),
        )
    ),
)
"""Globs of the files that faults are planted in."""

ON_A_GPU_ONLY = ("funcstage/engines/graph/cuda_graphs.py",)
"""Files among these that do nothing without one."""

TESTS = ("tests/**/test_*.py", "property_tests/test_*.py")

UNRELATED = {
    # what runs for long, or in processes of its own, and tests other parts of the package
    *(
        "benchmarks",
        "checkpoints",
        "commands",
        "demo",
        "distributed_pipelines",
        "docs",
        "mutation",
        "notebooks",
    ),
    *("operators", "readme", "schedules", "search", "timeline", "train_distributed"),
}
"""Test files that no trial runs, without `test_` and `.py`."""


CONCERNED = {
    "accumulating_stage": ("parameter_hooks", "replicas", "stage", "stages_alone"),
    "alike": ("layers",),
    "classes": ("reads", "recorder", "what_a_forward_sees"),
    "compile": ("draws", "soak", "threads"),
    "content": ("argument_objects", "contents", "guards", "reads"),
    "crossing": ("budget", "checkpoint", "donation", "partition"),
    "decompose": ("absent", "partition"),
    "draws": ("generators", "reads"),
    "examples": ("stage", "transport"),
    "explain": ("linearize", "refusals"),
    "extract": ("donation", "gradients_belong_to_the_caller", "programs"),
    "failed_steps": ("failures",),
    "first_reads": ("sites",),
    "first_run": ("checkpoint", "second_runs"),
    "first_stage": ("sites", "split"),
    "folded_loss": ("stage",),
    "given": ("sharded_activations", "stage"),
    "grad_mode": ("threads", "what_a_forward_sees"),
    "guards": ("compile", "reads", "signatures"),
    "hooks": ("parameter_hooks",),
    "inference": ("module_stage", "stage"),
    "inductor": ("donation", "inductor_passes"),
    "joint": ("partition",),
    "layer_copies": ("layers", "repeated_layers"),
    "layers": ("repeated_layers",),
    "microbatch": ("masks", "stage"),
    "mincut": ("budget", "min_cut", "partition"),
    "mode": (
        "blame",
        "hooks_on_nodes",
        "inner_gradients",
        "linearize",
        "memory_read",
        "sites",
        "tensors_made_inside",
    ),
    "module": ("binding", "contents", "fingerprint", "guards", "threads", "undone"),
    "module_stage": ("binding", "sharded_activations", "stage", "stages_alone"),
    "modules_behind": ("guards", "reads"),
    "moves": ("linearize",),
    "nodes": ("budget", "partition"),
    "partition": ("generators",),
    "pieces": ("breaks", "parts_of_w", "pieces", "pieces_of_w", "split"),
    "plan": ("budget", "compile", "partition"),
    "pullback": ("higher_gradients", "refusals", "threads"),
    "recorder": ("generators", "layers", "reads"),
    "refusals": ("blame", "compile", "stage", "trace_errors", "wrappers"),
    "regions": ("checkpoint", "second_runs", "trace"),
    "replay": ("budget", "checkpoint"),
    "reverse": ("higher_gradients", "linearize"),
    "runners": ("inductor", "programs"),
    "same_stage": ("sharded_stages",),
    "separable": ("breaks", "compile", "generators", "tensors_made_inside", "what_a_forward_sees"),
    "sharded": ("dtensors",),
    "sites": ("parts_of_w",),
    "sizes": ("lengths",),
    "snapshot": ("binding",),
    "stage": ("failures", "fsdp_in_pipelines", "parameter_hooks", "ranges", "stages_alone"),
    "tape": ("breaks", "linearize", "pullback", "residuals", "second_runs", "sites", "split"),
    "tapes": ("accumulate", "offloading", "sites", "split"),
    "trace": (
        "backward_hooks",
        "compile",
        "cumulative",
        "grad_mode",
        "layers",
        "refusals",
        "what_a_forward_sees",
    ),
    "upstream": ("stage",),
    "waiting": ("orders_under_torch", "stays"),
    "weight_pullback": ("accumulate", "dtensors", "pullback", "split", "threads"),
    "whole": ("fsdp_in_pipelines",),
}
"""Test files that a file concerns beside those of its own name: their tests come first."""


def distance(file: str, test_file: str) -> int:
    """How far tests are from a file of the package: 0 if theirs has its name, 1 if it is about it, else 2."""
    name, test_name = Path(file).stem, Path(test_file).stem.removeprefix("test_")
    return 0 if test_name == name else 1 if test_name in CONCERNED.get(name, ()) else 2


def target_files(root: Path = ROOT) -> list[str]:
    """The files that faults are planted in, relative to the root."""
    found = {path for pattern in TARGETS for path in root.glob(pattern) if path.name != "__init__.py"}
    return sorted({str(path.relative_to(root)) for path in found} - {*ON_A_GPU_ONLY})


def files_of_tests(root: Path = ROOT) -> list[str]:
    """The test files that trials may run, relative to the root."""
    found = [path for pattern in TESTS for path in sorted(root.glob(pattern))]
    chosen = [p for p in found if p.stem.removeprefix("test_") not in UNRELATED and "cuda" not in p.stem]
    return [str(path.relative_to(root)) for path in chosen]
