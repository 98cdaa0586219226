"""How a rectified flow is solved, as tables of numbers: when the network is asked, and how the answers are added up.

A rectified flow takes noise x_0 at time 0 to data at time 1 by dx/dt = v(x, t). Whatever a solver does between two
evaluations of v is linear in x_0 and in the velocities seen so far, so every solver, of several steps, of two stages or
with a corrector, is one lower triangular table:

    x_{i+1} = a[i] x_0 + sum_{j <= i} (cond[i, j] v_cond_j + uncond[i, j] v_uncond_j)

With guidance w, v = w v_cond - (w - 1) v_uncond. `mmopt.spec.solvers` makes the tables of known solvers, and
`mmopt.flow.fit` fits one to a model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.spec.files import save_json
from mmopt.spec.schema import SCHEMA, check_schema


@dataclass(frozen=True, eq=False)
class FlowPlan:
    """When the network is asked, and how the states are put together. n = evaluations; arrays cannot be written.

    times ``[n]`` float64: 0 is noise, 1 is data. a ``[n]``, cond and uncond ``[n, n]`` float64, lower triangular: row i
    makes the state of evaluation i + 1, the last row the result. guided ``[n]`` bool: is the unconditional pass made.
    guidance: the w that the table was made for. Raises ValueError for tables that do not fit together.
    """

    name: str
    times: np.ndarray
    a: np.ndarray
    cond: np.ndarray
    uncond: np.ndarray
    guided: np.ndarray
    guidance: float

    def __post_init__(self) -> None:
        n = np.size(self.times)
        if n < 1:
            raise ValueError(f"flow plan {self.name!r}: expected at least one evaluation, found none")
        shapes = {"times": (n,), "a": (n,), "cond": (n, n), "uncond": (n, n), "guided": (n,)}
        for key, shape in shapes.items():
            try:
                array = np.array(getattr(self, key), bool if key == "guided" else np.float64)
            except (TypeError, ValueError) as e:
                raise ValueError(f"flow plan {self.name!r}: {key} is not an array of numbers ({e})") from e
            if array.shape != shape:
                raise ValueError(f"flow plan {self.name!r}: {key} has shape {array.shape}, expected {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"flow plan {self.name!r}: {key} has values that are not finite")
            array.flags.writeable = False
            object.__setattr__(self, key, array)
        object.__setattr__(self, "guidance", finite("guidance", self.guidance))
        if self.times[0] < 0 or self.times[-1] > 1 or (np.diff(self.times) < 0).any():
            raise ValueError(f"flow plan {self.name!r}: times must rise within 0 and 1, found {self.times.tolist()}")
        for key in ("cond", "uncond"):
            if np.triu(getattr(self, key), 1).any():
                raise ValueError(f"flow plan {self.name!r}: {key} uses velocities before they are known")
        if self.uncond[:, ~self.guided].any():
            raise ValueError(f"flow plan {self.name!r}: uncond uses passes that `guided` leaves out")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowPlan) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def evaluations(self) -> int:
        return len(self.times)

    @property
    def forwards(self) -> int:
        """Passes of one sample through the network: two for a guided evaluation, one for another."""
        return self.evaluations + int(self.guided.sum())

    @property
    def sum_abs(self) -> float:
        """The largest sum of a row's coefficients without signs, those of velocities as if they were of v itself.

        Errors of rounding in the velocities grow by no more than this. Ordinary solvers have about 2.
        """
        w = self.guidance
        velocities = (np.abs(self.cond) + np.abs(self.uncond)).sum(1) / (abs(w) + abs(w - 1))
        return float((np.abs(self.a) + velocities).max())

    def step(self, i: int, x0: Any, cond: Sequence[Any], uncond: Sequence[Any]) -> Any:
        """The state after evaluation i, from the noise and the velocities 0..i, in their own type.

        x0 and each velocity ``[G, ...]``: arrays of numpy or torch, float32 in a painting. `uncond[j]` may be None
        where `guided[j]` is false.
        """
        state = x0 * float(self.a[i])
        for table, velocities in ((self.cond, cond), (self.uncond, uncond)):
            for j in range(i + 1):
                if weight := float(table[i, j]):
                    state = state + velocities[j] * weight
        return state

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema": SCHEMA} | {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}

    @staticmethod
    def from_json(data: Any) -> FlowPlan:
        """The plan that `to_json` described. Raises ValueError for anything else."""
        names = tuple(f.name for f in dataclasses.fields(FlowPlan))
        check_schema(data, "a flow plan", names)
        if not isinstance(data["name"], str):
            raise ValueError(f"not a flow plan: its name is {data['name']!r}, expected text")
        return FlowPlan(**{k: data[k] for k in names})

    @staticmethod
    def json_schema() -> dict[str, Any]:
        number = {"type": "number"}
        numbers: dict[str, Any] = {"type": "array", "items": number}
        tables = {k: {"type": "array", "items": numbers} for k in ("cond", "uncond")}
        lists = {"times": numbers, "a": numbers, "guided": {"type": "array", "items": {"type": "boolean"}}}
        known = {"schema": {"const": SCHEMA}, "name": {"type": "string"}, **lists, **tables, "guidance": number}
        return {"type": "object", "properties": known, "required": list(known), "additionalProperties": False}

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file."""
        save_json(self.to_json(), path)

    @staticmethod
    def load(path: str | Path) -> FlowPlan:
        """Read what `save` wrote. Raises ValueError that names the file."""
        try:
            return FlowPlan.from_json(json.loads(Path(path).read_text()))
        except ValueError as e:  # of JSON and of text that is none, too
            raise ValueError(f"{path}: {e}") from e


Velocity = Callable[[np.ndarray, float, bool], tuple[np.ndarray, np.ndarray | None]]
"""``(x, t, guided) -> (v_cond, v_uncond)``, each like x ``[n, ...]`` float32; v_uncond may be None if not guided."""


def solve(plan: FlowPlan, velocity: Velocity, noise: np.ndarray) -> list[np.ndarray]:
    """The states after each evaluation, the result last, from noise ``[n, ...]``."""
    x, states = noise, []
    cond: list[np.ndarray] = []
    uncond: list[np.ndarray | None] = []
    for i, t in enumerate(plan.times):
        c, u = velocity(x, float(t), bool(plan.guided[i]))
        cond.append(c)
        uncond.append(u)
        x = plan.step(i, noise, cond, uncond)
        states.append(x)
    return states


def from_velocity_table(name: str, times: Any, a: np.ndarray, b: np.ndarray, guidance: float) -> FlowPlan:
    """A plan from a table b ``[n, n]`` on guided velocities v = w v_cond - (w - 1) v_uncond."""
    guided = np.full(len(b), guidance != 1)
    return FlowPlan(name, times, a, guidance * b, (1 - guidance) * b, guided, guidance)


def reduce_guidance(plan: FlowPlan, guided: Sequence[bool] | np.ndarray, reuse: bool = True) -> FlowPlan:
    """The plan with unconditional passes at the evaluations `guided` ``[n]`` alone.

    reuse: elsewhere the last known difference v_cond - v_uncond goes on, and the first must be known. Otherwise v_cond
    stands alone there, which is guidance in an interval (Kynkaanniemi et al. 2024): another flow, no nearer to the
    first one with more steps. Raises ValueError for a plan without all of its passes.
    """
    wanted = np.array(guided, bool)
    if plan.guidance == 1 or not plan.guided.all():
        raise ValueError(f"plan {plan.name!r} does not make both passes everywhere: there is nothing to reduce")
    if wanted.shape != (plan.evaluations,) or (reuse and not wanted[0]):
        raise ValueError(
            f"guided is {wanted.tolist()}, expected {plan.evaluations} values" + ", the first one true" * reuse
        )
    cond, uncond = both_passes(plan.cond + plan.uncond, wanted, plan.guidance, reuse)
    name = f"{plan.name}, {'difference kept' if reuse else 'guided'} {int(wanted.sum())} of {len(wanted)}"
    return FlowPlan(name, plan.times, plan.a, cond, uncond, wanted, plan.guidance)


def both_passes(b: np.ndarray, guided: np.ndarray, w: float, reuse: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A table b ``[n, n]`` on guided velocities as tables on v_cond and v_uncond, see `reduce_guidance`."""
    cond, uncond = b.copy(), np.zeros_like(b)
    for j in range(len(b)):
        known = np.flatnonzero(guided[: j + 1])
        if w != 1 and len(known) and (reuse or guided[j]):
            cond[:, known[-1]] += (w - 1) * b[:, j]
            uncond[:, known[-1]] -= (w - 1) * b[:, j]
    return cond, uncond


def finite(name: str, value: Any) -> float:
    """The value, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return float(value)
