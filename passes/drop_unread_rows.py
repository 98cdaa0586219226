"""f(x)[last] = f(x[last]): rows that nobody reads are not computed.

Where every stage that reads a value begins by slicing it, the slice moves into the stage that makes the value; inside a
stage a slice moves up through all operators that work row by row, until it meets a value that others read whole.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch.fx import Graph, Node

from mmopt.ir.graph import SLICE, Builder, mapped, rebuild, shape_of, simplify
from mmopt.ir.op_rules import on_part, operand_dims
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.rewrite.pass_base import Pass, Report

Demand = tuple[int, Any, Any] | None  # (dim, lo, hi) of a node that is wanted; None = all of it


class DropUnreadRows(Pass):
    def run(self, program: Program, report: Report) -> Program:
        made = program.copy()
        for name in program.stages:
            for output in program.stages[name].outputs:
                rows = self.read_rows(program, name, output)
                if isinstance(rows, str):
                    report.skip(f"{name}.{output}", rows)
                    continue
                dim, count = rows
                made.stages[name] = keep_last(made.stages[name], output, dim, count)
                for reader, value in readers(program, name, output):
                    made.stages[reader] = accept_last(made.stages[reader], value, dim, count)
                report.did(f"{name}.{output}: only the last {count} of dimension {dim} is read")
        for name, stage in made.stages.items():
            made.stages[name] = stage.replaced(push_slices(stage.graph, name, report))
        return made

    def read_rows(self, program: Program, stage: str, output: str) -> tuple[int, int] | str:
        """(dim, k) if all readers want only the last k of dim, else the reason why not."""
        if output in program.stages[stage].inputs:
            return "carried from call to call"
        found = readers(program, stage, output)
        if not found:
            return "a result of the program"
        ranges = set()
        for reader, value in found:
            node = program.stages[reader].input_nodes()[value]
            for user in node.users:
                if user.target is not SLICE or len(user.args) != 4:
                    return f"{reader} reads all of it"
                dim, lo, hi = user.args[1:4]
                size = shape_of(node)[dim]
                count = simplify(size - lo)
                if hi != size or not isinstance(count, int) or not isinstance(size, sympy.Expr):
                    return f"{reader} reads rows {lo} to {hi}, not the last ones"
                ranges.add((dim, count))
        return ranges.pop() if len(ranges) == 1 else "its readers want different rows"


def readers(program: Program, stage: str, output: str) -> list[tuple[str, str]]:
    """(stage, input name) of every call that reads the value which `stage` writes as `output`."""
    written = {c.target(output) for c in program.calls() if c.stage == stage}
    found = [
        (c.stage, value)
        for c in program.calls()
        for value in program.stages[c.stage].inputs
        if written & set(c.sources(value))
    ]
    return list(dict.fromkeys(found))


def keep_last(stage: Stage, output: str, dim: int, count: int) -> Stage:
    index = stage.outputs.index(output)
    graph = rebuild(stage.graph, lambda b, n, args: None)
    out = next(n for n in reversed(graph.nodes) if n.op == "output")
    values = list(out.args[0])
    x = values[index]
    size = shape_of(x)[dim]
    with graph.inserting_before(out):
        values[index] = graph.call_function(SLICE, (x, dim, simplify(size - count), size))
    shape = list(shape_of(x))
    shape[dim] = count
    values[index].meta.update(shape=tuple(shape), dtype=x.meta["dtype"], const=False)
    out.args = (tuple(values),)
    return stage.replaced(graph)


def accept_last(stage: Stage, value: str, dim: int, count: int) -> Stage:
    """The reader's input now holds the wanted rows only."""
    wanted = stage.input_nodes()[value]
    shape = list(shape_of(wanted))
    shape[dim] = count

    def visit(b: Builder, n: Node, args: tuple) -> Node | None:
        return args[0] if n.target is SLICE and n.args[0] is wanted else None

    return stage.replaced(rebuild(stage.graph, visit, {wanted: tuple(shape)}))


def demands(graph: Graph) -> dict[Node, Demand]:
    """Which part of each node is wanted, from the outputs up."""
    wanted: dict[Node, set[Demand]] = {n: set() for n in graph.nodes}
    final: dict[Node, Demand] = {}
    for n in reversed(graph.nodes):
        ranges = wanted[n]
        d = next(iter(ranges)) if len(ranges) == 1 else None
        rule = operand_dims(n, d[0]) if d and n.op == "call_function" and not n.meta["const"] else None
        if d is None or (rule is None and n.target is not SLICE):
            d = None
        if n.target is SLICE and len(n.args) == 4:
            x, dim, lo, hi = n.args
            if d is None:
                wanted[x].add((dim, lo, hi))
            elif d[0] == dim:
                wanted[x].add((dim, simplify(lo + d[1]), simplify(lo + d[2])))
            else:
                d = None
                wanted[x].add((dim, lo, hi))
        elif d is None:
            for a in n.all_input_nodes:
                wanted[a].add(None)
        else:
            for i, a in enumerate(n.args):
                dims = rule.get(i) if rule else None
                pairs = zip(a, dims, strict=True) if isinstance(dims, list) else [(a, dims)]
                for x, m in pairs:
                    if isinstance(x, Node):
                        wanted[x].add(None if m is None else (m, d[1], d[2]))
        final[n] = d
    return final


def push_slices(graph: Graph, stage: str, report: Report) -> Graph:
    wanted = demands(graph)
    b = Builder()
    env: dict[Node, Any] = {}  # env holds the wanted part of each node

    def get(x: Any, m: int | None, d: Demand) -> Any:
        if not isinstance(x, Node):
            return x
        if m is None or d is None or wanted[x] == (m, d[1], d[2]):
            return env[x]
        return b.slice(env[x], m, d[1], d[2])

    moved = 0
    for n in graph.nodes:
        d = wanted[n]
        if n.op in ("placeholder", "get_attr"):
            env[n] = b.leaf(n)
        elif n.op == "output":
            b.output([env[a] for a in n.args[0]])
        elif n.target is SLICE and len(n.args) == 4:
            x, dim, lo, hi = n.args
            if d is not None:
                lo, hi = simplify(lo + d[1]), simplify(lo + d[2])
            env[n] = env[x] if wanted[x] == (dim, lo, hi) else b.slice(env[x], dim, lo, hi)
        elif d is None:
            env[n] = b.copy(n, mapped(n.args, env))
        else:
            rule = operand_dims(n, d[0]) or {}
            args = []
            for i, a in enumerate(n.args):
                m = rule.get(i)
                if isinstance(m, list):
                    args.append(tuple(get(x, k, d) for x, k in zip(a, m, strict=True)))
                else:
                    args.append(get(a, m, d))
            env[n] = on_part(b, n, d[0], simplify(d[2] - d[1]), tuple(args))
            moved += 1
    if moved:
        report.did(f"{stage}: {moved} operators work on the rows that are read alone")
    return b.graph if moved else graph
