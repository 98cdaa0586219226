"""Fewer rows through the rest of a graph: which values hold the rows of an image, and what follows when some are gone.

Rows are followed from where an image becomes patches, through every operator that works row by row
(`op_rules.operand_dims`), until attention reads them as keys. Where a `PruneFn` puts fewer rows in place of a value,
all that is made of it is made of fewer rows, and what stands beside it row by row (tables of positions) is gathered at
the rows that stayed. An operator that would need all rows refuses, with its reason (`NotApplicable`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Graph, Node

from mmopt.ir.attention_args import Attention, CachedAttention, given
from mmopt.ir.graph import (
    ADD,
    ARANGE,
    ATTENTION,
    CACHED_ATTENTION,
    CAT,
    CONV2D,
    CROSS_ATTENTION,
    EMBEDDING,
    EXPAND,
    FULL,
    LINEAR,
    MUL,
    PERMUTE,
    RESHAPE,
    SLICE,
    Builder,
    Size,
    aten,
    mapped,
    shape_of,
    simplify,
)
from mmopt.ir.op_rules import on_part, operand_dims


class NotApplicable(ValueError):  # noqa: N818  (a reason to report, not a failure)
    """Rows cannot be left out here; the message says which operator needs them all."""


@dataclass(frozen=True)
class ImageRows:
    """Rows of an image within a value: `count` of them from `lo` on along `dim`, a grid ``(height, width)`` if known.

    new: how many stand for them after a cut (None: all are there). places: which of the `count` these are; sizes: how
    many each stands for (None: one); both ``[..., new]``, with the dimensions before `dim`. matrix ``[new, count]``:
    what makes tables of the new rows, instead of places.
    """

    dim: int
    lo: Size
    count: Size
    grid: tuple[int, int] | None = None
    new: Size | None = None
    places: Node | None = None
    sizes: Node | None = None
    matrix: Node | None = None

    @property
    def size(self) -> Size:
        return self.count if self.new is None else self.new

    def same(self, other: ImageRows) -> bool:
        """Whether two operands hold the same rows at the same places of their dimensions."""
        return (self.lo, self.count, self.new) == (other.lo, other.count, other.new)


class AttentionScores(NamedTuple):
    """Queries and keys of the last attention among the rows of an image, by which they can be told apart."""

    queries: Node
    keys: Node
    heads: int
    rows: ImageRows


PruneFn = Callable[["PrunePropagator", Node, ImageRows], tuple[Node, ImageRows]]


class PrunePropagator:
    """Copies a graph; `given` are the rows of its inputs, `cuts` what to do after a node has been copied.

    more: inputs that the new graph has before those of the old one, name -> (shape, dtype).
    """

    def __init__(
        self,
        graph: Graph,
        given: Mapping[Node, ImageRows] | None = None,
        cuts: Mapping[Node, PruneFn] | None = None,
        more: Mapping[str, tuple[tuple, torch.dtype]] | None = None,
    ):
        self.graph, self.given, self.cuts = graph, given or {}, cuts or {}
        self.b = Builder()
        self.more = {k: self.b.placeholder(k, shape, dtype) for k, (shape, dtype) in (more or {}).items()}
        self.past: Node | None = None  # after a cut, how many slots of a cache are filled
        self.env: dict[Node, Any] = {}
        self.rows: dict[Node, ImageRows] = {}  # of nodes of the old graph
        self.scored: AttentionScores | None = None

    def run(self) -> list[Node]:
        """What the outputs become, in the builder `b`; NotApplicable if an operator needs rows that are gone."""
        for n in self.graph.nodes:
            if n.op == "output":
                return [self.env[a] for a in n.args[0]]
            held: ImageRows | None = None
            if n.op == "placeholder":
                self.env[n], held = self.input(n)
            elif n.op == "get_attr":
                self.env[n] = self.b.leaf(n)
            else:
                self.env[n], held = self.visit(n)
            if held is not None:
                self.rows[n] = held
            if n in self.cuts:
                self.env[n], self.rows[n] = self.cuts[n](self, n, self.rows[n])
        raise AssertionError("a graph ends with its output")

    def input(self, n: Node) -> tuple[Node, ImageRows | None]:
        """An input; if rows of it are gone, places and sizes of the others are inputs too, named after it."""
        held = self.given.get(n)
        made = self.b.placeholder(n.target, narrowed(shape_of(n), held) if held else shape_of(n), n.meta["dtype"])
        if held is None:
            return made, None
        beside = {} if held.matrix is None else {"matrix": self.b.leaf(held.matrix)}
        for name in ("places", "sizes"):
            if (x := getattr(held, name)) is not None:
                beside[name] = self.b.placeholder(f"{n.target}_{name}", shape_of(x), x.meta["dtype"])
        return made, replace(held, **beside)

    def visit(self, n: Node) -> tuple[Node, ImageRows | None]:
        args = mapped(n.args, self.env)
        if n.target is CAT:
            return self.cat(n, args)
        held = {i: self.rows[a] for i, a in enumerate(n.args) if isinstance(a, Node) and a in self.rows}
        if not held:
            return self.b.copy(n, args), patch_rows(n)
        try:
            return self.follow(n, args, held)
        except NotApplicable:
            if any(r.new is not None for r in held.values()):
                raise
            return self.b.copy(n, args), None

    def follow(self, n: Node, args: tuple, held: dict[int, ImageRows]) -> tuple[Node, ImageRows | None]:
        first = next(iter(held.values()))
        if n.target is ATTENTION:
            return self.attention(n, args, held)
        if n.target is CACHED_ATTENTION:
            return self.cached_attention(n, args, held)
        if n.target is operator.getitem:
            shape = args[0].meta["shape"][args[1]]
            return self.b.item(args[0], args[1], shape, n.meta["dtype"]), first if args[1] == 0 else None
        if n.target is CROSS_ATTENTION and 1 in held:
            if held[1].dim != 2 or not held[1].same(held.get(2, first)):
                raise NotApplicable(f"{n.name}: its keys and values are other rows")
            return self.b.copy(n, args), None
        if n.target is SLICE and first.dim == args[1] and len(args) == 4:
            return self.slice(n, args, first)
        if n.target is RESHAPE and (found := merged_dim(n, first)):
            dim, before = found
            new = None if first.new is None else simplify(before * first.new)
            made = on_part(self.b, n, dim, simplify(before * first.size), args)
            rows = ImageRows(dim, 0, simplify(before * first.count), None, new, sizes=first.sizes)
            return made, self.reshaped(rows, shape_of(made))
        for dim in range(len(shape_of(n)) if isinstance(n.meta["shape"], tuple) else 0):
            rule = operand_dims(n, dim)
            if rule and all(rule.get(i) == r.dim for i, r in held.items()):
                return self.row_by_row(n, args, held, rule, dim)
        raise NotApplicable(f"{n.name} ({n.target}) does not work row by row along the rows of the image")

    def row_by_row(
        self, n: Node, args: tuple, held: dict[int, ImageRows], rule: dict, dim: int
    ) -> tuple[Node, ImageRows]:
        first = next(iter(held.values()))
        out = replace(first, dim=dim)
        if not all(first.same(r) for r in held.values()):
            raise NotApplicable(f"{n.name}: its operands hold other rows")
        if first.new is None:
            return self.b.copy(n, args), out
        new = list(args)
        for j, m in rule.items():
            if j not in held and m is not None and isinstance(args[j], Node):
                new[j] = self.gather_operand(args[j], m, out, n.name)
        size = simplify(shape_of(n)[dim] - first.count + first.new)
        return (made := on_part(self.b, n, dim, size, tuple(new))), self.reshaped(out, shape_of(made))

    def cat(self, n: Node, args: tuple) -> tuple[Node, ImageRows | None]:
        members, dim = args
        held = {i: self.rows[a] for i, a in enumerate(n.args[0]) if a in self.rows}
        along = {i: r for i, r in held.items() if r.dim == dim}
        if any(r.dim != dim and r.new is not None for r in held.values()):
            if len(held) < len(members) or len({(r.dim, r.lo, r.count, r.new) for r in held.values()}) > 1:
                raise NotApplicable(f"{n.name} puts rows beside others that are as many")
            return self.b.cat(list(members), dim), next(iter(held.values()))
        made = self.b.cat(list(members), dim)
        if not along:
            same = len(held) == len(members) and len(set(held.values())) == 1
            return made, next(iter(held.values())) if same else None
        if len([r for r in along.values() if r.new is not None]) > 1:
            raise NotApplicable(f"{n.name} puts rows of two images after each other")
        i = min(along, key=lambda j: (along[j].new is None, along[j].grid is None))
        before = sum(shape_of(a)[dim] for a in n.args[0][:i])
        return made, replace(along[i], lo=simplify(before + along[i].lo))

    def slice(self, n: Node, args: tuple, held: ImageRows) -> tuple[Node, ImageRows | None]:
        x, dim, lo, hi = args
        end, left_out = simplify(held.lo + held.count), simplify(held.count - held.size)
        if not at_most(end, lo) and not at_most(hi, held.lo):  # they share rows
            if not (at_most(lo, held.lo) and at_most(end, hi)):
                raise NotApplicable(f"{n.name} takes a part of the image's rows")
            return self.b.slice(x, dim, lo, simplify(hi - left_out)), replace(held, lo=simplify(held.lo - lo))
        if at_most(end, lo):
            return self.b.slice(x, dim, simplify(lo - left_out), simplify(hi - left_out)), None
        return self.b.slice(x, dim, lo, hi), None

    def attention(self, n: Node, args: tuple, held: dict[int, ImageRows]) -> tuple[Node, ImageRows | None]:
        """Rows as queries stay what they are; rows as keys end here, and those that stand for several weigh as much."""
        a, asks, reads = Attention(*args), held.get(0), held.get(1)
        if any(r.dim != 1 for r in held.values()):
            raise NotApplicable(f"{n.name}: rows lie in another dimension")
        if reads is not None and reads.new is not None:
            if 2 not in held or not reads.same(held[2]):
                raise NotApplicable(f"{n.name}: its keys and values are other rows")
            if a.key_mask is not None or (a.causal and (asks is None or asks.new is None)):
                raise NotApplicable(f"{n.name} has a mask of its own over these rows")
            if reads.sizes is not None:
                a = a._replace(key_mask=self.weight_of_sizes(a.k, reads))
        elif reads is None and 2 in held:
            raise NotApplicable(f"{n.name}: its keys and values are other rows")
        if asks is not None and reads is not None and asks.same(reads):
            self.scored = AttentionScores(a.q, a.k, a.heads, asks)
        out = asks or ImageRows(1, 0, shape_of(n)[1])  # rows that ask about the image stand for it from here on
        shape = list(shape_of(n))
        shape[1] = shape_of(a.q)[1]
        return self.b.emit(n.target, given(a), shape, n.meta["dtype"]), out

    def cached_attention(self, n: Node, args: tuple, held: dict[int, ImageRows]) -> tuple[Node, ImageRows | None]:
        """Rows go into the caches; after a cut fewer of them, and what hides slots by number no longer holds."""
        a, first = CachedAttention(*args), held.get(0)
        if first is None or any(held.get(i) is None or held[i].dim != 1 or not first.same(held[i]) for i in range(3)):
            raise NotApplicable(f"{n.name}: its queries, keys and values are other rows")
        self.scored = AttentionScores(a.q, a.k, a.heads, first) if a.heads == a.kv_heads else None
        if first.new is None:
            return self.b.copy(n, args), first
        assert self.past is not None
        new = given(a._replace(past=self.past, key_mask=None))
        shapes = [narrowed(n.meta["shape"][0], first), *n.meta["shape"][1:]]
        return self.b.emit(n.target, new, shapes, n.meta["dtype"]), first

    def weight_of_sizes(self, keys: Node, rows: ImageRows) -> Node:
        """log(how many each key stands for) ``[batch, keys]``, to be added to scores (Bolya et al. 2023,
        arXiv:2210.09461)."""
        b, sizes, dtype = self.b, rows.sizes, keys.meta["dtype"]
        assert sizes is not None
        logs = b.emit(aten.log.default, (sizes,), shape_of(sizes), sizes.meta["dtype"])
        logs = self.in_dtype(logs, dtype)
        batch, total = shape_of(keys)[0], shape_of(keys)[1]
        after = simplify(total - rows.lo - shape_of(sizes)[-1])
        zeros = [b.emit(FULL, ((batch, n), 0.0), (batch, n), dtype) for n in (rows.lo, after)]
        return b.cat([x for x in (zeros[0], logs, zeros[1]) if shape_of(x)[1] != 0], 1)

    def gather_operand(self, table: Node, dim: int, rows: ImageRows, where: str) -> Node:
        """A per-row operand (table of positions, mask) at the rows that stayed. `rows.dim`: that of what reads it."""
        b, shape = self.b, shape_of(table)
        lo, hi, new = rows.lo, simplify(rows.lo + rows.count), rows.size
        if table.target is FULL:
            s = [*shape[:dim], simplify(shape[dim] - rows.count + new), *shape[dim + 1 :]]
            return b.emit(FULL, (tuple(s), table.args[1]), s, table.meta["dtype"])
        while table.target is EXPAND and shape_of(table.args[0])[dim - len(shape)] == shape[dim]:
            table, dim = table.args[0], dim - len(shape) + len(shape_of(table.args[0]))
            shape = shape_of(table)
        if (made := self.fill_operand(table, dim, rows)) is not None:
            return made
        if rows.places is not None and dim == 1 and not table.meta["const"] and shape[0] == shape_of(rows.places)[0]:
            middle = self.gathered(b.slice(table, 1, lo, hi), rows.places)
            return b.cat([x for x in (b.slice(table, 1, 0, lo), middle, b.slice(table, 1, hi, shape[1])) if some(x)], 1)
        if any(s != 1 for s in shape[:dim]):
            raise NotApplicable(f"{where}: what stands beside the rows ({table.name}) differs from sample to sample")
        rest, kind = shape[dim + 1 :], table.meta["dtype"]
        flat = b.reshape(b.slice(table, dim, lo, hi), (rows.count, sympy.prod(rest)))
        width = shape_of(flat)[1]
        if rows.matrix is not None:
            turned = b.emit(PERMUTE, (flat, (1, 0)), (width, rows.count), kind)
            made, lead = b.emit(LINEAR, (self.in_dtype(rows.matrix, kind), turned), (new, width), kind), shape[:dim]
        elif rows.places is not None and len(shape_of(rows.places)) == rows.dim + 1:
            lead = shape_of(rows.places)[:-1]
            made = b.emit(EMBEDDING, (flat, rows.places), (*lead, new, width), kind)
        else:
            raise NotApplicable(f"{where}: what stands beside the rows cannot be told apart by their places")

        def fixed(start: Size, end: Size) -> list[Node]:
            if simplify(end - start) == 0:
                return []
            x = b.reshape(b.slice(table, dim, start, end), (*[1] * len(lead), simplify(end - start), *rest))
            wide = (*lead, *shape_of(x)[len(lead) :])
            return [b.emit(EXPAND, (x, wide), wide, kind)]

        return b.cat([*fixed(0, lo), b.reshape(made, (*lead, new, *rest)), *fixed(hi, shape[dim])], len(lead))

    def fill_operand(self, table: Node, dim: int, rows: ImageRows) -> Node | None:
        """`gather_operand` where one number stands beside all rows of the image."""
        inner, d = table, dim
        while inner.target is RESHAPE and (found := operand_dims(inner, d)):
            inner, d = inner.args[0], found[0]
        part = self.b.slice(inner, d, rows.lo, simplify(rows.lo + rows.count))
        if part.target is not FULL:
            return None
        shape = [rows.size if i == d else s for i, s in enumerate(shape_of(part))]
        few = self.b.emit(FULL, (tuple(shape), part.args[1]), shape, part.meta["dtype"])
        before = self.b.slice(inner, d, 0, rows.lo)
        after = self.b.slice(inner, d, simplify(rows.lo + rows.count), shape_of(inner)[d])
        made = self.b.cat([x for x in (before, few, after) if shape_of(x)[d] != 0], d)
        return self.b.reshape(made, narrowed(shape_of(table), replace(rows, dim=dim)))

    def gathered(self, x: Node, places: Node) -> Node:
        """Rows of x ``[B, n, d]`` at places ``[B, k]``."""
        b, (batch, n, width), k = self.b, shape_of(x), shape_of(places)[1]
        first = b.emit(MUL, (b.emit(ARANGE, (0, batch), (batch,), torch.int64), n), (batch,), torch.int64)
        at = b.emit(ADD, (places, b.reshape(first, (batch, 1))), (batch, k), torch.int64)
        return b.emit(EMBEDDING, (b.reshape(x, (batch * n, width)), at), (batch, k, width), x.meta["dtype"])

    def in_dtype(self, x: Node, dtype: torch.dtype) -> Node:
        return x if x.meta["dtype"] == dtype else self.b.emit(aten.to.dtype, (x, dtype), shape_of(x), dtype)

    def reshaped(self, rows: ImageRows, shape: tuple) -> ImageRows:
        """places and sizes in the shape of the dimensions before the rows, where they hold as many elements."""
        lead, made = tuple(shape[: rows.dim]), {}
        for name in ("places", "sizes"):
            x = getattr(rows, name)
            if x is not None:
                wanted = (*lead, rows.new)
                as_many = simplify(sympy.prod(wanted) - sympy.prod(shape_of(x))) == 0
                made[name] = self.b.reshape(x, wanted) if as_many else x
        return replace(rows, **made)  # type: ignore[arg-type]


def some(x: Node) -> bool:
    """Whether a value ``[B, n, ...]`` may have rows."""
    return shape_of(x)[1] != 0


def narrowed(shape: tuple, rows: ImageRows) -> tuple:
    """The shape of a value when only `rows.new` of its rows are there."""
    return tuple(simplify(s - rows.count + rows.size) if i == rows.dim else s for i, s in enumerate(shape))


def patch_rows(n: Node) -> ImageRows | None:
    """A grid of patches becomes rows: ``[..., height, width]`` of a convolution reshaped to ``[..., rows]``."""
    if n.target is not RESHAPE or not isinstance(n.args[0], Node) or n.args[0].target is not CONV2D:
        return None
    *lead, h, w = shape_of(n.args[0])
    if shape_of(n) != (*lead, simplify(h * w)) or not isinstance(h, int) or not isinstance(w, int):
        return None
    return ImageRows(len(lead), 0, h * w, (h, w))


def merged_dim(n: Node, rows: ImageRows) -> tuple[int, Size] | None:
    """(dimension, how often) if a reshape puts the rows of several images or frames after each other."""
    old, new, d = shape_of(n.args[0]), shape_of(n), rows.dim
    if d == 0 or rows.lo != 0 or rows.count != old[d] or operand_keeps(n, d):
        return None
    for dim, size in enumerate(new):
        same = simplify(sympy.prod(old[: d - 1]) - sympy.prod(new[:dim])) == 0
        if same and simplify(size - old[d - 1] * old[d]) == 0:
            return dim, old[d - 1]
    return None


def operand_keeps(n: Node, d: int) -> bool:
    return any((operand_dims(n, dim) or {}).get(0) == d for dim in range(len(shape_of(n))))


def at_most(a: Size, b: Size) -> bool:
    """True if a <= b is known."""
    gap = simplify(b - a)
    return gap >= 0 if isinstance(gap, int) else gap.is_nonnegative is True
