"""Plans fitted to a program, kept in it, and found under a budget of drift."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import painting_toy as toy
import pytest
import torch
from typer.testing import CliRunner

import mmopt
from mmopt.cli import app
from mmopt.exporters.onnx import export
from mmopt.flow import fit_program as flow_schedule
from mmopt.flow.fit_program import fit_flow_plan, ids_of, reduce_to_budget
from mmopt.flow.frontier import DriftBudget
from mmopt.flow.polish import Polished
from mmopt.frontend.load import load
from mmopt.frontend.trace import trace
from mmopt.passes.reduce_flow_steps import ReduceFlowSteps
from mmopt.pipeline import default_passes
from mmopt.runtime.engine import Engine
from mmopt.search.flow_budget import keep_fits
from mmopt.search.optimize import optimize
from mmopt.search.plan import apply_plan, read_plan
from mmopt.spec.flow_sampler import choose_plan
from mmopt.spec.solvers import make_plan

PROMPTS = [[1, 5, 6, 7, 3], [1, 9, 8, 7, 3]]


@pytest.fixture(scope="module")
def program():
    return optimize(toy.program(), check=False).program


def test_a_fitted_plan_goes_along_with_the_program(program):
    fit = fit_flow_plan(program, PROMPTS, 4, samples=12, fine=60)
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
    assert program.info.flow.plan is None  # the program before is as it was
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32))
    painted = after.generate_images(PROMPTS[:1], noise)
    assert len(painted["trajectory"]) == 4


def test_forms_of_prompts_are_held_out_by_name(program, monkeypatch):
    asked, fit_plan = {}, flow_schedule.fit_plan

    def spy(velocity, noises, steps, *rest, **options):
        asked.update(options, prompts=[g.count for g in velocity.groups], n=len(noises))
        return fit_plan(velocity, noises, steps, *rest, **options)

    monkeypatch.setattr(flow_schedule, "fit_plan", spy)
    others = {"long": PROMPTS, "short": [[1, 3]]}
    fit = fit_flow_plan(program, PROMPTS, 3, samples=4, fine=40, held_out=others, form="long")
    assert (asked["n"], asked["forms"]) == (12, ["long"] * 8 + ["short"] * 4)
    assert asked["held_out"] == [False] * 4 + [True] * 8
    assert {"form long", "form short"} < set(fit.errors["fitted"])
    wins = all(fit.errors["fitted"][f]["mean"] < fit.errors["ab2"][f]["mean"] for f in ("form long", "form short"))
    assert fit.wins == (wins and fit.errors["fitted"]["held_out"]["mean"] < fit.errors["ab2"]["held_out"]["mean"])
    said = str(fit).splitlines()
    assert said[0].endswith(fit.reason)
    assert f"held out less train {fit.gap:+.4f}" in said[1]
    assert f"form short {fit.errors['fitted']['form short']['mean']:.4f}" in said[1]


@pytest.mark.parametrize(("solver", "steps", "wins"), [("ab2", 40, True), ("euler", 4, False)])
def test_a_polished_plan_is_taken_where_it_wins_on_noises_held_out(program, monkeypatch, solver, steps, wins):
    given = {}

    def polish(velocity, plan, noises, targets, held_out, iterations):
        given.update(plan=plan, noises=noises, targets=targets, held_out=held_out, iterations=iterations)
        again = velocity(noises, torch.tensor(0.0))[0]
        given["gradient"] = again.requires_grad or velocity(noises.requires_grad_(), torch.tensor(0.0))[0].requires_grad
        return Polished(make_plan(solver, steps), (0, 0), (0, 0))

    monkeypatch.setattr(flow_schedule, "polish_plan", polish)
    plain = fit_flow_plan(program, PROMPTS, 4, samples=8, fine=60)
    fit = fit_flow_plan(program, PROMPTS, 4, samples=8, fine=60, polish=7)
    assert (given["iterations"], given["held_out"].tolist()) == (7, [False] * 6 + [True] * 2)
    assert given["noises"].shape == given["targets"].shape == (8, 2, 8, 8)
    assert given["gradient"]
    assert given["plan"] == plain.fitted == fit.fitted
    assert plain.errors.items() <= fit.errors.items()
    assert fit.plan == (make_plan(solver, steps) if wins else plain.plan)
    ours, least = fit.errors["polished"]["held_out"]["mean"], plain.errors["fitted"]["held_out"]["mean"]
    assert wins == (ours < least)
    assert (f"polished {ours:.4g} does not win" in fit.reason) != wins


def test_a_plan_is_polished_through_the_network(program):
    fit = fit_flow_plan(program, PROMPTS, 2, samples=4, fine=40, polish=10)
    assert fit.errors["polished"]["train"]["mean"] < 1.05 * fit.errors["fitted"]["train"]["mean"]
    assert fit.plan.evaluations == 2


def test_the_drift_of_fewer_steps_is_measured():
    result = optimize(toy.program(), [*default_passes(), ReduceFlowSteps()])
    assert result.reports[-1].contract == "approximate"
    assert "of the latents' norm from 60 steps of AB2" in result.reports[-1].checked


def test_the_cheapest_plan_within_a_budget(program):
    loose, rows = reduce_to_budget(program, PROMPTS, DriftBudget(mean=0.5), steps=(2, 4, 8), samples=8, fine=60)
    tight, more = reduce_to_budget(program, PROMPTS, DriftBudget(mean=2e-3), steps=(2, 4, 8, 16), samples=8, fine=60)
    assert loose.met
    assert loose.row.forwards == 4
    assert len(rows) < len(more)
    assert tight.row.forwards > loose.row.forwards
    never, _ = reduce_to_budget(program, PROMPTS, DriftBudget(mean=1e-9), steps=(2, 4), samples=8, fine=60)
    assert not never.met
    assert "none of 4 plans keeps drift mean 1e-09" in never.reason


def test_optimize_takes_a_budget():
    result = optimize(toy.program(), check=False, budget=DriftBudget(mean=0.02), prompts=PROMPTS)
    assert result.reports[-1].name == "reduce_flow_steps"
    assert "keeps drift mean 0.02" in result.reports[-1].checked
    assert result.program.info.flow.plan.times.tolist()
    again = apply_plan(toy.program(), result.program.info.plan, check=False).program
    assert again.info.flow == result.program.info.flow


def test_a_budget_on_the_command_line(tmp_path, monkeypatch):
    texts, plan = tmp_path / "prompts.txt", tmp_path / "plan.json"
    texts.write_text("a cat\n\n a dog\n")
    found, asked = flow_schedule.reduce_to_budget, []

    def quick(program, prompts, budget):
        asked.append((prompts, budget))
        return found(program, PROMPTS, budget, steps=[4], samples=4, fine=40)

    monkeypatch.setattr("mmopt.search.flow_budget.reduce_to_budget", quick)
    monkeypatch.setattr(mmopt, "trace", lambda model, *sizes, **options: toy.program())
    given = ["optimize", "--config", "janusflow-tiny", "--no-check", "--drift", "0.5", "--prompts", str(texts)]
    said = CliRunner().invoke(app, [*given, "--plan-out", str(plan)])
    assert said.exit_code == 0, said.output
    assert asked == [(["a cat", "a dog"], DriftBudget(mean=0.5))]
    assert [s["name"] for s in read_plan(plan)["passes"]] == ["reduce_flow_steps"]


# --------------------------------------------------------------------------------------------------------------- texts
@pytest.fixture(scope="module")
def digits():
    model = load(Path(__file__).parents[2] / "examples/checkpoints/janusflow-digits")
    return optimize(trace(model, context=64), check=False).program


def test_texts_are_read_as_an_engine_reads_them(digits, tmp_path):
    engine = Engine(export(digits, tmp_path / "engine", check=False))
    texts = ["a red 7 on blue", "a green 3"]
    assert ids_of(digits, [*texts, [1, 2]]) == [*(engine._image_prompt_ids(t) for t in texts), [1, 2]]
    without = digits.copy()
    without.source = replace(without.source, directory=str(tmp_path))
    assert ids_of(without, [[1, 2]]) == [[1, 2]]
    with pytest.raises(ValueError, match="no such file, so prompts must be lists of ids"):
        ids_of(without, texts)
    with pytest.raises(ValueError, match="prompts is one text"):
        ids_of(digits, texts[0])


def test_plans_fitted_to_a_file_go_along(digits, tmp_path, monkeypatch):
    texts, asked = tmp_path / "captions.txt", []
    fit = flow_schedule.fit_flow_plan

    def quick(program, prompts, nfe, **options):
        asked.append((prompts, nfe, options.pop("held_out"), options))
        return fit(program, prompts, nfe, samples=4, fine=20, **options)

    monkeypatch.setattr("mmopt.search.flow_budget.fit_flow_plan", quick)
    texts.write_text("a red 7 on blue\n\na green 3 on red\n a blue 1 on red \n")
    made, report = keep_fits(digits, texts, [3, 2])
    wanted = ["a red 7 on blue", "a blue 1 on red"], ["a green 3 on red"], {"form": "captions", "polish": 0}
    assert asked == [(wanted[0], n, *wanted[1:]) for n in (3, 2)]
    assert [choose_plan(None, n, None, made.info).evaluations for n in (3, 2)] == [3, 2]
    assert choose_plan(None, None, None, made.info).evaluations == 3
    assert report.checked.startswith("drift: 0.")
    assert sum("held out less train" in line for line in report.rewrites) == 2
    for text, message in (("", "holds no prompts"), (None, "not a readable text file")):
        texts.unlink() if text is None else texts.write_text(text)
        with pytest.raises(ValueError, match=f"captions.txt: {message}"):
            keep_fits(digits, texts, [3])
    with pytest.raises(ValueError, match="plans are fitted to programs that paint"):
        keep_fits(dataclasses.replace(digits, schedules=digits.schedules.replaced(image=())), texts, [3])
