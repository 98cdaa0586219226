"""Runs the image schedule of a Program or an engine: prompts and noise in, latents and images out.

The samples of a painting of G images are 2 G rows of a batch: the G conditional ones, then the G unconditional ones,
which see of the prompt its first token alone. Guidance and the solver are arithmetic on latents, outside all graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.model_info import Flow, ModelInfo
from mmopt.spec.schedule import Loop, table_of
from mmopt.spec.solvers import make_plan

STEPS = 10  # evaluations by default: AB2 or a fitted plan


@dataclass
class Samples:
    """Where the rows of each sample stand. ids ``[2 G, p]``, seen ``[2 G, capacity]``, all else ``[2 G]``.

    begin, end: slots filled before and after the rows of the prompt. offset, image_offset: what is added to a slot for
    the position of a row of the prompt, and of those after it.
    """

    ids: np.ndarray
    seen: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    offset: np.ndarray
    image_offset: np.ndarray

    def values(self) -> dict[str, np.ndarray]:
        """By the names that a schedule knows them by."""
        names = {"ids": self.ids, "seen": self.seen, "begin": self.begin, "end": self.end, "offset": self.offset}
        return {f"prompt.{k}": v for k, v in names.items()} | {"image.offset": self.image_offset}


def lay_out(prompts: Sequence[Sequence[int]], flow: Flow, capacity: int, vocab_size: int) -> Samples:
    """Prompts of ids -> samples; the last id of a prompt gives way to the row that tells the time.

    As the reference has it, shorter prompts are padded on the left and unconditional ones are their first id and
    padding, all of it hidden by `seen`. Where a pass left hidden rows out (``flow.compact``), a sample holds
    the rows that are seen, and padding lies behind them, to be written over. Raises ValueError for no prompt, one of
    fewer than two ids or of ids that are not text, and for more rows than the caches hold.
    """
    if not prompts:
        raise ValueError("no prompt was given")
    rows = flow.tokens + 1
    for i, prompt in enumerate(prompts):
        if len(prompt) < 2:
            raise ValueError(f"prompt {i} has {len(prompt)} ids, expected at least two: the first token and the last")
        wrong = [t for t in prompt if not 0 <= t < vocab_size]
        if wrong:
            raise ValueError(f"prompt {i}: token ids {wrong[:5]} are outside the vocabulary of {vocab_size}")
        if len(prompt) - 1 + rows > capacity:
            raise ValueError(
                f"prompt {i} takes {len(prompt) - 1} rows and an image {rows}, but the cache holds {capacity}; "
                "trace with a larger context"
            )
    count, lengths = len(prompts), [len(p) - 1 for p in prompts]
    most = max(lengths)
    ids, seen = np.zeros((2 * count, most), np.int64), np.ones((2 * count, capacity), bool)
    begin, offset = np.zeros(2 * count, np.int64), np.zeros(2 * count, np.int64)
    compact = flow.compact
    for b, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        lead = 0 if compact else most - n
        ids[b, lead : lead + n], ids[count + b, lead] = prompt[:-1], prompt[0]
        seen[[b, count + b], :lead] = False
        seen[count + b, lead + 1 : most] = False
        offset[[b, count + b]] = -lead
    if not compact:
        return Samples(ids, seen, begin, begin + most, offset, offset)
    alone = np.ones(count, np.int64)
    after = np.concatenate([0 * alone, np.array(lengths) - 1])
    return Samples(ids, seen, begin, np.concatenate([lengths, alone]), offset, after)


class FlowSampler:
    """Follows a image schedule. Subclasses say how a stage runs; values are arrays of any library with slices.

    inputs: stage -> names of its inputs -> shapes. `trips` is called after each evaluation with its number and latents.
    """

    def __init__(
        self, schedule: Sequence[Any], inputs: Mapping[str, Mapping[str, Sequence]], samples: Samples, plan: FlowPlan,
        trips: Callable[[int, Any], None] | None = None,
    ):  # fmt: skip
        self.schedule, self.inputs, self.samples, self.plan = schedule, inputs, samples, plan
        self.count, self.trips = len(samples.ids) // 2, trips or (lambda k, latents: None)
        self.values: dict[str, Any] = {}
        self.lanes = 2 * self.count  # samples that are computed: all, or the conditional ones alone
        self.trip = 0

    def run_stage(self, call: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def cat(self, parts: list[Any], dim: int) -> Any:
        raise NotImplementedError

    def expand(self, x: Any, samples: int) -> Any:
        raise NotImplementedError

    def sample(self, noise: Any) -> Any:
        """The latents at the end of the schedule, from float32 noise ``[G, c, h, w]``."""
        self.values["latents"] = noise
        for item in self.schedule:
            if isinstance(item, Loop):
                self._steps(item, noise)
            else:
                self.call(item)
        return self.values["latents"]

    def _steps(self, loop: Any, noise: Any) -> None:
        state, velocity = loop.update
        cond: list[Any] = []
        uncond: list[Any] = []
        for trip in range(self.plan.evaluations):
            self.trip = trip
            self.lanes = self.count * (2 if self.plan.guided[self.trip] else 1)
            for call in loop.body:
                self.call(call)
            made = self.values[velocity]
            cond.append(made[: self.count])
            uncond.append(made[self.count :] if self.plan.guided[self.trip] else None)
            self.values[state] = self.plan.step(self.trip, noise, cond, uncond)
            self.trips(self.trip, self.values[state])
        self.lanes = 2 * self.count

    def call(self, call: Any) -> None:
        inputs = {name: self._read(call.source(name)) for name in self.inputs[call.stage]}
        free = [k for k, shape in self.inputs[call.stage].items() if str(shape[0]) == "B"]
        samples = max((inputs[k].shape[0] for k in free), default=1)
        for k in free:
            shape = self.inputs[call.stage][k]
            if len(shape) > 1 and isinstance(shape[1], int) and inputs[k].shape[1] > shape[1]:
                inputs[k] = inputs[k][:, -shape[1] :]  # of rows that were read before the image nobody asks
            if inputs[k].shape[0] != samples:
                inputs[k] = self.expand(inputs[k], samples)
        for name, value in self.run_stage(call, inputs).items():
            self.values[call.target(name)] = value

    def _read(self, source: Any) -> Any:
        if isinstance(source, str):
            if source.startswith("step."):
                return self.values[table_of(source)][self.trip : self.trip + 1]
            value = self.values[source]
            return value[: self.lanes] if value.shape[0] == 2 * self.count > self.lanes else value
        parts = [self._read(n) for n in source.names]
        if source.dim == 0:
            return parts[0] if self.lanes == self.count else self.cat(parts, 0)
        samples = max(p.shape[0] for p in parts)
        return self.cat([p if p.shape[0] == samples else self.expand(p, samples) for p in parts], source.dim)


def levels(pixels: np.ndarray) -> np.ndarray:
    """Pictures of 8 bits ``[G, H, W, 3]`` of pixels ``[G, 3, H, W]`` in -1 to 1, rounded down as demos do."""
    return ((np.clip(pixels, -1, 1) + 1) / 2 * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def draw_noise(images: int, info: ModelInfo, seed: int | None) -> np.ndarray:
    """The noise of a seed ``[images, c, h, w]``, the same in torch and in engines. Image i has its own stream.

    Raises ValueError for a seed that is not a whole number of at least 0, or None.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
        raise ValueError(f"seed is {seed!r}, expected a whole number of at least 0")
    seeds = np.random.SeedSequence(seed).spawn(images)
    shape = info.required_flow.latents
    return np.stack([np.random.default_rng(s).standard_normal(shape, np.float32) for s in seeds])


def plan_of(plan: FlowPlan | None, info: ModelInfo) -> FlowPlan:
    """The plan, by default that of the program, else the reference's."""
    return (
        plan
        or info.required_flow.plan
        or make_plan("euler", info.required_flow.steps, guidance=info.required_flow.guidance)
    )


def choose_plan(solver: str | FlowPlan | None, steps: int | None, guidance: float | None, info: ModelInfo) -> FlowPlan:
    """A plan by the name of its solver, or the one to take by default: see `Engine.generate_image`.

    Raises ValueError for an unknown solver, for a plan together with steps or guidance, and if "fitted" is asked for
    and no plan was fitted for so many steps and this guidance.
    """
    if isinstance(solver, FlowPlan):
        if steps is not None or guidance is not None:
            raise ValueError("a plan says its own steps and guidance: give either a plan or these")
        return solver
    if solver is None and steps is None and guidance is None and info.required_flow.plan is not None:
        return info.required_flow.plan
    count = STEPS if steps is None else steps
    weight = info.required_flow.guidance if guidance is None else guidance
    if solver in (None, "fitted"):
        held = info.required_flow.plans
        for plan in held:
            if plan.evaluations == count and plan.guidance == weight:
                return plan
        if solver == "fitted":
            there = ", ".join(f"{p.evaluations} steps at guidance {p.guidance:g}" for p in held) or "none"
            raise ValueError(f"no plan was fitted for {count} steps at guidance {weight:g}; there is {there}")
    return make_plan("ab2" if solver is None else solver, count, guidance=weight)
