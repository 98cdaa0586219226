"""The algebra of rows: an interpreter whose values may be in parts along a dimension.

``f([a; b]) = [f(a); f(b)]`` for every operator that works row by row. A value is a node or `Parts`; concatenations make
parts, operators with a rule (`op_rules.operand_dims`) run part by part, a slice takes the parts it wants, and what has
no rule joins its parts again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from mmopt.ir.graph import (
    CAT,
    EXPAND,
    FULL,
    RESHAPE,
    SLICE,
    WHERE,
    Builder,
    Size,
    mapped,
    shape_of,
    simplify,
)
from mmopt.ir.op_rules import on_part, operand_dims, rule_of


@dataclass(frozen=True)
class Parts:
    """A value as the concatenation of `values` along `dim`."""

    dim: int
    values: tuple[Node, ...]

    @property
    def bounds(self) -> list[Size]:
        """Where parts begin, and the end of the last: ``len(values) + 1`` offsets."""
        offsets: list[Size] = [0]
        for v in self.values:
            offsets.append(simplify(offsets[-1] + shape_of(v)[self.dim]))
        return offsets


if TYPE_CHECKING:
    from mmopt.ir.stage import Stage

Value = Any  # Node or Parts


def surely(size: Size) -> bool:
    """True if a size is known not to be negative."""
    return size >= 0 if isinstance(size, int) else size.is_nonnegative is True


def positive(size: Size) -> bool:
    """True if a size is known to be at least one."""
    return size > 0 if isinstance(size, int) else size.is_positive is True


def uniform(node: Any) -> Any:
    """The one number a node is filled with, or None."""
    while isinstance(node, Node) and node.target in (RESHAPE, EXPAND):
        node = node.args[0]
    return node.args[1] if isinstance(node, Node) and node.target is FULL else None


class PartInterpreter:
    """Interprets one graph in parts. `log(where, why)` is told wherever parts had to be joined."""

    def __init__(self, log: Callable[[str, str], None]):
        self.b, self.log = Builder(), log
        self.private: set[Node] = set()  # made for one reader only: slicing it may as well slice what it is made from
        self.splits = 0
        self.routes = 0

    def run(self, graph: Graph) -> Graph:
        env: dict[Node, Value] = {}
        for n in graph.nodes:
            if n.op in ("placeholder", "get_attr"):
                env[n] = self.b.leaf(n)
            elif n.op == "output":
                self.b.output([self.join(env[a]) for a in n.args[0]])
            else:
                made = self.apply(n, list(mapped(n.args, env)))
                env[n] = made
                if isinstance(made, Node) and len(n.users) == 1:
                    self.private.add(made)
        return self.b.graph

    def join(self, v: Any) -> Any:
        """Always legal: parts become one node again."""
        if isinstance(v, tuple):
            return tuple(self.join(x) for x in v)
        return self.b.cat(list(v.values), v.dim) if isinstance(v, Parts) else v

    def apply(self, n: Node, args: list[Any]) -> Value:
        if n.target is CAT:
            return self.cat(n, args[0], args[1])
        if n.target is SLICE and isinstance(args[0], Parts) and args[0].dim == args[1] and len(args) == 4:
            return self.take(args[0], args[1], args[2], args[3])
        seams = [(i, a) for i, a in enumerate(args) if isinstance(a, Parts)]
        if n.target is WHERE and (choice := uniform(args[0])) is not None:
            self.routes += 2
            self.splits += 1
            chosen = args[1 if choice else 2]
            whole = self.join(chosen)
            if shape_of(whole) == shape_of(n):
                return chosen
            return self.b.emit(EXPAND, (whole, shape_of(n)), shape_of(n), n.meta["dtype"])
        if not seams:
            return self.b.copy(n, tuple(args))
        i, seam = seams[0]
        rank = len(shape_of(n)) if isinstance(shape_of(n), tuple) else 0
        rule: dict[int, Any] | None = None
        dim = 0
        for dim in range(rank):
            rule = operand_dims(n, dim)
            if rule and rule.get(i) == seam.dim:
                break
            rule = None
        why = f"{n.target} does not work row by row along it" if rule is None else self.why_not(n, args, rule, seam)
        if why or rule is None:
            self.log(n.name, str(why))
            return self.b.copy(n, tuple(self.join(a) for a in args))
        bounds = seam.bounds
        pieces = []
        for lo, hi in itertools.pairwise(bounds):
            pieces.append(self.piece(n, args, rule, dim, lo, hi))
        self.splits += 1
        return Parts(dim, tuple(pieces))

    def piece(self, n: Node, args: list[Any], rule: dict, dim: int, lo: Size, hi: Size) -> Node:
        def part(i: int) -> Any:
            m = rule.get(i)
            return self.take(args[i], m, lo, hi) if m is not None else args[i]

        if n.target is WHERE and (choice := uniform(part(0))) is not None:
            self.routes += 1
            chosen = part(1 if choice else 2)
            shape = list(shape_of(n))
            shape[dim] = simplify(hi - lo)
            return self.b.emit(EXPAND, (chosen, tuple(shape)), shape, n.meta["dtype"])
        new = tuple(part(i) for i in range(len(args)))
        return on_part(self.b, n, dim, simplify(hi - lo), new, source=(n.name, dim, str(lo)))

    def why_not(self, n: Node, args: list[Any], rule: dict, seam: Parts) -> str | None:
        """Splitting is only for values that already lie in these parts, or that cost nothing to slice."""
        if rule_of(n.target).needs_rows and not all(positive(shape_of(v)[seam.dim]) for v in seam.values):
            return "a part may have no rows, which kernels refuse"
        for i, a in enumerate(args):
            m = rule.get(i)
            if m is None or not isinstance(a, Parts | Node):
                if isinstance(a, Parts):
                    return "an argument in parts is read whole"
                continue
            if isinstance(a, Parts) and (a.dim != m or a.bounds != seam.bounds):
                return "its arguments are cut at different places"
            routed = n.target is WHERE and i > 0 and isinstance(args[0], Parts)
            if isinstance(a, Node) and not (a.meta["const"] or a.op == "placeholder" or a.target is FULL or routed):
                return "an argument is one whole that would have to be cut"
        return None

    def cat(self, n: Node, values: tuple[Value, ...], dim: int) -> Value:
        if n.meta["const"] or n.meta["dtype"] == torch.int64:  # positions: what they are looked up for stays whole
            return self.b.cat([self.join(v) for v in values], dim)
        flat: list[Node] = []
        for v in values:
            flat += v.values if isinstance(v, Parts) and v.dim == dim else [self.join(v)]
        return Parts(dim, tuple(flat))

    def take(self, v: Value, dim: int, lo: Size, hi: Size) -> Node:
        """Rows lo to hi of a value along dim: whole parts where they fit, a slice pulled up where that is free."""
        lo, hi = simplify(lo), simplify(hi)
        if isinstance(v, Parts):
            if v.dim != dim:
                return self.b.slice(self.join(v), dim, lo, hi)
            bounds = v.bounds
            for start, end, value in zip(bounds, bounds[1:], v.values, strict=False):
                if surely(simplify(lo - start)) and surely(simplify(end - hi)):
                    return self.take(value, dim, simplify(lo - start), simplify(hi - start))
            return self.b.slice(self.join(v), dim, lo, hi)
        if lo == 0 and hi == shape_of(v)[dim]:
            return v
        if v.target is FULL or (v in self.private and v.op == "call_function"):
            rule = operand_dims(v, dim)
            if rule is not None and v.target is not CAT:
                args = []
                for i, a in enumerate(v.args):
                    m = rule.get(i)
                    args.append(self.take(a, m, lo, hi) if isinstance(a, Node) and m is not None else a)
                return on_part(self.b, v, dim, simplify(hi - lo), tuple(args), source=(v.name, dim, str(lo)))
        return self.b.slice(v, dim, lo, hi)


def depth(node: Node, known: dict[Node, int]) -> int:
    """Heavy operators on the longest way from an input to this node; constants have depth -1."""
    if node not in known:
        stack = [node]
        while stack:
            n = stack[-1]
            waiting = [a for a in n.all_input_nodes if a not in known]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if n.op == "get_attr" or n.meta.get("const"):
                known[n] = -1
            else:
                known[n] = max([known[a] for a in n.all_input_nodes], default=0) + rule_of(n.target).heavy
    return known[node]


def works_along(stage: Stage, dim: int) -> bool:
    """Whether a stage makes each part of all its outputs along `dim` of that part of its inputs alone."""
    along: dict[Node, int] = dict.fromkeys(stage.output_nodes().values(), dim)
    for n in reversed(stage.graph.nodes):
        if n not in along or n.op == "get_attr" or n.meta.get("const"):
            continue
        if n.op == "placeholder":
            if along[n] != dim:
                return False
            continue
        rule = operand_dims(n, along[n])
        if rule is None:
            return False
        for i, a in enumerate(n.args):
            dims = rule.get(i)
            for x, place in zip(a, dims, strict=True) if isinstance(dims, list) else [(a, dims)]:
                if (
                    isinstance(x, Node)
                    and not x.meta["const"]
                    and (place is None or along.setdefault(x, place) != place)
                ):
                    return False
    return True
