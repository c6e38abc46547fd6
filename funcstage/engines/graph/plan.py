"""Plans: what the three programs of a compiled stage compute, hold and compute again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.fx import GraphModule

from funcstage import report
from funcstage.engines.graph.cost import flops
from funcstage.engines.graph.extract import Program
from funcstage.engines.graph.joint import Joint
from funcstage.engines.graph.mincut import nbytes_together
from funcstage.engines.graph.nodes import is_view
from funcstage.engines.graph.partition import Partition


class Phase(NamedTuple):
    """One program.

    Attributes:
        flops: floating-point operations of its matrix products, convolutions and attention.
        operations: ATen operations that are no views.
        recomputed_flops: those of `flops` that an earlier program has done already.
        recomputed_operations: likewise.
        reads: bytes of the residuals that it reads.
    """

    flops: int
    operations: int
    recomputed_flops: int
    recomputed_operations: int
    reads: int


class StagePrograms(NamedTuple):
    """The three graphs of a signature; `str` prints their code with shapes and dtypes."""

    forward: GraphModule
    input_grad: GraphModule
    weight_grad: GraphModule

    def __str__(self) -> str:
        return "\n".join(
            f"# {name}\n{module.print_readable(print_output=False)}"
            for name, module in zip(self._fields, self, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What F, I and W of one signature cost. Printable; a table in a notebook.

    Attributes:
        stage: the stage's name.
        forward: the program F.
        input_grad: the program I.
        weight_grad: the program W.
        forward_to_input: bytes of the residuals that F hands to I.
        forward_to_weight: bytes of those that F hands to W.
        input_to_weight: bytes of those that I hands to W.
        held_after_forward: bytes held between F and I, memory that serves both counted once.
        held_after_input: bytes held between I and W.
        budget: bytes that may be held between F and I, where `remat` is a budget.
    """

    stage: str
    forward: Phase
    input_grad: Phase
    weight_grad: Phase
    forward_to_input: int
    forward_to_weight: int
    input_to_weight: int
    held_after_forward: int
    held_after_input: int
    budget: int | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations of all three programs."""
        return self.forward.flops + self.input_grad.flops + self.weight_grad.flops

    @property
    def recomputed_flops(self) -> int:
        """Those of `flops` that are done a second time."""
        return self.input_grad.recomputed_flops + self.weight_grad.recomputed_flops

    def rows(self) -> list[tuple[str, ...]]:
        """Return the programs as a table, its header first; "again" is what an earlier program has done."""
        phases = (("F", self.forward), ("I", self.input_grad), ("W", self.weight_grad))
        rows: list[tuple[str, ...]] = [
            ("", "FLOP", "FLOP again", "operations", "operations again", "residuals read")
        ]
        for name, phase in phases:
            flops, flops_again = report.work(phase.flops), report.work(phase.recomputed_flops)
            operations, operations_again = f"{phase.operations:,}", f"{phase.recomputed_operations:,}"
            rows.append((name, flops, flops_again, operations, operations_again, report.size(phase.reads)))
        return rows

    def edges(self) -> list[tuple[str, str]]:
        """Return the residuals between the programs as a table without a header."""
        budget = [] if self.budget is None else [("budget after F", report.size(self.budget))]
        return [
            ("F -> I", report.size(self.forward_to_input)),
            ("F -> W", report.size(self.forward_to_weight)),
            ("I -> W", report.size(self.input_to_weight)),
            ("held after F", report.size(self.held_after_forward)),
            *budget,
            ("held after I", report.size(self.held_after_input)),
        ]

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each program, and the fields of `Phase` as columns.

        Raises:
            StageError: if pandas is not installed.
        """
        phases = (("F", self.forward), ("I", self.input_grad), ("W", self.weight_grad))
        return report.frame(("program", *Phase._fields), [(name, *phase) for name, phase in phases])

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in rows]
        lines += [f"{name:14} {size:>10}" for name, size in self.edges()]
        return "\n".join((self.stage, *lines))

    def _repr_html_(self) -> str:
        header, *rows = self.rows()
        return report.table(self.stage, header, rows) + report.table("residuals", ("", "size"), self.edges())


def plan_of(stage: str, joint: Joint, partition: Partition) -> Plan:
    """Count what the programs of a partition compute and hand on.

    Args:
        stage: the stage's name.
        joint: the joint graph.
        partition: of it.
    """
    nodes = {node.name: node for node in joint.module.graph.nodes}
    after_forward = set(partition.after_forward)

    def size(names: Iterable[str]) -> int:
        return nbytes_together(nodes[name] for name in names)

    handed_on = {*partition.after_forward, *partition.from_input}
    done: set[str] = set()
    phases: list[Phase] = []
    for program in (partition.forward, partition.input_grad, partition.weight_grad):
        residuals = [] if program is partition.forward else [n for n in program.inputs if n in handed_on]
        phases.append(_phase(program, done, size(residuals)))
        done.update(node.name for node in program.module.graph.nodes)
    forward, input_grad, weight_grad = phases
    return Plan(
        stage,
        forward,
        input_grad,
        weight_grad,
        forward_to_input=size(name for name in partition.input_grad.inputs if name in after_forward),
        forward_to_weight=size(name for name in partition.for_weight if name in after_forward),
        input_to_weight=size(partition.from_input),
        held_after_forward=size(partition.after_forward),
        held_after_input=size(partition.for_weight),
        budget=partition.budget,
    )


def _phase(program: Program, done: set[str], reads: int) -> Phase:
    work = [n for n in program.module.graph.nodes if n.op == "call_function" and not is_view(n)]
    work = [node for node in work if node.target.__module__ != "_operator"]
    again = [node for node in work if node.name in done]
    return Phase(sum(map(flops, work)), len(work), sum(map(flops, again)), len(again), reads)
