"""Flow plans under a budget of drift, and plans fitted to a file of captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmopt.flow.fit_program import fit_flow_plan, read_prompts, reduce_to_budget
from mmopt.flow.frontier import DriftBudget, frontier_text
from mmopt.ir.program import Program
from mmopt.passes.reduce_flow_steps import ReduceFlowSteps
from mmopt.pipeline import Result
from mmopt.rewrite.pass_base import Report
from mmopt.search.plan import flow_steps, make_plan, with_plan


def keep_fits(
    program: Program, path: Path, steps: Sequence[int], polish: int = 0, tell: Callable[[int], None] = lambda n: None
) -> tuple[Program, Report]:
    """The program with plans fitted to the texts of a file, one in each line; every other one is held out.

    The first of `steps` is the one to paint by when nothing else is asked for. Raises ValueError that names the file.
    """
    if not program.schedules.image:
        raise ValueError(f"plans are fitted to programs that paint; {program.info.family} generates no images")
    prompts = read_prompts(path)
    fits = []
    for n in steps:
        tell(n)
        held = prompts[1::2] or prompts
        fits.append(fit_flow_plan(program, prompts[::2], n, held_out=held, form=path.stem, polish=polish))
    made, report = ReduceFlowSteps(fits[0].plan, [f.plan for f in fits])(program)
    for found in fits:
        report.did(str(found))
    held_out = [(f.plan, f.errors[f.plan.name if f.plan.name in f.errors else "polished"]["held_out"]) for f in fits]
    report.checked = "drift: " + ", ".join(f"{e['mean']:.3g} with {p.evaluations} steps" for p, e in held_out)
    return made, report


def within(result: Result, budget: DriftBudget, prompts: Sequence[str | Sequence[int]]) -> Result:
    """A Program that paints, with the cheapest plan that keeps a budget of drift."""
    if not result.program.schedules.image:
        raise ValueError(
            f"a budget of drift is for programs that paint; {result.program.info.family} generates no images"
        )
    choice, rows = reduce_to_budget(result.program, prompts, budget)
    plan = choice.row.plan
    made, report = ReduceFlowSteps(plan, [plan] if plan.name.startswith("fitted") else [])(result.program)
    report.checked = f"drift: mean {choice.row.mean:.3g}, p90 {choice.row.p90:.3g}; {choice.reason}"
    report.did("what was measured:\n" + frontier_text(rows).rstrip())
    made = with_plan(made, make_plan([flow_steps(made)], budget={"drift": str(budget)}, measured=report.checked))
    return Result(made, [*result.reports, report])
