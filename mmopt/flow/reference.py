"""Fine solutions of a rectified flow, which solvers with few evaluations are fitted to and measured against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmopt.spec.flow_plan import Velocity


@dataclass(frozen=True)
class Reference:
    """A fine solution. times ``[m + 1]``, states ``[m + 1, n, ...]`` float32, velocities ``[m, n, ...]`` (guided)."""

    times: np.ndarray
    states: np.ndarray
    velocities: np.ndarray

    @property
    def result(self) -> np.ndarray:
        return self.states[-1]

    def at(self, t: float) -> np.ndarray:
        """The states ``[n, ...]`` at time t, by cubic interpolation of states and velocities."""
        i = min(int(np.searchsorted(self.times, t, "right")) - 1, len(self.times) - 2)
        h = self.times[i + 1] - self.times[i]
        s = float((t - self.times[i]) / h)
        start, end, before = self.states[i], self.states[i + 1], self.velocities[i] * float(h)
        if s in (0.0, 1.0):
            return end if s else start
        bend = end - start - before
        if i + 1 == len(self.velocities):  # nobody asked for the velocity at the very end
            return start + s * before + s * s * bend
        after = self.velocities[i + 1] * float(h)
        return start + s * before + s * s * (2 * bend - (after - end + start)) + s**3 * (after - end + start - bend)


def reference(velocity: Velocity, noises: np.ndarray, guidance: float = 2.0, evaluations: int = 150) -> Reference:
    """Follows the flow from noises ``[n, ...]`` by Adams-Bashforth of order 2 with many equal steps, in float32.

    Twice the evaluations should move the results by far less than the errors that are measured against them.
    """
    times, h = np.array([k / evaluations for k in range(evaluations + 1)]), 1 / evaluations
    states = np.empty((evaluations + 1, *noises.shape), np.float32)
    velocities = np.empty((evaluations, *noises.shape), np.float32)
    states[0] = noises
    for i, v in enumerate(velocities):
        v[...] = combine_passes(*velocity(states[i], float(times[i]), guidance != 1), guidance)
        states[i + 1] = states[i] + h * (1.5 * v - 0.5 * velocities[i - 1] if i else v)
    return Reference(times, states, velocities)


def relative_errors(x: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """||x - truth|| / ||truth|| of each sample ``[n]``."""
    axes = tuple(range(1, x.ndim))
    difference = ((x.astype(np.float64) - truth) ** 2).sum(axes)
    return np.sqrt(difference / (truth.astype(np.float64) ** 2).sum(axes))


def combine_passes(cond: np.ndarray, uncond: np.ndarray | None, w: float) -> np.ndarray:
    """v = w v_cond - (w - 1) v_uncond; v_cond alone if there is no other."""
    return cond if uncond is None else w * cond - (w - 1) * uncond
