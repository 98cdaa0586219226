"""Recorded paintings at every point of the line: run them, and lay what comes out beside the recording."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmopt.conformance.case import GenerationCase
from mmopt.conformance.read_generation import AT_STEPS, parts
from mmopt.spec.flow_sampler import Samples, lay_out, levels

if TYPE_CHECKING:
    from mmopt.conformance.case import Case
    from mmopt.conformance.run_program import Pairs
    from mmopt.frontend.load import Model
    from mmopt.ir.program import Program


class Watch:
    """Keeps what a painting makes: each step's times and velocities, all else of its first and last step.

    It observes the stages of a Program or of an engine; a plain model tells it values by name (`keep`).
    """

    def __init__(self, steps: int):
        self.steps, self.trip = steps, 0
        self.made: dict[str, dict[int, Tensor]] = {}

    def __call__(self, phase: str, call: Any, made: dict[str, Any], chunk: Any = None) -> None:
        loop_end = False
        for output, value in made.items():
            name = call.target(output)
            loop_end |= name == "velocity"
            if name.startswith("steps."):  # made for all steps at once
                for trip in range(len(value)):
                    self.keep(name.removeprefix("steps."), value[trip : trip + 1], trip)
            else:
                self.keep(name, value, self.trip)
        self.trip += loop_end

    def keep(self, name: str, value: Any, trip: int) -> None:
        if name in ("velocity", "time_row", "prompt.text") or (name in AT_STEPS and trip in (0, self.steps - 1)):
            copied = value.clone() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
            self.made.setdefault(name, {})[trip] = copied


def at_point(point: str, made: Any, case: Case) -> Pairs:
    """A painting at a point after the model; made: the Program or the Engine that stands there."""
    return at_engine(made, case) if point == "engine" else at_program(made, case)


def at_model(model: Model, case: Case) -> Pairs:
    """The module's own `paint`, the plain loop of the reference, then `decode_image` where it has a decoder."""
    painting, module = _of(case), model.module
    steps, latents, times = painting.plan.evaluations, [], []
    watch = Watch(steps)

    def observe(step: int, made: dict[str, Tensor]) -> None:
        latents.append(made["latents"])
        times.append(made["time"])
        watch.keep("velocity", torch.cat([made["cond"], made["uncond"]]), step)
        for name in ("time_row", "skip", "tokens", "hidden"):
            watch.keep(name, made[name], step)

    watch.keep("prompt.text", module.embed(torch.from_numpy(painting.samples.ids)), 0)
    z = module.generate_images(painting.prompts, painting.noise, steps, painting.plan.guidance, observe)
    whole = {"latents": torch.stack(latents), "times": torch.cat(times), "seen": painting.seen}
    if "decode_image" in model.family.stages(module, 1):
        whole["image"] = module.decode_image(z)
        whole["levels"] = torch.from_numpy(levels(whole["image"].numpy()))
    return lay_beside(case, watch, whole, painting.samples)


def at_program(program: Program, case: Case) -> Pairs:
    painting = _of(case)
    watch = Watch(painting.plan.evaluations)
    made = program.generate_images(painting.prompts, painting.noise, painting.plan, watch)
    samples = lay_out(painting.prompts, program.info.required_flow, program.info.context, program.info.vocab_size)
    seen = None if program.info.required_flow.compact else painting.seen
    whole = {"latents": made["trajectory"], "image": made.get("image"), "seen": seen}
    if made.get("image") is not None:
        whole["levels"] = torch.from_numpy(levels(made["image"].numpy()))
    return lay_beside(case, watch, whole, samples)


def at_engine(engine: Any, case: Case) -> Pairs:
    painting = _of(case)
    watch = Watch(painting.plan.evaluations)
    made = engine.generate_images(
        painting.prompts, solver=painting.plan, noise=painting.noise.numpy(), trajectory=True, observe=watch
    )
    whole = {"latents": torch.from_numpy(np.stack(made.trajectory))}
    if made.pixels is not None:
        whole["image"] = torch.from_numpy(made.pixels)
        whole["levels"] = torch.from_numpy(np.stack([np.asarray(i) for i in made.pictures]))
    return lay_beside(
        case,
        watch,
        whole,
        lay_out(painting.prompts, engine.info.required_flow, engine.info.context, engine.info.vocab_size),
    )


def _of(case: Case) -> GenerationCase:
    assert case.generation is not None
    return case.generation


# ------------------------------------------------------------------------------------------------- laying side by side
def lay_beside(case: Case, watch: Watch, whole: dict[str, Tensor | None], samples: Samples) -> Pairs:
    """Pair a painting with the recording. whole: values of the whole painting; samples: as they were laid out."""
    painting, pairs = _of(case), {}
    plan = painting.plan
    whole = {
        "times": torch.tensor(plan.times * painting.flow.time_scale, dtype=torch.float32),
        "interval": torch.tensor([plan.cond[0, 0] + plan.uncond[0, 0]], dtype=torch.float32),
    } | whole
    for name, wanted in case.outputs.items():
        where, value = parts(case.mean(name))
        if value == "prefix" and (text := watch.made.get("prompt.text")):
            pairs[name] = _prompt_rows(painting, text[0], samples), wanted[painting.seen[:, : wanted.shape[1]]]
        elif not where and whole.get(value) is not None:
            pairs[name] = whole[value], wanted
        elif value in AT_STEPS:
            trips = {"first": [0], "last": [plan.evaluations - 1]}.get(where, range(plan.evaluations))
            found = [_at_step(painting, watch, value, k) for k in trips]
            if all(x is not None for x in found):
                pairs[name] = _pair(painting, value, found[0] if where else torch.stack(found), wanted)
    return pairs


def _at_step(painting: GenerationCase, watch: Watch, value: str, trip: int) -> Tensor | None:
    kind, _, part = value.partition(".")
    made = watch.made.get(kind, {}).get(trip)
    if made is None or not part:
        return made if value != "time_row" or made is None else made[0, 0]
    cond, uncond = made.split(len(painting.noise))
    weight = painting.plan.guidance
    return {"cond": cond, "uncond": uncond, "guided": weight * cond - (weight - 1) * uncond}[part]


def _pair(painting: GenerationCase, value: str, ours: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Values that both halves of the guidance share stand for both; rows that are hidden are left out."""
    if value in ("skip", "tokens") and len(wanted) == 2 * len(ours):
        ours = torch.cat([ours, ours])
    if value == "hidden" and wanted.dim() == 3 and wanted.shape[1] == painting.rows and len(ours) == len(wanted):
        seen = painting.seen[:, -ours.shape[1] :]
        return ours[seen], wanted[:, -ours.shape[1] :][seen]
    return ours, wanted


def _prompt_rows(painting: GenerationCase, text: Tensor, samples: Samples) -> Tensor:
    """The rows of the prompts that are seen, of rows as a point lays them out."""
    length = torch.from_numpy(samples.end - samples.begin)[:, None]
    return text[torch.from_numpy(samples.seen)[:, : text.shape[1]] & (torch.arange(text.shape[1]) < length)]
