"""What plans cost and how far they drift: the rows, the choice under a budget, and what is written of them."""

import json
import sys

import numpy as np
import pytest
from flow_toys import Mixture, smooth

from mmopt.flow.fit import fit_plan
from mmopt.flow.frontier import (
    DriftBudget,
    Row,
    cheapest,
    frontier,
    frontier_json,
    frontier_plot,
    frontier_text,
    search,
    undominated,
)
from mmopt.flow.reference import reference
from mmopt.spec.flow_plan import solve
from mmopt.spec.solvers import SOLVERS, make_plan

NOISES = Mixture(48).noises(3)


@pytest.fixture(scope="module")
def truth():
    return reference(smooth, NOISES, 2.0, 400)


@pytest.fixture(scope="module")
def rows(truth):
    fitted = fit_plan(smooth, NOISES, 5, 2.0, truth=truth).plan
    return frontier(smooth, NOISES, ["euler", "ab2", "heun"], [4, 5, 8, 30], truth, plans=[fitted], timed=True)


def row(passes=10, mean=0.1, p90=0.2, seconds=None):
    return Row(make_plan("euler", passes, 1.0), mean, p90, seconds)


def test_rows_are_every_solver_at_every_count_and_other_plans(rows, truth):
    found = {(r.solver, r.evaluations): r for r in rows}
    expected = {(s, n) for s in ("euler", "ab2", "heun") for n in (4, 5, 8, 30)} - {("heun", 5)} | {("fitted", 5)}
    assert found.keys() == expected
    assert len(rows) == len(expected)
    assert all(r.forwards == 2 * r.evaluations and r.seconds > 0 for r in rows)
    assert [r.forwards for r in rows] == sorted(r.forwards for r in rows)
    one = found["ab2", 8]
    x = solve(make_plan("ab2", 8, 2.0), smooth, NOISES)[-1]
    errors = np.linalg.norm(x - truth.result, axis=1) / np.linalg.norm(truth.result, axis=1)
    assert one.mean == pytest.approx(errors.mean(), rel=1e-5)
    assert one.p90 == pytest.approx(np.quantile(errors, 0.9), rel=1e-5)
    assert found["fitted", 5].mean < one.mean < found["euler", 8].mean


def test_the_finest_plan_of_each_solver_is_nearest_and_unknown_things_are_refused(truth):
    for solver in SOLVERS:
        means = [r.mean for r in frontier(smooth, NOISES, [solver], [4, 8, 16, 32], truth)]
        assert means == sorted(means, reverse=True)
    with pytest.raises(ValueError, match="'rk9' is not known"):
        frontier(smooth, NOISES, ["rk9"], [4], truth)
    with pytest.raises(ValueError, match="the reference has samples"):
        frontier(smooth, NOISES, ["ab2"], [4], truth.result[:3])


def test_the_cheapest_plan_that_keeps_the_budget_is_chosen(rows):
    found = {(r.solver, r.evaluations): r for r in rows}
    choice = cheapest(rows, DriftBudget(mean=found["fitted", 5].mean * 1.01))
    assert (choice.row, choice.met) == (found["fitted", 5], True)
    assert "fewest passes, 10" in choice.reason
    without = [r for r in rows if r.solver == "euler"]
    choice = cheapest(without, DriftBudget(mean=found["euler", 8].mean, p90=1.0))
    assert (choice.row, choice.met) == (found["euler", 8], True)
    choice = cheapest(without, DriftBudget(p90=found["euler", 8].p90 * 0.99))
    assert choice.row is found["euler", 30]


def test_both_parts_of_a_budget_count_and_ties_go_to_time_then_error():
    assert cheapest([row(8, 0.1, 0.9), row(10, 0.1, 0.3)], DriftBudget(mean=0.2, p90=0.5)).row.forwards == 10
    assert cheapest([row(10, seconds=1.0), row(8, seconds=5.0)], DriftBudget(mean=0.2)).row.forwards == 8
    slow, fast = row(seconds=2.0, mean=0.01), row(seconds=1.0)
    assert cheapest([slow, fast], DriftBudget(mean=0.2)).row is fast
    rough, fine = row(mean=0.15), row(mean=0.05)
    assert cheapest([rough, fine], DriftBudget(mean=0.2)).row is fine


def test_a_budget_that_nothing_keeps_gives_the_nearest_and_says_so(rows):
    choice = cheapest(rows, DriftBudget(mean=1e-7))
    assert not choice.met
    assert choice.row is min(rows, key=lambda r: r.mean)
    assert "none of 12 plans keeps drift mean 1e-07" in choice.reason
    assert not cheapest([row(mean=float("nan"))], DriftBudget(mean=0.1)).met
    with pytest.raises(ValueError, match="no plans"):
        cheapest([], DriftBudget(mean=0.1))


@pytest.mark.parametrize("budget", [{}, {"mean": 0}, {"p90": -1.0}, {"mean": float("nan")}, {"mean": True}])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="drift"):
        DriftBudget(**budget)


def test_a_search_stops_at_the_first_plan_that_keeps_the_budget(truth):
    made = []

    def plans():
        for n in range(2, 100):
            made.append(n)
            yield make_plan("ab2", n, 2.0)

    choice, rows = search(smooth, NOISES, plans(), truth, DriftBudget(mean=0.05))
    assert choice.met
    assert choice.row.evaluations == made[-1] == 1 + len(made)
    assert all(r.mean > 0.05 for r in rows[:-1])
    assert rows[-1].mean <= 0.05
    choice, rows = search(smooth, NOISES, [make_plan("euler", 2), make_plan("euler", 3)], truth, DriftBudget(mean=0.01))
    assert not choice.met
    assert (choice.row.evaluations, len(rows)) == (3, 2)


def test_rows_that_no_other_beats():
    a, b, c, d = row(4, 0.5), row(6, 0.6), row(8, 0.1), row(8, 0.2)
    assert undominated([a, b, c, d]) == [a, c]
    assert len(undominated([row(4, 0.5), row(4, 0.5)])) == 2


def test_what_is_written(rows, tmp_path, monkeypatch):
    text = frontier_text(rows)
    for r in rows:
        assert f"{r.mean:.4f}" in text
    assert text.count("*") == len(undominated(rows))
    assert "seconds" in text
    assert "seconds" not in frontier_text([row()])
    frontier_json(rows, tmp_path / "rows.json", model="toy")
    data = json.loads((tmp_path / "rows.json").read_text())
    assert data["model"] == "toy"
    assert [r["mean"] for r in data["rows"]] == [r.mean for r in rows]
    assert sum(r["best"] for r in data["rows"]) == len(undominated(rows))
    with pytest.raises(ValueError, match="PNG"):
        frontier_plot(rows, tmp_path / "rows.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mmopt\[plot\]"):
        frontier_plot(rows, tmp_path / "rows.png")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_a_picture_is_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    frontier_plot(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.png"]
