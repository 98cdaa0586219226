"""What passes ask about the loops of a image schedule."""

from __future__ import annotations

from torch.fx import Node

from mmopt.ir.attention_args import CachedAttention
from mmopt.ir.graph import CACHED_ATTENTION, CAT
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.spec.schedule import Call, Cat, Loop


def why_not_local(program: Program, loop: Loop, place: int, whole: bool = False) -> str | None:
    """None if later calls of the same trip alone read what call number `place` of a loop writes.

    Then the call may run elsewhere or on other samples. whole: they must not read it as a part of something.
    """

    def reads(calls: list[Call]) -> set[str]:
        return {s for c in calls for i in program.stages[c.stage].inputs for s in c.sources(i)}

    def writes(calls: list[Call]) -> set[str]:
        return {c.target(o) for c in calls for o in program.stages[c.stage].outputs}

    body = list(loop.body)
    call, before, after = body[place], body[:place], body[place + 1 :]
    made = writes([call])
    others = [c for c in program.schedules.image.calls() if c not in body]
    if found := made & writes(before + after):
        return f"{min(found)} is written by another call of the loop too"
    if found := made & (reads(before) | reads([call])):
        return f"{min(found)} is carried from trip to trip"
    if found := made & (reads(others) | set(loop.update or ())):
        return f"{min(found)} is read outside the loop"
    sources = [c.source(i) for c in after for i in program.stages[c.stage].inputs]
    parts = {n for s in sources if isinstance(s, Cat) for n in s.names}
    if whole and (found := made & parts):
        return f"{min(found)} is read as a part of something"
    return None


def row_inputs(stage: Stage) -> tuple[str, str] | str:
    """The two inputs whose rows a stage with a cache works on, one after the other; or why there are none.

    The stage must carry all that rows see of earlier rows: its attention reads and writes caches, of which `past` slots
    are filled.
    """
    attention = [CachedAttention.of(n) for n in stage.graph.nodes if n.target is CACHED_ATTENTION]
    if not attention or "past" not in stage.inputs or "past" not in stage.outputs:
        return "it keeps no rows in a cache"
    names = {n: i for i, n in stage.input_nodes().items()}
    carried = {names.get(a) for n in attention for a in (n.key_cache, n.value_cache)}
    if not carried <= set(stage.outputs):
        return "not all of its caches are carried"
    for n in stage.graph.nodes:
        if n.target is CAT and n.args[1] == 1 and all(isinstance(a, Node) and a in names for a in n.args[0]):
            found = [names[a] for a in n.args[0]]
            if len(found) == 2:
                return found[0], found[1]
    return "its rows are not two inputs, one after the other"
