"""Fitting a solver's table on flows that are known: it wins where it can and gives way where it cannot."""

import json
import math

import numpy as np
import pytest
import torch
from flow_toys import Mixture, smooth

from mmopt.flow.fit import fit_plan
from mmopt.flow.polish import polish_plan
from mmopt.flow.reference import Reference, reference, relative_errors
from mmopt.spec.flow_plan import FlowPlan, solve
from mmopt.spec.solvers import make_plan

FIELDS = {"mixture": Mixture(96), "smooth": smooth}


@pytest.fixture(scope="module")
def fine():
    noises = Mixture(96).noises()
    return {k: reference(f, noises, 2.0, 400) for k, f in FIELDS.items()}


def noises():
    return Mixture(96).noises()


def test_a_reference_converges():
    exact = reference(smooth, noises(), 2.0, 1600).result
    errors = [relative_errors(reference(smooth, noises(), 2.0, n).result, exact).mean() for n in (100, 200)]
    assert 3.2 < errors[0] / errors[1] < 4.8


def test_a_reference_is_read_at_any_time():
    exact = reference(smooth, noises(), 2.0, 1600)

    def sparse(every):
        return Reference(exact.times[::every], exact.states[::every], exact.velocities[::every])

    for k in (0, 80, 800, 1600):
        np.testing.assert_array_equal(sparse(80).at(k / 1600), exact.states[k])
    assert exact.result.dtype == sparse(80).at(0.123).dtype == np.float32

    def error(every, part):
        """In the middle, and a third on, of an interval at or near a part of the time."""
        start = int(part * 1600) // every * every
        places = [start + every // 2, start + every // 3]
        return max(relative_errors(sparse(every).at(k / 1600), exact.states[k]).mean() for k in places)

    for part in (0.0, 0.3, 0.75):
        assert error(320, part) / error(160, part) > 10  # order 4
    assert error(160, 0.9) / error(80, 0.95) > 6  # without the velocity at the end: order 3


def test_a_reference_is_the_same_as_its_plan():
    states = solve(make_plan("ab2", 40, 2.0), smooth, noises())
    np.testing.assert_allclose(reference(smooth, noises(), 2.0, 40).result, states[-1], atol=2e-5)


@pytest.mark.parametrize("steps", [4, 6, 10])
@pytest.mark.parametrize("name", FIELDS)
def test_a_fit_beats_adams_bashforth_and_euler_on_samples_held_out(name, steps, fine):
    result = fit_plan(FIELDS[name], noises(), steps, 2.0, truth=fine[name], model="toy", form="any")
    held = {k: v["held_out"]["mean"] for k, v in result.errors.items()}
    assert held["fitted"] < 0.8 * held["ab2"] < held["euler"]
    assert result.wins
    assert result.plan is result.fitted
    assert result.plan.sum_abs < 4
    assert (result.plan.evaluations, result.plan.forwards) == (steps, 2 * steps)
    assert result.key == {"model": "toy", "steps": steps, "guidance": 2.0, "form": "any"}
    assert result.evaluations == 96 * 3 * steps
    assert result.gap == result.errors["fitted"]["held_out"]["mean"] - result.errors["fitted"]["train"]["mean"]
    # the plan as it is run gives what was measured, on the samples that it was not fitted to
    again = relative_errors(solve(result.plan, FIELDS[name], noises())[-1], fine[name].result)[-38:]
    assert again.mean() == pytest.approx(held["fitted"], rel=1e-3)
    assert FlowPlan.from_json(json.loads(json.dumps(result.to_json()))["plan"]) == result.plan


def test_samples_held_out_do_not_touch_the_fit():
    start = noises()
    other = start.copy()
    other[-38:] *= 1.5
    plans = [fit_plan(smooth, x, 5, 2.0, trials=3).fitted for x in (start, other)]
    assert plans[0] == plans[1]


def test_more_samples_are_asked_for_what_a_fit_costs():
    calls = []

    def noted(x, t, guided):
        calls.append(len(x))
        return smooth(x, t, guided)

    result = fit_plan(noted, noises(), 4, 2.0, truth=50, trials=5)
    assert result.evaluations == sum(calls) == 96 * (50 + 5 * 4 + 2 * 4)


def test_the_search_of_times_helps_and_names_its_grid(fine):
    plain = fit_plan(FIELDS["mixture"], noises(), 4, 2.0, truth=fine["mixture"])
    tried = fit_plan(FIELDS["mixture"], noises(), 4, 2.0, truth=fine["mixture"], trials=12)
    assert plain.grid == (1.0, 1.0)
    assert plain.plan.times.tolist() == [0, 0.25, 0.5, 0.75]
    assert tried.grid != (1.0, 1.0)
    assert tried.errors["fitted"]["held_out"]["mean"] < 0.8 * plain.errors["fitted"]["held_out"]["mean"]


def test_robust_weights_beat_plain_ones_where_paths_part():
    means = []
    for eps in (0.03, math.inf):
        found = []
        for seed in range(4):
            toy = Mixture(96, seed=seed)
            x = toy.noises(seed + 10)
            result = fit_plan(toy, x, 4, 2.0, truth=200, robust=(eps,))
            found.append(result.errors["fitted"]["held_out"]["mean"])
        means.append(np.mean(found))
    assert means[0] < 0.8 * means[1]


@pytest.mark.parametrize(("steps", "every"), [(8, 2), (9, 3)])
def test_unconditional_passes_at_some_evaluations(steps, every, fine):
    asked = []

    def noted(x, t, guided):
        asked.append(guided)
        return smooth(x, t, guided)

    made = np.arange(steps) % every == 0
    result = fit_plan(noted, noises(), steps, 2.0, truth=fine["smooth"], unconditional=made)
    assert asked[:steps] == made.tolist()
    assert result.fitted.guided.tolist() == made.tolist()
    assert result.fitted.forwards == steps + made.sum()
    assert result.wins
    held = {k: v["held_out"]["mean"] for k, v in result.errors.items()}
    assert held["fitted"] < 0.5 * held["ab2"]
    # the baseline has as many passes at most, all of them guided
    base = solve(make_plan("ab2", result.fitted.forwards // 2, 2.0), smooth, noises())[-1]
    assert relative_errors(base, fine["smooth"].result)[-38:].mean() == pytest.approx(held["ab2"])
    # and the fit is better than holding the difference of the two passes
    kept, cond, uncond = make_plan("ab2", steps, 2.0), np.zeros((steps, steps)), np.zeros((steps, steps))
    for j in range(steps):
        b = kept.cond[:, j] + kept.uncond[:, j]
        cond[:, j] += b
        cond[:, j - j % every] += b
        uncond[:, j - j % every] -= b
    held_difference = FlowPlan("held", kept.times, kept.a, cond, uncond, made, 2.0)
    start = fit_plan(smooth, noises(), steps, 2.0, truth=fine["smooth"], unconditional=made, ridges=()).fitted
    np.testing.assert_allclose(start.cond, cond, atol=1e-12)  # where the fit starts from
    np.testing.assert_allclose(start.uncond, uncond, atol=1e-12)
    lagged = solve(held_difference, smooth, noises())[-1]
    assert held["fitted"] < 0.5 * relative_errors(lagged, fine["smooth"].result)[-38:].mean()


def test_without_guidance_there_is_one_pass_an_evaluation():
    result = fit_plan(smooth, noises(), 5, 1.0)
    assert result.wins
    assert result.plan.forwards == 5
    assert not result.plan.uncond.any()


def test_a_fit_gives_way_where_straight_paths_leave_nothing_to_gain():
    target = noises()[::-1] * 0.5

    def straight(x, t, guided):
        return (target - x) / np.float32(1 - t), (target - x) / np.float32(1 - t)

    result = fit_plan(straight, noises(), 5, 2.0)
    assert not result.wins
    assert result.plan == make_plan("ab2", 5, 2.0)
    assert "ab2 is exact at 10 passes" in result.reason


@pytest.mark.parametrize(
    ("steps", "pull", "beats", "drift", "blamed"),
    [(6, 2.5, 6.0, 1.0, "held_out"), (8, 1.0, 0.0, 0.5, "form short")],
    ids=["on-the-whole", "for-one-form"],
)
def test_a_fit_gives_way_where_a_form_of_prompt_is_worse_off(steps, pull, beats, drift, blamed):
    """It is fitted on one field; among the samples held out there are some of another."""
    form = np.array(["full"] * 64 + ["short"] * 32)
    held = np.arange(96) >= 40

    def both(x, t, guided):
        other = -pull * x * np.cos(beats * t) + drift * np.roll(x, -1, 1)
        short = form[:, None] == "short"
        return tuple(np.where(short, other, v).astype(np.float32) for v in smooth(x, t, True))

    result = fit_plan(both, noises(), steps, 2.0, held_out=held, forms=form)
    found = {k: {f: x["mean"] for f, x in v.items()} for k, v in result.errors.items()}
    assert found["fitted"]["form full"] < 0.1 * found["ab2"]["form full"]
    assert found["fitted"]["form short"] > 1.5 * found["ab2"]["form short"]
    assert (found["fitted"]["held_out"] < found["ab2"]["held_out"]) == (blamed != "held_out")
    assert not result.wins
    assert result.plan == make_plan("ab2", steps, 2.0)
    assert result.reason.startswith(f"{blamed}: error")
    assert result.reason.endswith("ab2 is taken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0.99}, "expected at least 4 and 2"),
        ({"held_out": 0.0}, "expected at least 4 and 2"),
        ({"held_out": [True, False]}, "held_out has shape"),
        ({"forms": ["a"]}, "forms has 1 entries"),
        ({"unconditional": [False, True, True]}, "the first one true"),
        ({"unconditional": [True]}, "expected 3 values"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"truth": reference(smooth, np.ones((3, 16), np.float32), 2.0, 4)}, "expected those of the noises"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit_plan(smooth, noises(), **({"steps": 3} | options))


def torch_smooth(x, t, guided):
    cond = torch.tanh(torch.roll(x, 1, 1) * (0.5 + t)) - x * torch.cos(3 * t) + 0.3 * t
    return cond, 0.7 * cond + 0.2 * torch.sin(torch.roll(x, 1, 1) + t)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_polish_a_plan_and_keep_the_better_one(recompute, fine):
    start, held = noises(), np.arange(96) >= 60
    plan = make_plan("ab2", 4, 2.0)
    given = [torch.from_numpy(x) for x in (start, fine["smooth"].result)]
    made = polish_plan(torch_smooth, plan, *given, held, iterations=60, recompute=recompute)
    assert made.after[1] < 0.6 * made.before[1]
    errors = relative_errors(solve(made.plan, smooth, start)[-1], fine["smooth"].result)
    assert errors[held].mean() == pytest.approx(made.after[1], rel=1e-3)
    base = relative_errors(solve(plan, smooth, start)[-1], fine["smooth"].result)
    assert base[held].mean() == pytest.approx(made.before[1], rel=1e-3)
    assert made.plan.name == "ab2, polished"
    assert made.plan.times[0] == 0
    spoilt = polish_plan(torch_smooth, made.plan, *given, held, iterations=10, rate=1.0)
    assert spoilt.plan is made.plan
    assert spoilt.after == spoilt.before


def test_polish_refuses_plans_without_some_passes():
    made = np.array([True, False])
    b = np.array([[0.5, 0], [0.5, 0.5]])
    plan = FlowPlan("mine", [0, 0.5], np.ones(2), 2 * b, -b * made, made, 2.0)
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="leaves unconditional passes out"):
        polish_plan(torch_smooth, plan, x, x, [True, False, False, False])
    with pytest.raises(ValueError, match="asks twice at one time"):
        polish_plan(torch_smooth, make_plan("heun", 4), x, x, [True, False, False, False])
    with pytest.raises(ValueError, match="expected some of 4"):
        polish_plan(torch_smooth, make_plan("ab2", 4), x, x, [False] * 4)
