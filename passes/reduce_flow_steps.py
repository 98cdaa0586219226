"""x_1 = x_0 + integral of v = a x_0 + sum b_j v(x_j, t_j): fewer evaluations of the velocity, put together better.

The loop over steps stays as it is; its table of times and coefficients is replaced (`mmopt.spec.solvers`), and the
plans that were fitted to the model go along with the Program into its engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmopt.flow.reference import relative_errors
from mmopt.flow.velocity import ProgramVelocity
from mmopt.ir.program import Program
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.spec.flow_plan import FlowPlan, solve
from mmopt.spec.flow_sampler import plan_of
from mmopt.spec.solvers import make_plan

FINE, SAMPLES = 60, 4  # evaluations of the reference, and images, that the drift is measured with


class ReduceFlowSteps(Pass):
    """`plan` is the one to paint by when nothing else is asked for; None takes the first of `fitted`, else AB2.

    fitted: plans to keep in the Program, each taken when its number of steps and its guidance are asked for.
    """

    contract = "approximate"

    def __init__(self, plan: FlowPlan | None = None, fitted: Sequence[FlowPlan] = ()):
        self.plan, self.fitted = plan or (fitted[0] if fitted else None), list(fitted)

    def run(self, program: Program, report: Report) -> Program:
        if not program.schedules.image:
            report.skip("program", "it has no loop over the steps of a flow")
            return program
        made, flow = program.copy(), program.info.flow
        assert flow is not None
        before, after = plan_of(None, program.info), self.plan or make_plan("ab2", 10, guidance=flow.guidance)
        kept = [p for p in flow.plans if not any(same_use(p, f) for f in self.fitted)]
        plans = (*kept, *self.fitted)
        if after == before and plans == flow.plans:
            report.skip("painting", f"its steps are those of {after.name} already")
            return program
        made.info = replace(made.info, flow=replace(flow, plan=after, plans=plans))
        report.did(
            f"painting: {after.evaluations} evaluations, {after.forwards} passes, by {after.name}; "
            f"before {before.evaluations}, {before.forwards}, by {before.name}"
        )
        return made

    def drift(self, before: Program, after: Program) -> str:
        """How far each plan's latents are from those of many small steps, over a few random prompts and noises."""
        random, info = np.random.default_rng(0), before.info
        prompts = [random.integers(0, info.vocab_size, 8).tolist() for _ in range(SAMPLES)]
        noise = random.standard_normal((SAMPLES, *info.required_flow.latents)).astype(np.float32)
        velocity = ProgramVelocity(before, prompts)
        plans = [plan_of(None, p.info) for p in (before, after)]
        fine = make_plan("ab2", FINE, guidance=plans[1].guidance)
        wanted, *found = (solve(p, velocity, noise)[-1] for p in (fine, *plans))
        errors = [relative_errors(x, wanted).mean() for x in found]
        return f"{errors[1]:.3g} of the latents' norm from {FINE} steps of AB2; before {errors[0]:.3g}"


def same_use(a: FlowPlan, b: FlowPlan) -> bool:
    return a.evaluations == b.evaluations and a.guidance == b.guidance
