"""Plans fitted to a program, kept in it, and found under a budget of drift."""

import numpy as np
import painting_toy as toy
import pytest
import torch
from mmopt.passes.reduce_flow_steps import ReduceFlowSteps

from mmopt.flow_frontier import Drift
from mmopt.flow_schedule import fit_flow_schedule, reduce_to_budget
from mmopt.painting import choose_plan
from mmopt.pipeline import default_passes, optimize

PROMPTS = [[1, 5, 6, 7, 3], [1, 9, 8, 7, 3]]


@pytest.fixture(scope="module")
def program():
    return optimize(toy.program(), check=False).program


def test_a_fitted_plan_goes_along_with_the_program(program):
    fit = fit_flow_schedule(program, PROMPTS, 4, samples=12, fine=60)
    assert fit.plan.evaluations == 4
    assert fit.errors["fitted"]["held_out"]["mean"] > 0
    assert fit.wins == (fit.errors["fitted"]["held_out"]["mean"] < fit.errors["ab2"]["held_out"]["mean"])
    after, report = ReduceFlowSteps(fit.plan, [fit.plan])(program)
    assert report.rewrites[0].startswith("painting: 4 evaluations, 8 passes")
    assert choose_plan("fitted", 4, None, after.info) == fit.plan == choose_plan(None, None, None, after.info)
    with pytest.raises(ValueError, match="no plan was fitted for 5 steps at guidance 2; there is 4 steps"):
        choose_plan("fitted", 5, None, after.info)
    _, report = ReduceFlowSteps(fit.plan, [fit.plan])(after)
    assert not report.rewrites
    assert "plan" not in program.info["flow"]  # the program before is as it was
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32))
    painted = after.paint(PROMPTS[:1], noise)
    assert len(painted["trajectory"]) == 4


def test_the_drift_of_fewer_steps_is_measured():
    result = optimize(toy.program(), [*default_passes(), ReduceFlowSteps()])
    assert result.reports[-1].contract == "approximate"
    assert "of the latents' norm from 60 steps of AB2" in result.reports[-1].checked


def test_the_cheapest_plan_within_a_budget(program):
    loose, rows = reduce_to_budget(program, PROMPTS, Drift(mean=0.5), steps=(2, 4, 8), samples=8, fine=60)
    tight, more = reduce_to_budget(program, PROMPTS, Drift(mean=2e-3), steps=(2, 4, 8, 16), samples=8, fine=60)
    assert loose.met
    assert loose.row.passes == 4
    assert len(rows) < len(more)
    assert tight.row.passes > loose.row.passes
    never, _ = reduce_to_budget(program, PROMPTS, Drift(mean=1e-9), steps=(2, 4), samples=8, fine=60)
    assert not never.met
    assert "none of 4 plans keeps drift mean 1e-09" in never.reason


def test_optimize_takes_a_budget():
    result = optimize(toy.program(), check=False, budget=Drift(mean=0.02), prompts=PROMPTS)
    assert result.reports[-1].name == "reduce_flow_steps"
    assert "keeps drift mean 0.02" in result.reports[-1].checked
    assert result.program.info["flow"]["plan"]["times"]
