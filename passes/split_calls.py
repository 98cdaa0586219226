"""f([a; b]) on a cache = f(a), then f(b) on what f(a) left: rows of one call may be fed one after the other.

Worth it in a loop, where the first rows are the same in every trip: their call then leaves the loop as a whole, with
the same stage and the same weights as the call that stays.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from mmopt.graph import CACHED_ATTENTION, CAT
from mmopt.program import Call, Cat, Loop, Program, Stage
from mmopt.rewriting import Pass, Report


class SplitCalls(Pass):
    def run(self, program: Program, report: Report) -> Program:
        made = program.copy()
        items: list[Call | Loop] = []
        for item in program.painting:
            if isinstance(item, Loop):
                written = {c.target(o) for c in item.body for o in program.stages[c.stage].outputs}
                body: list[Call] = []
                for call in item.body:
                    body += self.split(call, program.stages[call.stage], written, report)
                item = replace(item, body=tuple(body))
            items.append(item)
        made.painting = tuple(items)
        if not report.rewrites:
            report.skip("painting", "no call in a loop begins with rows that the loop does not change")
        return made

    def split(self, call: Call, stage: Stage, written: set[str], report: Report) -> list[Call]:
        if not any(isinstance(call.source(i), Cat) and call.source(i).dim == 1 for i in stage.inputs):  # type: ignore[union-attr]
            return [call]
        found = row_inputs(stage)
        if isinstance(found, str):
            report.skip(call.stage, found)
            return [call]
        first, last = found
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


def row_inputs(stage: Stage) -> tuple[str, str] | str:
    """The two inputs whose rows a stage with a cache works on, one after the other; or why there are none.

    The stage must carry all that rows see of earlier rows: its attention reads and writes caches, of which `past` slots
    are filled, and nothing else in it mixes rows (the check of contracts would find that).
    """
    attention = [n for n in stage.graph.nodes if n.target is CACHED_ATTENTION]
    if not attention or "past" not in stage.inputs or "past" not in stage.outputs:
        return "it keeps no rows in a cache"
    names = {n: i for i, n in stage.input_nodes().items()}
    carried = {names.get(a) for n in attention for a in n.args[3:5]}
    if not carried <= set(stage.outputs):
        return "not all of its caches are carried"
    for n in stage.graph.nodes:
        if n.target is CAT and n.args[1] == 1 and all(isinstance(a, Node) and a in names for a in n.args[0]):
            found = [names[a] for a in n.args[0]]
            if len(found) == 2:
                return found[0], found[1]
    return "its rows are not two inputs, one after the other"
