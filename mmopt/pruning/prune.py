"""Prunes at a site: chooses the tokens that stay, or scales the image down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from mmopt.ir.capture import StageSpec, TensorSpec, trace_stage
from mmopt.ir.graph import CONV2D, EXPAND, LINEAR, PERMUTE, Builder, Size, shape_of, simplify, symbol
from mmopt.ir.stage import Stage
from mmopt.pruning.methods import METHODS, reduce_rows
from mmopt.pruning.propagate import AttentionScores, ImageRows, NotApplicable, PruneFn, PrunePropagator
from mmopt.pruning.scores import grid_of, rows_at


# ---------------------------------------------------------------------------------------------------- choosing rows
class Choose(nn.Module):
    """`mmopt.pruning.methods` on the rows of an image within a value, to be traced."""

    def __init__(
        self, keep: int, method: str, rows: ImageRows, names: list[str], heads: int = 1, scored_from: Size = 0
    ):
        super().__init__()
        self.keep, self.method, self.rows, self.names = keep, method, rows, names
        self.heads, self.scored_from = heads, scored_from  # queries and keys may begin with other rows than x

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given, r = dict(zip(self.names, values, strict=True)), self.rows
        own = slice(r.lo, r.lo + r.size)
        query = keys = None
        if "queries" in given:  # the row before those of the image sums it up, else their mean does
            scored = slice(self.scored_from, self.scored_from + r.size)
            query = given["queries"][:, 0] if self.scored_from else given["queries"][:, scored].mean(1)
            keys = given["keys"][:, scored]
        grid = r.grid if r.new is None else None
        made = reduce_rows(
            given["x"][:, own], self.keep, self.method, grid, query, keys, self.heads, given.get("sizes")
        )
        places, sizes = made.places, made.sizes
        if "places" in given:
            places = rows_at(given["places"][..., None], places)[..., 0]
        if sizes is None and "sizes" in given:
            sizes = rows_at(given["sizes"][..., None], made.places)[..., 0]
        return made.rows, places, *([] if sizes is None else [sizes])


def choose(keep: int, method: str, weights: dict[str, Tensor]) -> PruneFn:
    """A cut that leaves `keep` rows of each image; constants of the method are added to `weights`."""

    def cut(propagator: PrunePropagator, n: Node, held: ImageRows) -> tuple[Node, ImageRows]:
        return chosen(propagator.b, propagator.env[n], held, propagator.scored, keep, method, weights)

    return cut


def chosen(
    b: Builder,
    x: Node,
    held: ImageRows,
    scored: AttentionScores | None,
    keep: int,
    method: str,
    weights: dict[str, Tensor],
) -> tuple[Node, ImageRows]:
    """x ``[N, n, d]`` with `keep` rows in place of those that it holds of each image."""
    given, more = {"x": x}, {}
    if scored is not None and (scored.rows.count, scored.rows.new) == (held.count, held.new):
        given |= {"queries": scored.queries, "keys": scored.keys}
        more = {"heads": scored.heads, "scored_from": scored.rows.lo}
    elif METHODS[method].needs_keys:
        raise NotApplicable(f"method {method} needs keys of an attention among these rows, there is none before")
    given |= {k: v for k, v in (("places", held.places), ("sizes", held.sizes)) if v is not None}
    inputs: Any = {k: TensorSpec(("N", *shape_of(v)[1:]), v.meta["dtype"]) for k, v in given.items()}
    module = Choose(keep, method, held, list(given), **more)
    rows, places, *sizes = inline(b, trace_stage(StageSpec(module, inputs, [*"abc"]), weights), [*given.values()])
    before = b.slice(x, 1, 0, held.lo)
    after = b.slice(x, 1, simplify(held.lo + held.size), shape_of(x)[1])
    made = b.cat([v for v in (before, rows, after) if shape_of(v)[1] != 0], 1)
    return made, replace(held, new=keep, places=places, sizes=sizes[0] if sizes else None)


def inline(b: Builder, stage: Stage, inputs: list[Node]) -> list[Node]:
    """The nodes of a stage, of samples N, within another graph."""
    env: dict[Node, Any] = dict(zip(stage.placeholders(), inputs, strict=True))
    batch = {symbol("N"): shape_of(inputs[0])[0]}

    def sized(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return tuple(sized(a) for a in x)
        if isinstance(x, Node):
            return env[x]
        return simplify(x.subs(batch)) if isinstance(x, sympy.Expr) else x

    for n in stage.graph.nodes:
        if n.op == "output":
            return [env[a] for a in n.args[0]]
        if n.op == "get_attr":
            env[n] = b.leaf(n)
        elif n.op == "call_function":
            env[n] = b.emit(n.target, sized(n.args), sized(n.meta["shape"]), n.meta["dtype"])
    raise AssertionError("a graph ends with its output")


# ------------------------------------------------------------------------------------------- scaling the image down
def resample(old: int, new: int) -> Tensor:
    """Bicubic resampling along one dimension with antialiasing, as a matrix ``[new, old]``."""
    unit = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(unit, (new, old), mode="bicubic", antialias=True, align_corners=False)[0, 0]


def scale_down(keep: int, weights: dict[str, Tensor]) -> PruneFn:
    """A cut where patches become rows: the image is made smaller, tables of positions are resampled like it."""

    def cut(propagator: PrunePropagator, n: Node, held: ImageRows) -> tuple[Node, ImageRows]:
        b, conv = propagator.b, propagator.env[n].args[0]
        assert held.grid is not None
        pixels, (h, w), grid = conv.args[0], held.grid, grid_of(keep, held.grid)
        if grid is None:
            raise ValueError(f"keep: {keep} rows of an image are no grid within {h} x {w}")
        kind, (high, wide) = pixels.meta["dtype"], shape_of(pixels)[-2:]
        if high % h or wide % w:
            raise ValueError(f"an image of {high} x {wide} pixels is no whole number of {h} x {w} patches")
        small = high // h * grid[0], wide // w * grid[1]
        x = along_last(b, pixels, constant(b, weights, "scale.columns", resample(wide, small[1]), kind))
        x = along_last(b, flipped(b, x), constant(b, weights, "scale.rows", resample(high, small[0]), kind))
        shape = (*shape_of(conv)[:-2], *grid)
        made = b.emit(CONV2D, (flipped(b, x), *conv.args[1:]), shape, kind)
        matrix = torch.kron(resample(h, grid[0]), resample(w, grid[1]))
        places = matrix.round(decimals=9).argmax(1).sort().values[None]  # of rows that weigh the same, the first
        held = replace(
            held,
            new=keep,
            matrix=constant(b, weights, "scale.tables", matrix, torch.float32),
            places=b.emit(
                EXPAND,
                (constant(b, weights, "scale.places", places, torch.int64), (shape[0], keep)),
                (shape[0], keep),
                torch.int64,
            ),
        )
        return b.reshape(made, (*shape[:-2], keep)), held

    return cut


def constant(b: Builder, weights: dict[str, Tensor], name: str, value: Tensor, dtype: torch.dtype) -> Node:
    while name in weights:  # of an image that was scaled down before
        name += "_"
    weights[name] = value.to(dtype)
    return b.weight(name, value.shape, dtype)


def along_last(b: Builder, x: Node, matrix: Node) -> Node:
    return b.emit(LINEAR, (x, matrix), (*shape_of(x)[:-1], shape_of(matrix)[0]), x.meta["dtype"])


def flipped(b: Builder, x: Node) -> Node:
    """The last two dimensions change places."""
    shape: list[Size] = list(shape_of(x))
    dims = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
    return b.emit(PERMUTE, (x, dims), [shape[d] for d in dims], x.meta["dtype"])
