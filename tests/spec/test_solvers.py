"""Solvers as tables: against another library's schedulers, their orders, the reference's loop, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmopt.spec.flow_plan import FlowPlan, from_velocity_table, reduce_guidance, solve
from mmopt.spec.solvers import SOLVERS, make_plan, shifted

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "flow_solvers.json").read_text())


def field(x, t):
    return np.tanh(x[..., ::-1] * (0.5 + t)) - x * np.cos(3 * t) + 0.3 * t


def velocity(x, t, guided=True):
    """Two fields whose guided sum at w = 3 is `field`: 3 c - 2 u."""
    other = np.sin(x + t)
    return (field(x, t) + 2 * other) / 3, other if guided else None


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda c: f"{c['solver']}-{len(c['nodes']) - 1}")
def test_recorded_trajectories_of_another_library_are_followed(case):
    noise, solver = np.array(RECORDED["noise"]), case["solver"]
    plan = make_plan(solver, (len(case["nodes"]) - 1) * SOLVERS[solver][0], guidance=3.0, grid=case["nodes"])
    states = solve(plan, velocity, noise)
    # the recorded Heun ends with a step of Euler, which is the first stage of ours: the last recorded state is that
    expected = np.array(case["states"])
    assert len(states) == len(expected) + (solver == "heun")
    # they were computed in float32, but for UniPC
    tolerance = 2e-8 if solver == "unipc" else 5e-7
    np.testing.assert_allclose(states[: len(expected)], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_uniform_euler_is_the_reference_loop(steps):
    plan = make_plan("euler", steps, guidance=3.0)
    assert plan.times.tolist() == [k / steps for k in range(steps)]
    x = noise = np.array(RECORDED["noise"])
    for k in range(steps):
        v_cond, v_uncond = velocity(x, k / steps)
        x = x + (3 * v_cond - 2 * v_uncond) / steps
    np.testing.assert_allclose(solve(plan, velocity, noise)[-1], x, rtol=1e-13)


@pytest.fixture(scope="module")
def exact():
    """By the classical method of order 4, with steps of 1 / 1000."""
    x, h = np.array(RECORDED["noise"]), 1e-3
    for t in np.arange(1000) * h:
        k1 = field(x, t)
        k2 = field(x + h / 2 * k1, t + h / 2)
        k3 = field(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + h * k3, t + h))
    return x


def rate(solver, exact, grid=lambda n: np.linspace(0, 1, n + 1)):
    """The order of convergence between 48 and 96 evaluations on a smooth field."""
    errors = []
    for n in (48, 96):
        plan = make_plan(solver, n, guidance=3.0, grid=grid(n // SOLVERS[solver][0]))
        errors.append(np.abs(solve(plan, velocity, np.array(RECORDED["noise"]))[-1] - exact).max())
    return np.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("solver", "order"),
    [("euler", 1), ("midpoint", 2), ("heun", 2), ("ab2", 2), ("unipc", 2)],
)
def test_order_of_convergence(solver, order, exact):
    assert rate(solver, exact) == pytest.approx(order, abs=0.3)


def test_dpmpp_has_order_two_where_steps_shrink_towards_the_ends(exact):
    def grid(n):
        u = np.linspace(0, 1, n + 1)
        return u * u * (3 - 2 * u)

    assert rate("dpmpp_2m", exact, grid) == pytest.approx(2, abs=0.3)
    assert 1 < rate("dpmpp_2m", exact) < 1.7


def test_ab3_has_order_three_where_its_first_steps_are_small(exact):
    assert rate("ab3", exact, lambda n: shifted(np.linspace(0, 1, n + 1), power=1.7)) == pytest.approx(3, abs=0.35)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", [{}, {"grid": "shifted", "shift": 2.5}], ids=["uniform", "shifted"])
def test_a_constant_velocity_is_integrated_exactly_at_any_grid(solver, grid):
    plan = make_plan(solver, 6, guidance=1.5, **grid)
    states = solve(plan, lambda x, t, guided: (np.full_like(x, 2.0), np.full_like(x, 4.0)), np.zeros((1, 3)))
    ends = [*plan.times[1:], 1.0]
    np.testing.assert_allclose(np.array(states)[:, 0, 0], np.array(ends) * 1.0, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(plan.a, 1.0 if solver not in ("dpmpp_2m", "unipc") else plan.a)
    np.testing.assert_allclose(plan.a, 1, rtol=1e-12)


def test_shifted_times():
    plan = make_plan("ab2", 4, grid="shifted", shift=3.0)
    sigma = 1 - np.arange(4) / 4
    np.testing.assert_allclose(plan.times, 1 - 3 * sigma / (1 + 2 * sigma), rtol=1e-14)
    assert plan.name == "ab2 shift 3"
    np.testing.assert_allclose(shifted(np.array([0, 0.5, 1]), power=2.0), [0, 0.25, 1])


def test_passes_and_sums():
    plan = make_plan("euler", 30, guidance=2.0)
    assert (plan.evaluations, plan.forwards) == (30, 60)
    assert plan.sum_abs == pytest.approx(2)
    alone = make_plan("euler", 30, guidance=1.0)
    assert (alone.evaluations, alone.forwards) == (30, 30)
    assert not alone.uncond.any()
    assert make_plan("ab2", 8, guidance=5.0).sum_abs == pytest.approx(make_plan("ab2", 8, guidance=1.0).sum_abs)


def test_unguided_evaluations_leave_out_their_pass():
    guided = np.array([True, False, True])
    b = np.tril(np.ones((3, 3))) / 3
    plan = FlowPlan("mine", [0, 0.3, 0.6], np.ones(3), 2 * b, -b * guided, guided, 2.0)
    asked = []

    def noted(x, t, guided):
        asked.append(guided)
        return velocity(x, t, guided)

    solve(plan, noted, np.zeros((1, 4)))
    assert asked == [True, False, True]
    assert plan.forwards == 5
    with pytest.raises(ValueError, match="leaves out"):
        FlowPlan("mine", [0, 0.3, 0.6], np.ones(3), 2 * b, -b, guided, 2.0)


def test_steps_keep_float32_in_numpy_and_torch():
    plan = make_plan("ab2", 3, guidance=2.0)
    rng = np.random.default_rng(0)
    x0, *v = rng.standard_normal((7, 2, 4, 3, 3)).astype(np.float32)
    ours = plan.step(2, x0, v[:3], v[3:])
    theirs = plan.step(
        2, torch.from_numpy(x0), [torch.from_numpy(x) for x in v[:3]], [torch.from_numpy(x) for x in v[3:]]
    )
    assert ours.dtype == np.float32
    assert theirs.dtype == torch.float32
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    expected = x0.astype(np.float64)
    for j in range(3):
        expected = expected + plan.cond[2, j] * v[j] + plan.uncond[2, j] * v[3 + j]
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_a_plan_is_written_and_read(tmp_path):
    plan = make_plan("unipc", 5, guidance=2.5)
    plan.save(tmp_path / "plan.json")
    again = FlowPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again != make_plan("unipc", 5, guidance=2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(ValueError, match="read-only"):
        plan.times[0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "expected an object of schema 2, found 1"),
        ({"times": None}, "times"),
        ({"times": []}, "at least one evaluation"),
        ({"times": [0, 0.5]}, "a has shape|shape"),
        ({"times": [0.5, 0.2, 0.7]}, "must rise"),
        ({"times": [0.5, 0.7, 1.2]}, "must rise"),
        ({"a": [1, 1, "x"]}, "a is not an array of numbers"),
        ({"a": [1, 1, float("nan")]}, "not finite"),
        ({"cond": np.ones((3, 3)).tolist()}, "before they are known"),
        ({"cond": [[1], [1, 2]]}, "cond"),
        ({"guided": [True, False, True]}, "leaves out"),
        ({"guidance": "two"}, "guidance is 'two'"),
        ({"name": 3}, "its name is 3"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, change, message):
    data = make_plan("ab2", 3).to_json() | change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"plan\.json.*({message})"):
        FlowPlan.load(tmp_path / "plan.json")


def test_a_file_that_lacks_something_or_is_no_json_is_refused(tmp_path):
    data = make_plan("ab2", 3).to_json()
    del data["uncond"]
    with pytest.raises(ValueError, match="lacks uncond"):
        FlowPlan.from_json(data)
    with pytest.raises(ValueError, match="found 'list'"):
        FlowPlan.from_json([data])
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json"):
        FlowPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk9"}, "'rk9' is not known; there are euler"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"solver": "heun", "steps": 5}, "expected an even number"),
        ({"solver": "midpoint", "steps": 1}, "expected an even number"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": None}, "guidance is None"),
        ({"grid": "cosine"}, "grid 'cosine' is not known"),
        ({"grid": "shifted", "shift": 0}, "above 0"),
        ({"shift": 3.0}, "use grid='shifted'"),
        ({"steps": 2, "grid": [0, 1]}, "expected 3 times"),
        ({"steps": 2, "grid": [0, 0.5, 0.9]}, "to 1 exactly"),
        ({"steps": 2, "grid": [0, 0, 1]}, "must rise"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**options)


def test_a_velocity_table_is_spread_over_both_passes():
    b = np.array([[0.5, 0], [0.2, 0.8]])
    plan = from_velocity_table("mine", [0, 0.5], np.ones(2), b, 4.0)
    np.testing.assert_allclose(plan.cond, 4 * b)
    np.testing.assert_allclose(plan.uncond, -3 * b)
    assert plan.forwards == 4


def halves(x, t, guided):
    """Two velocities whose difference does not change with x or t."""
    cond = np.cos(x + t)
    return cond, cond - 0.3 if guided else None


def test_a_difference_of_guidance_that_stays_may_be_kept():
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    plan = make_plan("ab2", 6, 3.0)
    less = reduce_guidance(plan, [True, False, False, True, False, False])
    assert (less.forwards, plan.forwards, less.guided.tolist()[1]) == (8, 12, False)
    np.testing.assert_allclose(solve(less, halves, x)[-1], solve(plan, halves, x)[-1], atol=1e-6)
    assert "difference kept 2 of 6" in less.name
    once = reduce_guidance(plan, [True] + [False] * 5)
    assert np.abs(solve(once, wave, x)[-1] - solve(plan, wave, x)[-1]).max() > 1e-2
    np.testing.assert_allclose(reduce_guidance(plan, [True] * 6).cond, plan.cond)


def wave(x, t, guided):
    return np.cos(x + t), np.sin(3 * x + 5 * t) if guided else None


def test_guidance_in_an_interval():
    """By hand: Euler steps along v = 2 v_cond - v_uncond in the interval, along v_cond outside."""
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    made = solve(reduce_guidance(make_plan("euler", 4, 2.0), [False, True, True, False], reuse=False), wave, x)[-1]
    for i in range(4):
        cond, uncond = wave(x, i / 4, True)
        x = x + (2 * cond - uncond if i in (1, 2) else cond) / 4
    np.testing.assert_allclose(made, x, atol=1e-6)


def test_guidance_that_cannot_be_reduced():
    plan = make_plan("ab2", 3, 2.0)
    with pytest.raises(ValueError, match="expected 3 values, the first one true"):
        reduce_guidance(plan, [False, True, True])
    with pytest.raises(ValueError, match="expected 3 values"):
        reduce_guidance(plan, [True, True], reuse=False)
    for without in (make_plan("ab2", 3, 1.0), reduce_guidance(plan, [True, False, True])):
        with pytest.raises(ValueError, match="there is nothing to reduce"):
            reduce_guidance(without, [True] * 3)
