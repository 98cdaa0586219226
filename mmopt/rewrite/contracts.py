"""Equality of two Programs on fresh random inputs; the tolerances of every contract stand in one table here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from mmopt.ir.graph import EMBEDDING, aten, shape_of
from mmopt.ir.program import Program
from mmopt.spec.solvers import make_plan

# A pass may change the order of additions, so equal means: |a - b| <= rtol * (rms of the value) * 10 at the worst
# element and rtol * rms on average. Half precision accumulates rounding through all layers.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}

BUDGET = 2e12  # FLOPs of one check; larger programs are checked only when asked for


class ContractError(RuntimeError):
    """A pass broke its promise. ``program`` is the last good Program."""

    def __init__(self, message: str, program: Program):
        super().__init__(message)
        self.program = program


@dataclass(frozen=True)
class Difference:
    stage: str
    output: str
    node: str
    error: float
    allowed: float

    def __str__(self) -> str:
        where = f"stage {self.stage}, output {self.output} (node {self.node})"
        return f"{where}: error {self.error:.3g}, allowed {self.allowed:.3g}"


def drawn_weights(program: Program, seed: int) -> dict[str, Tensor]:
    """The weights; those that are all zero or all one are drawn anew.

    A gate that starts at zero would hide what lies behind it, a gain of one that it was forgotten.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, w in program.weights.items():
        if w.is_floating_point() and any(bool((w == v).all()) for v in (0, 1)):
            w = (torch.randn(w.shape, generator=g) * 0.5).to(w.dtype)
        drawn[name] = w
    return drawn


def random_inputs(program: Program, size: int, seed: int) -> dict[str, Any]:
    """Prompts (none, one and several images, unequal lengths), pixels and forced tokens for one check.

    Size 0 is one sample; size 1 a batch of unequal ones, as far as the program's limits allow.
    """
    g = torch.Generator().manual_seed(seed * 1000 + size)
    info = program.info

    def text(n: int) -> list[int]:
        ids = torch.randint(3, info.vocab_size, (n,), generator=g).tolist()
        return [3 + (t - 2) % (info.vocab_size - 3) if t == info.image_id else t for t in ids]

    image = [info.image_id]
    spare = info.context - 4
    shapes: list[list[list[int]]] = [[text(3), image, text(6)]]
    if size:
        shapes = [[text(2), image, text(5)], [text(7)], [text(1), image, text(2), image, text(4)]]
    prompts = []
    for parts in shapes:
        prompt: list[int] = []
        images = rows = 0
        for part in parts:
            need = info.tokens_per_image if part == image else len(part)
            reach = rows + need + (images + (part == image)) * info.position_delta
            if (part == image and images >= info.images) or rows + need > spare:
                continue
            if info.positions is not None and reach > info.positions - 4:
                continue
            prompt += part
            images, rows = images + (part == image), rows + need
        prompts.append(prompt if prompt and prompt[-1] != info.image_id else [*prompt, *text(1)])
    prompts = prompts[: info.batch]
    count = sum(t == info.image_id for p in prompts for t in p)
    inputs: dict[str, Any] = {"prompts": prompts, "max_new_tokens": 3, "ignore_eos": True}
    inputs["forced"] = torch.tensor([text(3) for _ in prompts])
    if info.cross and count == len(prompts) == 1 and len(prompts[0]) + 3 <= spare:
        prompts[0] += [*image, *text(2)]  # a marker more than images: text after it sees none of them
        inputs["images"] = [1]
        inputs["forced"][0, 0] = info.image_id
    if count:
        stage = next(s for s in program.stages.values() if "pixel_values" in s.inputs)
        made, frames = {}, min(1 + size, info.max_frames or 1 + size)
        for name, node in stage.input_nodes().items():
            shape: list[int] = [count, *(frames if str(s) == "F" else s for s in node.meta["shape"][1:])]
            dtype = node.meta["dtype"]
            if dtype.is_floating_point:
                made[name] = torch.randn(shape, generator=g)
            else:
                made[name] = torch.randint(0, index_limit(node) or 2, shape, generator=g).to(dtype)
        inputs["pixel_values"] = made.pop("pixel_values")
        if made:
            inputs["image_inputs"] = made
        if info.cross and info.cross.tiles > 1:
            inputs["tiles"] = torch.randint(1, info.cross.tiles + 1, (count,), generator=g).tolist()
    return inputs


def index_limit(node: Node) -> int | None:
    """How many rows the tables have that an input is an index into; None if it is none."""
    tables = [int(shape_of(u.args[0])[0]) for u in node.users if u.target is EMBEDDING and u.args[1] is node]
    return min(tables, default=None)


def with_weights(program: Program, weights: dict[str, Tensor]) -> Program:
    """The Program on other weights, with none of the constants that were computed from its own."""
    made = program.copy()
    made.weights = {k: weights[k] for k in program.weights}
    made.stages = {k: s.replaced(s.graph) for k, s in program.stages.items()}
    return made


def record(program: Program, weights: dict[str, Tensor], inputs: dict[str, Any]) -> list[tuple[str, str, str, Tensor]]:
    """Every stage output of one run: (stage, output, node, value). Caches only up to the rows in use."""
    rows: list[tuple[str, str, str, Tensor]] = []
    run = with_weights(program, weights)

    def observe(phase, call, made, chunk):
        nodes = run.stages[call.stage].output_nodes()
        for name, value in made.items():
            rows.append((call.stage, name, nodes[name].name, value.clone()))

    run(**inputs, observe=observe)
    return rows


def compare(before: Program, after: Program, seed: int = 0) -> Difference | None:
    """The first difference between two Programs over two sizes of random inputs, or None.

    Values are paired by stage and name in the order they are made. One that holds fewer rows after a pass is compared
    on its last rows. In half precision rounding decides between numbers that are nearly equal, so there choices are not
    compared, only what they are made from.
    """
    half = before.dtype != torch.float32
    choose = {
        k for k, s in before.stages.items() if half and any(n.target is aten.argmax.default for n in s.graph.nodes)
    }
    weights = drawn_weights(before, seed) | {k: w for k, w in after.weights.items() if k not in before.weights}
    for size in (0, 1):
        inputs = random_inputs(before, size, seed)
        reference: dict[tuple[str, str, int], Tensor] = {}
        counts: dict[tuple[str, str], int] = {}

        def key(stage: str, name: str, counts: dict) -> tuple[str, str, int]:
            counts[stage, name] = counts.get((stage, name), 0) + 1
            return stage, name, counts[stage, name]

        for stage, name, _, value in record(before, weights, inputs):
            reference[key(stage, name, counts)] = value
        counts = {}
        missing = dict(reference)
        for stage, name, node, value in record(after, weights, inputs):
            place = key(stage, name, counts)
            missing.pop(place, None)
            if place not in reference or (stage in choose and not value.is_floating_point()):
                continue
            expected = reference[place]
            if value.dim() > 1 and value.shape[1] < expected.shape[1]:
                expected = expected[:, -value.shape[1] :]
            found = difference(expected, value)
            if found is not None:
                return Difference(stage, name, node, *found)
        for stage, name, _ in missing:
            return Difference(stage, name, "no longer made", float("inf"), 0.0)
        paints = (
            before.schedules.image and before.info.context - before.info.required_flow.tokens >= 2
        )  # else no image fits
        if paints and (wrong := compare_generation(before, after, weights, size, seed)):
            return wrong
    return None


def compare_generation(
    before: Program, after: Program, weights: dict[str, Tensor], size: int, seed: int
) -> Difference | None:
    """The first difference of a velocity or the image, over two guided steps and one that is not.

    What else the stages make may change with the number of samples and of calls.
    """
    g = torch.Generator().manual_seed(seed * 1000 + size)
    rows = before.info.context - before.info.required_flow.tokens
    lengths = [min(rows, n) for n in ((6,), (2, 7, 4))[size]]
    prompts = [torch.randint(0, before.info.vocab_size, (n,), generator=g).tolist() for n in lengths]
    noise = torch.randn(len(prompts), *before.info.required_flow.latents, generator=g)
    plan = make_plan("euler", 3, guidance=3.0)
    uncond = np.array(plan.uncond)
    uncond[:, 2] = 0  # the last evaluation is made without the unconditional pass
    plan = dataclasses.replace(plan, uncond=uncond, guided=np.array([True, True, False]))
    values = []
    for program in (before, after):
        found: list[tuple[str, str, str, Tensor]] = []
        run = with_weights(program, weights)

        def observe(phase, call, made, chunk, run=run, found=found):
            for name in ("velocity", "image"):
                if name in made:
                    node = run.stages[call.stage].output_nodes()[name]
                    found.append((call.stage, name, node.name, made[name].clone()))

        run.generate_images(prompts, noise, plan, observe)
        values.append(found)
    for (_, _, _, expected), (stage, name, node, value) in zip(*values, strict=True):
        if wrong := difference(expected, value, before.dtype):
            return Difference(stage, name, node, *wrong)
    return None


def difference(expected: Tensor, value: Tensor, made_in: torch.dtype | None = None) -> tuple[float, float] | None:
    """(error, allowed) if two values differ by more than the table allows for their dtype.

    `made_in`: the dtype of what they were made from, where theirs is a wider one.
    """
    if expected.shape != value.shape or expected.dtype != value.dtype:
        return float("inf"), 0.0
    if not expected.is_floating_point():
        return None if torch.equal(expected, value) else (float("inf"), 0.0)
    if expected.numel() == 0:
        return None
    e, v = expected.double(), value.double()
    scale = float(e.square().mean().sqrt()) or 1.0
    allowed = TOLERANCE[made_in or expected.dtype] * scale
    error = float((e - v).abs().max())
    mean = float((e - v).abs().mean())
    if not (error <= 10 * allowed and mean <= allowed):  # written so that nan fails
        return error, 10 * allowed
    return None


def why_unchecked(program: Program) -> str | None:
    """None if comparing Programs is affordable, else the reason why it is left out."""
    if not program.has_weights:
        return "shapes only, no weights"
    values = sum(w.numel() for w in program.weights.values())
    flops = 2.0 * values * 2 * 2 * (3 * program.info.tokens_per_image + 40)
    if program.schedules.image:  # three steps of one and of three images, in two halves
        flops += 2.0 * values * 2 * 3 * 4 * 2 * program.info.required_flow.tokens
    if flops > BUDGET:
        return f"about {flops / 1e12:.0f} TFLOP, more than {BUDGET / 1e12:.0f}; ask for it with check=True"
    return None
