"""Recorded paintings: prompts and noise in, latents after each step and images out, at every point of the line.

The names used here, for all families. A painting of G images has 2 G samples, the G conditional ones first.

- ``in.paint.noise`` ``[G, c, h, w]``; ``in.paint.prompt`` ``[L]`` or ``[G, L]`` ids and ``in.paint.samples``
  ``[2 G, L]`` (with padding), one of which will do; ``in.paint.seen`` ``[2 G, L + rows]``: rows that are not hidden;
- ``out.paint.times`` ``[S]`` as the model is given them, ``interval`` ``[1]``, ``time_row`` ``[S, hidden]``,
  ``latents`` ``[S, G, ...]`` after each step, ``velocity.cond``, ``.uncond`` and ``.guided`` ``[S, G, ...]``;
- ``out.paint.first.*`` and ``last.*``: of the first and the last step the velocities, ``skip``, ``tokens``, ``hidden``
  and ``decoder_rows`` (what goes from the language model to the decoder, as a grid);
- ``out.paint.prefix`` (embedded prompts without their last id), ``decoder_latents``, ``image``, ``levels`` (of 8 bits).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mmopt.conformance.case import GenerationCase
from mmopt.spec.flow_sampler import lay_out
from mmopt.spec.model_info import Flow
from mmopt.spec.solvers import make_plan

if TYPE_CHECKING:
    from mmopt.conformance.case import Case

NAME = re.compile(r"out\.paint\.(?:(first|last)\.)?(\S+)")

VELOCITIES = ("velocity.cond", "velocity.uncond", "velocity.guided")

AT_STEPS = ("time_row", *VELOCITIES, "skip", "tokens", "hidden", "decoder_rows")

WHOLE = ("times", "interval", "latents", "seen", "prefix", "decoder_latents", "image", "levels")

REASONS = (  # the first that fits: (points, values, reason)
    ("model", "", "the model made no such value from these inputs"),
    ("optimized engine", "seen", "rows that are hidden are left out of the prompt"),
    ("program optimized engine", "", "an internal value, not visible at this point"),
)


# ----------------------------------------------------------------------------------------------------------- reading
def read_generation(case: Case, given: dict[str, Tensor], given_flow: tuple[Flow, int] | None) -> None:
    """Make a case a painting. given_flow: of the model, and its vocabulary's size. Raises ValueError."""
    name, noise = case.name, given["in.paint.noise"]
    if given_flow is None:
        raise ValueError(f"{name}: it is a painting, but this model generates no images")
    flow, vocab_size = given_flow
    if noise.dim() != 4 or tuple(noise.shape[1:]) != tuple(flow.latents) or not len(noise):
        wanted = ", ".join(map(str, flow.latents))
        raise ValueError(f"{name}: expected noise of shape (images, {wanted}), found {tuple(noise.shape)}")
    prompts = _prompts(case, given, len(noise))
    try:
        samples = lay_out(prompts, flow, max(map(len, prompts)) + flow.tokens, vocab_size)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e
    plan = make_plan("euler", _steps(case), guidance=_guidance(case))
    plan = replace(plan, guided=np.ones(plan.evaluations, bool))  # the reference makes both passes whatever the weight
    case.generation = GenerationCase(prompts, noise.float(), plan, samples, flow)


def _prompts(case: Case, given: dict[str, Tensor], count: int) -> list[list[int]]:
    prompt, ids, seen = (given.get(f"in.paint.{k}") for k in ("prompt", "samples", "seen"))
    if prompt is not None and (prompt.dim() not in (1, 2) or (prompt.dim() == 2 and len(prompt) != count)):
        raise ValueError(f"{case.name}: expected one prompt, or one for each of {count} images, found {prompt.shape}")
    told = None if prompt is None else prompt.expand(count, -1).tolist()
    if ids is None:
        if told is None:
            raise ValueError(f"{case.name}: expected the ids of a prompt, found {', '.join(given)}")
        return told
    if ids.dim() != 2 or len(ids) != 2 * count:
        raise ValueError(
            f"{case.name}: expected ids of {2 * count} samples for {count} images, found {tuple(ids.shape)}"
        )
    if seen is not None and (seen.dim() != 2 or len(seen) != len(ids) or seen.shape[1] < ids.shape[1]):
        raise ValueError(f"{case.name}: expected a mask of {len(ids)} samples and all rows, found {tuple(seen.shape)}")
    made = []
    for b in range(count):
        hidden = [] if seen is None else (seen[b, : ids.shape[1]] == 0).tolist()
        lead = next((i for i, h in enumerate(hidden) if not h), 0)
        made.append(ids[b, lead:].tolist())
        if int(ids[count + b, lead]) != made[b][0]:
            raise ValueError(
                f"{case.name}: expected unconditional sample {b} to begin as its prompt does, with id {made[b][0]}, "
                f"found {int(ids[count + b, lead])}"
            )
    if told is not None and told != made:
        raise ValueError(f"{case.name}: the prompt {told} and the ids of the samples {made} are not the same")
    return made


def _steps(case: Case) -> int:
    for mean in ("times", "latents", "time_row", *VELOCITIES):
        for x in case.recorded(f"out.paint.{mean}").values():
            return len(x)
    if (steps := case.settings.get("steps")) is None:
        raise ValueError(f"{case.name}: expected times or latents of each step, or a meta.json that tells how many")
    return int(steps)


def _guidance(case: Case) -> float:
    """The weight that was told, or the one that the recorded velocities have: guided = w cond - (w - 1) uncond."""
    if "guidance" in case.settings:
        return float(case.settings["guidance"])
    for where in ("", "first.", "last."):
        found = [
            x.double()
            for k in ("cond", "uncond", "guided")
            for x in case.recorded(f"out.paint.{where}velocity.{k}").values()
        ]
        if len(found) == 3 and len({x.shape for x in found}) == 1:
            apart = found[0] - found[1]
            large = (apart.abs() >= apart.abs().median()) & (apart != 0)  # where rounding is least
            if bool(large.any()):
                weight = float(((found[2] - found[1])[large] / apart[large]).median())
                near = round(weight, 3)
                return near if abs(weight - near) < 2e-5 * max(1.0, abs(weight)) else weight
    raise ValueError(f"{case.name}: expected a meta.json that tells its guidance, or velocities that show it")


# ---------------------------------------------------------------------------------------- what is allowed, and left out
def parts(mean: str) -> tuple[str, str]:
    """first, last or nothing, and the value that a name is of."""
    match = NAME.fullmatch(mean)
    return (match[1] or "", match[2]) if match else ("", "")


def allowance(case: Case, mean: str) -> float:
    """By how much larger than elsewhere an error may be: guidance w adds those of both velocities, |w| + |w - 1| fold.

    A family's tolerance is meant for w = 2, where that is 3; states and pictures show it beyond w = 5 only.
    """
    if case.generation is None:
        return 1.0
    grown = abs(case.generation.plan.guidance) + abs(case.generation.plan.guidance - 1)
    value = parts(mean)[1]
    if value == "velocity.guided":
        return max(1.0, grown / 3)
    return max(1.0, grown / 9) if value in ("latents", "image", "decoder_latents", *VELOCITIES) else 1.0


def why_not(point: str, mean: str, decodes: bool) -> str:
    """Why an output of a painting is not compared at a point. decodes: the model has a decoder of images."""
    where, value = parts(mean)
    if value not in (AT_STEPS if where else (*WHOLE, *AT_STEPS)):
        return "not an output that this version knows"
    if value in ("decoder_latents", "image", "levels") and not decodes:
        return "this model has no decoder of images"
    return next(why for points, only, why in REASONS if point in points.split() and only in ("", value))


def guided(case: Case) -> dict[str, str]:
    """Recorded velocities that guidance made -> why they are not judged in half precision."""
    why = "guidance multiplies the rounding of its two parts, which are compared"
    return {k: why for k in case.outputs if case.generation and parts(case.mean(k))[1] == "velocity.guided"}


def left_out(case: Case, point: str, name: str) -> tuple[str, str] | None:
    """Which rows of an output that is compared are not, and why."""
    value = case.mean(name).rpartition(".")[2]
    if value == "hidden" and point in ("optimized", "engine"):
        return f"{name}, rows of the prompt", "no one reads them: they are not made again at each step"
    if value in ("hidden", "prefix"):
        return f"{name}, hidden rows", "no one reads them: they stand behind the mask"
    return None
