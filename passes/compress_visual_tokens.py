"""Fewer rows of each image: the rest of its stages, and the language model, do with `keep` of them.

Places are found by data flow (`mmopt.visual_places`), methods are plain functions of rows (`mmopt.selection`); what
follows from fewer rows, tables of positions and keys of attention, is worked out by `mmopt.narrowing`. The number of
rows is fixed when the pass runs, so all shapes stay what they were in kind, and engines stay static.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from mmopt.contracts import random_inputs
from mmopt.inspection import inspect
from mmopt.language_places import inside_places, narrow_language
from mmopt.narrowing import Narrower, RefusedError, Rows
from mmopt.program import Program, Stage
from mmopt.rewriting import Pass, Report
from mmopt.row_positions import carry_places, count_rows
from mmopt.selection import METHODS
from mmopt.visual_places import PIXELS, Place, choose, image_places, image_stages, scale_down

RESIZE = "resize"  # the method at pixels: a smaller image
POSITIONS = ("keep", "renumber")


class CompressVisualTokens(Pass):
    """keep: share of an image's rows that stay at `place`, more than 0, at most 1 (nothing is changed).

    method: one of `mmopt.selection.METHODS`, or "resize" at place "pixels". place: a name of `find_places`, by default
    all attentions of the tower, each leaving out some rows, which with this method lost least where it was measured; if
    there are none, where the last stage of the images leaves them. positions: "keep" those that rows of the language
    model had before, or "renumber" them without gaps, which destroys grounding (GAP, arXiv:2506.21873).
    least_saving: share of the FLOPs of an image and its prompt that must be saved, else the place is refused.
    """

    contract = "approximate"

    def __init__(
        self,
        keep: float = 0.25,
        method: str = "dominant",
        place: str | None = None,
        positions: str = "keep",
        least_saving: float = 0.02,
    ):
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
            raise ValueError(f"keep is {keep!r}, expected a share of the rows, more than 0 and at most 1")
        if method not in METHODS and method != RESIZE:
            raise ValueError(f"method is {method!r}, expected {RESIZE} or one of {', '.join(METHODS)}")
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}, expected {' or '.join(POSITIONS)}")
        self.keep, self.method, self.place, self.positions = keep, method, place, positions
        self.least_saving = least_saving

    def run(self, program: Program, report: Report) -> Program:
        if self.keep == 1:
            report.skip("program", "keep is 1: every row stays")
            return program
        places = {p.name: p for p in find_places(program)}
        if self.place is not None and self.place not in places:
            raise ValueError(f"place is {self.place!r}, expected one of {', '.join(places) or '(there are none)'}")
        if not places:
            report.skip("program", "no stage makes rows of an image that it could do without")
            return program
        place = places[self.place or default_place(places)]
        kept = max(1, round(self.keep * place.rows))
        if (self.method == RESIZE) != (place.name == PIXELS):
            report.skip(place.name, f"method {self.method} is not for this place")
            return program
        try:
            made = compress(program, place, kept, self.method, self.positions)
        except RefusedError as e:
            report.skip(place.name, str(e))
            return program
        before, after = cost(program), cost(made, program)
        saved = 1 - after / before
        if saved < self.least_saving:
            report.skip(
                place.name,
                f"{kept} of {place.rows} rows would save {saved:.2%} of the FLOPs of an image and its prompt, "
                f"less than {self.least_saving:.0%}",
            )
            return program
        report.did(
            f"{place.name}: {kept} of {place.rows} rows of an image stay, by {self.method}; {saved:.0%} fewer FLOPs "
            f"up to the first token ({before / 1e9:.4g} to {after / 1e9:.4g} G)"
        )
        for other in places.values():
            if other is not place:
                report.skip(other.name, f"not asked for ({other.rows} rows)")
        return made

    def drift(self, before: Program, after: Program) -> str:
        """Of the logits after random images and prompts: what matters is measured by a task (`mmopt.quality`)."""
        errors, same = [], 0
        for size in (0, 1):
            inputs = random_inputs(before, size, 0)
            a, b = (p(**inputs)["logits"][:, -1].float() for p in (before, after))
            errors += ((a - b).norm(dim=-1) / a.norm(dim=-1)).tolist()
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
        return (
            f"last logits of {len(errors)} random prompts differ by {sum(errors) / len(errors):.3g} of their norm, the "
            f"likeliest id is the same in {same}"
        )


def default_place(places: Mapping[str, Place]) -> str:
    spread = [p.name for p in places.values() if len(p.nodes) > 1]
    return spread[0] if spread else [p.name for p in places.values() if p.name == p.stage][-1]


def find_places(program: Program) -> list[Place]:
    """Where a program could do with fewer rows of an image, from its pixels to the layers of the language model."""
    return [*image_places(program), *inside_places(program)]


def cost(program: Program, beside: Program | None = None, images: int = 1) -> float:
    """FLOPs of the images of a typical prompt and of reading it: up to the first new token of a sample.

    beside: a program whose prompt has as much text, however few rows its images take.
    """
    info = program.info
    fewer = (beside.info["rows_per_image"] - info["rows_per_image"]) * images if beside else 0
    found = inspect(program, batch=1, images=images, new_tokens=1, context=info["context"] - fewer)["totals"]
    return float(found.get("encode_flops_per_image", 0) * images + found["prefill_flops"])


def compress(program: Program, place: Place, kept: int, method: str, positions: str = "keep") -> Program:
    """`kept` rows of each image from a place on. RefusedError says why that cannot be done there."""
    if place.stage not in image_stages(program):
        return narrow_language(program, place, kept, method)
    made = program.copy()
    if method == RESIZE:
        cuts = {place.nodes[0]: scale_down(kept, made.weights)}
    else:
        counts = zip(place.nodes, place.counts(kept), strict=True)
        cuts = {node: choose(count, method, made.weights) for node, count in counts}
    runs: dict[str, Narrower] = {}
    results: dict[str, list[Node]] = {}
    border: dict[str, tuple[str, Rows]] = {}  # value -> the stage that makes it, and its rows
    for name in image_stages(program):
        stage = program.stages[name]
        given = {n: border[k][1] for k, n in stage.input_nodes().items() if k in border}
        run = Narrower(stage.graph, given, cuts if name == place.stage else None)
        values = run.run()
        border |= {k: (name, run.rows[n]) for k, n in stage.output_nodes().items() if n in run.rows}
        if name == place.stage or any(r.new is not None for r in given.values()):
            runs[name], results[name] = run, values
    border = {k: found for k, found in border.items() if found[1].new is not None}
    if "image_rows" in border:
        if program.info.get("rows_left_out_late"):
            raise RefusedError("rows of images were left out inside the language model before")
        name, rows = border["image_rows"]
        at = program.stages[name].outputs.index("image_rows")
        if program.info.get("cross"):
            count_rows(made, rows)
        elif positions == "keep":
            results[name][at] = carry_places(made, runs[name].b, results[name][at], rows)
        else:
            made.info["rows_per_image"] += int(rows.size - rows.count)
    made.stages |= finish(program, runs, results, border)
    return made


def finish(
    program: Program,
    runs: dict[str, Narrower],
    results: dict[str, list[Node]],
    border: dict[str, tuple[str, Rows]],
) -> dict[str, Stage]:
    """The stages, last to first: what a stage reads beside rows (their places, their sizes), an earlier one gives."""
    stages: dict[str, Stage] = {}
    wanted: set[str] = set()
    for name in reversed(runs):
        run, old = runs[name], program.stages[name]
        outputs, values = list(old.outputs), list(results[name])
        for k, (maker, rows) in border.items():
            for kind in ("places", "sizes"):
                if maker == name and f"{k}_{kind}" in wanted:
                    outputs.append(f"{k}_{kind}")
                    values.append(getattr(rows, kind))
        run.b.output(values)
        names = {str(n.target): k for k, n in old.input_nodes().items()}
        inputs = []
        for n in [n for n in run.b.graph.nodes if n.op == "placeholder"]:
            if str(n.target) in names:
                inputs.append(names[str(n.target)])
            elif n.users:
                inputs.append(str(n.target))
                wanted.add(str(n.target))
            else:
                run.b.graph.erase_node(n)
        stages[name] = Stage(run.b.graph, inputs, outputs)
    return stages
