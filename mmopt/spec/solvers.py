"""Known solvers of a rectified flow as `FlowPlan` tables.

Each is written as it is in a textbook, on rows of coefficients in the place of states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mmopt.spec.flow_plan import FlowPlan, Velocity, finite, from_velocity_table, solve

__all__ = ["SOLVERS", "FlowPlan", "Velocity", "from_velocity_table", "make_plan", "shifted", "solve"]


def make_plan(
    solver: str = "ab2",
    steps: int = 10,
    guidance: float = 2.0,
    grid: str | Sequence[float] | np.ndarray = "uniform",
    shift: float = 1.0,
) -> FlowPlan:
    """The plan of a known solver. steps: evaluations of the network, even for those of two stages (midpoint, heun).

    grid: "uniform"; "shifted", t = u / (s - (s - 1) u) with s = `shift`, more steps near the noise for s > 1 (Stable
    Diffusion 3); or the times themselves, from 0 or more to 1, one more than there are steps of the solver (half as
    many for two stages). euler: t_k = k / steps with equal steps, the reference's loop. ab2, ab3: Adams-Bashforth for
    unequal steps, of lower order to start. dpmpp_2m: DPM-Solver++ (Lu et al. 2022); unipc: UniPC (Zhao et al. 2023)
    of order 2 with B(h) = e^h - 1 and its corrector. These two go by log(signal / noise), which is infinite at both
    ends: their first and last steps are of order 1, and dpmpp_2m has order 2 only where steps shrink towards the ends.
    Raises ValueError for unknown names, counts and values that cannot be.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not known; there are {', '.join(SOLVERS)}")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps is {steps!r}, expected a whole number of at least 1")
    w = finite("guidance", guidance)
    stages, make = SOLVERS[solver]
    if steps % stages:
        raise ValueError(f"{solver} evaluates {stages} times a step: steps is {steps}, expected an even number")
    nodes, suffix = _nodes(grid, shift, int(steps) // stages)
    times, rows = make(nodes)
    table = np.array(rows)
    return from_velocity_table(solver + suffix, times, table[:, 0], table[:, 1:], w)


def shifted(u: np.ndarray, shift: float = 1.0, power: float = 1.0) -> np.ndarray:
    """Times 0..1 moved towards the noise by shift > 1 (u / (s - (s - 1) u)) and by power > 1 (u^p)."""
    t = u**power
    return t / (shift - (shift - 1) * t)


def _nodes(grid: str | Sequence[float] | np.ndarray, shift: float, count: int) -> tuple[np.ndarray, str]:
    if isinstance(grid, str):
        if grid not in ("uniform", "shifted"):
            raise ValueError(f"grid {grid!r} is not known; there are uniform, shifted, or the times themselves")
        if (s := finite("shift", shift)) <= 0:
            raise ValueError(f"shift is {shift!r}, expected a number above 0")
        uniform = np.array([k / count for k in range(count + 1)])
        if grid == "uniform":
            if s != 1:
                raise ValueError(f"shift is {shift!r} but grid is 'uniform'; use grid='shifted'")
            return uniform, ""
        return shifted(uniform, s), f" shift {s:g}"
    nodes = np.asarray(grid, np.float64)
    if nodes.shape != (count + 1,):
        raise ValueError(f"grid has shape {nodes.shape}, expected {count + 1} times for {count} steps of the solver")
    if not np.isfinite(nodes).all() or nodes[0] < 0 or nodes[-1] != 1 or (np.diff(nodes) <= 0).any():
        raise ValueError(f"grid must rise from 0 or more to 1 exactly, found {nodes.tolist()}")
    return nodes, " own grid"


# A state is a row of coefficients: of x_0, then of each velocity. Each solver gives its times and the state after each.
_Made = tuple[list[float], list[np.ndarray]]


def _symbols(evaluations: int) -> tuple[np.ndarray, np.ndarray]:
    identity = np.eye(evaluations + 1)
    return identity[0], identity[1:]


def _adams(t: np.ndarray, order: int) -> _Made:
    """Integrates the polynomial through the last velocities from each time to the next."""
    n = len(t) - 1
    x, v = _symbols(n)
    rows = []
    for i, h in enumerate(np.diff(t)):
        k = min(order, i + 1)
        powers = np.arange(k)[:, None]
        places = (t[i - k + 1 : i + 1] - t[i]) / h
        weights = np.linalg.solve(places**powers, 1 / (powers[:, 0] + 1))
        x = x + h * weights @ v[i - k + 1 : i + 1]
        rows.append(x)
    return list(t[:-1]), rows


def _midpoint(t: np.ndarray) -> _Made:
    n = len(t) - 1
    x, v = _symbols(2 * n)
    times, rows = [], []
    for i, h in enumerate(np.diff(t)):
        rows.append(x + h / 2 * v[2 * i])
        x = x + h * v[2 * i + 1]
        rows.append(x)
        times += [t[i], t[i] + h / 2]
    return times, rows


def _heun(t: np.ndarray) -> _Made:
    n = len(t) - 1
    x, v = _symbols(2 * n)
    times, rows = [], []
    for i, h in enumerate(np.diff(t)):
        rows.append(x + h * v[2 * i])
        x = x + h / 2 * (v[2 * i] + v[2 * i + 1])
        rows.append(x)
        times += [t[i], t[i + 1]]
    return times, rows


def _log_ratio(t: np.ndarray) -> np.ndarray:
    """log(signal / noise) = log(t / (1 - t)), from time 1e-6 on; infinite at time 1."""
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(t, 1e-6)) - np.log(1 - t)


def _dpmpp_2m(t: np.ndarray) -> _Made:
    """The data D = x + (1 - t) v is extrapolated linearly in the logarithm of signal to noise."""
    n = len(t) - 1
    x, v = _symbols(n)
    ratio, data, rows = _log_ratio(t), [], []
    for i in range(n):
        data.append(x + (1 - t[i]) * v[i])
        d = data[i]
        if 0 < i < n - 1:
            d = d + (data[i] - data[i - 1]) * (ratio[i + 1] - ratio[i]) / (2 * (ratio[i] - ratio[i - 1]))
        keep = (1 - t[i + 1]) / (1 - t[i])
        x = keep * x + (t[i + 1] - keep * t[i]) * d
        rows.append(x)
    return list(t[:-1]), rows


def _unipc(t: np.ndarray) -> _Made:
    """As DPM-Solver++, and each step is made once more when the data at its end are known."""
    n = len(t) - 1
    x, v = _symbols(n)
    ratio, data, rows = _log_ratio(t), [], []
    start = x  # the state at the time before, corrected
    for i in range(n):
        data.append(x + (1 - t[i]) * v[i])
        if i:
            x = _corrected(t, ratio, data, start)
        d = data[i]
        if 0 < i < n - 1:
            d = d + (data[i] - data[i - 1]) * (ratio[i + 1] - ratio[i]) / (2 * (ratio[i] - ratio[i - 1]))
        start = x
        keep = (1 - t[i + 1]) / (1 - t[i])
        x = keep * x + (t[i + 1] - keep * t[i]) * d
        rows.append(x)
    return list(t[:-1]), rows


def _corrected(t: np.ndarray, ratio: np.ndarray, data: list[np.ndarray], start: np.ndarray) -> np.ndarray:
    """The state at the time of the last data, from `start` one time before."""
    i = len(data) - 1
    end, here = data[i], data[i - 1]
    h = ratio[i] - ratio[i - 1]
    if i == 1:
        d = here + 0.5 * (end - here)
    else:
        # sum_m weight_m r_m^(k - 1) = k! phi_{k+1}(-h) (-h) / (e^-h - 1): the moments of the exponential, k = 1, 2
        behind = (ratio[i - 2] - ratio[i - 1]) / h
        first = math.expm1(-h) / -h
        second = (first - 1) / -h
        third = (second - 0.5) / -h
        moments = np.array([second, 2 * third]) * -h / math.expm1(-h)
        past, last = np.linalg.solve(np.array([[1.0, 1.0], [behind, 1.0]]), moments)
        d = here + past / behind * (data[i - 2] - here) + last * (end - here)
    keep = (1 - t[i]) / (1 - t[i - 1])
    return keep * start + (t[i] - keep * t[i - 1]) * d


SOLVERS: dict[str, tuple[int, Callable[[np.ndarray], _Made]]] = {  # name -> evaluations of a step, how it is made
    "euler": (1, lambda t: _adams(t, 1)),
    "midpoint": (2, _midpoint),
    "heun": (2, _heun),
    "ab2": (1, lambda t: _adams(t, 2)),
    "ab3": (1, lambda t: _adams(t, 3)),
    "dpmpp_2m": (1, _dpmpp_2m),
    "unipc": (1, _unipc),
}
