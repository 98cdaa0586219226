"""How far each plan of a flow drifts from the fine solution, and what it costs: tables, pictures, and a choice."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from mmopt.flow.reference import Reference, relative_errors
from mmopt.report import png_figure, save_png
from mmopt.spec.files import save_json
from mmopt.spec.flow_plan import FlowPlan, Velocity, solve
from mmopt.spec.solvers import SOLVERS, make_plan


@dataclass(frozen=True)
class Row:
    """One plan, measured. passes: of one sample through the network. mean, p90: of the samples' relative errors
    ||x - ref|| / ||ref|| to the fine solution from the same noise. seconds: for all samples, where measured."""

    plan: FlowPlan
    mean: float
    p90: float
    seconds: float | None = None

    @property
    def solver(self) -> str:
        return self.plan.name

    @property
    def evaluations(self) -> int:
        return self.plan.evaluations

    @property
    def forwards(self) -> int:
        return self.plan.forwards

    def to_json(self) -> dict[str, Any]:
        keys = ("solver", "evaluations", "mean", "p90", "seconds")
        return {k: getattr(self, k) for k in keys} | {"forwards": self.forwards, "guidance": self.plan.guidance}


def measure(velocity: Velocity, noises: np.ndarray, plan: FlowPlan, truth: np.ndarray, timed: bool = False) -> Row:
    """Follow a plan from noises ``[n, ...]`` and compare with truth ``[n, ...]``."""
    begin = time.perf_counter()
    x = solve(plan, velocity, noises)[-1]
    seconds = time.perf_counter() - begin
    errors = relative_errors(x, truth)
    return Row(plan, float(errors.mean()), float(np.quantile(errors, 0.9)), seconds if timed else None)


def frontier(
    velocity: Velocity,
    noises: np.ndarray,
    solvers: Sequence[str],
    steps: Sequence[int],
    reference: Reference | np.ndarray,
    guidance: float = 2.0,
    plans: Sequence[FlowPlan] = (),
    timed: bool = False,
) -> list[Row]:
    """Every solver at every number of evaluations, and other plans, from few passes to many.

    reference: the fine solution of the same noises, or its results ``[n, ...]``. Solvers of two stages are left out at
    odd numbers. Raises ValueError for solvers that are not known and results of another shape.
    """
    truth = _results(reference, noises)
    for solver in solvers:
        if solver not in SOLVERS:
            raise ValueError(f"solver {solver!r} is not known; there are {', '.join(SOLVERS)}")
    made = [make_plan(s, n, guidance) for s in solvers for n in steps if n % SOLVERS[s][0] == 0]
    return [measure(velocity, noises, p, truth, timed) for p in sorted([*made, *plans], key=lambda p: p.forwards)]


def _results(reference: Reference | np.ndarray, noises: np.ndarray) -> np.ndarray:
    truth = reference.result if isinstance(reference, Reference) else reference
    if truth.shape != noises.shape:
        raise ValueError(f"the reference has samples {truth.shape}, expected those of the noises, {noises.shape}")
    return truth


@dataclass(frozen=True)
class DriftBudget:
    """A budget: the largest mean and 90th percentile of relative errors that are accepted. At least one is given."""

    mean: float | None = None
    p90: float | None = None

    def __post_init__(self) -> None:
        given = dataclasses.asdict(self)
        if all(v is None for v in given.values()):
            raise ValueError("a budget of drift needs mean, p90 or both")
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not 0 < value < math.inf):
                raise ValueError(f"drift {name} is {value!r}, expected a finite number above 0")

    def excess(self, row: Row) -> float:
        """The row's error in parts of the budget, the worst of those given: kept up to 1."""
        parts = [getattr(row, k) / v for k, v in dataclasses.asdict(self).items() if v is not None]
        return math.inf if any(math.isnan(p) for p in parts) else max(parts)

    def __str__(self) -> str:
        return " and ".join(f"{k} {v:g}" for k, v in dataclasses.asdict(self).items() if v is not None)


class Choice(NamedTuple):
    row: Row
    met: bool
    reason: str


def cheapest(rows: Iterable[Row], budget: DriftBudget) -> Choice:
    """The row with the fewest passes, then the least time, then the least error, that keeps the budget.

    If none does, the one that comes nearest, `met` false and the reason. Raises ValueError without rows.
    """
    if not (rows := list(rows)):
        raise ValueError("there are no plans to choose from")
    kept = [r for r in rows if budget.excess(r) <= 1]
    if kept:
        row = min(kept, key=lambda r: (r.forwards, math.inf if r.seconds is None else r.seconds, budget.excess(r)))
        return Choice(row, True, f"{_words(row)} keeps drift {budget} with the fewest passes, {row.forwards}")
    row = min(rows, key=lambda r: (budget.excess(r), r.forwards))
    return Choice(row, False, f"none of {len(rows)} plans keeps drift {budget}; the nearest is {_words(row)}")


def search(
    velocity: Velocity,
    noises: np.ndarray,
    plans: Iterable[FlowPlan],
    reference: Reference | np.ndarray,
    budget: DriftBudget,
) -> tuple[Choice, list[Row]]:
    """Measures plans one by one and stops where the budget is kept: give them from few passes to many.

    plans may be a generator that fits each when it is asked for. Returns the choice and all rows measured.
    """
    truth, rows = _results(reference, noises), []
    for plan in plans:
        rows.append(measure(velocity, noises, plan, truth))
        if budget.excess(rows[-1]) <= 1:
            break
    return cheapest(rows, budget), rows


def _words(row: Row) -> str:
    return f"{row.solver} with {row.evaluations} evaluations (mean {row.mean:.4g}, p90 {row.p90:.4g})"


def undominated(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats: none has a smaller mean error at no more passes, or fewer passes at no more."""
    better = [
        any(
            o.forwards <= r.forwards and o.mean <= r.mean and (o.forwards, o.mean) != (r.forwards, r.mean) for o in rows
        )
        for r in rows
    ]
    return [r for r, beaten in zip(rows, better, strict=True) if not beaten]


def frontier_text(rows: Sequence[Row]) -> str:
    """The rows as a table for people; a star marks those that no other beats."""
    console = Console(file=(file := io.StringIO()), width=120, markup=False, highlight=False)
    best = {id(r) for r in undominated(rows)}
    timed = any(r.seconds is not None for r in rows)
    table = Table("solver", "evaluations", "passes", "mean error", "p90", *(["seconds"] if timed else []), "best")
    for r in rows:
        seconds = [] if not timed else ["" if r.seconds is None else f"{r.seconds:.3f}"]
        star = "*" if id(r) in best else ""
        table.add_row(r.solver, str(r.evaluations), str(r.forwards), f"{r.mean:.4f}", f"{r.p90:.4f}", *seconds, star)
    console.print(table)
    console.print("errors: distance to a fine solution from the same noise, relative to its size, over the samples")
    return file.getvalue()


def frontier_json(rows: Sequence[Row], path: str | Path, **facts: Any) -> None:
    """Write the rows, and any facts about how they were measured, as a JSON file."""
    best = {id(r) for r in undominated(rows)}
    save_json(facts | {"rows": [r.to_json() | {"best": id(r) in best} for r in rows]}, path)


def frontier_plot(rows: Sequence[Row], path: str | Path) -> None:
    """Mean error over passes, a line for each solver and one through those that no other beats, as a PNG file.

    Raises ImportError without matplotlib, ValueError for a name that does not end in .png.
    """
    figure = png_figure(path, (6.4, 4.4))
    axes = figure.subplots()
    for solver in dict.fromkeys(r.solver for r in rows):
        own = sorted((r for r in rows if r.solver == solver), key=lambda r: r.forwards)
        axes.plot([r.forwards for r in own], [r.mean for r in own], marker="o", markersize=4, label=solver)
    best = sorted(undominated(rows), key=lambda r: r.forwards)
    axes.plot([r.forwards for r in best], [r.mean for r in best], color="0.7", linewidth=4, zorder=0, label="best")
    axes.set(xlabel="passes of a sample through the network", ylabel="mean relative error", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_png(figure, path)
