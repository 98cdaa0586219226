"""[f(a); f(b)] = f([a; b]): parts of one operator that are ready at the same time become one operator again.

Splitting runs an operator once for each part; where the parts are all needed and use the same weights, one product over
all rows reads the weights once. Parts that are ready long before the others (they wait for fewer products) stay apart:
joined, they would wait for the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from mmopt.ir.graph import CAT, LINEAR, Builder, Size, mapped, shape_of, simplify
from mmopt.ir.op_rules import on_part, operand_dims
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.rewrite.row_parts import depth


@dataclass(frozen=True)
class Piece:
    """Rows lo to hi along dim of a joined node."""

    whole: Node
    dim: int
    lo: Size
    hi: Size


class RejoinRows(Pass):
    def rewrite(self, graph: Graph, stage: str, report: Report) -> Graph:
        groups, reasons = siblings(graph)
        for why in reasons:
            report.skip(stage, why)
        if not groups:
            report.skip(stage, "no operator was split into parts that are ready together")
            return graph
        made, joined = Rejoin(graph, groups).run()
        report.did(f"{stage}: the {len(groups)} parts of {joined} products are computed together again")
        return made


def siblings(graph: Graph) -> tuple[dict[Node, list[Node]], list[str]]:
    """Each live linear that was split -> all its parts in order of rows, if they may be joined again."""
    found: dict[Any, list[tuple[str, Node]]] = {}
    for n in graph.nodes:
        if "source" in n.meta and n.target is LINEAR:
            name, dim, lo = n.meta["source"]
            found.setdefault((name, dim, tuple(n.args[1:])), []).append((lo, n))
    groups: dict[Node, list[Node]] = {}
    reasons: list[str] = []
    known: dict[Node, int] = {}
    for (name, _, _), members in found.items():
        nodes = list(dict.fromkeys(n for _, n in members))
        if len(nodes) < 2:
            continue
        if len({depth(n.args[0], known) for n in nodes}) > 1:
            reasons.append(f"the parts of {name} are not ready at the same time")
            continue
        for n in nodes:
            groups[n] = nodes
    return groups, reasons


class Rejoin:
    """Copies a graph; values are nodes or pieces of joined nodes. Pieces of one node that meet again are that node."""

    def __init__(self, graph: Graph, groups: dict[Node, list[Node]]):
        self.graph, self.groups = graph, groups
        self.b, self.joined = Builder(), 0
        self.env: dict[Node, Any] = {}
        self.by_source: dict[Any, list[Node]] = {}
        for n in graph.nodes:
            if "source" in n.meta:
                self.by_source.setdefault(n.meta["source"][:2], []).append(n)

    def run(self) -> tuple[Graph, int]:
        for n in self.graph.nodes:
            if n.op == "placeholder":
                self.env[n] = self.b.leaf(n)
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        order = list(self.graph.nodes)
        for n in order:  # in order where possible; the parts of a group are made together when the first is asked for
            if n.op != "output":
                self.make(n)
        self.b.output([self.node(self.env[a]) for a in output.args[0]])
        return self.b.graph, self.joined

    def make(self, wanted: Node) -> None:
        """Make a node, first all that it or its group reads. With a stack: graphs are deeper than Python recurses."""
        stack = [wanted]
        while stack:
            n = stack[-1]
            if n in self.env:
                stack.pop()
                continue
            group = self.groups.get(n, [n])
            waiting = [a for m in group for a in m.all_input_nodes if a not in self.env]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if len(group) > 1:
                self.join_group(group)
            elif n.op == "get_attr":
                self.env[n] = self.b.leaf(n)
            else:
                self.env[n] = self.copy(n)

    def join_group(self, group: list[Node]) -> None:
        dim = group[0].meta["source"][1]
        args = list(group[0].args)
        args[0] = self.cat([self.env[n.args[0]] for n in group], dim)
        args[1:] = [self._plain(mapped(a, self.env)) for a in args[1:]]
        shape = list(shape_of(group[0]))
        shape[dim] = sum(shape_of(n)[dim] for n in group)
        whole = self.b.emit(LINEAR, tuple(args), shape, group[0].meta["dtype"])
        self.joined += 1
        lo: Size = 0
        for n in group:
            hi = simplify(lo + shape_of(n)[dim])
            self.env[n] = Piece(whole, dim, lo, hi)
            lo = hi

    def copy(self, n: Node) -> Any:
        """Row-wise work on a piece, where it was split only because its operand was, is done on the whole."""
        args = list(mapped(n.args, self.env))
        pieces = [a for a in args if isinstance(a, Piece)]
        if n.target is CAT:
            return self.cat(list(args[0]), args[1])
        if pieces and "source" in n.meta:
            first, (_, dim, _) = pieces[0], n.meta["source"]
            rule = operand_dims(n, dim)
            if rule is not None and self.whole_parts(n, args, rule, first):
                new = tuple(a.whole if isinstance(a, Piece) else a for a in args)
                whole = on_part(self.b, n, dim, shape_of(first.whole)[first.dim], new)
                return Piece(whole, dim, first.lo, first.hi)
        return self.b.copy(n, tuple(self._plain(a) for a in args), n.meta.get("source"))

    def whole_parts(self, n: Node, args: list[Any], rule: dict, first: Piece) -> bool:
        """True if every operand is the same rows of a joined value, or the same for all rows."""
        for i, a in enumerate(args):
            if isinstance(a, Piece):
                if rule.get(i) != a.dim or (a.lo, a.hi) != (first.lo, first.hi):
                    return False
                if shape_of(a.whole)[a.dim] != shape_of(first.whole)[first.dim]:
                    return False
            elif isinstance(a, Node) and rule.get(i) is not None:
                return False
        return n.target is not LINEAR

    def cat(self, values: list[Any], dim: int) -> Node:
        """Consecutive pieces of one node become one again."""
        merged: list[Any] = []
        for v in values:
            last = merged[-1] if merged else None
            if isinstance(v, Piece) and isinstance(last, Piece) and last.whole is v.whole and last.dim == v.dim == dim:
                if last.hi == v.lo:
                    merged[-1] = Piece(v.whole, dim, last.lo, v.hi)
                    continue
            merged.append(v)
        return self.b.cat([self.node(v) for v in merged], dim)

    def node(self, v: Any) -> Node:
        return self.b.slice(v.whole, v.dim, v.lo, v.hi) if isinstance(v, Piece) else v

    def _plain(self, a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(self._plain(x) for x in a)
        return self.node(a) if isinstance(a, Piece) else a
