"""What passes ask about the loops of a painting schedule."""

from __future__ import annotations

from mmopt.program import Call, Cat, Loop, Program
from mmopt.schedule import calls_of


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
    others = [c for c in calls_of(program.painting) if c not in body]
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
