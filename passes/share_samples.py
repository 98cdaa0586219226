"""f([x | x]) = [f(x) | f(x)]: samples that are alike are computed once.

A call in a loop that reads the same value for several groups of samples, and else nothing that tells them apart, runs
on one group; what it writes is then read once for each group.
"""

from __future__ import annotations

from dataclasses import replace

from mmopt.ir.program import Program
from mmopt.rewrite.loops import why_not_local
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.rewrite.row_parts import works_along
from mmopt.spec.schedule import Call, Cat, Loop


class ShareSamples(Pass):
    def run(self, program: Program, report: Report) -> Program:
        made = program.copy()
        made.schedules = made.schedules.replaced(
            image=tuple(self.share(program, i, report) if isinstance(i, Loop) else i for i in program.schedules.image)
        )
        return made

    def share(self, program: Program, loop: Loop, report: Report) -> Loop:
        alike = {
            c.target(o)
            for i, c in enumerate(loop.body)
            for o in program.stages[c.stage].outputs
            if self.one(program, c) and not why_not_local(program, loop, i)
        }
        body = list(loop.body)
        for i, call in enumerate(body):
            stage = program.stages[call.stage]
            groups = {s for n in stage.inputs if isinstance(s := call.source(n), Cat) and s.dim == 0}
            if not groups:
                continue
            others = {s for n in stage.inputs for s in call.sources(n) if call.source(n) not in groups}
            if any(len(set(g.names)) > 1 for g in groups) or not all(
                s in alike or s.startswith("step.") for s in others
            ):
                report.skip(call.stage, "its samples differ")
                continue
            if not works_along(stage, 0):
                report.skip(call.stage, "it does not work sample by sample")
                continue
            if why := why_not_local(program, loop, i, whole=True):
                report.skip(call.stage, why)
                continue
            times = len(next(iter(groups)).names)
            body[i] = replace(call, rename={k: v.names[0] if v in groups else v for k, v in call.rename.items()})  # type: ignore[union-attr]
            shared = {call.target(o) for o in stage.outputs}
            for j in range(i + 1, len(body)):
                inputs = program.stages[body[j].stage].inputs
                more: dict[str, str | Cat] = {
                    n: Cat(0, (s,) * times) for n in inputs if (s := body[j].source(n)) in shared
                }
                body[j] = replace(body[j], rename=body[j].rename | more)
            report.did(f"{call.stage}: runs on one of {times} groups of samples that are alike")
        if not report.rewrites:
            report.skip("painting", "no call reads the same value for several groups of samples")
        return replace(loop, body=tuple(body))

    def one(self, program: Program, call: Call) -> bool:
        """Whether a call reads nothing but what depends on the trip alone: it then runs on one sample."""
        return all(s.startswith("step.") for n in program.stages[call.stage].inputs for s in call.sources(n))
