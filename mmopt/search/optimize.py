"""optimize(program): the passes, or the cheapest plan of approximate ones that keeps a budget."""

from __future__ import annotations

from collections.abc import Sequence

from mmopt.flow.frontier import DriftBudget
from mmopt.ir.program import Program
from mmopt.pipeline import Observer, Result, run_passes
from mmopt.rewrite.pass_base import Pass
from mmopt.search.budget import QualityBudget, search_quality
from mmopt.search.flow_budget import within


def optimize(
    program: Program,
    passes: Sequence[Pass] | None = None,
    check: bool | None = None,
    observers: Sequence[Observer] = (),
    budget: DriftBudget | QualityBudget | None = None,
    prompts: Sequence[str | Sequence[int]] = (),
) -> Result:
    """Run `passes` (by default the exact ones). The input Program is not changed.

    With a `budget` of drift, a Program that paints then gets the plan of fewest passes that keeps it, measured on
    `prompts` (texts or ids, of the form that will be served); what was measured stands in the report. If no plan keeps
    the budget, the nearest is taken and the report says so. With a budget of quality (`mmopt.QualityBudget`) the
    cheapest compression of visual tokens is searched for that keeps the score on a task; see
    `mmopt.search.budget.search_quality`.

    After each exact pass the Program is compared with the one before it on fresh random inputs at two sizes. `check`
    None does so where it is affordable and says so in the report where it is not. A pass that breaks its promise raises
    ContractError, which names stage, output, node and error and carries the last good Program.
    """
    if budget is not None and not isinstance(budget, DriftBudget):
        return search_quality(program, budget, passes, check, observers, prompts)
    result = run_passes(program, passes, check, observers)
    return result if budget is None else within(result, budget, prompts)
