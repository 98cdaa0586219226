"""optimize(program): run passes in order and hold each to its contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmopt.contracts import BUDGET, ContractError, compare
from mmopt.flow_frontier import Drift
from mmopt.passes.drop_hidden_rows import DropHiddenRows
from mmopt.passes.drop_unread_rows import DropUnreadRows
from mmopt.passes.fold_constants import FoldConstants
from mmopt.passes.fuse_cross_attention import FuseCrossAttention
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.passes.pack_projections import PackProjections
from mmopt.passes.rejoin_rows import RejoinRows
from mmopt.passes.share_samples import ShareSamples
from mmopt.passes.split_calls import SplitCalls
from mmopt.passes.split_rows import SplitRows
from mmopt.program import Program
from mmopt.rewriting import Pass, Report

if TYPE_CHECKING:
    from mmopt.budget import Quality

Observer = Callable[[str, Report | None], None]


def default_passes() -> list[Pass]:
    """The exact passes, in order."""
    return [
        DropUnreadRows(),
        SplitRows(),
        RejoinRows(),
        SplitCalls(),
        ShareSamples(),
        HoistInvariants(),
        DropHiddenRows(),
        FuseCrossAttention(),
        FoldConstants(),
        PackProjections(),
    ]


@dataclass
class Result:
    """An optimized Program and what each pass did; ``print(result)`` shows it."""

    program: Program
    reports: list[Report] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(str(r) for r in self.reports)


def optimize(
    program: Program,
    passes: Sequence[Pass] | None = None,
    check: bool | None = None,
    observers: Sequence[Observer] = (),
    budget: Drift | Quality | None = None,
    prompts: Sequence[str | Sequence[int]] = (),
) -> Result:
    """Run `passes` (by default the exact ones). The input Program is not changed.

    With a `budget` of drift, a Program that paints then gets the plan of fewest passes that keeps it, measured on
    `prompts` (texts or ids, of the form that will be served); what was measured stands in the report. If no plan keeps
    the budget, the nearest is taken and the report says so. With a budget of quality (`mmopt.Quality`) the cheapest
    compression of visual tokens is searched for that keeps the score on a task; see `mmopt.budget.search_quality`.

    After each exact pass the Program is compared with the one before it on fresh random inputs at two sizes. `check`
    None does so where it is affordable and says so in the report where it is not. A pass that breaks its promise raises
    ContractError, which names stage, output, node and error and carries the last good Program.
    """
    if budget is not None and not isinstance(budget, Drift):
        from mmopt.budget import search_quality

        return search_quality(program, budget, passes, check, observers, prompts)
    result = Result(program)
    unchecked = why_unchecked(program) if check is None else (None if check else "checks are off")
    for p in default_passes() if passes is None else passes:
        for tell in observers:
            tell(p.name, None)
        start = time.perf_counter()
        try:
            made, report = p(result.program)
        except ContractError:
            raise
        except Exception as e:
            raise ContractError(f"pass {p.name} failed: {type(e).__name__}: {e}", result.program) from e
        report.seconds = time.perf_counter() - start
        if not report.rewrites:
            report.checked = "nothing to check"
        elif unchecked:
            report.checked = f"not checked: {unchecked}"
        else:
            try:
                drift = p.drift(result.program, made) if p.contract == "approximate" else None
                found = None if drift else compare(result.program, made)
            except Exception as e:
                raise ContractError(f"checking pass {p.name} failed: {type(e).__name__}: {e}", result.program) from e
            if found is not None and p.contract == "exact":
                raise ContractError(f"pass {p.name} promised to be exact: {found}", result.program)
            report.checked = "checked" if found is None else f"drift: {found}"
            if p.contract == "approximate":
                report.checked = f"drift: {drift or found or 'none found'}"
        result = Result(made, [*result.reports, report])
        for tell in observers:
            tell(p.name, report)
    return result if budget is None else within(result, budget, prompts)


def within(result: Result, budget: Drift, prompts: Sequence[str | Sequence[int]]) -> Result:
    """A Program that paints, with the cheapest plan that keeps a budget of drift."""
    from mmopt.flow_frontier import frontier_text
    from mmopt.flow_schedule import reduce_to_budget
    from mmopt.passes.reduce_flow_steps import ReduceFlowSteps
    from mmopt.plans import flow_steps, make_plan, with_plan

    if not result.program.painting:
        raise ValueError(
            f"a budget of drift is for programs that paint; {result.program.info['family']} paints no images"
        )
    choice, rows = reduce_to_budget(result.program, prompts, budget)
    plan = choice.row.plan
    made, report = ReduceFlowSteps(plan, [plan] if plan.name.startswith("fitted") else [])(result.program)
    report.checked = f"drift: mean {choice.row.mean:.3g}, p90 {choice.row.p90:.3g}; {choice.reason}"
    report.did("what was measured:\n" + frontier_text(rows).rstrip())
    made = with_plan(made, make_plan([flow_steps(made)], budget={"drift": str(budget)}, measured=report.checked))
    return Result(made, [*result.reports, report])


def why_unchecked(program: Program) -> str | None:
    """None if comparing Programs is affordable, else the reason why it is left out."""
    if not program.has_weights:
        return "shapes only, no weights"
    values = sum(w.numel() for w in program.weights.values())
    flops = 2.0 * values * 2 * 2 * (3 * program.info["rows_per_image"] + 40)
    if program.painting:  # three steps of one and of three images, in two halves
        flops += 2.0 * values * 2 * 3 * 4 * 2 * program.info["flow"]["rows"]
    if flops > BUDGET:
        return f"about {flops / 1e12:.0f} TFLOP, more than {BUDGET / 1e12:.0f}; ask for it with check=True"
    return None
