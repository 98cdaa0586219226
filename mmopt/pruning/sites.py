"""Where a program can do with fewer visual rows, and what is put there: sites found by data flow, and their cuts."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from mmopt.ir.graph import ATTENTION, CACHED_ATTENTION, CONV2D, RESHAPE, shape_of
from mmopt.ir.program import Program
from mmopt.pruning.propagate import ImageRows, PrunePropagator
from mmopt.spec.schedule import Call

PIXELS = "pixels"  # the site where an image is still one: it can be scaled down there


@dataclass(frozen=True)
class PruneSite:
    """A value that holds the rows of an image, and through which all goes that is made of them.

    name: "vision.3" is after the third attention of stage vision, "vision.all" after each of them, fewer and fewer,
    "vision" is where its rows leave it, "pixels" before they are rows. rows: how many there are, of a grid ``(height,
    width)`` if known.
    """

    name: str
    stage: str
    rows: int
    grid: tuple[int, int] | None
    nodes: tuple[Node, ...]

    def counts(self, kept: int) -> list[int]:
        """How many rows stay after each of `nodes`, the last time `kept`."""
        return [self.rows - round((self.rows - kept) * (i + 1) / len(self.nodes)) for i in range(len(self.nodes))]

    def __str__(self) -> str:
        grid = f" ({self.grid[0]} x {self.grid[1]})" if self.grid else ""
        return f"{self.name}: {self.rows} rows of an image{grid}"


def image_stages(program: Program) -> list[str]:
    """The stages that make rows of pixels, in the order of their calls."""
    return [c.stage for c in itertools.takewhile(lambda c: isinstance(c, Call), program.schedules.text)]  # type: ignore[union-attr]


def follow(program: Program) -> dict[str, PrunePropagator]:
    """Where the rows of an image lie in each image stage, as it is."""
    border: dict[str, ImageRows] = {}
    found = {}
    for name in image_stages(program):
        stage = program.stages[name]
        given = {n: border[k] for k, n in stage.input_nodes().items() if k in border}
        found[name] = PrunePropagator(stage.graph, given)
        found[name].run()
        border |= {k: found[name].rows[n] for k, n in stage.output_nodes().items() if n in found[name].rows}
    return found


def image_sites(program: Program) -> list[PruneSite]:
    """Sites in the stages that make rows of pixels."""
    sites = []
    for stage, propagator in follow(program).items():
        first: dict[int, PruneSite] = {}  # by how many attentions came before
        last = None
        for n, passed in cut_points(propagator):
            held = propagator.rows[n]
            if n.target is RESHAPE and n.args[0].target is CONV2D:  # type: ignore[union-attr]
                sites.append(PruneSite(PIXELS, stage, held.count, held.grid, (n,)))
            elif held.dim == 1 and len(shape_of(n)) == 3:
                last = PruneSite(stage, stage, held.count, held.grid, (n,))
                first.setdefault(passed, replace(last, name=f"{stage}.{passed}"))
        inside = [p for passed, p in first.items() if passed and last and p.nodes != last.nodes]
        if len(inside) > 1:
            inside.append(replace(inside[-1], name=f"{stage}.all", nodes=tuple(n for p in inside for n in p.nodes)))
        sites += inside
        sites += [last] if last else []
    return [p for p in sites if p.rows > 1]


def cut_points(propagator: PrunePropagator, inputs: Collection[Node] | None = None) -> Iterator[tuple[Node, int]]:
    """Values with rows of an image that dominate the graph, and how many attentions stand before each.

    Every path from the inputs crosses such a value: what comes after it is made of it and of constants alone, so fewer
    rows there are fewer rows from there on.

        pixels -- conv -- reshape -+-- attention --+-- add -- norm -- output
                                   |               |
                                   +---------------+

    Cut points are reshape (0 attentions before it), add and norm (1); attention is none, since the residual passes it.

    Whole numbers (positions) lead nowhere. inputs: only paths from these count (by default from all inputs), and none
    that end in what is kept, such as caches.
    """
    last_use = {a: n for n in propagator.graph.nodes for a in n.all_input_nodes if n.op != "output" or inputs is None}
    live: set[Node] = set()
    fed: set[Node] = set()
    passed = 0
    for n in propagator.graph.nodes:
        begins = n.op == "placeholder" if inputs is None else n in inputs
        if n in last_use and (begins or any(a in fed for a in n.all_input_nodes)) and n.meta["dtype"] != torch.int64:
            fed.add(n)
            live.add(n)
        live -= {a for a in n.all_input_nodes if last_use.get(a) is n}
        passed += n.target in (ATTENTION, CACHED_ATTENTION)
        held = propagator.rows.get(n)
        if held and n.op == "call_function" and live == {n} and (inputs or isinstance(held.count, int)):
            yield n, passed


RESIZE = "resize"  # the method at pixels: a smaller image
