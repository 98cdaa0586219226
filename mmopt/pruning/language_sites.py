"""Sites inside a language model whose images lie among the text: rows that its later layers do without.

Its first layers read all rows of an image, and choose; what they put into their caches stays there. The later layers
hold fewer rows, so their slots are not those of the first: the host says how many rows of images they left out before
a call (`cache_delta`). Positions are those that the rows had, in every layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from mmopt.ir.graph import ADD, ARANGE, EXPAND, MUL, Builder, aten, shape_of, simplify
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.pruning.positions import keep_for_images, told
from mmopt.pruning.propagate import AttentionScores, ImageRows, PruneFn, PrunePropagator
from mmopt.pruning.prune import chosen
from mmopt.pruning.sites import PruneSite, cut_points, follow, image_stages
from mmopt.spec.prompt import LATE
from mmopt.spec.schedule import Loop


class Among(NamedTuple):
    """A language model that reads rows of images: its stage, and which of the `total` rows of an image are patches."""

    stage: str
    patches: ImageRows
    total: int


def among_text(program: Program) -> Among | None:
    """None if images lie outside the text, or nothing is known of their rows."""
    name = next(
        (c.stage for i in program.schedules.text if isinstance(i, Loop) for c in i.body if "visual" in c.rename), None
    )
    last = program.stages[image_stages(program)[-1]] if name else None
    if name is None or last is None or "image_rows" not in last.outputs:
        return None
    rows = follow(program)[image_stages(program)[-1]].rows.get(last.output_nodes()["image_rows"])
    return None if rows is None else Among(name, rows, program.info.tokens_per_image)


def language_sites(program: Program) -> list[PruneSite]:
    """After each attention of the language model but the last."""
    found = among_text(program)
    if found is None or program.info.cache_delta:
        return []
    stage = program.stages[found.stage]
    inputs = stage.input_nodes()
    propagator = PrunePropagator(stage.graph, {inputs["visual"]: visual_rows(inputs["visual"])})
    propagator.run()
    first: dict[int, PruneSite] = {}
    for n, passed in cut_points(propagator, {inputs["visual"], inputs["text"]}):
        site = PruneSite(f"{found.stage}.{passed}", found.stage, found.patches.count, found.patches.grid, (n,))
        first.setdefault(passed, site)
    return [p for passed, p in first.items() if 0 < passed < max(first)]


def visual_rows(visual: Node) -> ImageRows:
    return ImageRows(1, 0, shape_of(visual)[1])


def narrow_language(program: Program, site: PruneSite, kept: int, method: str) -> Program:
    """`kept` rows of each image from a site inside the language model on."""
    found, made = among_text(program), program.copy()
    assert found is not None
    stage = program.stages[found.stage]
    inputs = stage.input_nodes()
    visual, past = inputs["visual"], inputs["past"]
    more = {LATE: (shape_of(past), torch.int64)}
    cut = within(found, kept, method, made.weights, past)
    propagator = PrunePropagator(stage.graph, {visual: visual_rows(visual)}, {site.nodes[0]: cut}, more)
    propagator.b.output(propagator.run())
    made.stages[found.stage] = Stage(propagator.b.graph, [LATE, *stage.inputs], stage.outputs)
    keep_for_images(made, found.stage, stage)
    made.info = replace(made.info, cache_delta=int(found.patches.count - kept))
    made.schedules = made.schedules.replaced(text=tuple(told(i, found.stage, [LATE]) for i in program.schedules.text))
    return made


def within(found: Among, keep: int, method: str, weights: dict[str, Tensor], past: Node) -> PruneFn:
    """A cut on the rows of all images of a call, ``[B, images * total, ...]`` and text after them."""

    def cut(propagator: PrunePropagator, n: Node, held: ImageRows) -> tuple[Node, ImageRows]:
        b, x, total = propagator.b, propagator.env[n], found.total
        batch, images = shape_of(x)[0], simplify(held.count / total)
        patches = replace(found.patches, dim=1, new=None, places=None, sizes=None, matrix=None)

        def each(v: Node) -> Node:
            return b.reshape(b.slice(v, 1, 0, held.count), (batch * images, total, shape_of(v)[2]))

        scored = propagator.scored
        if scored is not None:
            scored = AttentionScores(each(scored.queries), each(scored.keys), scored.heads, patches)
        few, rows = chosen(b, each(x), patches, scored, keep, method, weights)
        new = total - int(patches.count) + keep
        few = b.reshape(few, (batch, images * new, shape_of(x)[2]))
        after = propagator.b.slice(x, 1, held.count, shape_of(x)[1])
        late = propagator.more[LATE]
        propagator.past = b.emit(aten.sub.Tensor, (propagator.env[past], late), shape_of(late), torch.int64)
        places = all_places(b, rows, total, batch, images)
        return b.cat([few, after], 1), replace(held, new=simplify(images * new), places=places)

    return cut


def all_places(b: Builder, rows: ImageRows, total: int, batch: object, images: object) -> Node:
    """Places of the rows that stay of all images, ``[B, images * new]``, those that are no patches among them."""
    assert rows.places is not None
    count = shape_of(rows.places)[0]

    def span(lo: object, hi: object) -> list[Node]:
        n = simplify(hi - lo)  # type: ignore[operator]
        if n == 0:
            return []
        return [b.emit(EXPAND, (b.emit(ARANGE, (lo, hi), (n,), torch.int64), (count, n)), (count, n), torch.int64)]

    own = b.emit(ADD, (rows.places, rows.lo), shape_of(rows.places), torch.int64)
    every = b.cat([*span(0, rows.lo), own, *span(rows.lo + rows.count, total)], 1)
    new = shape_of(every)[1]
    first = b.emit(ARANGE, (0, images), (images,), torch.int64)
    first = b.reshape(b.emit(MUL, (first, total), (images,), torch.int64), (1, images, 1))
    made = b.emit(ADD, (b.reshape(every, (batch, images, new)), first), (batch, images, new), torch.int64)
    return b.reshape(made, (batch, images * new))  # type: ignore[operator]
