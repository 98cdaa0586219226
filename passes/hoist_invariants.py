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

from mmopt.ir.graph import EXPAND, Builder, is_pointwise, mapped, rebuild, shape_of
from mmopt.ir.op_rules import on_part, operand_dims, rule_of
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.rewrite.loops import why_not_local
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.rewrite.row_parts import works_along
from mmopt.spec.cross_mask import PER_CALL
from mmopt.spec.schedule import Call, Cat, Loop, table_of


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
        made.schedule = tuple(schedule)
        painting: list[Call | Loop] = []
        for item in made.painting:
            before, item = hoist_steps(made, item, report) if isinstance(item, Loop) else ([], item)
            painting += [*before, item]
        made.painting = tuple(painting)
        return made

    def hoist_shared(self, program: Program, report: Report) -> tuple[Call | Loop, ...]:
        """What a stage makes of values that none of the loops that call it changes is computed once, before them."""
        loops = [i for i in program.schedule if isinstance(i, Loop)]
        inside = [c for loop in loops for c in loop.body]
        written = {c.target(o) for c in inside for o in program.stages[c.stage].outputs} | set(PER_CALL)
        schedule = list(program.schedule)
        for name, calls in Counter(c.stage for c in inside).items():
            if calls < 2 or any(c.stage == name for c in schedule if isinstance(c, Call)):
                continue
            stage = program.stages[name]
            fixed = set()
            for i in stage.inputs:
                read = {v for c in inside if c.stage == name for v in c.sources(i)}
                if len(read) == 1 and not any(v in written or v.startswith("chunk.") for v in read):
                    fixed.add(i)
            split = split_stage(stage, fixed, name) if fixed else None
            if split is None:
                continue
            if program.info.get("cross") and not works_along(split[0], 1):
                report.skip(name, "what no loop changes is not made image by image, each block by itself")
                continue
            program.stages[f"{name}.once"], program.stages[name], values = split
            call = next(c for c in inside if c.stage == name)
            before = Call(f"{name}.once", {i: r for i, r in call.rename.items() if i in split[0].inputs})
            schedule.insert(schedule.index(next(lp for lp in loops if call in lp.body)), before)
            report.did(f"{name}: {len(values)} values that no loop changes are computed once before all of them")
        return tuple(schedule)

    def hoist(self, program: Program, loop: Loop, report: Report) -> tuple[list[Call], Loop]:
        """Calls to make once before the loop, and the loop without what they do. Stages of `program` are replaced."""
        written = {c.target(o) for c in loop.body for o in program.stages[c.stage].outputs} | set(PER_CALL)
        before: list[Call] = []
        body: list[Call] = []
        times = Counter(c.stage for c in program.calls())
        for call in loop.body:
            stage = program.stages[call.stage]
            fixed = {i for i in stage.inputs if not written & set(call.sources(i))}
            split = split_stage(stage, fixed, call.stage)
            if split is None:
                report.skip(call.stage, "every product in it depends on what the loop changes")
                body.append(call)
                continue
            if times[call.stage] > 1:
                report.skip(call.stage, "called elsewhere too: a second copy would hold its weights twice")
                body.append(call)
                continue
            once, step, values = split
            program.stages[f"{call.stage}.once"], program.stages[call.stage] = once, step
            before.append(Call(f"{call.stage}.once", {i: call.rename[i] for i in once.inputs if i in call.rename}))
            body.append(call)
            report.did(f"{call.stage}: {len(values)} values that the loop does not change are computed once before it")
        return before, Loop(tuple(body), loop.over, loop.trips, loop.until)


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


def split_stage(stage: Stage, fixed: set[str], name: str, kind: str = "once") -> tuple[Stage, Stage, list[str]] | None:
    """(once, step, values between them), or None if nothing worth moving depends on `fixed` inputs alone."""
    inputs = stage.input_nodes()
    invariant: set[Node] = {n for i, n in inputs.items() if i in fixed}
    heavy: set[Node] = set()
    for n in stage.graph.nodes:
        if n.op == "get_attr" or n.meta.get("const"):
            invariant.add(n)
        elif n.op == "call_function" and n.all_input_nodes and all(a in invariant for a in n.all_input_nodes):
            invariant.add(n)
            if rule_of(n.target).heavy or any(a in heavy for a in n.all_input_nodes):
                heavy.add(n)
    outputs = stage.output_nodes()
    frontier = [
        n
        for n in stage.graph.nodes
        if n in heavy and isinstance(shape_of(n), tuple)
        and (any(u not in invariant for u in n.users) or n in outputs.values())
    ]  # fmt: skip
    if not frontier:
        return None
    values = {n: f"{name}.{kind}.{i}" for i, n in enumerate(frontier)}

    def part(stop: dict[Node, str], wanted: dict[str, Node]) -> Stage:
        """The stage that computes `wanted`, with the nodes of `stop` as inputs."""
        b, env = Builder(), {}
        for i, n in inputs.items():
            env[n] = b.placeholder(i.replace(".", "_"), shape_of(n), n.meta["dtype"])
        for n, value in stop.items():
            env[n] = b.placeholder(value.replace(".", "_"), shape_of(n), n.meta["dtype"])
        for n in stage.graph.nodes:
            if n in env or n.op in ("placeholder", "output"):
                continue
            if n.op == "get_attr":
                env[n] = b.leaf(n)
            else:
                env[n] = b.copy(n, mapped(n.args, env))
        b.output([env[n] for n in wanted.values()])
        names = [*inputs, *stop.values()]
        unused = [p for p in b.graph.nodes if p.op == "placeholder" and not p.users]
        kept = [
            i
            for i, p in zip(names, [p for p in b.graph.nodes if p.op == "placeholder"], strict=True)
            if p not in unused
        ]
        for p in unused:
            b.graph.erase_node(p)
        return Stage(b.graph, kept, list(wanted))

    once = part({}, {v: n for n, v in values.items()})
    step = part(values, outputs)
    return once, step, list(values.values())


def hoist_steps(program: Program, loop: Loop, report: Report) -> tuple[list[Call], Loop]:
    """Calls to make before a loop over ``steps``, and the loop without them: whole calls, then parts of stages.

    What depends on the trip alone is called once with all trips as its batch: such a stage must work sample by sample.
    """
    changing = {loop.update[0]} if loop.update else set()
    written = {c.target(o) for c in loop.body for o in program.stages[c.stage].outputs} | changing
    before: list[Call] = []
    body: list[Call] = []
    tables: dict[str, str | Cat] = {}  # value -> the row of a table that it became
    fixed: set[str] = set()
    times = Counter(c.stage for c in program.calls())
    for place, call in enumerate(loop.body):
        stage = program.stages[call.stage]
        why = why_not_local(program, loop, place)
        rename = {i: tables[s] for i in stage.inputs if isinstance(s := call.source(i), str) and s in tables}
        for i in stage.inputs:
            if isinstance(c := call.source(i), Cat):
                rename[i] = Cat(c.dim, tuple(str(tables.get(n, n)) for n in c.names))
        call = replace(call, rename=call.rename | rename)
        sources = {s for i in stage.inputs for s in call.sources(i)}
        each = {i for i in stage.inputs if isinstance(s := call.source(i), str) and s.startswith("step.")}
        same = all(s not in written or s in fixed for s in sources) and not any(s.startswith("step.") for s in sources)
        table = not same and len(each) == len(stage.inputs) and works_along(stage, 0)
        if why and (same or table):
            report.skip(call.stage, why)
            body.append(call)
        elif same:
            before.append(call)
            fixed |= {call.target(o) for o in stage.outputs}
            report.did(f"{call.stage}: called once before the loop, which changes nothing of what this call reads")
        elif table:
            rows = {i: table_of(str(call.source(i))) for i in stage.inputs}
            before.append(Call(call.stage, rows, {o: f"steps.{call.target(o)}" for o in stage.outputs}))  # type: ignore[arg-type]
            tables |= {call.target(o): f"step.{call.target(o)}" for o in stage.outputs}
            report.did(f"{call.stage}: called once for all trips, before the loop; the loop reads a table")
        else:
            split = split_stage(stage, each, call.stage, "steps") if each else None
            if split is None:
                report.skip(call.stage, "every product in it depends on what the loop changes")
            elif times[call.stage] > 1:
                report.skip(call.stage, "called elsewhere too: a second copy would hold its weights twice")
            elif not works_along(split[0], 0):
                report.skip(call.stage, "what depends on the trip alone is not made sample by sample")
            else:
                once, program.stages[call.stage], values = split
                program.stages[f"{call.stage}.steps"] = once
                rows = {i: table_of(str(call.source(i))) for i in once.inputs}
                before.append(Call(f"{call.stage}.steps", rows, {v: f"steps.{v}" for v in values}))  # type: ignore[arg-type]
                inputs = program.stages[call.stage].inputs
                kept = {k: v for k, v in call.rename.items() if k in inputs or k in stage.outputs}
                call = replace(call, rename=kept | {v: f"step.{v}" for v in values})
                report.did(f"{call.stage}: {len(values)} values that depend on the trip alone become tables")
            body.append(call)
    return before, replace(loop, body=tuple(body))
