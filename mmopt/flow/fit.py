"""Fits the table of a solver to a model: forward passes and small linear systems, no gradients.

Evaluation by evaluation, the row of a `FlowPlan` is the least-squares map from the noise and all velocities so far to
the state of a fine solution at the next time. The states are the solver's own, so each row also corrects what the rows
before it left over. Rows start from Adams-Bashforth of order 2 and are drawn back to it by a ridge. Weights are robust,
1 / (error^2 + eps^2): else a few samples that end in another mode would have least squares to themselves. Ridge and eps
are chosen for each row by leaving one sample out, the grid of times by the same figure of the last row.

The form of the table is that of Shaul et al. 2024 ("Bespoke non-stationary solvers"), who train it by gradients; see
`mmopt.flow.polish`. A fit is good for one model, number of evaluations, guidance and form of prompt. So it is checked
on samples held out, and where it does not win, the plan is Adams-Bashforth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmopt.flow.reference import Reference, combine_passes, reference, relative_errors
from mmopt.spec.flow_plan import FlowPlan, Velocity, both_passes, finite, from_velocity_table, solve
from mmopt.spec.solvers import make_plan, shifted

__all__ = ["FitResult", "Reference", "fit_plan", "reference", "relative_errors"]

RIDGES = (1e-6, 1e-4, 1e-2)  # of the mean square of a feature
ROBUST = (0.003, 0.03, math.inf)  # eps, as a relative error; inf are plain weights
ROUNDS = 4  # of robust weights
NOTHING = 1e-5  # a relative error of float32 arithmetic alone: nothing to gain
LARGEST_SUM = 10.0  # of a row's coefficients: more would multiply the rounding of velocities


@dataclass(frozen=True)
class FitResult:
    """A fitted plan and what it is worth.

    plan: the fitted one if it wins, else Adams-Bashforth of order 2 with as many passes. errors: "fitted", "ab2",
    "euler" -> "train", "held_out", and "form NAME" for each form of prompt held out -> mean and p90 of the relative
    errors to the fine solution. gap: of the fitted plan, held-out mean less train mean. evaluations: of the network, of
    all samples, for all that the fit needed. key: what the plan is for. grid: shift and power of its times.
    """

    plan: FlowPlan
    fitted: FlowPlan
    wins: bool
    reason: str
    errors: dict[str, dict[str, dict[str, float]]]
    evaluations: int
    grid: tuple[float, float]
    key: dict[str, Any]

    @property
    def gap(self) -> float:
        fitted = self.errors["fitted"]
        return fitted["held_out"]["mean"] - fitted["train"]["mean"]

    def __str__(self) -> str:
        """What was taken and why, and the errors of each group."""
        lines = [f"{self.plan.name}, {self.plan.evaluations} evaluations, {self.plan.forwards} passes: {self.reason}"]
        for solver, groups in self.errors.items():
            found = ", ".join(f"{k} {e['mean']:.4f} ({e['p90']:.4f})" for k, e in groups.items())
            gap = groups["held_out"]["mean"] - groups["train"]["mean"]
            lines.append(f"  {solver:<9} mean (p90): {found}; held out less train {gap:+.4f}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        made = {k: getattr(self, k) for k in ("wins", "reason", "errors", "gap", "evaluations", "grid", "key")}
        return made | {"grid": list(self.grid), "plan": self.plan.to_json(), "fitted": self.fitted.to_json()}


def fit_plan(
    velocity: Velocity,
    noises: np.ndarray,
    steps: int,
    guidance: float = 2.0,
    *,
    held_out: float | Sequence[bool] | np.ndarray = 0.4,
    forms: Sequence[str] | None = None,
    unconditional: Sequence[bool] | np.ndarray | None = None,
    trials: int = 0,
    truth: Reference | int = 150,
    ridges: Sequence[float] = RIDGES,
    robust: Sequence[float] = ROBUST,
    model: str = "",
    form: str = "",
) -> FitResult:
    """Fit a plan of `steps` evaluations on noises ``[n, ...]``; sample i is always of the same prompt.

    velocity: ``(x, t, guided) -> (v_cond, v_uncond)`` for all n samples at once. held_out: which samples are for checks
    alone ``[n]``, or what share of them, the last ones. forms: the form of each sample's prompt; the fit must win on
    each form held out. unconditional ``[steps]``: at which evaluations the unconditional pass is made (the first must
    be), with coefficients of their own; by default at all. trials: grids of times to try (shift and power), each costs
    `steps` evaluations; 0 takes equal steps. truth: a `reference` of the same noises, or how many evaluations to give
    one. model, form: noted in the key. Raises ValueError for too few samples and sizes that do not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}, expected a whole number of at least 1")
    noises = np.asarray(noises, np.float32)
    n, w = len(noises), finite("guidance", guidance)
    held = _held_out(held_out, n)
    if forms is not None and len(forms) != n:
        raise ValueError(f"forms has {len(forms)} entries, expected one for each of {n} samples")
    guided = np.full(steps, w != 1) if unconditional is None else np.array(unconditional, bool)
    if guided.shape != (steps,) or (w != 1 and not guided[0]):
        raise ValueError(f"unconditional is {guided.tolist()}, expected {steps} values, the first one true")
    guided &= w != 1
    count = 0

    def counted(x: np.ndarray, t: float, guided: bool) -> tuple[np.ndarray, np.ndarray | None]:
        nonlocal count
        count += n
        return velocity(x, t, guided)

    fine = reference(counted, noises, w, truth) if isinstance(truth, int) else truth
    if fine.result.shape != noises.shape:
        raise ValueError(f"truth is of samples {fine.result.shape}, expected those of the noises, {noises.shape}")

    def fit(grid: tuple[float, float]) -> _Fit:
        nodes = shifted(np.linspace(0, 1, steps + 1), *grid)
        return _fit_rows(counted, noises, nodes, w, guided, fine, ~held, ridges, robust)

    grid, best = _search(fit, trials)
    passes = best.plan.forwards
    base = make_plan("ab2", max(1, passes // 2) if w != 1 else steps, w)
    euler = make_plan("euler", base.evaluations, w)
    results = {"fitted": best.result} | {p.name: solve(p, counted, noises)[-1] for p in (base, euler)}
    groups = {"train": ~held, "held_out": held}
    for f in [] if forms is None else dict.fromkeys(str(f) for f in forms):
        if (chosen := held & (np.array(forms) == f)).any():
            groups[f"form {f}"] = chosen
    errors = {k: summary(relative_errors(x, fine.result), groups) for k, x in results.items()}
    wins, reason = _verdict(errors, best.plan, passes)
    key = {"model": model, "steps": steps, "guidance": w, "form": form}
    return FitResult(best.plan if wins else base, best.plan, wins, reason, errors, count, grid, key)


def _held_out(held_out: float | Sequence[bool] | np.ndarray, n: int) -> np.ndarray:
    if isinstance(held_out, float):
        held = np.arange(n) >= n - round(held_out * n)
    else:
        held = np.array(held_out, bool)
    if held.shape != (n,):
        raise ValueError(f"held_out has shape {held.shape}, expected ({n},)")
    if (~held).sum() < 4 or held.sum() < 2:
        raise ValueError(f"{(~held).sum()} samples to fit and {held.sum()} held out, expected at least 4 and 2")
    return held


def summary(errors: np.ndarray, groups: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean and 90th percentile of the errors ``[n]`` of each group, given as masks ``[n]``."""
    return {k: {"mean": float(errors[g].mean()), "p90": float(np.quantile(errors[g], 0.9))} for k, g in groups.items()}


def _verdict(errors: dict[str, dict[str, dict[str, float]]], fitted: FlowPlan, passes: int) -> tuple[bool, str]:
    if fitted.sum_abs >= LARGEST_SUM:
        return False, f"a row's coefficients sum to {fitted.sum_abs:.1f}, {LARGEST_SUM:g} or more: ab2 is taken"
    for group in [k for k in errors["fitted"] if k != "train"]:
        ours, base = (errors[k][group]["mean"] for k in ("fitted", "ab2"))
        if base < NOTHING:
            return False, f"{group}: ab2 is exact at {passes} passes (error {base:.2g}) and is taken"
        if not ours < base:
            return False, f"{group}: error {ours:.4g} against {base:.4g} of ab2 at {passes} passes: ab2 is taken"
    ours, base = (errors[k]["held_out"]["mean"] for k in ("fitted", "ab2"))
    return True, f"held out: error {ours:.4g} against {base:.4g} of ab2 at {passes} passes"


@dataclass(frozen=True)
class _Fit:
    plan: FlowPlan
    result: np.ndarray  # of all samples
    score: float  # mean relative error of samples left out, of the last row


def _search(fit: Callable[[tuple[float, float]], _Fit], trials: int) -> tuple[tuple[float, float], _Fit]:
    """The grid, as (shift, power), whose fit errs least on samples left out: steps in both logarithms, ever smaller."""
    place, best = np.zeros(2), fit((1.0, 1.0))
    step, used = 0.3, 1
    while used < trials and step > 0.02:
        moved = False
        for way in ([step, 0], [-step, 0], [0, step], [0, -step]):
            if used < trials:
                used += 1
                shift, power = np.exp(place + way)
                if (found := fit((float(shift), float(power)))).score < best.score:
                    place, best, moved = place + way, found, True
        step = step if moved else step / 2
    shift, power = np.exp(place)
    return (float(shift), float(power)), best


def _fit_rows(
    velocity: Velocity, noises: np.ndarray, nodes: np.ndarray, w: float, guided: np.ndarray, fine: Reference,
    train: np.ndarray, ridges: Sequence[float], robust: Sequence[float],
) -> _Fit:  # fmt: skip
    """Features are the noise and the guided velocities; or those of both passes where some unconditional ones lack."""
    steps, apart = len(guided), bool(guided.any() and not guided.all())
    prior = make_plan("ab2", steps, w, grid=nodes)
    a, b = prior.a, prior.cond + prior.uncond
    table = np.zeros((steps, 1 + 2 * steps))  # of x_0, and of each v_cond and v_uncond
    cond_start, uncond_start = both_passes(b, guided, w)
    columns = [0]
    features = _Features(noises, train)
    x, score = noises, math.inf
    for i in range(steps):
        cond, uncond = velocity(x, float(nodes[i]), bool(guided[i]))
        if apart:
            features.add(cond)
            columns.append(1 + i)
            if uncond is not None and guided[i]:
                features.add(uncond)
                columns.append(1 + steps + i)
            start = np.concatenate([[a[i]], cond_start[i], uncond_start[i]])[columns]
        else:
            features.add(combine_passes(cond, uncond if guided[i] else None, w))
            columns.append(1 + i)
            start = np.concatenate([[a[i]], b[i, : i + 1]])
        row, score = features.fit(start, fine.at(float(nodes[i + 1])), ridges, robust)
        table[i, columns] = row
        x = features.combine(row)
    v_cond, v_uncond = table[:, 1 : 1 + steps], table[:, 1 + steps :]
    if apart:
        plan = FlowPlan("fitted", nodes[:-1], table[:, 0], v_cond, v_uncond, guided, w)
    else:
        plan = from_velocity_table("fitted", nodes[:-1], table[:, 0], v_cond, w)
    return _Fit(plan, x, score)


class _Features:
    """Arrays ``[n, ...]`` float32 and, of the samples to fit, the products of each with each, float64 ``[m, k, k]``."""

    def __init__(self, first: np.ndarray, train: np.ndarray):
        self.arrays: list[np.ndarray] = []
        self.train = train
        self.gram = np.zeros((int(train.sum()), 0, 0))
        self.add(first)

    def add(self, array: np.ndarray) -> None:
        k = len(self.arrays)
        self.arrays.append(array)
        self.gram = np.pad(self.gram, ((0, 0), (0, 1), (0, 1)))
        self.gram[:, k] = self.gram[:, :, k] = self.products(array)

    def products(self, array: np.ndarray) -> np.ndarray:
        """With each of the arrays ``[m, k]``."""
        return np.stack([_dot(x[self.train], array[self.train]) for x in self.arrays], 1)

    def combine(self, row: np.ndarray) -> np.ndarray:
        x = self.arrays[0] * float(row[0])
        for weight, array in zip(row[1:], self.arrays[1:], strict=True):
            x = x + float(weight) * array
        return x

    def fit(
        self, start: np.ndarray, target: np.ndarray, ridges: Sequence[float], robust: Sequence[float]
    ) -> tuple[np.ndarray, float]:
        """Coefficients for `target`, near `start`, and the mean relative error of samples left out."""
        missing = target - self.combine(start)
        size = _dot(target[self.train], target[self.train])
        gram = self.gram / size[:, None, None]
        cross = self.products(missing) / size[:, None]
        square = _dot(missing[self.train], missing[self.train]) / size
        best, score = np.zeros_like(start), float(np.sqrt(square).mean())
        for ridge in ridges:
            for eps in robust:
                change, found = _least_squares(gram, cross, square, ridge, eps)
                if found < score:
                    best, score = change, found
        return start + best, score


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    return np.einsum("nd,nd->n", x, y, dtype=np.float64)


def _least_squares(
    gram: np.ndarray, cross: np.ndarray, square: np.ndarray, ridge: float, eps: float
) -> tuple[np.ndarray, float]:
    """Minimises sum of w_n (square_n - 2 cross_n c + c gram_n c) with a ridge on c; and its error, leaving one out."""
    weights = np.full(len(gram), 1 / len(gram))
    for _ in range(ROUNDS if math.isfinite(eps) else 0):
        change = _solve(gram, cross, weights, ridge)
        weights = 1 / (_errors(gram, cross, square, change) + eps**2)
        weights /= weights.sum()
    others = np.where(np.eye(len(gram), dtype=bool), 0, weights)
    left_out = np.stack([_solve(gram, cross, o, ridge) for o in others])
    return _solve(gram, cross, weights, ridge), float(np.sqrt(_errors(gram, cross, square, left_out)).mean())


def _solve(gram: np.ndarray, cross: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    matrix = np.tensordot(weights, gram, 1)
    matrix += ridge * np.diagonal(matrix).mean() * np.eye(len(matrix))
    return np.linalg.solve(matrix, weights @ cross)


def _errors(gram: np.ndarray, cross: np.ndarray, square: np.ndarray, change: np.ndarray) -> np.ndarray:
    change = np.broadcast_to(change, cross.shape)
    quadratic = np.einsum("ni,nij,nj->n", change, gram, change, optimize=True)
    return np.maximum(square - 2 * (cross * change).sum(1) + quadratic, 0)
