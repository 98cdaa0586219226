"""The velocity of a program that paints, as a function of latents and time: what solvers are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmopt.ir.program import Program
from mmopt.spec.flow_sampler import lay_out
from mmopt.spec.schedule import Call, Loop
from mmopt.spec.solvers import make_plan


class ProgramVelocity:
    """``velocity(x, t, guided) -> (v_cond, v_uncond)`` of a Program for fixed prompts of ids, one for each row of x.

    x ``[n, c, h, w]`` float32, t in 0..1; unguided calls return None for v_uncond. Arrays of numpy in, arrays out. At
    most `together` images are computed at once. What does not depend on x or t is computed once. `passes` counts the
    passes of one image that were made; `progress` is told about each call.
    """

    def __init__(
        self,
        program: Program,
        prompts: Sequence[Sequence[int]],
        together: int = 16,
        progress: Callable[[int], None] | None = None,
    ):
        if not program.schedules.image:
            raise ValueError(f"{program.info.family} generates no images")
        if not program.has_weights:
            raise ValueError("this Program has shapes only, no weights: nothing can be fitted to it")
        self.program, self.forwards, self.progress = program, 0, progress
        self.groups = [Group(program, prompts[i : i + together]) for i in range(0, len(prompts), together)]
        self.count = len(prompts)

    def __call__(self, x: np.ndarray, t: float, guided: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        if len(x) != self.count:
            raise ValueError(f"x holds {len(x)} latents, expected one for each of {self.count} prompts")
        start, made = 0, []
        for group in self.groups:
            part = torch.from_numpy(np.ascontiguousarray(x[start : start + group.count], np.float32))
            made.append(group(part, t, guided))
            start += group.count
        self.forwards += 2 if guided else 1
        if self.progress:
            self.progress(self.forwards)
        cond = np.concatenate([c.numpy() for c, _ in made])
        return cond, np.concatenate([u.numpy() for _, u in made if u is not None]) if guided else None


class TensorVelocity:
    """As `ProgramVelocity` for tensors, and differentiable by x and t: what plans are polished by.

    x ``[n, c, h, w]`` float32, t of no dimensions; all images are computed at once.
    """

    def __init__(self, program: Program, prompts: Sequence[Sequence[int]]):
        apart = program.copy()
        apart.stages = {k: s.replaced(s.graph) for k, s in program.stages.items()}  # with constants of their own
        self.group = Group(apart, prompts, gradients=True)

    def __call__(self, x: Tensor, t: Tensor, guided: bool = True) -> tuple[Tensor, Tensor | None]:
        return self.group.velocity_at(x, t, guided)


class Group:
    """Some images that are computed together."""

    def __init__(self, program: Program, prompts: Sequence[Sequence[int]], gradients: bool = False):
        self.count, self.scale = len(prompts), program.info.required_flow.time_scale
        samples, nothing = (
            lay_out(prompts, program.info.required_flow, program.info.context, program.info.vocab_size),
            make_plan("euler", 1),
        )
        self.painter = program.flow_sampler(samples, nothing, gradients=gradients)
        place = next(i for i, item in enumerate(program.schedules.image) if isinstance(item, Loop))
        loop, before = program.schedules.image[place], program.schedules.image[:place]
        assert isinstance(loop, Loop)
        assert loop.update
        self.body, self.velocity = loop.body, loop.update[1]
        timed: list[Any] = []
        written: set[str] = set()
        for call in before:
            assert isinstance(call, Call)
            sources = {s for n in program.stages[call.stage].inputs for s in call.sources(n)}
            if any(s.startswith("steps.") for s in sources) or sources & written:
                timed.append(call)
                written |= {call.target(o) for o in program.stages[call.stage].outputs}
            else:
                self.painter.call(call)
        self.timed = timed

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: float, guided: bool) -> tuple[Tensor, Tensor | None]:
        return self.velocity_at(x, torch.tensor(t), guided)

    def velocity_at(self, x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        sampler = self.painter
        sampler.values |= {"steps.time": (t.double() * self.scale).float()[None], "latents": x}
        for call in self.timed:
            sampler.call(call)
        sampler.lanes = self.count * (2 if guided else 1)
        for call in self.body:
            sampler.call(call)
        sampler.lanes = 2 * self.count
        velocity = sampler.values[self.velocity]
        return velocity[: self.count], velocity[self.count :] if guided else None
