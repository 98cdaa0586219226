"""What a image schedule costs, counted on shapes: one image of a prompt, by the reference's number of steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy

from mmopt.ir.cost import Work, count_work
from mmopt.ir.graph import Sizes, shape_of
from mmopt.ir.program import Program
from mmopt.spec.schedule import Call, Cat, Loop, is_cache, table_of

PROMPT = 32  # ids of the typical prompt
Shape = tuple[int, ...]


class Count:
    """Follows the schedule with shapes in place of values."""

    def __init__(self, program: Program, length: int, images: int, steps: int):
        self.program, self.steps, self.images = program, steps, images
        info, flow = program.info, program.info.required_flow
        both = 2 * images
        rows = length - 1
        if length < 2 or rows + 1 + flow.tokens > info.context:
            raise ValueError(
                f"a prompt of {length} ids and an image of {flow.tokens + 1} rows do not fit a context of "
                f"{info.context}: a prompt has at least two ids"
            )
        # (samples, rows of the prompt that are fed) of each half of the guidance
        compact = flow.compact
        self.halves = [(images, rows), (images, 1)] if compact and rows > 1 else [(both, rows)]
        self.values: dict[str, Shape] = {
            "latents": (images, *flow.latents),
            "prompt.ids": (both, rows),
            "prompt.seen": (both, info.context),
            "no_rows": (both, 0, info.hidden_size),
            "steps.time": (steps,),
        }
        self.values |= {k: (both,) for k in ("prompt.begin", "prompt.end", "prompt.offset", "image.offset")}
        for k, (shape, _) in program.state.items():
            if is_cache(k):
                self.values[k] = (both, *(int(s) for s in shape[1:]))
        self.filled = {"prompt.begin": 0}  # rows in the caches, by the value that says so
        self.calls: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        for item in self.program.schedules.image:
            if isinstance(item, Loop):
                for call in item.body:
                    self.call(call, self.steps)
            else:
                self.call(item, 1)
        return self.calls

    def read(self, source: str | Cat) -> Shape:
        if isinstance(source, Cat):
            shapes = [self.read(n) for n in source.names]
            made = [max(s[i] for s in shapes) for i in range(len(shapes[0]))]
            made[source.dim] = sum(s[source.dim] for s in shapes)
            return tuple(made)
        if source.startswith("step."):
            return 1, *self.values[table_of(source)][1:]
        return self.values[source]

    def call(self, call: Call, trips: int) -> None:
        stage = self.program.stages[call.stage]
        sizes: dict[str, int] = {}
        for name, node in stage.input_nodes().items():
            for size, number in zip(shape_of(node), self.read(call.source(name)), strict=True):
                if isinstance(size, sympy.Symbol):
                    sizes[size.name] = max(number, sizes.get(size.name, 0))
        past, cached = call.source("past"), "past" in stage.inputs
        work, rows = Work(), 0
        for samples, fed in self.halves if cached else [(sizes["B"], 0)]:
            own = dict(sizes, B=samples)
            if cached and call.source("text") == "prompt.text" and self.program.info.required_flow.compact:
                own["nt"] = fed
            before = self.filled.get(str(past), fed) if cached else 0
            work = added(work, count_work(stage, own, before))
            rows += samples * (own.get("nv", 0) + own["nt"] if cached else 1)
        made = {"stage": call.stage, "phase": "paint", "rows": rows, "trips": trips}
        self.calls.append(made | dataclasses.asdict(work))
        for name, node in stage.output_nodes().items():
            self.values[call.target(name)] = Sizes(sizes).shape(node)


def added(a: Work, b: Work) -> Work:
    """Two halves of one call: weights are read once."""
    both = {f.name: getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(a)}
    return type(a)(**both | {"weight_bytes": max(a.weight_bytes, b.weight_bytes)})
