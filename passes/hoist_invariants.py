"""loop(f(a), g(a, x)) = y = f(a); loop(g(y, x)): nothing that a loop does not change is computed in the loop.

Levels: what depends on weights alone is computed when the program is compiled (it becomes a constant: broadcasts are
moved behind it, f(expand(c)) = expand(f(c))); what depends only on values that a loop does not write moves to a stage
called once before the loop; what depends on the number of the trip alone is computed for all trips in one call before
the loop, which makes it a table; the rest stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node

from mmopt.ir.graph import EXPAND, Builder, is_pointwise, rebuild, shape_of
from mmopt.ir.op_rules import on_part, operand_dims
from mmopt.ir.program import Program
from mmopt.rewrite.loops import why_not_local
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.rewrite.row_parts import works_along
from mmopt.rewrite.split_stage import Split, split_stage
from mmopt.spec.cross_mask import CROSS_INPUTS
from mmopt.spec.schedule import Call, Cat, Loop, table_of

NO_PRODUCT = "every product in it depends on what the loop changes"


class HoistInvariants(Pass):
    def run(self, program: Program, report: Report) -> Program:
        made = program.copy()
        for name, stage in program.stages.items():
            graph, moved = sink_broadcasts(stage.graph)
            if moved:
                report.did(f"{name}: {moved} operators depend on weights alone and are computed at compile time")
                made.stages[name] = stage.replaced(graph)
            else:
                report.skip(name, "no operator depends on weights alone")
        schedule: list[Call | Loop] = []
        for item in self.hoist_shared(made, report):
            if isinstance(item, Loop) and item.over is None:
                before, item = self.hoist(made, item, report)
                schedule += before
            schedule.append(item)
        made.schedules = made.schedules.replaced(text=tuple(schedule))
        painting: list[Call | Loop] = []
        for item in made.schedules.image:
            before, item = hoist_steps(made, item, report) if isinstance(item, Loop) else ([], item)
            painting += [*before, item]
        made.schedules = made.schedules.replaced(image=tuple(painting))
        return made

    def hoist_shared(self, program: Program, report: Report) -> tuple[Call | Loop, ...]:
        """What a stage makes of values that none of the loops that call it changes is computed once, before them."""
        loops = [i for i in program.schedules.text if isinstance(i, Loop)]
        inside = [c for loop in loops for c in loop.body]
        schedule = list(program.schedules.text)
        for name, calls in Counter(c.stage for c in inside).items():
            if calls < 2 or any(c.stage == name for c in schedule if isinstance(c, Call)):
                continue
            fixed = never_written(program, name, inside)
            split = split_stage(program.stages[name], fixed, name) if fixed else None
            if split is None:
                continue
            if program.info.cross and not works_along(split.ahead, 1):
                report.skip(name, "what no loop changes is not made image by image, each block by itself")
                continue
            program.stages[f"{name}.once"], program.stages[name] = split.ahead, split.rest
            call = next(c for c in inside if c.stage == name)
            before = Call(f"{name}.once", {i: r for i, r in call.rename.items() if i in split.ahead.inputs})
            schedule.insert(schedule.index(next(lp for lp in loops if call in lp.body)), before)
            report.did(f"{name}: {len(split.values)} values that no loop changes are computed once before all of them")
        return tuple(schedule)

    def hoist(self, program: Program, loop: Loop, report: Report) -> tuple[list[Call], Loop]:
        """Calls to make once before the loop, and the loop. Stages of `program` are replaced."""
        written = {c.target(o) for c in loop.body for o in program.stages[c.stage].outputs} | set(CROSS_INPUTS)
        before: list[Call] = []
        for call in loop.body:
            stage = program.stages[call.stage]
            fixed = {i for i in stage.inputs if not written & set(call.sources(i))}
            split = split_call(program, call, fixed)
            if isinstance(split, str):
                report.skip(call.stage, split)
                continue
            once, program.stages[call.stage], values = split
            program.stages[f"{call.stage}.once"] = once
            before.append(Call(f"{call.stage}.once", {i: call.rename[i] for i in once.inputs if i in call.rename}))
            report.did(f"{call.stage}: {len(values)} values that the loop does not change are computed once before it")
        return before, loop


def never_written(program: Program, name: str, inside: list[Call]) -> set[str]:
    """Inputs of a stage that all its calls read from one value, which no call inside a loop writes."""
    written = {c.target(o) for c in inside for o in program.stages[c.stage].outputs} | set(CROSS_INPUTS)
    fixed = set()
    for i in program.stages[name].inputs:
        read = {v for c in inside if c.stage == name for v in c.sources(i)}
        if len(read) == 1 and not any(v in written or v.startswith("chunk.") for v in read):
            fixed.add(i)
    return fixed


def split_call(program: Program, call: Call, fixed: set[str], kind: str = "once") -> Split | str:
    """The stage of a call in two, of which the first depends on `fixed` alone; or the reason why not."""
    split = split_stage(program.stages[call.stage], fixed, call.stage, kind)
    if split is None:
        return NO_PRODUCT
    if sum(c.stage == call.stage for c in program.calls()) > 1:
        return "called elsewhere too: a second copy would hold its weights twice"
    return split


def sink_broadcasts(graph: Graph) -> tuple[Graph, int]:
    """f(expand(c)) -> expand(f(c)) for what is broadcast along the batch: f(c) is then a constant."""
    moved = 0

    def visit(b: Builder, n: Node, args: tuple) -> Node | None:
        nonlocal moved
        shape = shape_of(n)
        wide = [a for a in args if isinstance(a, Node) and a.target is EXPAND and a.args[0].meta["const"]]
        if not wide or not isinstance(shape, tuple) or isinstance(shape[0], int) or n.target is EXPAND:
            return None
        rule = operand_dims(n, 0)
        if rule is None:
            return None
        narrow: list[Any] = []
        for i, a in enumerate(args):
            if a in wide and rule.get(i) == 0 and (one := one_sample(b, a)) is not None:
                narrow.append(one)
            elif isinstance(a, Node) and not (a.meta["const"] and (rule.get(i) is None or is_pointwise(n.target))):
                return None
            else:
                narrow.append(a)
        moved += 1
        return b.emit(EXPAND, (on_part(b, n, 0, 1, tuple(narrow)), shape), shape, n.meta["dtype"])

    made = rebuild(graph, visit)
    return (made, moved) if moved else (graph, 0)


def one_sample(b: Builder, expanded: Node) -> Node | None:
    """A constant that is broadcast along the batch alone, as a batch of one; None if it grows otherwise too."""
    constant, shape = expanded.args[0], shape_of(expanded)
    own = (1,) * (len(shape) - len(shape_of(constant))) + tuple(shape_of(constant))
    return b.reshape(constant, own) if own == (1, *shape[1:]) else None


# -------------------------------------------------------------------------------------------------- tables of all trips
def hoist_steps(program: Program, loop: Loop, report: Report) -> tuple[list[Call], Loop]:
    """Calls to make before a loop over ``steps``, and the loop without them: whole calls, then parts of stages."""
    steps = Steps(program, loop, report)
    body: list[Call] = []
    for place, call in enumerate(loop.body):
        call = steps.reading_tables(call)
        kind = steps.classify(place, call)
        if kind == "once":
            steps.call_once(call)
        elif kind == "table":
            steps.make_table(call)
        elif kind == "split":
            body.append(steps.make_tables_of_parts(call))
        else:
            report.skip(call.stage, kind)
            body.append(call)
    return steps.before, replace(loop, body=tuple(body))


class Steps:
    """What has moved so far out of a loop over ``steps``.

    What depends on the trip alone is called once with all trips as its batch: such a stage must work sample by sample.
    Its results are a table, ``steps.x``, whose row of a trip the loop reads as ``step.x``.
    """

    def __init__(self, program: Program, loop: Loop, report: Report):
        self.program, self.loop, self.report = program, loop, report
        self.before: list[Call] = []
        self.tables: dict[str, str] = {}  # value -> the row of a table that it became
        self.written = {c.target(o) for c in loop.body for o in program.stages[c.stage].outputs}
        self.written |= {loop.update[0]} if loop.update else set()
        self.splits: dict[str, Split] = {}

    def reading_tables(self, call: Call) -> Call:
        """A call that reads rows of tables for what has become a table."""
        rename: dict[str, str | Cat] = {}
        for i in self.program.stages[call.stage].inputs:
            source = call.source(i)
            if isinstance(source, Cat):
                rename[i] = Cat(source.dim, tuple(self.tables.get(n, n) for n in source.names))
            elif source in self.tables:
                rename[i] = self.tables[source]
        return replace(call, rename=call.rename | rename)

    def classify(self, place: int, call: Call) -> str:
        """What can be done with call number `place`: "once", "table" or "split"; else the reason why it stays."""
        stage = self.program.stages[call.stage]
        sources = {s for i in stage.inputs for s in call.sources(i)}
        if not any(s in self.written or s.startswith("step.") for s in sources):
            kind = "once"
        elif len(self.of_the_trip(call)) == len(stage.inputs) and works_along(stage, 0):
            kind = "table"
        else:
            return self.why_not_split(call) or "split"
        return why_not_local(self.program, self.loop, place) or kind

    def of_the_trip(self, call: Call) -> set[str]:
        """Inputs that are rows of tables."""
        inputs = self.program.stages[call.stage].inputs
        return {i for i in inputs if isinstance(s := call.source(i), str) and s.startswith("step.")}

    def why_not_split(self, call: Call) -> str | None:
        """None if a part of the stage can be called for all trips at once; the parts are then in `splits`."""
        each = self.of_the_trip(call)
        split = split_call(self.program, call, each, "steps") if each else NO_PRODUCT
        if isinstance(split, str):
            return split
        if not works_along(split.ahead, 0):
            return "what depends on the trip alone is not made sample by sample"
        self.splits[call.stage] = split
        return None

    def call_once(self, call: Call) -> None:
        self.before.append(call)
        self.written -= {call.target(o) for o in self.program.stages[call.stage].outputs}
        self.report.did(f"{call.stage}: called once before the loop, which changes nothing of what this call reads")

    def make_table(self, call: Call) -> None:
        stage = self.program.stages[call.stage]
        self.for_all_trips(call, call.stage, {o: call.target(o) for o in stage.outputs})
        self.tables |= {call.target(o): f"step.{call.target(o)}" for o in stage.outputs}
        self.report.did(f"{call.stage}: called once for all trips, before the loop; the loop reads a table")

    def make_tables_of_parts(self, call: Call) -> Call:
        """The part of the stage that depends on the trip alone becomes a stage of its own; returns the other's call."""
        ahead, rest, values = self.splits[call.stage]
        self.program.stages[f"{call.stage}.steps"], self.program.stages[call.stage] = ahead, rest
        self.for_all_trips(call, f"{call.stage}.steps", {v: v for v in values})
        kept = {k: v for k, v in call.rename.items() if k in rest.inputs or k in rest.outputs}
        self.report.did(f"{call.stage}: {len(values)} values that depend on the trip alone become tables")
        return replace(call, rename=kept | {v: f"step.{v}" for v in values})

    def for_all_trips(self, call: Call, stage: str, made: dict[str, str]) -> None:
        """Before the loop: `stage` on whole tables; what it makes are tables."""
        rows: dict[str, str | Cat] = {i: table_of(str(call.source(i))) for i in self.program.stages[stage].inputs}
        self.before.append(Call(stage, rows, {o: f"steps.{v}" for o, v in made.items()}))
