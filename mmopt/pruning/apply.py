"""Puts pruning at a site into a Program, and counts what that saves."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from mmopt.ir.inspect import inspect
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.pruning.language_sites import language_sites, narrow_language
from mmopt.pruning.positions import carry_places, count_rows
from mmopt.pruning.propagate import ImageRows, NotApplicable, PrunePropagator
from mmopt.pruning.prune import choose, scale_down
from mmopt.pruning.sites import RESIZE, PruneSite, image_sites, image_stages


def find_sites(program: Program) -> list[PruneSite]:
    """Where a program could do with fewer rows of an image, from its pixels to the layers of the language model."""
    return [*image_sites(program), *language_sites(program)]


def cost(program: Program, beside: Program | None = None, images: int = 1) -> float:
    """FLOPs of the images of a typical prompt and of reading it: up to the first new token of a sample.

    beside: a program whose prompt has as much text, however few rows its images take.
    """
    info = program.info
    fewer = (beside.info.tokens_per_image - info.tokens_per_image) * images if beside else 0
    found = inspect(program, batch=1, images=images, new_tokens=1, context=info.context - fewer)["totals"]
    return float(found.get("encode_flops_per_image", 0) * images + found["prefill_flops"])


def compress(program: Program, site: PruneSite, kept: int, method: str, position_ids: str = "keep") -> Program:
    """`kept` rows of each image from a site on. NotApplicable says why that cannot be done there."""
    if site.stage not in image_stages(program):
        return narrow_language(program, site, kept, method)
    made = program.copy()
    if method == RESIZE:
        cuts = {site.nodes[0]: scale_down(kept, made.weights)}
    else:
        counts = zip(site.nodes, site.counts(kept), strict=True)
        cuts = {node: choose(count, method, made.weights) for node, count in counts}
    runs: dict[str, PrunePropagator] = {}
    results: dict[str, list[Node]] = {}
    border: dict[str, tuple[str, ImageRows]] = {}  # value -> the stage that makes it, and its rows
    for name in image_stages(program):
        stage = program.stages[name]
        given = {n: border[k][1] for k, n in stage.input_nodes().items() if k in border}
        run = PrunePropagator(stage.graph, given, cuts if name == site.stage else None)
        values = run.run()
        border |= {k: (name, run.rows[n]) for k, n in stage.output_nodes().items() if n in run.rows}
        if name == site.stage or any(r.new is not None for r in given.values()):
            runs[name], results[name] = run, values
    border = {k: found for k, found in border.items() if found[1].new is not None}
    if "image_rows" in border:
        if program.info.cache_delta:
            raise NotApplicable("rows of images were left out inside the language model before")
        name, rows = border["image_rows"]
        at = program.stages[name].outputs.index("image_rows")
        if program.info.cross:
            count_rows(made, rows)
        elif position_ids == "keep":
            results[name][at] = carry_places(made, runs[name].b, results[name][at], rows)
        else:
            tokens = made.info.tokens_per_image + int(rows.size - rows.count)
            made.info = replace(made.info, tokens_per_image=tokens)
    made.stages |= finish(program, runs, results, border)
    return made


def finish(
    program: Program,
    runs: dict[str, PrunePropagator],
    results: dict[str, list[Node]],
    border: dict[str, tuple[str, ImageRows]],
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
