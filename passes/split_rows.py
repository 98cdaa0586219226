"""f([a; b]) = [f(a); f(b)]: rows that are computed together need not be.

Every concatenation is a seam along which operators run part by part. A selection between branches by a mask that is the
same all over a part becomes that branch alone: routing by modality disappears.
"""

from __future__ import annotations

from torch.fx import Graph

from mmopt.ir.graph import WHERE
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.rewrite.row_parts import PartInterpreter


class SplitRows(Pass):
    def rewrite(self, graph: Graph, stage: str, report: Report) -> Graph:
        parts = PartInterpreter(lambda node, why: report.skip(f"{stage}: {node} joins its parts", why))
        made = parts.run(graph)
        if not parts.splits:
            report.skip(stage, "no operator reads a concatenation row by row")
            return graph
        report.did(
            f"{stage}: {parts.splits} operators run part by part, {parts.routes // 2} selections by mask are gone"
        )
        left = sum(n.target is WHERE for n in made.nodes)
        if left:
            report.skip(stage, f"{left} selections stay: their mask is not known at trace time")
        return made
