"""What a pass is: Program -> (Program, Report). It never edits its input, never prints, never checks itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Graph

from mmopt.ir.program import Program
from mmopt.report import pass_text


@dataclass
class Report:
    """What a pass did, where, and why it left alone what it left alone."""

    name: str
    contract: str = "exact"
    rewrites: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    checked: str = "not checked"
    seconds: float = 0.0

    def did(self, where: str) -> None:
        self.rewrites.append(where)

    def skip(self, where: str, why: str) -> None:
        if (line := f"{where}: {why}") not in self.skipped:
            self.skipped.append(line)

    def __str__(self) -> str:
        return pass_text(**vars(self))


class Pass:
    """A rewrite of a Program. `contract`: "exact" (equal up to rounding) or "approximate" (drift is measured)."""

    contract = "exact"

    @property
    def name(self) -> str:
        return type(self).__module__.rsplit(".", 1)[-1]

    def __call__(self, program: Program) -> tuple[Program, Report]:
        report = Report(self.name, self.contract)
        return self.run(program, report).drop_unused(), report

    def run(self, program: Program, report: Report) -> Program:
        """By default: each stage's graph by itself."""
        made = program.copy()
        for name, stage in program.stages.items():
            graph = self.rewrite(stage.graph, name, report)
            if graph is not stage.graph:
                made.stages[name] = stage.replaced(graph)
        return made

    def drift(self, before: Program, after: Program) -> str | None:
        """How far an approximate pass is from the Program before it, in words; None if outputs can be compared."""
        return None

    def rewrite(self, graph: Graph, stage: str, report: Report) -> Graph:
        """Return a new graph, or the same one if nothing applies (and say why in the report)."""
        raise NotImplementedError
