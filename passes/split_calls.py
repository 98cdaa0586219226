"""f([a; b]) on a cache = f(a), then f(b) on what f(a) left: rows of one call may be fed one after the other.

Worth it in a loop, where the first rows are the same in every trip: their call then leaves the loop as a whole, with
the same stage and the same weights as the call that stays.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import sympy
from torch.fx import Node

from mmopt.ir.attention_args import CachedAttention
from mmopt.ir.graph import CACHED_ATTENTION, CAT, shape_of
from mmopt.ir.op_rules import operand_dims
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.rewrite.loops import row_inputs
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.spec.schedule import Call, Cat, Loop


class SplitCalls(Pass):
    def run(self, program: Program, report: Report) -> Program:
        made = program.copy()
        items: list[Call | Loop] = []
        for item in program.schedules.image:
            if isinstance(item, Loop):
                written = {c.target(o) for c in item.body for o in program.stages[c.stage].outputs}
                body: list[Call] = []
                for call in item.body:
                    body += self.split(program, call, program.stages[call.stage], written, report)
                item = replace(item, body=tuple(body))
            items.append(item)
        made.schedules = made.schedules.replaced(image=tuple(items))
        if not report.rewrites:
            report.skip("painting", "no call in a loop begins with rows that the loop does not change")
        return made

    def split(self, program: Program, call: Call, stage: Stage, written: set[str], report: Report) -> list[Call]:
        if not any(isinstance(call.source(i), Cat) and call.source(i).dim == 1 for i in stage.inputs):  # type: ignore[union-attr]
            return [call]
        found = row_inputs(stage)
        if isinstance(found, str):
            report.skip(call.stage, found)
            return [call]
        first, last = found
        readers = [
            (c.stage, n, s)
            for c in program.schedules.image.calls()
            for n in program.stages[c.stage].inputs
            for s in c.sources(n)
        ]
        made = {call.target(o): o for o in stage.outputs if o not in stage.inputs}
        read = [(reader, name, made[s]) for reader, name, s in readers if s in made]
        why = why_not_apart(stage, first, last, {o for _, _, o in read})
        for reader, name, o in read:
            if not isinstance(shape_of(program.stages[reader].input_nodes()[name])[1], int):
                why = why or f"{reader} reads all rows of {o}"
        if why:
            report.skip(call.stage, why)
            return [call]
        parts = [*call.sources(first), *call.sources(last)]
        fixed = 0
        while fixed < len(parts) and parts[fixed] not in written and not parts[fixed].startswith("step."):
            fixed += 1
        own = [i for i in stage.inputs if i in stage.outputs]
        if fixed == 0 or fixed > len(call.sources(first)) or any(s in written for i in own for s in call.sources(i)):
            report.skip(call.stage, "its first rows change from trip to trip")
            return [call]
        group = parts[0].partition(".")[0]  # what the values of the first call are called after
        ahead = dict(call.rename) | {first: "no_rows", last: parts[0] if fixed == 1 else Cat(1, tuple(parts[:fixed]))}
        kept = {o: f"{group}.{o}" for o in stage.outputs}
        rest = parts[fixed : len(call.sources(first))]
        after = dict(call.rename) | {i: kept[i] for i in own}
        after[first] = (rest[0] if len(rest) == 1 else Cat(1, tuple(rest))) if rest else "no_rows"
        targets = {o: call.target(o) for o in stage.outputs if call.target(o) != after.get(o, o)}
        report.did(
            f"{call.stage}: rows of {', '.join(parts[:fixed])} are fed by a call of their own, before the others"
        )
        return [Call(call.stage, ahead, kept), Call(call.stage, after, targets)]


def why_not_apart(stage: Stage, first: str, last: str, read: set[str]) -> str | None:
    """None if attention on caches is all that mixes rows, and rows fare alike whichever input they come by.

    read: the outputs that matter, beside those that are carried.
    """
    inputs = stage.input_nodes()
    ends = (inputs[first], inputs[last])
    of: dict[Node, set[Node]] = {e: {e} for e in ends}  # which of the two inputs a node is made from
    for n in stage.graph.nodes:
        if n not in of and (found := set().union(*(of.get(a, ()) for a in n.all_input_nodes))):
            of[n] = found
    along: dict[Node, int] = {
        n: 1 for o, n in stage.output_nodes().items() if n in of and (o in read or o in stage.inputs)
    }
    for n in reversed(stage.graph.nodes):
        if n not in along or n.op == "placeholder":
            continue
        if n.target is operator.getitem and n.args[0].target is CACHED_ATTENTION:
            cached = CachedAttention.of(n.args[0])
            places: list[tuple[Any, int | None]] = [(x, 1) for x in (cached.q, cached.k, cached.v)]
        elif n.target is CAT and n.args[1] == along[n]:
            if len(n.args[0]) != 2 or not alike(n.args[0][0], n.args[0][1], of, *ends):
                return f"{n.name} treats the rows of {first} and {last} differently"
            places = [(a, along[n]) for a in n.args[0]]
        else:
            rule = operand_dims(n, along[n])
            if rule is None:
                return f"{n.name} mixes rows"
            places = []
            for i, a in enumerate(n.args):
                places += zip(a, rule[i], strict=True) if isinstance(rule.get(i), list) else [(a, rule.get(i))]
        for a, place in places:
            if isinstance(a, Node) and a in of and (place is None or along.setdefault(a, place) != place):
                return f"{n.name} mixes rows"
            if len(of[n]) == 2 and isinstance(a, Node) and len(of.get(a, ends)) == 1 and n.target is not CAT:
                return f"{n.name} treats the rows of {first} and {last} differently"
    return None


def alike(a: Any, b: Any, of: dict[Node, set[Node]], first: Node, last: Node) -> bool:
    """Whether b is made of `last` as a is of `first`."""
    if a is first or not isinstance(a, Node) or not isinstance(b, Node):
        return b is last if a is first else isinstance(a, sympy.Expr) or bool(a == b)
    if a is b:
        return a not in of
    if a.target != b.target or a.op != b.op or a.op != "call_function" or len(a.args) != len(b.args):
        return False
    one: list[Any] = []
    two: list[Any] = []
    for x, y in zip(a.args, b.args, strict=True):
        one += x if isinstance(x, list | tuple) else [x]
        two += y if isinstance(y, list | tuple) else [y]
    return len(one) == len(two) and all(alike(x, y, of, first, last) for x, y in zip(one, two, strict=True))
